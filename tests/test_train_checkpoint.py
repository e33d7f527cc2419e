"""Checkpoints of a training run: whole or not there, rotating, readable, and honest about what is wrong."""

import errno
import json
import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from opensoraplan.parallel import shards
from opensoraplan.train.config import CheckpointSettings, OptimizerSettings
from opensoraplan.train.learner.optimizer import make_optimizer, optimizer_tensors
from opensoraplan.train.log.metrics import FILE as METRICS
from opensoraplan.train.log.metrics import Averages
from opensoraplan.train.run import checkpoint
from opensoraplan.train.run.state import DenoiserState


def save(output: Path, step: int, **keeping: Any) -> Path:  # noqa: ANN401
    tensors = {"weight": torch.full((4,), float(step))}
    settings = CheckpointSettings(**keeping)
    return checkpoint.save(
        output, step, parts={"model": tensors}, state={"note": f"of {step}"}, settings=settings
    )


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 7)
    read = checkpoint.load(tmp_path, 7)
    assert read.step == 7
    assert read.state == {"note": "of 7"}
    assert torch.equal(read.parts["model"]["weight"], torch.full((4,), 7.0))


def test_only_the_parts_asked_for_are_read(tmp_path: Path) -> None:
    parts = {"model": {"a": torch.ones(1)}, "ema": {"a": torch.zeros(1)}}
    checkpoint.save(tmp_path, 1, parts=parts, state={})
    assert set(checkpoint.load(tmp_path, 1, only=("ema",)).parts) == {"ema"}


def test_oldest_are_removed_save_every_so_manieth(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step, keep=2, keep_every=20)
    assert checkpoint.steps(tmp_path) == [20, 40, 50]


@pytest.mark.parametrize(("name", "sign"), [("validation_loss", 1), ("validation_psnr", -1)])
def test_the_best_is_kept(tmp_path: Path, name: str, sign: int) -> None:
    values = {10: 3.0, 15: 0.5, 20: 1.0, 30: 2.0, 40: 2.0}  # of 15 there is no checkpoint
    for step, value in values.items():
        with (tmp_path / METRICS).open("a") as file:
            file.write(json.dumps({"step": step, "loss": 0.0}) + "\n")
            file.write(json.dumps({"step": step, name: sign * value}) + "\n")
        if step != 15:
            save(tmp_path, step, keep=1)
    assert checkpoint.steps(tmp_path) == [20, 40]
    assert checkpoint.find(tmp_path, "best") == checkpoint.best(tmp_path) == 20
    save(tmp_path, 50, keep=1, keep_best=False)
    assert checkpoint.steps(tmp_path) == [50]
    with pytest.raises(ValueError, match=r"none of the checkpoints \[50\] has a held-out loss"):
        checkpoint.find(tmp_path, "best")


def test_what_is_set_aside_stays_until_the_next_is_saved(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        save(tmp_path, step, keep=9)
    checkpoint.hide_later(tmp_path, after=4)
    assert checkpoint.steps(tmp_path) == [4]
    aside = sorted((tmp_path / checkpoint.FOLDER).glob(".superseded-*"))
    assert [folder.name[-2:] for folder in aside] == ["08", "12"]
    assert all((folder / "model.safetensors").is_file() for folder in aside)
    # New ones of those numbers, and of lower ones, are there to stay.
    save(tmp_path, 6)
    assert not any(folder.exists() for folder in aside)
    save(tmp_path, 8)
    assert checkpoint.steps(tmp_path) == [6, 8]


def test_unfinished_folder_is_no_checkpoint_and_is_cleared(tmp_path: Path) -> None:
    save(tmp_path, 10)
    unfinished = tmp_path / checkpoint.FOLDER / ".unfinished-step-00000020"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half of it")
    assert checkpoint.steps(tmp_path) == [10]
    checkpoint.remove_unfinished(tmp_path)
    assert not unfinished.exists()


def test_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "serialize_file", full)  # the library's own, that writes
    with pytest.raises(
        ValueError, match=r"step-00000020: the disk is full; the last checkpoint is of step 10"
    ):
        save(tmp_path, 20)
    assert checkpoint.steps(tmp_path) == [10]
    assert not list((tmp_path / checkpoint.FOLDER).glob(".unfinished-*"))
    assert checkpoint.load(tmp_path, 10).step == 10


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("30", "no checkpoint '30': the nearest is 20"), ("last", "no checkpoint 'last': the nearest is 20")],
)
def test_a_step_that_is_not_there_names_the_nearest(tmp_path: Path, wanted: str, message: str) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    with pytest.raises(ValueError, match=message):
        checkpoint.find(tmp_path, wanted)
    assert checkpoint.find(tmp_path, "latest") == 20
    assert checkpoint.find(tmp_path, "10") == 10


