"""The original's config keys and tensor names: the release's own lists, and what does not belong to them."""

import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import DENOISER
from torch import Tensor, nn

from opensoraplan.models import original
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.wfvae import WFVAE

GOLDEN = Path(__file__).parent / "golden"
DENOISERS = ["suv_dense_image", "suv_padded_batch", "suv_sparse"]


def read(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return read(f"{name}/config.json"), load_file(GOLDEN / name / "weights.safetensors")


def original_shapes(model: SparseUMMDiT | WFVAE) -> dict[str, list[int]]:
    """Everything that the original's file of a model has, by its names."""
    form = model.original_format()
    learned = {form.rename(name): list(value.shape) for name, value in model.state_dict().items()}
    assert len(learned) == len(model.state_dict())
    return learned | {name: list(value.shape) for name, value in form.fixed.items()}


def small(**changes: Any) -> SparseUMMDiT:  # noqa: ANN401 (our constructor's arguments)
    layers = {"num_layers": [2, 2, 4, 2, 2], "sparse_n": None}
    with torch.device("meta"):
        return SparseUMMDiT(**{**DENOISER, **layers, **changes})


# --- Names --------------------------------------------------------------------------------------------------


def test_release_denoiser_has_exactly_the_releases_tensors() -> None:
    with torch.device("meta"):
        model = SparseUMMDiT()
    keys = read("transformer_original_keys.json")
    assert original_shapes(model) == keys
    assert len(keys) == 1178
    assert sum(value.numel() for value in model.state_dict().values()) == 8_504_661_120


def test_release_vae_has_exactly_the_releases_tensors() -> None:
    with torch.device("meta"):
        model = WFVAE()
    assert original_shapes(model) == read("wfvae_original_keys.json")
    assert sum(value.numel() for value in model.state_dict().values()) == 227_035_624
    fixed = model.original_format().fixed
    for start in ("encoder.wavelet_transform_", "decoder.inverse_wavelet_transform_"):
        assert sum(value.numel() for name, value in fixed.items() if name.startswith(start)) == 192
    assert len(fixed) == 48
    assert {abs(v) for value in fixed.values() for v in value.flatten().tolist()} == {
        torch.tensor(0.3536).item()
    }


@pytest.mark.parametrize("name", DENOISERS)
def test_golden_denoisers(name: str) -> None:
    config, weights = golden(name)
    model = SparseUMMDiT.from_original(config, weights)
    assert original_shapes(model) == {key: list(value.shape) for key, value in weights.items()}
    rename = model.original_format().rename
    assert all(torch.equal(value, weights[rename(key)]) for key, value in model.state_dict().items())
    ours, _ = original.DENOISER_KEYS["sparse_n"]
    assert model.config[ours] == (config["sparse_n"] if config["sparse1d"] else None)


def test_golden_vae() -> None:
    config, weights = golden("wfvae")
    model = WFVAE.from_original(config, weights)
    assert original_shapes(model) == {key: list(value.shape) for key, value in weights.items()}
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert model.config["shift"] is None


def test_flat_blocks_and_skip_linears() -> None:
    layers = [2, 4, 6, 4, 2]  # first blocks 0, 2, 6, 12, 16
    names = {
        "patch_embed.proj.bias": "patch_embed.proj.bias",
        "transformer_blocks.0.norm1.linear.bias": "transformer_blocks.0.0.norm1.linear.bias",
        "transformer_blocks.5.norm1.linear.bias": "transformer_blocks.1.3.norm1.linear.bias",
        "transformer_blocks.17.ff.net.2.weight": "transformer_blocks.4.1.ff.net.2.weight",
        "transformer_blocks.12.skip.linear.weight": "skip_norm_linear.0.1.weight",
        "transformer_blocks.12.skip_enc.norm.bias": "skip_norm_linear_enc.0.0.bias",
        "transformer_blocks.16.skip.norm.weight": "skip_norm_linear.1.0.weight",
    }
    for ours, theirs in names.items():
        assert original.denoiser_name(ours, num_layers=layers) == theirs
    # What such a denoiser does not have stays as it is, to be reported by the name that it has in the file.
    for name in (
        "transformer_blocks.18.ff.net.2.weight",
        "transformer_blocks.x.ff.net.2.weight",
        "transformer_blocks.13.skip.linear.weight",
        "transformer_blocks.2.skip.linear.weight",
    ):
        assert original.denoiser_name(name, num_layers=layers) == name


@pytest.mark.parametrize("double_ff", [True, False])
def test_tensors_of_tensor_parallel_checkpoints_that_nothing_reads(double_ff: bool) -> None:
    unread = small(double_ff=double_ff).original_format().unread
    last = "transformer_blocks.4.1."
    wanted: dict[str, tuple[int, ...]] = {
        f"{last}attn1.to_add_out.weight": (32, 32),
        f"{last}attn1.to_add_out.bias": (32,),
    }
    if double_ff:
        wanted |= {
            f"{last}ff_enc.net.0.proj.weight": (128, 32),
            f"{last}ff_enc.net.2.weight": (32, 128),
            f"{last}norm2.norm_enc.weight": (32,),
            f"{last}norm2.norm_enc.bias": (32,),
        }
    assert unread == wanted


# --- Config keys --------------------------------------------------------------------------------------------


def test_dense() -> None:
    config = {"num_layers": [2, 2, 2], "sparse_n": [1, 2, 1]}
    assert original.denoiser_config(config)["sparse_n"] == [1, 2, 1]
    assert original.denoiser_config({**config, "sparse1d": True})["sparse_n"] == [1, 2, 1]
    assert original.denoiser_config({**config, "sparse1d": False})["sparse_n"] is None


def test_keys_that_change_nothing() -> None:
    config = {"num_layers": [2], "sparse_n": [1]}
    others = {"norm_elementwise_affine": False, "from_pretrained": None, "dtype": "bf16"}
    assert original.denoiser_config({**config, **others}) == original.denoiser_config(config)
    assert original.vae_config({"use_tiling": False, "dtype": "fp16"}) == {"shift": None, "scale": None}


@pytest.mark.parametrize(
    ("translate", "key", "value", "supported"),
    [
        (original.denoiser_config, key, value, supported)
        for key, value, supported in [
            ("dropout", 0.1, "0.0"),
            ("attention_bias", False, "True"),
            ("patch_size_t", 2, "1"),
            ("activation_fn", "geglu", "'gelu-approximate'"),
            ("model_id", "videodit", "'SparseUMMDiT'"),
        ]
    ]
    + [
        (original.vae_config, key, value, supported)
        for key, value, supported in [
            ("model_id", "casualvae", "'wfvae'"),
            ("dropout", 0.1, "0.0"),
            ("norm_type", "groupnorm", "'layernorm'"),
            ("l1_dowmsample_block", "Downsample", "'Spatial2xTime2x3DDownsample'"),
            ("l2_upsample_block", "Upsample", "'Spatial2xTime2x3DUpsample'"),
            ("t_interpolation", "nearest", "'trilinear'"),
            ("use_attention", False, "True"),
            ("vae_scale_factor", [4, 8, 8], "[8, 8, 8]"),
        ]
    ],
)
def test_other_models_are_refused(translate: Any, key: str, value: object, supported: str) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match="the config of the ") as caught:
        translate({key: value})
    assert f"{key} = {value!r} is not part of v1.5.0; only {supported} is supported" in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "2", None, [2]])
