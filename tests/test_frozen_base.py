"""The frozen base of a LoRA, in few bits or streamed from the host: what is kept of it, what is learned."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapter import LORA, denoiser_of, logged, velocity
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from opensoraplan.defaults import BasePrecision
from opensoraplan.models.sizes import DenoiserSizes
from opensoraplan.models.strict import plain_config
from opensoraplan.runtime.nf4 import Nf4Linear
from opensoraplan.runtime.quantisation import (
    Fp8Linear,
    Int8Linear,
    QuantisedLinear,
    quantise_weights,
    weight_precision_of,
)
from opensoraplan.train.config import TrainSettings
from opensoraplan.train.learner.building import build
from opensoraplan.train.run import checkpoint
from opensoraplan.train.run.export import ExportOptions, export_run
from opensoraplan.train.run.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")
MakeRun = Callable[..., TrainSettings]
CPU = torch.device("cpu")
STREAMED = {"placement": "streamed"}


def parts_of(run: TrainSettings, step: int) -> dict[str, dict[str, Tensor]]:
    return {part: dict(tensors) for part, tensors in checkpoint.load(run.output, step).parts.items()}


def assert_same(one: TrainSettings, two: TrainSettings, *, step: int) -> None:
    """Both runs have logged and learned the same, bit for bit."""
    assert logged(one) == logged(two)
    assert logged(one, "grad_norm") == logged(two, "grad_norm")
    first, second = parts_of(one, step), parts_of(two, step)
    assert set(first) == set(second) == {"model", "ema", "optimizer"}
    for part, tensors in first.items():
        assert set(tensors) == set(second[part])
        assert all(torch.equal(tensor, second[part][name]) for name, tensor in tensors.items()), part


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_what_is_frozen_is_in_the_precision_that_it_computes_in(
    tiny_run: MakeRun, tiny_model: Path, compute: str
) -> None:
    run = tiny_run(adapter=LORA, model={"compute": compute})
    model = build(run, device=CPU)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[compute]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {dtype}
    whole = denoiser_of(tiny_model)
    assert sum(p.numel() for p in frozen) == sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize(
    ("base", "compute"),
    [("int8", "fp32"), ("int8", "bf16"), ("fp8", "bf16"), ("nf4", "fp32"), ("nf4", "bf16")],
)
def test_a_base_is_quantised_as_a_whole_model_is(
    tiny_run: MakeRun, tiny_model: Path, base: BasePrecision, compute: str
) -> None:
    """Though tensor by tensor, as they are read."""
    model = build(tiny_run(adapter={**LORA, "base": base}, model={"compute": compute}), device=CPU)
    assert weight_precision_of(model) == base
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[compute]
    expected = denoiser_of(tiny_model)
    nn.Module.to(expected, dtype)
    quantise_weights(expected, base)
    theirs = dict(expected.named_buffers())
    ours = {name.replace(".base_layer", ""): buffer for name, buffer in model.named_buffers()}
    assert set(ours) == set(theirs) != set()
    assert all(torch.equal(buffer, theirs[name]) for name, buffer in ours.items())


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_four_bits_take_what_is_predicted(tiny_model: Path, compute: str) -> None:
    model = denoiser_of(tiny_model)
    nn.Module.to(model, {"fp32": torch.float32, "bf16": torch.bfloat16}[compute])
    quantise_weights(model, "nf4")
    stored = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert stored == DenoiserSizes(plain_config(model)).stored(compute, kind="nf4")


# Of each kind, how far gradients may be off.
CLOSE: dict[type[QuantisedLinear], float] = {Int8Linear: 0.01, Fp8Linear: 0.05, Nf4Linear: 0.11}


@pytest.mark.parametrize("kind", CLOSE)
def test_gradients_of_inputs_are_those_of_the_dequantised_weight(kind: type[QuantisedLinear]) -> None:
    linear = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    small, generator = kind(linear), torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 64, generator=generator).bfloat16().requires_grad_()
    y = small(x)
    with torch.no_grad():
        assert torch.equal(small(x), y)
    direction = torch.randn(y.shape, generator=generator).bfloat16()
    (gradient,) = torch.autograd.grad(y, x, direction)
    expected = direction.float() @ linear.weight.float()
    off = (gradient.float() - expected).abs().mean() / expected.abs().mean()
    assert CLOSE[kind] / 10 < off < CLOSE[kind]


@pytest.mark.parametrize(("base", "compute"), [("int8", "fp32"), ("fp8", "bf16"), ("nf4", "fp32")])
def test_a_base_in_few_bits_learns_and_goes_on(
    tiny_run: MakeRun, tmp_path: Path, tiny_model: Path, base: str, compute: str
) -> None:
    common: dict[str, Any] = {"adapter": {**LORA, "base": base}, "model": {"compute": compute}}
    common["checkpoint"] = {"every": 1}
    optimizer = {"lr": 0.02, "ema_decay": 0.9}
    undisturbed = tiny_run("whole", **common, optimizer={**optimizer, "steps": 2})
    train(undisturbed)
    train(tiny_run("broken", **common, optimizer={**optimizer, "steps": 1}))
    resumed = tiny_run("broken", **common, optimizer={**optimizer, "steps": 2})
    train(resumed, resume="latest")
    assert_same(undisturbed, resumed, step=2)
    assert all(".lora_" in name for name in parts_of(resumed, 2)["model"])
    exact = tiny_run("exact", adapter=LORA, model={"compute": compute}, optimizer={**optimizer, "steps": 1})
    train(exact)
    assert logged(resumed)[0] != logged(exact)[0]
    assert logged(resumed)[0] == pytest.approx(logged(exact)[0], rel=0.05)
    # It is merged into the weights as they were before.
    export_run(resumed.output, tmp_path / "merged", ExportOptions(to="diffusers"))
    export_run(resumed.output, tmp_path / "a.safetensors")
    model = denoiser_of(tiny_model)
    model.load_lora_adapter(tmp_path / "a.safetensors")
    expected = velocity(denoiser_of(tmp_path / "merged"))
    torch.testing.assert_close(velocity(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "memory"),
    [
        ({"adapter": {**LORA, "dropout": 0.3}, "model": {"compute": "bf16"}}, {}),
        ({"adapter": {**LORA, "base": "int8"}}, {"keep_attention": True}),
        ({"adapter": {**LORA, "base": "nf4"}, "model": {"compute": "bf16"}}, {}),
        ({"adapter": {"kind": "dora", "rank": 2}}, {}),
    ],
    ids=["bf16 with dropout", "int8", "NF4", "DoRA"],
)
def test_streamed_training_equals_resident_training(
    tiny_run: MakeRun, tiny_model: Path, changes: dict[str, Any], memory: dict[str, Any]
) -> None:
    blocks = len(denoiser_of(tiny_model).transformer_blocks)
    optimizer = {"steps": 2, "lr": 1e-3, "ema_decay": 0.9, "accumulate": 2}
    data = {"batch_size": 1}
    resident = tiny_run(
        "resident", **changes, data=data, optimizer=optimizer, memory={"recompute_blocks": blocks, **memory}
    )
    streamed = tiny_run("streamed", **changes, data=data, optimizer=optimizer, memory={**STREAMED, **memory})
    train(resident)
    train(streamed)
    assert_same(resident, streamed, step=2)


def test_a_streamed_run_validates(tiny_run: MakeRun, tiny_clips: Path) -> None:
    held_out: dict[str, Any] = {"every": 2, "manifest": tiny_clips, "samples": 2, "sigmas": (0.5,)}
    held_out |= {"prompts": ("a star",), "frames": 9, "height": 32, "width": 32, "sampling_steps": 2}
    runs = {
        name: tiny_run(name, adapter=LORA, optimizer={"steps": 2}, validation=held_out, memory=memory)
        for name, memory in (("resident", {"recompute_blocks": 8}), ("streamed", STREAMED))
    }
    for run in runs.values():
        train(run)
    assert logged(runs["resident"], "validation_loss") == logged(runs["streamed"], "validation_loss")
    assert_same(*runs.values(), step=2)
    videos = [(run.output / "samples" / "step-00000002-0.mp4").read_bytes() for run in runs.values()]
    assert videos[0] == videos[1]


def test_what_is_chosen_where_there_is_room_is_what_is_fastest(tiny_run: MakeRun) -> None:
    chosen = tiny_run("auto", adapter={**LORA, "base": "auto"}, memory={"placement": "auto"})
    given = tiny_run("given", adapter=LORA)
    for run in (chosen, given):
        train(run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"steps": 2})}))
    assert_same(chosen, given, step=2)


def test_a_resumed_run_keeps_the_precision_that_was_chosen(tiny_run: MakeRun) -> None:
    """Though another one would be chosen now: its checkpoint is like that of a run in less memory."""
    auto = {"adapter": {**LORA, "base": "auto"}, "memory": {"placement": "auto"}}
    run = tiny_run(**auto, optimizer={"steps": 2})
    train(run)
    state = checkpoint.path_of(run.output, 2) / checkpoint.STATE
    began = json.loads(state.read_text())
    assert began["base"] == "whole"
    state.write_text(json.dumps({**began, "base": "int8"}))
    train(tiny_run(**auto, optimizer={"steps": 4}), resume="latest")
    assert checkpoint.load(run.output, 4).state["base"] == "int8"


class Copies(TorchDispatchMode):
    """Counts copies of whole blocks, which are bytes."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        self.count += func is torch.ops.aten.copy_.default and args[0].dtype == torch.uint8
        return func(*args, **(kwargs or {}))


