"""Training manifests: reads lists of clips with captions, sizes and lengths, in every supported format.

Not here: records and how missing properties are found (record.py), which clips to train on (selection.py).
"""

import csv
import importlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from opensoraplan.data.folder import find_list, read_folder
from opensoraplan.data.record import Record, complete, probe_cache
from opensoraplan.documents import DocumentError, check_file, parse_json, read_json, read_text

logger = logging.getLogger(__name__)

MANIFEST_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".parquet")

_PATH_KEYS = ("path", "video")
_CAPTION_KEYS = ("cap", "caption", "text")
_AESTHETIC_KEYS = ("aesthetic", "aes")
_OTHER_KEYS = ("num_frames", "fps", "height", "width", "resolution", "cut", "crop")
# Most wrong rows that a message names.
_NAMED = 5
# Frame rate of a record with num_frames but without fps, as in the original.
_ASSUMED_FPS = 24.0

# A row of a manifest, or an error for an invalid one.
_Row = Mapping[str, Any] | ValueError


def read_manifest(
    path: str | Path,
    *,
    root: str | Path | None = None,
    probing: Literal["missing", "all", "none"] = "missing",
    workers: int = 16,
) -> list[Record]:
    """All records of a manifest, in its order:

    - a folder: the data.txt in it, if that has the original's lines; else its clips and images (also in
      subfolders), each with a caption in the .txt of the same name;
    - .txt: the original's `folder,annotation` lines, annotations in any format below;
    - .json: a list of records, or an object of them, whose keys are the paths if the records have none;
    - .jsonl, .csv and .parquet: columns path|video and caption|cap|text.

    A record may also have num_frames, fps, height and width (or resolution {height, width}), cut [start,
    end], crop [left, right, top, bottom], aesthetic|aes. Captions are a string or a list of them; "" is a
    caption, too (but not in .csv, where it is an empty cell). Relative paths start from `root`, else from the
    manifest's folder (those in a .txt may also start from the current folder). A video with num_frames but
    without fps is taken to have 24 fps, with one warning, as in the original.

    Missing properties are read from the files (`probing` "all" opens every file, "none" no file) by `workers`
    threads and cached in the user's cache folder, if that can be written to. Files that cannot be read get an
    `error`, and one warning says how many.

    Raises FileNotFoundError for a missing manifest, ValueError for one without records or with wrong lines,
    which it names.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"manifest {path} does not exist")
    listed = find_list(path) if path.is_dir() else path
    if listed is None:
        records = read_folder(path)
    else:
        records = _read_file(listed, root=None if root is None else Path(root))
    if probing == "none":
        return records
    return complete(records, cache=probe_cache(path), every_file=probing == "all", workers=workers)


def _read_file(path: Path, *, root: Path | None) -> list[Record]:
    base = path.parent if root is None else root
    listed = path.suffix.lower() == ".txt"
    parts = list(_read_list(path, base=base)) if listed else [(base, path)]
    records: list[Record] = []
    problems: list[str] = []
    assumed = sum(
        _read_annotation(annotation, folder=folder, records=records, problems=problems)
        for folder, annotation in parts
    )
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise ValueError("; ".join(problems[:_NAMED]) + more)
    if not records:
        raise ValueError(f"manifest {path} has no records")
    if assumed:
        logger.warning(
            "%s: %d of %d records have num_frames but no fps: assuming %g fps; add fps, or leave "
            "out num_frames to have both read from the files",
            *(path, assumed, len(records), _ASSUMED_FPS),
        )
    return records


def _read_list(path: Path, *, base: Path) -> Iterator[tuple[Path, Path]]:
    """The `folder,annotation` lines of a data.txt."""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        # From the right: folders may have commas in their names.
        folder, comma, annotation = (part.strip() for part in line.rpartition(","))
        where = f"{path}, line {number}"
        if not comma or not annotation:
            raise ValueError(f"{where}: expected folder,annotation.json, got {line.strip()!r}")
        if Path(annotation).suffix.lower() not in MANIFEST_SUFFIXES[1:]:
            raise ValueError(
                f"{where}: annotation must be {'|'.join(MANIFEST_SUFFIXES[1:])}, got {annotation}"
            )
        yield (
            _find_existing(folder, base=base, what=f"{where}: folder"),
            _find_existing(annotation, base=path.parent, what=f"{where}: annotation"),
        )


def _find_existing(name: str, *, base: Path, what: str) -> Path:
    """Find `name` in `base` or, as the original does, in the current folder."""
    for found in (base / name, Path(name)):
        if found.exists():
            return found
    raise ValueError(f"{what} {name} exists neither in {base.absolute()} nor in {Path.cwd()}")


def _read_annotation(path: Path, *, folder: Path, records: list[Record], problems: list[str]) -> int:
    """Append the records of one file to `records`, and errors of invalid rows to `problems`. Returns the
    number of records whose frame rate was assumed.
    """
    rows = assumed = 0
    captioned = False
    columns: dict[str, None] = {}
    for where, row in _rows(path):
        rows += 1
        try:
            if isinstance(row, ValueError):
                raise row
            if not captioned:
                columns.update(dict.fromkeys(map(str, row)))
                captioned = any(key in row for key in _CAPTION_KEYS)
            record = _record(row, folder=folder)
            if record.fps is None and not record.is_image and _has_any(row, ("num_frames",)):
                record = replace(record, fps=_ASSUMED_FPS)
                assumed += 1
            records.append(record)
        except ValueError as error:
            problems.append(f"{path}, {where}: {error}")
    if columns and not captioned:
        keys, found = "|".join(_CAPTION_KEYS), ", ".join(columns)
        logger.warning("%s: none of %d records has a caption (%s), they have: %s", path, rows, keys, found)
    return assumed


def _rows(path: Path) -> Iterator[tuple[str, _Row]]:
    """The rows of one file with their positions in it."""
    check_file(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _json_rows(path)
    if suffix == ".jsonl":
        return _jsonl_rows(path)
    if suffix == ".csv":
        return _csv_rows(path)
    if suffix == ".parquet":
        return _parquet_rows(path)
    raise ValueError(f"manifest {path} must be a folder or one of {' '.join(MANIFEST_SUFFIXES)}")


def _json_rows(path: Path) -> Iterator[tuple[str, _Row]]:
    content = read_json(path)
    if isinstance(content, dict):
        rows = [
            (
                f"entry {key!r}",
                {"path": key, **row} if _is_row(row) and not _has_any(row, _PATH_KEYS) else row,
            )
            for key, row in content.items()
        ]
    elif isinstance(content, list):
        rows = [(f"entry {number}", row) for number, row in enumerate(content, start=1)]
    else:
        raise ValueError(f"{path}: expected a list of records, got {type(content).__name__}")
    for where, row in rows:
        yield where, row if _is_row(row) else ValueError(f"expected an object, got {str(row)[:60]!r}")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, _Row]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line.decode("utf-8-sig"), where=str(path), line=number)
            except DocumentError as error:
                row = ValueError(error.reason)
            except UnicodeDecodeError as error:
                row = ValueError(f"not UTF-8: {error.reason} at byte {error.start}")
            else:
                row = row if _is_row(row) else ValueError(f"expected an object, got {str(row)[:60]!r}")
            yield f"line {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, _Row]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        header: list[str] | None = None
        try:
            for cells in reader:
                if not any(cells):
                    continue
                if header is None:
                    header = [cell.strip() for cell in cells]
                    continue
                if len(cells) == len(header):
                    row = {key: cell or None for key, cell in zip(header, cells, strict=True)}
                else:
                    row = ValueError(f"{len(cells)} cells, but {len(header)} columns")
                yield f"line {reader.line_num}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {reader.line_num}: not CSV in UTF-8: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, _Row]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    known = (*_PATH_KEYS, *_CAPTION_KEYS, *_AESTHETIC_KEYS, *_OTHER_KEYS)
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            # Such tables often carry embeddings and thumbnails; without any known column, _record explains.
            columns = [name for name in names if name in known] or names
            number = 0
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except ValueError as error:
        raise ValueError(f"{path}: not Parquet: {error}") from None


def _is_row(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_missing(value: object) -> bool:
    """Whether a cell is empty; tables write it as None, "" or NaN."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _has_any(row: Mapping[str, Any], keys: Sequence[str]) -> bool:
    return any(not _is_missing(row.get(key)) for key in keys)


