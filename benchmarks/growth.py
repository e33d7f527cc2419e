"""Time and memory of `osp generate` as videos get longer, and with steps left out: the built-in model.

    python benchmarks/growth.py               49, 97 and 193 frames of 96 x 128, each in a process of its own
    python benchmarks/growth.py --steps 10

Memory is what each adds, at its peak, to what the process had before. The first video of a process is not
measured. The second table leaves steps out by the step cache, calibrated on another prompt; the third
compares solvers with the end of the flow, which is where 8 times the steps lead.
"""

import argparse
import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from timing import begin_peak, machine, ready, resident_peak
from torch import Tensor

from opensoraplan import builtin
from opensoraplan.pipeline import OpenSoraPlanPipeline, VideoOutput
from opensoraplan.runtime.quantisation import quantise_weights
from opensoraplan.runtime.step_cache import measure_ratios, skip_steps
from opensoraplan.samplers import SOLVERS

PROMPT = "A large red star moves to the right over a green meadow."
OTHER_PROMPT = "A small blue square grows on a wooden table."
FRAMES = 25  # the built-in model's own
LONGER = (49, 97, 193)  # more than a chunk of the VAE
THRESHOLDS = (0.03, 0.06, 0.12)
HEIGHT, WIDTH, GUIDANCE = 96, 128, 3.0


def load() -> OpenSoraPlanPipeline:
    """The built-in model on the CPU in fp32."""
    pipeline = OpenSoraPlanPipeline.from_pretrained(
        builtin.folder(), dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(pipeline: OpenSoraPlanPipeline, prompt: str, *, frames: int, **options: Any) -> Tensor:  # noqa: ANN401
    output = pipeline(
        prompt,
        num_frames=frames,
        height=HEIGHT,
        width=WIDTH,
        guidance_scale=GUIDANCE,
        seed=0,
        output_type="latent",
        **options,
    )
    assert isinstance(output, VideoOutput)
    assert isinstance(output.frames, Tensor)
    return output.frames


def measure(frames: int, steps: int) -> tuple[float, float, float, float]:
    """Seconds of denoising and of decoding, and the GB by which each raises what this process has."""
    ready("cpu")
    pipeline = load()
    for _ in pipeline.iter_decode(latents_of(pipeline, PROMPT, frames=9, num_inference_steps=1)):
        pass

    def denoise() -> Tensor:
        return latents_of(pipeline, PROMPT, frames=frames, num_inference_steps=steps)

    def decode() -> None:
        for _ in pipeline.iter_decode(latents):
            pass

    def measure_ratios(work: Callable[[], Any]) -> tuple[Any, float, float]:
        before, began = begin_peak(), time.perf_counter()
        result = work()
        return result, time.perf_counter() - began, (resident_peak() - before) / 1e9

    latents, denoising_s, denoising_gb = measure_ratios(denoise)
    _, decoding_s, decoding_gb = measure_ratios(decode)
    return denoising_s, decoding_s, denoising_gb, decoding_gb


def growth(steps: int) -> list[str]:
    """Rows of the first table."""
    lines = [
        "| frames | denoising, s | decoding, s | memory of denoising, GB | of decoding, GB |",
        "|---|---|---|---|---|",
    ]
    for frames in LONGER:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as one:
            numbers = one.submit(measure, frames, steps).result()
        lines.append(f"| {frames} | " + " | ".join(f"{number:.3g}" for number in numbers) + " |")
    return lines


def left_out(steps: int) -> list[str]:
    """Rows of the second table: time, and how far videos are from exact ones."""
    pipeline = load()
    options = {"frames": FRAMES, "num_inference_steps": steps}
    with measure_ratios(pipeline.transformer) as ratios:
        latents_of(pipeline, OTHER_PROMPT, batched_guidance=True, **options)
    latents_of(pipeline, PROMPT, **options)

    def timed(**more: Any) -> tuple[float, Tensor]:  # noqa: ANN401
        began = time.perf_counter()
        latents = latents_of(pipeline, PROMPT, **{**options, **more})
        return time.perf_counter() - began, torch.cat(list(pipeline.iter_decode(latents)), dim=2)

    exact_s, exact = timed()
    lines = ["| | time / exact | PSNR to the exact video, dB |", "|---|---|---|"]
    for threshold in THRESHOLDS:
        with skip_steps(pipeline.transformer, ratios, threshold=threshold, steps=steps):
            seconds, video = timed()
        lines.append(f"| step cache {threshold} | {seconds / exact_s:.2f} | {_psnr(video, exact):.1f} |")
    seconds, video = timed(guidance_interval=(0.0, 0.5))
    lines.append(f"| guided in the first half only | {seconds / exact_s:.2f} | {_psnr(video, exact):.1f} |")
    seconds, video = timed(num_inference_steps=steps // 2)
    lines.append(f"| half the steps | {seconds / exact_s:.2f} | {_psnr(video, exact):.1f} |")
    quantise_weights(pipeline.transformer, "int8")
    seconds, video = timed()
    lines.append(f"| int8 weights | {seconds / exact_s:.2f} | {_psnr(video, exact):.1f} |")
    pipeline = load()
    pipeline.transformer.to(torch.bfloat16)
    _, video = timed()
    lines.append(f"| denoiser in bf16 | | {_psnr(video, exact):.1f} |")
    quantise_weights(pipeline.transformer, "fp8")
    _, video = timed()
    lines.append(f"| the same, fp8 weights (their time is a card's) | | {_psnr(video, exact):.1f} |")
    return lines


def solvers(steps: int) -> list[str]:
    """Rows of the third table: how far from the end of the flow each solver stops."""
    pipeline = load()

    def video(solver: str, steps: int) -> Tensor:
        latents = latents_of(pipeline, PROMPT, frames=FRAMES, num_inference_steps=steps, solver=solver)
        return torch.cat(list(pipeline.iter_decode(latents)), dim=2)

    end = video("adams", 8 * steps)
    counts = (steps // 2, steps, 2 * steps)
    lines = [
        "| PSNR to the end of the flow, dB | " + " | ".join(f"{count} steps" for count in counts) + " |",
        "|---" * (len(counts) + 1) + "|",
    ]
    for solver in SOLVERS:
        numbers = [_psnr(video(solver, count), end) for count in counts]
        lines.append(f"| {solver} | " + " | ".join(f"{number:.1f}" for number in numbers) + " |")
    return lines


def _psnr(a: Tensor, b: Tensor) -> float:
    return -10 * math.log10(max((a - b).square().mean().item(), 1e-10))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    print(f"{machine(ready('cpu'))}; {options.steps} steps, fp32")
    print("\n".join(growth(options.steps)))
    print()
    print("\n".join(left_out(options.steps)))
    print()
    print("\n".join(solvers(options.steps)))


if __name__ == "__main__":
    main()
