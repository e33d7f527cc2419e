"""Frames that a video is given: a picture, or the end of a clip, to begin with, and a picture to end with.

They are cropped to the video's aspect ratio and resized as clips are for training. Nothing is encoded here.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opensoraplan.data.pictures import SMALLEST, read_pictures, upright_rgb
from opensoraplan.data.video import fit, iter_frames
from opensoraplan.models.hashes import hash_tensors
from opensoraplan.requests import Request
from opensoraplan.shapes import RELEASE, Strides, check_given, nearest_frames

# A PIL picture, or uint8 pixels [H, W, 3]; of clips, several, or [T, H, W, 3].
Picture = Image.Image | np.ndarray | Tensor
Clip = Sequence[Picture] | np.ndarray | Tensor


@dataclass(frozen=True, eq=False)
class GivenFrames:
    """Pixels in [-1, 1]: `first` [3, t, H, W], t = 8k + 1 frames that a video begins with, and `last`
    [3, 1, H, W], the one that it ends with. None: it is free there.
    """

    first: Tensor | None = None
    last: Tensor | None = None

    def __bool__(self) -> bool:
        return self.first is not None or self.last is not None

    def check(self, frames: int, *, strides: Strides = RELEASE) -> None:
        """Raise ValueError unless a video of so many frames has something left to generate."""
        given = 0 if self.first is None else self.first.shape[1]
        check_given(given, frames, last=self.last is not None, strides=strides)

    def digest(self) -> str:
        """What tells these pixels from others."""
        parts = {"first": self.first, "last": self.last}
        return hash_tensors({name: pixels for name, pixels in parts.items() if pixels is not None})


def fit_frames(
    *,
    image: Picture | None = None,
    last_image: Picture | None = None,
    video: Clip | None = None,
    height: int,
    width: int,
) -> GivenFrames:
    """The given frames of a video of this size, from `image` or all frames of `video`, and `last_image`.
    Raises ValueError for both of the former, and for pixels that cannot be.
    """
    if image is not None and video is not None:
        raise ValueError("a video begins with an image or goes on from a clip: give one of image and video")
    start = None
    if image is not None:
        start = to_pixels(image, name="image")[None]
    elif video is not None:
        start = torch.stack([to_pixels(frame, name="video") for frame in video])  # type: ignore[arg-type]
    end = None if last_image is None else to_pixels(last_image, name="last_image")[None]
    first, last = (None if one is None else fit(one, height=height, width=width) for one in (start, end))
    return GivenFrames(first, last)


def read_given(request: Request, *, strides: Strides = RELEASE) -> GivenFrames:
    """The frames that a request's files give. Raises FileNotFoundError, and ValueError for files that are not
    what they should be.
    """
    paths = {name: getattr(request, name) for name in ("image", "last_image")}
    given: dict[str, Any] = {
        name: read_picture(Path(path)) for name, path in paths.items() if path is not None
    }
    if request.video is not None:
        given["video"] = read_end(
            Path(request.video), frames=request.overlap, fps=request.fps, strides=strides
        )
    return fit_frames(**given, height=request.height, width=request.width)


def to_pixels(picture: Any, *, name: str) -> Tensor:  # noqa: ANN401 (whatever a caller gives)
    """uint8 [H, W, 3] of one picture."""
    if isinstance(picture, Image.Image):
        picture = upright_rgb(picture)
    pixels = torch.as_tensor(np.array(picture)) if isinstance(picture, np.ndarray) else picture
    wanted = f"{name}: a picture is of PIL, or uint8 [height, width, 3], got"
    if not isinstance(pixels, Tensor):
        raise ValueError(f"{wanted} {type(picture).__name__}")
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"{wanted} {pixels.dtype} {list(pixels.shape)}")
    check_size(pixels, name=name)
    return pixels.cpu()


def check_size(pixels: Tensor, *, name: str) -> None:
    """Raise ValueError for a picture [H, W, 3] with hardly any pixels."""
    if min(pixels.shape[:2]) < SMALLEST:
        raise ValueError(
            f"{name} has {pixels.shape[1]} x {pixels.shape[0]} pixels: a side needs {SMALLEST} at least"
        )


def read_picture(path: Path) -> Tensor:
    """The picture in a file, of an animation the first one, as uint8 [H, W, 3]. Raises FileNotFoundError, and
    ValueError for what is no picture.
    """
    pixels, _ = next(iter(read_pictures(path)))
    picture = torch.as_tensor(pixels.copy())
    check_size(picture, name=str(path))
    return picture


def read_end(path: Path, *, frames: int, fps: float, strides: Strides = RELEASE) -> Tensor:
    """The last so many frames of a clip, at this rate, as uint8 [frames, H, W, 3]. Raises FileNotFoundError,
    and ValueError for a file without video or with too few frames.
    """
    end = deque(iter_frames(path, fps=fps), maxlen=frames)
    if len(end) < frames:
        most, _ = nearest_frames(len(end), strides=strides)
        raise ValueError(
            f"{path} has {len(end)} frames at {fps:g} frames a second, and {frames} are to be gone on from: "
            f"set overlap to {most}"
        )
    clip = torch.stack(tuple(end))
    check_size(clip[0], name=str(path))
    return clip
