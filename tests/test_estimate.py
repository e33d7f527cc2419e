"""What a step needs, by formula, against what is alive in a real one, and against real weights."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from tiny_models import FOUR_HEADS
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opensoraplan.defaults import Weights
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.wfvae import WFVAE
from opensoraplan.parallel.apply import parallelize, share_sample
from opensoraplan.parallel.collectives import ALL_GATHER, REDUCE_SCATTER
from opensoraplan.parallel.mesh import Mesh, MeshSettings
from opensoraplan.parallel.shards import local
from opensoraplan.plan.estimate import (
    Job,
    Model,
    Shape,
    cache_bytes,
    cheapest_mesh,
    collectives_of_block,
    collectives_outside,
    decoding_memory,
    devices_of,
    forward_memory,
    kept_by_block,
    kept_outside,
    sent_by_step,
    training_memory,
)
from opensoraplan.runtime.quantisation import keep_weights

GRID, TEXT, BATCH = (4, 8, 16), 6, 2
RELEASE_GRID = (16, 72, 128)
ONE = MeshSettings(dp_shard=1)
COLLECTIVES = {
    "all_to_all": "all_to_all_single",
    "all_gather": ALL_GATHER,
    "reduce_scatter": REDUCE_SCATTER,
    "all_reduce": "all_reduce",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Alive(TorchDispatchMode):
    """Counts bytes of storages that operations made and that something still refers to: tensors saved for
    backward, and what recompute's closures hold, which hooks of saved tensors do not see. `peak` is the most
    after any operation.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def bytes(self) -> int:
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return sum(size for _, size in self._made.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                made = self._made.get(storage._cdata)
                if storage._cdata not in self._known and (made is None or made[0].expired()):
                    self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self.peak = max(self.peak, self.bytes())
        return output


def counted(job: Job, *, grid: tuple[int, int, int], text: int, **changes: object) -> tuple[int, int]:
    """Bytes that a real forward pass and its loss keep for backward, and the most of a step, but for weights
    and what is handed in.
    """
    config, dtype = {**FOUR_HEADS, **changes}, DTYPES[job.compute]
    model = nn.Module.to(SparseUMMDiT(**config), dtype).train()
    model.set_attention_backend("native")  # as on accelerators: no scores are kept
    model.set_recompute(
        blocks=job.recompute_blocks,
        feed_forwards=job.recompute_feed_forwards,
        keep_attention=job.keep_attention,
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
    of_job = {field.name for field in fields(Job)} & set(changes)
    recompute = {name: changes.pop(name) for name in of_job}
    job = Job(compute=compute, master=compute, **recompute)
    model, shape = Model({**FOUR_HEADS, **changes}), Shape(grid, text, BATCH)
    kept, peak = counted(job, grid=grid, text=text, **changes)
    predicted = sum(kept_by_block(model, shape, ONE, job)) + kept_outside(model, shape, ONE, job)
    assert predicted == pytest.approx(kept, rel=0.01)
    memory = training_memory(model, shape, ONE, job)
    most = memory.peak - memory.parameters - memory.optimizer - memory.ema
    assert most == pytest.approx(peak, rel=0.06)


@pytest.mark.parametrize(("compute", "kind"), [("fp32", "whole"), ("bf16", "whole"), ("bf16", "fp8")])
def test_a_forward_pass_needs_what_is_alive_at_most(compute: Literal["fp32", "bf16"], kind: Weights) -> None:
    dtype, shape = DTYPES[compute], Shape((4, 16, 16), 8)
    model = nn.Module.to(SparseUMMDiT(**FOUR_HEADS), dtype).eval()
    keep_weights(model, kind)
    inputs = torch.randn(1, 4, *shape.grid), torch.rand(1), torch.randn(1, 8, 12), torch.randn(1, 10)
    with torch.no_grad(), Alive(*model.parameters(), *model.buffers()) as alive:
        model(*(tensor.to(dtype) for tensor in inputs))
    assert forward_memory(Model(FOUR_HEADS), shape, compute, kind=kind) == pytest.approx(alive.peak, rel=0.15)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("chunk", "tiling"), [(1, None), (4, None), (16, None), (1, (256, 64)), (4, (512, 64))]
)
def test_decoding_needs_what_is_alive_at_most(
    chunk: int, tiling: tuple[int, int] | None, compute: Literal["fp32", "bf16"]
) -> None:
    dtype = DTYPES[compute]
    with torch.device("meta"):
        vae, latents = nn.Module.to(WFVAE(), dtype), torch.randn(1, 32, *RELEASE_GRID, dtype=dtype)
    vae.enable_streaming(latent_frames=chunk)
    if tiling is not None:
        vae.enable_tiling(tile_size=tiling[0], tile_overlap=tiling[1])
    with torch.no_grad(), Alive(*vae.parameters()) as alive:
        for pixels in vae.iter_decode(latents):
            del pixels
    predicted = decoding_memory(Shape(RELEASE_GRID, 1), compute, chunk=chunk, tiling=tiling)
    assert predicted == pytest.approx(alive.peak, rel=0.05 if tiling is None else 0.1)


def test_parameters_are_those_of_the_release() -> None:
    model, shape, job = Model({}), Shape(RELEASE_GRID, 512), Job()
    assert model.numbers() == 8_504_661_120
    alone = training_memory(model, shape, ONE, job)
    assert alone.parameters == 8_504_661_120 * (4 + 2)  # and bf16 copies
    assert alone.optimizer == 2 * alone.gradients == 8 * 8_504_661_120
    eight = training_memory(model, shape, MeshSettings(dp_shard=8), job)
    assert eight.parameters * 8 == pytest.approx(4 * 8_504_661_120, rel=1e-3)


def test_recompute_and_sharing_need_less() -> None:
    model, shape = Model({}), Shape(RELEASE_GRID, 512)

    def need(job: Job, **sizes: int) -> int:
        return training_memory(model, shape, MeshSettings(**{"dp_shard": 1, **sizes}), job).peak

    plain, feed_forwards, blocks = Job(), Job(recompute_feed_forwards=32), Job(recompute_blocks=32)
    assert need(blocks, dp_shard=8) < need(feed_forwards, dp_shard=8) < need(plain, dp_shard=8)
    assert need(plain, sp=8) < need(plain, sp=4, dp_shard=2) < need(plain, dp_shard=8)
    assert need(Job(cpu_offload=True), sp=8) < need(plain, sp=8)
    assert need(Job(ema="host"), dp_shard=8) < need(plain, dp_shard=8)
    assert need(Job(accumulate=2), dp_shard=8) > need(plain, dp_shard=8)  # gradients are there from the start


def test_collectives_of_a_block_count_what_each_kind_of_parallelism_sends() -> None:
    model, shape, job = Model(FOUR_HEADS), Shape((4, 8, 16), 8, BATCH), Job(compute="fp32")
    block = model.blocks[0]
    tokens, numbers = 4 * 4 * 8, 4 * BATCH * 64
    sp = collectives_of_block(model, block, shape, MeshSettings(dp_shard=1, sp=4), job)
    exchanged = [one.sent for one in sp if one.kind == "all_to_all"]
    assert exchanged == [tokens // 4 * numbers * 3 // 4] * 8  # q, k, v, output; and back
    tp = collectives_of_block(model, block, shape, MeshSettings(dp_shard=1, tp=4), job)
    whole = [one.whole for one in tp if one.whole == tokens * numbers]
    assert len(whole) == 8  # a gather and a sum around attention and feed-forward; and back
    both = collectives_of_block(model, block, shape, MeshSettings(dp_shard=1, sp=2, tp=2), job)
    assert {one.group for one in both} == {"sp", "tp"}
    assert not collectives_of_block(model, block, shape, MeshSettings(dp_shard=4), job)
    assert sent_by_step(model, shape, ONE, job) == 0


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
        dist.init_process_group("fake", rank=0, world_size=devices_of(settings), store=FakeStore())
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
    settings, job = MeshSettings(**{"dp_shard": 1, **sizes}), Job(compute="fp32")
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

    model, shape = Model(FOUR_HEADS), Shape(grid, TEXT, BATCH)
    assert model.numbers(tp=settings.tp) == sum(weight.numel() for weight in weights)
    predicted = sum(kept_by_block(model, shape, settings, job)) + kept_outside(model, shape, settings, job)
    assert predicted == pytest.approx(kept, rel=0.01)
    collectives = collectives_outside(model, shape, settings, job)
    for block in model.blocks:
        collectives += collectives_of_block(model, block, shape, settings, job)
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
    predicted = Model(FOUR_HEADS).numbers(tp=settings.tp, shards=settings.dp_shard * settings.sp)
    assert predicted == sum(local(weight).numel() for weight in network.parameters())


def test_the_cheapest_mesh_has_the_fewest_devices() -> None:
    model, shape, job = Model(FOUR_HEADS), Shape(GRID, TEXT, BATCH), Job()
    need = training_memory(model, shape, ONE, job).peak
    assert cheapest_mesh(model, shape, job, memory=need) == ONE
    smaller = cheapest_mesh(model, shape, job, memory=need - 1)
    assert training_memory(model, shape, smaller, job).peak < need
    assert smaller.dp_replicate * smaller.dp_shard * smaller.sp * smaller.tp > 1


def test_memory_that_no_mesh_fits_into_says_what_is_needed() -> None:
    for most in (4, 16):
        refused = rf"no mesh of up to {most} devices fits into 0\.0 GB: the least is"
        with pytest.raises(ValueError, match=refused):
            cheapest_mesh(Model(FOUR_HEADS), Shape(GRID, TEXT, BATCH), Job(), memory=1000, most_devices=most)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Model({"heads": 4}), "unknown key in the model's config: 'heads'"),
        (lambda: Shape((1, 3, 4), 8).tokens(2), "multiples of 2, got 3 x 4"),
        (lambda: Job(recompute_blocks=2, recompute_feed_forwards=1).check(Model(FOUR_HEADS)), "not both"),
        (
            lambda: Job(recompute_blocks=7).check(Model(FOUR_HEADS)),
            "between 0 and 6, the model's blocks, got 7",
        ),
        (
            lambda: training_memory(Model(FOUR_HEADS), Shape(GRID, 8), MeshSettings(dp_shard=1, sp=3), Job()),
            "must divide the model's 4 attention heads",
        ),
        (
            lambda: training_memory(Model(FOUR_HEADS), Shape(GRID, 8), ONE, Job(cpu_offload=True)),
            "at least 2 devices",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_cache_holds_latents_whatever_else_a_denoiser_takes() -> None:
    shape = Shape(GRID, TEXT)
    assert cache_bytes(Model({**FOUR_HEADS, "in_channels": 9}), shape) == cache_bytes(
        Model(FOUR_HEADS), shape
    )
