"""What `osp inspect` prints of a checkpoint. Nothing is loaded but what it takes to tell."""

import math
from pathlib import Path

import torch

from opensoraplan.convert.checkpoints import open_checkpoint
from opensoraplan.convert.infer import infer_denoiser_config, infer_vae_config, kind_of
from opensoraplan.models import original
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.wfvae import WFVAE

RELEASE_SIZES = {"denoiser": 8_504_661_120, "vae": 227_035_624}


def describe(path: Path) -> str:
    """Several lines of text about the checkpoint at `path`: dialect, precision, parameters, EMA, parallel
    sizes, the config that it matches, and which tensors do not fit that. Raises what `open_checkpoint`
    raises.
    """
    checkpoint = open_checkpoint(path)
    info, shapes = checkpoint.info, checkpoint.shapes
    kind = kind_of(shapes)
    config = infer_denoiser_config(shapes) if kind == "denoiser" else infer_vae_config(shapes)
    with torch.device("meta"):
        model = SparseUMMDiT(**{"sparse_n": None, **config}) if kind == "denoiser" else WFVAE(**config)
    try:
        original.match(model, checkpoint)
        fits = "complete"
    except ValueError as error:
        fits = str(error)

    parameters = sum(math.prod(value.shape) for value in model.state_dict().values())
    release = " (the release's size)" if parameters == RELEASE_SIZES[kind] else ""
    lines = {
        "what": f"{type(model).__name__}, {kind}",
        "dialect": info.dialect + (", MindSpeed-MM's names" if info.names == "mindspeed-mm" else ""),
        "iteration": info.iteration,
        "dtype": ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in checkpoint.dtypes)),
        "parameters": f"{parameters:,}{release} in {len(model.state_dict())} tensors",
        "EMA": ("these weights" if info.ema else "there, not shown") if info.has_ema else "none",
        "tensor parallel": info.tensor_parallel,
        "pipeline parallel": info.pipeline_parallel,
        "tensors": fits,
        "config": ", ".join(
            f"{key}={value}" for key, value in (info.config or config).items() if key[0] != "_"
        ),
    }
    if kind == "denoiser" and info.config is None:
        lines["note"] = "Skiparse rates are in no tensor" + (": the release's are shown" if release else "")
    return "\n".join(f"{name + ':':<18} {value}" for name, value in lines.items() if value is not None)
