"""WF-VAE of the release's size against the plain formulation (plain_vae.py), and streamed against whole.

    python benchmarks/vae_speed.py                              17 x 256 x 256, fp32 and bf16
    python benchmarks/vae_speed.py --base 32 --frames 9 --side 64 --long 17

Random weights. One run, one process: the ratios count. "share of peak" is the work of all convolutions over
the time of everything, and that over the rate of a large convolution in the same run.
"""

import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from plain_vae import count_flops, plain
from timing import DTYPES, begin_peak, conv_peak, machine, ready, resident_peak, seconds

from opensoraplan.models.wfvae import WFVAE
from opensoraplan.shapes import latent_shape

PLAIN, WHOLE, STREAMED = "plain formulation, whole", "whole", "four latent frames at a time, as it comes"
# How a long clip is decoded, and how many latent frames at a time; None: all.
CHUNKS = {PLAIN: None, WHOLE: None, STREAMED: 4, "one at a time": 1}


def make(base: int, dtype: torch.dtype, device: torch.device) -> WFVAE:
    """A VAE with random weights, in chunks of four latent frames as it comes."""
    torch.manual_seed(0)
    flow = base * 128 // 160
    model = WFVAE(
        base_channels=base, encoder_energy_flow_hidden_size=flow, decoder_energy_flow_hidden_size=flow
    )
    return model.to(device, dtype).eval().requires_grad_(False)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two videos in [-1, 1]."""
    error = (a.float().clamp(-1, 1) - b.float().clamp(-1, 1)).square().mean().item() / 4
    return -10 * math.log10(max(error, 1e-12))


@torch.no_grad()
def compare(options: argparse.Namespace, device: torch.device) -> list[str]:
    """Rows of encode and decode in both precisions."""
    lines = [
        "| | plain, s | ours, s | plain / ours | to reach | share of peak | to reach |",
        "|---|---|---|---|---|---|---|",
    ]
    wanted = {"fp32": (1.3, 1.15), "bf16": (1.1, 1.15)}
    decoded = {}
    for name, dtype in DTYPES.items():
        ours = make(options.base, dtype, device)
        other = plain(ours)
        x = torch.rand(1, 3, options.frames, options.side, options.side, device=device).to(dtype) * 2 - 1
        grid = latent_shape(options.frames, options.side, options.side)
        torch.manual_seed(1)
        z = torch.randn(1, ours.config["latent_channels"], *grid).to(device, dtype)
        peak = conv_peak(dtype, device)
        for verb, least in zip(("encode", "decode"), wanted[name], strict=True):
            tensor = x if verb == "encode" else z
            run = [lambda m=model, verb=verb, t=tensor: getattr(m, verb)(t) for model in (other, ours)]
            flops = count_flops(other, run[0])
            slow, fast = seconds(run[0]), seconds(run[1])
            share = flops / fast / max(peak, conv_peak(dtype, device))
            times = f"{slow:.3g} | {fast:.3g} | {slow / fast:.2f} | {least}"
            lines.append(f"| {name} {verb} | {times} | {share:.2f} | 0.85 |")
        decoded[name] = ours.decode(z).sample
    lines += [
        "",
        f"frames of bf16 against fp32: {psnr(decoded['bf16'], decoded['fp32']):.1f} dB (to reach: 45)",
    ]
    return lines


@torch.no_grad()
def decode_in_process(base: int, frames: int, side: int, how: str) -> tuple[float, float, torch.Tensor]:
    """Seconds, growth of the peak of resident memory in GB, and the frames, of a process's first decode."""
    model = make(base, torch.float32, ready("cpu"))
    if CHUNKS[how] is None:
        model.disable_streaming()
    else:
        model.enable_streaming(latent_frames=CHUNKS[how])
    decode = (plain(model) if how == PLAIN else model).decode
    torch.manual_seed(1)
    decode(torch.randn(1, 32, 1, 4, 4))
    z = torch.randn(1, 32, *latent_shape(frames, side, side))
    before = begin_peak()
    result: list[torch.Tensor] = []
    time = seconds(lambda: result.append(decode(z).sample), warm=0)
    grown = (resident_peak() - before) / 1e9
    return time, grown, result[0]


def streaming(options: argparse.Namespace) -> list[str]:
    """Streamed against whole decode, each in a process of its own, on the CPU in fp32."""
    size = f"{options.long} x {options.side} x {options.side}"
    runs, lines = {}, [f"| decode of {size}, fp32 | s | GB |", "|---|---|---|"]
    for how in CHUNKS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as one:
            job = one.submit(decode_in_process, options.base, options.long, options.side, how)
            runs[how] = job.result()
        lines.append(f"| {how} | {runs[how][0]:.3g} | {runs[how][1]:.2f} |")
    (whole_s, whole_gb, whole), (chunk_s, chunk_gb, chunks) = runs[WHOLE], runs[STREAMED]
    off = (whole - chunks).abs().max().item()
    ratios = f"time {chunk_s / whole_s:.2f} (to reach: 1.1), memory {chunk_gb / whole_gb:.2f} (0.4)"
    of_plain = f"memory of streamed / plain: {chunk_gb / runs[PLAIN][1]:.2f}"
    return [*lines, "", f"streamed / whole: {ratios}, largest difference {off:.1e} (1e-5); {of_plain}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=int, default=160, help="channels of the first stage")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--long", type=int, default=57, help="frames of the streamed decode")
    parser.add_argument("--device")
    options = parser.parse_args()
    device = ready(options.device)
    print(machine(device))
    print("\n".join(compare(options, device)))
    if device.type == "cpu":
        print("\n".join(streaming(options)))


if __name__ == "__main__":
    main()
