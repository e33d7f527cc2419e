"""MindSpeed-MM 2.x's own inference_model.json for Open-Sora Plan v1.5, put into the form of the guide's file,
which is of the branch mindspeed_mmdit of Open-Sora Plan. What the guide's keys mean is in table.py.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from opensoraplan.formats.mindspeed.table import TextPart

# The guide's names of the same norms, by section and key.
_NORMS = {
    ("ae", "norm_type"): {"aelayernorm": "layernorm"},
    ("predictor", "norm_cls"): {"fp32_layer_norm": "layer_norm"},
}
# Of the VAE: how many frames it works on at a time, which does not change the result.
_CHUNKS = ("t_chunk_enc", "t_chunk_dec")
_CLIP_TOKENS = 77


class _Encoder(TextPart):
    model_id: Literal["T5", "CLIPWithProjection"]  # type: ignore[reportIncompatibleVariableOverride]
    output_key: Literal["text_embeds"] | None = None
    dtype: str | None = None


class _Tokenizer(TextPart):
    model_max_length: int | None = None


Part = TypeVar("Part", bound=TextPart)


def is_mindspeed_mm(content: Mapping[str, Any]) -> bool:
    """Whether this is a file of MindSpeed-MM itself: its text encoders are a list."""
    return any(isinstance(content.get(key), list) for key in ("text_encoder", "tokenizer"))


def to_guide(content: Mapping[str, Any], *, where: str) -> tuple[dict[str, Any], list[str]]:
    """The content in the guide's form, and the keys that are left out since they change nothing here.

    Raises ValueError, which begins with `where`, for what has no place there. Keys that both forms have are
    not looked at.
    """
    encoders = _read_two(content, "text_encoder", _Encoder, where=where)
    tokenizers = _read_two(content, "tokenizer", _Tokenizer, where=where)
    pipeline = content.get("pipeline_class", "OpenSoraPlanPipeline")
    if pipeline != "OpenSoraPlanPipeline":
        raise ValueError(f"{where}: pipeline_class is {pipeline!r}, not 'OpenSoraPlanPipeline'")
    own = ("text_encoder", "tokenizer", "dtype", "pipeline_class")
    common = {key: value for key, value in content.items() if key not in own}
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in common.items()}
    if "dtype" in content:
        result["weight_dtype"] = content["dtype"]
    result |= _text_parts(encoders, tokenizers, where=where)
    for (section, key), names in _NORMS.items():
        inner = result.get(section)
        if isinstance(inner, dict) and isinstance(inner.get(key), str):
            inner[key] = names.get(inner[key], inner[key])
    if isinstance(predictor := result.get("predictor"), dict) and "patch_size_thw" in predictor:
        patch = predictor.pop("patch_size_thw")
        if not isinstance(patch, list) or len(patch) != 3 or patch[1] != patch[2]:
            raise ValueError(f"{where}: predictor.patch_size_thw must be [1, 2, 2], got {patch!r}")
        predictor["patch_size_t"], predictor["patch_size"] = patch[:2]
    idle = [f"text_encoder.{encoder.model_id}.dtype" for encoder in encoders if encoder.dtype is not None]
    if isinstance(vae := result.get("ae"), dict):
        idle += [f"ae.{key}" for key in _CHUNKS if vae.pop(key, None) is not None]
    return result, idle


def _read_two(content: Mapping[str, Any], key: str, kind: type[Part], *, where: str) -> list[Part]:
    entries = content.get(key)
    if not isinstance(entries, list) or len(entries) != 2 or not all(isinstance(e, dict) for e in entries):
        raise ValueError(f"{where}: {key} must be a list of two objects, of T5 and of CLIP")
    return [kind.read(entry, where=f"{where}, {key}") for entry in entries]


def _text_parts(
    encoders: list[_Encoder], tokenizers: list[_Tokenizer], *, where: str
) -> dict[str, dict[str, Any] | int]:
    """Both text encoders and their tokenizers, which are in the same order, under the guide's names."""
    parts: dict[str, dict[str, Any] | int] = {}
    for encoder, tokenizer in zip(encoders, tokenizers, strict=True):
        number = "" if encoder.model_id == "T5" else "_2"
        parts[f"text_encoder{number}"] = encoder.model_dump(
            exclude={"output_key", "dtype"}, exclude_unset=True
        )
        parts[f"tokenizer{number}"] = tokenizer.model_dump(exclude={"model_max_length"}, exclude_unset=True)
        length = tokenizer.model_max_length
        if number and length not in (None, _CLIP_TOKENS):
            raise ValueError(f"{where}: CLIP reads {_CLIP_TOKENS} tokens, its model_max_length is {length}")
        if not number and length is not None:
            parts["model_max_length"] = length
    if len(parts) < 4:
        raise ValueError(f"{where}: text_encoder must be a list of T5 and CLIPWithProjection")
    return parts
