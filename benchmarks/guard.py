"""Whether a hot path has become slower: ratios of this run against those stored in guard.json.

    python benchmarks/guard.py            a minute or two; exit code 1 if one is worse by more than a half
    python benchmarks/guard.py --store    write the ratios of this run, after a change that is meant

Each ratio compares code of ours with plain code of the same work, in the same run on the same machine,
so that it says as much on another machine. A path that loses a third of its speed has a ratio 1.5
times as large.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from blocks import CONDITION, HEADS, WIDTH, release_block
from plain_vae import plain
from timing import machine, multiplies_bf16, ready, seconds
from torch.nn import functional as F
from vae_speed import make

from opensoraplan.disk import write_whole
from opensoraplan.models.skiparse import make_layouts, rotary_tables, to_single_skip
from opensoraplan.models.sparse_ummdit import JointAttnProcessor

STORED = Path(__file__).with_name("guard.json")
WORST = 1.5
RATE, GRID, TEXT = 2, (4, 16, 16), 64


def vae(
    verb: str, device: torch.device, *, base: int = 32, side: int = 96, dtype: torch.dtype = torch.float32
) -> Callable[[], float]:
    """Our VAE, of `base` channels, over the plain formulation, for clips of 17 frames."""

    def ratio() -> float:
        ours = make(base, dtype, device)
        inputs = {"encode": (1, 3, 17, side, side), "decode": (1, 32, 3, side // 8, side // 8)}
        x = torch.randn(inputs[verb], device=device).to(dtype)
        own, other = (
            seconds(lambda model=model: getattr(model, verb)(x), repeat=3) for model in (ours, plain(ours))
        )
        return own / other

    return ratio


def block(device: torch.device) -> float:
    """A block of the release's width over its matrix products and its attention alone."""
    model = release_block(device, torch.float32)
    tokens = GRID[0] * GRID[1] * GRID[2]
    layout, _ = make_layouts(RATE, rotary_tables(GRID, WIDTH // HEADS, device), None, None, (1, TEXT))
    video = to_single_skip(torch.randn(1, tokens, WIDTH, device=device), RATE)
    text, cond = torch.randn(1, TEXT, WIDTH, device=device), torch.randn(1, CONDITION, device=device)
    whole = seconds(lambda: model(video, text, cond, layout), repeat=3)

    rows = torch.randn(tokens + TEXT, WIDTH, device=device)
    wide = torch.randn(tokens + TEXT, 4 * WIDTH, device=device)
    square, up = torch.randn(WIDTH, WIDTH, device=device), torch.randn(WIDTH, 4 * WIDTH, device=device)
    q = torch.randn(RATE, HEADS, tokens // RATE + TEXT, WIDTH // HEADS, device=device)

    def products() -> None:
        for _ in range(4):
            rows @ square
        rows @ up
        wide @ up.T
        F.scaled_dot_product_attention(q, q, q)

    return whole / seconds(products, repeat=3)


def attention_alone(device: torch.device) -> float:
    """Attention of video and text over torch's of as many tokens in one piece."""
    grid = (GRID[0], 2 * GRID[1], 2 * GRID[2])
    tokens, d = grid[0] * grid[1] * grid[2] // RATE, WIDTH // HEADS
    layout, _ = make_layouts(RATE, rotary_tables(grid, d, device), None, None, (1, TEXT))
    q, k, v = (torch.randn(RATE, 1, tokens, HEADS, d, device=device) for _ in range(3))
    text_q, text_k, text_v = (torch.randn(1, TEXT, HEADS, d, device=device) for _ in range(3))
    attend = JointAttnProcessor().attend
    own = seconds(lambda: attend((q, k, v), (text_q, text_k, text_v), layout.key_mask), repeat=3)
    whole = torch.randn(RATE, HEADS, tokens + TEXT, d, device=device)
    return own / seconds(lambda: F.scaled_dot_product_attention(whole, whole, whole), repeat=3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", action="store_true")
    options = parser.parse_args()
    device = ready("cpu")
    print(machine(device))
    paths = {
        "VAE encode / plain": vae("encode", device),
        "VAE decode / plain": vae("decode", device),
        "block / its products": lambda: block(device),
        "attention / torch's": lambda: attention_alone(device),
    }
    if multiplies_bf16():  # elsewhere it would take minutes
        wide = {"base": 128, "side": 64, "dtype": torch.bfloat16}
        paths |= {f"VAE {verb} / plain, bf16": vae(verb, device, **wide) for verb in ("encode", "decode")}
    with torch.no_grad():
        ratios = {name: round(measure(), 3) for name, measure in paths.items()}
    if options.store:
        before = json.loads(STORED.read_text()) if STORED.exists() else {}
        text = json.dumps(before | ratios, indent=1) + "\n"
        write_whole(STORED, lambda file: file.write_text(text))
    stored = json.loads(STORED.read_text())
    slower = []
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} (stored: {stored[name]:.2f})")
        if ratio > WORST * stored[name]:
            slower.append(name)
    if slower:
        raise SystemExit(f"slower by more than a third: {', '.join(slower)}")


if __name__ == "__main__":
    main()
