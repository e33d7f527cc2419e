"""Files with the latents of an unfinished video, to resume it or to decode it with `osp decode`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opensoraplan.defaults import Fps, Frames, Side, Steps
from opensoraplan.disk import write_whole
from opensoraplan.documents import as_object, check_file, parse_json
from opensoraplan.models.text import PromptEmbeds
from opensoraplan.requests import Request
from opensoraplan.settings import Settings
from opensoraplan.shapes import RELEASE, Strides, latent_shape

SUFFIX = ".latents.safetensors"
# Fields of PromptEmbeds in the file, after the name of the prompt.
_PARTS = ("sequence", "mask", "pooled")
# Keys that older records do not have. The other keys imply them.
_ADDED = ("fingerprint", "encoded_prompt", "encoded_negative_prompt")

# Key of the fingerprints and strengths of a video's LoRAs, whose files may have been renamed.
LORA_WEIGHTS = "lora_weights"
# Key of what the frames that a video is given look like, whose files may have been renamed, and their fields.
GIVEN_FRAMES = "given_frames"
FRAME_FILES = ("image", "last_image", "video")

Record = dict[str, Any]


class _StoredRecord(Request):
    """The keys that a record must have for its latents to be usable; it may have more."""

    model_config = ConfigDict(extra="allow")

    model: str | dict[str, Any]
    step: int = Field(ge=0)
    frames: Frames = Field()
    height: Side = Field()
    width: Side = Field()
    fps: Fps = Field()
    steps: Steps = Field()
    seed: int = Field(ge=0, lt=2**62)
    vae_dtype: str | None = None

    @model_validator(mode="after")
    def _check_step(self) -> Self:
        if self.step > self.total_steps:
            raise ValueError(f"step {self.step} is greater than the number of steps, {self.total_steps}")
        if isinstance(self.model, dict) and not isinstance(self.model.get("vae"), str):
            raise ValueError("model must say where its vae is")
        return self


class _Scaling(Settings):
    """Shift and scale of the VAE's latent channels."""

    shift: list[Annotated[float, Field(allow_inf_nan=False)]] | None
    scale: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None


@dataclass(frozen=True)
class SavedLatents:
    """Normalised latents [1, C, T, H, W] of the video so far, after `step` of the steps of `record`, which is
    all that decides how the video looks. `scaling`: shift and scale of the VAE that they are for, whose
    `strides` are these. `prompt` and `negative`: encoded, where they were saved. `velocity` [1, C, T, H, W]:
    of that step, for solvers that go on from it. `prefix` [1, C, t, H, W]: of an extended video, what its
    newest window goes on from.
    """

    latents: Tensor
    step: int
    record: Record
    scaling: dict[str, list[float] | None]
    prompt: PromptEmbeds | None = None
    negative: PromptEmbeds | None = None
    velocity: Tensor | None = None
    strides: Strides = RELEASE
    prefix: Tensor | None = None


def latents_path(video: Path) -> Path:
    """The file for the latents of a video at this path."""
    return video.with_suffix(SUFFIX)


def write(path: Path, saved: SavedLatents) -> None:
    """Write the file atomically; it replaces an older one. Raises OSError or SafetensorError if it cannot."""
    tensors = {"latents": saved.latents}
    for name in ("velocity", "prefix"):
        if (tensor := getattr(saved, name)) is not None:
            tensors[name] = tensor
    for name in ("prompt", "negative"):
        embeds: PromptEmbeds | None = getattr(saved, name)
        if embeds is not None:
            tensors |= {f"{name}.{part}": getattr(embeds, part) for part in _PARTS}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    record = json.dumps({**saved.record, "step": saved.step}, ensure_ascii=False)
    metadata = {"record": record, "scaling": json.dumps(saved.scaling)}
    if saved.strides != RELEASE:  # which those that do not say it have
        metadata["strides"] = json.dumps(vars(saved.strides))
    write_whole(path, lambda file: save_file(tensors, file, metadata=metadata))


def read(path: Path) -> SavedLatents:
    """Read what `write` wrote. Raises FileNotFoundError, and ValueError for a damaged or other file."""
    record, step = read_record(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        scaling = parse_json(metadata["scaling"], where=f"{path}, scaling")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    found = _Scaling.read(as_object(scaling, where=f"{path}, scaling"), where=f"{path}, scaling")
    channels = tensors["latents"].shape[1]
    for name, values in found.model_dump().items():
        if values is not None and len(values) != channels:
            raise ValueError(f"{path}: {name} has {len(values)} values for {channels} channels of latents")
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path} is damaged: {', '.join(broken)} is not finite")
    return SavedLatents(
        *(tensors["latents"], step, record, found.model_dump()),
        prompt=_embeds(tensors, "prompt"),
        negative=_embeds(tensors, "negative"),
        velocity=tensors.get("velocity"),
        strides=_strides(metadata, where=f"{path}, strides"),
        prefix=tensors.get("prefix"),
    )


