"""Where the parts of a model are: options, the guide's config, folders, and checks of them."""

import argparse
import itertools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from opensoraplan.cli.options import Dtype, OptionalPath, check_exists, optional
from opensoraplan.defaults import INDEX, GenerateDefaults, ModelIndex, check_model_files

if TYPE_CHECKING:
    from opensoraplan.formats.assemble import Sources
    from opensoraplan.formats.mindspeed.inference import Inference

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class Parts:
    """Model files, one by one, instead of --model or the paths in --config."""

    transformer: OptionalPath = None
    """Denoiser: the release's pickle, a folder of Megatron shards, or a diffusers component."""
    vae: OptionalPath = None
    """VAE: the release's .ckpt, or a diffusers component."""
    text_encoder: OptionalPath = None
    """Folder of T5 v1.1-XL."""
    text_encoder_2: OptionalPath = None
    """Folder of CLIP ViT-bigG-14."""
    tokenizer: OptionalPath = None
    """Folder of T5's tokenizer, if it is not in the text encoder's folder."""
    tokenizer_2: OptionalPath = None
    """Folder of CLIP's tokenizer, if it is not in the text encoder's folder."""
    ema: Annotated[bool | None, optional("[True|False]", "(default: EMA where there is one)")] = None
    """Use the EMA weights of a checkpoint that has both."""
    sparse_n: Annotated[tuple[int, ...] | None, optional("N ...")] = None
    """Skiparse rate of each stage, for a model of another size than the release without --config."""
    set: Annotated[tuple[str, ...], optional("KEY=VALUE ...")] = ()
    """Change values of --config, for example predictor.num_heads=4. Put the prompt first."""


NO_PARTS = Parts()


def spell_out_ema(words: list[str]) -> list[str]:
    """The command line with True added after an --ema without a value."""
    spelled: list[str] = []
    for word, following in itertools.pairwise([*words, ""]):
        given = following.lower() in ("true", "false")
        if spelled[-1:] == ["--ema"]:
            spelled.append(word.capitalize())
        else:
            spelled += [word] if word != "--ema" or given else [word, "True"]
    return spelled


def read_config(arguments: list[str]) -> "Inference | None":
    """Read the config that --config names. Its values become the defaults of the other options."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    finder.add_argument("--set", nargs="*", action="extend", default=[])
    found, _ = finder.parse_known_args(arguments)
    if found.config is None:
        if found.set:
            raise ValueError("--set changes values of --config: give that, too")
        return None
    if not found.config.is_file():
        raise FileNotFoundError(f"the config {found.config} does not exist")
    for change in found.set:
        if "=" not in change:
            raise ValueError(f"--set takes KEY=VALUE, got {change!r} (put the prompt before --set)")

    from opensoraplan.formats.mindspeed.inference import read_inference

    inference = read_inference(found.config, changes=found.set)
    for key, option in (("weight_dtype", "dtype"), ("ae.dtype", "vae_dtype")):
        dtype = inference.generate[option]
        if dtype is not None and dtype not in get_args(Dtype):
            known = ", ".join(get_args(Dtype))
            raise ValueError(f"{found.config}: {key} {dtype!r} is not one of {known}")
    return inference


def read_defaults(arguments: list[str], inference: "Inference | None") -> dict[str, Any]:
    """The model's defaults for the options of `osp generate`: from --config, or from generate.json in the
    model's folder (`osp export` writes it). Without a model, those of the built-in one.
    """
    if inference is not None:
        return inference.generate
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--model", type=Path)
    for name in PARTS:
        finder.add_argument(f"--{name.replace('_', '-')}", dest="parts", action="append")
    found, _ = finder.parse_known_args(arguments)
    if found.model is None and found.parts:
        return {}

    from opensoraplan import builtin

    folder = found.model or builtin.folder()
    prompts = read_prompt_config(folder)
    cleaning = {key: prompts[key] for key in ("clean_prompts", "keep_chinese") if key in prompts}
    return {**GenerateDefaults.of(folder).options(), **cleaning}


def read_prompt_config(folder: Path | None) -> dict[str, Any]:
    """The prompt settings of a model's folder; empty for a model in parts or another folder. Raises
    ValueError for a damaged one.
    """
    if folder is None or not (folder / INDEX).is_file():
        return {}
    return ModelIndex.of(folder).prompt_config()


def options_of_parts(parts: Parts, inference: "Inference | None") -> list[str]:
    """The given options that name parts of a model, as written on the command line."""
    names = [field.name for field in fields(parts) if getattr(parts, field.name) != field.default]
    return (["--config"] if inference else []) + [f"--{name.replace('_', '-')}" for name in names]


def find_paths(parts: Parts, inference: "Inference | None") -> dict[str, Path]:
    """The files of a model's parts: options go before the config. Raises ValueError for parts that neither
    gives, and FileNotFoundError for files that do not exist.
    """
    paths = dict(inference.sources) if inference else {}
    for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        given = getattr(parts, encoder)
        if given is not None:
            paths[tokenizer] = given
    paths |= {name: path for name in PARTS if (path := getattr(parts, name)) is not None}
    missing = [f"--{name.replace('_', '-')}" for name in PARTS if name not in paths]
    if missing:
        raise ValueError(f"these parts of the model are not given: {', '.join(missing)}")
    check_parts(paths)
    return paths


def check_parts(paths: dict[str, Path]) -> None:
    absent = [f"{name} {paths[name]}" for name in PARTS if name in paths and not paths[name].exists()]
    if absent:
        raise FileNotFoundError(f"these parts of the model do not exist: {', '.join(absent)}")


def make_sources(paths: dict[str, Path], parts: Parts, inference: "Inference | None") -> "Sources":
    from opensoraplan.formats.assemble import Sources

    return Sources(
        **paths,
        transformer_config=inference.transformer_config if inference else None,
        vae_config=inference.vae_config if inference else None,
        sparse_n=parts.sparse_n,
        ema=parts.ema,
    )


def check_model(path: Path) -> None:
    """Raise FileNotFoundError or ValueError unless this is a model folder."""
    check_exists(path)
    index = path / INDEX
    if not index.is_file():
        hint = "it has no model_index.json"
        if path.is_file():
            hint = "it is a file; `osp convert` makes a model folder from the original's files"
        elif (path.parent / index.name).is_file():
            hint = f"it is a part of the model folder {path.parent}"
        raise ValueError(f"{path} is not a model folder: {hint}")
    check_model_files(path)
