"""Two processes with a simulated card each do what one process does on the CPU."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cards
import denoising
import pytest
from command import Command, Running
from denoising import assert_equal
from ranks import Ranks
from simulated.device import install

from opensoraplan.data.video import read_frames
from opensoraplan.train.config import TrainSettings
from opensoraplan.train.run import checkpoint
from opensoraplan.train.run.trainer import train

StartRanks = Callable[..., list[Running]]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Two processes with a card each, talking through what stands for HCCL."""
    with Ranks(2, backend=cards.BACKEND, begin=install) as pool:
        yield pool


# Sizes of the mesh, options, and a collective that must have been on the card.
CASES: dict[str, tuple[dict[str, int], dict[str, Any], str]] = {
    "fsdp": ({"dp_shard": 2}, {}, "_reduce_scatter_base_"),
    "sp": ({"sp": 2}, {"grid": denoising.RAGGED}, "alltoall_base_"),
    "tp": ({"tp": 2}, {"grid": denoising.RAGGED, "recompute": 3}, "_allgather_base_"),
}


@pytest.mark.parametrize("case", CASES)
def test_training_on_a_mesh_of_cards_equals_one_process_on_the_cpu(ranks: Ranks, case: str) -> None:
    sizes, options, collective = CASES[case]
    expected = denoising.train(None, **options)
    for result, calls in ranks(cards.train, sizes, options, ranks=2):
        assert_equal(result, expected)
        assert calls[f"c10d::{collective}"]


def test_a_collective_waits_for_the_stream_that_writes_what_is_sent(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match="does not wait for stream"):
        ranks(cards.gather_without_waiting, ranks=2)


@pytest.mark.parametrize("fault", ["reads", "writes"])
def test_what_a_collective_is_at_work_on_is_not_used(ranks: Ranks, fault: str) -> None:
    with pytest.raises(AssertionError, match="does not wait for stream"):
        ranks(cards.use_without_waiting, fault, ranks=2)
    ranks(cards.use_without_waiting, "none", ranks=2)


def finish(job: list[Running]) -> None:
    for process in job:
        assert process.wait() == 0, process.said()


@pytest.mark.parametrize("sharing", [[], ["--tp", 2], ["--branch-ranks", 2]], ids=["sp", "tp", "guidance"])
def test_two_cards_make_the_picture_of_the_cpu(
    osp: Command, start_ranks: StartRanks, tiny_model: Path, tmp_path: Path, sharing: list[object]
) -> None:
    words = ["generate", "a fox", "--model", tiny_model, "--dtype", "fp32", "--steps", 2, "--frames", 1]
    words += ["--height", 64, "--width", 64, "--batched-guidance"]
    outcome = osp(*words, "--device", "cpu", "--out", "cpu.png")
    assert outcome.code == 0, outcome
    finish(
        start_ranks(*words, *sharing, "--device", "npu", "--out", "npu.png", ranks=2, program=cards.command)
    )
    expected, made = (read_frames(tmp_path / f"{device}.png").int() for device in ("cpu", "npu"))
    assert expected.float().std() > 1
    assert (made - expected).abs().max() <= 1
    assert (made != expected).float().mean() < 0.02


def test_two_cards_train_as_the_cpu_and_one_goes_on_with_their_checkpoint(
    start_ranks: StartRanks, tiny_run: Callable[..., TrainSettings], tmp_path: Path
) -> None:
    def run_of(output: str, *, steps: int, ranks: int) -> TrainSettings:
        run = tiny_run(
            output,
            data={"batch_size": 1},
            optimizer={"accumulate": 2 // ranks, "steps": steps, "eps": 1e-6},
            checkpoint={"every": 1},
        )
        return run.model_copy(update={"device": output})

    train(run_of("cpu", steps=3, ranks=1))
    together = run_of("npu", steps=2, ranks=2)
    file = tmp_path / "run.json"
    file.write_text(together.model_dump_json())
    finish(start_ranks("train", file, ranks=2, program=cards.command))
    assert len(list(checkpoint.path_of(together.output, 2).glob("ema*"))) == 2
    train(run_of("npu", steps=3, ranks=1), resume="latest")
    for name in ("loss", "grad_norm"):
        made, expected = (logged(tmp_path / device, name) for device in ("npu", "cpu"))
        assert made == pytest.approx(expected, rel=1e-4)


def logged(output: Path, name: str) -> list[float]:
    records = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [record[name] for record in records if name in record]
