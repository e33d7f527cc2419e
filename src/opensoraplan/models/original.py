"""The original's config keys and tensor names for both models, and loading from them. No file formats here.

Our names differ from the original's in two places: its blocks are nested by stage
(`transformer_blocks.2.5.`), ours are one flat list, and its skip Linears (`skip_norm_linear.0.1.`) sit in
ours inside the block that uses them.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from opensoraplan.models.strict import Shape, check_known_keys, check_tensors

logger = logging.getLogger(__name__)

NESTED = "transformer_blocks"
SKIP = re.compile(r"transformer_blocks\.(\d+)\.(skip(?:_enc)?)\.(norm|linear)\.(\w+)")
SKIP_PARTS = {"norm": "0", "linear": "1"}
SKIP_STREAMS = {"skip": "skip_norm_linear", "skip_enc": "skip_norm_linear_enc"}

# Original key -> our constructor's.
DENOISER_KEYS = {
    "num_heads": "num_attention_heads",
    "head_dim": "attention_head_dim",
} | {
    key: key
    for key in (
        "in_channels",
        "out_channels",
        "num_layers",
        "sparse_n",
        "double_ff",
        "caption_channels",
        "pooled_projection_dim",
        "timestep_embed_dim",
        "patch_size",
        "norm_cls",
        "norm_eps",
        "skip_connection",
        "skip_connection_zero_init",
    )
}
# Keys with one value in v1.5.0: anything else is another model.
DENOISER_FIXED = {
    "model_id": "SparseUMMDiT",
    "dropout": 0.0,
    "attention_bias": True,
    "patch_size_t": 1,
    "activation_fn": "gelu-approximate",
}
# Keys that say nothing of the architecture, and `norm_elementwise_affine`, which the original ignores.
DENOISER_IGNORED = {"sparse1d", "norm_elementwise_affine", "from_pretrained", "dtype"}

VAE_KEYS = {"latent_dim": "latent_channels"} | {
    key: key
    for key in (
        "base_channels",
        "connect_res_layer_num",
        "decoder_energy_flow_hidden_size",
        "decoder_num_resblocks",
        "encoder_energy_flow_hidden_size",
        "encoder_num_resblocks",
        "shift",
        "scale",
    )
}
VAE_FIXED = {
    "model_id": "wfvae",
    "dropout": 0.0,
    "l1_dowmsample_block": "Spatial2xTime2x3DDownsample",
    "l2_dowmsample_block": "Spatial2xTime2x3DDownsample",
    "l1_upsample_block": "Spatial2xTime2x3DUpsample",
    "l2_upsample_block": "Spatial2xTime2x3DUpsample",
    "l1_downsample_wavelet": "HaarWaveletTransform3D",
    "l2_downsample_wavelet": "HaarWaveletTransform3D",
    "l1_upsample_wavelet": "InverseHaarWaveletTransform3D",
    "l2_upsample_wavelet": "InverseHaarWaveletTransform3D",
    "norm_type": "layernorm",
    "t_interpolation": "trilinear",
    "use_attention": True,
    "vae_scale_factor": [8, 8, 8],
}
VAE_IGNORED = {"use_tiling", "from_pretrained", "dtype"}


def denoiser_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor's arguments from the original's `predictor` section. ValueError for what v1.5.0 does
    not have.
    """
    translated = _translate(config, DENOISER_KEYS, DENOISER_FIXED, DENOISER_IGNORED, "the denoiser's config")
    if not config.get("sparse1d", True):
        translated["sparse_n"] = None
    return translated


