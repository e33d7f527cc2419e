"""The simulated card for the tests of this folder, which need a process of their own: its name is given to
torch for good, and every later test would compute on it.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from simulated.device import CARD, Card, install

from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.pipeline import OpenSoraPlanPipeline


def pytest_collection_finish(session: pytest.Session) -> None:
    """Give the name once it is known that no other tests are there."""
    others = [item.nodeid for item in session.items if "accelerator" not in item.path.parts]
    if others:
        raise pytest.UsageError(f"run tests/accelerator by itself, without {others[0]} and others")
    install()


@pytest.fixture(autouse=True)
def card() -> Iterator[Card]:
    """The card with nothing in use; a test that has caught faults on purpose clears them."""
    CARD.reset()
    yield CARD
    assert not CARD.faults


@pytest.fixture(scope="session")
def wide_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder with a wider denoiser of more blocks: as of real ones, most bytes are its."""
    pipeline = OpenSoraPlanPipeline.from_pretrained(tiny_model, local_files_only=True)
    config = {key: value for key, value in pipeline.transformer.config.items() if key[0] != "_"}
    sizes = {"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": [2] * 5}
    torch.manual_seed(0)
    pipeline.transformer = SparseUMMDiT(**config | sizes | {"sparse_n": [1, 2, 4, 2, 1]})
    for weight in pipeline.transformer.parameters():
        weight.data = torch.randn_like(weight) * 0.02
    folder = tmp_path_factory.mktemp("wide") / "model"
    pipeline.save_pretrained(folder)
    return folder
