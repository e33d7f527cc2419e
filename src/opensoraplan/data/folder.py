"""A folder of clips and images in the place of a manifest, with captions in .txt files of the same names.

Not here: manifests (manifest.py), what is in the files (record.py).
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from opensoraplan.data.pictures import PICTURE_SUFFIXES
from opensoraplan.data.record import Record
from opensoraplan.documents import read_text

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mkv", ".webm", ".ogv", ".ogm", ".avi", ".gif"),
    *(".mpg", ".mpeg", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".wmv", ".asf", ".flv", ".f4v", ".mxf"),
)
_CLIP_SUFFIXES = frozenset((*VIDEO_SUFFIXES, *PICTURE_SUFFIXES))
_LIST = "data.txt"
_ANNOTATION_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def find_list(folder: Path) -> Path | None:
    """The data.txt of a folder if it is a list of `folder,annotation` lines, as the original has it,
    and not the caption of a clip.
    """
    path = folder / _LIST
    if not path.is_file():
        return None
    first = next((line.strip() for line in read_text(path).splitlines() if line.strip()), "")
    _, comma, annotation = first.rpartition(",")
    if not comma or not annotation.strip().lower().endswith(_ANNOTATION_SUFFIXES):
        return None
    logger.info("%s: using the clips listed in its %s", folder, _LIST)
    return path


def read_folder(folder: Path) -> list[Record]:
    """The clips and images in a folder and its subfolders, linked ones included, but nothing hidden. What is
    neither that nor a caption is counted in one warning. Raises ValueError if there are none.
    """
    clips: list[Path] = []
    texts: dict[Path, Path] = {}
    others: Counter[str] = Counter()
    for file in _files(folder):
        suffix = file.suffix.lower()
        if suffix in _CLIP_SUFFIXES:
            clips.append(file)
        elif suffix == ".txt":
            texts[file.with_suffix("")] = file
        else:
            others[suffix or "without suffix"] += 1
    if not clips:
        found = f"; it has {_counts(others)}" if others else ""
        suffixes = " ".join((*VIDEO_SUFFIXES, *PICTURE_SUFFIXES))
        raise ValueError(f"folder {folder} has no clips ({suffixes}){found}")
    records = [_record(clip, texts.get(clip.with_suffix(""))) for clip in clips]
    others[".txt"] += len(texts.keys() - {clip.with_suffix("") for clip in clips})
    if others.total():
        logger.warning("%s: %d files are skipped: %s", folder, others.total(), _counts(others))
    if not any(record.captions for record in records):
        example = clips[0].with_suffix(".txt").name
        lists = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in _ANNOTATION_SUFFIXES)
        meant = f"; if their captions are in {' or '.join(lists)}, name that instead" if lists else ""
        logger.warning(
            "none of the %d clips in %s has a caption, as in %s%s", len(clips), folder, example, meant
        )
    return records


def _record(clip: Path, text: Path | None) -> Record:
    caption = "" if text is None else read_text(text).strip()
    return Record(clip, (caption,) if caption else ())


def _counts(others: Counter[str]) -> str:
    """3 .heic, 1 .md"""
    return ", ".join(f"{count} {suffix}" for suffix, count in others.most_common() if count)


def _files(folder: Path) -> Iterator[Path]:
    """All files that are not hidden, sorted, each folder once, however many links lead to it."""
    files: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, onerror=_warn, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += (Path(place, name) for name in names if not name.startswith("."))
    yield from sorted(files)


def _warn(error: OSError) -> None:
    logger.warning("%s is skipped: %s", error.filename, error.strerror)
