"""What `osp inspect` says of a checkpoint, and how the config is told from the tensors."""

import argparse
import inspect
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensoraplan.formats.assemble import export_denoiser
from opensoraplan.formats.describe import describe
from opensoraplan.formats.infer import class_of_tensors, infer_denoiser_config, infer_vae_config
from opensoraplan.models import original
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.wfvae import WFVAE

GOLDEN = Path(__file__).parent / "golden"


def lines_of(path: Path) -> dict[str, str]:
    """The description as a dict, lines without a name of their own left out."""
    pairs = (line.split(":", 1) for line in describe(path).splitlines() if not line.startswith(" "))
    return {name: text.strip() for name, text in pairs}


def release_shapes(name: str) -> dict[str, tuple[int, ...]]:
    keys = json.loads((GOLDEN / name).read_text(encoding="utf-8"))
    return {key: tuple(shape) for key, shape in keys.items()}


def defaults(model: type[SparseUMMDiT] | type[WFVAE]) -> dict[str, Any]:
    found = {name: p.default for name, p in inspect.signature(model).parameters.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def test_a_release(tiny_release: Path) -> None:
    lines = lines_of(tiny_release / "model_ema.pt")
    config = lines.pop("config")
    assert lines == {
        "what": "SparseUMMDiT, denoiser",
        "dialect": "release",
        "dtype": "float32",
        "parameters": "989,392 in 306 tensors",
        "EMA": "none",
        "tensor parallel": "1",
        "pipeline parallel": "1",
        "tensors": "complete",
        "note": "the file has no Skiparse rates",
    }
    assert "num_attention_heads=4, attention_head_dim=16," in config
    assert "num_layers=[2, 4, 2]" in config

    lines = lines_of(tiny_release / "wfvae.ckpt")
    assert lines["what"] == "WFVAE, VAE"
    assert lines["EMA"] == "these weights"
    assert lines["tensors"] == "complete, and 48 that are not needed"
    assert lines["note"] == "the file has no shift and scale of the latents"
    assert "latent_channels=4" in lines["config"]


def test_diffusers_components(tiny_model: Path) -> None:
    lines = lines_of(tiny_model / "transformer")
    assert (lines["what"], lines["dialect"]) == ("SparseUMMDiT, denoiser", "diffusers")
    assert lines["tensors"] == "complete"
    assert "sparse_n=[1, 2, 1]" in lines["config"]
    assert "_class_name" not in lines["config"]
    assert "note" not in lines
    lines = lines_of(tiny_model / "vae")
    assert (lines["what"], lines["tensors"]) == ("WFVAE, VAE", "complete")
    assert "shift=[-0.2, 0.1, 0.6, -0.9]" in lines["config"]


def test_megatron_shards(tiny_model: Path, tmp_path: Path) -> None:
    export_denoiser(tiny_model, tmp_path / "shards", tensor_parallel=2)
    lines = lines_of(tmp_path / "shards")
    assert (lines["dialect"], lines["iteration"]) == ("megatron", "release")
    assert (lines["tensor parallel"], lines["pipeline parallel"]) == ("2", "1")
    assert lines["tensors"] == "complete, and 6 that are not needed"
    assert lines["parameters"] == "989,392 in 306 tensors"


def test_other_names_and_mixed_dtypes(tiny_release: Path, tmp_path: Path) -> None:
    weights = torch.load(tiny_release / "model_ema.pt", weights_only=True)
    renamed = {name.replace("attn1.to_q.", "attn1.proj_q."): v.bfloat16() for name, v in weights.items()}
    renamed["proj_out.bias"] = weights["proj_out.bias"]
    arguments = argparse.Namespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    folder = tmp_path / "iter_0001000" / "mp_rank_00"
    folder.mkdir(parents=True)
    torch.save({"ema_model": renamed, "model": renamed, "args": arguments}, folder / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1000")
    lines = lines_of(tmp_path)
    assert lines["dialect"] == "megatron, MindSpeed-MM's names"
    assert (lines["iteration"], lines["dtype"], lines["EMA"]) == (
        "1000",
        "bfloat16, float32",
        "these weights",
    )

    save_file(renamed, tmp_path / "model.safetensors")
    assert lines_of(tmp_path / "model.safetensors")["dialect"] == "safetensors, MindSpeed-MM's names"


def test_what_does_not_fit_is_listed(tiny_release: Path, tmp_path: Path) -> None:
    weights = torch.load(tiny_release / "model_ema.pt", weights_only=True)
    weights["extra"] = torch.ones(2)
    del weights["proj_out.bias"]
    path = tmp_path / "model.pt"
    torch.save(weights, path)
    text = describe(path)
    assert (
        f"2 tensors do not fit SparseUMMDiT ({path}):\n  missing proj_out.bias [16]\n  unexpected extra [2]"
        in text
    )


def test_what_is_no_checkpoint_of_ours(tiny_model: Path, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match=r"other\.pt: these are the tensors of neither a SparseUMMDiT nor a WFVAE: w"
    ):
        describe(tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"is a whole pipeline: give .*transformer or .*vae"):
        describe(tiny_model)
    with pytest.raises(FileNotFoundError):
        describe(tmp_path / "nowhere")


def test_configs_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    """What a user writes into config.json of a component is checked as a config, with the path."""
    save_file(
        load_file(tiny_model / "transformer/diffusion_pytorch_model.safetensors"), tmp_path / "w.safetensors"
    )
    config = json.loads((tiny_model / "transformer/config.json").read_text())
    for change, problem in (
        ({"norm_class": "layer_norm"}, r"unknown key in {}/config\.json: 'norm_class'.*'norm_cls'"),
        ({"num_layers": [2, 3, 2]}, r"{}: .*even number of layers"),
        ({"num_attention_heads": None}, r"{}/config\.json: num_attention_heads: .*valid integer, got None"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=problem.format(re.escape(str(tmp_path)))):
            describe(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 2}))
    assert "tensors do not fit SparseUMMDiT" in lines_of(tmp_path)["tensors"]


def test_release_sizes_are_recognised() -> None:
    shapes = release_shapes("transformer_original_keys.json")
    assert class_of_tensors(shapes) is SparseUMMDiT
    expected = defaults(SparseUMMDiT)
    assert infer_denoiser_config(shapes) == {k: v for k, v in expected.items() if k != "norm_eps"}
    shapes = release_shapes("wfvae_original_keys.json")
    assert class_of_tensors(shapes) is WFVAE
    expected = defaults(WFVAE)
    assert infer_vae_config(shapes) == {k: v for k, v in expected.items() if k not in ("shift", "scale")}


def test_a_file_of_the_releases_size(tmp_path: Path) -> None:
    """Only its names and shapes are written, and nothing of it is read but the filters."""

    def write(name: str, values: dict[str, Tensor]) -> Path:
        blank = {
            key: torch.empty(shape, dtype=torch.bfloat16)
            for key, shape in release_shapes(name).items()
            if key not in values
        }
        with torch.serialization.skip_data():
            torch.save(blank | values, tmp_path / "model.pt")
        return tmp_path / "model.pt"

    lines = lines_of(write("transformer_original_keys.json", {}))
    assert lines["parameters"] == "8,504,661,120 (the release's size) in 1178 tensors"
    assert (lines["tensors"], lines["dtype"]) == ("complete", "bfloat16")
    assert lines["note"] == "the file has no Skiparse rates: those of the release are shown"
    assert "sparse_n=[1, 2, 4, 8, 4, 2, 1]" in lines["config"]
    (tmp_path / "model.pt").unlink()


@pytest.mark.parametrize(
    ("double_ff", "skip", "zero_init", "norm"),
    list(itertools.product([True, False], [True, False], [True, False], ["layer_norm", "rms_norm"])),
)
def test_denoiser_configs_are_told(double_ff: bool, skip: bool, zero_init: bool, norm: str) -> None:
    config: dict[str, Any] = {
        "num_attention_heads": 3,
        "attention_head_dim": 32,
        "in_channels": 4,
        "out_channels": 6,
        "num_layers": [2, 4, 6, 2, 2],
        "double_ff": double_ff,
        "caption_channels": 8,
        "pooled_projection_dim": 12,
        "timestep_embed_dim": 16,
        "patch_size": 1,
        "norm_cls": norm,
        "skip_connection": skip,
        "skip_connection_zero_init": zero_init or not skip,  # without skips nothing tells
    }
    with torch.device("meta"):
        model = SparseUMMDiT(sparse_n=None, **config)
    form = model.original_format()
    shapes = {form.rename(name): tuple(value.shape) for name, value in model.state_dict().items()}
    assert infer_denoiser_config(shapes) == config
    assert infer_denoiser_config({**shapes, **form.unread}) == config


def test_vae_configs_are_told() -> None:
    for change in (
        {},
        {"base_channels": 16, "latent_channels": 6},
        {"encoder_num_resblocks": 3, "decoder_num_resblocks": 1},
        {"connect_res_layer_num": 2, "encoder_energy_flow_hidden_size": 12},
        {"decoder_energy_flow_hidden_size": 20},
    ):
        config = {
            "base_channels": 8,
            "latent_channels": 4,
            "encoder_num_resblocks": 2,
            "decoder_num_resblocks": 2,
            "encoder_energy_flow_hidden_size": 8,
            "decoder_energy_flow_hidden_size": 8,
            "connect_res_layer_num": 1,
        } | change
        with torch.device("meta"):
            model = WFVAE(**config, shift=None, scale=None)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        assert infer_vae_config(shapes) == {**config, "shift": None, "scale": None}


@pytest.mark.parametrize("case", ["suv_dense_image", "suv_padded_batch", "suv_sparse", "wfvae"])
def test_golden_weights(case: str) -> None:
    """The configs of the goldens are told from their weights, but for what no weight depends on."""
    shapes = {n: tuple(v.shape) for n, v in load_file(GOLDEN / case / "weights.safetensors").items()}
    config = json.loads((GOLDEN / case / "config.json").read_text())
    if class_of_tensors(shapes) is WFVAE:
        assert infer_vae_config(shapes) == original.vae_config(config)
    else:
        told = infer_denoiser_config(shapes)
        expected = original.denoiser_config(config)
        assert told == {key: expected[key] for key in told}
        assert set(expected) - set(told) == {"sparse_n", "norm_eps"}