def _get_one(row: Mapping[str, Any], keys: Sequence[str], *, blank: bool = False) -> Any:  # noqa: ANN401 (any)
    """The value of the first of several keys that is present, else None; with `blank`, "" if that
    is the value.
    """
    found = [key for key in keys if not _is_missing(row.get(key))]
    if not found:
        return "" if blank and any(row.get(key) == "" for key in keys) else None
    first = row[found[0]]
    if len(found) > 1 and any(row[key] != first for key in found):
        values = ", ".join(repr(row[key]) for key in found)
        raise ValueError(f"{' and '.join(found)} contradict each other: {values}")
    return first


def _record(row: Mapping[str, Any], *, folder: Path) -> Record:
    name = _get_one(row, _PATH_KEYS)
    if not isinstance(name, str):
        got = f"got {name!r}" if name is not None else f"has only {', '.join(map(str, row)) or 'nothing'}"
        raise ValueError(f"a record needs a path (any of {', '.join(_PATH_KEYS)}), {got}")
    path = folder / name
    size = row.get("resolution")
    if _is_missing(size):
        size = {}
    if not isinstance(size, Mapping):
        raise ValueError(f"resolution must be {{height, width}}, got {size!r}")
    cut, crop = _span(row, "cut"), _span(row, "crop")
    record = Record(
        path,
        _captions(_get_one(row, _CAPTION_KEYS, blank=True)),
        num_frames=_count(row, "num_frames"),
        fps=_positive(row, ("fps",)),
        height=_count(size, "height") or _count(row, "height"),
        width=_count(size, "width") or _count(row, "width"),
        cut=None if cut is None else (cut[0], cut[1]),
        crop=None if crop is None else (crop[0], crop[1], crop[2], crop[3]),
        aesthetic=_number(row, _AESTHETIC_KEYS),
    )
    if record.is_image:
        # Annotations of images may have no frames, or a meaningless rate.
        record = replace(record, num_frames=1, fps=None, cut=None)
    return _apply_cut_and_crop(record)


