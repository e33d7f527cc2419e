"""The identity of weights and clips: a short hash of what is in their files, wherever these are.

Small files are read whole. Of large ones the hash covers the size, the header (of safetensors) or the
directory (of a zip, as torch.save writes, with a checksum of each tensor), and samples of the content. Names
of folders, modification times and formatting of paths have no part in it: a copy has the same fingerprint.
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO
from zipfile import BadZipFile, ZipFile

from opensoraplan.disk import user_cache_folder, write_whole
from opensoraplan.documents import parse_json, read_json_object

# Changes with whatever changes the fingerprint of the same file.
_VERSION = 1
# Bytes: files up to _WHOLE are read whole; of larger ones, _CHUNK bytes are read every _SPACING bytes.
_WHOLE, _CHUNK, _SPACING = 1 << 20, 4096, 16 << 20
# Of weights, whose configs and tokenizers have a few MB.
_WHOLE_OF_MODELS = 8 << 20
# The first and the last bytes of a large file: headers and indices are there.
_ENDS = 1 << 16
# How many samples of a file without a known header.
_FEWEST, _MOST = 16, 1024
_LARGEST_HEADER = 100 << 20
# Seconds after which a second change of a file is sure to have another time stamp.
_SETTLED_S = 2.0
# Files in a folder of weights that change nothing in what the weights compute.
_NO_WEIGHTS = (".md", ".log")
_NO_WEIGHTS_NAMES = ("generate.json", "step_cache.json", "LICENSE", "LICENSE.txt")


def fingerprint_file(path: Path) -> str:
    """Fingerprint of a file's content: 32 hexadecimal digits. Reads at most 1 MB, or a header.

    Raises OSError for a file that cannot be read, and ValueError for what is no regular file.
    """
    return _hash_file(path, whole=_WHOLE)


def fingerprint_weights(path: Path) -> str:
    """Fingerprint of the weights in `path`, a file or a folder with all of its files except hidden and text
    files: 32 hexadecimal digits. Cached in the user's cache folder: a second call only checks sizes and times
    of large files.

    Raises OSError for files that cannot be read, and ValueError for what is no regular file.
    """
    if not path.is_dir():
        return _hash_cached(path)
    names = {file.relative_to(path).as_posix(): file for file in _walk(path)}
    lines = [f"{name} {_hash_of_part(names[name])}\n" for name in sorted(names)]
    return hash_text("".join(lines))


def fingerprint_parts(paths: Mapping[str, Path]) -> dict[str, str]:
    """`fingerprint_weights` of each part of a model, by its name."""
    return {name: fingerprint_weights(path) for name, path in paths.items()}


def hash_text(text: str) -> str:
    """Hash of a text, 32 hexadecimal digits. The text may have lone surrogates, as file names do."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def other_parts(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names of the parts that both have, and whose fingerprints differ."""
    return [name for name in before if name in now and before[name] != now[name]]


def _walk(folder: Path) -> Iterator[Path]:
    """The files in a folder and those below it that weights may depend on."""
    seen = set[str]()
    for top, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(top)
        if real in seen:  # links that go round in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            known = name.startswith(".") or name.endswith(_NO_WEIGHTS) or name in _NO_WEIGHTS_NAMES
            if not known:
                yield Path(top, name)


def _hash_of_part(path: Path) -> str:
    """Hash of a file in a folder of weights. A config is hashed without keys that libraries add, such as the
    path that a model was loaded from.
    """
    if path.name != "config.json":
        return _hash_cached(path)
    try:
        config = read_json_object(path)
    except ValueError:  # whoever loads it will say so
        return _hash_cached(path)
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}
    return hash_text(json.dumps(kept, sort_keys=True))


def _hash_cached(path: Path) -> str:
    """`_hash_file` of a file of weights, from the user's cache folder if the file has not changed."""
    before = path.stat()
    if before.st_size <= _WHOLE:  # reading it costs no more than reading the entry
        return _hash_file(path, whole=_WHOLE_OF_MODELS)
    entry = None
    with suppress(OSError, RuntimeError):  # a user without a home, or one that cannot be written to
        entry = user_cache_folder() / "fingerprints" / _key(path, before)
        found = entry.read_text(encoding="ascii", errors="replace")
        if len(found) == 32 and set(found) <= set("0123456789abcdef"):
            return found
    made = _hash_file(path, whole=_WHOLE_OF_MODELS)
    settled = time.time() - max(before.st_mtime, before.st_ctime) > _SETTLED_S
    if entry is not None and settled and _key(path, path.stat()) == entry.name:
        with suppress(OSError):
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_whole(entry, lambda file: file.write_text(made, encoding="ascii"))
    return made


def _key(path: Path, status: os.stat_result) -> str:
    """Cache key that changes with the file: st_ctime changes even if the modification time is set back."""
    times = status.st_mtime_ns, status.st_ctime_ns
    return hash_text(json.dumps([_VERSION, os.path.realpath(path), status.st_ino, status.st_size, *times]))


def _hash_file(path: Path, *, whole: int) -> str:
    """Hash of a file's size and of the bytes in `_ranges`, or of all bytes up to the size `whole`."""
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
        raise ValueError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.blake2b(f"{_VERSION} {size}\n".encode(), digest_size=16)
        if size <= whole:
            digest.update(file.read())
            return digest.hexdigest()
        for start, end in _ranges(file, size):
            file.seek(start)
            digest.update(file.read(end - start))
        return digest.hexdigest()


def _ranges(file: IO[bytes], size: int) -> Iterator[tuple[int, int]]:
    """The byte ranges of a large file that are hashed: both ends, the directory and the middle of each
    tensor. For a file without a directory, evenly spaced samples.
    """
    yield 0, _ENDS
    yield size - _ENDS, size
    directory = _safetensors_directory(file, size) or _zip_directory(file, size)
    if directory is None:
        count = min(_MOST, max(_FEWEST, size // _SPACING))
        middles = [size * (2 * place + 1) // (2 * count) for place in range(count)]
    else:
        place, middles = directory
        yield place
    for middle in middles:
        yield max(0, middle - _CHUNK // 2), middle + _CHUNK // 2


def _safetensors_directory(file: IO[bytes], size: int) -> tuple[tuple[int, int], list[int]] | None:
    """Where the header of a safetensors file is, and the middles of its tensors. None for other files."""
    file.seek(0)
    start = 8 + int.from_bytes(file.read(8), "little")
    if start > min(size, _LARGEST_HEADER):
        return None
    try:
        header = parse_json(file.read(start - 8).decode(), where=str(file.name))
        offsets = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        if not all(0 <= first <= last <= size - start for first, last in offsets):
            return None
        return (0, start), sorted(start + (first + last) // 2 for first, last in offsets)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _zip_directory(file: IO[bytes], size: int) -> tuple[tuple[int, int], list[int]] | None:
    """Where the directory of a zip is, which has a checksum of each record, and the records' middles. None
    for other files.
    """
    try:
        with ZipFile(file) as archive:
            records = archive.infolist()
            return (archive.start_dir, size), [r.header_offset + r.compress_size // 2 for r in records]
    except (BadZipFile, ValueError, OSError, NotImplementedError):
        return None
