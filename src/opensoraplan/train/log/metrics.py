"""What a training run says of itself (metrics.jsonl, TensorBoard, wandb, the console), and its measures.

Not here: what is logged when, which the trainers decide.
"""

import json
import logging
import math
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import psutil
import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from opensoraplan.disk import explain_disk_errors, write_whole
from opensoraplan.parallel.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)

FILE = "metrics.jsonl"
VALIDATED = "validation_seconds"  # logged with whatever a validation has found
QUARTERS = 4

# Matrices of the benchmark: large enough to fill the device, small enough for its memory and a fraction of a
# second.
_CPU_SIDE, _DEVICE_SIDE, _BENCHMARK_SECONDS = 512, 4096, 0.3


@dataclass(frozen=True)
class Trackers:
    """Where the numbers of a run go beside its folder: TensorBoard, and the wandb project of that name, with
    `config` as the run's settings there.
    """

    tensorboard: bool = False
    wandb_project: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


class Metrics:
    """Writes the numbers of a run of `steps` steps, of which `start` are done, into the folder `output`.

    Always a line of metrics.jsonl for each `log`; to the `trackers` too, TensorBoard's in output/tensorboard.
    On the console a progress bar with the numbers named in `shown`, or a line for each `log` where `console`
    (None: stderr) is no terminal. In a `with` statement, log records go around the bar.

    Going on from `start` drops what a broken run logged after that step. Raises ValueError if an
    optional package is wanted and absent, before any file is touched, if wandb refuses the run, and for
    a full or read-only disk.
    """

    def __init__(
        self,
        output: Path,
        *,
        steps: int,
        start: int = 0,
        shown: Sequence[str] = ("loss", "grad_norm", "samples/s"),
        trackers: Trackers = Trackers(),
        console: TextIO | None = None,
    ) -> None:
        self.steps = steps
        self.shown = tuple(shown)
        self._open = ExitStack()
        writer = _summary_writer() if trackers.tensorboard else None
        wandb = _wandb() if trackers.wandb_project is not None else None
        self._path = output / FILE
        with explain_disk_errors(self._path, whole="nothing was changed"):
            output.mkdir(parents=True, exist_ok=True)
        self._wandb: Any = None
        if wandb is not None:  # before anything is dropped, since it may refuse
            self._wandb = _begin_wandb(wandb, output, trackers)
            self._open.callback(self._wandb.finish)
        with explain_disk_errors(self._path, whole="nothing was changed"):
            drop_after(self._path, start)
            self._path.touch()
        self._tensorboard: Any = None
        if writer is not None:
            # What has this step or a later one is hidden.
            self._tensorboard = writer(log_dir=str(output / "tensorboard"), purge_step=start + 1)
            self._open.callback(self._tensorboard.close)
        console = sys.stderr if console is None else console
        self._bar: tqdm | None = None
        if console is not None and console.isatty():
            self._bar = tqdm(
                total=steps, initial=start, desc="training", unit="step", file=console, dynamic_ncols=True
            )
            self._open.callback(self._bar.close)
        self._step = self._start = start
        self._began = time.monotonic()

    def advance(self, step: int) -> None:
        """Step number `step`, counted from 1, is done."""
        if self._bar is not None:
            self._bar.update(step - self._step)
        self._step = step

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Write `values` of step number `step`, which is done. A number that is not finite becomes null in
        metrics.jsonl, since JSON has none.
        """
        self.advance(step)
        line = {"step": step, "time": round(time.time(), 3)}
        line |= {name: _finite(value) for name, value in values.items()}
        # Opened for each line: what could not be written must not be tried again when the file is closed.
        with (
            explain_disk_errors(self._path, whole="its earlier lines are whole"),
            self._path.open("a") as file,
        ):
            file.write(json.dumps(line, allow_nan=False) + "\n")
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            # The step is a value among others: wandb's own cannot go back to that of a checkpoint.
            self._wandb.log({"step": step, **values})
        shown = {name: _short(values[name]) for name in self.shown if name in values}
        if self._bar is not None:
            self._bar.set_postfix(shown)
        else:
            said = "".join(f", {name} {value}" for name, value in shown.items())
            logger.info("step %d of %d%s, %s left", step, self.steps, said, self._left())

    def close(self) -> None:
        """Close all files and the bar."""
        self._open.close()

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._open.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _left(self) -> str:
        done = self._step - self._start
        if not done:
            return "?"
        seconds = (time.monotonic() - self._began) / done * (self.steps - self._step)
        return tqdm.format_interval(seconds)


class Silence:
    """Takes what `Metrics` takes and says nothing."""

    def advance(self, step: int) -> None:
        pass

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Averages:
    """Means of what was added since the last `take`. Tensors stay on their device until then."""

    def __init__(self) -> None:
        self._sums: dict[str, float | Tensor] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)
        self._quarters: Tensor | None = None  # [2, QUARTERS] fp32: sums and counts

    def add(self, name: str, value: float | Tensor, *, count: float = 1.0) -> None:
        """Take in a value, or a scalar tensor, which is the mean of `count` samples."""
        if isinstance(value, Tensor):
            value = value.detach().float()
        self._sums[name] += value * count
        self._counts[name] += count

    @torch.no_grad()
    def add_losses(self, losses: Tensor, sigmas: Tensor) -> None:
        """Take in each sample's loss [B] at its sigma [B]: `loss`, and `loss/sigma_0.25_0.50` and so on, the
        loss of those samples whose sigmas lie in that quarter of [0, 1].
        """
        losses = losses.detach().float()
        self.add("loss", losses.mean(), count=len(losses))
        quarter = (sigmas.detach().to(losses.device) * QUARTERS).long().clamp(0, QUARTERS - 1)
        if self._quarters is None:
            self._quarters = losses.new_zeros(2, QUARTERS)
        self._quarters = self._quarters.to(losses.device)
        self._quarters[0].index_add_(0, quarter, losses)
        self._quarters[1].index_add_(0, quarter, torch.ones_like(losses))

    def take(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """The means over all processes by name, and begin anew. What got no sample is absent."""
        sums = {name: float(total) for name, total in self._sums.items()}
        counts = dict(self._counts)
        if self._quarters is not None:
            for index, (total, count) in enumerate(self._quarters.T.tolist()):
                name = f"loss/sigma_{index / QUARTERS:.2f}_{(index + 1) / QUARTERS:.2f}"
                sums[name], counts[name] = total, count
        sums, counts = ranks.summed(sums), ranks.summed(counts)
        means = {name: total / counts[name] for name, total in sums.items() if counts[name]}
        self._sums.clear()
        self._counts.clear()
        self._quarters = None
        return means

    def state_dict(self, ranks: Ranks = ALONE) -> dict[str, Any]:
        """What all processes have summed up so far, for JSON, which keeps every bit. None: not finite."""
        quarters = None
        if self._quarters is not None:
            flat = dict(enumerate(self._quarters.flatten().tolist()))
            summed = ranks.summed({str(place): value for place, value in flat.items()})
            quarters = [[_finite(summed[str(r * QUARTERS + q)]) for q in range(QUARTERS)] for r in range(2)]
        sums = ranks.summed({name: float(total) for name, total in self._sums.items()})
        return {
            "sums": {name: _finite(total) for name, total in sums.items()},
            "counts": ranks.summed(self._counts),
            "quarters": quarters,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._sums = defaultdict(float, {name: _number(total) for name, total in state["sums"].items()})
        self._counts = defaultdict(float, state["counts"])
        quarters = state["quarters"]
        if quarters is not None:
            quarters = torch.tensor([[_number(value) for value in row] for row in quarters])
        self._quarters = quarters


def drop_after(path: Path, step: int) -> None:
    """Take lines of later steps, and half a line at the end, out of a metrics.jsonl; all of it at step 0.

    The file is replaced whole: nothing is lost if this is broken off. A missing file stays missing.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    kept = b"".join(line for line in content.splitlines(keepends=True) if _is_kept(line, step))
    if kept != content:
        write_whole(path, lambda file: file.write_bytes(kept))


