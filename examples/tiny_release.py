"""A small release with random weights, in the formats of the real one: for the demo, the tests and
your own trials.

    python examples/tiny_release.py FOLDER

writes denoiser, VAE, text encoders and the guide's inference JSON. Everything real but the size and what
it has learned.
"""

import json
import logging
import sys
from pathlib import Path

import torch
from tiny_text import write_text_encoders

from opensoraplan.formats.assemble import Sources
from opensoraplan.formats.mindspeed.inference import read_inference
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.wfvae import WFVAE

logger = logging.getLogger(__name__)

DENOISER = {
    "num_layers": [2, 4, 2],
    "sparse_n": [1, 2, 1],
    "num_heads": 4,
    "head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "timestep_embed_dim": 32,
    "caption_channels": 24,
    "pooled_projection_dim": 20,
}
VAE = {
    "base_channels": 8,
    "latent_dim": 4,
    "encoder_energy_flow_hidden_size": 8,
    "decoder_energy_flow_hidden_size": 8,
    "scale": [0.7, 1.5, 0.9, 1.2],
    "shift": [-0.2, 0.1, 0.6, -0.9],
}
PROMPTS = ["a red ball rolls over green grass", "a drone view of waves crashing against the cliffs"]


def write_release(folder: Path, *, seed: int = 0, size: tuple[int, int, int] = (17, 64, 96)) -> Path:
    """Write a release into `folder` and return the path of its inference JSON (frames, height and
    width of `size`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    t5, clip = write_text_encoders(
        folder,
        caption_channels=DENOISER["caption_channels"],
        pooled_projection_dim=DENOISER["pooled_projection_dim"],
        seed=seed,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = SparseUMMDiT(
            num_attention_heads=DENOISER["num_heads"],
            attention_head_dim=DENOISER["head_dim"],
            **{key: value for key, value in DENOISER.items() if key not in ("num_heads", "head_dim")},
        )
        vae = WFVAE(
            latent_channels=VAE["latent_dim"],
            **{key: value for key, value in VAE.items() if key != "latent_dim"},
        )
    rename = denoiser.original_format().rename
    torch.save(
        {rename(name): value for name, value in denoiser.state_dict().items()}, folder / "model_ema.pt"
    )
    weights = vae.state_dict() | dict(vae.original_format().fixed)
    ema = {f"module.{name}": value for name, value in weights.items()}
    torch.save({"ema_state_dict": ema, "state_dict": {"gen_model": weights}}, folder / "wfvae.ckpt")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")

    config = {
        "ae": {
            "model_id": "wfvae",
            **VAE,
            "norm_type": "layernorm",
            "from_pretrained": str(folder / "wfvae.ckpt"),
        },
        "text_encoder": {"hub_backend": "hf", "model_id": "T5", "from_pretrained": str(t5)},
        "text_encoder_2": {
            "hub_backend": "hf",
            "model_id": "CLIPWithProjection",
            "from_pretrained": str(clip),
        },
        "tokenizer": {"hub_backend": "hf", "autotokenizer_name": "AutoTokenizer", "from_pretrained": str(t5)},
        "tokenizer_2": {
            "hub_backend": "hf",
            "autotokenizer_name": "AutoTokenizer",
            "from_pretrained": str(clip),
        },
        "predictor": {
            "model_id": "SparseUMMDiT",
            **DENOISER,
            "from_pretrained": str(folder / "model_ema.pt"),
        },
        "diffusion": {
            "model_id": "OpenSoraPlan",
            "num_inference_steps": 4,
            "guidance_scale": 8.0,
            "shift": 7.0,
        },
        "pipeline_config": {"input_size": list(size), "version": "v1.5", "model_type": "t2v"},
        "save_path": str(folder / "samples"),
        "fps": 24,
        "prompt": str(folder / "prompts.txt"),
        "device": "cpu",
        "weight_dtype": "fp32",
    }
    path = folder / "inference.json"
    path.write_text(
        "# random weights: only the formats are real\n" + json.dumps(config, indent=2), encoding="utf-8"
    )
    return path


def sources_of(release: Path) -> Sources:
    """Where the parts of a release that `write_release` wrote are."""
    inference = read_inference(release / "inference.json")
    paths = inference.sources
    return Sources(
        transformer=paths["transformer"],
        vae=paths["vae"],
        text_encoder=paths["text_encoder"],
        text_encoder_2=paths["text_encoder_2"],
        tokenizer=paths["tokenizer"],
        tokenizer_2=paths["tokenizer_2"],
        transformer_config=inference.transformer_config,
        vae_config=inference.vae_config,
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/tiny_release.py FOLDER")
    logger.info("wrote %s", write_release(Path(sys.argv[1])))
