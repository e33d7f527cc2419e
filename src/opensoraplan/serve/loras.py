"""The LoRAs of a server: files and folders of one folder, which requests use by name."""

import re
from collections.abc import Sequence
from pathlib import Path

from opensoraplan.names import did_you_mean
from opensoraplan.requests import split_strength

_SUFFIX, _SETTINGS = ".safetensors", "adapter_config.json"
_NAME = re.compile(r"\w[\w.-]{0,99}")


def find_loras(folder: Path | None) -> dict[str, Path]:
    """The LoRAs of a folder by name, relative to it: .safetensors files, and folders of PEFT."""
    found = {}
    for path in sorted(folder.iterdir()) if folder is not None else ():
        is_lora = path.suffix == _SUFFIX if path.is_file() else (path / _SETTINGS).is_file()
        name = path.stem if path.is_file() else path.name
        if is_lora and _NAME.fullmatch(name):
            found.setdefault(name, Path(path.name))
    return found


def check_names(wanted: Sequence[str], known: dict[str, Path], broken: dict[str, str]) -> None:
    """Raise ValueError unless all of `wanted`, NAME or NAME:STRENGTH, are LoRAs of the server that its
    workers can use. `broken`: why they cannot use some.
    """
    for text in wanted:
        if "/" in text or "\\" in text:
            raise ValueError(f"lora takes names of this server's LoRAs, not paths, got {text!r}")
        name = str(split_strength(text)[0])
        if name not in known:
            there = did_you_mean(name, known) or f": there is {', '.join(known) or 'none'}"
            raise ValueError(f"this server has no LoRA {name!r}{there}")
        if name in broken:
            raise ValueError(f"the LoRA {name!r} does not fit this model: {broken[name]}")


def to_files(wanted: Sequence[str], known: dict[str, Path]) -> tuple[str, ...]:
    """`wanted` with files, relative to the folder, in place of names."""
    pairs = (split_strength(text) for text in wanted)
    return tuple(f"{known[str(name)]}:{strength!r}" for name, strength in pairs)
