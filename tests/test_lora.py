"""LoRAs of every tool in the denoiser, with PEFT: the same weights from all files, or nothing."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import DENOISER
from torch import Tensor

from opensoraplan.models.lora_formats import to_peft
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.pipeline import OpenSoraPlanPipeline

# Rank and alpha of each layer: two ranks, an alpha that is not the rank, names that are others' beginnings.
LAYERS = {
    "transformer_blocks.1.attn1.to_q": (4, 2.0),
    "transformer_blocks.1.attn1.to_out.0": (4, 2.0),
    "transformer_blocks.3.attn1.add_q_proj": (4, 2.0),
    "transformer_blocks.3.ff_enc.net.0.proj": (2, 3.0),
    "transformer_blocks.3.ff.net.2": (4, 1.0),
    "transformer_blocks.4.skip.linear": (4, 2.0),
    "transformer_blocks.0.norm1.linear": (4, 2.0),
}


@pytest.fixture
def model() -> SparseUMMDiT:
    return SparseUMMDiT(**DENOISER).eval()


@torch.no_grad()
def run(model: SparseUMMDiT) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "hidden_states": (1, 4, 3, 8, 8),
        "encoder_hidden_states": (1, 6, 24),
        "pooled_projections": (1, 20),
    }
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return model(**tensors, timestep=torch.tensor([500.0])).sample


def factors(model: SparseUMMDiT, *, alpha: bool, dora: bool) -> dict[str, dict[str, Tensor]]:
    """Of each layer: down [rank, in], up [out, rank], alpha, or the rank if it is not wanted,
    and magnitude [out].
    """
    generator = torch.Generator().manual_seed(3)
    made = {}
    for name, (rank, value) in LAYERS.items():
        weight = model.get_submodule(name).weight
        made[name] = {
            "down": torch.randn(rank, weight.shape[1], generator=generator),
            "up": torch.randn(weight.shape[0], rank, generator=generator) / 4,
            "alpha": torch.tensor(value if alpha else float(rank)),
        }
        if dora:
            made[name]["magnitude"] = torch.rand(weight.shape[0], generator=generator) + 0.5
    return made


@torch.no_grad()
def merged(model: SparseUMMDiT, lora: dict[str, dict[str, Tensor]]) -> Tensor:
    """What the model gives with W + alpha / rank * up @ down, rows of DoRA's magnitude, as its weights."""
    whole = SparseUMMDiT(**DENOISER).eval()
    whole.load_state_dict(model.state_dict())
    for name, one in lora.items():
        weight = whole.get_submodule(name).weight
        weight += one["alpha"] / len(one["down"]) * one["up"] @ one["down"]
        if "magnitude" in one:
            weight *= (one["magnitude"] / weight.norm(dim=1))[:, None]
    return run(whole)


def config_of(lora: dict[str, dict[str, Tensor]], prefix: str = "") -> dict[str, Any]:
    """A LoraConfig of it, as tools write them beside tensors without alpha."""
    return {
        f"{prefix}peft_type": "LORA",
        f"{prefix}r": 4,
        f"{prefix}lora_alpha": 2,
        f"{prefix}rank_pattern": {name: len(one["down"]) for name, one in lora.items()},
        f"{prefix}alpha_pattern": {name: float(one["alpha"]) for name, one in lora.items()},
        f"{prefix}target_modules": sorted(lora),
        f"{prefix}use_dora": "magnitude" in next(iter(lora.values())),
    }


def named(lora: dict[str, dict[str, Tensor]], names: dict[str, str], prefix: str = "") -> dict[str, Tensor]:
    """The tensors that `names` has a name for, behind the layers'."""
    return {
        f"{prefix}{layer}.{name}": one[part].contiguous().clone()
        for layer, one in lora.items()
        for part, name in names.items()
        if part in one
    }


PEFT_NAMES = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
COMFY_NAMES = {"down": "lora_A.weight", "up": "lora_B.weight", "alpha": "alpha", "magnitude": "dora_scale"}
KOHYA_NAMES = {**COMFY_NAMES, "down": "lora_down.weight", "up": "lora_up.weight"}


def write_diffusers(lora: dict[str, dict[str, Tensor]], folder: Path) -> Path:
    header = {"lora_adapter_metadata": json.dumps(config_of(lora, "transformer."))}
    save_file(named(lora, PEFT_NAMES, "transformer."), folder / "pytorch_lora_weights.safetensors", header)
    return folder


