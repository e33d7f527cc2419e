"""Seconds a guided step and peak memory of the release-size denoiser with random weights, eager and compiled
per block.

    python benchmarks/generate_gpu.py                                     121 x 576 x 1024 on cuda, bf16
    python benchmarks/generate_gpu.py --device cpu --tiny --frames 9 --height 64 --width 64

One run, one process: the ratio of the two lines counts. The first step of each is not timed.
"""

import argparse
import time
from typing import get_args

import torch
from load_release import fill, peak

from opensoraplan.defaults import Weights
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.weights import check_weights, keep_weights
from opensoraplan.shapes import latent_shape

TEXT_TOKENS = 64
TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": [2, 2, 2], "sparse_n": [1, 2, 1]}


def build(device: torch.device, *, tiny: bool, weights: Weights) -> SparseUMMDiT:
    """The denoiser with random bf16 weights, made on its device, and kept as that kind."""
    with torch.device("meta"):
        model = SparseUMMDiT(**(TINY if tiny else {}))
    model = model.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        fill(parameter, name)
    keep_weights(model, weights)
    return model


@torch.no_grad()
def seconds_per_step(
    model: SparseUMMDiT, device: torch.device, grid: tuple[int, int, int], steps: int
) -> float:
    """Mean time of a guided step, that is of two forwards, after one to warm up."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    latents, pooled = (
        noise(1, model.config["in_channels"], *grid),
        noise(1, model.config["pooled_projection_dim"]),
    )
    text = noise(1, TEXT_TOKENS, model.config["caption_channels"])
    timestep = torch.tensor([900.0], device=device)
    start = 0.0
    for step in range(steps + 1):
        for _ in range(2):
            model(latents, timestep, text, pooled)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if step == 0:
            start = time.perf_counter()
    return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script itself")
    parser.add_argument("--frames", type=int, default=121)
    parser.add_argument("--height", type=int, default=576)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--weights", choices=get_args(Weights), default="whole", help="as in osp generate")
    options = parser.parse_args()
    device = torch.device(options.device)
    check_weights(options.weights, device, torch.bfloat16)
    grid = latent_shape(options.frames, options.height, options.width)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{where}, torch {torch.__version__}, bf16, weights {options.weights}")
    print(f"{options.frames} x {options.height} x {options.width}")
    model = build(device, tiny=options.tiny, weights=options.weights)
    for mode in ("eager", "compiled"):
        if mode == "compiled":
            model.compile_repeated_blocks(fullgraph=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_per_step(model, device, grid, options.steps)
        memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else peak()
        print(f"{mode}: {seconds:.3f} s a guided step, {50 * seconds:.0f} s for 50, peak {memory:.2f} GiB")


if __name__ == "__main__":
    main()
