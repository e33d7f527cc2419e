"""Pixels <-> latents <-> tokens: every divisibility rule and its error message live here.

The WF-VAE compresses 8 x 8 x 8: T = 8k + 1 frames become k + 1 latent frames (the first frame stands alone),
and a side becomes an eighth. The denoiser then joins 2 x 2 latent cells into one token, so sides are
multiples of 16. Another VAE says its own `strides`; where there is none at hand, they are the WF-VAE's.
"""

from dataclasses import dataclass

COLOURS = 3
TEMPORAL_STRIDE = 8
SPATIAL_STRIDE = 8
PATCH_SIZE = 2
SIDE_MULTIPLE = SPATIAL_STRIDE * PATCH_SIZE
# Side of a tile, in pixels, where frames are decoded in tiles.
TILE_SIZE = 256

# Of a feature of a text; None, which only the first dimension may be, is the number of the text's tokens.
FeatureShape = tuple[int | None, ...]


@dataclass(frozen=True)
class Strides:
    """How many frames, after the first one, and how many pixels along each side become one latent."""

    temporal: int = TEMPORAL_STRIDE
    spatial: int = SPATIAL_STRIDE

    def __str__(self) -> str:
        return f"{self.temporal} x {self.spatial} x {self.spatial}"


RELEASE = Strides()


def nearest_frames(frames: int, *, strides: Strides = RELEASE) -> tuple[int, int]:
    """The two valid frame counts (8k + 1) around `frames`: the largest not above it (at least 1),
    the next above.
    """
    below = max(frames - 1, 0) // strides.temporal * strides.temporal + 1
    return below, below + strides.temporal


def check_frames(frames: int, *, strides: Strides = RELEASE) -> None:
    """Raise ValueError unless `frames` is 8k + 1 for some k >= 0."""
    below, above = nearest_frames(frames, strides=strides)
    if frames != below:
        step = strides.temporal
        hint = f"{below} or {above}" if frames > 0 else f"1 or {1 + step}"
        rule = f"{step}k + 1 (1, {1 + step}, {1 + 2 * step}, ...)"
        raise ValueError(f"frames must be {rule}, got {frames}: use {hint}")


def check_given(given: int, frames: int, *, last: bool = False, strides: Strides = RELEASE) -> None:
    """Raise ValueError unless a video of so many frames can begin with so many `given` ones (0: none), end
    with a given one if `last`, and has something left to generate.
    """
    if last and frames == 1:
        raise ValueError("a picture of 1 frame has no last frame: ask for more frames")
    if not given:
        return
    check_frames(given, strides=strides)
    if given >= frames:
        if frames == 1:
            raise ValueError("a picture of 1 frame cannot begin with another picture: ask for more frames")
        most, _ = nearest_frames(frames - 1, strides=strides)
        raise ValueError(
            f"{given} given frames leave nothing to generate of a video of {frames}: give at most {most}"
        )


def check_sides(height: int, width: int, *, multiple: int = SIDE_MULTIPLE) -> None:
    """Raise ValueError unless both sides, in pixels, are positive multiples of `multiple`."""
    wrong = [
        f"{name} {side}"
        for name, side in (("height", height), ("width", width))
        if side % multiple or side < 1
    ]
    if wrong:
        nearest = " x ".join(
            str(max(multiple, round(side / multiple) * multiple)) for side in (height, width)
        )
        raise ValueError(
            f"sides must be multiples of {multiple}, got {' and '.join(wrong)}: "
            f"the nearest valid size is {nearest}"
        )


def latent_shape(
    frames: int, height: int, width: int, *, strides: Strides = RELEASE, patch: int = PATCH_SIZE
) -> tuple[int, int, int]:
    """Latent (T, H, W) of a clip in pixels, whose sides are multiples of `patch` latents. Raises ValueError
    for a clip that has none.
    """
    check_frames(frames, strides=strides)
    check_sides(height, width, multiple=strides.spatial * patch)
    return (frames - 1) // strides.temporal + 1, height // strides.spatial, width // strides.spatial


def pixel_frames(latent_frames: int, *, strides: Strides = RELEASE) -> int:
    """Frames that `latent_frames` latent frames decode to: 8 (n - 1) + 1."""
    return (latent_frames - 1) * strides.temporal + 1
