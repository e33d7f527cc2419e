"""The simulated card for the tests of this folder, which need a process of their own: its name is given to
torch for good, and every later test would compute on it.
"""

from collections.abc import Iterator

import pytest
from simulated.device import CARD, Card, install


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
