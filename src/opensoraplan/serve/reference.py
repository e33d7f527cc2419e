"""OpenAI's `input_reference`: the picture that a video begins with, which a client sends with its request.

Nothing is fetched or opened by name. Formats are few: some that Pillow reads start other programs.
"""

import base64
import binascii
import re
import threading
from io import BytesIO
from typing import Any

from PIL import Image, UnidentifiedImageError

from opensoraplan.data.pictures import SMALLEST, upright_rgb
from opensoraplan.serve.errors import ApiError

FIELD = "input_reference"
_FORMATS = ("JPEG", "PNG", "WEBP")
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")
# A small file may have many pixels: one is decoded at a time.
_decoding = threading.Lock()


def read_reference(given: Any) -> bytes:  # noqa: ANN401 (any value of a body)
    """The file of a picture, from an upload or {"image_url": "data:image/..."}. Raises ApiError for anything
    else, and for a picture that cannot be read.
    """
    try:
        content = given if isinstance(given, bytes) else _decode_url(given)
        with _decoding:
            _check_picture(content)
    except ValueError as error:
        raise ApiError(400, f"{FIELD} {error}", param=FIELD) from None
    return content


def _decode_url(given: Any) -> bytes:  # noqa: ANN401
    url = given["image_url"] if isinstance(given, dict) and given.keys() == {"image_url"} else None
    if not (isinstance(url, str) and (match := _DATA_URL.match(url))):
        raise ValueError(
            'is an uploaded file, or in JSON {"image_url": "data:image/png;base64,..."}: this server fetches '
            f"no addresses and opens no paths, got {str(given)[:80]!r}"
        )
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except binascii.Error as error:
        raise ValueError(f"is not base64: {error}") from None


def _check_picture(content: bytes) -> None:
    """Raise ValueError for what is no picture, and for too few or too many pixels."""
    try:
        with Image.open(BytesIO(content), formats=_FORMATS) as image:
            width, height = image.size
            if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(
                    f"has {width} x {height} pixels, at most {Image.MAX_IMAGE_PIXELS:,} are read"
                )
            if min(width, height) < SMALLEST:
                raise ValueError(f"has {width} x {height} pixels: a side needs {SMALLEST} at least")
            image.load()
            upright_rgb(image)
    except UnidentifiedImageError:
        raise ValueError(f"is not a picture of {', '.join(_FORMATS)}") from None
    except ValueError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of any kind
        raise ValueError(f"cannot be read as a picture: {error or type(error).__name__}") from None
