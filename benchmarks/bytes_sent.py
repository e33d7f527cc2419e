"""What ranks of one sample send each other: counted in real collectives, against the formulas of `osp plan`.

    python benchmarks/bytes_sent.py

Four gloo processes train a small denoiser for one step on each mesh; every collective is counted,
in the block that calls it, forward and backward. The last column is what the same formulas say of
the release's blocks.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from opensoraplan.models.sizes import BatchShape, DenoiserSizes
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.parallel.apply import share_sample
from opensoraplan.parallel.collectives import ALL_GATHER, REDUCE_SCATTER
from opensoraplan.parallel.mesh import Mesh, MeshSettings
from opensoraplan.plan.step import TrainingOptions, TrainingStep
from opensoraplan.plan.traffic import Collective, collectives_of_block, collectives_outside

RANKS = 4
MESHES = {"tp 4": {"tp": 4}, "sp 4": {"sp": 4}, "sp 2 x tp 2": {"sp": 2, "tp": 2}}
SMALL = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 8,
    "attention_head_dim": 32,
    "num_layers": [2, 2, 2],
    "sparse_n": [1, 2, 1],
    "caption_channels": 32,
    "pooled_projection_dim": 32,
    "timestep_embed_dim": 64,
}
GRID, TEXT = (4, 16, 16), 32
# 121 x 576 x 1024, in bf16.
RELEASE_GRID, RELEASE_TEXT = (16, 72, 128), 512
OUTSIDE = "outside"
# What a rank sends, in parts of the collective's largest tensor and of all ranks but itself.
TIMES = {ALL_GATHER: 1, REDUCE_SCATTER: 1, "all_reduce": 2, "all_to_all_single": 1}


class Meter:
    """Counts what this rank sends, by the block under way."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.unit = OUTSIDE

    def watch(self, model: SparseUMMDiT) -> None:
        for name, times in TIMES.items():
            setattr(dist, name, self._counting(getattr(dist, name), times))
        for index, block in enumerate(model.transformer_blocks):
            block.register_forward_pre_hook(self._entering(index))
            block.register_full_backward_pre_hook(self._entering(index))
            block.register_forward_hook(self._leaving)
            block.register_full_backward_hook(self._leaving)

    def _counting(self, run: Callable[..., object], times: int) -> Callable[..., object]:
        def collective(*args: Any, group: dist.ProcessGroup, **kwargs: Any) -> object:  # noqa: ANN401
            whole = max(arg.nbytes for arg in args if isinstance(arg, Tensor))
            self.sent[self.unit] += times * whole * (group.size() - 1) // group.size()
            return run(*args, group=group, **kwargs)

        return collective

    def _entering(self, index: int) -> Callable[..., None]:
        def enter(*_: object) -> None:
            self.unit = str(index)

        return enter

    def _leaving(self, *_: object) -> None:
        self.unit = OUTSIDE


def count(rank: int, meeting: str, sizes: dict[str, int], answer: str) -> None:
    """Train one step as one of the ranks; the first writes what it has sent."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    model = SparseUMMDiT(**SMALL).train()
    share_sample(model, Mesh.build(MeshSettings(dp_shard=1, **sizes), device_type="cpu"))
    meter = Meter()
    meter.watch(model)
    latents, text = torch.randn(1, SMALL["in_channels"], *GRID), torch.randn(1, TEXT, 32)
    (velocity,) = model(latents, torch.rand(1) * 1000, text, torch.randn(1, 32), return_dict=False)
    velocity.square().mean().backward()
    if rank == 0:
        Path(answer).write_text(json.dumps(meter.sent))
    dist.destroy_process_group()


def bytes_of(collectives: list[Collective]) -> int:
    return sum(one.sent for one in collectives)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    small, release = DenoiserSizes(SMALL), DenoiserSizes({})
    print(f"{'mesh':<14}{'block':<16}{'counted KB':>12}{'formula KB':>12}{'off':>8}{'release MB':>12}")
    for name, sizes in MESHES.items():
        with tempfile.TemporaryDirectory() as folder:
            answer = str(Path(folder) / "sent.json")
            mp.spawn(count, (str(Path(folder) / "meeting"), sizes, answer), nprocs=RANKS)
            counted = json.loads(Path(answer).read_text())
        mesh = MeshSettings(dp_shard=1, **sizes)
        step = TrainingStep(small, BatchShape(GRID, TEXT), mesh, TrainingOptions(compute="fp32"))
        large = TrainingStep(release, BatchShape(RELEASE_GRID, RELEASE_TEXT), mesh)
        wanted = {
            str(index): (
                f"{index}: rate {block.rate}" + ", skip" * block.skip,
                bytes_of(collectives_of_block(step, block)),
                bytes_of(collectives_of_block(large, release.blocks[-1 if block.last else 0])),
            )
            for index, block in enumerate(small.blocks)
        }
        wanted[OUTSIDE] = (
            OUTSIDE,
            bytes_of(collectives_outside(step)),
            bytes_of(collectives_outside(large)),
        )
        for unit, (label, formula, of_release) in wanted.items():
            off = counted.get(unit, 0) / formula - 1
            print(
                f"{name:<14}{label:<16}{counted.get(unit, 0) / 1e3:>12.1f}{formula / 1e3:>12.1f}"
                f"{off:>+8.1%}{of_release / 1e6:>12.1f}"
            )


if __name__ == "__main__":
    main()
