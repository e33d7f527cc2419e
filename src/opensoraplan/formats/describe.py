"""Describes a checkpoint or a LoRA for `osp inspect`, without loading its weights."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opensoraplan.device import dtype_name
from opensoraplan.formats.checkpoints import open_checkpoint
from opensoraplan.formats.infer import config_of, empty_model
from opensoraplan.formats.lora import format_of, load_lora
from opensoraplan.models import original
from opensoraplan.models.lora import is_lora
from opensoraplan.models.sparse_ummdit import SparseUMMDiT

RELEASE_SIZES = {8_504_661_120, 227_035_624}


def describe(path: Path, *, base: Path | None = None) -> str:
    """Several lines of text about the checkpoint at `path`: dialect, precision, parameters, EMA, parallel
    sizes, the config that it matches, and which tensors do not fit that. Of a LoRA: format, rank, layers, and
    which model it fits, `base` or, if None, the released or the built-in one. Raises ValueError for what is
    no checkpoint, or one of another model, and what else `open_checkpoint` raises.
    """
    if is_lora(path):
        return _lines(_describe_lora(path, base))
    if base is not None:
        raise ValueError(f"{path} is not a LoRA, and only a LoRA is compared with a model: leave out {base}")
    checkpoint = open_checkpoint(path)
    info, config, model = checkpoint.info, config_of(checkpoint), empty_model(checkpoint)
    form = original.format_of(model)
    learned = {n: shape for n, shape in checkpoint.shapes.items() if n not in {*form.fixed, *form.unread}}
    others = len(checkpoint) - len(learned)
    try:
        original.match(model, checkpoint)
        fits = "complete" + (f", and {others} that are not needed" if others else "")
    except ValueError as error:
        fits = str(error)

    parameters = sum(math.prod(shape) for shape in learned.values())
    release = " (the release's size)" if parameters in RELEASE_SIZES else ""
    lines = {
        "what": f"{type(model).__name__}, {'denoiser' if isinstance(model, SparseUMMDiT) else 'VAE'}",
        "dialect": info.dialect + (", MindSpeed-MM's names" if info.names == "mindspeed-mm" else ""),
        "iteration": info.iteration,
        "dtype": ", ".join(sorted(dtype_name(dtype) for dtype in checkpoint.dtypes)),
        "parameters": f"{parameters:,}{release} in {len(learned)} tensors",
        "EMA": "these weights" if info.ema else "none",
        "tensor parallel": info.tensor_parallel,
        "pipeline parallel": info.pipeline_parallel,
        "tensors": fits,
        "config": ", ".join(f"{key}={value}" for key, value in config.items()),
    }
    if isinstance(model, SparseUMMDiT) and info.config is None:
        known = ": those of the release are shown" if "sparse_n" in config else ""
        lines["note"] = f"the file has no Skiparse rates{known}"
    elif info.config is None:
        known = ": those of the release would be used" if "shift" not in config else ""
        lines["note"] = f"the file has no shift and scale of the latents{known}"
    return _lines(lines)


def _describe_lora(path: Path, base: Path | None) -> dict[str, Any]:
    lora, fits = load_lora(path, base)
    ranks, alphas = zip(*map(lora.rank_and_alpha, lora.layers), strict=True)
    weights = [tensor for tensor in lora.tensors.values() if tensor.ndim]
    origin = dict(lora.origin)
    return {
        "what": "DoRA" if lora.config["use_dora"] else "LoRA",
        "format": format_of(path),
        "dtype": ", ".join(sorted({dtype_name(tensor.dtype) for tensor in weights})),
        "parameters": f"{sum(tensor.numel() for tensor in weights):,} in {len(lora.layers)} layers",
        "rank": ", ".join(f"{rank}" for rank in sorted(set(ranks))),
        "alpha": ", ".join(f"{alpha:g}" for alpha in sorted(set(alphas))),
        "layers": _summary(lora.layers),
        "fits": fits,
        "trained on": origin.get("base"),
        "base fingerprint": origin.get("base_fingerprint"),
        "step": origin.get("step"),
    }


def _summary(layers: Sequence[str]) -> str:
    """Layers with the numbers of their blocks, which most have in common."""
    blocks: dict[str, list[str]] = {}
    for layer in layers:
        found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer)
        blocks.setdefault(found[2] if found else layer, []).extend([found[1]] if found else [])
    groups: dict[str, list[str]] = {}
    for name, numbers in blocks.items():
        where = f" of {len(numbers)} block{'s' * (len(numbers) > 1)}" if numbers else ""
        groups.setdefault(where, []).append(name)
    return "; ".join(f"{', '.join(names)}{where}" for where, names in groups.items())


def _lines(values: Mapping[str, Any]) -> str:
    return "\n".join(f"{name + ':':<18} {value}" for name, value in values.items() if value is not None)
