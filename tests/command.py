"""How a command ended that the fixture `osp` ran in the process of the tests."""

from collections.abc import Callable
from typing import NamedTuple


class Outcome(NamedTuple):
    """`log` is what else it said on stderr."""

    code: int
    out: str
    err: str
    log: str


Command = Callable[..., Outcome]


def mistake(outcome: Outcome) -> str:
    """The one message of a command that failed as it should."""
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err
    assert outcome.err.count("osp: error: ") == 1, outcome.err
    return outcome.err.partition("osp: error: ")[2].strip()
