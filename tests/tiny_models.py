"""Configs of the small models that tests build, and what makes two of the same weights round alike. A test
that needs another size says only what differs: `{**DENOISER, "num_layers": [2, 4, 2]}`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opensoraplan.formats.lora import Lora
from opensoraplan.models.lora import linear_layers
from opensoraplan.models.original import aligned
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.pipeline import OpenSoraPlanPipeline

DENOISER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": [2, 2, 2],
    "sparse_n": [1, 2, 1],
    "caption_channels": 24,
    "pooled_projection_dim": 20,
    "timestep_embed_dim": 32,
}
# Heads for up to four ranks, with narrow texts.
FOUR_HEADS: dict[str, Any] = {
    **DENOISER,
    "num_attention_heads": 4,
    "caption_channels": 12,
    "pooled_projection_dim": 10,
    "timestep_embed_dim": 16,
}
VAE: dict[str, Any] = {
    "base_channels": 8,
    "latent_channels": 4,
    "encoder_energy_flow_hidden_size": 8,
    "decoder_energy_flow_hidden_size": 8,
}
SHALLOW_VAE: dict[str, Any] = {**VAE, "encoder_num_resblocks": 1, "decoder_num_resblocks": 1}


def align(pipeline: OpenSoraPlanPipeline) -> None:
    """Have all weights begin where torch lets tensors begin, as the command loads them: matrix products of
    weights that a file was read into round otherwise.
    """
    for part in pipeline.components.values():
        for weight in part.parameters() if isinstance(part, torch.nn.Module) else ():
            weight.data = aligned(weight.data)


# Layers of the denoiser of write_model that `lora_of` changes.
LORA_LAYERS = ("transformer_blocks.1.attn1.to_q", "transformer_blocks.3.ff.net.2", "caption_projection")


def lora_of(
    model: Path,
    *,
    seed: int,
    layers: Sequence[str] = LORA_LAYERS,
    rank: int = 2,
    dora: bool = False,
    base: str = "",
) -> Lora:
    """A LoRA or DoRA for the denoiser of a model folder, that changes what it makes."""
    shapes = linear_layers(SparseUMMDiT.from_pretrained(model / "transformer"))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        outputs, inputs = shapes[layer]
        tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) / 4
        tensors[f"{layer}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) / 4
        if dora:
            tensors[f"{layer}.lora_magnitude_vector"] = torch.rand(outputs, generator=generator) + 0.5
    config = {"r": rank, "lora_alpha": 3, "target_modules": list(layers), "use_dora": dora}
    return Lora(tensors, config, {"base_fingerprint": base})
