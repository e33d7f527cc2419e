"""LoRAs of a denoiser: read from files or the Hub, and taken whole or not at all. What is in them is told by
lora_formats.py; diffusers and PEFT put it into the model.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.loaders.peft import PeftAdapterMixin
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from opensoraplan.documents import parse_json, read_json_object
from opensoraplan.models.lora_formats import is_of_lora, to_peft

# Of a folder: the settings that PEFT writes, and the files that hold the tensors.
SETTINGS_FILE = "adapter_config.json"
WEIGHT_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
# In a file's header: the settings that diffusers writes.
HEADER_KEY = "lora_adapter_metadata"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_PASSED_ON = ("_pipeline", "adapter_name", "low_cpu_mem_usage")
# Layers inside of those that PEFT has put into a model.
_OF_ADAPTER = re.compile(r"\.lora_\w+\.")


class LoraMixin(PeftAdapterMixin):
    """A diffusers model that takes LoRAs of every tool, and refuses those that it cannot take whole.

    diffusers itself only warns of tensors that have no place, and loses alpha.
    """

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **options: Any,  # noqa: ANN401 (diffusers')
    ) -> None:
        """Add a LoRA or DoRA to the model, active at strength 1; `set_adapters` changes that.

        The first argument is a .safetensors file, a folder with one, a repository of the Hub, or a state
        dict. Names may be those of diffusers, PEFT, ComfyUI or kohya, or begin with another `prefix`.
        `hotswap`: replace the adapter of that name.

        Options: `adapter_name`; `weight_name` and `subfolder`, of the file; `metadata`, a LoraConfig as a
        dict, instead of the file's own; `low_cpu_mem_usage`, as in diffusers; `revision`, `token`,
        `cache_dir`, `local_files_only` and `force_download`, of the Hub. Raises ValueError, before anything
        is changed, for what is no LoRA and for one that does not fit the model to the last tensor.
        """
        check_peft()
        metadata, names = options.pop("metadata", None), ("weight_name", "subfolder", *_HUB_OPTIONS)
        reading = {name: options.pop(name) for name in names if name in options}
        if unknown := sorted(set(options) - set(_PASSED_ON)):
            raise TypeError(f"load_lora_adapter takes no {', '.join(unknown)}")
        if isinstance(pretrained_model_name_or_path_or_dict, Mapping):
            where, tensors, settings = "the state dict", pretrained_model_name_or_path_or_dict, None
        else:
            where, tensors, settings = read_lora(pretrained_model_name_or_path_or_dict, **reading)
        settings = settings if metadata is None else metadata
        with _named(where):
            tensors, config = to_peft(tensors, linear_layers(self), settings=settings, prefix=prefix)
        options |= {"prefix": None, "hotswap": hotswap, "metadata": config}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second LoRA is no accident
            super().load_lora_adapter(tensors, **options)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> None:  # noqa: ANN401
        """As in diffusers, but ValueError while a LoRA is in the model, whose layers have other names then:
        no loader would find the weights.
        """
        if self._hf_peft_config_loaded:
            raise ValueError(
                f"a LoRA is in the model: to write {save_directory}, unload_lora(), after fuse_lora() if it "
                "is to be a part of the weights; save_lora_adapter writes the LoRA alone"
            )
        super().save_pretrained(save_directory, *args, **options)  # type: ignore[misc] (ModelMixin's)


def check_peft() -> None:
    """Raise ValueError without PEFT, which puts LoRAs into models."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ValueError(f"LoRAs need the package peft ({error}): pip install 'opensoraplan[lora]'") from None


def read_fitting(
    source: str | Path,
    linears: Mapping[str, tuple[int, int]],
    **options: Any,  # noqa: ANN401
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of a LoRA for a model with these linear layers, as PEFT takes them. `options`: of
    `read_lora`. Raises ValueError as it does, and for one that does not fit to the last tensor.
    """
    path, tensors, settings = read_lora(source, **options)
    with _named(path):
        return to_peft(tensors, linears, settings=settings)


def is_lora(path: Path) -> bool:
    """Whether this is a LoRA, or something like it, by the names of its tensors."""
    if path.is_dir():
        return any((path / name).is_file() for name in (SETTINGS_FILE, *WEIGHT_FILES))
    if path.suffix != ".safetensors":
        return False
    with open_lora(path) as file:
        return any(is_of_lora(name) for name in file.keys())  # noqa: SIM118 (it is no dict)


@contextmanager
def _named(where: str | Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def linear_layers(model: Any) -> dict[str, tuple[int, int]]:  # noqa: ANN401 (a mixin's module)
    """Names and (outputs, inputs) of a model's linear layers, those that have LoRAs already included."""
    return {
        name.removesuffix(".base_layer"): (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not _OF_ADAPTER.search(name)
    }


def read_lora(
    source: str | Path,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    **hub: Any,  # noqa: ANN401 (huggingface_hub's)
) -> tuple[Path, dict[str, Tensor], dict[str, Any] | None]:
    """The file, the tensors and, if there are any, the settings of a LoRA: of a file, a folder or a
    repository of the Hub, with its options `hub`. Raises ValueError if it cannot be read or is not the
    only one there.
    """
    path = find_lora(source, weight_name=weight_name, subfolder=subfolder, **hub)
    with open_lora(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        header = file.metadata() or {}
    if HEADER_KEY in header:
        settings = parse_json(header[HEADER_KEY], where=f"{HEADER_KEY} of {path}")
        if not isinstance(settings, dict):
            raise ValueError(f"{HEADER_KEY} of {path} must be one JSON object")
        return path, tensors, settings
    beside = path.with_name(SETTINGS_FILE)
    return path, tensors, read_json_object(beside) if beside.is_file() else None


def find_lora(
    source: str | Path,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    **hub: Any,  # noqa: ANN401 (huggingface_hub's)
) -> Path:
    """The file that `read_lora` reads. Raises ValueError as it does."""
    path = Path(source)
    if not path.exists() and _HUB_ID.fullmatch(str(source)):
        wanted = [
            f"{subfolder}/{weight_name or '*.safetensors'}" if subfolder else weight_name or "*.safetensors"
        ]
        wanted += [f"{subfolder}/{SETTINGS_FILE}" if subfolder else SETTINGS_FILE]
        path = Path(snapshot_download(str(source), allow_patterns=wanted, **hub))
    if path.is_dir():
        path = _only_file(path / (subfolder or ""), weight_name)
    if not path.is_file():
        raise ValueError(f"there is no LoRA {path}")
    if path.suffix != ".safetensors":
        raise ValueError(f"LoRAs are read from .safetensors files, got {path}")
    return path


@contextmanager
def open_lora(path: Path) -> Iterator[Any]:
    """An open .safetensors file. Raises ValueError for a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _only_file(folder: Path, name: str | None) -> Path:
    """The file of that name, or the only LoRA in the folder."""
    if name is not None:
        return folder / name
    there = sorted(path.name for path in folder.glob("*.safetensors"))
    found = [name for name in WEIGHT_FILES if name in there] or there
    if len(found) != 1:
        what = f"{len(found)} .safetensors files: give weight_name" if found else "no .safetensors file"
        raise ValueError(f"{folder} has {what}{', one of ' + ', '.join(found) if found else ''}")
    return folder / found[0]
