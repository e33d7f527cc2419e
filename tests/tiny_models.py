"""Configs of the small models that tests build, and what makes two of the same weights round alike. A test
that needs another size says only what differs: `{**DENOISER, "num_layers": [2, 4, 2]}`.
"""

from typing import Any

import torch

from opensoraplan.models.original import aligned
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
