"""What both models promise: round trips, strict configs, bf16, compile equal to
eager, nothing on the side.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file, save_file
from tiny_models import DENOISER, VAE
from torch import Tensor

from opensoraplan.models.initial_weights import initial_weights
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.wfvae import WFVAE
from opensoraplan.runtime.compiling import compile_blocks

KINDS = {"denoiser": (SparseUMMDiT, DENOISER), "vae": (WFVAE, {**VAE, "shift": None, "scale": [2.0] * 4})}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[type[ModelMixin], dict]:
    torch.manual_seed(0)
    return KINDS[request.param]


def build(kind: tuple[type[ModelMixin], dict]) -> ModelMixin:
    model_class, config = kind
    return model_class(**config).eval()


@torch.no_grad()
def run(model: ModelMixin) -> Tensor:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(model.dtype)

    if isinstance(model, WFVAE):
        latents = model.encode(noise(1, 3, 9, 32, 32)).latent_dist.mode()
        return model.decode(latents).sample
    timestep = torch.tensor([700.0, 30.0])
    return model(noise(2, 4, 3, 6, 10), timestep, noise(2, 7, 24), noise(2, 20)).sample


def test_save_and_load_are_bit_equal(kind: tuple[type[ModelMixin], dict], tmp_path: Path) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for name in ("whole", "sharded"):
        loaded = kind[0].from_pretrained(tmp_path / name)
        assert not loaded.training
        assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
            k: v for k, v in model.config.items() if k[0] != "_"
        }
        weights, again = model.state_dict(), loaded.state_dict()
        assert weights.keys() == again.keys()
        assert all(torch.equal(weights[key], again[key]) for key in weights)
        assert torch.equal(run(loaded), run(model))


def test_from_config_gives_the_same_architecture(kind: tuple[type[ModelMixin], dict]) -> None:
    model = build(kind)
    again = kind[0].from_config(model.config)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in again.state_dict().items()}


def test_unknown_config_keys_are_errors(kind: tuple[type[ModelMixin], dict]) -> None:
    model_class, config = kind
    wrong, right = (
        ("norm_epz", "norm_eps") if model_class is SparseUMMDiT else ("latent_channel", "latent_channels")
    )
    with pytest.raises(ValueError, match=f"'{wrong}' .did you mean '{right}'"):
        model_class.from_config({**config, wrong: 1})
    with pytest.raises(TypeError, match="surprise"):
        model_class(**config, surprise=1)


def test_a_missing_or_strange_tensor_is_an_error(kind: tuple[type[ModelMixin], dict], tmp_path: Path) -> None:
    build(kind).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    weights["stranger"] = weights.pop(name)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"missing {name}\n  unexpected stranger"):
        kind[0].from_pretrained(tmp_path)


def test_bf16_is_near_fp32(kind: tuple[type[ModelMixin], dict]) -> None:
    model = build(kind)
    whole = run(model)
    half = run(model.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert ((half.float() - whole).norm() / whole.norm()) < 0.03


def test_layerwise_casting_stores_low_and_computes_high(kind: tuple[type[ModelMixin], dict]) -> None:
    model = build(kind)
    whole = run(model)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    stored = {module.weight.dtype for module in model.modules() if isinstance(module, torch.nn.Linear)}
    assert torch.bfloat16 in stored or kind[0] is WFVAE
    cast = run(model)
    assert cast.dtype == torch.float32
    assert 0 < ((cast - whole).norm() / whole.norm()) < 0.03


@torch.no_grad()
def velocity(model: SparseUMMDiT, grid: tuple[int, int, int], text_tokens: int, *, batch: int = 1) -> Tensor:
    """The same for the same arguments; in a batch, all texts but the first are shorter."""
    torch.manual_seed(0)
    inputs = torch.randn(batch, 4, *grid), torch.full((batch,), 500.0)
    text, pooled = torch.randn(batch, text_tokens, 24), torch.randn(batch, 20)
    mask = torch.ones(batch, text_tokens)
    mask[1:, text_tokens // 2 :] = 0
    return model(*inputs, text, pooled, mask, return_dict=False)[0]


@pytest.fixture
def deep_model() -> SparseUMMDiT:
    model = SparseUMMDiT(**{**DENOISER, "num_layers": [2, 2, 2, 2, 2], "sparse_n": [1, 2, 4, 2, 1]}).eval()
    model.load_state_dict(dict(initial_weights(model, seed=0)))
    torch.compiler.reset()
    return model


def counting(graphs: list[torch.fx.GraphModule]) -> Callable[..., object]:
    """A backend that runs graphs as they are and keeps them in the list."""

    def keep(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    return keep


def test_blocks_compile_to_few_graphs_and_stay_compiled(deep_model: SparseUMMDiT) -> None:
    """Four whatever the size and the prompt. Other kinds of inputs make more, up to more than torch compiles
    by itself, which would end in eager code without a word.
    """
    graphs: list[torch.fx.GraphModule] = []
    usual = [((4, 8, 8), 5, 1), ((4, 8, 8), 9, 1), ((8, 8, 16), 7, 1)]
    # One text token (an empty prompt), a grid that is padded to the rates, texts of several lengths.
    others = [((4, 8, 8), 1, 1), ((3, 6, 6), 5, 1), ((4, 8, 8), 5, 2)]

    def velocities(cases: list[tuple[tuple[int, int, int], int, int]]) -> list[Tensor]:
        return [velocity(deep_model, grid, text, batch=batch) for grid, text, batch in cases]

    eager = velocities([*usual, *others])
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        deep_model.compile_repeated_blocks(fullgraph=True, backend=counting(graphs))
        compiled = velocities(usual)
        assert 1 <= len(graphs) <= 4
        compiled += velocities(others)
    assert len(graphs) > 8
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_blocks_of_a_job_never_become_eager_in_silence(deep_model: SparseUMMDiT) -> None:
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        compile_blocks(deep_model, backend="eager")
        assert torch._dynamo.config.fail_on_recompile_limit_hit


def test_building_a_model_changes_nothing_around_it(kind: tuple[type[ModelMixin], dict]) -> None:
    gelu, default = torch.nn.GELU.forward, torch.get_default_dtype()
    build(kind)
    assert torch.nn.GELU.forward is gelu
    assert torch.get_default_dtype() == default


def test_set_attention_backend_reaches_every_block() -> None:
    # diffusers makes a model's backend that of the whole process; the context gives the old one back.
    with attention_backend("native"):
        model = build(KINDS["denoiser"])
        eager = run(model)
        model.set_attention_backend("_native_math")
        assert {str(p._attention_backend) for p in model.attn_processors.values()} == {
            "AttentionBackendName._NATIVE_MATH"
        }
        assert len(model.attn_processors) == sum(DENOISER["num_layers"])
        torch.testing.assert_close(run(model), eager)
