"""Peak memory of training steps on the CPU, measured against what `osp plan` predicts.

    OMP_NUM_THREADS=1 python benchmarks/plan_accuracy.py [NAME ...]

Each case is a process of its own, on one thread: model, fp32 weights, optimizer and EMA as the trainer has
them, then three steps. What is measured is how far the most memory that was ever resident (VmHWM) is above
that before the model was made. glibc is told to give what is freed back at once, or the measure would be of
its arenas.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from opensoraplan import flow
from opensoraplan.device import DTYPES
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.text import PromptEmbeds
from opensoraplan.parallel.estimate import Job, Model, Shape, training_memory
from opensoraplan.parallel.mesh import MeshSettings
from opensoraplan.train import objective
from opensoraplan.train.config import OptimizerSettings
from opensoraplan.train.ema import Ema
from opensoraplan.train.master import MasterWeights
from opensoraplan.train.optimizer import make_optimizer

STEPS = 3
SMALL: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": [2, 2, 2, 2, 2],
    "sparse_n": [1, 2, 4, 2, 1],
    "caption_channels": 256,
    "pooled_projection_dim": 128,
    "timestep_embed_dim": 256,
}
TOKENS = ((8, 32, 32), 64, 2)  # 2048 video tokens, 64 of text, batch 2
FEW = ((2, 16, 16), 64, 1)  # weights are most of it
CASES: dict[str, tuple[dict[str, Any], tuple[tuple[int, int, int], int, int], dict[str, Any]]] = {
    "fp32": ({}, TOKENS, {"compute": "fp32"}),
    "fp32, all blocks again": ({}, TOKENS, {"compute": "fp32", "recompute_blocks": 10}),
    "fp32, half of the blocks again": ({}, TOKENS, {"compute": "fp32", "recompute_blocks": 5}),
    "fp32, feed-forwards again": ({}, TOKENS, {"compute": "fp32", "recompute_feed_forwards": 10}),
    "fp32, dense, one feed-forward": (
        {"sparse_n": None, "double_ff": False},
        TOKENS,
        {"compute": "fp32", "recompute_blocks": 10},
    ),
    "fp32, few tokens": ({}, FEW, {"compute": "fp32"}),
    "fp32, few tokens, no EMA": ({}, FEW, {"compute": "fp32", "ema": None}),
    "bf16": ({}, TOKENS, {}),
    "bf16, all blocks again": ({}, TOKENS, {"recompute_blocks": 10}),
    "bf16, few tokens, 2 micro-batches": ({}, FEW, {"accumulate": 2}),
}


def measure(changes: dict[str, Any], grid: tuple[int, int, int], text: int, batch: int, job: Job) -> int:
    """Bytes by which the most that was resident grew over three steps of a new model."""
    torch.set_num_threads(1)
    config = {**SMALL, **changes}
    dtype = DTYPES[job.compute]
    warm = torch.nn.Linear(64, 64)  # loads the kernels' libraries
    warm(torch.randn(64, 64)).sum().backward()
    before = resident("VmRSS")

    model = SparseUMMDiT(**config).train()
    model.set_recompute(blocks=job.recompute_blocks, feed_forwards=job.recompute_feed_forwards)
    master = MasterWeights(model, master=DTYPES[job.master], compute=dtype)
    optimizer = make_optimizer(master.parameters, OptimizerSettings())
    ema = Ema(master.parameters, decay=0.999) if job.ema else None
    for step in range(1, STEPS + 1):
        optimizer.zero_grad(set_to_none=True)
        for _ in range(job.accumulate):
            latents, noise = torch.randn(2, batch, config["in_channels"], *grid)
            prompt = PromptEmbeds(
                torch.randn(batch, text, config["caption_channels"]),
                torch.ones(batch, text, dtype=torch.bool),
                torch.randn(batch, config["pooled_projection_dim"]),
            )
            sigma = flow.sigmas_from_normal(torch.randn(batch))
            loss = objective.losses(model, latents, prompt, sigma=sigma, noise=noise, dtype=dtype).mean()
            loss.backward()
            master.take_gradients()
        optimizer.step()
        master.publish()
        if ema is not None:
            ema.update(step)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes that this process has resident (VmRSS), or had at most (VmHWM); of Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def predict(changes: dict[str, Any], grid: tuple[int, int, int], text: int, batch: int, job: Job) -> int:
    model = Model({**SMALL, **changes})
    return training_memory(model, Shape(grid, text, batch), MeshSettings(dp_shard=1), job).peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of cases; all by default")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        changes, (grid, text, batch), job = CASES[options.measure]
        print(json.dumps(measure(changes, grid, text, batch, Job(**job))))
        return
    if unknown := set(options.names) - set(CASES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    print(f"{'case':<36}{'predicted MB':>14}{'measured MB':>14}{'off':>8}")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    for name in options.names or CASES:
        command = [sys.executable, __file__, "--measure", name]
        measured = json.loads(subprocess.check_output(command, env=environment, text=True))
        changes, (grid, text, batch), job = CASES[name]
        predicted = predict(changes, grid, text, batch, Job(**job))
        off = predicted / measured - 1
        print(f"{name:<36}{predicted / 1e6:>14.1f}{measured / 1e6:>14.1f}{off:>+8.1%}", flush=True)


if __name__ == "__main__":
    main()
