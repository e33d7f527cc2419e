"""LoRAs of a denoiser that generates: loaded once, and used by each video at strengths of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from opensoraplan.models.sparse_ummdit import SparseUMMDiT


def load_loras(model: SparseUMMDiT, files: Sequence[Path]) -> None:
    """Put LoRAs into the denoiser, in its precision, all of them off. To be called once, before its weights
    are quantised or moved. Raises ValueError for a file that does not fit, as `load_lora_adapter`.
    """
    own = {id(parameter) for parameter in model.parameters()}
    for file in files:
        model.load_lora_adapter(file, adapter_name=_name(file, files))
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.data = parameter.data.to(model.device, model.dtype)
    if files:
        model.disable_lora()
        model.requires_grad_(False)


def use_loras(model: SparseUMMDiT, files: Sequence[Path], strengths: Mapping[Path, float]) -> None:
    """Use these of the loaded `files` at these strengths from now on, and no other one."""
    if not files:
        return
    if not strengths:
        model.disable_lora()
        return
    model.enable_lora()
    model.set_adapters([_name(file, files) for file in strengths], list(strengths.values()))
    model.requires_grad_(False)


def _name(file: Path, files: Sequence[Path]) -> str:
    """What PEFT calls it, where dots would be levels."""
    return f"lora_{files.index(file)}"
