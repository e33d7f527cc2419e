"""What the tests of several processes share: ranks that run functions."""

from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four processes that run functions together, each on one thread, talking through gloo."""
    with Ranks(4) as pool:
        yield pool
