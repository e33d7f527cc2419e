"""The keys of the guide's JSON files, one table for training and inference: what a key may be, its default in
the original, and what it means here (meaning.py). Keys of the architecture are in models/original.py.
"""

from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from opensoraplan.data.selection import SelectionSettings
from opensoraplan.defaults import Fps
from opensoraplan.flow import Weighting
from opensoraplan.formats.mindspeed.meaning import Idle, Own, Same, To
from opensoraplan.settings import Settings
from opensoraplan.shapes import TEMPORAL_STRIDE

Count = Annotated[int, Field(ge=0)]


def _path(name: str) -> Path | None:
    return Path(name) if name else None


def _text(value: str | Path) -> str | None:
    return str(value) or None


def _folder(setting: str, convert: Any = None) -> To:  # noqa: ANN401 (what `To` takes)
    return To(setting, convert=convert, inner="from_pretrained")


# --- What several files have --------------------------------------------------------------------------------

_NORMS = Idle("norms have weights either way, as in the original")
_FULL_BATCHES = Idle("batches always have one shape and are full")
_BATCH, _ACCUMULATE, _FRAMES = (
    To(setting) for setting in ("data.batch_size", "optimizer.accumulate", "data.selection.num_frames")
)
_STRIDE = Same("data.selection.ae_stride_t", left_out=TEMPORAL_STRIDE)
_PATCH, _PATCH_T = Same("patch size"), Same("patch size in time")
_CHANNELS = Same("latent channels", remedy="the denoiser takes and gives the latents of the VAE")
_FEATURES = Same(
    "features",
    left_out=False,
    remedy="osp cache writes both: set all three to true, and data.features, or all to false",
)


class TextPart(Settings):
    """A text encoder or tokenizer."""

    from_pretrained: Path
    hub_backend: Literal["hf"] = "hf"
    model_id: Literal["T5", "CLIPWithProjection"] | None = None
    autotokenizer_name: Literal["AutoTokenizer"] = "AutoTokenizer"
    low_cpu_mem_usage: Annotated[
        bool, Idle("weights are always read one tensor at a time, and tokenizers have none")
    ] = False


# --- inference_t2v_model1_5.json ----------------------------------------------------------------------------


class Sampling(Settings):
    model_id: Literal["OpenSoraPlan"] = "OpenSoraPlan"
    num_inference_steps: Annotated[PositiveInt, To("generate.steps")] = 50
    guidance_scale: Annotated[float, To("generate.guidance")] = 8.0
    guidance_rescale: Annotated[float, To("generate.guidance_rescale")] = 0.7
    use_linear_quadratic_schedule: Annotated[bool, To("generate.linear_quadratic")] = False
    use_dynamic_shifting: Annotated[bool, To("scheduler.use_dynamic_shifting")] = False
    shift: Annotated[PositiveFloat, To("scheduler.shift")] = 7.0


class PipelineConfig(Settings):
    input_size: Annotated[
        tuple[PositiveInt, PositiveInt, PositiveInt],
        To("generate.frames", convert=itemgetter(0)),
        To("generate.height", convert=itemgetter(1)),
        To("generate.width", convert=itemgetter(2)),
    ]
    use_attention_mask: Annotated[
        bool, Idle("text is cut to its real length, masked where a batch needs it")
    ] = True
    version: Literal["v1.5"] = "v1.5"
    model_type: Literal["t2v"] = "t2v"