def write_peft(lora: dict[str, dict[str, Tensor]], folder: Path) -> Path:
    save_file(named(lora, PEFT_NAMES, "base_model.model."), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config_of(lora)))
    return folder


def write_comfy(lora: dict[str, dict[str, Tensor]], folder: Path) -> Path:
    save_file(named(lora, COMFY_NAMES, "diffusion_model."), folder / "comfy.safetensors")
    return folder / "comfy.safetensors"


def write_kohya(lora: dict[str, dict[str, Tensor]], folder: Path) -> Path:
    tensors = {}
    for layer, one in lora.items():
        if "magnitude" in one:
            one["magnitude"] = one["magnitude"][:, None]
        tensors |= named({layer.replace(".", "_"): one}, KOHYA_NAMES, "lora_unet_")
    save_file(tensors, folder / "kohya.safetensors", {"ss_network_dim": "4", "ss_network_alpha": "2"})
    return folder / "kohya.safetensors"


FORMATS = {"diffusers": write_diffusers, "peft": write_peft, "comfy": write_comfy, "kohya": write_kohya}


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("alpha", [False, True], ids=["alpha is the rank", "alpha is another"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_weights(
    model: SparseUMMDiT, kind: str, alpha: bool, dora: bool, tmp_path: Path
) -> None:
    lora = factors(model, alpha=alpha, dora=dora)
    before, expected = run(model), merged(model, lora)
    model.load_lora_adapter(FORMATS[kind](lora, tmp_path), adapter_name="style")
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-5)
    model.disable_lora()
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_what_the_model_saves_it_loads(model: SparseUMMDiT, dora: bool, tmp_path: Path) -> None:
    lora = factors(model, alpha=True, dora=dora)
    other = SparseUMMDiT(**DENOISER).eval()
    other.load_state_dict(model.state_dict())
    model.load_lora_adapter(write_comfy(lora, tmp_path), adapter_name="style")
    model.save_lora_adapter(tmp_path / "saved", adapter_name="style")
    other.load_lora_adapter(tmp_path / "saved")
    assert torch.equal(run(other), run(model))


def test_what_peft_trains_the_model_loads(model: SparseUMMDiT, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "add_k_proj", "net.2"], use_rslora=True)
    trained = get_peft_model(model, config)
    with torch.no_grad():
        for name, value in trained.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.1)
    trained.save_pretrained(tmp_path)
    other = SparseUMMDiT(**DENOISER).eval()
    other.load_state_dict(before)
    other.load_lora_adapter(tmp_path)
    torch.testing.assert_close(run(other), run(model), atol=1e-5, rtol=1e-5)


def test_two_loras_have_strengths(model: SparseUMMDiT, tmp_path: Path) -> None:
    lora = factors(model, alpha=True, dora=False)
    for name, write in (("one", write_kohya), ("two", write_peft)):
        (tmp_path / name).mkdir()
        model.load_lora_adapter(write(lora, tmp_path / name), adapter_name=name)
    model.set_adapters(["one", "two"], [0.25, 0.75])
    torch.testing.assert_close(run(model), merged(model_without(model), lora), atol=1e-5, rtol=1e-5)


def test_a_model_is_saved_without_a_lora_or_with_its_weights(model: SparseUMMDiT, tmp_path: Path) -> None:
    lora = factors(model, alpha=True, dora=False)
    expected = merged(model, lora)
    model.load_lora_adapter(write_comfy(lora, tmp_path))
    with pytest.raises(ValueError, match=r"a LoRA is in the model: .*unload_lora\(\).*fuse_lora\(\)"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.fuse_lora()
    model.unload_lora()
    model.save_pretrained(tmp_path / "model")
    saved = SparseUMMDiT.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(run(saved), expected, atol=1e-5, rtol=1e-5)


def model_without(model: SparseUMMDiT) -> SparseUMMDiT:
    """The model as it was before LoRAs were put into it."""
    plain = SparseUMMDiT(**DENOISER)
    tensors = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    plain.load_state_dict({name: value for name, value in tensors.items() if ".lora_" not in name})
    return plain


def test_a_prefix_of_the_users_own(model: SparseUMMDiT) -> None:
    lora = factors(model, alpha=False, dora=False)
    expected = merged(model, lora)
    model.load_lora_adapter(named(lora, PEFT_NAMES, "mine."), prefix="mine")
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-5)