def test_numbers_that_are_none(value: object) -> None:
    with pytest.raises(ValueError, match="num_heads must be a whole number above 0, got "):
        original.denoiser_config({"num_heads": value})
    with pytest.raises(ValueError, match=r"num_layers must be a list of whole numbers above 0, got \[2, "):
        original.denoiser_config({"num_layers": [2, value]})


def test_unknown_keys_of_both_models() -> None:
    _, weights = golden("suv_sparse")
    with pytest.raises(
        ValueError, match=r"unknown key in the config of the denoiser: 'num_head' .*'num_heads'"
    ):
        SparseUMMDiT.from_original({"num_head": 2}, weights)
    with pytest.raises(
        ValueError, match=r"unknown key in the config of the VAE: 'latent_dims' .*'latent_dim'"
    ):
        WFVAE.from_original({"latent_dims": 2}, weights)


# --- Loading ------------------------------------------------------------------------------------------------


def test_dtypes_of_loaded_weights() -> None:
    config, weights = golden("suv_sparse")
    mixed = {n: v.bfloat16() if n.startswith("transformer_blocks") else v for n, v in weights.items()}
    kept = SparseUMMDiT.from_original(config, mixed)
    assert {value.dtype for value in kept.transformer_blocks[0].parameters()} == {torch.bfloat16}
    assert kept.proj_out.weight.dtype == torch.float32
    half = SparseUMMDiT.from_original(config, mixed, dtype=torch.float16)
    assert {value.dtype for value in half.parameters()} == {torch.float16}
    assert torch.equal(half.proj_out.weight, weights["proj_out.weight"].half())
    assert all(isinstance(value, nn.Parameter) and value.requires_grad for value in kept.parameters())
    assert mixed["proj_out.weight"] is weights["proj_out.weight"]