def vae_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor's arguments from the original's `ae` section. ValueError for what v1.5.0 does not have.

    Without `shift` and `scale` the latents stay as they are, as in the original.
    """
    translated = _translate(config, VAE_KEYS, VAE_FIXED, VAE_IGNORED, "the VAE's config")
    return {"shift": None, "scale": None} | translated


def _translate(
    config: Mapping[str, Any],
    keys: Mapping[str, str],
    fixed: Mapping[str, Any],
    ignored: set[str],
    where: str,
) -> dict[str, Any]:
    check_known_keys(config, [*keys, *fixed, *ignored], where=where)
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"{where}: {key} = {config[key]!r} is not part of v1.5.0; only {value!r} is supported"
            )
    return {ours: config[theirs] for theirs, ours in keys.items() if theirs in config}


def denoiser_name(name: str, *, num_layers: list[int]) -> str:
    """The original's name of our denoiser tensor `name`, for stages of `num_layers` blocks."""
    first_of_stage = list(accumulate(num_layers, initial=0))
    if match := SKIP.fullmatch(name):
        block, stream, part, leaf = match.groups()
        stage = first_of_stage.index(int(block))
        return f"{SKIP_STREAMS[stream]}.{stage - len(num_layers) // 2 - 1}.{SKIP_PARTS[part]}.{leaf}"
    if name.startswith(f"{NESTED}."):
        _, block, rest = name.split(".", 2)
        stage = max(s for s, first in enumerate(first_of_stage[:-1]) if first <= int(block))
        return f"{NESTED}.{stage}.{int(block) - first_of_stage[stage]}.{rest}"
    return name


def denoiser_unread(shapes: Mapping[str, Shape], *, num_layers: list[int]) -> dict[str, Shape]:
    """The original's names and shapes of what tensor-parallel checkpoints hold for the last block and nothing
    reads: a text output projection, a text feed-forward and a second text norm. `shapes`: our model's
    tensors.
    """
    last = sum(num_layers) - 1
    before = f"{NESTED}.{last - 1}."
    return {
        denoiser_name(f"{NESTED}.{last}.{name.removeprefix(before)}", num_layers=num_layers): shape
        for name, shape in shapes.items()
        if name.startswith(
            tuple(before + part for part in ("attn1.to_add_out.", "ff_enc.", "norm2.norm_enc."))
        )
    }


@dataclass(frozen=True)
class Format:
    """How the original writes a model of ours.

    `rename` gives the original's name of one of our tensors. `fixed` are constants that its files carry
    besides, `unread` shapes of tensors that they may carry and that nothing reads; both by the original's
    names.
    """

    rename: Callable[[str], str] = str
    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    unread: Mapping[str, Shape] = field(default_factory=dict)


class OriginalModel(Protocol):
    """A model of ours that says how the original writes it."""

    def original_format(self) -> Format: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def get_submodule(self, target: str) -> nn.Module: ...


def match(model: OriginalModel, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Our name -> the original's of every tensor of `model`, once `tensors` are known to be exactly those.

    Of `tensors`, by the original's names, those that nothing reads and the fixed constants may be there or
    not; they are left out with one line each in the log. Raises ValueError that names every missing,
    unexpected or mis-shaped tensor and every constant of another value. A lazy mapping that has `shapes` is
    not read, but for its constants.
    """
    form = model.original_format()
    shapes = getattr(tensors, "shapes", None)
    given = (
        dict(shapes) if shapes is not None else {name: tuple(value.shape) for name, value in tensors.items()}
    )
    constants = [name for name in form.fixed if name in given]
    wrong = [
        name for name in constants if not torch.equal(tensors[name], form.fixed[name].to(tensors[name].dtype))
    ]
    if wrong:
        raise ValueError(
            f"these fixed tensors do not have the values that they must have: {', '.join(wrong)}"
        )
    unread = [name for name in form.unread if name in given]

    names = {ours: form.rename(ours) for ours in model.state_dict()}
    check_tensors(
        {names[ours]: tuple(value.shape) for ours, value in model.state_dict().items()},
        {name: shape for name, shape in given.items() if name not in {*constants, *unread}},
        what=type(model).__name__,
    )
    if unread:
        logger.info("dropped %d tensors that nothing reads: %s", len(unread), ", ".join(unread))
    if constants:
        logger.info("dropped %d fixed Haar filters, their values checked", len(constants))
    return names


def load(model: OriginalModel, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> None:
    """Fill a model built on the meta device, one tensor at a time; see `match` for what is checked first."""
    for ours, theirs in match(model, tensors).items():
        parent, _, leaf = ours.rpartition(".")
        value = tensors[theirs]
        setattr(model.get_submodule(parent), leaf, nn.Parameter(value if dtype is None else value.to(dtype)))
