"""LoRA files for other tools. Reading them is in models/lora.py, what is in them in models/lora_formats.py.

diffusers   transformer.LAYER.lora_A.weight, with the settings in the header; PEFT and FastVideo read it, too
comfy       diffusion_model.LAYER.lora_A.weight and .alpha
kohya       lora_unet_LAYER.lora_down.weight and .alpha, with _ for the dots of LAYER
peft        a folder: base_model.model.LAYER.lora_A.weight, and the settings in adapter_config.json
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from opensoraplan import builtin
from opensoraplan.disk import name_path_in_errors
from opensoraplan.documents import parse_json
from opensoraplan.formats.assemble import open_denoiser
from opensoraplan.formats.export import new_file, new_folder
from opensoraplan.models.lora import (
    HEADER_KEY,
    SETTINGS_FILE,
    WEIGHT_FILES,
    find_lora,
    linear_layers,
    open_lora,
    read_fitting,
)
from opensoraplan.models.sparse_ummdit import SparseUMMDiT

LoraFormat = Literal["diffusers", "comfy", "kohya", "peft"]
LORA_FORMATS = get_args(LoraFormat)
# In a file's header: what the LoRA was trained on.
ORIGIN_KEY = "opensoraplan"

_PREFIXES: dict[LoraFormat, str] = {
    "diffusers": "transformer.",
    "comfy": "diffusion_model.",
    "kohya": "lora_unet_",
    "peft": "base_model.model.",
}
# The parts of a layer, as `save_lora_adapter` names them, in the other formats.
_KOHYA = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
_DORA = "lora_magnitude_vector"
_LAYER = re.compile(r"\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector)$")


@dataclass(frozen=True)
class Lora:
    """A LoRA or DoRA: `tensors` by `LAYER.lora_A.weight` [rank, inputs], `LAYER.lora_B.weight` [outputs,
    rank] and `LAYER.lora_magnitude_vector` [outputs]; `config` the arguments of PEFT's LoraConfig, by
    which a layer's scale is alpha / rank; `origin` what it was trained on, for the header.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    origin: Mapping[str, Any]

    @property
    def layers(self) -> list[str]:
        return sorted({_LAYER.sub("", name) for name in self.tensors})

    def rank_and_alpha(self, layer: str) -> tuple[int, float]:
        """Of a layer: its own by the patterns, else those of all."""
        own = f"^{re.escape(layer)}"
        ranks, alphas = (self.config.get(name, {}) for name in ("rank_pattern", "alpha_pattern"))
        return ranks.get(own, self.config["r"]), alphas.get(own, self.config["lora_alpha"])

    def merge(self, layer: str, weight: Tensor) -> Tensor:
        """The weight [outputs, inputs] of a layer with the LoRA in it, in fp32; as it is for other layers."""
        down = self.tensors.get(f"{layer}.lora_A.weight")
        if down is None:
            return weight
        rank, alpha = self.rank_and_alpha(layer)
        up = self.tensors[f"{layer}.lora_B.weight"]
        merged = weight.float() + alpha / rank * (up.float() @ down.float())
        magnitude = self.tensors.get(f"{layer}.{_DORA}")
        if magnitude is not None:
            merged *= (magnitude.float() / torch.linalg.vector_norm(merged, dim=1))[:, None]
        return merged


def load_lora(source: Path, base: Path | None = None) -> tuple[Lora, str]:
    """A LoRA of any format, and what it fits: the denoiser at `base`, or else the released or the built-in
    one. Raises ValueError for one that does not fit to the last tensor.
    """
    mismatch: ValueError | None = None
    for name, model in _denoisers(base):
        try:
            tensors, config = read_fitting(source, linear_layers(model))
        except ValueError as error:
            mismatch = mismatch or error
        else:
            return Lora(tensors, config, read_origin(source)), name
    assert mismatch is not None
    raise mismatch


def _denoisers(base: Path | None) -> Iterator[tuple[str, SparseUMMDiT]]:
    """Denoisers without weights that a LoRA may be for."""
    if base is not None:
        yield f"the denoiser of {base}", open_denoiser(base).model
        return
    with torch.device("meta"):
        yield "the released denoiser", SparseUMMDiT()
    yield "the built-in denoiser", open_denoiser(builtin.folder()).model


def format_of(source: Path) -> str:
    """The format of a LoRA by the names of its tensors; "plain" without any prefix."""
    with open_lora(find_lora(source)) as file:
        names = list(file.keys())
    known = ((kind, prefix) for kind, prefix in _PREFIXES.items() if names[0].startswith(prefix))
    return next((kind for kind, _ in known), "plain")


def check_lora_path(path: Path, kind: LoraFormat) -> None:
    """Raise ValueError for a name that a file of this format does not have."""
    if kind != "peft" and path.suffix != ".safetensors":
        raise ValueError(f"a LoRA is one .safetensors file, got --out {path}: use {path}.safetensors")


def write_lora(lora: Lora, path: Path, *, kind: LoraFormat, dtype: torch.dtype | None = None) -> None:
    """Write a LoRA to the new file `path`, or for "peft" to the new folder. `dtype`: None keeps each tensor's
    own. Raises ValueError if there is something already.
    """
    check_lora_path(path, kind)
    tensors = {
        _renamed(name, kind): _shaped(name, tensor.to(dtype or tensor.dtype), kind)
        for name, tensor in lora.tensors.items()
    }
    header = {"format": "pt", ORIGIN_KEY: json.dumps({"version": version("opensoraplan"), **lora.origin})}
    if kind in ("comfy", "kohya"):
        for layer in lora.layers:
            alpha = torch.tensor(float(lora.rank_and_alpha(layer)[1]))
            tensors[_renamed(f"{layer}.alpha", kind)] = alpha
    if kind == "kohya":
        rank, alpha = lora.config["r"], lora.config["lora_alpha"]
        header |= {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(alpha),
        }
    if kind == "peft":
        with new_folder(path) as folder:
            settings = {"peft_type": "LORA", **lora.config}
            (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            _save(tensors, folder / WEIGHT_FILES[1], header)
        return
    if kind == "diffusers":
        settings = {f"{_PREFIXES[kind]}{key}": value for key, value in lora.config.items()}
        header[HEADER_KEY] = json.dumps(settings)
    with new_file(path) as partial:
        _save(tensors, partial, header)


def read_origin(source: Path) -> dict[str, Any]:
    """What a LoRA that `write_lora` has written was trained on; of other LoRAs nothing."""
    path = find_lora(source)
    with open_lora(path) as file:
        text = (file.metadata() or {}).get(ORIGIN_KEY)
    origin = None if text is None else parse_json(text, where=f"{ORIGIN_KEY} of {path}")
    return origin if isinstance(origin, dict) else {}


def _save(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str]) -> None:
    with name_path_in_errors(path):
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=dict(header)
        )


def _renamed(name: str, kind: LoraFormat) -> str:
    """A tensor's name in a format."""
    layer, part = name.removesuffix(".alpha"), "alpha"
    if (found := _LAYER.search(name)) is not None:
        layer, part = name[: found.start()], found[1]
    if kind == "kohya":
        layer, part = layer.replace(".", "_"), _KOHYA.get(part, part)
    if kind in ("comfy", "kohya") and part == _DORA:
        part = "dora_scale"
    return f"{_PREFIXES[kind]}{layer}.{part}"


def _shaped(name: str, tensor: Tensor, kind: LoraFormat) -> Tensor:
    """Magnitudes are columns where LyCORIS named them first."""
    return tensor[:, None] if name.endswith(_DORA) and kind in ("comfy", "kohya") else tensor