def test_damaged_checkpoint_names_the_others(tmp_path: Path) -> None:
    save(tmp_path, 10)
    broken = save(tmp_path, 20) / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-3])
    with pytest.raises(
        ValueError, match=r"step-00000020 cannot be read \(model\.safetensors: .*others: \[10\]"
    ):
        checkpoint.load(tmp_path, 20)


STATE = {"model_config": {}, "clip": {"mean": 1.0, "variance": 0.5}, "outliers_in_a_row": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": None}, "clip: "),
        ({"clip": {"mean": "1", "variance": 0.5}}, "clip.mean: "),
        ({"clip": {"mean": -1.0, "variance": 0.5}}, "clip.mean: "),
        ({"outliers_in_a_row": True}, "outliers_in_a_row: "),
        ({"global_batch": 0}, "global_batch: "),
        ({"averages": {"sums": {}, "counts": {"loss": -1}, "quarters": None}}, "averages.counts.loss: "),
        ({"averages": {"sums": {}, "counts": {}, "quarters": [[1.0]]}}, "averages.quarters"),
        ({"bad_files": []}, "bad_files: "),
        ({"strange": 1}, "unknown key 'strange'"),
        ({"step": 2}, "step is 2, not 1"),
        ([], "must hold one JSON object"),
    ],
)
def test_a_damaged_state_is_told_with_file_and_field(
    tmp_path: Path, changes: dict[str, object] | list[object], message: str
) -> None:
    path = checkpoint.save(tmp_path, 1, parts={}, state=STATE) / checkpoint.STATE
    assert checkpoint.read_state(tmp_path, 1, DenoiserState).clip.mean == 1
    changed = {"step": 1, **STATE, **changes} if isinstance(changes, dict) else changes
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"step-00000001 cannot be read \(.*state\.json") as caught:
        checkpoint.read_state(tmp_path, 1, DenoiserState)
    assert message in str(caught.value)


def test_sums_that_are_not_finite_come_back(tmp_path: Path) -> None:
    averages = Averages()
    averages.add("loss", float("nan"))
    averages.add_losses(torch.tensor([float("inf")]), torch.tensor([0.3]))
    checkpoint.save(tmp_path, 1, parts={}, state={**STATE, "averages": averages.state_dict()})
    again = Averages()
    state = checkpoint.read_state(tmp_path, 1, DenoiserState).averages
    assert state is not None
    again.load_state_dict(state.model_dump())
    means = again.take()
    assert math.isnan(means["loss"])
    assert math.isnan(means["loss/sigma_0.25_0.50"])


def test_a_part_that_is_cut_off_leaves_all_tensors_as_they_are(tmp_path: Path) -> None:
    parts = {name: {"a": torch.ones(4)} for name in ("model", "optimizer", "ema")}
    folder = checkpoint.save(tmp_path, 1, parts=parts, state={})
    last = folder / "ema.safetensors"
    last.write_bytes(last.read_bytes()[:-3])
    now = {name: {"a": torch.zeros(4)} for name in parts}
    with pytest.raises(ValueError, match=r"step-00000001 cannot be read \(ema\.safetensors: "):
        checkpoint.read_into(tmp_path, 1, now)
    assert not any(part["a"].any() for part in now.values())


