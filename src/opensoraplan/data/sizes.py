"""How frames of any size are scaled and cropped to a training sample. Pure arithmetic, no pixels.

With the original's roundings, in floating point and in its order (docs/model.md, section 6), so that every
frame gets the size it has there. Not here: one size for all (`force_resolution`), cut first and then scaled.
"""

import math
from typing import NamedTuple

# Height : width of the five ratios, and the rounded quotient that a frame is compared with.
_RATIOS = ((9, 16, 0.56), (3, 4, 0.75), (1, 1, 1.00), (4, 3, 1.33), (16, 9, 1.78))
# Sizes of the five ratios are multiples of it, whatever the stride is that they are cut to.
_RATIO_UNIT = 16


class Framing(NamedTuple):
    """A frame is resized to `resized` (height, width); the part of `height` x `width` from (`top`, `left`) on
    is kept. All in pixels.
    """

    resized: tuple[int, int]
    top: int
    left: int
    height: int
    width: int


def frame_freely(height: int, width: int, *, largest_area: int, stride: int) -> Framing:
    """Scale a frame of more than `largest_area` pixels down to that, and cut its sides to multiples of
    `stride` around the centre.
    """
    if height * width > largest_area:
        scale = math.sqrt(largest_area / (height * width))
        height, width = int(height * scale), int(width * scale)
    return _cut((height, width), height, width, stride=stride)


def frame_five_ratios(height: int, width: int, *, largest_area: int, stride: int) -> Framing:
    """Scale a frame to cover the largest size of the nearest of the five ratios that has no more pixels than
    the frame and `largest_area`, cut it to the ratio, and its sides to multiples of `stride`.
    """
    tall, wide = _nearest_ratio(height, width)
    area = min(largest_area, height * width)
    units = math.floor(math.sqrt(area / (tall * wide * _RATIO_UNIT**2)))
    # Where not even one unit fits, the size is not a multiple of it.
    unit = units * _RATIO_UNIT or math.sqrt(area / (tall * wide))
    target_height, target_width = max(1, int(tall * unit)), max(1, int(wide * unit))
    if height / width > target_height / target_width:
        height, width = int(target_width / width * height), target_width
    else:
        height, width = target_height, int(target_height / height * width)
    # Of the resized frame, whose ratio rounding may have moved.
    tall, wide = _nearest_ratio(height, width)
    if height / width > tall / wide:
        return _cut((height, width), width * tall // wide, width, stride=stride)
    return _cut((height, width), height, height * wide // tall, stride=stride)


def _nearest_ratio(height: int, width: int) -> tuple[int, int]:
    tall, wide, _ = min(_RATIOS, key=lambda ratio: abs(height / width - ratio[2]))
    return tall, wide


def _cut(resized: tuple[int, int], height: int, width: int, *, stride: int) -> Framing:
    """Keep `height` x `width` around the centre of the resized frame, and of that multiples of `stride`."""
    kept_height, kept_width = height // stride * stride, width // stride * stride
    top = (resized[0] - height) // 2 + (height - kept_height) // 2
    left = (resized[1] - width) // 2 + (width - kept_width) // 2
    return Framing(resized, top, left, kept_height, kept_width)
