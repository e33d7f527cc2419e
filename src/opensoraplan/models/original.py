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
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from opensoraplan.models.strict import TensorShape, check_known_keys, check_tensors

logger = logging.getLogger(__name__)

NESTED = "transformer_blocks"
# Where torch lets its own tensors begin, in bytes.
_ALIGNMENT = 64
BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
SKIP = re.compile(r"(skip(?:_enc)?)\.(norm|linear)\.(\w+)")
SKIP_PARTS = {"norm": "0", "linear": "1"}
SKIP_STREAMS = {"skip": "skip_norm_linear", "skip_enc": "skip_norm_linear_enc"}


# --- Config keys --------------------------------------------------------------------------------------------


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class ValueType(NamedTuple):
    """Which values a key may have, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


WHOLE = ValueType("a whole number above 0", _is_whole)
WHOLES = ValueType(
    "a list of whole numbers above 0", lambda v: isinstance(v, list | tuple) and all(map(_is_whole, v))
)
NUMBER = ValueType("a number above 0", lambda v: _is_number(v) and v > 0)
NUMBERS = ValueType(
    "a list of numbers, or null",
    lambda v: v is None or (isinstance(v, list | tuple) and all(map(_is_number, v))),
)
SWITCH = ValueType("true or false", lambda v: isinstance(v, bool))
TEXT = ValueType("text", lambda v: isinstance(v, str))
TEXT_OR_NULL = ValueType("text, or null", lambda v: v is None or isinstance(v, str))

# The original's key -> our constructor's, and its kind.
DENOISER_KEYS = {
    "num_heads": ("num_attention_heads", WHOLE),
    "head_dim": ("attention_head_dim", WHOLE),
    "in_channels": ("in_channels", WHOLE),
    "out_channels": ("out_channels", WHOLE),
    "num_layers": ("num_layers", WHOLES),
    "sparse_n": ("sparse_n", WHOLES),
    "double_ff": ("double_ff", SWITCH),
    "caption_channels": ("caption_channels", WHOLE),
    "pooled_projection_dim": ("pooled_projection_dim", WHOLE),
    "timestep_embed_dim": ("timestep_embed_dim", WHOLE),
    "patch_size": ("patch_size", WHOLE),
    "norm_cls": ("norm_cls", TEXT),
    "norm_eps": ("norm_eps", NUMBER),
    "skip_connection": ("skip_connection", SWITCH),
    "skip_connection_zero_init": ("skip_connection_zero_init", SWITCH),
}
# Keys with one value in v1.5.0: anything else is another model.
DENOISER_FIXED = {
    "model_id": "SparseUMMDiT",
    "dropout": 0.0,
    "attention_bias": True,
    "patch_size_t": 1,
    "activation_fn": "gelu-approximate",
}
# Keys that are not of the architecture (`sparse1d` turns the rates on), and `norm_elementwise_affine`, which
# the original ignores.
DENOISER_OTHERS = {
    "sparse1d": SWITCH,
    "norm_elementwise_affine": SWITCH,
    "from_pretrained": TEXT_OR_NULL,
    "dtype": TEXT_OR_NULL,
}

VAE_KEYS = {
    "latent_dim": ("latent_channels", WHOLE),
    "base_channels": ("base_channels", WHOLE),
    "connect_res_layer_num": ("connect_res_layer_num", WHOLE),
    "decoder_energy_flow_hidden_size": ("decoder_energy_flow_hidden_size", WHOLE),
    "decoder_num_resblocks": ("decoder_num_resblocks", WHOLE),
    "encoder_energy_flow_hidden_size": ("encoder_energy_flow_hidden_size", WHOLE),
    "encoder_num_resblocks": ("encoder_num_resblocks", WHOLE),
    "shift": ("shift", NUMBERS),
    "scale": ("scale", NUMBERS),
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
VAE_OTHERS = {"use_tiling": SWITCH, "from_pretrained": TEXT_OR_NULL, "dtype": TEXT_OR_NULL}


def denoiser_config(
    config: Mapping[str, Any], *, where: str = "the config of the denoiser"
) -> dict[str, Any]:
    """Our constructor's arguments from the original's `predictor` section. Raises ValueError, which begins
    with `where`, for what v1.5.0 does not have.
    """
    translated = _translate(config, DENOISER_KEYS, DENOISER_FIXED, DENOISER_OTHERS, where)
    if not config.get("sparse1d", True):
        translated["sparse_n"] = None
    return translated


def vae_config(config: Mapping[str, Any], *, where: str = "the config of the VAE") -> dict[str, Any]:
    """Our constructor's arguments from the original's `ae` section. Raises ValueError, which begins with
    `where`, for what v1.5.0 does not have.

    Without `shift` and `scale` the latents stay as they are, as in the original.
    """
    translated = _translate(config, VAE_KEYS, VAE_FIXED, VAE_OTHERS, where)
    return {"shift": None, "scale": None} | translated


def _translate(
    config: Mapping[str, Any],
    keys: Mapping[str, tuple[str, ValueType]],
    fixed: Mapping[str, Any],
    others: Mapping[str, ValueType],
    where: str,
) -> dict[str, Any]:
    check_known_keys(config, [*keys, *fixed, *others], where=where)
    kinds = {key: kind for key, (_, kind) in keys.items()} | dict(others)
    problems = [
        f"{key} must be {kinds[key].words}, got {value!r}"
        for key, value in config.items()
        if key in kinds and not kinds[key].fits(value)
    ]
    problems += [
        f"{key} = {config[key]!r} is not part of v1.5.0; only {value!r} is supported"
        for key, value in fixed.items()
        if config.get(key, value) != value
    ]
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    return {ours: config[theirs] for theirs, (ours, _) in keys.items() if theirs in config}


# --- Names --------------------------------------------------------------------------------------------------


def denoiser_name(name: str, *, num_layers: list[int]) -> str:
    """The original's name of our denoiser tensor `name`, for stages of `num_layers` blocks. A name that such
    a denoiser of ours does not have stays as it is.
    """
    if not (match := BLOCK.fullmatch(name)):
        return name
    block, rest = int(match[1]), match[2]
    first_of_stage = list(accumulate(num_layers, initial=0))
    stage = sum(first <= block for first in first_of_stage) - 1
    if stage == len(num_layers):
        return name
    if skip := SKIP.fullmatch(rest):
        stream, part, leaf = skip.groups()
        number = stage - len(num_layers) // 2 - 1
        if block != first_of_stage[stage] or number < 0:
            return name
        return f"{SKIP_STREAMS[stream]}.{number}.{SKIP_PARTS[part]}.{leaf}"
    return f"{NESTED}.{stage}.{block - first_of_stage[stage]}.{rest}"


def denoiser_unread(shapes: Mapping[str, TensorShape], *, num_layers: list[int]) -> dict[str, TensorShape]:
    """The original's names and shapes of what tensor-parallel checkpoints hold for the last block and
    nothing reads: a text output projection, a text feed-forward and a second text norm. `shapes`:
    our model's tensors.
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

    `rename` gives the original's name of one of our tensors. `fixed` are constants that its files
    carry besides, `unread` shapes of tensors that they may carry and that nothing reads; both by
    the original's names.
    """

    rename: Callable[[str], str] = str
    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    unread: Mapping[str, TensorShape] = field(default_factory=dict)


class OriginalModel(nn.Module):
    """A model of ours that the original has, too. `original_config` is `denoiser_config` or `vae_config`."""

    original_config: Callable[[Mapping[str, Any]], dict[str, Any]]

    @classmethod
    def from_original(
        cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
    ) -> Self:
        """A model from the original's config keys and tensor names; tensors keep their dtype unless
        one is given.

        Reads one tensor at a time, so that a lazy mapping costs no more memory than the model. Raises
        ValueError that names every unknown config key and every tensor that is missing, unexpected or
        mis-shaped. The fixed Haar filters of a VAE, if there, are checked and dropped.
        """
        settings = cls.original_config(config)
        with torch.device("meta"):
            model = cls(**settings)
        load(model, state_dict, dtype=dtype)
        return model

    def original_format(self) -> Format:
        """How the original names and what it adds to these tensors."""
        return Format()


def format_of(model: object) -> Format:
    """How files name the tensors of a model: the original's, where it has such a model."""
    return model.original_format() if isinstance(model, OriginalModel) else Format()