class InferenceFile(Settings):
    ae: Annotated[
        dict[str, Any],
        {
            "from_pretrained": To("sources.vae", convert=_path),
            "dtype": To("generate.vae_dtype"),
            "use_tiling": To("streaming"),
        },
    ]
    text_encoder: Annotated[TextPart, _folder("sources.text_encoder")]
    text_encoder_2: Annotated[TextPart, _folder("sources.text_encoder_2")]
    tokenizer: Annotated[TextPart, _folder("sources.tokenizer")]
    tokenizer_2: Annotated[TextPart, _folder("sources.tokenizer_2")]
    predictor: Annotated[
        dict[str, Any],
        {
            "from_pretrained": To("sources.transformer", convert=_path),
            "dtype": Idle("the denoiser computes in weight_dtype"),
            "norm_elementwise_affine": _NORMS,
        },
    ]
    diffusion: Sampling
    pipeline_config: PipelineConfig
    micro_batch_size: Annotated[PositiveInt, Idle("videos are made one at a time")] = 1
    frame_interval: Annotated[PositiveInt, Own("divides fps")] = 1
    num_samples_per_prompt: Annotated[PositiveInt, To("generate.videos_per_prompt")] = 1
    allow_tf32: Annotated[bool | None, To("allow_tf32")] = None
    model_max_length: Annotated[PositiveInt, To("max_text_tokens")] = 512
    save_path: Annotated[Path, To("generate.out")]
    fps: Annotated[Fps, To("generate.fps")] = 24
    prompt: Annotated[Path, To("generate.prompt", convert=str)]
    device: Annotated[str, To("generate.device")] = "npu"
    weight_dtype: Annotated[str, To("generate.dtype")] = "bf16"
    use_prompt_preprocess: Annotated[bool, To("generate.clean_prompts")] = True


# --- model_opensoraplan1_5.json -----------------------------------------------------------------------------


class Training(Settings):
    model_id: Literal["OpenSoraPlan"] = "OpenSoraPlan"
    weighting_scheme: Annotated[Weighting, To("flow.weighting")] = "logit_normal"
    use_dynamic_shifting: Annotated[bool, To("flow.shift", convert={True: "dynamic"}.get, agree=False)] = (
        False
    )
    shift: Annotated[PositiveFloat, To("flow.shift", agree=False)] = 1.0


class ModelFile(Settings):
    frames: Annotated[PositiveInt | None, _FRAMES] = None
    allow_tf32: Annotated[bool | None, To("allow_tf32")] = None
    allow_internal_format: Annotated[bool, Idle("a memory layout of Ascend's operators")] = False
    load_video_features: Annotated[bool, _FEATURES] = False
    load_text_features: Annotated[bool, _FEATURES] = False
    enable_encoder_dp: Annotated[bool, To("parallel.encoder_dp")] = False
    ae: Annotated[
        dict[str, Any],
        {
            "latent_dim": _CHANNELS,
            "from_pretrained": To("vae.pretrained", convert=_text),
            "dtype": To("vae.compute"),
            "use_tiling": Idle("the VAE always streams, with the same result"),
        },
    ]
    text_encoder: Annotated[TextPart, _folder("text.t5", _text)]
    text_encoder_2: Annotated[TextPart, _folder("text.clip", _text)]
    predictor: Annotated[
        dict[str, Any],
        {
            "in_channels": _CHANNELS,
            "out_channels": _CHANNELS,
            "patch_size": _PATCH,
            "patch_size_t": _PATCH_T,
            "from_pretrained": To("model.pretrained", convert=_text),
            "dtype": To("model.compute", agree=False),
            "norm_elementwise_affine": _NORMS,
        },
    ]
    # After predictor.dtype, which goes before it.
    weight_dtype: Annotated[str, To("text.compute"), To("model.compute", agree=False)] = "bf16"
    diffusion: Training = Training()


# --- data.json ----------------------------------------------------------------------------------------------


class Basic(Settings):
    data_path: Annotated[str, Field(min_length=1), To("data.manifest")]
    data_folder: Annotated[str, To("data.root", convert=_text)] = ""
    data_storage_mode: Literal["combine"] = "combine"


class Transform(Settings):
    trans_type: str | None = None
    param: dict[str, Any] | None = None


class Transforms(Settings):
    video: Annotated[list[Transform], Own("must be what training does")]
    image: Annotated[list[Transform] | None, Own("must be what training does")] = None


