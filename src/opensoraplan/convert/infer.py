"""What a checkpoint is a checkpoint of, told from the names and shapes of its tensors (the release's
names).
"""

from collections.abc import Mapping
from typing import Any, Literal

from opensoraplan.models.original import NESTED
from opensoraplan.models.strict import Shape

Kind = Literal["denoiser", "vae"]

RELEASE_LAYERS = [2, 4, 6, 8, 6, 4, 2]
RELEASE_RATES = [1, 2, 4, 8, 4, 2, 1]


def kind_of(shapes: Mapping[str, Shape]) -> Kind:
    """Which of the two models these tensors are of. Raises ValueError for neither."""
    if "patch_embed.proj.weight" in shapes and any(name.startswith(f"{NESTED}.") for name in shapes):
        return "denoiser"
    if "encoder.conv_out.conv.weight" in shapes or "decoder.conv_in.conv.weight" in shapes:
        return "vae"
    some = ", ".join(list(shapes)[:4])
    raise ValueError(f"these are the tensors of neither a SparseUMMDiT nor a WFVAE: {some}, ...")


def infer_denoiser_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Our constructor's arguments from the shapes, all but the Skiparse rates, on which no weight depends.

    `sparse_n` is the release's where the stages are its, and missing otherwise. Raises ValueError that names
    a tensor without which nothing can be told.
    """
    blocks = [tuple(map(int, name.split(".")[1:3])) for name in shapes if name.startswith(f"{NESTED}.")]
    stages = 1 + max(stage for stage, _ in blocks)
    num_layers = [1 + max((b for s, b in blocks if s == stage), default=-1) for stage in range(stages)]
    dim, in_channels, patch, _ = _need(shapes, "patch_embed.proj.weight")
    (head_dim,) = _need(shapes, f"{NESTED}.0.0.attn1.norm_q.weight")
    embed_dim, pooled_dim = _need(shapes, "time_text_embed.text_embedder.linear_1.weight")
    config = {
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "out_channels": _need(shapes, "proj_out.weight")[0] // patch**2,
        "num_layers": num_layers,
        "double_ff": f"{NESTED}.0.0.ff_enc.net.2.weight" in shapes,
        "caption_channels": _need(shapes, "caption_projection.weight")[1],
        "pooled_projection_dim": pooled_dim,
        "timestep_embed_dim": embed_dim,
        "patch_size": patch,
        "norm_cls": "layer_norm" if "norm_final.bias" in shapes else "rms_norm",
        "skip_connection": "skip_norm_linear.0.1.weight" in shapes,
        "skip_connection_zero_init": "skip_norm_linear.0.0.weight" not in shapes,
    }
    return config | ({"sparse_n": RELEASE_RATES} if num_layers == RELEASE_LAYERS else {})


def infer_vae_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Our constructor's arguments from the shapes, all but `shift` and `scale`, which are in no tensor: the
    release's where the widths are its, and missing otherwise.
    """
    base = _need(shapes, "encoder.down1.0.weight")[0]
    config = {
        "base_channels": base,
        "latent_channels": _need(shapes, "decoder.conv_in.conv.weight")[1],
        "encoder_num_resblocks": _count(shapes, "encoder.down1.{}.conv1.weight"),
        "decoder_num_resblocks": _count(shapes, "decoder.up2.{}.conv1.conv.weight"),
        "encoder_energy_flow_hidden_size": _need(shapes, "encoder.connect_l1.weight")[0],
        "decoder_energy_flow_hidden_size": _need(shapes, "decoder.mid.2.conv2.conv.weight")[0] - 4 * base,
        "connect_res_layer_num": _count(shapes, "decoder.connect_l1.{}.conv1.conv.weight"),
    }
    release = base == 160 and config["latent_channels"] == 32
    return config | ({} if release else {"shift": None, "scale": None})


def _need(shapes: Mapping[str, Shape], name: str) -> Shape:
    if name not in shapes:
        raise ValueError(f"the tensor {name} is missing")
    return shapes[name]


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """How many consecutive layers of this name there are, from the first that there is."""
    numbers = [number for number in range(100) if pattern.format(number) in shapes]
    run = 0
    while run < len(numbers) and numbers[run] == numbers[0] + run:
        run += 1
    return run
