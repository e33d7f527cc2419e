"""What a step needs, by formula, against what is alive in a real one, and against real weights."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from alive import Alive
from tiny_models import FOUR_HEADS
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from opensoraplan.models.sizes import BatchShape, DenoiserSizes
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.parallel.apply import parallelize, share_sample
from opensoraplan.parallel.collectives import ALL_GATHER, REDUCE_SCATTER
from opensoraplan.parallel.mesh import Mesh, MeshSettings
from opensoraplan.parallel.shards import local
from opensoraplan.plan.activations import kept_by_block, kept_outside
from opensoraplan.plan.memory import training_memory
from opensoraplan.plan.mesh_search import cheapest_mesh
from opensoraplan.plan.step import ONE_DEVICE, TrainingOptions, TrainingStep
from opensoraplan.plan.traffic import Collective, collectives_of_block, collectives_outside, sent_by_step

GRID, TEXT, BATCH = (4, 8, 16), 6, 2
RELEASE_GRID = (16, 72, 128)
COLLECTIVES = {
    "all_to_all": "all_to_all_single",
    "all_gather": ALL_GATHER,
    "reduce_scatter": REDUCE_SCATTER,
    "all_reduce": "all_reduce",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def counted(
    options: TrainingOptions, *, grid: tuple[int, int, int], text: int, **changes: object
) -> tuple[int, int]:
    """Bytes that a real forward pass and its loss keep for backward, and the most of a step, but for weights
    and what is handed in.
    """
    config, dtype = {**FOUR_HEADS, **changes}, DTYPES[options.compute]
    model = nn.Module.to(SparseUMMDiT(**config), dtype).train()
    model.set_attention_backend("native")  # as on accelerators: no scores are kept
    model.set_recompute(
        blocks=options.recompute_blocks,
        feed_forwards=options.recompute_feed_forwards,
        keep_attention=options.keep_attention,
    )
    latents, target = torch.randn(BATCH, 4, *grid), torch.randn(BATCH, 4, *grid)
    states, pooled = torch.randn(BATCH, text, 12, dtype=dtype), torch.randn(BATCH, 10, dtype=dtype)
    timestep, noisy = torch.rand(BATCH) * 1000, latents.to(dtype)
    with Alive(*model.parameters(), latents, noisy, target, timestep) as alive:
        (output,) = model(noisy, timestep, states, pooled, return_dict=False)
        loss = (output.float() - target).square().flatten(1).mean(1).mean()
        del output
        kept = alive.bytes()
        loss.backward()
    return kept, alive.peak


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all blocks again": {"recompute_blocks": 6},
    "some blocks again": {"recompute_blocks": 3},
    "all but attention again": {"recompute_blocks": 6, "keep_attention": True},
    "feed-forwards again": {"recompute_feed_forwards": 6},
    "one feed-forward": {"double_ff": False, "recompute_feed_forwards": 4},
    "dense": {"sparse_n": None, "recompute_blocks": 6},
    "padded, other rates": {"sparse_n": [1, 4, 2], "grid": (3, 6, 10)},
    "sparse from the start": {"sparse_n": [2, 4, 2], "recompute_blocks": 6},
    "long text": {"text": 70},
    "rms, normed skips": {"norm_cls": "rms_norm", "skip_connection_zero_init": False},
    "no skips": {"skip_connection": False},
}


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_activations_are_what_a_forward_pass_keeps(case: str, compute: Literal["fp32", "bf16"]) -> None:
    changes = dict(CASES[case])
    grid, text = changes.pop("grid", GRID), changes.pop("text", TEXT)
    of_options = {field.name for field in fields(TrainingOptions)} & set(changes)
    recompute = {name: changes.pop(name) for name in of_options}
    options = TrainingOptions(compute=compute, master=compute, **recompute)
    step = TrainingStep(
        DenoiserSizes({**FOUR_HEADS, **changes}), BatchShape(grid, text, BATCH), options=options
    )
    kept, peak = counted(options, grid=grid, text=text, **changes)
    predicted = sum(kept_by_block(step)) + kept_outside(step)
    assert predicted == pytest.approx(kept, rel=0.01)
    memory = training_memory(step)
    most = memory.peak - memory.parameters - memory.optimizer - memory.ema
    assert most == pytest.approx(peak, rel=0.06)


def test_parameters_are_those_of_the_release() -> None:
    model, shape = DenoiserSizes({}), BatchShape(RELEASE_GRID, 512)
    assert model.numbers() == 8_504_661_120
    alone = training_memory(TrainingStep(model, shape))
    assert alone.parameters == 8_504_661_120 * (4 + 2)  # and bf16 copies
    assert alone.optimizer == 2 * alone.gradients == 8 * 8_504_661_120
    eight = training_memory(TrainingStep(model, shape, MeshSettings(dp_shard=8)))
    assert eight.parameters * 8 == pytest.approx(4 * 8_504_661_120, rel=1e-3)


def test_recompute_and_sharing_need_less() -> None:
    model, shape = DenoiserSizes({}), BatchShape(RELEASE_GRID, 512)

    def need(options: TrainingOptions, **sizes: int) -> int:
        mesh = MeshSettings(**{"dp_shard": 1, **sizes})
        return training_memory(TrainingStep(model, shape, mesh, options)).peak

    plain, feed_forwards, blocks = (
        TrainingOptions(),
        TrainingOptions(recompute_feed_forwards=32),
        TrainingOptions(recompute_blocks=32),
    )
    assert need(blocks, dp_shard=8) < need(feed_forwards, dp_shard=8) < need(plain, dp_shard=8)
    assert need(plain, sp=8) < need(plain, sp=4, dp_shard=2) < need(plain, dp_shard=8)
    assert need(TrainingOptions(cpu_offload=True), sp=8) < need(plain, sp=8)
    assert need(TrainingOptions(ema="host"), dp_shard=8) < need(plain, dp_shard=8)
    assert need(TrainingOptions(accumulate=2), dp_shard=8) > need(
        plain, dp_shard=8
    )  # gradients are there from the start


def test_collectives_of_a_block_count_what_each_kind_of_parallelism_sends() -> None:
    model, shape = DenoiserSizes(FOUR_HEADS), BatchShape((4, 8, 16), 8, BATCH)
    alone = TrainingStep(model, shape, options=TrainingOptions(compute="fp32"))

    def collectives(**sizes: int) -> list[Collective]:
        mesh = MeshSettings(**{"dp_shard": 1, **sizes})
        return collectives_of_block(replace(alone, mesh=mesh), model.blocks[0])

    tokens, numbers = 4 * 4 * 8, 4 * BATCH * 64
    sp = collectives(sp=4)
    exchanged = [one.sent for one in sp if one.kind == "all_to_all"]
    assert exchanged == [tokens // 4 * numbers * 3 // 4] * 8  # q, k, v, output; and back
    tp = collectives(tp=4)
    whole = [one.whole for one in tp if one.whole == tokens * numbers]
    assert len(whole) == 8  # a gather and a sum around attention and feed-forward; and back
    both = collectives(sp=2, tp=2)
    assert {one.group for one in both} == {"sp", "tp"}
    assert not collectives(dp_shard=4)
    assert sent_by_step(alone) == 0


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[MeshSettings], tuple[Mesh, Counter[str]]]]:
    """Makes this process the first of a mesh whose collectives do nothing but are counted: "name bytes"."""
    sent: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., object]:
        run = getattr(dist, name)

        def collective(*args: Any, **kwargs: Any) -> object:  # noqa: ANN401
            whole = max(args[:2], key=lambda arg: arg.numel() if isinstance(arg, Tensor) else 0)
            sent[f"{name} {whole.nbytes}"] += 1
            return run(*args, **kwargs)

        return collective

    def make(settings: MeshSettings) -> tuple[Mesh, Counter[str]]:
        dist.init_process_group(
            "fake", rank=0, world_size=math.prod(settings.sizes().values()), store=FakeStore()
        )
        mesh = Mesh.build(settings, device_type="cpu")
        for name in COLLECTIVES.values():
            monkeypatch.setattr(dist, name, counting(name))
        return mesh, sent

    yield make
    monkeypatch.undo()
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [{"sp": 2}, {"tp": 2}, {"sp": 2, "tp": 2}], ids=str)
@pytest.mark.parametrize("grid", [GRID, (3, 6, 10)], ids=["whole", "padded"])
def test_ranks_keep_and_send_what_is_predicted(
    ranks: Callable[[MeshSettings], tuple[Mesh, Counter[str]]],
    sizes: dict[str, int],
    grid: tuple[int, int, int],
) -> None:
    settings = MeshSettings(**{"dp_shard": 1, **sizes})
    mesh, sent = ranks(settings)
    network = SparseUMMDiT(**FOUR_HEADS).train()
    share_sample(network, mesh)
    weights = [local(weight) for weight in network.parameters()]
    latents, states = torch.randn(BATCH, 4, *grid), torch.randn(BATCH, TEXT, 12)
    timestep, pooled = torch.rand(BATCH), torch.randn(BATCH, 10)
    with Alive(latents, states, timestep, pooled, *weights) as alive:
        (output,) = network(latents, timestep, states, pooled, return_dict=False)
        loss = (output - latents).square().mean()
        del output
        kept = alive.bytes()
    loss.backward()

    model, shape = DenoiserSizes(FOUR_HEADS), BatchShape(grid, TEXT, BATCH)
    step = TrainingStep(model, shape, settings, TrainingOptions(compute="fp32"))
    assert model.numbers(tp=settings.tp) == sum(weight.numel() for weight in weights)
    predicted = sum(kept_by_block(step)) + kept_outside(step)
    assert predicted == pytest.approx(kept, rel=0.01)
    collectives = collectives_outside(step)
    for block in model.blocks:
        collectives += collectives_of_block(step, block)
    assert sent == Counter(f"{COLLECTIVES[one.kind]} {one.whole}" for one in collectives)


@pytest.mark.parametrize(
    "sizes", [{"dp_shard": 3}, {"dp_shard": 2, "tp": 2}, {"dp_shard": 2, "sp": 2}], ids=str
)
def test_shards_have_as_many_numbers_as_predicted(
    ranks: Callable[[MeshSettings], tuple[Mesh, Counter[str]]], sizes: dict[str, int]
) -> None:
    settings = MeshSettings(**sizes)
    network = SparseUMMDiT(**FOUR_HEADS)
    parallelize(network, ranks(settings)[0], compute=torch.float32)
    predicted = DenoiserSizes(FOUR_HEADS).numbers(tp=settings.tp, shards=settings.dp_shard * settings.sp)
    assert predicted == sum(local(weight).numel() for weight in network.parameters())


def test_the_cheapest_mesh_has_the_fewest_devices() -> None:
    step = TrainingStep(DenoiserSizes(FOUR_HEADS), BatchShape(GRID, TEXT, BATCH))
    need = training_memory(step).peak
    assert cheapest_mesh(step, memory=need) == ONE_DEVICE
    smaller = cheapest_mesh(step, memory=need - 1)
    assert training_memory(replace(step, mesh=smaller)).peak < need
    assert smaller.dp_replicate * smaller.dp_shard * smaller.sp * smaller.tp > 1


def test_memory_that_no_mesh_fits_into_says_what_is_needed() -> None:
    step = TrainingStep(DenoiserSizes(FOUR_HEADS), BatchShape(GRID, TEXT, BATCH))
    for most in (4, 16):
        refused = rf"no mesh of up to {most} devices fits into 0\.0 GB: the least is"
        with pytest.raises(ValueError, match=refused):
            cheapest_mesh(step, memory=1000, most_devices=most)


def tiny_step(**changes: Any) -> TrainingStep:  # noqa: ANN401
    return TrainingStep(DenoiserSizes(FOUR_HEADS), BatchShape(GRID, 8), **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DenoiserSizes({"heads": 4}), "unknown key in the model's config: 'heads'"),
        (lambda: BatchShape((1, 3, 4), 8).tokens(2), "multiples of 2, got 3 x 4"),
        (
            lambda: TrainingOptions(recompute_blocks=2, recompute_feed_forwards=1).check(
                DenoiserSizes(FOUR_HEADS)
            ),
            "not both",
        ),
        (
            lambda: TrainingOptions(recompute_blocks=7).check(DenoiserSizes(FOUR_HEADS)),
            "between 0 and 6, the model's blocks, got 7",
        ),
        (
            lambda: training_memory(tiny_step(mesh=MeshSettings(dp_shard=1, sp=3))),
            "must divide the model's 4 attention heads",
        ),
        (
            lambda: training_memory(tiny_step(options=TrainingOptions(cpu_offload=True))),
            "at least 2 devices",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