def read_record(path: Path) -> tuple[Record, int]:
    """Record and step. Checks the tensors' shapes without reading the tensors. Raises as `read`."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if missing := {"record", "scaling"} - metadata.keys() or {"latents"} - shapes.keys():
            raise ValueError(f"it has no {' and no '.join(sorted(missing))}")
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a latents file of osp generate, NAME{SUFFIX} ({error})") from None
    where = f"{path}, record"
    record = as_object(parse_json(metadata["record"], where=where), where=where)
    strides = _strides(metadata, where=f"{path}, strides")
    checked = _StoredRecord.read(record, where=where, strict=True, context=strides)
    frames = checked.frames_after(checked.step)
    _check_shapes(path, shapes, latent_shape(frames, checked.height, checked.width, strides=strides))
    return record, record.pop("step")


class _Strides(Settings):
    temporal: Annotated[int, Field(ge=1)]
    spatial: Annotated[int, Field(ge=1)]


def _strides(metadata: Mapping[str, str], *, where: str) -> Strides:
    """Of the VAE that latents are for."""
    if "strides" not in metadata:
        return RELEASE
    values = as_object(parse_json(metadata["strides"], where=where), where=where)
    return Strides(**_Strides.read(values, where=where, strict=True).model_dump())


def _check_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]], grid: tuple[int, int, int]) -> None:
    """Raise ValueError for tensors that do not belong to one video with this latent grid."""
    latents = shapes["latents"]
    if len(latents) != 5 or latents[0] != 1 or latents[1] < 1 or latents[2:] != grid:
        raise ValueError(
            f"{path} has latents of shape {list(latents)}; its record needs "
            f"[1, channels, {', '.join(map(str, grid))}]"
        )
    prefix = shapes.get("prefix", latents)
    if len(prefix) != 5 or (*prefix[:2], *prefix[3:]) != (*latents[:2], *latents[3:]):
        raise ValueError(f"{path} has a prefix {list(prefix)} for latents {list(latents)}")
    if shapes.get("velocity", latents) != latents:
        raise ValueError(f"{path} has velocity {list(shapes['velocity'])} for latents {list(latents)}")
    for name in ("prompt", "negative"):
        parts = [shapes.get(f"{name}.{part}", ()) for part in _PARTS]
        if not any(parts):
            continue
        sequence, mask, pooled = parts
        if len(sequence) != 3 or sequence[0] != 1 or mask != sequence[:2] or len(pooled) != 2:
            shown = ", ".join(map(str, parts))
            raise ValueError(f"{path} is damaged: the embeddings of its {name} have the shapes {shown}")


def total_steps(record: Mapping[str, Any]) -> int:
    """The denoising steps of a record's video."""
    return _StoredRecord.read({**record, "step": 0}, where="record").total_steps


def is_latents_of(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the file has latents of the video with this record, made by the same weights."""
    return saved_step(path, record) is not None


def saved_step(path: Path, record: Mapping[str, Any]) -> int | None:
    """The step of the saved latents; None if the file has no latents of the video with this record."""
    try:
        found, step = read_record(path)
    except (OSError, ValueError):
        return None
    return step if is_same_video(found, record) else None


def identity(record: Mapping[str, Any]) -> Record:
    """What of a record decides the video: fingerprints, if there are any, say more than names of files."""
    ignored = {"opensoraplan"}
    if "fingerprint" in record:
        ignored.add("model")
    if LORA_WEIGHTS in record:
        ignored.add("lora")
    if GIVEN_FRAMES in record:
        ignored |= {*FRAME_FILES}
    return {key: value for key, value in record.items() if key not in ignored}


def is_same_video(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records describe the same video, whichever version of this package wrote them. Weights are
    compared by fingerprint or, if a record has none, by the path of the model. Keys that only one of two
    records has because the other is older are ignored.
    """
    ignored = {key for key in _ADDED if key not in one or key not in other}
    first, second = (identity({k: v for k, v in r.items() if k not in ignored}) for r in (one, other))
    return first == second


def differing_parts(found: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """The parts of the model whose fingerprints differ, for two records that are the same otherwise. Empty
    for records that differ in anything else, or of which one has no fingerprints.
    """
    before, now = found.get("fingerprint"), record.get("fingerprint")
    if not isinstance(before, dict) or not isinstance(now, dict):
        return []
    if not is_same_video({**found, "fingerprint": now}, record):
        return []
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _embeds(tensors: Mapping[str, Tensor], name: str) -> PromptEmbeds | None:
    if f"{name}.mask" not in tensors:
        return None
    return PromptEmbeds(*(tensors[f"{name}.{part}"] for part in _PARTS))
