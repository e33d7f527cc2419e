"""What the tests share: a tiny release, and the diffusers folder that is converted from it. Read them, never
write.
"""

from pathlib import Path

import pytest
from tiny_release import write_release

from opensoraplan.convert.assemble import Sources, save_diffusers
from opensoraplan.convert.mindspeed_json import read_inference


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that examples/tiny_release.py writes."""
    folder = tmp_path_factory.mktemp("tiny") / "release"
    write_release(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The diffusers folder of the tiny release."""
    inference = read_inference(tiny_release / "inference.json")
    paths = inference.sources
    sources = Sources(
        transformer=paths["transformer"],
        vae=paths["vae"],
        text_encoder=paths["text_encoder"],
        text_encoder_2=paths["text_encoder_2"],
        tokenizer=paths["tokenizer"],
        tokenizer_2=paths["tokenizer_2"],
        transformer_config=inference.transformer_config,
        vae_config=inference.vae_config,
    )
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_diffusers(sources, folder, scheduler=inference.scheduler, max_text_tokens=inference.max_text_tokens)
    return folder
