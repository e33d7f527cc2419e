"""The guide's two training files, model_opensoraplan1_5.json and data.json, translated to our settings.

Every key is used, or named in a note as having no meaning here; unknown keys and contradictions are errors.
The architecture keys are in models/original.py. No file is looked for but these two.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, PositiveFloat, PositiveInt

from opensoraplan.data.selection import SelectionSettings
from opensoraplan.documents import read_json_object
from opensoraplan.flow import Weighting
from opensoraplan.formats.mindspeed.inference import NOT_OF_SELECTION, LocalFolder, read_selection
from opensoraplan.formats.mindspeed.inference_mm import is_mindspeed_mm
from opensoraplan.models import original
from opensoraplan.models.strict import check_known_keys
from opensoraplan.settings import Settings
from opensoraplan.shapes import TEMPORAL_STRIDE
from opensoraplan.train.config import OptimizerSettings

READING = "dataset_param.preprocess_parameters"
LOADER = "dataloader_param"
COLLATE = "dataloader_param.collate_param"
# What a train_pipeline may be: with force_resolution, and without.
FORCED_SIZE = ["ToTensorVideo", "CenterCropResizeVideo", "ae_norm"]
FREE_SIZE = ["ToTensorVideo", "MaxHWStrideResizeVideo", "SpatialStrideCropVideo", "ae_norm"]
READERS = {"decoder": "decord", "decord": "decord", "torchcodec": "torchcodec", "pyav": "pyav"}
PRECISIONS = ("fp32", "bf16")

# Keys that are read and change nothing: the reason, and where they are.
MEANINGLESS_IN_MODEL = {
    "a memory layout of Ascend's operators": ["allow_internal_format"],
    "the VAE always streams, with the same result": ["ae.use_tiling"],
    "weights are always read one tensor at a time": [
        "text_encoder.low_cpu_mem_usage",
        "text_encoder_2.low_cpu_mem_usage",
    ],
    "norms have weights either way, as in the original": ["predictor.norm_elementwise_affine"],
}
MEANINGLESS_IN_DATA = {
    "samples are always shuffled, by the seed": [f"{LOADER}.shuffle"],
    "batches always have one shape and are full": [
        f"{LOADER}.drop_last",
        f"{LOADER}.group_data",
        f"{COLLATE}.group_data",
    ],
    "it changes speed only, on one kind of device": [f"{LOADER}.pin_memory"],
    "--resume goes on at the right sample by itself": [f"{LOADER}.initial_global_step_for_sampler"],
    "tokenizers have no weights": [
        "dataset_param.tokenizer_config.low_cpu_mem_usage",
        "dataset_param.tokenizer_config_2.low_cpu_mem_usage",
    ],
}


class Diffusion(Settings):
    model_id: Literal["OpenSoraPlan"] = "OpenSoraPlan"
    weighting_scheme: Weighting = "logit_normal"
    use_dynamic_shifting: bool = False
    shift: PositiveFloat = 1.0


class ModelFile(Settings):
    """model_opensoraplan1_5.json, key by key. Its defaults are the original's."""

    frames: PositiveInt | None = None
    allow_tf32: bool | None = None
    allow_internal_format: bool = False
    load_video_features: bool = False
    load_text_features: bool = False
    enable_encoder_dp: bool = False
    weight_dtype: str = "bf16"
    ae: dict[str, Any]
    text_encoder: LocalFolder
    text_encoder_2: LocalFolder
    predictor: dict[str, Any]
    diffusion: Diffusion = Diffusion()


class Basic(Settings):
    data_path: Annotated[str, Field(min_length=1)]
    data_folder: str = ""
    data_storage_mode: Literal["combine"] = "combine"


class Dataset(Settings):
    dataset_type: Literal["t2v"] = "t2v"
    basic_parameters: Basic
    preprocess_parameters: dict[str, Any]
    use_text_processer: Literal[True] = True
    enable_text_preprocess: bool = True
    model_max_length: PositiveInt = 512
    tokenizer_config: LocalFolder
    tokenizer_config_2: LocalFolder
    use_feature_data: bool = False
    use_img_from_vid: Literal[False] = False


class Collate(Settings):
    model_name: Literal["GroupLength"] = "GroupLength"
    batch_size: PositiveInt | None = None
    num_frames: PositiveInt | None = None
    group_data: bool = True
    ae_stride: Literal[8] = 8
    ae_stride_t: PositiveInt | None = None
    patch_size: PositiveInt | None = None
    patch_size_t: PositiveInt | None = None


