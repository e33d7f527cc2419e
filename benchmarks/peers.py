"""Our models beside diffusers' of the same job, with random weights: the same clip, precision and machine.

    python benchmarks/peers.py         VAEs at 17 x 256 x 256, denoisers at 2,048 and 8,192 tokens, bf16
    python benchmarks/peers.py --only vae --dtype fp32

VAEs are of their releases' sizes; they compress differently (Wan 4x8x8, CogVideoX 4x8x8, HunyuanVideo 4x8x8,
ours 8x8x8). Denoisers have the release's 32 blocks at half its width, feed-forwards of four times that, and
the same tokens; diffusers' is Wan's, which is dense. One run: the ratios count.
"""

import argparse
from collections.abc import Callable

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from load_release import fill
from timing import DTYPES, machine, ready, seconds
from torch import nn

from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.wfvae import WFVAE

VAES: dict[str, Callable[[], nn.Module]] = {
    "ours (8x8x8)": WFVAE,
    "AutoencoderKLWan": AutoencoderKLWan,
    "AutoencoderKLCogVideoX": AutoencoderKLCogVideoX,
    "AutoencoderKLHunyuanVideo": AutoencoderKLHunyuanVideo,
}
HEADS, HEAD_DIM, DEPTH, TEXT_TOKENS = 12, 128, 32, 64
# Latent grids of 2 x 2 patches: 2,048 and 8,192 tokens.
GRIDS = ((8, 32, 32), (8, 64, 64))


@torch.no_grad()
def vaes(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Encode, and decode of what came out."""
    side = options.side
    x = torch.rand(1, 3, options.frames, side, side, device=device).to(dtype) * 2 - 1
    lines = ["| VAE | encode, s | decode, s | ours / its, encode | decode |", "|---|---|---|---|---|"]
    first: tuple[float, float] | None = None
    for name, build in VAES.items():
        torch.manual_seed(0)
        vae = build().to(device, dtype).eval().requires_grad_(False)
        latents = vae.encode(x).latent_dist.mode()  # type: ignore[operator]
        encode = seconds(lambda vae=vae: vae.encode(x), warm=0)
        decode = seconds(lambda vae=vae, z=latents: vae.decode(z), warm=0 if device.type == "cpu" else 1)
        first = first or (encode, decode)
        ratios = f"{first[0] / encode:.2f} | {first[1] / decode:.2f}"
        lines.append(f"| {name} | {encode:.3g} | {decode:.3g} | {ratios} |")
    return lines


@torch.no_grad()
def denoisers(device: torch.device, dtype: torch.dtype) -> list[str]:
    """A forward pass of each for every grid."""
    ours = SparseUMMDiT(num_attention_heads=HEADS, attention_head_dim=HEAD_DIM)
    channels, caption = ours.config["in_channels"], ours.config["caption_channels"]
    theirs = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=channels,
        out_channels=channels,
        text_dim=caption,
        ffn_dim=4 * HEADS * HEAD_DIM,
        num_layers=DEPTH,
    )
    for model in (ours, theirs):
        model.to(device, dtype).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            fill(parameter, name)
    lines = ["| tokens | ours, s | Wan's, s | ours / Wan's |", "|---|---|---|---|"]
    timestep = torch.tensor([500.0], device=device)
    text = torch.randn(1, TEXT_TOKENS, caption, device=device).to(dtype)
    pooled = torch.randn(1, ours.config["pooled_projection_dim"], device=device).to(dtype)
    for grid in GRIDS:
        latents = torch.randn(1, channels, *grid, device=device).to(dtype)
        own = seconds(lambda x=latents: ours(x, timestep, text, pooled))
        wan = seconds(lambda x=latents: theirs(x, timestep, text))
        tokens = grid[0] * grid[1] * grid[2] // 4
        lines.append(f"| {tokens} | {own:.3g} | {wan:.3g} | {own / wan:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("vae", "denoiser"))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--device")
    options = parser.parse_args()
    device, dtype = ready(options.device), DTYPES[options.dtype]
    print(machine(device), options.dtype)
    if options.only != "denoiser":
        print("\n".join(vaes(options, device, dtype)))
    if options.only != "vae":
        print("Denoisers of equal width, depth and tokens:")
        print("\n".join(denoisers(device, dtype)))


if __name__ == "__main__":
    main()
