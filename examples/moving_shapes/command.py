"""The options of `render_clips.py`, and what it does with them."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from opensoraplan.cli.options import optional
from opensoraplan.cli.parse import check_options, parse_options

PROGRAM = "render_clips.py"
logger = logging.getLogger("opensoraplan.render_clips")  # whose messages the command shows


@dataclass(frozen=True)
class Render:
    """Render captioned clips of moving shapes to try training on: mp4 files, annotation.json, data.txt."""

    folder: Positional[Path]
    """Folder to write to. The same command again, or with a larger --count, continues."""
    count: int = 100
    """Number of clips."""
    seed: int = 0
    """Random seed; each seed gives another set of clips."""
    frames: int = 25
    """Frames per clip, 8k + 1."""
    height: int = 96
    """Height in pixels, a multiple of 16."""
    width: int = 128
    """Width in pixels, a multiple of 16."""
    fps: int = 12
    """Frames per second."""
    only: Annotated[str | None, optional("THING")] = None
    """Render one thing alone, such as "brown heart", which the built-in model has never seen."""
    slow: bool = False
    """Render slow motions, of which a clip shows a part, with "slowly" in the captions."""
    held_out: bool = False
    """Render only combinations of colour, shape and motion that are left out otherwise, for testing."""


def run(words: list[str]) -> None:
    """Render what a command line asks for."""
    check_options(Render, words, program=PROGRAM)
    options = parse_options(Render, words, program=PROGRAM)

    import torch
    from moving_shapes.writing import write_dataset

    if options.only is not None and options.held_out:
        raise ValueError("--only and --held-out exclude each other: give one of them")
    if options.only is not None and options.slow:
        raise ValueError("--only and --slow exclude each other: give one of them")
    torch.set_num_threads(1)  # more only get in each other's way on pictures of this size
    size = (options.frames, options.height, options.width)
    manifest = write_dataset(
        options.folder,
        count=options.count,
        seed=options.seed,
        held_out=options.held_out if options.only is None else None,
        only=options.only,
        slow=options.slow,
        size=size,
        fps=options.fps,
    )
    logger.info("wrote %s", manifest)
