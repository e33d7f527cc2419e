"""A clip and its known properties; missing ones are read from its file, in parallel and only once.

Not here: manifests (manifest.py), which clips are trained on (selection.py), decoding (video.py).
"""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

import av.error
import pydantic
from pydantic import Field

from opensoraplan.data.pictures import ANIMATED_SUFFIXES, PICTURE_SUFFIXES
from opensoraplan.data.video import probe
from opensoraplan.disk import user_cache_folder, write_whole
from opensoraplan.documents import read_json_object
from opensoraplan.settings import Settings

logger = logging.getLogger(__name__)

# Most unreadable files that the warning names.
_NAMED = 5
# Version of the probe cache. Before 3, it had the lengths that files claim.
_VERSION = 3
# Relative tolerance between a manifest's frame rate and the file's, which may be a mean.
_SAME_FPS = 0.01


@dataclass(frozen=True, slots=True)
class Record:
    """A clip (or an image, which is a clip of one frame) and its known properties.

    `num_frames` and `fps` are those of the file; with `cut` = (start, end), frame numbers in the file of
    which the end is not included, `num_frames` counts only the frames in it. `height` and `width` are those
    of the upright picture in pixels; with `crop` = (left, right, top, bottom), those of the part cut out.
    None is unknown. `variable`: the file has no constant rate; its frames are then counted after resampling
    to `fps`. `error`: why the file could not be read, if that was tried.
    """

    path: Path
    captions: tuple[str, ...] = ()
    num_frames: int | None = None
    fps: float | None = None
    height: int | None = None
    width: int | None = None
    cut: tuple[int, int] | None = None
    crop: tuple[int, int, int, int] | None = None
    aesthetic: float | None = None
    variable: bool = False
    error: str = ""

    @property
    def is_image(self) -> bool:
        suffix = self.path.suffix.lower()
        animated = suffix in ANIMATED_SUFFIXES and (self.num_frames or 1) > 1
        return suffix in PICTURE_SUFFIXES and not animated

    @property
    def is_complete(self) -> bool:
        """Whether the record has all properties that selection needs."""
        timed = self.num_frames is not None and (self.is_image or self.fps is not None)
        return timed and self.height is not None and self.width is not None


_Count = Annotated[int, Field(ge=1)]


# Not a model, since there may be millions of them.
@pydantic.dataclasses.dataclass(frozen=True, slots=True, config=pydantic.ConfigDict(extra="forbid"))
class _Probed:
    """What probing found; `size` in bytes and `mtime` in ns are the file's, by which it is recognised."""

    size: Annotated[int, Field(ge=0)]
    mtime: int
    frames: _Count
    resampled: _Count
    fps: Annotated[str, Field(pattern=r"^[1-9]\d*(/[1-9]\d*)?$", max_length=60)]
    height: _Count
    width: _Count
    variable: bool


class _ProbeCache(Settings):
    """The cache file with the results of probing, by path."""

    version: Literal[3] = _VERSION
    files: dict[str, _Probed]


def probe_cache(manifest: Path) -> Path | None:
    """The cache file for probing a manifest's files, in the user's cache folder; None without a home."""
    name = str(manifest.resolve()).encode("utf-8", "surrogateescape")
    try:
        return user_cache_folder() / "probed" / f"{hashlib.sha256(name).hexdigest()[:32]}.json"
    except RuntimeError as error:
        logger.info("the cache of clip properties cannot be written: %s", error)
        return None


def complete(
    records: Sequence[Record],
    *,
    cache: Path | None,
    every_file: bool = False,
    workers: int = 16,
    save_every_s: float = 120.0,
) -> list[Record]:
    """Fill in missing properties of records, or an `error` for files that cannot be read. Logs one warning
    with the number of errors.

    `workers` threads open the files of incomplete records (with `every_file`, of all). The results are
    saved in the JSON file `cache`, by path, size and modification time, every `save_every_s` seconds and
    at the end, if it can be written. With `every_file`, records are compared with their files: a number of
    frames that is larger than the file's is lowered to it, and another size, or a rate more than 1% off,
    is an `error`.
    """
    wanted = [index for index, record in enumerate(records) if every_file or not record.is_complete]
    if not wanted:
        return list(records)
    known = _load(cache)
    fresh: dict[str, _Probed] = {}
    logger.info(
        "probing %d of %d files for values that the manifest does not give", len(wanted), len(records)
    )

    def probe_one(index: int) -> tuple[int, str, _Probed | str]:
        path = records[index].path
        key = str(path.absolute()).encode("utf-8", "backslashreplace").decode()
        return index, key, _probe(path, known.get(key))

    result = list(records)
    executor = ThreadPoolExecutor(workers)
    saved = time.monotonic()
    try:
        for index, key, found in executor.map(probe_one, wanted):
            if isinstance(found, str):
                result[index] = replace(records[index], error=found)
                continue
            result[index] = _complete(records[index], found, compared=every_file)
            if known.get(key) != found:
                fresh[key] = found
            if fresh and time.monotonic() - saved > save_every_s:
                _save(cache, {**known, **fresh})
                saved = time.monotonic()
    finally:
        # Also after an interrupt: hours of probing are not lost.
        executor.shutdown(cancel_futures=True)
        if fresh:
            _save(cache, {**known, **fresh})
    errors = [record.error for record in result if record.error]
    if errors:
        more = f"; and {len(errors) - _NAMED} more" if len(errors) > _NAMED else ""
        what = "cannot be read, or are not what the manifest says" if every_file else "cannot be read"
        named = "; ".join(errors[:_NAMED]) + more
        logger.warning("%d of %d files %s: %s", len(errors), len(records), what, named)
    return result


