"""`osp data check` and `data sheet`: options, and checks before work starts."""

import logging
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from opensoraplan.cli.options import Changes, OptionalPath, check_exists, optional
from opensoraplan.documents import read_json

if TYPE_CHECKING:
    from opensoraplan.train.config import RunSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataCheck:
    """Show which clips training would use, and why the others are dropped."""

    manifest: Positional[Path]
    """A run (RUN.toml), a folder of clips with .txt captions, or a data.txt, .json, .jsonl, .csv
    or .parquet manifest.
    """
    data: OptionalPath = None
    """The guide's data.json, for the selection rules. Default: the guide's values."""
    root: Annotated[Path | None, optional("PATH", "(default: the manifest's folder)")] = None
    """Folder that relative paths of clips start from."""
    csv: OptionalPath = None
    """Also write each clip with the decision and its reason to this .csv file."""
    global_batch: Annotated[int | None, optional("N")] = None
    """Samples per step: also drop shapes with too few clips for such batches. Default: the run's."""
    all_files: bool = False
    """Open every file, even if the manifest has size, length and frame rate, and drop clips that differ
    from the manifest.
    """
    captions: bool = True
    """Drop clips without a caption. --no-captions is for training a VAE, and is the default for its runs."""
    seed: Annotated[int | None, optional("N", "(default: 0)")] = None
    """Random seed of the windows and of drop_short_ratio."""
    set: Annotated[Changes, optional("KEY=VALUE ...")] = ()
    """Change selection rules, for example num_frames=25 max_height=96, or settings of a run as
    in `osp train`.
    """


@dataclass(frozen=True)
class DataSheet:
    """Make a contact sheet: frames of each video side by side in one .png."""

    videos: Annotated[Positional[tuple[Path, ...]], optional("VIDEO ...", "(required)")]
    """Video files."""
    out: Path = Path("sheet.png")
    """Picture to write. A number is added if the name is taken."""
    columns: int = 7
    """Frames per video."""


def data_check(options: DataCheck) -> None:
    """`osp data check`."""
    check_exists(options.manifest)
    if options.data is not None:
        check_exists(options.data)
    if options.global_batch is not None and options.global_batch < 1:
        raise ValueError(f"--global-batch must be at least 1, got {options.global_batch}")

    from opensoraplan.data.check import table_of, write_csv
    from opensoraplan.data.manifest import read_manifest
    from opensoraplan.data.selection import select
    from opensoraplan.formats.mindspeed.inference import read_selection
    from opensoraplan.train.config import TextSettings, TrainSettings
    from opensoraplan.train.inputs.caption_check import find_caption_losses

    manifest, root, seed = options.manifest, options.root, options.seed or 0
    changes = [*chain(*options.set)]
    global_batch, need_captions = options.global_batch, options.captions
    text = TextSettings()
    if _is_run(manifest):
        from opensoraplan.train.inputs.sources import global_batch_of

        run = _read_run(options, changes)
        manifest, root, seed = run.data.manifest, run.data.root, run.seed
        if manifest is None:
            raise ValueError(
                f"{options.manifest} has no data.manifest: its features were selected by osp cache"
            )
        settings = run.data.selection
        global_batch = global_batch_of(run) if global_batch is None else global_batch
        text = run.text if isinstance(run, TrainSettings) else text
        need_captions = need_captions and isinstance(run, TrainSettings)
        logger.info("%s: clips of %s, %d a step", options.manifest, manifest, global_batch)
    else:
        settings = read_selection(options.data, changes=changes)
    records = read_manifest(manifest, root=root, probing="all" if options.all_files else "missing")
    selection = select(
        records,
        settings,
        seed=seed,
        global_batch=global_batch,
        need_captions=need_captions,
        allow_empty=True,  # the table says why
    )
    blocks = [table_of(selection)]
    if need_captions and (losses := find_caption_losses(selection.kept, text).table()):
        blocks.append(losses)
    if options.csv is not None:
        blocks.append(f"every record: {write_csv(selection, options.csv)}")
    sys.stdout.write("\n\n".join(blocks) + "\n")
    if not selection.kept:
        raise ValueError(f"no clip of {manifest} would be used: the table shows why")


def _is_run(path: Path) -> bool:
    """Whether this file describes a run (its RUN.toml or config.json) and not clips."""
    if path.suffix != ".json" or not path.is_file():
        return path.suffix == ".toml"
    content = read_json(path)
    return isinstance(content, dict) and {"output", "data"} <= content.keys()


def _read_run(options: DataCheck, changes: list[str]) -> "RunSettings":
    """Read the settings of the run to check."""
    from opensoraplan.train.run.files import read_settings

    path = options.manifest
    given = {"--data": options.data, "--root": options.root, "--seed": options.seed}
    twice = [name for name, value in given.items() if value is not None]
    if twice:
        raise ValueError(
            f"{path} is a run, so its settings are used: change them with --set data.root=..., seed=... or "
            f"data.selection.KEY=... instead of {', '.join(twice)}"
        )
    return read_settings(path, changes=changes)


def data_sheet(options: DataSheet) -> None:
    """`osp data sheet`."""
    for video in options.videos:
        check_exists(video)

    from opensoraplan.data.sheet import contact_sheet

    logger.info("wrote %s", contact_sheet(options.videos, options.out, columns=options.columns))
