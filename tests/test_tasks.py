"""Training with frames of the clip: which are given, what counts, and runs from clips and features."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moving_shapes.writing import write_dataset
from tiny_models import DENOISER
from torch import Tensor

from opensoraplan.data.buckets import Draw
from opensoraplan.models.conditions import Conditions
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.text import PromptEmbeds
from opensoraplan.train.config import ConditionSettings, FlowSettings, TrainSettings
from opensoraplan.train.inputs.cache import write_cache
from opensoraplan.train.methods import flow_loss
from opensoraplan.train.methods.tasks import draw_tasks
from opensoraplan.train.run.export import export_run
from opensoraplan.train.run.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")

MakeRun = Callable[..., TrainSettings]
EVERY = {"first": 0.3, "prefix": 0.2, "first_last": 0.3, "independent": 0.5}
FRAMES = 4


def places(count: int) -> list[Draw]:
    return [Draw(index=0, epoch=0, step=step, slot=slot) for step in range(count // 4) for slot in range(4)]


def test_tasks_come_as_often_as_they_should() -> None:
    settings, draws = ConditionSettings(**EVERY), places(4000)
    found, own = Counter(), 0
    for draw in draws:
        tasks = draw_tasks([draw], FRAMES, settings, seed=3)
        assert tasks is not None
        assert tasks.padding is None
        found["".join("g" if given else "-" for given in tasks.given[0].tolist())] += 1
        own += bool(tasks.of_their_own)
    shares = {name: count / len(draws) for name, count in found.items()}
    assert set(shares) == {"----", "g---", "gg--", "ggg-", "g---g"}
    wanted = {"----": 0.2, "g---": 0.3, "gg--": 0.1, "ggg-": 0.1, "g---g": 0.3}
    assert all(shares[name] == pytest.approx(share, abs=0.03) for name, share in wanted.items())
    # Of a single frame that is left, there is nothing to be of its own.
    assert own / len(draws) == pytest.approx(0.5 * (1 - 0.1), abs=0.03)


def test_a_samples_task_does_not_depend_on_its_batch() -> None:
    settings, draws = ConditionSettings(**EVERY), places(8)
    together = draw_tasks(draws, FRAMES, settings, seed=1)
    assert together is not None
    assert together.padding is not None
    for place, draw in enumerate(draws):
        alone = draw_tasks([draw], FRAMES, settings, seed=1)
        assert alone is not None
        count = alone.given.shape[1]
        assert torch.equal(together.given[place, :count], alone.given[0])
        assert together.padding[place].tolist() == [False] * count + [True] * (FRAMES + 1 - count)


@pytest.mark.parametrize("frames", [1, 2])
def test_short_clips_are_given_what_they_have(frames: int) -> None:
    tasks = draw_tasks(places(200), frames, ConditionSettings(**EVERY), seed=0)
    assert tasks is not None
    assert not tasks.given[:, :frames].all(1).any()
    assert tasks.given[:, :frames].any() == (frames > 1)


def test_without_tasks_nothing_is_drawn_otherwise() -> None:
    shape, draws = (4, FRAMES, 4, 4), places(8)
    plain = flow_loss.draw(draws, shape, FlowSettings(), conditions=ConditionSettings(), seed=2)
    assert plain.tasks is None
    given = flow_loss.draw(draws, shape, FlowSettings(), conditions=ConditionSettings(first=1), seed=2)
    for one, other in zip(plain[:3], given[:3], strict=True):
        assert torch.equal(one, other)


# --- Loss ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> SparseUMMDiT:
    torch.manual_seed(0)
    model = SparseUMMDiT(**DENOISER).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.1)
    return model


def text(batch: int) -> PromptEmbeds:
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(batch, 3, 24, generator=generator)
    pooled = torch.randn(batch, 20, generator=generator)
    return PromptEmbeds(states, torch.ones(batch, 3, dtype=torch.bool), pooled)


def loss_of(model: torch.nn.Module, latents: Tensor, conditions: Conditions, sigma: Tensor) -> Tensor:
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7))
    return flow_loss.losses(
        model, latents, conditions, sigma=sigma, noise=noise, dtype=torch.float32, weighting="logit_normal"
    )


def test_what_is_predicted_for_given_frames_has_no_gradient(model: SparseUMMDiT) -> None:
    """And the others weigh as if they were the whole clip."""
    latents = torch.randn(2, 4, FRAMES, 4, 4)
    given = torch.tensor([[True, False, False, False], [True, True, True, False]])
    seen: list[Tensor] = []

    def keep(_model: torch.nn.Module, _args: object, output: tuple[Tensor]) -> tuple[Tensor]:
        output[0].retain_grad()
        seen.append(output[0])
        return output

    handle = model.register_forward_hook(keep)
    loss_of(model, latents, Conditions(text(2), latents, given), torch.tensor([0.5, 0.8])).sum().backward()
    handle.remove()
    gradient = seen[0].grad
    assert gradient is not None
    of_frames = gradient.abs().sum((1, 3, 4))
    assert torch.equal(of_frames == 0, given)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7))
    error = (seen[0].detach() - (noise - latents)).square()
    wanted = torch.stack([error[0, :, 1:].mean(), error[1, :, 3:].mean()])
    found = loss_of(model, latents, Conditions(text(2), latents, given), torch.tensor([0.5, 0.8]))
    assert torch.allclose(found, wanted)


def test_given_frames_are_seen_clean_at_timestep_0(model: SparseUMMDiT) -> None:
    latents, seen = torch.randn(1, 4, FRAMES, 4, 4), {}
    given = torch.tensor([[True, False, False, False]])

    def keep(_model: torch.nn.Module, _args: object, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    loss_of(model, latents, Conditions(text(1), latents, given), torch.tensor([0.5]))
    handle.remove()
    assert torch.equal(seen["hidden_states"][:, :, 0], latents[:, :, 0])
    assert not torch.equal(seen["hidden_states"][:, :, 1], latents[:, :, 1])
    assert seen["timestep"].tolist() == [[0, 500, 500, 500]]


@torch.no_grad()
def test_samples_of_one_batch_do_not_depend_on_padding(model: SparseUMMDiT) -> None:
    """One has a last frame behind its own, the other only padding there."""
    frames = FRAMES + 1
    latents, sigma = torch.randn(2, 4, frames, 4, 4), torch.tensor([0.5, 0.7])
    given = torch.tensor([[True, *[False] * 3, True], [*[False] * 4, True]])
    padding = torch.tensor([[False] * frames, [*[False] * 4, True]])
    together = loss_of(model, latents, Conditions(text(2), latents, given, padding), sigma)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7))
    second = PromptEmbeds(**{name: tensor[1:] for name, tensor in text(2).tensors.items()})
    alone = flow_loss.losses(
        *(
            model,
            latents[1:, :, :FRAMES],
            Conditions(second),
        ),
        sigma=sigma[1:],
        noise=noise[1:, :, :FRAMES],
        dtype=torch.float32,
        weighting="logit_normal",
    )
    assert float(together[1]) == pytest.approx(float(alone), rel=1e-5)


# --- Runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def longer_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("longer") / "clips", count=6, size=(17, 64, 64))


@pytest.fixture
def run(tiny_run: MakeRun, longer_clips: Path) -> Callable[..., TrainSettings]:
    size = {"num_frames": 17, "min_num_frames": 17, "train_fps": 12, "max_height": 64, "max_width": 64}

    def settings(output: str, **changes: dict[str, Any]) -> TrainSettings:
        data = {"manifest": longer_clips, "selection": size, "new_windows": False, **changes.pop("data", {})}
        optimizer = {"steps": 4, "lr": 1e-3, "ema_decay": 0.9}
        return tiny_run(output, data=data, conditions=EVERY, optimizer=optimizer, **changes)

    return settings


def losses(run: TrainSettings) -> list[float]:
    lines = (run.output / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_clips_and_features_give_the_same_losses_and_a_model_that_says_its_tasks(
    run: MakeRun, tmp_path: Path
) -> None:
    clips = run("clips")
    train(clips)
    write_cache(clips, tmp_path / "features")
    features = run("features", data={"features": tmp_path / "features"})
    train(features)
    assert losses(features) == pytest.approx(losses(clips), rel=1e-5)
    export_run(clips.output, tmp_path / "model")
    written = json.loads((tmp_path / "model/generate.json").read_text())
    assert written["tasks"] == ["first", "prefix", "first_last"]


def test_a_resumed_run_has_the_tasks_of_an_undisturbed_one(run: MakeRun) -> None:
    whole = run("whole")
    train(whole)
    begun = run("begun", checkpoint={"every": 2})
    train(begun.model_copy(update={"optimizer": begun.optimizer.model_copy(update={"steps": 2})}))
    train(begun, resume="latest")
    assert losses(begun) == losses(whole)


def test_a_cache_without_last_frames_is_refused(run: MakeRun, tmp_path: Path) -> None:
    plain = run("plain").model_copy(update={"conditions": ConditionSettings()})
    write_cache(plain, tmp_path / "features")
    with pytest.raises(ValueError, match=r"has no last frames of clips, which conditions.first_last needs"):
        train(run("given", data={"features": tmp_path / "features"}))


def test_shares_that_are_more_than_all() -> None:
    with pytest.raises(ValueError, match=r"shares of all samples, but add up to 1\.2"):
        ConditionSettings(first=0.6, prefix=0.6)
