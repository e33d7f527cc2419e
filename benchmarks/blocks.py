"""Blocks of the release's width, one for each Skiparse rate: what sparse attention saves, and how near matrix
products of that size come to what the machine can do.

    python benchmarks/blocks.py                          36,864 video and 512 text tokens, bf16
    python benchmarks/blocks.py --grid 8 18 32 --text 128

Random weights. One run, one process: the ratios count. "share of peak" is the work of all matrix products
over the time of everything, and that over the rate of a large product in the same run.
"""

import argparse
from dataclasses import dataclass

import torch
from load_release import fill
from timing import DTYPES, gemm_peak, machine, ready, seconds

from opensoraplan.models.attention import attention
from opensoraplan.models.sizes import attention_flops, block_flops
from opensoraplan.models.skiparse import make_layouts, rotary_tables, to_single_skip
from opensoraplan.models.sparse_ummdit import BlockConfig, SparseUMMDiTBlock

WIDTH, HEADS, CONDITION = 3072, 24, 1024
# How many of the release's 32 blocks have each rate.
LAYERS = {1: 4, 2: 8, 4: 12, 8: 8}


@dataclass(frozen=True)
class Timing:
    """Seconds of a block and of its attention alone, and the FLOPs of each."""

    block: float
    attention: float
    block_flops: float
    attention_flops: float


def release_block(device: torch.device, dtype: torch.dtype) -> SparseUMMDiTBlock:
    """A block of the release's width with random weights, from the middle of a stage."""
    config = BlockConfig(
        dim=WIDTH,
        heads=HEADS,
        embed_dim=CONDITION,
        norm_cls="layer_norm",
        eps=1e-6,
        double_ff=True,
        skip_norm=False,
    )
    block = SparseUMMDiTBlock(config, last=False, skip=False)
    block = block.to(device, dtype).eval().requires_grad_(False)
    for name, parameter in block.named_parameters():
        fill(parameter, name)
    return block


@torch.no_grad()
def time_block(
    rate: int,
    grid: tuple[int, int, int],
    text_tokens: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool,
) -> Timing:
    """A block in its single-skip order, and scaled_dot_product_attention of its shape."""
    tokens = grid[0] * grid[1] * grid[2]
    block = release_block(device, dtype)
    if compiled:
        block.compile()
    tables = rotary_tables(grid, WIDTH // HEADS, device)
    layout, _ = make_layouts(rate, tables, None, None, (1, text_tokens))
    video = to_single_skip(torch.randn(1, tokens, WIDTH, device=device).to(dtype), rate)
    text = torch.randn(1, text_tokens, WIDTH, device=device).to(dtype)
    cond = torch.randn(1, CONDITION, device=device)
    whole = seconds(
        lambda: block(video, text, cond, layout), warm=1 if compiled or device.type != "cpu" else 0
    )
    length = tokens // rate + text_tokens
    q, k, v = (  # in the layout of JointAttnProcessor's
        torch.randn(rate, HEADS, length, WIDTH // HEADS, device=device).to(dtype).transpose(1, 2)
        for _ in range(3)
    )
    alone = seconds(lambda: attention(q, k, v, None), warm=0 if device.type == "cpu" else 1)
    work = block_flops(WIDTH, tokens, text_tokens, rate=rate, embed_dim=CONDITION)
    return Timing(whole, alone, work, attention_flops(WIDTH, tokens, text_tokens, rate=rate))


def report(timings: dict[int, Timing], peak: float) -> list[str]:
    """Lines of the table, and the ratios weighted by the release's layers."""
    lines = [
        "| rate | block, s | attention, s | block, TFLOP/s | attention, TFLOP/s |",
        "|---|---|---|---|---|",
    ]
    for rate, t in timings.items():
        rates = t.block_flops / t.block / 1e12, t.attention_flops / t.attention / 1e12
        lines.append(f"| {rate} | {t.block:.3g} | {t.attention:.3g} | {rates[0]:.3g} | {rates[1]:.3g} |")
    total = sum(count * timings[rate].block for rate, count in LAYERS.items())
    attended = sum(count * timings[rate].attention for rate, count in LAYERS.items())
    work = sum(count * timings[rate].block_flops for rate, count in LAYERS.items())
    depth = sum(LAYERS.values())
    return [
        *lines,
        "",
        f"dense / SUV, all layers: {depth * timings[1].block / total:.2f} (to reach: 1.6)",
        f"dense / SUV, attention alone: {depth * timings[1].attention / attended:.2f} (to reach: 2.3)",
        f"share of a product's {peak / 1e12:.3g} TFLOP/s, all layers: {work / total / peak:.2f} (0.65)",
        f"one forward pass of all layers: {total:.3g} s",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", type=int, nargs=3, default=(16, 36, 64), help="video tokens in t, y and x")
    parser.add_argument("--text", type=int, default=512, help="text tokens")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--compile", action="store_true", help="compile the block")
    options = parser.parse_args()
    device, dtype = ready(options.device), DTYPES[options.dtype]
    print(machine(device), options.dtype, "compiled" if options.compile else "eager")
    # Libraries set themselves up at the first call, whatever its size.
    time_block(2, (4, 8, 8), 64, dtype=dtype, device=device, compiled=False)
    peak = gemm_peak(dtype, device)
    timings = {
        rate: time_block(
            rate, tuple(options.grid), options.text, dtype=dtype, device=device, compiled=options.compile
        )
        for rate in LAYERS
    }
    print("\n".join(report(timings, max(peak, gemm_peak(dtype, device)))))


if __name__ == "__main__":
    main()
