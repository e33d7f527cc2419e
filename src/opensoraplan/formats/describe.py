"""Describes a checkpoint for `osp inspect`, without loading its weights."""

import math
from pathlib import Path

from opensoraplan.device import dtype_name
from opensoraplan.formats.checkpoints import open_checkpoint
from opensoraplan.formats.infer import config_of, empty_model
from opensoraplan.models import original
from opensoraplan.models.sparse_ummdit import SparseUMMDiT

RELEASE_SIZES = {8_504_661_120, 227_035_624}


def describe(path: Path) -> str:
    """Several lines of text about the checkpoint at `path`: dialect, precision, parameters, EMA, parallel
    sizes, the config that it matches, and which tensors do not fit that. Raises ValueError for what is no
    checkpoint, or one of another model, and what else `open_checkpoint` raises.
    """
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
    return "\n".join(f"{name + ':':<18} {value}" for name, value in lines.items() if value is not None)
