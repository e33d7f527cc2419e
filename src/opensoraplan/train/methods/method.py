"""What differs between methods of training: what is trained, on which batches, and what a step's loss is.

A new method is a file here with a class of this protocol and an entry in METHODS of run/trainer.py; settings
of its own are a class in train/config.py and an entry in SETTINGS of run/files.py. Not here: when steps are
taken, logged and saved (run/).
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from opensoraplan.data.dataset import Failure
from opensoraplan.train.learner.learner import Learner
from opensoraplan.train.log.metrics import Averages
from opensoraplan.train.log.speed import Speed
from opensoraplan.train.run.state import RunState

# Takes note of files that could not be read, and may raise.
Account = Callable[[Sequence[Failure]], None]


@dataclass(frozen=True)
class OutlierPolicy:
    """What is done about steps that the gradient clipping skips: after `patience` of them in a row the
    weights of the last good checkpoint are restored, twice at most; if not `restores`, the run stops
    instead. `advice` says what the user can do about a run that stops.
    """

    patience: int
    restores: bool
    advice: str


class Method(Protocol):
    """One method at work in one run. Steps count from 1, the micro-batches of a step from 0.

    `learners`: what is trained; the first decides by its gradients whether a step is taken, and is what EMA
    and exports are of. `clips`: what a checkpoint knows of the clips; `encoders`: fingerprints of the frozen
    models' files, by their settings. `global_batch`: samples of a step in all processes. `fits`: whether it
    can go on with less memory (`go_leaner`) when it is full. `state`: what checkpoints have beside tensors.
    """

    learners: Sequence[Learner]
    clips: Mapping[str, Any]
    encoders: Mapping[str, str]
    global_batch: int
    outliers: OutlierPolicy
    speed: Speed
    fits: bool
    state: type[RunState]
    validation_advice: str

    def batches(self, start: int, account: Account) -> Generator[Any, None, None]:
        """The micro-batches of this process's share of every step after `start`, in order."""
        ...

    def memory_advice(self, batch: Any) -> str:  # noqa: ANN401 (each method has its own kind of batch)
        """What to say if this micro-batch does not fit into memory."""
        ...

    def loss(self, batch: Any, *, step: int, micro: int, averages: Averages) -> Tensor:  # noqa: ANN401
        """The loss of a micro-batch, a scalar with gradients; what is to be logged goes to `averages`."""
        ...

    def go_leaner(self) -> bool:
        """Need less memory from now on; False if that is not possible."""
        ...

    def finish_step(self, step: int, averages: Averages) -> None:
        """What else a step does once the first learner's weights are changed."""
        ...

    def validate(self, step: int, check: Callable[[], None]) -> Mapping[str, float]:
        """What is logged of the first learner's weights as they are, on held-out data. `check`, which may
        raise, is called every few seconds, at the same moments in all processes.
        """
        ...

    def finish(self) -> Path:
        """Write what the finished run leaves beside checkpoints, and return where its result is."""
        ...
