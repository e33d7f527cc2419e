"""The processes of a job as one: begun by torchrun, agreeing on what happens. One alone is a job, too."""

import datetime
import logging
import os
import pickle
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from opensoraplan.parallel.mesh import DATA, SAMPLE, Mesh, MeshSettings

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

TIMEOUT_S = 600.0
# Told to torchrun, each start of its processes has a new store to meet in. Otherwise all share one, and those
# started again may find the addresses of the dead there, and wait for them (torch 2.5 to 2.13 at least).
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
# Seconds that torchrun, asked to stop, waits for its processes, which save a checkpoint. Otherwise 30.
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
# Seconds to wait for other processes in silence.
_SILENCE_S = 8.0
_UNSET = "to run one process alone, unset RANK, WORLD_SIZE and LOCAL_RANK"
# By type of device; control messages go over the CPU in any case.
# What errors of collectives have in their text, and the part of it that tells users something.
_LOST = re.compile(r"gloo|NCCL|HCCL|Connection (closed|reset) by peer|Timed out waiting", re.IGNORECASE)
_REASON = re.compile(r"Connection (closed|reset) by peer|Timed out waiting \d+ ?ms", re.IGNORECASE)
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}


class JointError(ValueError):
    """What one of several processes could not do; all of them raise it at the same moment, and can save."""


class Ranks:
    """What a trainer needs to know of the job's processes. `mesh` is None where there is only this one.
    `patience`: how long they wait for each other.
    """

    def __init__(self, mesh: Mesh | None, *, timeout: float = TIMEOUT_S) -> None:
        self.mesh = mesh
        self.patience = datetime.timedelta(seconds=timeout)

    @property
    def rank(self) -> int:
        return 0 if self.mesh is None else dist.get_rank()

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def count(self) -> int:
        return 1 if self.mesh is None else dist.get_world_size()

    @property
    def data_rank(self) -> int:
        """Which share of each global batch is this process's; processes of one sample have the same."""
        return 0 if self.mesh is None else self.mesh.rank(DATA)

    @property
    def data_ranks(self) -> int:
        return 1 if self.mesh is None else self.mesh.size(DATA)

    @property
    def sample_ranks(self) -> int:
        """How many processes work on the same sample."""
        return 1 if self.mesh is None else self.mesh.size(SAMPLE)

    def agree(self, decide: Callable[[], Value]) -> Value:
        """What `decide` returns in the first process, in all; what it raises there is raised in all, in the
        others as a RuntimeError if it cannot be sent.
        """
        if self.mesh is None:
            return decide()
        box: list[Value | Exception | None] = [None]
        if not self.first:
            dist.broadcast_object_list(box, src=0)
            if isinstance(box[0], Exception):
                raise box[0]
            return box[0]  # type: ignore[return-value]
        try:
            value = decide()
        except Exception as error:
            dist.broadcast_object_list([sendable(error)], src=0)
            raise
        dist.broadcast_object_list([value], src=0)
        return value

    def all_or_none(self, do: Callable[[], Value]) -> Value:
        """What `do`, which talks to no other process, returns in this one. If it raises in any process, all
        raise JointError with what the first of those said.
        """
        if self.mesh is None:
            return do()
        mine: Value | Exception
        try:
            mine = do()
        except Exception as error:
            mine = error
        failed = isinstance(mine, Exception)
        if not self.any(failed):
            return mine  # type: ignore[return-value]
        said = f"rank {self.rank} of {self.count}: {explain(mine)}" if isinstance(mine, Exception) else ""
        all_said = self.merged({str(self.rank): said})
        first = next(text for _, text in sorted(all_said.items(), key=lambda one: int(one[0])) if text)
        raise JointError(first) from (mine if isinstance(mine, Exception) else None)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process. All of them ask."""
        if self.mesh is None:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags)
        return bool(flags)

    def summed(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over the processes with different samples. All of them ask, perhaps with different names."""
        if self.mesh is None:
            return dict(values)
        everyones: list[dict[str, float]] = [{} for _ in range(self.data_ranks)]
        dist.all_gather_object(everyones, dict(values), group=self.mesh.group(DATA))
        names = dict.fromkeys(name for one in everyones for name in one)
        return {name: sum(one.get(name, 0.0) for one in everyones) for name in names}

    def merged(self, values: Mapping[str, str]) -> dict[str, str]:
        """What any process has. All of them ask."""
        if self.mesh is None:
            return dict(values)
        everyones: list[dict[str, str]] = [{} for _ in range(self.count)]
        dist.all_gather_object(everyones, dict(values))
        return {name: value for one in everyones for name, value in one.items()}


ALONE = Ranks(None)