def _apply_cut_and_crop(record: Record) -> Record:
    """Limit a record's length to its cut and its size to its crop."""
    if record.cut is None and record.crop is None:
        return record
    frames, height, width = record.num_frames, record.height, record.width
    if record.cut is not None:
        length = record.cut[1] - record.cut[0]
        frames = length if frames is None else min(frames, length)
    if record.crop is not None:
        left, right, top, bottom = record.crop
        height, width = bottom - top, right - left
    return replace(record, num_frames=frames, height=height, width=width)


def _captions(value: object) -> tuple[str, ...]:
    """One caption or several, stripped of white space; blank ones are kept."""
    captions: list[str] = []
    for caption in value if isinstance(value, list) else [value]:
        if caption != "" and _is_missing(caption):
            continue
        if not isinstance(caption, str):
            raise ValueError(f"a caption must be text or a list of texts, got {str(caption)[:60]!r}")
        if not _is_unicode(caption):
            raise ValueError(f"a caption has half a character (a lone surrogate): {caption[:60]!r}")
        captions.append(caption.strip())
    return tuple(captions)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _number(row: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    value = _get_one(row, keys)
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{keys[0]} must be a number, got {value!r}")
    return number


def _positive(row: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    number = _number(row, keys)
    if number is not None and number <= 0:
        raise ValueError(f"{keys[0]} must be above 0, got {number:g}")
    return number


def _count(row: Mapping[str, Any], key: str) -> int | None:
    number = _positive(row, (key,))
    if number is not None and number != int(number):
        raise ValueError(f"{key} must be a whole number, got {number:g}")
    return None if number is None else int(number)


def _span(row: Mapping[str, Any], key: Literal["cut", "crop"]) -> tuple[int, ...] | None:
    """The numbers of a cut [start, end] or a crop [left, right, top, bottom]; in tables they may be text."""
    value = row.get(key)
    if value is None or _is_missing(value):
        return None
    names = ("start", "end") if key == "cut" else ("left", "right", "top", "bottom")
    cells = value.strip("[]() ").replace(",", " ").split() if isinstance(value, str) else value
    try:
        numbers = [float(cell) for cell in cells]
        whole = tuple(int(number) for number in numbers)
    except (TypeError, ValueError, OverflowError):
        numbers, whole = [], ()
    pairs = zip(whole[::2], whole[1::2], strict=False)
    right = len(whole) == len(names) and list(whole) == numbers
    if not right or not all(0 <= low < high for low, high in pairs):
        raise ValueError(f"{key} must be whole numbers [{', '.join(names)}], each pair rising, got {value!r}")
    return whole
