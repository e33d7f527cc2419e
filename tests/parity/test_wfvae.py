"""The VAE against tensors measured on the original, whole and streamed with several chunk lengths."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from opensoraplan.models.wfvae import WFVAE

GOLDEN = Path(__file__).parents[1] / "golden/wfvae"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "inputs.safetensors") | load_file(GOLDEN / "outputs.safetensors")


@pytest.fixture(scope="module")
def vae() -> WFVAE:
    config = json.loads((GOLDEN / "config.json").read_text())
    return WFVAE.from_original(config, load_file(GOLDEN / "weights.safetensors")).eval()


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("latent_frames", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("frames", [1, 9, 17, 33])
def test_moments_and_frames(
    vae: WFVAE, golden: dict[str, Tensor], frames: int, latent_frames: int | None
) -> None:
    if latent_frames is None:
        vae.disable_streaming()
    else:
        vae.enable_streaming(latent_frames=latent_frames)
    posterior = vae.encode(golden[f"video_{frames}"]).latent_dist
    assert relative(posterior.parameters, golden[f"moments_{frames}"]) < TOLERANCE
    latents = golden[f"moments_{frames}"].chunk(2, dim=1)[0]
    assert relative(vae.decode(latents).sample, golden[f"decoded_{frames}"]) < TOLERANCE