# --- Loading ------------------------------------------------------------------------------------------------


class Fillable(Protocol):
    """A module, as far as loading needs one."""

    def state_dict(self) -> Any: ...  # noqa: ANN401 (a dict of tensors)
    def get_submodule(self, target: str) -> nn.Module: ...


def match(model: Fillable, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Our name -> the original's of every tensor of `model`, once `tensors` are known to be exactly those.

    Of `tensors`, by the original's names, those that nothing reads and the fixed constants may be there or
    not; they are left out with one line each in the log. Raises ValueError that names every missing,
    unexpected or mis-shaped tensor and every constant of another value. A lazy mapping that has `shapes` is
    not read, but for its constants; if it has a `path`, errors name it.
    """
    form = format_of(model)
    given: dict[str, TensorShape] = dict(
        getattr(tensors, "shapes", None) or {name: tuple(value.shape) for name, value in tensors.items()}
    )
    path = getattr(tensors, "path", None)
    constants = [name for name in form.fixed if name in given]
    unread = [name for name in form.unread if name in given]
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    names = {name: form.rename(name) for name in ours}

    check_tensors(
        {names[name]: shape for name, shape in ours.items()}
        | {name: tuple(form.fixed[name].shape) for name in constants}
        | {name: form.unread[name] for name in unread},
        given,
        what=f"{type(model).__name__} ({path})" if path else type(model).__name__,
    )
    wrong = [
        name for name in constants if not torch.equal(tensors[name], form.fixed[name].to(tensors[name].dtype))
    ]
    if wrong:
        where = f"{path}: " if path else ""
        raise ValueError(
            f"{where}these fixed tensors do not have the values that they must have: {', '.join(wrong)}"
        )
    if unread:
        logger.info("dropped %d tensors that nothing reads: %s", len(unread), ", ".join(unread))
    if constants:
        logger.info("dropped %d fixed Haar filters, their values checked", len(constants))
    return names


def load(model: Fillable, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> None:
    """Fill a model built on the meta device, one tensor at a time; see `match` for what is checked first."""
    fill(model, match(model, tensors), tensors, dtype=dtype)


def fill(
    model: Fillable,
    names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """The second half of `load`, with the `names` that `match` gave."""
    for ours, theirs in names.items():
        parent, _, leaf = ours.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _parameter(tensors[theirs], dtype))


def _parameter(value: Tensor, dtype: torch.dtype | None) -> nn.Parameter:
    # A function of its own, so that nothing refers to the tensor as read while the next one is.
    return nn.Parameter(aligned(value if dtype is None else value.to(dtype)))


def aligned(value: Tensor) -> Tensor:
    """The tensor, copied if its memory begins where torch itself would not let it begin.

    Tensors from files begin anywhere, and matrix products round differently then: the same run would differ
    in the last bit from one process to the next.
    """
    return value.clone() if value.data_ptr() % _ALIGNMENT else value