def was_logged(path: Path, step: int, name: str) -> bool:
    """Whether a metrics.jsonl has a value of that name for the step."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = (json.loads(line) for line in lines if _is_kept(line, step))
    return any(line["step"] == step and name in line for line in whole)


def held_out_scores(path: Path) -> dict[int, float]:
    """What a metrics.jsonl has of each validated step: the held-out loss, or the negative PSNR of a VAE. The
    least is the best.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    scores = {}
    for line in (json.loads(line) for line in lines if _is_kept(line, sys.maxsize)):
        loss, psnr = line.get("validation_loss"), line.get("validation_psnr")
        if loss is not None or psnr is not None:
            scores[line["step"]] = -psnr if loss is None else loss
    return scores


def _is_kept(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError, RecursionError):  # half a line, or bytes of a crashed disk
        return False


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _finite(value: float | str) -> float | str | None:
    return value if isinstance(value, str) or math.isfinite(value) else None


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _begin_wandb(wandb: Any, output: Path, trackers: Trackers) -> Any:  # noqa: ANN401
    """wandb's run of the one in `output`; a resumed one goes on under the name that is kept there. Raises
    ValueError if wandb refuses it, which leaves nothing behind.
    """
    kept, folder = output / "wandb_id", output / "wandb"
    name = kept.read_text().strip() if kept.exists() else os.urandom(6).hex()
    new = not folder.exists()
    try:
        run = wandb.init(
            project=trackers.wandb_project,
            dir=str(output),
            id=name,
            resume="allow",
            config=dict(trackers.config),
        )
    except wandb.Error as error:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(
            f"log.wandb_project is set, but wandb says: {error} You can set WANDB_MODE=offline, or "
            "leave it out (metrics.jsonl has the same numbers)"
        ) from None
    kept.write_text(f"{name}\n")
    return run


def _summary_writer() -> Any:  # noqa: ANN401 (a class of an optional package)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "log.tensorboard is set, but the package tensorboard is not installed: "
            'pip install "opensoraplan[tensorboard]", or leave it out (metrics.jsonl has the same numbers)'
        ) from None
    return SummaryWriter


def _wandb() -> Any:  # noqa: ANN401 (an optional module)
    try:
        import wandb  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(
            "log.wandb_project is set, but the package wandb is not installed: "
            'pip install "opensoraplan[wandb]", or leave it out (metrics.jsonl has the same numbers)'
        ) from None
    return wandb


# --- Speed and memory ---------------------------------------------------------------------------------------


def measured_peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s that a plain matrix product reaches on `device`, the best of about 0.3 s. The measure of MFU
    where the maker's figure is not given; on a device that others use it is what they leave.
    """
    side = _CPU_SIDE if device.type == "cpu" else _DEVICE_SIDE
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay where they are
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = math.inf
    end = time.perf_counter() + _BENCHMARK_SECONDS
    # The first product also loads the library's kernels.
    while best == math.inf or time.perf_counter() < end:
        _wait(device)
        start = time.perf_counter()
        torch.matmul(a, b, out=out)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e12


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes allocated on an accelerator so far; on the CPU, the most that this process had resident."""
    if device.type != "cpu":
        return getattr(torch, device.type).max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset

    import resource  # which Windows lacks

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # Linux counts in KiB