def with_fewest_pixels(values: Mapping[str, Any]) -> dict[str, Any]:
    """preprocess_parameters with min_hxw: if it is left out, the original takes a quarter of max_hxw."""
    most = values.get("max_hxw")
    fewest = {"min_hxw": most // 4} if isinstance(most, int) and "min_hxw" not in values else {}
    return {**values, **fewest}


class Preprocess(SelectionSettings):
    """What selects samples, and how they are read."""

    video_reader_type: Annotated[
        Literal["decoder", "decord", "torchcodec", "pyav"],
        To("data.reader", convert=lambda name: "decord" if name == "decoder" else name),
    ] = "decoder"
    image_reader_type: Literal["Image"] = "Image"
    cfg: Annotated[float, Field(ge=0, le=1), To("data.caption_dropout")] = 0.1
    batch_size: Annotated[PositiveInt | None, _BATCH] = None
    gradient_accumulation_size: Annotated[PositiveInt | None, _ACCUMULATE] = None
    use_aesthetic: Annotated[bool, To("data.use_aesthetic")] = False
    train_pipeline: Transforms = Transforms(video=[])

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: object) -> object:
        return with_fewest_pixels(values) if isinstance(values, dict) else values

    def selection(self) -> dict[str, Any]:
        """The values given of the selection."""
        return self.model_dump(include=set(SelectionSettings.model_fields), exclude_unset=True)


class Dataset(Settings):
    dataset_type: Literal["t2v"] = "t2v"
    basic_parameters: Basic
    preprocess_parameters: Preprocess
    use_text_processer: Literal[True] = True
    enable_text_preprocess: Annotated[bool, To("text.clean")] = True
    model_max_length: Annotated[PositiveInt, To("text.max_tokens")] = 512
    tokenizer_config: Annotated[TextPart, _folder("text.t5_tokenizer", _text)]
    tokenizer_config_2: Annotated[TextPart, _folder("text.clip_tokenizer", _text)]
    use_feature_data: Annotated[bool, _FEATURES] = False
    use_img_from_vid: Literal[False] = False


class Collate(Settings):
    model_name: Literal["GroupLength"] = "GroupLength"
    batch_size: Annotated[PositiveInt | None, _BATCH] = None
    num_frames: Annotated[PositiveInt | None, _FRAMES] = None
    group_data: Annotated[bool, _FULL_BATCHES] = True
    ae_stride: Literal[8] = 8
    ae_stride_t: Annotated[PositiveInt | None, _STRIDE] = None
    patch_size: Annotated[PositiveInt | None, _PATCH] = None
    patch_size_t: Annotated[PositiveInt | None, _PATCH_T] = None


class Loader(Settings):
    dataloader_mode: Literal["sampler"] = "sampler"
    sampler_type: Literal["LengthGroupedSampler"] = "LengthGroupedSampler"
    batch_size: Annotated[PositiveInt | None, _BATCH] = None
    num_workers: Annotated[Count, To("data.workers")] = 4
    shuffle: Annotated[bool, Idle("samples are always shuffled, by the seed")] = False
    drop_last: Annotated[bool, _FULL_BATCHES] = True
    pin_memory: Annotated[bool, Idle("it changes speed only, on one kind of device")] = False
    group_data: Annotated[bool, _FULL_BATCHES] = True
    initial_global_step_for_sampler: Annotated[
        Count, Idle("--resume goes on at the right sample by itself")
    ] = 0
    gradient_accumulation_size: Annotated[PositiveInt | None, _ACCUMULATE] = None
    collate_param: Collate = Collate()


class DataFile(Settings):
    dataset_param: Dataset
    dataloader_param: Loader = Loader()


# --- The launch script --------------------------------------------------------------------------------------

# What it sets, which no file says.
LAUNCH_SCRIPT: dict[str, Any] = {"seed": 1024, "checkpoint": {"every": 1000}, "log": {"every": 1}}
RECOMPUTED_FEED_FORWARDS = 32
