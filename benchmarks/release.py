"""The release's size with random weights on a card: seconds of the denoiser and of the VAE for one video, and
what each placement of `osp generate --memory` takes of the device's memory beside what was predicted.

    python benchmarks/release.py                             121 x 576 x 1024 on cuda, bf16
    python benchmarks/release.py denoiser --weights fp8      one of denoiser, vae, resident, in-turn, streamed
    python benchmarks/release.py --device cpu --tiny --frames 9 --height 64 --width 64

Each part runs in a process of its own. First steps are not timed. A placement may have no more memory than
was predicted, and the margin of libraries. Text encoders, which denoising does not need, are left out.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, get_args

import torch
from load_release import fill
from timing import machine, ready, resident_peak, seconds, wait

from opensoraplan.defaults import WeightPrecision
from opensoraplan.generate.planning import needs_of
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.text import PromptEmbeds
from opensoraplan.models.wfvae import WFVAE
from opensoraplan.pipeline import OpenSoraPlanPipeline
from opensoraplan.requests import Request
from opensoraplan.runtime.compiling import compile_blocks
from opensoraplan.runtime.placement import (
    CHUNKS,
    MARGIN,
    PLACEMENTS,
    Arrangement,
    Placement,
    fit_decoding,
    plans_for,
)
from opensoraplan.runtime.quantisation import check_weight_precision, quantise_weights
from opensoraplan.samplers import make_scheduler
from opensoraplan.shapes import latent_shape

TEXT_TOKENS, STEPS = 64, 3
TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": [2, 2, 2], "sparse_n": [1, 2, 1]}
TINY_VAE = {
    "base_channels": 8,
    "encoder_energy_flow_hidden_size": 8,
    "decoder_energy_flow_hidden_size": 8,
}


def random_model(kind: type[Any], config: dict[str, Any], device: torch.device) -> Any:  # noqa: ANN401
    """A model with random bf16 weights, made on its device."""
    with torch.device("meta"):
        model = kind(**config)
    model = model.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        fill(parameter, name)
    return model


def denoiser_of(options: argparse.Namespace, device: torch.device) -> SparseUMMDiT:
    model = random_model(SparseUMMDiT, TINY if options.tiny else {}, device)
    quantise_weights(model, options.weights)
    return model


def vae_of(options: argparse.Namespace, device: torch.device) -> WFVAE:
    return random_model(WFVAE, TINY_VAE if options.tiny else {}, device)


@torch.no_grad()
def denoiser(options: argparse.Namespace, device: torch.device) -> None:
    """Seconds of a guided step, that is of two forwards: eager, compiled, and compiled without sparsity."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    model = denoiser_of(options, device)
    grid = latent_shape(options.frames, options.height, options.width)
    latents = noise(1, model.config["in_channels"], *grid)
    text, pooled = (
        noise(1, TEXT_TOKENS, model.config["caption_channels"]),
        noise(1, model.config["pooled_projection_dim"]),
    )
    timestep = torch.tensor([900.0], device=device)
    times = {}
    for mode in ("eager", "compiled", "compiled, dense"):
        if mode == "compiled":
            compile_blocks(model, fullgraph=True)
        if "dense" in mode:
            model.set_sparsity(None)
        with (taken := PeakOf(device)):
            times[mode] = 2 * seconds(lambda: model(latents, timestep, text, pooled), calls=2 * STEPS)
        print(f"{mode}: {times[mode]:.3f} s a guided step, {50 * times[mode]:.0f} s for 50; {taken}")
    print(f"dense / SUV: {times['compiled, dense'] / times['compiled']:.2f} (to reach: 1.6)")


@torch.no_grad()
def vae(options: argparse.Namespace, device: torch.device) -> None:
    """Seconds to encode and to decode the clip."""
    model = vae_of(options, device)
    grid = latent_shape(options.frames, options.height, options.width)
    clip = torch.rand(1, 3, options.frames, options.height, options.width, device=device).bfloat16() * 2 - 1
    latents = torch.randn(1, model.config["latent_channels"], *grid, device=device).bfloat16()
    model.enable_streaming(latent_frames=CHUNKS[0])
    fit_decoding(model, [grid], device)
    print(f"up to {model.streaming_latent_frames} latent frames at a time")
    for name, work in (("encode", lambda: model.encode(clip)), ("decode", lambda: model.decode(latents))):
        with (taken := PeakOf(device)):
            took = seconds(work)
        print(f"{name}: {took:.2f} s; {taken}")


