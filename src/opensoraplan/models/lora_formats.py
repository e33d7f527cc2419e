"""LoRAs of every tool as PEFT has them: tensors and settings in, a state dict and a LoraConfig's arguments
out. No files, no peft. A layer's scale is alpha / rank, and 1 where nothing tells alpha.

Names that are read, of a linear layer `m`: `m.lora_A.weight` (save_lora_adapter), the same behind
`transformer.` (diffusers), `base_model.model.` (PEFT) or `diffusion_model.` (ComfyUI), and
`lora_unet_m.lora_down.weight` with `_` for the dots of m (kohya); DoRA's magnitudes in all of them.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from opensoraplan.names import did_you_mean

PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.")
KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
TEXT_PREFIXES = ("lora_te", "text_encoder")
SHOWN_FAULTS = 5

# The name of an adapter may stand between lora_A and weight.
_PARTS = {
    "down": re.compile(r"\.(?:lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight$"),
    "up": re.compile(r"\.(?:lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight$"),
    "bias": re.compile(r"\.lora_B(?:\.\w+)?\.bias$"),
    "alpha": re.compile(r"\.alpha$"),
    "magnitude": re.compile(r"\.(?:dora_scale|lora_magnitude_vector(?:\.\w+)?(?:\.weight)?)$"),
}
_OTHER_KINDS = {
    "LoHa": re.compile(r"\.hada_"),
    "LoKr": re.compile(r"\.lokr_"),
    "OFT": re.compile(r"\.b?oft_"),
    "LoCon with a core (lora_mid)": re.compile(r"\.lora_mid\."),
    "IA3": re.compile(r"\.ia3_l|\.on_input$"),
    "VeRA": re.compile(r"\.?vera_"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "whole differences of weights (diff)": re.compile(r"\.diff(?:_b)?$"),
}
# Of a LoraConfig: what makes something else than W + scale * B A of a linear layer.
_PLAIN = {
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass
class _Layer:
    """What a file has for one linear layer, by part, and the names of these tensors."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def to_peft(
    tensors: Mapping[str, Tensor],
    linears: Mapping[str, tuple[int, int]],
    *,
    settings: Mapping[str, Any] | None = None,
    prefix: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A LoRA for a model with these linear layers, by name (outputs, inputs): the state dict that PEFT takes,
    `<layer>.lora_A.weight` [rank, inputs] and so on, and the arguments of its LoraConfig.

    `settings`: the LoraConfig that a file came with, of which alpha is taken. `prefix`: one that names may
    have beside the known ones. Raises ValueError that names the tensors of another kind than LoRA and DoRA,
    those that no layer takes, those that are missing, mis-shaped or not finite, and settings that would be
    lost on the way.
    """
    prefixes = PREFIXES if prefix is None else (*PREFIXES, f"{prefix}.")
    settings = {_without(key, prefixes): value for key, value in (settings or {}).items()}
    _check_kind(tensors, settings)
    layers, faults = _by_layer(tensors, linears, prefixes)
    for name, layer in layers.items():
        faults += _faults_of(name, layer, linears[name])
    optional = [
        part
        for part, setting in (("magnitude", "use_dora"), ("bias", "lora_bias"))
        if settings.get(setting) or any(part in layer.parts for layer in layers.values())
    ]
    faults += [
        f"{layer.keys['down']}: the {part} beside it is missing"
        for layer in layers.values()
        for part in optional
        if part not in layer.parts and "down" in layer.parts
    ]
    faults += [
        f"{layer.keys[part]} has numbers that are not finite"
        for layer in layers.values()
        for part, tensor in layer.parts.items()
        if part != "alpha" and not tensor.isfinite().all()
    ]
    if faults or not layers:
        more = f"\n  and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        lines = "\n  ".join(faults[:SHOWN_FAULTS]) or "it is empty"
        raise ValueError(f"this LoRA does not fit the model, nothing of it was loaded:\n  {lines}{more}")

    suffixes = {"down": "lora_A.weight", "up": "lora_B.weight", "bias": "lora_B.bias"}
    suffixes["magnitude"] = "lora_magnitude_vector"
    state_dict = {
        f"{name}.{suffixes[part]}": tensor.flatten() if part == "magnitude" else tensor
        for name, layer in layers.items()
        for part, tensor in layer.parts.items()
        if part != "alpha"
    }
    ranks = {name: len(layer.parts["down"]) for name, layer in layers.items()}
    rank, rank_pattern = _most_common(ranks)
    alpha, alpha_pattern = _most_common(_alphas(layers, ranks, settings, prefixes))
    return state_dict, {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": sorted(layers),
        "use_dora": "magnitude" in optional,
        "lora_bias": "bias" in optional,
    }


def is_of_lora(key: str) -> bool:
    """Whether a tensor's name is one of a LoRA, or of another adapter that no model has such names of."""
    others = (_OTHER_KINDS[kind] for kind in ("LoHa", "LoKr", "OFT"))
    return any(pattern.search(key) for pattern in (_PARTS["down"], _PARTS["up"], *others))


def _check_kind(tensors: Iterable[str], settings: Mapping[str, Any]) -> None:
    """Raise ValueError for what is no LoRA at all, by the names of its tensors or by its settings."""
    kind = settings.get("peft_type")
    if kind not in (None, "LORA"):
        raise ValueError(f"this adapter is {kind} by its settings: only LoRA and DoRA can be loaded")
    for key in tensors:
        for other, pattern in _OTHER_KINDS.items():
            if pattern.search(key):
                raise ValueError(f"{key} is of {other}: only LoRA and DoRA can be loaded")
        if key.startswith(TEXT_PREFIXES):
            raise ValueError(f"{key} is of a text encoder: only LoRAs of the denoiser alone can be loaded")
    for name, plain in _PLAIN.items():
        if settings.get(name) not in plain:
            raise ValueError(f"this LoRA was made with {name} {settings[name]!r}, which cannot be loaded")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise ValueError(
            f"this LoRA began as {start!r}, which changes the model's own weights: save it as a plain LoRA "
            "(`path_initial_model_for_weight_conversion` of PEFT's save_pretrained)"
        )


