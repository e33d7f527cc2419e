"""`osp data`: check clips to train on, render some, look at many at once."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, subcommand

from opensoraplan.cli.options import OptionalPath, check_exists, optional

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataCheck:
    """Show what training would use of a manifest, and why the rest is dropped."""

    manifest: Positional[Path]
    """A folder of clips with .txt captions, or a data.txt, .json, .jsonl, .csv or .parquet manifest."""
    data: OptionalPath = None
    """The guide's data.json, for what to select; without it, the guide's values."""
    root: Annotated[Path | None, optional("PATH", "(default: the manifest's folder)")] = None
    """Where relative paths of clips begin."""
    csv: OptionalPath = None
    """Also write every record with its fate and reason to this .csv."""
    global_batch: Annotated[int | None, optional("N")] = None
    """Also drop shapes that would fill fewer than 4 batches of so many samples."""
    all_files: bool = False
    """Open every file, also where the manifest says all there is to know."""
    seed: int = 0
    """Of the random windows and of drop_short_ratio."""
    set: Annotated[tuple[str, ...], optional("KEY=VALUE ...")] = ()
    """Other values of the selection, for example num_frames=25 max_height=96 max_width=96."""


@dataclass(frozen=True)
class DataRender:
    """Render captioned clips of moving shapes, to try things on: mp4 files, annotation.json and data.txt."""

    folder: Positional[Path]
    """Where to; the same command again, or with a larger count, continues."""
    count: int = 100
    """Clips."""
    seed: int = 0
    """One seed, one set of clips."""
    frames: int = 25
    """8k + 1."""
    height: int = 96
    """Pixels, a multiple of 16."""
    width: int = 96
    """Pixels, a multiple of 16."""
    fps: int = 12
    """Frames a second."""
    held_out: bool = False
    """Only combinations of colour, shape and motion that are never rendered otherwise: to test on."""


@dataclass(frozen=True)
class DataSheet:
    """Put frames of videos side by side into one .png, a row for each video."""

    videos: Positional[tuple[Path, ...]]
    """Any files that ffmpeg reads."""
    out: Path = Path("sheet.png")
    """The picture; it is numbered if it exists."""
    columns: int = 7
    """Frames of each video."""


@dataclass(frozen=True)
class Data:
    """Clips: check those to train on, render some, look at many at once."""

    job: OmitArgPrefixes[
        Annotated[DataCheck, subcommand("check", prefix_name=False)]
        | Annotated[DataRender, subcommand("render", prefix_name=False)]
        | Annotated[DataSheet, subcommand("sheet", prefix_name=False)]
    ]


def data_check(options: DataCheck) -> None:
    """`osp data check`."""
    check_exists(options.manifest)
    if options.data is not None:
        check_exists(options.data)

    from opensoraplan.convert.mindspeed_json import read_selection
    from opensoraplan.data.check import check_manifest

    table = check_manifest(
        options.manifest,
        settings=read_selection(options.data, changes=options.set),
        root=options.root,
        csv_path=options.csv,
        global_batch=options.global_batch,
        probing="all" if options.all_files else "missing",
        seed=options.seed,
    )
    sys.stdout.write(table + "\n")


def data_render(options: DataRender) -> None:
    """`osp data render`."""
    import torch

    from opensoraplan.data.shapes_demo import write_dataset

    torch.set_num_threads(1)  # more only get in each other's way on pictures of this size
    manifest = write_dataset(
        options.folder,
        count=options.count,
        seed=options.seed,
        frames=options.frames,
        height=options.height,
        width=options.width,
        fps=options.fps,
        held_out=options.held_out,
    )
    logger.info("wrote %s", manifest)


def data_sheet(options: DataSheet) -> None:
    """`osp data sheet`."""
    for video in options.videos:
        check_exists(video)

    from opensoraplan.data.sheet import contact_sheet

    logger.info("wrote %s", contact_sheet(options.videos, options.out, columns=options.columns))
