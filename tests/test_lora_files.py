"""`osp inspect` and `osp convert` of LoRAs: each format to each other with its alpha, and what they fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import LORA_LAYERS, lora_of

from opensoraplan import builtin
from opensoraplan.formats.describe import describe
from opensoraplan.formats.lora import LORA_FORMATS, LoraFormat, load_lora, write_lora

FORMATS = pytest.mark.parametrize("kind", LORA_FORMATS)


def write(model: Path, folder: Path, kind: LoraFormat, **changes: Any) -> Path:  # noqa: ANN401
    path = folder / (kind if kind == "peft" else f"{kind}.safetensors")
    write_lora(lora_of(model, seed=1, **changes), path, kind=kind)
    return path


def lines_of(path: Path, **options: Any) -> dict[str, str]:  # noqa: ANN401
    pairs = (line.split(":", 1) for line in describe(path, **options).splitlines())
    return {name: text.strip() for name, text in pairs}


@FORMATS
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_each_format_becomes_each_other(
    osp: Callable[..., Any], tiny_model: Path, tmp_path: Path, kind: LoraFormat, dora: bool
) -> None:
    wanted = lora_of(tiny_model, seed=1, dora=dora, base="b" * 32)
    source = write(tiny_model, tmp_path, kind, dora=dora, base="b" * 32)
    for other in LORA_FORMATS:
        out = tmp_path / f"to-{other}{'' if other == 'peft' else '.safetensors'}"
        to = "lora" if other == "diffusers" else f"lora-{other}"
        outcome = osp("convert", "--lora", source, "--to", to, "--out", out, "--model", tiny_model)
        assert (outcome.code, outcome.err) == (0, "")
        lora, _ = load_lora(out, tiny_model)
        assert lora.config["use_dora"] == dora
        assert lora.origin["base_fingerprint"] == "b" * 32
        for layer in LORA_LAYERS:
            weight = torch.ones(wanted.tensors[f"{layer}.lora_B.weight"].shape[0], 1).expand(
                -1, wanted.tensors[f"{layer}.lora_A.weight"].shape[1]
            )
            assert torch.equal(lora.merge(layer, weight), wanted.merge(layer, weight))


@FORMATS
def test_what_a_lora_is(osp: Callable[..., Any], tiny_model: Path, tmp_path: Path, kind: LoraFormat) -> None:
    path = write(tiny_model, tmp_path, kind, base="b" * 32)
    said = lines_of(path, base=tiny_model)
    assert said.pop("parameters").endswith("in 3 layers")
    assert said == {
        "what": "LoRA",
        "format": kind,
        "dtype": "float32",
        "rank": "2",
        "alpha": "3",
        "layers": "caption_projection; attn1.to_q, ff.net.2 of 1 block",
        "fits": f"the denoiser of {tiny_model}",
        "base fingerprint": "b" * 32,
    }
    outcome = osp("inspect", path, "--model", tiny_model)
    assert (outcome.code, outcome.out.startswith("what:              LoRA\n")) == (0, True)


def test_the_model_that_a_lora_fits_is_found(tmp_path: Path) -> None:
    layers = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_q")
    path = write(builtin.folder(), tmp_path, "kohya", layers=layers, dora=True)
    said = lines_of(path)
    assert (said["what"], said["fits"]) == ("DoRA", "the built-in denoiser")
    assert said["layers"] == "attn1.to_q of 2 blocks"
    release = tmp_path / "release.safetensors"
    name = "diffusion_model.transformer_blocks.31.attn1.to_q"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(1, 3072), f"{name}.lora_B.weight": torch.ones(3072, 1)}, release
    )
    assert lines_of(release)["fits"] == "the released denoiser"


def test_what_cannot_be_converted(osp: Callable[..., Any], tiny_model: Path, tmp_path: Path) -> None:
    lora = write(tiny_model, tmp_path, "diffusers")
    common = ("--lora", lora, "--out", tmp_path / "out.safetensors")
    loha = tmp_path / "loha.safetensors"
    save_file({"lora_unet_proj_out.hada_w1_a": torch.ones(1)}, loha)
    for words, message in (
        (("convert", *common, "--to", "lora-kohya"), "caption_projection takes"),
        (("convert", *common), "--lora FILE goes with --to lora,"),
        (("convert", *common[2:], "--to", "lora"), "--lora FILE goes with --to lora,"),
        (("convert", *common, "--to", "lora", "--tp", 2), "leave out --tp"),
        (("convert", *common, "--to", "lora", "--vae", tiny_model), "leave out --vae"),
        (("convert", "--lora", lora, "--out", "a", "--to", "lora"), "use a.safetensors"),
        (("inspect", loha), "hada_w1_a is of LoHa: only LoRA and DoRA"),
        (("inspect", lora), "caption_projection takes"),
        (("inspect", tiny_model, "--model", tiny_model), "is not a LoRA"),
    ):
        outcome = osp(*words)
        assert (outcome.code, message in outcome.err) == (2, True), outcome
    assert not (tmp_path / "out.safetensors").exists()