def pieces(output: Path) -> Path:
    """A checkpoint of two ranks, each with a row; its folder."""
    folder = checkpoint.path_of(output, 1)
    folder.mkdir(parents=True)
    checkpoint.write_state(folder, 1, {})
    for rank in range(2):
        own = {"a": shards.Piece(torch.full((1, 3), float(rank)), (rank, 0))}
        shards.write(folder, "model", own, rank=rank, count=2)
    return folder


def test_pieces_of_two_ranks_are_joined(tmp_path: Path) -> None:
    pieces(tmp_path)
    assert checkpoint.load(tmp_path, 1).parts["model"]["a"].tolist() == [[0.0] * 3, [1.0] * 3]


@pytest.mark.parametrize("lost", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
def test_a_lost_file_of_one_rank_is_told_and_nothing_is_filled(tmp_path: Path, lost: str) -> None:
    (pieces(tmp_path) / lost).unlink()
    now = {"model": {"a": torch.full((2, 3), 7.0)}}
    with pytest.raises(ValueError, match=rf"step-00000001 cannot be read \({lost}: "):
        checkpoint.read_into(tmp_path, 1, now)
    assert (now["model"]["a"] == 7).all()


def test_a_piece_that_is_in_no_file_is_told(tmp_path: Path) -> None:
    folder = pieces(tmp_path)
    shards.write(folder, "model", {}, rank=0, count=2)
    with pytest.raises(ValueError, match=r"model\.safetensors: a: 3 of its 6 numbers are there"):
        checkpoint.read_into(tmp_path, 1, {"model": {"a": torch.zeros(2, 3)}})


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"model": {"b": torch.zeros(2, 3)}}, "model.safetensors: b is missing"),
        ({"model": {"a": torch.zeros(3)}}, r"model.safetensors: a is \[2, 3\], where \[3\] is wanted"),
        ({"ema": {"a": torch.zeros(2, 3)}}, "ema.safetensors: there is no such file"),
    ],
)
def test_tensors_of_another_model_are_told(
    tmp_path: Path, wanted: dict[str, dict[str, Tensor]], message: str
) -> None:
    pieces(tmp_path)
    with pytest.raises(ValueError, match=message):
        checkpoint.read_into(tmp_path, 1, wanted)


class Harm:
    """Pickled as a call."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.made,)


@pytest.mark.parametrize(
    "read", [checkpoint.load, partial(checkpoint.read_into, parts={"model": {"a": torch.zeros(1)}})]
)
def test_an_index_that_would_run_code_is_refused(tmp_path: Path, read: Callable[..., object]) -> None:
    """Of torch.distributed.checkpoint, which earlier versions wrote: a pickle."""
    folder = checkpoint.path_of(tmp_path, 1) / "sharded"
    folder.mkdir(parents=True)
    checkpoint.write_state(folder.parent, 1, {})
    (folder / ".metadata").write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    with pytest.raises(ValueError, match=r"cannot be read \(sharded: .* which no index of tensors does"):
        read(tmp_path, 1)
    assert not (tmp_path / "harm").exists()


def test_optimizer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(4, 3)
    settings = OptimizerSettings(lr=0.1)

    def step(model: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    def parts(model: nn.Linear, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
        weights = dict(model.named_parameters())
        return {"model": weights, "optimizer": optimizer_tensors(optimizer, weights)}

    first = nn.Linear(3, 2)
    first_optimizer = make_optimizer(dict(first.named_parameters()), settings)
    step(first, first_optimizer)
    checkpoint.save(tmp_path, 1, parts=parts(first, first_optimizer), state={})
    second = nn.Linear(3, 2)
    second_optimizer = make_optimizer(dict(second.named_parameters()), settings)
    checkpoint.read_into(tmp_path, 1, parts(second, second_optimizer))
    for _ in range(3):
        step(first, first_optimizer)
        step(second, second_optimizer)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
