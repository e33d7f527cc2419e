"""What a VAE leaves of clips that it was not trained on: PSNR, SSIM, and what is still recognised.

    python examples/vae_held_out.py [FOLDER] --count 30

FOLDER is a diffusers folder with a vae (default: the built-in model). Clips are held-out scenes of
moving shapes, half of them with two objects, drawn, encoded to the mode of their latents and decoded; the
judge is that of prompt_judge.py.
"""

import argparse
from collections import Counter
from pathlib import Path

import torch
from moving_shapes.drawing import render
from moving_shapes.scenes import scene_for
from prompt_judge import ATTRIBUTES, judge, right
from tqdm import tqdm

from opensoraplan import builtin
from opensoraplan.data.video import to_uint8
from opensoraplan.fidelity import Fidelity
from opensoraplan.models.wfvae import WFVAE


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=builtin.folder())
    parser.add_argument("--count", type=int, default=30, help="scenes with one object, and as many with two")
    options = parser.parse_args()
    vae = WFVAE.from_pretrained(options.folder, subfolder="vae", dtype=torch.float32, local_files_only=True)
    fidelity = Fidelity()
    for objects in (1, 2):
        seen = Counter[str]()
        for index in tqdm(range(options.count), desc=f"{objects} objects", unit="clip"):
            scene = scene_for(index, held_out=True, objects=objects)
            drawn = render(scene)
            pixels = (drawn.movedim(-1, 0)[None].float() / 127.5) - 1
            made = to_uint8(vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0])
            fidelity.update(drawn, made)
            seen.update(name for name, good in right(scene, judge(made, objects=objects)).items() if good)
        said = ", ".join(f"{name} {seen[name] / options.count:.1%}" for name in (*ATTRIBUTES, "all"))
        print(f"recognised in {options.count} clips with {objects} object{'s' * (objects > 1)}: {said}")
    print(f"PSNR {fidelity.psnr:.2f} dB, SSIM {fidelity.ssim:.4f} over all {2 * options.count} clips")


if __name__ == "__main__":
    main()
