"""Infers model and config of a checkpoint from the names and shapes of its tensors (the release's names), and
makes an empty model that fits it. No weights are read.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from opensoraplan.formats.checkpoints import Checkpoint, class_named
from opensoraplan.models.original import NESTED
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.strict import TensorShape
from opensoraplan.models.vae import VideoVAE
from opensoraplan.models.wfvae import WFVAE

BLOCK = re.compile(rf"{NESTED}\.(\d{{1,3}})\.(\d{{1,3}})\.")
NORM_BIASES = (".norm1.norm.bias", ".norm2.norm.bias", "norm_final.bias")
RELEASE_LAYERS = [2, 4, 6, 8, 6, 4, 2]
RELEASE_RATES = [1, 2, 4, 8, 4, 2, 1]


def empty_model(checkpoint: Checkpoint, config: Mapping[str, Any] | None = None) -> SparseUMMDiT | VideoVAE:
    """A model on the meta device to fit the checkpoint.

    `config`: our constructor's arguments; None: `config_of` the checkpoint, and dense if that does
    not have the Skiparse rates. Raises ValueError, with the path, for tensors of neither model and
    for an invalid config.
    """
    with name_path(checkpoint.path):
        arguments: Mapping[str, Any] = config_of(checkpoint) if config is None else config
        model_class = class_of(checkpoint)
        model_class.check_config(arguments, where=f"the config of {model_class.__name__}")
        if model_class is SparseUMMDiT and config is None:
            arguments = {"sparse_n": None, **arguments}
        with torch.device("meta"):
            return model_class(**arguments)


def config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Our constructor's arguments: the checkpoint's own config, else inferred from its shapes."""
    if checkpoint.info.config is not None:
        return {key: value for key, value in checkpoint.info.config.items() if not key.startswith("_")}
    with name_path(checkpoint.path):
        denoiser = class_of(checkpoint) is SparseUMMDiT
        return (infer_denoiser_config if denoiser else infer_vae_config)(checkpoint.shapes)


def class_of(checkpoint: Checkpoint) -> Any:  # noqa: ANN401 (the denoiser's class, or a VAE's)
    """The model that the checkpoint is of: by its own config, else as `class_of_tensors`."""
    if checkpoint.info.config is not None:
        return class_named(checkpoint.info.config["_class_name"])
    return class_of_tensors(checkpoint.shapes)


def class_of_tensors(shapes: Mapping[str, TensorShape]) -> type[SparseUMMDiT] | type[WFVAE]:
    """Which of the original's two models has such tensors. Raises ValueError for neither."""
    if "patch_embed.proj.weight" in shapes and any(name.startswith(f"{NESTED}.") for name in shapes):
        return SparseUMMDiT
    if "encoder.conv_out.conv.weight" in shapes or "decoder.conv_in.conv.weight" in shapes:
        return WFVAE
    some = ", ".join(list(shapes)[:4])
    raise ValueError(f"these are the tensors of neither a SparseUMMDiT nor a WFVAE: {some}, ...")


@contextmanager
def name_path(path: Path) -> Iterator[None]:
    """Put the path before the message of a ValueError, or of a TypeError from a wrong value in a config."""
    try:
        yield
    except ZeroDivisionError:
        raise ValueError(f"{path}: a tensor that determines the model's width has a side of 0") from None
    except (TypeError, ValueError) as error:
        text = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: {text}") from None


def infer_denoiser_config(shapes: Mapping[str, TensorShape]) -> dict[str, Any]:
    """Our constructor's arguments from the shapes, except the Skiparse rates, which no weight depends on.

    `sparse_n` is the release's if the stages are, and missing otherwise. Raises ValueError if a tensor that
    is needed for this is missing.
    """
    found = (BLOCK.match(name) for name in shapes if name.startswith(f"{NESTED}."))
    blocks = {(int(match[1]), int(match[2])) for match in found if match}
    if not blocks:
        raise ValueError(
            f"the blocks are not nested by stage ({NESTED}.0.0.): give the folder of a diffusers component"
        )
    stages = 1 + max(stage for stage, _ in blocks)
    num_layers = [1 + max((b for s, b in blocks if s == stage), default=-1) for stage in range(stages)]
    dim, in_channels, patch, _ = _need(shapes, "patch_embed.proj.weight", dimensions=4)
    (head_dim,) = _need(shapes, f"{NESTED}.0.0.attn1.norm_q.weight", dimensions=1)
    embed_dim, pooled_dim = _need(shapes, "time_text_embed.text_embedder.linear_1.weight", dimensions=2)

    def has(start: str) -> bool:  # any of them: a single missing tensor must not make it another model
        return any(name.startswith(start) for name in shapes)

    config = {
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "out_channels": _need(shapes, "proj_out.weight", dimensions=2)[0] // patch**2,
        "num_layers": num_layers,
        "double_ff": has(f"{NESTED}.0.0.ff_enc."),
        "caption_channels": _need(shapes, "caption_projection.weight", dimensions=2)[1],
        "pooled_projection_dim": pooled_dim,
        "timestep_embed_dim": embed_dim,
        "patch_size": patch,
        "norm_cls": "layer_norm" if any(name.endswith(NORM_BIASES) for name in shapes) else "rms_norm",
        "skip_connection": has("skip_norm_linear."),
        "skip_connection_zero_init": not has("skip_norm_linear.0.0."),
    }
    return config | ({"sparse_n": RELEASE_RATES} if num_layers == RELEASE_LAYERS else {})


def infer_vae_config(shapes: Mapping[str, TensorShape]) -> dict[str, Any]:
    """Our constructor's arguments from the shapes. `shift` and `scale`, which are not in any tensor, are the
    release's if the widths are, and missing otherwise.
    """
    base = _need(shapes, "encoder.down1.0.weight", dimensions=4)[0]
    config = {
        "base_channels": base,
        "latent_channels": _need(shapes, "decoder.conv_in.conv.weight", dimensions=5)[1],
        "encoder_num_resblocks": _count_resnets(shapes, "encoder.down1"),
        "decoder_num_resblocks": _count_resnets(shapes, "decoder.up2"),
        "encoder_energy_flow_hidden_size": _need(shapes, "encoder.connect_l1.weight", dimensions=4)[0],
        "decoder_energy_flow_hidden_size": _need(shapes, "decoder.mid.2.conv2.conv.weight", dimensions=5)[0]
        - 4 * base,
        "connect_res_layer_num": _count_resnets(shapes, "decoder.connect_l1"),
    }
    release = base == 160 and config["latent_channels"] == 32
    return config | ({} if release else {"shift": None, "scale": None})


def _need(shapes: Mapping[str, TensorShape], name: str, *, dimensions: int) -> TensorShape:
    if name not in shapes:
        raise ValueError(f"the tensor {name} is missing")
    if len(shapes[name]) != dimensions:
        raise ValueError(f"{name} needs {dimensions} dimensions, got {list(shapes[name])}")
    return shapes[name]


def _count_resnets(shapes: Mapping[str, TensorShape], part: str) -> int:
    """Number of consecutive resnets in `part`, from its first one."""
    resnet = re.compile(rf"{re.escape(part)}\.(\d+)\.(?:norm|conv)[12]\.")
    numbers = sorted({int(match[1]) for name in shapes if (match := resnet.match(name))})
    run = 0
    while run < len(numbers) and numbers[run] == numbers[0] + run:
        run += 1
    return run