def placement(options: argparse.Namespace, device: torch.device, *, kind: Placement) -> None:
    """Memory of a guided step and of decoding under the leanest plan of this placement."""
    # On the host first, as `osp generate` loads them, unless all is to be on the device.
    models = [make(options, device) for make in (denoiser_of, vae_of)]
    if kind != "resident":
        models = [model.to("cpu") for model in models]
    pipeline = OpenSoraPlanPipeline(*models, None, None, None, None, make_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    request = Request(
        prompt="any", frames=options.frames, height=options.height, width=options.width, steps=STEPS
    )
    plan = plans_for([needs_of(pipeline, request, text_tokens=TEXT_TOKENS)], (kind,))[-1]
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, plan.peak / (1 - MARGIN) / total), device)
    with (taken := PeakOf(device)):
        Arrangement(pipeline, [plan], device)
        config = pipeline.transformer.config
        embeds = PromptEmbeds(
            torch.randn(1, TEXT_TOKENS, config["caption_channels"]).bfloat16().to(device),
            torch.ones(1, TEXT_TOKENS, dtype=torch.bool, device=device),
            torch.randn(1, config["pooled_projection_dim"]).bfloat16().to(device),
        )
        began = time.perf_counter()
        latents = pipeline(
            prompt_embeds=embeds,
            negative_prompt_embeds=embeds,
            num_frames=options.frames,
            height=options.height,
            width=options.width,
            num_inference_steps=STEPS,
            seed=0,
            output_type="latent",
        ).frames
        wait()
        denoised = time.perf_counter()
        for _ in pipeline.iter_decode(latents):
            pass
        wait()
    print(f"predicted {plan}; {taken}")
    print(
        f"{(denoised - began) / STEPS:.2f} s a guided step, {time.perf_counter() - denoised:.2f} s to decode"
    )


class PeakOf:
    """The most memory of a device between entering and leaving: what tensors had of it and, on a card, what
    the allocator had taken for them; of the host, what this process had since it began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.text = ""

    def __enter__(self) -> None:
        if self.device.type != "cpu":
            self._api.reset_peak_memory_stats(self.device)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cpu":
            self.text = f"peak {resident_peak() / 1e9:.2f} GB"
        else:
            used, taken = (
                self._api.max_memory_allocated(self.device),
                self._api.max_memory_reserved(self.device),
            )
            self.text = f"peak {used / 1e9:.2f} GB, with the allocator's {taken / 1e9:.2f} GB"

    def __str__(self) -> str:
        return self.text

    @property
    def _api(self) -> Any:  # noqa: ANN401 (torch.cuda or the like)
        return getattr(torch, self.device.type)


PARTS: dict[str, Callable[[argparse.Namespace, torch.device], None]] = {
    "denoiser": denoiser,
    "vae": vae,
    **{kind: lambda options, device, kind=kind: placement(options, device, kind=kind) for kind in PLACEMENTS},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=PARTS, help="default: all, one after the other")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script itself")
    parser.add_argument("--frames", type=int, default=121)
    parser.add_argument("--height", type=int, default=576)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument(
        "--weights", choices=get_args(WeightPrecision), default="whole", help="as in osp generate"
    )
    options = parser.parse_args()
    device = ready(options.device)
    check_weight_precision(options.weights, device, torch.bfloat16)
    if options.part is not None:
        PARTS[options.part](options, device)
        return
    print(f"{machine(device)} bf16, weights {options.weights}")
    print(f"{options.frames} x {options.height} x {options.width}")
    for part in PARTS:
        print(f"\n{part}", flush=True)
        subprocess.run([sys.executable, *sys.argv, part], check=False)


if __name__ == "__main__":
    main()
