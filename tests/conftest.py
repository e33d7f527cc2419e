"""What the tests share: a tiny release, the diffusers folder that is converted from it, a few clips, a run to
train. Read them, never write.
"""

import json
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Command, Outcome, Running
from moving_shapes.writing import write_dataset
from tiny_models import align
from tiny_release import sources_of, write_release
from torch.utils._python_dispatch import TorchDispatchMode

from opensoraplan import cli
from opensoraplan.formats.assemble import save_diffusers
from opensoraplan.formats.mindspeed.inference import read_inference
from opensoraplan.pipeline import OpenSoraPlanPipeline
from opensoraplan.train.config import TrainSettings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=1, help="how often tests of killed runs kill each")


def pytest_configure() -> None:
    """Signals reach the commands that tests start, also where a shell or nohup has these ignored."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same numbers each time."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models as small as these only get slower with more: ten times on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache folder is one of the tests, and of the commands that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    """How often a run is killed at random."""
    return request.config.getoption("--kills")


@pytest.fixture
def osp(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> Command:
    """Runs the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, logger="opensoraplan")  # and back, whatever the command sets

    def command(*arguments: object, program: Callable[[], None] = cli.main) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["osp", *map(str, arguments)])
        caplog.clear()
        code = 0
        try:
            program()
        except SystemExit as end:
            code = int(end.code or 0)
        return Outcome(code, *capsys.readouterr(), caplog.text)

    return command


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts the command in a process of its own, in an empty folder; kills what is left of it."""
    started: list[Running] = []

    def running(*words: object, **options: Any) -> Running:  # noqa: ANN401
        started.append(Running(*words, folder=tmp_path, **options))
        return started[-1]

    yield running
    for process in started:
        process.kill()


@pytest.fixture
def start_ranks(start: Callable[..., Running]) -> Callable[..., list[Running]]:
    """Starts the command in several processes, with the variables that torchrun gives them."""

    def started(*words: object, ranks: int, **options: Any) -> list[Running]:  # noqa: ANN401
        with socket.socket() as listening:
            listening.bind(("localhost", 0))
            port = listening.getsockname()[1]
        job = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        return [start(*words, environment={**job, "RANK": str(rank)}, **options) for rank in range(ranks)]

    return started


class Watch(TorchDispatchMode):
    """`seen`: what `see` makes of the arguments of each call of one of torch's operations."""

    def __init__(self, operation: torch._ops.OpOverload, see: Callable[[tuple[Any, ...]], Any]) -> None:
        super().__init__()
        self._operation = operation
        self._see = see
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if func is self._operation:
            self.seen.append(self._see(args))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watch() -> type[Watch]:
    """A context manager, see `Watch`."""
    return Watch


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that examples/tiny_release.py writes."""
    folder = tmp_path_factory.mktemp("tiny") / "release"
    write_release(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The diffusers folder of the tiny release."""
    inference = read_inference(tiny_release / "inference.json")
    sources = sources_of(tiny_release)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_diffusers(sources, folder, scheduler=inference.scheduler, max_text_tokens=inference.max_text_tokens)
    return folder


@pytest.fixture
def pipeline(tiny_model: Path) -> OpenSoraPlanPipeline:
    """The tiny release with all its parts, each test's own."""
    made = OpenSoraPlanPipeline.from_pretrained(tiny_model, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    align(made)
    return made


@pytest.fixture(scope="session")
def tiny_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of eight captioned clips of 9 x 64 x 64."""
    folder = tmp_path_factory.mktemp("tiny") / "clips"
    return write_dataset(folder, count=8, size=(9, 64, 64))


@pytest.fixture(scope="session")
def tiny_mixed(tiny_clips: Path) -> Path:
    """The same clips with the first five frames of three of them, and one that is too slow."""
    whole = json.loads(tiny_clips.with_name("annotation.json").read_text())
    cut = [{**record, "cut": [0, 5]} for record in whole[:3]]
    path = tiny_clips.with_name("mixed.json")
    path.write_text(json.dumps([*whole, *cut, {**whole[0], "fps": 8}]))
    return path


@pytest.fixture
def tiny_run(tiny_model: Path, tiny_clips: Path, tmp_path: Path) -> Callable[..., TrainSettings]:
    """Settings of a short run on those clips; `changes` are by section, as in a TOML file."""

    def settings(output: str = "run", **changes: dict[str, Any]) -> TrainSettings:
        size = {"num_frames": 9, "min_num_frames": 9, "train_fps": 12, "max_height": 64, "max_width": 64}
        values: dict[str, Any] = {
            "model": {"pretrained": tiny_model, "compute": "fp32"},
            "vae": {"pretrained": tiny_model},
            "text": {"t5": tiny_model, "clip": tiny_model, "compute": "fp32"},
            "data": {"manifest": tiny_clips, "batch_size": 2, "workers": 0, "selection": size},
            "optimizer": {"steps": 6, "lr": 1e-3, "ema_decay": 0.9},
            "log": {"every": 1, "peak_tflops": 0.1},
            "checkpoint": {"every": 2, "keep": 10},
        }
        for section, over in changes.items():
            values[section] = {**values.get(section, {}), **over}
        return TrainSettings.read({"output": tmp_path / output, **values}, where="the test's run")

    return settings