Change = Callable[[dict[str, Tensor]], object]
Q = "diffusion_model.transformer_blocks.1.attn1.to_q"
BROKEN: dict[str, tuple[Change, str]] = {
    "a block too many": (
        lambda t: t.update({Q.replace(".1.", ".99.") + ".lora_A.weight": torch.ones(4, 32)}),
        r"has|no linear layer transformer_blocks\.99\.attn1\.to_q",
    ),
    "a typing error": (
        lambda t: t.update({Q.replace("to_q", "to_qq") + ".lora_A.weight": torch.ones(4, 32)}),
        r"no linear layer .*to_qq \(did you mean '.*to_q'\?\)",
    ),
    "half of a pair": (lambda t: t.pop(f"{Q}.lora_B.weight"), "the up matrix of .*to_q is missing"),
    "no pair at all": (
        lambda t: t.update({Q.replace("to_q", "to_k") + ".alpha": torch.tensor(1.0)}),
        "the down and up matrix of .*to_k is missing",
    ),
    "another width": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 64)}),
        r"lora_A\.weight is \[4, 64\], .*to_q takes \[4, 32\]",
    ),
    "no matrix": (lambda t: t.update({f"{Q}.lora_A.weight": torch.tensor(1.0)}), r"is \[\], .* takes"),
    "rank 0": (
        lambda t: t.update(
            {f"{Q}.lora_A.weight": torch.ones(0, 32), f"{Q}.lora_B.weight": torch.ones(32, 0)}
        ),
        "has rank 0",
    ),
    "two names for one": (
        lambda t: t.update({f"{Q}.lora_down.weight": torch.ones(4, 32)}),
        "are both the down of .*to_q",
    ),
    "a convolution": (
        lambda t: t.update({"diffusion_model.patch_embed.proj.lora_A.weight": torch.ones(4, 4, 2, 2)}),
        r"no linear layer patch_embed\.proj",
    ),
    "something else": (lambda t: t.update({"step": torch.ones(1)}), "step is no tensor of a LoRA"),
    "a text encoder": (
        lambda t: t.update({"lora_te1_q.lora_up.weight": torch.ones(1, 1)}),
        "lora_te1_q.lora_up.weight is of a text encoder",
    ),
    "LoHa": (lambda t: t.update({f"{Q}.hada_w1_a": torch.ones(1)}), "hada_w1_a is of LoHa: only LoRA"),
    "LoKr": (lambda t: t.update({f"{Q}.lokr_w1": torch.ones(1)}), "lokr_w1 is of LoKr: only LoRA"),
    "OFT": (lambda t: t.update({f"{Q}.oft_blocks": torch.ones(1)}), "oft_blocks is of OFT: only LoRA"),
    "differences": (lambda t: t.update({f"{Q}.diff": torch.ones(32, 32)}), "whole differences of weights"),
    "some of DoRA": (
        lambda t: t.update({f"{Q}.dora_scale": torch.ones(32, 1)}),
        "the magnitude beside it is missing",
    ),
    "DoRA by inputs": (
        lambda t: t.update({f"{Q}.dora_scale": torch.ones(1, 32)}),
        r"dora_scale is \[1, 32\], .* takes \[32\]",
    ),
    "no alpha": (lambda t: t.update({f"{Q}.alpha": torch.tensor(math.nan)}), "alpha of .*to_q is nan"),
    "not a number": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.full((4, 32), math.nan)}),
        r"to_q\.lora_A\.weight has numbers that are not finite",
    ),
    "nothing": (lambda t: t.clear(), "it is empty"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_refused_whole(model: SparseUMMDiT, case: str, tmp_path: Path) -> None:
    change, message = BROKEN[case]
    before, names = run(model), list(model.state_dict())
    path = write_comfy(factors(model, alpha=True, dora=False), tmp_path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"comfy\.safetensors: (.|\n)*({message})"):
        model.load_lora_adapter(path)
    assert list(model.state_dict()) == names
    assert torch.equal(run(model), before)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "LOKR"}, "this adapter is LOKR by its settings"),
    "turned weights": ({"fan_in_fan_out": True}, "made with fan_in_fan_out True"),
    "whole modules": ({"modules_to_save": ["proj_out"]}, r"made with modules_to_save \['proj_out'\]"),
    "a changed base": ({"init_lora_weights": "pissa_niter_4"}, "began as 'pissa_niter_4', which changes"),
    "alpha in words": ({"lora_alpha": "four"}, "lora_alpha of a LoRA must be a number"),
    "alphas in a list": ({"alpha_pattern": [1]}, "alpha_pattern a table of numbers"),
    "no expression": ({"alpha_pattern": {"(": 1}}, "no regular expressions"),
    "two alphas": ({"lora_alpha": 64}, r"to_q\.alpha is 2, the settings beside it say 64"),
    "DoRA without": ({"use_dora": True}, "the magnitude beside it is missing"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be_kept_are_refused(model: SparseUMMDiT, case: str) -> None:
    settings, message = SETTINGS[case]
    lora = factors(model, alpha=True, dora=False)
    tensors = named(lora, COMFY_NAMES)
    with pytest.raises(ValueError, match=f"the state dict: (.|\n)*{message}"):
        model.load_lora_adapter(tensors, metadata={"lora_alpha": 2, **settings})


def test_many_faults_are_a_short_message(model: SparseUMMDiT) -> None:
    tensors = {f"transformer_blocks.9{i}.attn1.to_q.lora_A.weight": torch.ones(1, 1) for i in range(10)}
    with pytest.raises(ValueError, match="and 5 more") as caught:
        model.load_lora_adapter(tensors)
    assert len(str(caught.value).splitlines()) == 7


def test_files_that_are_no_loras(model: SparseUMMDiT, tmp_path: Path) -> None:
    lora = factors(model, alpha=True, dora=False)
    with pytest.raises(ValueError, match=r"there is no LoRA .*missing\.safetensors"):
        model.load_lora_adapter(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match=r"has no \.safetensors file"):
        model.load_lora_adapter(tmp_path)
    (tmp_path / "lora.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"read from \.safetensors files, got .*lora\.bin"):
        model.load_lora_adapter(tmp_path / "lora.bin")
    (tmp_path / "damaged.safetensors").write_bytes(b"not a header")
    with pytest.raises(ValueError, match=r"damaged\.safetensors is damaged"):
        model.load_lora_adapter(tmp_path)
    write_comfy(lora, tmp_path)
    with pytest.raises(ValueError, match=r"2 \.safetensors files: give weight_name, one of comfy.*, damaged"):
        model.load_lora_adapter(tmp_path)
    with pytest.raises(TypeError, match="takes no adapter"):
        model.load_lora_adapter(tmp_path, adapter="style")
    expected = merged(model, lora)
    model.load_lora_adapter(tmp_path, weight_name="comfy.safetensors")
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-5)


def test_a_repository_of_the_hub(model: SparseUMMDiT, tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--style"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    lora = factors(model, alpha=True, dora=False)
    write_peft(lora, snapshot)
    expected = merged(model, lora)
    model.load_lora_adapter("someone/style", cache_dir=tmp_path, local_files_only=True)
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-5)


def test_every_layer_has_the_pattern_of_its_own() -> None:
    """A layer's name is the end of another's, and dots are no wildcards."""
    linears = {"a.b": (2, 2), "c.a.b": (2, 2), "axb": (2, 2), "d": (2, 2)}
    ranks = {"a.b": 2, "c.a.b": 1, "axb": 1, "d": 1}
    tensors = {f"{name}.lora_A.weight": torch.ones(rank, 2) for name, rank in ranks.items()}
    tensors |= {f"{name}.lora_B.weight": torch.ones(2, rank) for name, rank in ranks.items()}
    weights, config = to_peft(tensors, linears)
    assert weights.keys() == tensors.keys()
    assert (config["r"], config["rank_pattern"]) == (1, {r"^a\.b": 2})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (1, {r"^a\.b": 2})


def test_a_pipeline_with_a_lora_makes_another_video(pipeline: OpenSoraPlanPipeline, tmp_path: Path) -> None:
    def video() -> Tensor:
        size = {"num_frames": 1, "height": 32, "width": 32, "num_inference_steps": 1}
        return pipeline("a fox", **size, seed=1, output_type="latent").frames

    pipeline.enable_model_cpu_offload(device="cpu")
    before = video()
    layer = pipeline.transformer.transformer_blocks[0].ff.net[2]
    tensors = {
        "lora_unet_transformer_blocks_0_ff_net_2.lora_down.weight": torch.ones(1, layer.in_features),
        "lora_unet_transformer_blocks_0_ff_net_2.lora_up.weight": torch.ones(layer.out_features, 1),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    pipeline.transformer.load_lora_adapter(tmp_path / "lora.safetensors", adapter_name="style")
    assert not torch.equal(video(), before)
    pipeline.transformer.unload_lora()
    assert torch.equal(video(), before)