def explain(error: BaseException) -> str:
    """An error in one sentence: its text, after the name of its kind unless that is one that users cause."""
    text = str(error).strip()
    usual = isinstance(error, ValueError | OSError | FloatingPointError | MemoryError)
    return text if usual and text else f"{type(error).__name__}: {text.partition(chr(10))[0]}".rstrip(": ")


def sendable(error: Exception) -> Exception:
    """The error, or one that says the same where it cannot be pickled, as when it is made of other arguments
    than it keeps.
    """
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def place_in_job() -> tuple[int, int]:
    """This process's number, and how many torchrun started; (0, 1) without torchrun, which sets RANK. Raises
    ValueError if the variables are no numbers.
    """
    if "RANK" not in os.environ:
        return 0, 1
    rank, ranks = os.environ["RANK"], os.environ.get("WORLD_SIZE", "")
    if not (rank.isdecimal() and ranks.isdecimal() and int(rank) < int(ranks)):
        raise ValueError(f"RANK={rank} and WORLD_SIZE={ranks} name no process of a job: {_UNSET}")
    return int(rank), int(ranks)


def device_of_rank(device: torch.device) -> torch.device:
    """The device of this process: of several on a machine, the one with its local rank's number."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or device.type == "cpu":
        return device
    if device.index is not None:
        if place_in_job()[1] > 1:
            raise ValueError(f"{device} is one device for several processes: give {device.type}")
        return device
    count = getattr(torch, device.type).device_count()
    if int(local) >= count:
        raise ValueError(
            f"this process wants {device.type}:{local}, but there are {count}: start as many at most"
        )
    return torch.device(device.type, int(local))


@contextmanager
def joined(settings: MeshSettings, device: torch.device, *, timeout: float = TIMEOUT_S) -> Iterator[Ranks]:
    """Join the job that torchrun started, arranged as `settings` say; without torchrun, be the only process.

    A collective that takes more than `timeout` seconds, since another process hangs, or that another has left
    by its death, raises ConnectionError. Only the first process logs what is no warning. Raises ValueError
    for processes that cannot be arranged.
    """
    if "RANK" not in os.environ:
        settings.filled(1)
        yield ALONE
        return
    if device.type not in _BACKENDS:
        raise ValueError(f"several processes need a device of {', '.join(_BACKENDS)}, got {device.type}")
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ.get(OWN_STORE) != "1":
        logger.warning("set %s=1 for torchrun, or processes that it restarts may hang", OWN_STORE)
    if device.type != "cpu":
        getattr(torch, device.type).set_device(device)
    with _meeting_told():
        patience = datetime.timedelta(seconds=min(timeout, TIMEOUT_S))
        dist.init_process_group(_BACKENDS[device.type], timeout=patience)
    try:
        _set_pg_timeout(datetime.timedelta(seconds=timeout))
        ranks = Ranks(mesh := Mesh.build(settings, device_type=device.type), timeout=timeout)
        for group in mesh.groups():  # which torch gives its own default
            _set_pg_timeout(ranks.patience, group)
        if not ranks.first:
            logging.getLogger("opensoraplan").setLevel(logging.WARNING)
        with _lost_ranks_told(ranks):
            yield ranks
    finally:
        dist.destroy_process_group()


@contextmanager
def _meeting_told() -> Iterator[None]:
    """Say so if the other processes of a job do not come, and how it goes on without them. Signals, which
    torch leaves unanswered while it waits for them, end the process.
    """
    rank, ranks = place_in_job()
    master = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    others = f"process {rank} of {ranks} (RANK, WORLD_SIZE) waits for the others at {master}"
    met = threading.Event()

    def tell() -> None:
        if not met.wait(_SILENCE_S):
            logger.warning("%s; %s", others, _UNSET)

    handlers = {
        number: signal.signal(number, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is threading.main_thread()
    }
    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{others}: {str(error).splitlines()[0]}; {_UNSET}") from error
    finally:
        met.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _lost_ranks_told(ranks: Ranks) -> Iterator[None]:
    """Turn errors of collectives into a ConnectionError of one sentence."""
    try:
        yield
    except RuntimeError as error:
        if (why := why_lost(error)) is None:
            raise
        raise ConnectionError(f"rank {ranks.rank} of {ranks.count}: {why}") from error


def why_lost(error: Exception) -> str | None:
    """What is said of an error that a collective raises when another process has died or hangs; None
    for other errors.
    """
    text = str(error)
    if not isinstance(error, dist.DistError) and not _LOST.search(text):
        return None
    reason = _REASON.search(text)
    said = reason[0] if reason else text.strip().partition("\n")[0]
    return f"another process has died or hangs, see what it said ({said})"
