"""Peak memory of training steps on the CPU, measured against what `osp plan` predicts, and their time.

    OMP_NUM_THREADS=1 python benchmarks/plan_accuracy.py [NAME ...]

Each case is a job of its own, on one thread a process: model, fp32 weights, optimizer and EMA as the trainer
has them, then three steps. What is measured is how far the most memory that was ever resident (VmHWM) in the
first process is above that before the model was made; of a CPU, that of device and host together. glibc is
told to give what is freed back at once, or the measure would be of its arenas. Times are of the fastest step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timing import resident

from opensoraplan import builtin, flow
from opensoraplan.device import DTYPES
from opensoraplan.formats.assemble import denoiser_config
from opensoraplan.models.conditions import Conditions
from opensoraplan.models.initial_weights import initial_weights
from opensoraplan.models.sizes import BatchShape, DenoiserSizes
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.text import PromptEmbeds
from opensoraplan.parallel.apply import parallelize
from opensoraplan.parallel.mesh import Mesh, MeshSettings
from opensoraplan.parallel.shards import fill
from opensoraplan.plan.memory import training_memory
from opensoraplan.plan.step import AdapterOptions, TrainingOptions, TrainingStep
from opensoraplan.runtime.quantisation import quantise_weights
from opensoraplan.runtime.streaming import stream_frozen_blocks
from opensoraplan.shapes import latent_shape
from opensoraplan.train.config import AdapterSettings, OptimizerSettings
from opensoraplan.train.learner.adapter import add_adapter, fill_with_adapter, target_layers
from opensoraplan.train.learner.ema import Ema
from opensoraplan.train.learner.master import MasterWeights
from opensoraplan.train.learner.optimizer import make_optimizer
from opensoraplan.train.methods import flow_loss

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


# The built-in model on clips of its own size, as examples/lora trains it.
BUILTIN = denoiser_config(builtin.folder(), None)
BUILTIN_CLIPS = (latent_shape(25, 96, 128), 32, 4)


@dataclass(frozen=True)
class Case:
    """What a model is given, how it is trained, on which mesh, and what differs from SMALL. `adapter`: the
    options of a LoRA that is trained instead of the weights.
    """

    size: tuple[tuple[int, int, int], int, int] = TOKENS
    options: dict[str, Any] = field(default_factory=dict)
    mesh: dict[str, int] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] | None = None

    @property
    def config(self) -> dict[str, Any]:
        return {**SMALL, **self.model}

    @property
    def step(self) -> TrainingStep:
        mesh, options = MeshSettings(**{"dp_shard": 1, **self.mesh}), dict(self.options)
        if self.adapter is not None:
            with torch.device("meta"):
                layers = target_layers(SparseUMMDiT(**self.config), ())
            options["adapter"] = AdapterOptions(layers, **{"rank": 16, **self.adapter})
        return TrainingStep(
            DenoiserSizes(self.config), BatchShape(*self.size), mesh, TrainingOptions(**options)
        )


FP32: dict[str, Any] = {"compute": "fp32"}
AGAIN: dict[str, Any] = {"recompute_blocks": 10}
CASES = {
    "fp32": Case(options=FP32),
    "fp32, all blocks again": Case(options={**FP32, "recompute_blocks": 10}),
    "fp32, half of the blocks again": Case(options={**FP32, "recompute_blocks": 5}),
    "fp32, feed-forwards again": Case(options={**FP32, "recompute_feed_forwards": 10}),
    "fp32, dense, one feed-forward": Case(
        options={**FP32, "recompute_blocks": 10}, model={"sparse_n": None, "double_ff": False}
    ),
    "fp32, few tokens": Case(FEW, FP32),
    "fp32, few tokens, no EMA": Case(FEW, {**FP32, "ema": None}),
    "bf16": Case(),
    "bf16, all blocks again": Case(options={"recompute_blocks": 10}),
    "bf16, few tokens, 2 micro-batches": Case(FEW, {"accumulate": 2}),
    "fp32, fsdp 2": Case(options=FP32, mesh={"dp_shard": 2}),
    "fp32, fsdp 4, few tokens": Case(FEW, FP32, {"dp_shard": 4}),
    "fp32, sp 2": Case(options=FP32, mesh={"sp": 2}),
    "fp32, tp 2": Case(options=FP32, mesh={"tp": 2}),
    "fp32, sp 2 x tp 2": Case(options=FP32, mesh={"sp": 2, "tp": 2}),
    "bf16, sp 2, all blocks again": Case(options={"recompute_blocks": 10}, mesh={"sp": 2}),
    "LoRA, fp32": Case(options=FP32, adapter={}),
    "LoRA, bf16": Case(adapter={}),
    "LoRA, int8": Case(options=FP32, adapter={"base": "int8"}),
    "LoRA, NF4": Case(options=FP32, adapter={"base": "nf4"}),
    "LoRA, fp32, all blocks again": Case(options={**FP32, **AGAIN}, adapter={}),
    "LoRA, fp32, streamed": Case(options={**FP32, **AGAIN}, adapter={"streamed": True}),
    "fp32, few tokens, AdamW in 8 bits": Case(FEW, {**FP32, "bits": 8}),
    "built-in model, all weights": Case(BUILTIN_CLIPS, FP32, model=BUILTIN),
    "built-in model, LoRA": Case(BUILTIN_CLIPS, FP32, model=BUILTIN, adapter={}),
    "built-in model, LoRA, int8": Case(BUILTIN_CLIPS, FP32, model=BUILTIN, adapter={"base": "int8"}),
}


def measure(rank: int, case: Case, meeting: str) -> None:
    """As rank number `rank` train a new model for three steps; the first prints by how many bytes the most
    that was resident grew, and the seconds of the fastest step.
    """
    torch.set_num_threads(1)
    planned, mesh = case.step, None
    if case.mesh:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=planned.devices
        )
        mesh = Mesh.build(planned.mesh, device_type="cpu")
    warm = torch.nn.Linear(64, 64)  # loads the kernels' libraries
    warm(torch.randn(64, 64)).sum().backward()
    before = resident("VmRSS")

    master = make_model(case, mesh)
    optimizer = make_optimizer(master.parameters, OptimizerSettings(bits=planned.options.bits, eps=1e-8))
    ema = Ema(master.parameters, decay=0.999) if planned.options.ema else None
    times = []
    for step in range(1, STEPS + 1):
        began = time.perf_counter()
        train(master, optimizer, planned)
        if ema is not None:
            ema.update(step)
        times.append(time.perf_counter() - began)
    if rank == 0:
        print(json.dumps([resident("VmHWM") - before, min(times)]), flush=True)


def make_model(case: Case, mesh: Mesh | None) -> MasterWeights:
    """A new model, as the trainer has it."""
    options, config = case.step.options, case.config
    compute, master = DTYPES[options.compute], DTYPES[options.master]
    with torch.device("meta"):
        model, plain = (SparseUMMDiT(**config) for _ in range(2))
    weights, adapter = initial_weights(plain, seed=0), options.adapter
    model.train().set_recompute(
        blocks=options.recompute_blocks, feed_forwards=options.recompute_feed_forwards
    )
    if adapter is not None:
        add_adapter(model, AdapterSettings(kind="lora", rank=adapter.rank, base=adapter.base))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(master if parameter.requires_grad else compute)
        quantise_weights(model, adapter.base)
    if mesh is not None:
        parallelize(model, mesh, compute=compute)
        compute = master
    model.to_empty(device="cpu")
    if adapter is None:
        for name, value in weights:
            fill(model.get_parameter(name), value)
    else:
        fill_with_adapter(model, weights, seed=0)
        if adapter.streamed:
            stream_frozen_blocks(model, torch.device("cpu"))
    return MasterWeights(model, master=master, compute=compute)


def train(master: MasterWeights, optimizer: torch.optim.Optimizer, planned: TrainingStep) -> None:
    """One step, on noise."""
    model, shape, options = master.module, planned.shape, planned.options
    assert isinstance(model, SparseUMMDiT)
    batch, config = shape.batch, model.config
    optimizer.zero_grad(set_to_none=True)
    for _ in range(options.accumulate):
        latents, noise = torch.randn(2, batch, config["out_channels"], *shape.grid)
        prompt = PromptEmbeds(
            torch.randn(batch, shape.text, config["caption_channels"]),
            torch.ones(batch, shape.text, dtype=torch.bool),
            torch.randn(batch, config["pooled_projection_dim"]),
        )
        loss = flow_loss.losses(
            model,
            latents,
            Conditions(prompt),
            sigma=flow.sigmas_from_normal(torch.randn(batch)),
            noise=noise,
            dtype=DTYPES[options.compute],
            weighting="uniform",
        ).mean()
        loss.backward()
        master.take_gradients()
    optimizer.step()
    master.publish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of cases; all by default")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        case = CASES[options.measure]
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, (case, f"{folder}/meeting"), nprocs=case.step.devices)
        return
    if unknown := set(options.names) - set(CASES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    print(f"{'case':<36}{'predicted MB':>14}{'measured MB':>14}{'off':>8}{'s a step':>10}")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    for name in options.names or CASES:
        command = [sys.executable, __file__, "--measure", name]
        measured, took = json.loads(subprocess.check_output(command, env=environment, text=True))
        memory = training_memory(CASES[name].step)
        predicted = memory.peak + memory.host  # of a CPU both are the same memory
        off = predicted / measured - 1
        print(
            f"{name:<36}{predicted / 1e6:>14.1f}{measured / 1e6:>14.1f}{off:>+8.1%}{took:>10.2f}", flush=True
        )


if __name__ == "__main__":
    main()