def _by_layer(
    tensors: Mapping[str, Tensor], linears: Iterable[str], prefixes: tuple[str, ...]
) -> tuple[dict[str, _Layer], list[str]]:
    """The tensors of each linear layer, and what is wrong with the names of the others."""
    layer_of = {name.replace(".", "_"): name for name in linears}
    known = set(linears)
    layers: dict[str, _Layer] = {}
    faults: list[str] = []
    for key, tensor in tensors.items():
        part = next((part for part, pattern in _PARTS.items() if pattern.search(key)), None)
        if part is None:
            faults.append(f"{key} is no tensor of a LoRA")
            continue
        written = _PARTS[part].sub("", key)
        name = _without(written, prefixes)
        if written.startswith(KOHYA_PREFIXES):
            name = _without(written, KOHYA_PREFIXES)
            name = layer_of.get(name, name)
        if name not in known:
            hint = did_you_mean(name, known, cutoff=0.9)
            faults.append(f"{key}: the model has no linear layer {name}{hint}")
            continue
        layer = layers.setdefault(name, _Layer())
        if part in layer.parts:
            faults.append(f"{key} and {layer.keys[part]} are both the {part} of {name}")
        layer.parts[part], layer.keys[part] = tensor, key
    return layers, faults


def _without(name: str, prefixes: tuple[str, ...]) -> str:
    """The name without any of the prefixes, of which several may stand one behind the other."""
    while (found := next(filter(name.startswith, prefixes), None)) is not None:
        name = name.removeprefix(found)
    return name


def _faults_of(name: str, layer: _Layer, shape: tuple[int, int]) -> list[str]:
    """What is missing or mis-shaped of the tensors for a layer of that many outputs and inputs."""
    outputs, inputs = shape
    missing = [part for part in ("down", "up") if part not in layer.parts]
    if missing:
        return [f"{next(iter(layer.keys.values()))}: the {' and '.join(missing)} matrix of {name} is missing"]
    rank = len(layer.parts["down"]) if layer.parts["down"].ndim else 0
    wanted: dict[str, set[tuple[int, ...]]] = {
        "down": {(rank, inputs)},
        "up": {(outputs, rank)},
        "bias": {(outputs,)},
        "alpha": {(), (1,)},
        "magnitude": {(outputs,), (outputs, 1)},  # [1, inputs] would be one for each input
    }
    faults = [
        f"{layer.keys[part]} is {list(tensor.shape)}, {name} takes {list(min(wanted[part], key=len))}"
        for part, tensor in layer.parts.items()
        if tuple(tensor.shape) not in wanted[part]
    ]
    return faults or ([f"{layer.keys['down']} has rank 0"] if rank == 0 else [])


def _alphas(
    layers: Mapping[str, _Layer],
    ranks: Mapping[str, int],
    settings: Mapping[str, Any],
    prefixes: tuple[str, ...],
) -> dict[str, float]:
    """Alpha of each layer, from its own tensor, else from the settings, else the rank."""
    told = _alpha_by_settings(settings, prefixes)
    alphas: dict[str, float] = {}
    for name, layer in layers.items():
        alpha = told(name, ranks[name])
        if "alpha" in layer.parts:
            own = float(layer.parts["alpha"])
            if alpha is not None and not math.isclose(own, alpha, rel_tol=1e-2):  # it may be in bf16
                raise ValueError(f"{layer.keys['alpha']} is {own:g}, the settings beside it say {alpha:g}")
            alpha = own
        alpha = float(ranks[name] if alpha is None else alpha)
        if not math.isfinite(alpha):
            raise ValueError(f"alpha of {name} is {alpha}")
        alphas[name] = int(alpha) if alpha.is_integer() else alpha
    return alphas


def _alpha_by_settings(
    settings: Mapping[str, Any], prefixes: tuple[str, ...]
) -> Callable[[str, int], float | None]:
    """What a LoraConfig says of a layer of a rank; None if it says nothing."""
    pattern, everywhere = settings.get("alpha_pattern") or {}, settings.get("lora_alpha")
    if not isinstance(pattern, Mapping) or not all(
        isinstance(value, int | float) and not isinstance(value, bool)
        for value in (*pattern.values(), 0 if everywhere is None else everywhere)
    ):
        raise ValueError("lora_alpha of a LoRA must be a number, alpha_pattern a table of numbers")
    if everywhere is None:
        return lambda _name, _rank: None
    try:
        compiled = [
            (re.compile(rf"(?:.*\.)?(?:{_without(key.removeprefix('^'), prefixes)})"), value)
            for key, value in pattern.items()
        ]
    except re.error as error:
        raise ValueError(f"alpha_pattern of a LoRA has no regular expressions: {error}") from None

    def alpha(name: str, rank: int) -> float:
        found = next((value for expression, value in compiled if expression.fullmatch(name)), everywhere)
        return found * math.sqrt(rank) if settings.get("use_rslora") else found

    return alpha


def _most_common(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The value that most layers have, and the others by a pattern for PEFT that is one layer's alone."""
    ((most, _count),) = Counter(values.values()).most_common(1)
    return most, {f"^{re.escape(name)}": value for name, value in values.items() if value != most}
