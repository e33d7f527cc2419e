"""Metrics of a run: files that survive a broken run, the console, averages, speed and memory."""

import io
import json
import logging
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opensoraplan.train.log.metrics import (
    Averages,
    Metrics,
    Trackers,
    drop_after,
    measured_peak_tflops,
    peak_memory,
)

CPU = torch.device("cpu")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def run(output: Path, steps: range, **options: Any) -> None:  # noqa: ANN401
    start, trackers = steps.start - 1, Trackers(**options)
    with Metrics(output, steps=100, start=start, console=io.StringIO(), trackers=trackers) as metrics:
        for step in steps:
            metrics.log(step, {"loss": 1 / step})


def test_a_line_for_each_log_is_there_at_once(tmp_path: Path) -> None:
    with Metrics(tmp_path / "run", steps=3, console=io.StringIO()) as metrics:
        metrics.log(1, {"loss": 0.5, "action": "step"})
        (line,) = lines(tmp_path / "run")
        assert (line["step"], line["loss"], line["action"]) == (1, 0.5, "step")
        metrics.log(2, {"loss": 0.25})
        assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]


def test_a_full_disk_is_said_plainly(tmp_path: Path) -> None:
    with Metrics(tmp_path, steps=2, console=io.StringIO()) as metrics:
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(ValueError, match=r"metrics\.jsonl: the disk is full; its earlier lines are"):
            metrics.log(1, {"loss": 0.5})


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    with Metrics(tmp_path, steps=1, console=io.StringIO()) as metrics:
        metrics.log(1, {"grad_norm": math.nan, "threshold": math.inf, "loss": 1.0})
    (line,) = lines(tmp_path)
    assert (line["grad_norm"], line["threshold"], line["loss"]) == (None, None, 1.0)


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    run(tmp_path, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    run(tmp_path, range(6, 11))
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 11))
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_starts_with_an_empty_file(tmp_path: Path) -> None:
    run(tmp_path, range(1, 4))
    run(tmp_path, range(1, 3))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_file_with_nothing_to_drop_is_left_alone(tmp_path: Path) -> None:
    run(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    before = path.stat()
    drop_after(path, 3)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    drop_after(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.parametrize(
    ("module", "options", "extra"),
    [
        ("torch.utils.tensorboard", {"tensorboard": True}, r"opensoraplan\[tensorboard\]"),
        ("wandb", {"wandb_project": "shapes"}, r"opensoraplan\[wandb\]"),
    ],
)
def test_an_absent_package_is_named_before_anything_is_written(
    module: str, options: dict[str, Any], extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, range(1, 4))
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ValueError, match=extra):
        run(tmp_path, range(1, 4), **options)
    assert len(lines(tmp_path)) == 3


def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path: Path) -> None:
    run(tmp_path, range(1, 8), tensorboard=True)
    run(tmp_path, range(6, 11), tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 11))
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([1 / n for n in range(1, 11)])


def test_wandb_keeps_a_resumed_run_under_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path, range(1, 4), wandb_project="shapes", config={"seed": 5})
    run(tmp_path, range(3, 6), wandb_project="shapes", config={"seed": 5})
    name = (tmp_path / "wandb_id").read_text().strip()
    runs = sorted(tmp_path.glob(f"wandb/offline-run-*-{name}*/run-{name}.wandb"))
    assert len(runs) == 2
    end = time.monotonic() + 60  # wandb writes in a process of its own, which may lag behind
    for file in runs:
        while missing := [word for word in (b"shapes", b"seed", b"loss") if word not in file.read_bytes()]:
            assert time.monotonic() < end, f"{file} has no {missing}"
            time.sleep(0.1)


def test_what_wandb_refuses_is_said_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(tmp_path, range(1, 4))
    with pytest.raises(ValueError, match=r"wandb says: .*project name.*a/b.* set WANDB_MODE=offline"):
        run(tmp_path, range(2, 4), wandb_project="a/b")
    assert len(lines(tmp_path)) == 3


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="opensoraplan")
    console = io.StringIO()
    with Metrics(tmp_path, steps=20, start=4, console=console) as metrics:
        metrics.advance(5)
        metrics.log(6, {"loss": 0.123456, "hidden": 3.0})
    (message,) = caplog.messages
    assert re.fullmatch(r"step 6 of 20, loss 0\.1235, \d\d:\d\d left", message)
    assert console.getvalue() == ""


def test_bar_with_numbers_and_log_records_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    console = Terminal()
    monkeypatch.setattr(sys, "stderr", console)
    handler = logging.StreamHandler(console)
    logging.getLogger().addHandler(handler)
    try:
        with Metrics(tmp_path, steps=20, start=4) as metrics:
            metrics.log(6, {"loss": 0.5, "grad_norm": 2.0})
            logging.getLogger("opensoraplan.test").info("a checkpoint")
    finally:
        logging.getLogger().removeHandler(handler)
    text = console.getvalue()
    assert "6/20" in text
    assert "loss=0.5, grad_norm=2" in text
    assert "\ra checkpoint\n" in text  # at the start of a line, which the bar had left


def test_averages_since_the_last_take() -> None:
    averages = Averages()
    averages.add("wait", 1.0)
    averages.add("wait", 3.0)
    averages.add("norm", torch.tensor(2.0, requires_grad=True), count=3)
    averages.add("norm", torch.tensor(6.0))
    assert averages.take() == {"wait": 2.0, "norm": 3.0}
    averages.add("wait", 7.0)
    assert averages.take() == {"wait": 7.0}
    assert averages.take() == {}


def test_loss_by_quarter_of_sigma() -> None:
    averages = Averages()
    averages.add_losses(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 0.25, 1.0]))
    averages.add_losses(torch.tensor([5.0]), torch.tensor([0.2499]))
    means = averages.take()
    assert means == {"loss": 3.0, "loss/sigma_0.00_0.25": 3.0, "loss/sigma_0.25_0.50": 2.0,
                     "loss/sigma_0.75_1.00": 4.0}  # fmt: skip
    averages.add_losses(torch.tensor([8.0]), torch.tensor([0.6]))
    assert averages.take() == {"loss": 8.0, "loss/sigma_0.50_0.75": 8.0}


def test_averages_go_on_bit_for_bit() -> None:
    torch.manual_seed(0)
    whole, first, second = Averages(), Averages(), Averages()
    for step in range(7):
        losses, sigmas, norm = torch.rand(3), torch.rand(3), torch.rand(()).item()
        if step == 4:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for averages in (whole, first if step < 4 else second):
            averages.add_losses(losses, sigmas)
            averages.add("grad_norm", norm)
    assert second.take() == whole.take()
    second.load_state_dict(json.loads(json.dumps(Averages().state_dict())))
    assert second.take() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_peak(dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    assert 1e-4 < measured_peak_tflops(CPU, dtype) < 100
    assert torch.equal(torch.get_rng_state(), state)


def test_peak_memory_of_this_process() -> None:
    # torch alone takes more than 50 MiB: a wrong unit would be beyond one of the bounds.
    assert 50 * 2**20 < peak_memory(CPU) < 2**40
    status = Path("/proc/self/status")
    if status.exists():
        (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert peak_memory(CPU) == pytest.approx(int(kib) * 1024, rel=0.05)