class Loader(Settings):
    dataloader_mode: Literal["sampler"] = "sampler"
    sampler_type: Literal["LengthGroupedSampler"] = "LengthGroupedSampler"
    batch_size: PositiveInt | None = None
    num_workers: Annotated[int, Field(ge=0)] = 4
    shuffle: bool = False
    drop_last: bool = True
    pin_memory: bool = False
    group_data: bool = True
    initial_global_step_for_sampler: Annotated[int, Field(ge=0)] = 0
    gradient_accumulation_size: PositiveInt | None = None
    collate_param: Collate = Collate()


class DataFile(Settings):
    """data.json, key by key, without preprocess_parameters."""

    dataset_param: Dataset
    dataloader_param: Loader = Loader()


class Pipeline(Settings):
    video: list[dict[str, Any]]
    image: list[dict[str, Any]] | None = None


class Reading(Settings):
    """What NOT_OF_SELECTION names of preprocess_parameters."""

    video_reader_type: Literal["decoder", "decord", "torchcodec", "pyav"] = "decoder"
    image_reader_type: Literal["Image"] = "Image"
    cfg: Annotated[float, Field(ge=0, le=1)] = 0.1
    batch_size: PositiveInt | None = None
    gradient_accumulation_size: PositiveInt | None = None
    use_aesthetic: bool = False
    train_pipeline: Pipeline = Pipeline(video=[])


class Resize(Settings):
    """`param` of CenterCropResizeVideo."""

    size: tuple[PositiveInt, PositiveInt]
    interpolation_mode: Literal["bicubic"] = "bicubic"


class MaxResize(Settings):
    """`param` of MaxHWStrideResizeVideo. The defaults are the original's, but for the interpolation."""

    max_hxw: PositiveInt
    force_5_ratio: bool = True
    hw_stride: Literal[16] = 16
    interpolation_mode: Literal["bicubic"] = "bicubic"


class StrideCrop(Settings):
    """`param` of SpatialStrideCropVideo, with the original's defaults."""

    stride: PositiveInt
    force_5_ratio: bool = True


class Place(NamedTuple):
    """A key in one of the two files, by its dotted name."""

    file: Literal["model", "data"]
    key: str


# What the files say in several places.
TWICE: dict[str, list[Place]] = {
    "batch_size": [Place("data", f"{section}.batch_size") for section in (READING, LOADER, COLLATE)],
    "accumulate": [Place("data", f"{section}.gradient_accumulation_size") for section in (READING, LOADER)],
    "num_frames": [
        Place("model", "frames"),
        Place("data", f"{READING}.num_frames"),
        Place("data", f"{COLLATE}.num_frames"),
    ],
    "stride in time": [Place("data", f"{READING}.ae_stride_t"), Place("data", f"{COLLATE}.ae_stride_t")],
    "patch size": [Place("model", "predictor.patch_size"), Place("data", f"{COLLATE}.patch_size")],
    "patch size in time": [
        Place("model", "predictor.patch_size_t"),
        Place("data", f"{COLLATE}.patch_size_t"),
    ],
    "latent channels": [
        Place("model", "ae.latent_dim"),
        Place("model", "predictor.in_channels"),
        Place("model", "predictor.out_channels"),
    ],
    "features": [
        Place("model", "load_video_features"),
        Place("model", "load_text_features"),
        Place("data", "dataset_param.use_feature_data"),
    ],
}
# What a place stands for that leaves such a key out, where that decides something.
LEFT_OUT = {"stride in time": TEMPORAL_STRIDE, "features": False}
# What to do if they differ, where it is more than to make them equal.
REMEDIES = {
    "latent channels": "the denoiser takes and gives the latents of the VAE",
    "features": "osp cache writes both: set all three to true, and data.features, or all to false",
}


# What the guide's launch script sets, which the two files do not say.
LAUNCH_SCRIPT: dict[str, Any] = {"seed": 1024, "checkpoint": {"every": 1000}, "log": {"every": 1}}
RECOMPUTED_FEED_FORWARDS = 32