def _probe(path: Path, known: _Probed | None) -> _Probed | str:
    """Properties of the file, or why it cannot be read."""
    try:
        stat = path.stat()
        if known is not None and (known.size, known.mtime) == (stat.st_size, stat.st_mtime_ns):
            return known
        info = probe(path)
    except (OSError, ValueError, av.error.FFmpegError) as error:
        message = str(error)
        return message if str(path) in message else f"{path}: {message}"
    return _Probed(
        size=stat.st_size,
        mtime=stat.st_mtime_ns,
        frames=info.frames,
        resampled=info.resampled,
        fps=str(info.fps),
        height=info.height,
        width=info.width,
        variable=info.variable,
    )


def _complete(record: Record, found: _Probed, *, compared: bool) -> Record:
    """Complete a record from its file. Sets an error if cut or crop are outside of the video or, if
    `compared`, if the record contradicts the file.
    """
    if record.cut is not None and record.cut[0] >= found.frames:
        return replace(record, error=f"{record.path} has {found.frames} frames, cut is {list(record.cut)}")
    if record.crop is not None and (record.crop[1] > found.width or record.crop[3] > found.height):
        size = f"{found.height} x {found.width} (height x width)"
        return replace(record, error=f"{record.path} is {size}, crop is {list(record.crop)}")
    if compared and (different := _describe_differences(record, found)):
        return replace(record, error=f"{record.path}: {different}")
    # Numbers that a manifest gives are of the file's own frames.
    variable = found.variable and record.cut is None and record.fps is None and record.num_frames is None
    there = found.resampled if variable else found.frames
    frames = record.num_frames or there
    if record.cut is not None:
        frames = min(frames, there - record.cut[0])
    elif compared:
        frames = min(frames, there)
    full = replace(record, num_frames=frames, height=record.height or found.height)
    return replace(
        full,
        num_frames=1 if full.is_image else frames,
        fps=None if full.is_image else record.fps or float(Fraction(found.fps)),
        width=record.width or found.width,
        variable=variable,
    )


def _describe_differences(record: Record, found: _Probed) -> str:
    """How size and rate of the manifest differ from the file's; "" if they do not."""
    problems: list[str] = []
    height, width = record.height or found.height, record.width or found.width
    # With a crop they are those of the part.
    if record.crop is None and (height, width) != (found.height, found.width):
        size = f"{found.height} x {found.width}"
        problems.append(f"the manifest says {height} x {width} (height x width), the file is {size}")
    rate = float(Fraction(found.fps))
    if not record.is_image and record.fps is not None and abs(record.fps - rate) > _SAME_FPS * rate:
        problems.append(f"the manifest says {record.fps:g} fps, the file has {rate:g}")
    return "; ".join(problems)


def _load(cache: Path | None) -> Mapping[str, _Probed]:
    """Read the probe cache; empty if it is damaged or of another version."""
    try:
        if cache is None or not cache.exists():
            return {}
        content = read_json_object(cache)
        if content.get("version") != _VERSION:
            return {}
        return _ProbeCache.read(content, where=str(cache)).files
    except (OSError, ValueError) as error:
        logger.warning("the cache of clip properties is ignored: %s", error)
        return {}


def _save(cache: Path | None, known: Mapping[str, _Probed]) -> None:
    """Write the probe cache atomically, if its folder can be written to."""
    if cache is None:
        return
    content = _ProbeCache(files=dict(known)).model_dump_json()
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cache, lambda file: file.write_text(content, encoding="utf-8"))
    except OSError as error:
        logger.info("the cache of clip properties cannot be written: %s", error)
