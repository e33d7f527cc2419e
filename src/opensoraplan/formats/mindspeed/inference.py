"""The guide's JSON files, comments and all, translated to ours: the inference file whole (MindSpeed-MM's own,
too), of data.json what selects samples. Every key is used, or named as having no meaning here; an unknown key
is an error. The architecture keys are in models/original.py.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt

from opensoraplan.changes import apply_changes
from opensoraplan.data.selection import SelectionSettings
from opensoraplan.defaults import Fps
from opensoraplan.documents import read_json_object
from opensoraplan.formats.mindspeed.inference_mm import is_mindspeed_mm, to_guide
from opensoraplan.models import original
from opensoraplan.settings import Settings

logger = logging.getLogger(__name__)

FOLDERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

# Keys that are read and change nothing: the reason, and where they are.
MEANINGLESS = {
    "weights are always read one tensor at a time": [f"{name}.low_cpu_mem_usage" for name in FOLDERS],
    "the denoiser computes in weight_dtype": ["predictor.dtype"],
    "norms have weights either way, as in the original": ["predictor.norm_elementwise_affine"],
    "text is cut to its real length, masked where a batch needs it": ["pipeline_config.use_attention_mask"],
    "videos are made one at a time": ["micro_batch_size"],
}


class LocalFolder(Settings):
    """A text encoder or tokenizer."""

    from_pretrained: Path
    hub_backend: Literal["hf"] = "hf"
    model_id: Literal["T5", "CLIPWithProjection"] | None = None
    autotokenizer_name: Literal["AutoTokenizer"] = "AutoTokenizer"
    low_cpu_mem_usage: bool = False


class Diffusion(Settings):
    model_id: Literal["OpenSoraPlan"] = "OpenSoraPlan"
    num_inference_steps: PositiveInt = 50
    guidance_scale: float = 8.0
    guidance_rescale: float = 0.7
    use_linear_quadratic_schedule: bool = False
    use_dynamic_shifting: bool = False
    shift: PositiveFloat = 7.0


class PipelineConfig(Settings):
    input_size: tuple[PositiveInt, PositiveInt, PositiveInt]
    use_attention_mask: bool = True
    version: Literal["v1.5"] = "v1.5"
    model_type: Literal["t2v"] = "t2v"


class InferenceFile(Settings):
    """`inference_t2v_model1_5.json` of the guide, key by key."""

    ae: dict[str, Any]
    text_encoder: LocalFolder
    text_encoder_2: LocalFolder
    tokenizer: LocalFolder
    tokenizer_2: LocalFolder
    predictor: dict[str, Any]
    diffusion: Diffusion
    pipeline_config: PipelineConfig
    micro_batch_size: PositiveInt = 1
    frame_interval: PositiveInt = 1
    num_samples_per_prompt: PositiveInt = 1
    allow_tf32: bool | None = None
    model_max_length: PositiveInt = 512
    save_path: Path
    fps: Fps = 24
    prompt: Path
    device: str = "npu"
    weight_dtype: str = "bf16"
    use_prompt_preprocess: bool = True


@dataclass(frozen=True)
class Inference:
    """What an inference file says. `sources`: paths by component, `generate`: settings of the run by our
    names, `transformer_config`, `vae_config`: our constructors' arguments. `allow_tf32` None: as torch
    has it.
    """

    sources: dict[str, Path]
    transformer_config: dict[str, Any]
    vae_config: dict[str, Any]
    streaming: bool
    max_text_tokens: int
    allow_tf32: bool | None
    scheduler: dict[str, Any]
    generate: dict[str, Any]


def read_inference(path: Path, *, changes: Sequence[str] = ()) -> Inference:
    """Translate an inference file, the guide's or MindSpeed-MM 2.x's own, in which no weights of the denoiser
    need be named. `changes`: values to take instead of its own, as "section.key=value".

    Raises ValueError for unknown keys, and for values that v1.5.0 does not have.
    """
    content = apply_changes(read_json_object(path, comments=True), changes)
    if of_mindspeed_mm := is_mindspeed_mm(content):
        content, idle = to_guide(content, where=str(path))
        logger.info("%s is MindSpeed-MM's own inference file, not the guide's", path)
        if idle:
            logger.info(
                "%s: without meaning here: %s (text encoders compute in dtype; the VAE streams, whatever the "
                "chunks, with the same result)",
                *(path.name, ", ".join(idle)),
            )
    file = InferenceFile.read(content, where=str(path))
    for reason, keys in MEANINGLESS.items():
        if given := [key for key in keys if _has(content, key)]:
            logger.info("%s: without meaning here: %s (%s)", path.name, ", ".join(given), reason)
    frames, height, width = file.pipeline_config.input_size
    transformer_config = original.denoiser_config(file.predictor, where=f"section predictor of {path}")
    vae_config = original.vae_config(file.ae, where=f"section ae of {path}")
    weights = {"transformer": file.predictor, "vae": file.ae}
    if of_mindspeed_mm and not file.predictor.get("from_pretrained"):
        del weights["transformer"]
    for section in weights.values():
        if not section.get("from_pretrained"):
            name = "ae" if section is file.ae else "predictor"
            raise ValueError(f"{path}: {name} needs from_pretrained, the path of its weights")
    # The original divides integers; at an interval of 1 a rate such as 23.976 stays what it is.
    fps = file.fps if file.frame_interval == 1 else file.fps // file.frame_interval
    if not fps:
        raise ValueError(
            f"{path}: fps // frame_interval is {file.fps:g} // {file.frame_interval}, which is 0: "
            f"frame_interval must be at most {max(1, int(file.fps))}"
        )
    return Inference(
        sources={name: Path(section["from_pretrained"]) for name, section in weights.items()}
        | {name: getattr(file, name).from_pretrained for name in FOLDERS},
        transformer_config=transformer_config,
        vae_config=vae_config,
        streaming=file.ae.get("use_tiling", True),
        max_text_tokens=file.model_max_length,
        allow_tf32=file.allow_tf32,
        scheduler={
            "shift": file.diffusion.shift,
            "use_dynamic_shifting": file.diffusion.use_dynamic_shifting,
        },
        generate={
            "prompt": str(file.prompt),
            "out": file.save_path,
            "fps": fps,
            "videos_per_prompt": file.num_samples_per_prompt,
            "device": file.device,
            "dtype": file.weight_dtype,
            "vae_dtype": file.ae.get("dtype"),
            "frames": frames,
            "height": height,
            "width": width,
            "steps": file.diffusion.num_inference_steps,
            "guidance": file.diffusion.guidance_scale,
            "guidance_rescale": file.diffusion.guidance_rescale,
            "linear_quadratic": file.diffusion.use_linear_quadratic_schedule,
            "clean_prompts": file.use_prompt_preprocess,
        },
    )


def _has(content: dict[str, Any], key: str) -> bool:
    section, _, name = key.rpartition(".")
    return name in (content[section] if section else content)


# Keys of data.json's `preprocess_parameters` that say how samples are read and batched, not which are taken.
NOT_OF_SELECTION = (
    "video_reader_type",
    "image_reader_type",
    "cfg",
    "batch_size",
    "gradient_accumulation_size",
    "use_aesthetic",
    "train_pipeline",
)


def read_selection(path: Path | None, *, changes: Sequence[str] = ()) -> SelectionSettings:
    """Which samples the guide's data.json selects (None: as printed there), with `changes` as "key=value".

    Raises ValueError for unknown keys and for values that cannot be.
    """
    values: dict[str, Any] = {}
    where = "the selection"
    if path is not None:
        where = f"{path}, preprocess_parameters"
        section: Any = read_json_object(path, comments=True)
        for key in ("dataset_param", "preprocess_parameters"):
            section = section.get(key) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            raise ValueError(
                f"{path} has no dataset_param.preprocess_parameters: is it the guide's data.json?"
            )
        values = {key: value for key, value in section.items() if key not in NOT_OF_SELECTION}
        if isinstance(most := values.get("max_hxw"), int) and "min_hxw" not in values:
            values["min_hxw"] = most // 4  # as in the original
    return SelectionSettings.read(apply_changes(values, changes, kind=SelectionSettings), where=where)
