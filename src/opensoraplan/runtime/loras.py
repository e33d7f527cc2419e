"""LoRAs of a denoiser that generates: loaded once, and used by each video at strengths of its own."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from opensoraplan.models.modulation import adaln_layers, layer_of
from opensoraplan.models.sparse_ummdit import SparseUMMDiT

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def load_loras(model: SparseUMMDiT, files: Sequence[Path]) -> None:
    """Put LoRAs into the denoiser, which may be on the meta device, in its precision, all of them off. Call
    this once, before the weights are quantised or moved. Raises ValueError as `load_lora_adapter` for a file
    that does not fit.
    """
    for file in files:
        model.load_lora_adapter(file, adapter_name=_name(file, files), low_cpu_mem_usage=True)
    for name, module in model.named_modules():
        if name.rpartition(".")[2].startswith("lora_"):
            nn.Module.to(module, model.device, model.dtype)
    if files:
        use_loras(model, files, {})


def use_loras(model: SparseUMMDiT, files: Sequence[Path], strengths: Mapping[Path, float]) -> None:
    """Use these of the loaded `files` at these strengths from now on, and no other one."""
    if not files:
        return
    for layer in _layers_with_loras(model):
        layer.enable_adapters(bool(strengths))
        if strengths:
            layer.set_adapter([_name(file, files) for file in strengths])
        for file, strength in strengths.items():
            layer.set_scale(_name(file, files), strength)
    model.requires_grad_(False)


def settings_of(model: SparseUMMDiT, file: Path, files: Sequence[Path]) -> dict[str, object]:
    """What a loaded LoRA computes with beside its tensors: ranks, alphas, and whether it is a DoRA."""
    config = model.peft_config[_name(file, files)]
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora")
    return {name: getattr(config, name) for name in names}


def _layers_with_loras(model: SparseUMMDiT) -> "Iterator[LoraLayer]":
    """Those of AdaLN, too, which are no modules of the model while they are kept on the host."""
    from peft.tuners.lora import LoraLayer

    adaln = (layer_of(norm.linear).modules() for norm in adaln_layers(model))
    modules = {id(module): module for module in chain(model.modules(), *adaln)}
    for module in modules.values():
        if isinstance(module, LoraLayer):
            yield module


def _name(file: Path, files: Sequence[Path]) -> str:
    """What PEFT calls it, where dots would be levels."""
    return f"lora_{files.index(file)}"
