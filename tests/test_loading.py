"""Micro-batches: in order, and with plain errors however many processes read them."""

import logging
import multiprocessing
import os
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from opensoraplan.data.buckets import BucketSampler, Draw
from opensoraplan.data.dataset import ClipDataset, Failure, collate
from opensoraplan.data.record import Record
from opensoraplan.data.selection import SelectionSettings, select
from opensoraplan.train.inputs.loading import BadFileAccount, micro_batches, shares_of_steps


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_data_is_the_same_in_a_worker(workers: int, tmp_path: Path) -> None:
    path = tmp_path / "cut_off.mp4"
    path.write_bytes(b"half of it")
    record = Record(path, ("a ball",), num_frames=9, fps=24, height=64, width=64)
    size = SelectionSettings(num_frames=9, min_num_frames=9, max_height=64, max_width=64)
    samples = select([record], size).kept
    sampler = BucketSampler([sample.shape for sample in samples], global_batch=1, seed=0)
    batches = micro_batches(
        ClipDataset(samples, seed=0),
        lambda: shares_of_steps(sampler, range(1), accumulate=1),
        workers=workers,
        collate=collate,
        batch_bytes=1,
    )
    with pytest.raises(
        ValueError, match=r"^none of 1 clips of 9x64x64 can be read: .*cut_off\.mp4"
    ) as caught:
        next(batches)
    assert "Traceback" not in str(caught.value)


class Deadly(Dataset[int]):
    """Ends the process that reads from it, as a full /dev/shm or a crash of FFmpeg does."""

    def __getitem__(self, _draw: Draw) -> int:
        os._exit(1)


def test_a_worker_that_dies_is_an_error_that_says_what_helps() -> None:
    sampler = BucketSampler([(9, 64, 64)], global_batch=1, seed=0)
    batches = micro_batches(
        Deadly(),
        lambda: shares_of_steps(sampler, range(1), accumulate=1),
        workers=1,
        collate=list,
        batch_bytes=1,
    )
    with pytest.raises(ValueError, match=r"worker .* has died \(exit code 1\): .*lower data\.workers"):
        next(batches)


class Faulty(Dataset[int]):
    """Has a bug, which is none of the errors that users cause."""

    def __getitem__(self, _draw: Draw) -> int:
        return {}["length"]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unexpected_error_is_the_same_in_a_worker(workers: int) -> None:
    sampler = BucketSampler([(9, 64, 64)], global_batch=1, seed=0)
    batches = micro_batches(
        Faulty(),
        lambda: shares_of_steps(sampler, range(1), accumulate=1),
        workers=workers,
        collate=list,
        batch_bytes=1,
    )
    with pytest.raises(KeyError) as caught:
        next(batches)
    assert caught.value.args == ("length",)


class Ready(Dataset[int]):
    def __getitem__(self, _draw: Draw) -> int:
        return 1


def test_a_worker_that_is_killed_interrupts_nothing_and_is_told_with_the_next_batch() -> None:
    """Torch's own handler raises at any moment, in the middle of an update of weights, too."""
    sampler = BucketSampler([(9, 64, 64)], global_batch=1, seed=0)
    batches = micro_batches(
        Ready(),
        lambda: shares_of_steps(sampler, range(1000), accumulate=1),
        workers=2,
        collate=list,
        batch_bytes=1,
    )
    others = multiprocessing.active_children()
    assert next(batches) == [1]
    first, second = (child for child in multiprocessing.active_children() if child not in others)
    first.kill()
    first.join()
    with pytest.raises(ValueError, match=r"has died \(SIGKILL\)"):
        next(batches)
    assert not second.is_alive()


def test_an_account_of_bad_files_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    bad = [Failure(Path(f"{number}.mp4"), f"{number}.mp4 is cut off") for number in range(2)]
    first, second = BadFileAccount(1), BadFileAccount(1)
    first.add(bad[:1])
    second.load_state_dict(first.state_dict())
    with caplog.at_level(logging.WARNING):
        second.add(bad[:1])
    assert len(second) == 1
    with pytest.raises(ValueError, match=r"2 files .*, 1 are allowed: 0\.mp4 is cut off; 1\.mp4"):
        second.add(bad[1:])
