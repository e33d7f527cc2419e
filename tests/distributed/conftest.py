"""Four processes that the tests of this folder share, each on one thread, talking through gloo."""

from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    with Ranks(4) as pool:
        yield pool
