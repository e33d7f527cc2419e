"""A clip and what is known of it; what is missing is read from its file, in parallel and only once.

Not here: manifests (manifest.py), which clips are trained on (selection.py), decoding (video.py).
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av.error

from opensoraplan.data.video import probe
from opensoraplan.disk import write_whole

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# How many files that cannot be read the warning names.
_NAMED = 5


@dataclass(frozen=True, slots=True)
class Record:
    """A clip (or an image, which is a clip of one frame) and what is known of it.

    `num_frames` and `fps` are those of the file; with `cut` = (start, end), frame numbers in the file of
    which the end is not included, `num_frames` counts only the frames in it. `height` and `width` are those
    of the upright picture in pixels; with `crop` = (left, right, top, bottom), those of the part cut out.
    None is unknown. `error` says why the file could not be read, if that was found out.
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
    error: str = ""

    @property
    def is_image(self) -> bool:
        return self.path.suffix.lower() in IMAGE_SUFFIXES

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing that selection needs to know of the file."""
        timed = self.is_image or (self.num_frames is not None and self.fps is not None)
        return timed and self.height is not None and self.width is not None


@dataclass(frozen=True, slots=True)
class _Probed:
    """What probing found; `size` in bytes and `mtime` in ns are the file's, by which it is recognised."""

    size: int
    mtime: int
    num_frames: int
    fps: str
    height: int
    width: int


def complete(
    records: Sequence[Record], *, cache: Path, every_file: bool = False, workers: int = 16
) -> list[Record]:
    """The same records with nothing missing, or with an `error`; those are counted in one warning.

    Files of records that lack something (or of all, with `every_file`) are opened by `workers` threads. What
    they say is remembered in the JSON file `cache`, by path, size and time of change, if its folder can be
    written to.
    """
    wanted = [index for index, record in enumerate(records) if every_file or not record.is_complete]
    if not wanted:
        return list(records)
    known = _load(cache)
    fresh: dict[str, _Probed] = {}
    logger.info("looking at %d of %d files for what the manifest does not say", len(wanted), len(records))

    def look(index: int) -> tuple[int, str, _Probed | str]:
        path = records[index].path
        key = os.path.relpath(path, cache.parent)
        return index, key, _look(path, known.get(key))

    result = list(records)
    executor = ThreadPoolExecutor(workers)
    try:
        for index, key, found in executor.map(look, wanted):
            if isinstance(found, str):
                result[index] = replace(records[index], error=found)
                continue
            result[index] = _filled(records[index], found)
            if known.get(key) != found:
                fresh[key] = found
    finally:
        # Also after an interrupt: hours of probing are not lost.
        executor.shutdown(cancel_futures=True)
        if fresh:
            _save(cache, {**known, **fresh})
    errors = [record.error for record in result if record.error]
    if errors:
        more = f"; and {len(errors) - _NAMED} more" if len(errors) > _NAMED else ""
        logger.warning(
            "%d of %d files cannot be read: %s", len(errors), len(records), "; ".join(errors[:_NAMED]) + more
        )
    return result


def _look(path: Path, known: _Probed | None) -> _Probed | str:
    """What `path` is, or why it cannot be read."""
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
        num_frames=info.frames,
        fps=str(info.fps),
        height=info.height,
        width=info.width,
    )


def _filled(record: Record, found: _Probed) -> Record:
    """`record` with what it lacks, or with an error if its cut or crop is outside of the file's picture."""
    if record.cut is not None and record.cut[0] >= found.num_frames:
        return replace(
            record, error=f"{record.path} has {found.num_frames} frames, cut is {list(record.cut)}"
        )
    if record.crop is not None and (record.crop[1] > found.width or record.crop[3] > found.height):
        size = f"{found.height} x {found.width} (height x width)"
        return replace(record, error=f"{record.path} is {size}, crop is {list(record.crop)}")
    frames = record.num_frames or found.num_frames
    if record.cut is not None:
        frames = min(frames, found.num_frames - record.cut[0])
    return replace(
        record,
        num_frames=1 if record.is_image else frames,
        fps=None if record.is_image else record.fps or float(Fraction(found.fps)),
        height=record.height or found.height,
        width=record.width or found.width,
    )


def _load(cache: Path) -> dict[str, _Probed]:
    """What was remembered; anything else in that place is as good as nothing."""
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
        return {str(key): _Probed(**entry) for key, entry in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("%s is not used: %s", cache, error)
        return {}


def _save(cache: Path, known: Mapping[str, _Probed]) -> None:
    """Remember, if the folder can be written to; readers see the old file or the new one, never a part."""
    fields = _Probed.__slots__
    content = {key: {field: getattr(entry, field) for field in fields} for key, entry in known.items()}
    try:
        write_whole(cache, lambda file: file.write_text(json.dumps(content, indent=0), encoding="utf-8"))
    except OSError as error:
        logger.info("what was found is not kept for the next time: %s", error)