class _Files:
    """Both files as read, for looking up keys and naming them."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.paths = paths
        self.content = {name: read_json_object(path, comments=True) for name, path in paths.items()}

    def get(self, place: Place) -> Any:  # noqa: ANN401 (a JSON value)
        """The value there; None if there is none."""
        value: Any = self.content[place.file]
        for key in place.key.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def has(self, place: Place) -> bool:
        section, _, key = place.key.rpartition(".")
        inside = self.get(Place(place.file, section)) if section else self.content[place.file]
        return isinstance(inside, dict) and key in inside

    def tell(self, place: Place) -> str:
        return f"{self.name(place)} is {self.get(place)!r}"

    def name(self, place: Place) -> str:
        return f"{place.key} in {self.paths[place.file]}"

    def idle(self, file: Literal["model", "data"], keys: list[str], reason: str) -> list[str]:
        """At most one note, of those of the keys that are there."""
        given = [key for key in keys if self.has(Place(file, key))]
        name = self.paths[file].name
        return [f"{name}: without meaning here: {', '.join(given)} ({reason})"] if given else []


def read_guide(
    model_json: Path, data_json: Path, *, to_cache: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """What the two files say as nested values of TrainSettings, and notes to log, one a line.

    Raises ValueError for unknown keys, for values that v1.5.0 does not have, and for contradictions, naming
    both places. Paths in the files are taken as they are, whether they exist or not. With features there is
    no data.manifest: the caller has to give data.features. `to_cache` leaves it in: features are made of it.
    """
    for path in (model_json, data_json):
        if not path.is_file():
            raise ValueError(f"{path} does not exist or is no file")
    files = _Files({"model": model_json, "data": data_json})
    if is_mindspeed_mm(files.content["model"]):
        raise ValueError(
            f"{model_json} is a file of MindSpeed-MM itself (text_encoder is a list): --model takes the "
            "guide's model_opensoraplan1_5.json, of the branch mindspeed_mmdit of Open-Sora Plan"
        )
    model = ModelFile.read(files.content["model"], where=str(model_json))
    data = DataFile.read(files.content["data"], where=str(data_json))
    given = data.dataset_param.preprocess_parameters
    where = f"{data_json}, preprocess_parameters"
    check_known_keys(given, [*SelectionSettings.model_fields, *NOT_OF_SELECTION], where=where)
    reading = Reading.read({key: given[key] for key in given if key in NOT_OF_SELECTION}, where=where)
    agreed = _agreed(files)
    selection, notes = _selection(read_selection(data_json), files, pipeline=reading.train_pipeline)

    values: dict[str, Any] = {
        "output": f"runs/{model_json.stem}",
        "allow_tf32": model.allow_tf32,
        "model": {
            "config": original.denoiser_config(model.predictor, where=f"section predictor of {model_json}"),
            "compute": _precision(files, "predictor.dtype", "weight_dtype"),
        },
        "vae": {
            "config": original.vae_config(model.ae, where=f"section ae of {model_json}"),
            "compute": _precision(files, "ae.dtype"),
        },
        "text": {
            "t5": str(model.text_encoder.from_pretrained),
            "clip": str(model.text_encoder_2.from_pretrained),
            "max_tokens": data.dataset_param.model_max_length,
            "clean": data.dataset_param.enable_text_preprocess,
            "compute": _precision(files, "weight_dtype"),
        },
        "data": {
            "selection": selection,
            "batch_size": agreed["batch_size"],
            "caption_dropout": reading.cfg,
            "use_aesthetic": reading.use_aesthetic,
            "reader": READERS[reading.video_reader_type],
            "workers": data.dataloader_param.num_workers,
        },
        "flow": {
            "weighting": model.diffusion.weighting_scheme,
            "shift": "dynamic" if model.diffusion.use_dynamic_shifting else model.diffusion.shift,
        },
        "optimizer": {"accumulate": agreed["accumulate"]},
        "parallel": {"encoder_dp": model.enable_encoder_dp},
    }
    if agreed["num_frames"] is not None:
        selection["num_frames"] = agreed["num_frames"]
    if to_cache or not agreed["features"]:
        basic = data.dataset_param.basic_parameters
        values["data"] |= {"manifest": basic.data_path, "root": basic.data_folder or None}
    else:
        keys = [f"dataset_param.basic_parameters.{key}" for key in ("data_path", "data_folder")]
        notes += files.idle("data", keys, "features are loaded, from data.features")
    for section, config in {"model": model.predictor, "vae": model.ae}.items():
        if config.get("from_pretrained"):
            values[section]["pretrained"] = config["from_pretrained"]
    notes += _tokenizers(values["text"], model, data, files)
    if model.diffusion.use_dynamic_shifting:
        notes += files.idle("model", ["diffusion.shift"], "use_dynamic_shifting tells it from the size")
    for reason, keys in MEANINGLESS_IN_MODEL.items():
        notes += files.idle("model", keys, reason)
    for reason, keys in MEANINGLESS_IN_DATA.items():
        notes += files.idle("data", keys, reason)
    return _without_none(values), notes


def launch_defaults(values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What the original's start of a new model and the guide's launch script set for a run of these values,
    to go below them, and a note that names it, and what of the script is not taken over.
    """

    def given(section: str) -> Mapping[str, Any]:
        return found if isinstance(found := values.get(section), dict) else {}

    defaults: dict[str, Any] = dict(LAUNCH_SCRIPT)
    if not given("memory").get("recompute_blocks"):
        config = given("model").get("config")
        layers = config.get("num_layers") if isinstance(config, dict) else None
        depth = RECOMPUTED_FEED_FORWARDS
        if isinstance(layers, list) and all(isinstance(count, int) for count in layers):
            depth = min(depth, sum(layers))
        defaults["memory"] = {"recompute_feed_forwards": depth}
    if not given("model").get("pretrained"):
        defaults["model"] = {"init": "original"}
    taken = [f"seed = {defaults['seed']}"] if "seed" not in values else []
    for section in ("checkpoint", "log", "memory", "model"):
        new = {key: value for key, value in defaults.get(section, {}).items() if key not in given(section)}
        taken += [f"{section}.{key} = {value}" for key, value in new.items()]
    steps = given("optimizer").get("steps", OptimizerSettings().steps)
    accumulate = given("optimizer").get("accumulate", OptimizerSettings().accumulate)
    return defaults, (
        f"as the original and its launch script have it: {', '.join(taken) or 'nothing'}; not as there: "
        f"optimizer.steps is {steps} (there one epoch), optimizer.accumulate is {accumulate} (there 1: the "
        "number in data.json only reaches the sampler), parallel.tp is for you to set (there 8)"
    )


