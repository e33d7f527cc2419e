"""A LoRA or DoRA that is trained in place of the denoiser's own weights: PEFT puts it into the model. Files
of LoRAs are in models/lora_formats.py.
"""

import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensoraplan.fingerprint import fingerprint_weights, other_parts
from opensoraplan.formats.assemble import component_of
from opensoraplan.formats.lora import Lora
from opensoraplan.models.lora import check_peft, linear_layers
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.names import did_you_mean
from opensoraplan.parallel.shards import fill
from opensoraplan.runtime.quantisation import QUANTISED, QuantisedLinear
from opensoraplan.train.config import AdapterSettings

# Attention and feed-forwards of both streams; not modulation, skip connections and projections at both ends.
DEFAULT_TARGETS = (
    r"\.attn1\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$",
    r"\.(ff|ff_enc)\.net\.(0\.proj|2)$",
)
# The setting of the model that is adapted, and its name among the fingerprints of a checkpoint.
BASE_SETTING = "model.pretrained"
_NUMBERED = re.compile(r"^transformer_blocks\.\d+\.")
_BASE = ".base_layer."
_VECTOR = ".lora_magnitude_vector"
_DOWN, _UP, _MAGNITUDE = ".lora_A.default", ".lora_B.default", f"{_VECTOR}.default"


def add_adapter(model: SparseUMMDiT, settings: AdapterSettings) -> None:
    """Put an adapter into the model, which may be on the meta device, and freeze all else. Values are
    given by `fill_with_adapter`. Raises ValueError for targets that match no layer, and a rank that is
    no low one.
    """
    check_peft()
    from peft import LoraConfig

    layers = target_layers(model, settings.targets)
    narrowest = min(layers, key=lambda name: min(layers[name]))
    if settings.rank > min(layers[narrowest]):
        outputs, inputs = layers[narrowest]
        raise ValueError(
            f"adapter.rank is {settings.rank}, but {narrowest} is {outputs} x {inputs}: use at most "
            f"{min(outputs, inputs)}"
        )
    model.add_adapter(LoraConfig(**_config(settings, layers), lora_dropout=settings.dropout))


def target_layers(model: SparseUMMDiT, targets: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Names and (outputs, inputs) of the linear layers that an adapter with these targets has."""
    linears = linear_layers(model)
    chosen = set[str]()
    for target in tuple(targets) or DEFAULT_TARGETS:
        found = [name for name in linears if re.search(target, name)]
        if not found:
            hint = did_you_mean(target, {_NUMBERED.sub("", name) for name in linears}, cutoff=0.5)
            raise ValueError(f"adapter.targets: no linear layer of the model matches {target!r}{hint}")
        chosen.update(found)
    return {name: shape for name, shape in linears.items() if name in chosen}


def fill_with_adapter(model: SparseUMMDiT, weights: Iterable[tuple[str, Tensor]], *, seed: int) -> None:
    """Give a model that has an adapter its own weights, by the names that they have without one, and the
    adapter the values that it begins with: down uniform in +-1 / sqrt(inputs), as a linear layer of torch;
    up 0, so that nothing is added yet; DoRA's magnitudes the norms of the rows.
    """
    parameters, quantised = dict(model.named_parameters()), quantised_layers(model)
    for name, value in weights:
        layer, _, kind = name.rpartition(".")
        if layer in quantised and kind == "weight":
            quantised[layer].take(value)
        else:
            fill(parameters[name if name in parameters else f"{layer}{_BASE}{kind}"], value)
        magnitude = parameters.get(f"{layer}{_MAGNITUDE}.weight")
        if magnitude is not None and kind == "weight":
            fill(magnitude, torch.linalg.vector_norm(value.float(), dim=1))
    for name, parameter in parameters.items():
        if f"{_DOWN}." in name:
            drawn = random.Random(f"{seed} {name}").getrandbits(63)
            generator = torch.Generator().manual_seed(drawn)
            uniform = torch.rand(parameter.shape, generator=generator)
            fill(parameter, (2 * uniform - 1) / parameter.shape[1] ** 0.5)
        elif f"{_UP}." in name:
            fill(parameter, torch.zeros(parameter.shape))


def quantised_layers(model: SparseUMMDiT) -> dict[str, QuantisedLinear]:
    """The linear layers that are quantised, by the names that they have without an adapter."""
    return {
        name.removesuffix(_BASE[:-1]): module
        for name, module in model.named_modules()
        if isinstance(module, QUANTISED)
    }


def lr_ratios(names: Iterable[str], settings: AdapterSettings) -> dict[str, float]:
    """The multiple of the learning rate that each of these parameters has."""
    return {name: settings.up_lr_ratio for name in names if f"{_UP}." in name}


def fingerprint_base(path: Path) -> str:
    """Of the denoiser that an adapter is trained on, a file or a folder, or one of a whole pipeline."""
    return fingerprint_weights(component_of(path, "transformer"))


def check_base(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise ValueError if the model that is adapted is not the one `before`, by the fingerprints of a run: an
    adapter is of no use to another one.
    """
    if BASE_SETTING in other_parts(before, now):
        raise ValueError(
            f"{BASE_SETTING} is not the model that the adapter was trained on: its weights were replaced. "
            "Put them back, or start another run"
        )


def lora_of(tensors: Mapping[str, Tensor], settings: AdapterSettings, origin: Mapping[str, Any]) -> Lora:
    """The adapter in a checkpoint of a run with these settings, for files."""
    plain = {name.replace(".default", "", 1): tensor for name, tensor in tensors.items()}
    plain = {
        name.removesuffix(".weight") if _VECTOR in name else name: value for name, value in plain.items()
    }
    return Lora(plain, _config(settings, {name.partition(".lora_")[0] for name in plain}), origin)


def _config(settings: AdapterSettings, layers: Iterable[str]) -> dict[str, Any]:
    """Arguments of PEFT's LoraConfig."""
    return {
        "r": settings.rank,
        "lora_alpha": settings.alpha or settings.rank,
        "target_modules": sorted(layers),
        "use_dora": settings.kind == "dora",
    }
