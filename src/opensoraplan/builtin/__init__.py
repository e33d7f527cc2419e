"""The small model that comes with the package: trained by it, on clips of moving shapes (`make train-demo`).

It shows that an installation works and what a prompt does; for anything else take the released weights.
"""

from pathlib import Path

KNOWS = "coloured shapes that move, in front of a few backgrounds, 25 frames of 96 x 128"


def folder() -> Path:
    """The model's folder, in diffusers' format."""
    return Path(__file__).with_name("model")
