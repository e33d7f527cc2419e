"""What the tests of several processes share: ranks that run functions, and ranks that run the command."""

import socket
from collections.abc import Callable, Iterator

import pytest
from command import Running
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four processes that run functions together, each on one thread, talking through gloo."""
    with Ranks(4) as pool:
        yield pool


@pytest.fixture
def start_ranks(start: Callable[..., Running]) -> Callable[..., list[Running]]:
    """Starts the command in several processes, with the variables that torchrun gives them."""

    def started(*words: object, ranks: int) -> list[Running]:
        with socket.socket() as listening:
            listening.bind(("localhost", 0))
            port = listening.getsockname()[1]
        job = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        return [start(*words, environment={**job, "RANK": str(rank)}) for rank in range(ranks)]

    return started