def test_blocks_are_copied_once_each_way(tiny_run: MakeRun) -> None:
    """The last two are still there for backward, and the first two for the next step."""
    model = build(tiny_run(adapter=LORA, memory=STREAMED), device=CPU).train()
    depth, config, counts = len(model.transformer_blocks), model.config, []
    for _ in range(3):
        with Copies() as copies:
            model(
                torch.randn(1, config["in_channels"], 3, 8, 8),
                torch.tensor([500.0]),
                torch.randn(1, 6, config["caption_channels"]),
                torch.randn(1, config["pooled_projection_dim"]),
            ).sample.sum().backward()
        counts.append(copies.count)
    assert counts == [2 * depth - 2, 2 * depth - 4, 2 * depth - 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"adapter": {"kind": "dora", "base": "int8"}},
            'kind "dora" reads the weights whole, got base "int8"',
        ),
        ({"adapter": {"base": "int8"}}, 'base needs kind = "lora" or "dora"'),
        ({"memory": STREAMED}, 'all weights are trained: set adapter.kind to "lora"'),
        ({"adapter": {**LORA, "base": "auto"}}, 'adapter.base "auto" is chosen with memory.placement "auto"'),
        (
            {"memory": {"encoders": "in-turn"}, "data": {"manifest": None, "features": "features"}},
            'memory.encoders "in-turn" has no effect: data.features are encoded',
        ),
        ({"memory": {"inputs_on_host": True}}, "inputs_on_host is about recompute_blocks, which is 0"),
        (
            {"memory": {"placement": "auto", "recompute_blocks": 2}},
            'recompute_blocks is chosen by placement "auto"',
        ),
        (
            {"adapter": LORA, "memory": {**STREAMED, "compile": True}},
            'compile does not go with placement "streamed"',
        ),
    ],
)
def test_settings_that_do_not_go_together(tiny_run: MakeRun, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_run(**changes)


def test_fp8_in_fp32_is_refused_before_anything_is_read(tiny_run: MakeRun) -> None:
    run = tiny_run(adapter={**LORA, "base": "fp8"})
    with pytest.raises(ValueError, match="fp8 weights need dtype bf16, got float32"):
        train(run)
    assert not run.output.exists()


def test_nf4_without_bitsandbytes_is_refused_before_anything_is_read(
    tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    run = tiny_run(adapter={**LORA, "base": "nf4"}, vae={"pretrained": "nowhere"})
    with pytest.raises(
        ValueError, match=r"nf4 needs the package bitsandbytes .*opensoraplan\[bitsandbytes\]"
    ):
        train(run)
    assert not run.output.exists()