def test_plain_dicts_that_do_not_fit() -> None:
    config, weights = golden("suv_sparse")
    name = "transformer_blocks.2.1.attn1.norm_q.weight"
    wrong = {
        **{n: value for n, value in weights.items() if n != name},
        "proj_out.bias": weights["proj_out.bias"][:-1],
        "extra": torch.ones(2, 3),
    }
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole text is compared)
        SparseUMMDiT.from_original(config, wrong)
    assert str(caught.value).splitlines() == [
        "3 tensors do not fit SparseUMMDiT:",
        f"  missing {name} [16]",
        "  unexpected extra [2, 3]",
        "  proj_out.bias is [15], the config needs [16]",
    ]
    with pytest.raises(ValueError, match="tensors do not fit SparseUMMDiT"):
        SparseUMMDiT.from_original(config, {})


def test_unread_tensors_need_their_shape(caplog: pytest.LogCaptureFixture) -> None:
    config, weights = golden("suv_sparse")
    last = "transformer_blocks.4.1.attn1.to_add_out.bias"
    assert last not in weights
    with caplog.at_level(logging.INFO):
        model = SparseUMMDiT.from_original(config, {**weights, last: torch.ones(32)})
    assert [record.getMessage() for record in caplog.records] == [
        f"dropped 1 tensors that nothing reads: {last}"
    ]
    assert len(model.state_dict()) == len(weights)
    with pytest.raises(ValueError, match=r"to_add_out\.bias is \[33\], the config needs \[32\]"):
        SparseUMMDiT.from_original(config, {**weights, last: torch.ones(33)})


def test_altered_constants() -> None:
    config, weights = golden("wfvae")
    name = "decoder.inverse_wavelet_transform_l2.gh_v"
    with pytest.raises(ValueError, match=f"these fixed tensors do not have the values .*: {name}$"):
        WFVAE.from_original(config, {**weights, name: weights[name] + 3e-4})
    half = {n: value.half() for n, value in weights.items()}
    assert len(WFVAE.from_original(config, half).state_dict()) == len(weights) - 48


@pytest.mark.parametrize(
    ("double_ff", "skip", "zero_init", "norm"),
    list(itertools.product([True, False], [True, False], [True, False], ["layer_norm", "rms_norm"])),
)
def test_every_architecture_comes_back(double_ff: bool, skip: bool, zero_init: bool, norm: str) -> None:
    """Names are told apart and shapes suffice, whatever the switches say."""
    switches: dict[str, Any] = {
        "double_ff": double_ff,
        "skip_connection": skip,
        "skip_connection_zero_init": zero_init,
        "norm_cls": norm,
    }
    model = small(num_layers=[2, 2, 2], **switches)
    weights = {n: torch.zeros(shape) for n, shape in original_shapes(model).items()}
    config: dict[str, Any] = {"num_heads": 2, "head_dim": 16, "in_channels": 4, "out_channels": 4}
    config |= {"num_layers": [2, 2, 2], "sparse_n": [1] * 3, "caption_channels": 24}
    config |= {"pooled_projection_dim": 20, "timestep_embed_dim": 32}
    loaded = SparseUMMDiT.from_original({**config, **switches}, weights)
    assert sum(math.prod(v.shape) for v in weights.values()) == sum(v.numel() for v in loaded.parameters())


def test_loaded_weights_begin_where_torch_lets_tensors_begin() -> None:
    """Else results differ in the last bit from process to process."""
    crooked = torch.arange(20.0)[1:]
    assert crooked.data_ptr() % 64
    straight = original.aligned(crooked)
    assert straight.data_ptr() % 64 == 0
    assert torch.equal(straight, crooked)
    assert original.aligned(straight) is straight
