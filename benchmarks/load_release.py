"""The release-size denoiser on a small machine: write random bf16 weights, load them, take
two sampling steps.

    python benchmarks/load_release.py [FOLDER]

Prints seconds and the peak resident memory of each stage; each runs in a process of its own. FOLDER (17
GB are written to it, and removed) is a temporary one by default. For scale, not for quality: the
weights are random.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from timing import resident_peak
from torch import Tensor

from opensoraplan.formats.export import WeightFiles, write_component
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.text import PromptEmbeds
from opensoraplan.models.wfvae import WFVAE
from opensoraplan.pipeline import OpenSoraPlanPipeline
from opensoraplan.samplers import make_scheduler

FRAMES, SIDE, STEPS, TEXT_TOKENS = 9, 128, 2, 64


def fill(tensor: Tensor, name: str) -> Tensor:
    """Random values for a parameter of that name: N(0, 0.02) for matrices, 1 for norms, 0 for biases."""
    if tensor.ndim > 1:
        return tensor.normal_(0, 0.02)
    return tensor.fill_(1.0 if name.endswith("weight") else 0.0)


class RandomWeights(Mapping[str, Tensor]):
    """Tensors of given shapes, made when they are taken."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def __getitem__(self, name: str) -> Tensor:
        return fill(torch.empty(self.shapes[name], dtype=torch.bfloat16), name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def write(folder: Path) -> None:
    """A diffusers component folder of the release's size, shard by shard."""
    with torch.device("meta"):
        model = SparseUMMDiT()
    names = {name: name for name in model.state_dict()}
    weights = RandomWeights({name: tuple(value.shape) for name, value in model.state_dict().items()})
    write_component(model, names, weights, folder, WeightFiles(torch.bfloat16))


def sample(folder: Path) -> None:
    """Load it and take two guided steps; the VAE is a small one, which is not asked to decode."""
    start = time.perf_counter()
    transformer = SparseUMMDiT.from_pretrained(folder, dtype=torch.bfloat16).eval()
    print(f"loaded in {time.perf_counter() - start:.0f} s, peak so far {resident_peak() / 2**30:.2f} GiB")
    vae = WFVAE(base_channels=8, encoder_energy_flow_hidden_size=8, decoder_energy_flow_hidden_size=8)
    pipeline = OpenSoraPlanPipeline(transformer, vae, None, None, None, None, make_scheduler())
    embeds = PromptEmbeds(
        torch.randn(1, TEXT_TOKENS, 2048), torch.ones(1, TEXT_TOKENS, dtype=torch.bool), torch.randn(1, 1280)
    )
    start = time.perf_counter()
    latents = pipeline(
        prompt_embeds=embeds,
        negative_prompt_embeds=embeds,
        num_frames=FRAMES,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        seed=0,
        output_type="latent",
    ).frames
    seconds = (time.perf_counter() - start) / STEPS
    print(f"{FRAMES} x {SIDE} x {SIDE}: {seconds:.1f} s a guided step, latents {list(latents.shape)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--stage", choices=["write", "sample"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        {"write": write, "sample": sample}[options.stage](options.folder)
        print(f"{options.stage}: peak {resident_peak() / 2**30:.2f} GiB of resident memory")
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for stage in ("write", "sample"):
            subprocess.run([sys.executable, __file__, folder, "--stage", stage], check=True)


if __name__ == "__main__":
    main()
