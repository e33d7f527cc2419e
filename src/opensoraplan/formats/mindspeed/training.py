"""The guide's two training files, model_opensoraplan1_5.json and data.json, translated to our settings.

Every key is used, or named in a note as having no meaning here; unknown keys and contradictions are errors.
What the keys mean is in table.py. No file is looked for but these two.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from opensoraplan.documents import read_json_object
from opensoraplan.formats.mindspeed.inference_mm import is_mindspeed_mm
from opensoraplan.formats.mindspeed.meaning import Document, To, find_contradictions, translate
from opensoraplan.formats.mindspeed.table import DataFile, ModelFile, Preprocess, Transform
from opensoraplan.models import original
from opensoraplan.settings import Settings

READING = "dataset_param.preprocess_parameters"
# What a train_pipeline may be: with force_resolution, and without.
FORCED_SIZE = ["ToTensorVideo", "CenterCropResizeVideo", "ae_norm"]
FREE_SIZE = ["ToTensorVideo", "MaxHWStrideResizeVideo", "SpatialStrideCropVideo", "ae_norm"]
PRECISIONS = ("fp32", "bf16")


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
    content = read_json_object(model_json, comments=True)
    if is_mindspeed_mm(content):
        raise ValueError(
            f"{model_json} is a file of MindSpeed-MM itself (text_encoder is a list): --model takes the "
            "guide's model_opensoraplan1_5.json, of the branch mindspeed_mmdit of Open-Sora Plan"
        )
    model = Document(ModelFile, content, model_json)
    data = Document(DataFile, read_json_object(data_json, comments=True), data_json)
    _check_agreement(model, data)
    configs = {
        "model": original.denoiser_config(model.file.predictor, where=f"section predictor of {model_json}"),
        "vae": original.vae_config(model.file.ae, where=f"section ae of {model_json}"),
    }
    _check_precisions(model)
    values = {"output": f"runs/{model_json.stem}", **translate(model, data)}
    for section, config in configs.items():
        values[section]["config"] = config
    notes = _choose_sizes(values["data"]["selection"], data)
    if model.file.load_video_features and not to_cache:
        keys = [f"dataset_param.basic_parameters.{key}" for key in ("data_path", "data_folder")]
        notes += data.note(keys, "features are loaded, from data.features")
        del values["data"]["manifest"], values["data"]["root"]
    notes += _drop_usual_tokenizers(values["text"], data)
    if model.file.diffusion.use_dynamic_shifting:
        notes += model.note(["diffusion.shift"], "use_dynamic_shifting tells it from the size")
    return _without_none(values), notes + model.idle_notes() + data.idle_notes()


def _check_agreement(model: Document[ModelFile], data: Document[DataFile]) -> None:
    """Raise ValueError for what the files say twice and differently."""
    problems = find_contradictions(model, data)
    channels = model.get("ae.latent_dim")
    for key in ("ae.shift", "ae.scale"):
        numbers = model.get(key)
        if channels is not None and isinstance(numbers, list) and len(numbers) != channels:
            told = model.tell("ae.latent_dim")
            problems.append(f"{model.name(key)} has {len(numbers)} values, but {told}: one for each channel")
    if problems:
        raise ValueError("contradictions: " + "; ".join(problems))


def _check_precisions(model: Document[ModelFile]) -> None:
    for key, meaning in model.rows:
        name = model.get(key)
        precision = isinstance(meaning, To) and meaning.subject.endswith(".compute")
        if precision and name is not None and name not in PRECISIONS:
            why = " (fp16 would need loss scaling)" if name == "fp16" else ""
            raise ValueError(f"{model.tell(key)}: training is in {' or '.join(PRECISIONS)}{why}")


def _choose_sizes(values: dict[str, Any], data: Document[DataFile]) -> list[str]:
    """Remove from the values of the selection those that follow from others, so that a change of the size
    changes them as well. Returns notes.
    """
    selection = data.file.dataset_param.preprocess_parameters
    size = (selection.max_height, selection.max_width)
    notes: list[str] = []
    if selection.force_resolution:
        values.pop("max_hxw", None)
        notes += data.note([f"{READING}.max_hxw"], "force_resolution sets the size")
        if selection.min_hxw == size[0] * size[1]:
            values.pop("min_hxw")
    elif selection.max_hxw is not None:
        keys = [f"{READING}.{key}" for key in ("max_height", "max_width")]
        notes += data.note(keys, "without force_resolution max_hxw bounds the size")
    for kind, steps in selection.train_pipeline:
        name = f"{READING}.train_pipeline.{kind}"
        if not steps:
            continue
        resize = _check_transforms(steps, selection, where=f"{name} in {data.path}")
        if resize.trans_type == FORCED_SIZE[1] and not selection.force_resolution:
            notes += data.note([name], "without force_resolution each sample has its own size")
        elif "interpolation_mode" not in (resize.param or {}):
            notes.append(
                f"{data.path.name}: {name} names no interpolation_mode: bicubic is used, which the "
                "guide's file names (the original's own default is bilinear)"
            )
    return notes


def _check_transforms(steps: Sequence[Transform], selection: Preprocess, *, where: str) -> Transform:
    """Raise ValueError unless these steps of a train_pipeline are what the selection makes training do, or
    would with force_resolution. Returns the step that resizes.
    """
    kinds = [step.trans_type for step in steps]
    if kinds not in (FORCED_SIZE, FREE_SIZE):
        raise ValueError(
            f"{where}: what training does has the trans_type {', '.join(FORCED_SIZE)} "
            f"(with force_resolution) or {', '.join(FREE_SIZE)}, got {', '.join(map(str, kinds))}"
        )
    for step in (steps[0], steps[-1]):
        if step.param:
            raise ValueError(f"{where}: {step.trans_type} takes no param, got {step.param!r}")
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


def _check_free_size(steps: Sequence[Transform], selection: Preprocess, *, where: str) -> None:
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


def _param(step: Transform, needed: str, *, where: str) -> dict[str, Any]:
    if step.param is None:
        raise ValueError(f"{where}: {step.trans_type} needs param with {needed}, got None")
    return step.param


def _drop_usual_tokenizers(text: dict[str, Any], data: Document[DataFile]) -> list[str]:
    """Remove the tokenizers that are in their encoder's folder; notes that name the others."""
    notes: list[str] = []
    for encoder, key in (("t5", "tokenizer_config"), ("clip", "tokenizer_config_2")):
        if text[f"{encoder}_tokenizer"] == text[encoder]:
            del text[f"{encoder}_tokenizer"]
        else:
            notes.append(
                f"{data.path.name}: {key} is not the folder of its encoder: "
                f"{text[f'{encoder}_tokenizer']}, {text[encoder]}"
            )
    return notes


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    """Without the settings that nothing was said of. A `config` stays as it is: null has a meaning there."""
    return {
        key: _without_none(value) if isinstance(value, dict) and key != "config" else value
        for key, value in values.items()
        if value is not None
    }