def _agreed(files: _Files) -> dict[str, Any]:
    """The value of each subject of TWICE; None where no place has one."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for subject, places in TWICE.items():
        given = [place for place in places if files.has(place)]
        values[subject] = files.get(given[0]) if given else None
        told = {files.tell(place): files.get(place) for place in given}
        if given and subject in LEFT_OUT:
            without = [place for place in places if place not in given]
            told |= {f"{files.name(place)} is left out": LEFT_OUT[subject] for place in without}
        if any(value != values[subject] for value in told.values()):
            problems.append(f"{', '.join(told)}: {REMEDIES.get(subject, 'make them equal')}")
    channels = files.get(Place("model", "ae.latent_dim"))
    for key in ("ae.shift", "ae.scale"):
        place = Place("model", key)
        numbers = files.get(place)
        if channels is not None and isinstance(numbers, list) and len(numbers) != channels:
            told = files.tell(Place("model", "ae.latent_dim"))
            problems.append(
                f"{files.name(place)} has {len(numbers)} values, but {told}: one for each channel"
            )
    if problems:
        raise ValueError("contradictions: " + "; ".join(problems))
    return values


def _selection(
    selection: SelectionSettings, files: _Files, *, pipeline: Pipeline
) -> tuple[dict[str, Any], list[str]]:
    """The values given of the selection, without those that follow from others, and notes.

    What follows is left out so that a change of the size changes it as well.
    """
    values = selection.model_dump(exclude_unset=True)
    size = (selection.max_height, selection.max_width)
    notes: list[str] = []
    if selection.force_resolution:
        values.pop("max_hxw", None)
        notes += files.idle("data", [f"{READING}.max_hxw"], "force_resolution sets the size")
        if selection.min_hxw == size[0] * size[1]:
            del values["min_hxw"]
    elif selection.max_hxw is not None:
        keys = [f"{READING}.{key}" for key in ("max_height", "max_width")]
        notes += files.idle("data", keys, "without force_resolution max_hxw bounds the size")
    for kind, steps in pipeline.model_dump().items():
        name = f"{READING}.train_pipeline.{kind}"
        if not steps:
            continue
        resize = _check_transforms(steps, selection, where=f"{name} in {files.paths['data']}")
        if resize["trans_type"] == FORCED_SIZE[1] and not selection.force_resolution:
            notes += files.idle("data", [name], "without force_resolution each sample has its own size")
        elif "interpolation_mode" not in resize["param"]:
            notes.append(
                f"{files.paths['data'].name}: {name} names no interpolation_mode: bicubic is used, which the "
                "guide's file names (the original's own default is bilinear)"
            )
    return values, notes


def _check_transforms(
    steps: list[dict[str, Any]], selection: SelectionSettings, *, where: str
) -> dict[str, Any]:
    """Raise ValueError unless these steps of a train_pipeline are what the selection makes training do, or
    would with force_resolution. Returns the step that resizes.
    """
    for step in steps:
        check_known_keys(step, ["trans_type", "param"], where=where)
    kinds = [step.get("trans_type") for step in steps]
    if kinds not in (FORCED_SIZE, FREE_SIZE):
        raise ValueError(
            f"{where}: what training does has the trans_type {', '.join(FORCED_SIZE)} "
            f"(with force_resolution) or {', '.join(FREE_SIZE)}, got {', '.join(map(str, kinds))}"
        )
    for step in (steps[0], steps[-1]):
        if step.get("param"):
            raise ValueError(f"{where}: {step['trans_type']} takes no param, got {step['param']!r}")
    if kinds == FREE_SIZE:
        _check_free_size(steps, selection, where=where)
        return steps[1]
    found = Resize.read(_param(steps[1], "size [height, width]", where=where), where=f"{where}, {kinds[1]}")
    size = (selection.max_height, selection.max_width)
    if selection.force_resolution and found.size != size:
        raise ValueError(
            f"contradictions: {where} resizes to {list(found.size)}, but "
            f"{READING}.max_height x max_width is {size[0]} x {size[1]}: make them equal"
        )
    return steps[1]


def _check_free_size(steps: list[dict[str, Any]], selection: SelectionSettings, *, where: str) -> None:
    if selection.force_resolution:
        raise ValueError(
            f"contradictions: {where} has {FREE_SIZE[1]}, but {READING}.force_resolution is true: set it to "
            f"false, or use {FORCED_SIZE[1]}"
        )
    scale = MaxResize.read(_param(steps[1], "max_hxw", where=where), where=f"{where}, {FREE_SIZE[1]}")
    cut = StrideCrop.read(_param(steps[2], "stride", where=where), where=f"{where}, {FREE_SIZE[2]}")
    problems = [
        f"{step}.{key} is {found}, but {READING}.{key_there} is {there}"
        for step, key, found, key_there, there in (
            (FREE_SIZE[1], "max_hxw", scale.max_hxw, "max_hxw", selection.largest_area),
            (FREE_SIZE[1], "force_5_ratio", scale.force_5_ratio, "force_5_ratio", selection.force_5_ratio),
            (FREE_SIZE[2], "stride", cut.stride, "hw_stride", selection.hw_stride),
            (FREE_SIZE[2], "force_5_ratio", cut.force_5_ratio, "force_5_ratio", selection.force_5_ratio),
        )
        if found != there
    ]
    if problems:
        raise ValueError(f"contradictions: in {where}, {'; '.join(problems)}: make them equal")


def _param(step: dict[str, Any], needed: str, *, where: str) -> dict[str, Any]:
    param = step.get("param")
    if not isinstance(param, dict):
        raise ValueError(f"{where}: {step['trans_type']} needs param with {needed}, got {param!r}")
    return param


def _precision(files: _Files, *keys: str) -> str | None:
    """The precision that the first of the keys with a value names; None: no key has one."""
    for key in keys:
        place = Place("model", key)
        name = files.get(place)
        if name is None:
            continue
        if name not in PRECISIONS:
            why = " (fp16 would need loss scaling)" if name == "fp16" else ""
            raise ValueError(f"{files.tell(place)}: training is in {' or '.join(PRECISIONS)}{why}")
        return name
    return None


def _tokenizers(text: dict[str, Any], model: ModelFile, data: DataFile, files: _Files) -> list[str]:
    """Put tokenizers that are not in their encoder's folder into `text`; notes that say so."""
    notes: list[str] = []
    for ours, key, encoder, tokenizer in (
        ("t5_tokenizer", "tokenizer_config", model.text_encoder, data.dataset_param.tokenizer_config),
        ("clip_tokenizer", "tokenizer_config_2", model.text_encoder_2, data.dataset_param.tokenizer_config_2),
    ):
        if tokenizer.from_pretrained != encoder.from_pretrained:
            text[ours] = str(tokenizer.from_pretrained)
            notes.append(
                f"{files.paths['data'].name}: {key} is not the folder of its encoder: "
                f"{tokenizer.from_pretrained}, {encoder.from_pretrained}"
            )
    return notes


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    """Without the settings that nothing was said of. A `config` stays as it is: null has a meaning there."""
    return {
        key: _without_none(value) if isinstance(value, dict) and key != "config" else value
        for key, value in values.items()
        if value is not None
    }
