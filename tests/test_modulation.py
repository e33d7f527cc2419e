"""AdaLN vectors made beforehand: the bits that each step would make, and no weights on the device."""

import pytest
import torch
from torch import Tensor, nn

from opensoraplan.defaults import WeightPrecision
from opensoraplan.generate.planning import needs_of
from opensoraplan.models.modulation import (
    HostLayer,
    adaln_layers,
    is_kept_on_host,
    keep_on_host,
    modulations,
)
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.pipeline import OpenSoraPlanPipeline
from opensoraplan.requests import Request
from opensoraplan.runtime.quantisation import quantise_weights

CPU = torch.device("cpu")


def inputs_of(model: SparseUMMDiT, *, batch: int, seed: int) -> dict[str, Tensor]:
    config, source = model.config, torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source).to(model.dtype)

    return {
        "hidden_states": noise(batch, config["in_channels"], 2, 4, 8),
        "timestep": torch.full((batch,), 900.0 - 100 * seed),
        "encoder_hidden_states": noise(batch, 5, config["caption_channels"]),
        "pooled_projections": noise(batch, config["pooled_projection_dim"]),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["whole", "int8"])
@torch.no_grad()
def test_each_condition_has_the_bits_of_its_own_forward_pass(
    pipeline: OpenSoraPlanPipeline, dtype: torch.dtype, kind: WeightPrecision
) -> None:
    model = pipeline.transformer.to(dtype)
    quantise_weights(model, kind)
    calls = [inputs_of(model, batch=batch, seed=seed) for seed, batch in enumerate((1, 2, 1))]
    expected = [model(**call).sample for call in calls]

    keep_on_host(model)
    conditions = [(call["timestep"], call["pooled_projections"]) for call in calls]
    made = modulations(model, conditions, device=CPU)
    for call, modulation, sample in zip(calls, made, expected, strict=True):
        assert torch.equal(model(**call, modulation=modulation).sample, sample)
        assert torch.equal(model(**call).sample, sample)  # a layer on the host can be used as it is
    assert not torch.equal(model(**calls[0], modulation=made[2]).sample, expected[0])


def test_the_layers_do_not_move_with_the_model(pipeline: OpenSoraPlanPipeline) -> None:
    model = pipeline.transformer
    needs = needs_of(pipeline, Request(prompt="a", frames=9, height=32, width=32))
    assert not is_kept_on_host(model)
    keep_on_host(model)
    keep_on_host(model)  # once more changes nothing
    assert is_kept_on_host(model)
    assert sum(p.numel() * p.element_size() for p in model.parameters()) == needs.denoiser - needs.adaln
    model.to("meta")
    x = torch.ones(1, model.config["timestep_embed_dim"])
    for adaln in adaln_layers(model):
        assert isinstance(adaln.linear, HostLayer)
        assert adaln.linear(x).device == CPU


def test_vectors_take_what_is_predicted(pipeline: OpenSoraPlanPipeline) -> None:
    call = inputs_of(pipeline.transformer, batch=1, seed=0)
    conditions = [(call["timestep"], call["pooled_projections"])] * 6  # three guided steps
    made = modulations(pipeline.transformer, conditions, device=CPU)
    tensors = [t for one in made for t in (*(t for pair in one.blocks for t in pair), one.out)]
    needs = needs_of(pipeline, Request(prompt="a", frames=9, height=32, width=32, steps=3))
    assert sum(t.numel() * t.element_size() for t in tensors) == needs.vectors


def test_a_pipeline_asks_for_all_vectors_before_its_first_step(pipeline: OpenSoraPlanPipeline) -> None:
    keep_on_host(pipeline.transformer)
    calls: list[nn.Module] = []
    for adaln in adaln_layers(pipeline.transformer):
        adaln.linear.register_forward_hook(lambda module, _args, _out: calls.append(module))
    for batched in (False, True):
        pipeline(
            "a red ball",
            num_frames=9,
            height=32,
            width=32,
            num_inference_steps=3,
            guidance_interval=(0.0, 0.5),
            batched_guidance=batched,
            seed=0,
            output_type="latent",
        )
    assert not calls
