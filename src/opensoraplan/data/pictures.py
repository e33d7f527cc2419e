"""Pictures, still and animated, read by Pillow: upright by their EXIF data, as 8-bit RGB.

Not here: video (reading.py). Colour profiles are not applied.
"""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from opensoraplan.documents import check_file

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff")
# Several pictures in one of these are a video. In other formats they are pages, or one picture in many sizes.
ANIMATED_SUFFIXES = (".webp", ".avif")
# Pixels on a side, below which a picture says nothing.
SMALLEST = 16
# Behind transparent pixels.
BACKGROUND = "white"
_ANIMATED_FORMATS = frozenset(("WEBP", "AVIF"))
# Seconds on screen: of a still, and of an animation's picture without a duration, as in browsers.
_STILL, _UNTIMED = Fraction(1, 25), Fraction(1, 10)


def picture_format(path: str | Path) -> str | None:
    """The name of a picture's format, such as "jpeg"; None for a file without a picture's suffix, and for one
    that Pillow does not know. Raises FileNotFoundError and the like, and ValueError for too large a picture
    and for pipes and devices, which opening might wait for.
    """
    path = Path(path)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        return None
    if path.exists():
        check_file(path)
    try:
        with Image.open(path) as image:
            return (image.format or "").lower()
    except UnidentifiedImageError:
        return None
    except Exception as error:
        raise _explain(path, error) from error


def read_pictures(path: str | Path) -> Iterator[tuple[np.ndarray, Fraction]]:
    """The picture, or those of an animation, as uint8 [H, W, 3], each with the seconds that it is on screen.

    Transparency is shown over white, grey of 16 bits is rounded to 8. Raises ValueError for a damaged file,
    and for pixels of 32 bits, whose range is not known.
    """
    try:
        with Image.open(path) as image:
            animated = image.format in _ANIMATED_FORMATS and getattr(image, "is_animated", False)
            for number in range(getattr(image, "n_frames", 1) if animated else 1):
                if animated:
                    image.seek(number)
                image.load()
                milliseconds = image.info.get("duration") or 0
                seconds = Fraction(round(milliseconds * 1000), 1_000_000) or _UNTIMED
                yield upright_rgb(image), seconds if animated else _STILL
    except Exception as error:
        raise _explain(path, error) from error


def _explain(path: str | Path, error: Exception) -> Exception:
    """A ValueError for a damaged file: Pillow's decoders raise errors of any kind."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return ValueError(f"{path} cannot be read as a picture: {error or type(error).__name__}")


def upright_rgb(image: Image.Image) -> np.ndarray:
    """The pixels of a picture as uint8 [H, W, 3], as `read_pictures` gives them."""
    return _to_rgb(_turn_upright(image))


def _turn_upright(image: Image.Image) -> Image.Image:
    """Turn a picture by its EXIF orientation; if its EXIF data cannot be read, leave it as stored."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # of any kind, as above
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def _to_rgb(image: Image.Image) -> np.ndarray:
    """The pixels as uint8 [H, W, 3]."""
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise ValueError("its pixels have 32 bits")
        grey = ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("its pixels have 32 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return np.asarray(image.convert("RGB"))
