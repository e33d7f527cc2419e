"""Pixels <-> latents <-> tokens: every divisibility rule and its error message live here.

The WF-VAE compresses 8 x 8 x 8: T = 8k + 1 frames become k + 1 latent frames (the first frame stands alone),
and a side becomes an eighth. The denoiser then joins 2 x 2 latent cells into one token, so sides are
multiples of 16.
"""

TEMPORAL_STRIDE = 8
SPATIAL_STRIDE = 8
PATCH_SIZE = 2
SIDE_MULTIPLE = SPATIAL_STRIDE * PATCH_SIZE
# Side of a tile, in pixels, where frames are decoded in tiles.
TILE_SIZE = 256


def nearest_frames(frames: int) -> tuple[int, int]:
    """The two valid frame counts (8k + 1) around `frames`: the largest not above it (at least 1), the next
    above.
    """
    below = max(frames - 1, 0) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1
    return below, below + TEMPORAL_STRIDE


def check_frames(frames: int) -> None:
    """Raise ValueError unless `frames` is 8k + 1 for some k >= 0."""
    below, above = nearest_frames(frames)
    if frames != below:
        hint = f"{below} or {above}" if frames > 0 else "1 or 9"
        raise ValueError(f"frames must be 8k + 1 (1, 9, 17, ...), got {frames}: use {hint}")


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
    frames: int, height: int, width: int, *, multiple: int = SIDE_MULTIPLE
) -> tuple[int, int, int]:
    """Latent (T, H, W) of a clip in pixels; raises ValueError for a clip that has none."""
    check_frames(frames)
    check_sides(height, width, multiple=multiple)
    return (frames - 1) // TEMPORAL_STRIDE + 1, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE


def pixel_frames(latent_frames: int) -> int:
    """Frames that `latent_frames` latent frames decode to: 8 (n - 1) + 1."""
    return (latent_frames - 1) * TEMPORAL_STRIDE + 1
