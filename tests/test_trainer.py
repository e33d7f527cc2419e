"""The training loop: it learns, resumes bit for bit however it ended, and is honest about what goes wrong."""

import itertools
import json
import logging
import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from command import Running
from diffusers.models.attention_dispatch import attention_backend
from safetensors.torch import load_file, save_file
from tiny_models import DENOISER
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.modules.module import register_module_forward_pre_hook

from opensoraplan.data import features
from opensoraplan.data.buckets import BucketSampler, Draw
from opensoraplan.defaults import GenerateDefaults
from opensoraplan.flow import loss_weight
from opensoraplan.formats.assemble import load_vae
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.train.config import TrainSettings
from opensoraplan.train.inputs.cache import write_cache
from opensoraplan.train.learner.building import build
from opensoraplan.train.learner.gradient_clip import GradientOutlierError
from opensoraplan.train.methods.flow_loss import draw
from opensoraplan.train.run import checkpoint
from opensoraplan.train.run.export import ExportOptions, export_run
from opensoraplan.train.run.trainer import train

MakeRun = Callable[..., TrainSettings]


def logged(run: TrainSettings, name: str = "loss") -> list[float]:
    """The values of that name in metrics.jsonl, in order."""
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def final(run: TrainSettings) -> checkpoint.Checkpoint:
    return checkpoint.load(run.output, checkpoint.find(run.output, "latest"))


def assert_equal_runs(first: TrainSettings, second: TrainSettings) -> None:
    """Same losses, same weights, average, optimizer and clip state, bit for bit."""
    assert logged(first) == logged(second)
    assert logged(first, "grad_norm") == logged(second, "grad_norm")
    one, two = final(first), final(second)
    assert one.step == two.step
    assert one.state == two.state
    for part, tensors in one.parts.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, two.parts[part][name]), f"{part} {name}"


def memory_full_at(call: int) -> Callable[[torch.nn.Module, object], None]:
    """A hook that lets the device's memory be full at the denoiser's forward of that number."""
    calls = itertools.count(1)

    def full(module: torch.nn.Module, _arguments: object) -> None:
        if isinstance(module, SparseUMMDiT) and next(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return full


@pytest.fixture
def undisturbed(tiny_run: MakeRun) -> TrainSettings:
    run = tiny_run("undisturbed")
    train(run)
    return run


def test_run_logs_every_step_and_keeps_the_newest_checkpoints(tiny_run: MakeRun) -> None:
    run = tiny_run(checkpoint={"every": 2, "keep": 2})
    last = train(run)
    assert last == checkpoint.path_of(run.output, 6)
    assert checkpoint.steps(run.output) == [4, 6]
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    wanted = {
        "loss",
        "grad_norm",
        "clip_threshold",
        "lr",
        "samples/s",
        "tokens/s",
        "TFLOP/s",
        "MFU",
        "data_wait",
    }
    assert wanted <= set(lines[-1])
    assert TrainSettings.read_file(run.output / "config.json") == run


def test_training_lowers_the_loss(tiny_run: MakeRun) -> None:
    run = tiny_run(
        optimizer={"steps": 30, "lr": 3e-3},
        checkpoint={"every": 30},
        data={"batch_size": 4},
        log={"every": 10},
    )
    train(run)
    losses = logged(run)
    assert losses[-1] < 0.9 * losses[0]


@pytest.fixture
def slow_run(tiny_run: MakeRun) -> MakeRun:
    """Runs whose steps and checkpoints take long enough for a signal to find them at work."""

    def settings(output: str) -> TrainSettings:
        return tiny_run(
            output,
            model={
                "pretrained": None,
                "config": {**DENOISER, "attention_head_dim": 64, "num_layers": [4, 4, 4]},
            },
            checkpoint={"every": 1},
        )

    return settings


@pytest.fixture
def begin(start: Callable[..., Running]) -> Callable[[TrainSettings], Running]:
    """Starts a run in a process of its own."""

    def begun(run: TrainSettings) -> Running:
        config = run.output.with_suffix(".json")
        config.write_text(run.model_dump_json())
        return start("train", config)

    return begun


def test_resumed_after_a_signal_equals_undisturbed(
    slow_run: MakeRun, begin: Callable[[TrainSettings], Running]
) -> None:
    undisturbed = slow_run("undisturbed")
    train(undisturbed)

    stopped = slow_run("stopped")
    process = begin(stopped)
    process.wait_until(lambda: lines(stopped) >= 2)
    process.send(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert 2 <= final(stopped).step < 6
    message = process.said()
    assert f"stopped after step {final(stopped).step} of 6, saved in {stopped.output}" in message
    assert "continue with --resume latest" in message
    train(stopped, resume="latest")
    assert_equal_runs(stopped, undisturbed)

    killed = slow_run("killed")
    process = begin(killed)
    process.wait_until(lambda: lines(killed) >= 2 and not unfinished(killed))
    process.kill()
    assert process.code == -signal.SIGKILL
    train(killed, resume="latest")
    assert_equal_runs(killed, undisturbed)

    killed_while_saving = slow_run("killed_while_saving")
    process = begin(killed_while_saving)
    process.wait_until(lambda: lines(killed_while_saving) >= 2 and unfinished(killed_while_saving))
    process.kill()
    assert process.code == -signal.SIGKILL
    assert unfinished(killed_while_saving)
    train(killed_while_saving, resume="latest")
    assert_equal_runs(killed_while_saving, undisturbed)


def lines(run: TrainSettings) -> int:
    """How many steps a run has logged."""
    path = run.output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def unfinished(run: TrainSettings) -> bool:
    """Whether a checkpoint is being written, or was when the run died."""
    return any((run.output / checkpoint.FOLDER).glob(".unfinished-*"))


def test_resumed_from_an_older_step_is_the_run_from_there(
    tiny_run: MakeRun, undisturbed: TrainSettings
) -> None:
    """Also its log, whose averages are those of steps on both sides of the break."""
    run = tiny_run("older", log={"every": 4}, checkpoint={"every": 1, "keep": 3, "keep_every": 3})
    train(run)
    assert checkpoint.steps(run.output) == [3, 4, 5, 6]
    before = {name: logged(run, name) for name in ("loss", "grad_norm", "loss/sigma_0.25_0.50")}
    assert len(before["loss"]) == 2
    train(run, resume="3")
    assert checkpoint.steps(run.output) == [3, 4, 5, 6]
    assert not list((run.output / checkpoint.FOLDER).glob(".*"))
    assert {name: logged(run, name) for name in before} == before
    assert torch.equal(
        final(run).parts["model"]["proj_out.weight"], final(undisturbed).parts["model"]["proj_out.weight"]
    )


def test_new_checkpoints_stay_when_older_ones_have_higher_numbers(tiny_run: MakeRun) -> None:
    run = tiny_run(checkpoint={"every": 2, "keep": 2, "keep_every": 2})
    train(run)
    shorter = tiny_run(optimizer={"steps": 3}, checkpoint={"every": 1, "keep": 1})
    with pytest.raises(
        ValueError, match=r"step 6 of .* is beyond optimizer\.steps 3: .* \(available: \[2\]\)"
    ):
        train(shorter, resume="latest")
    assert checkpoint.steps(run.output) == [2, 4, 6]
    train(shorter, resume="2")
    assert checkpoint.steps(run.output) == [3]
    assert train(shorter, resume="latest") == checkpoint.path_of(run.output, 3)  # nothing is left to do


def test_longer_run_can_be_resumed_but_another_learning_rate_is_refused(tiny_run: MakeRun) -> None:
    train(tiny_run(optimizer={"steps": 2, "lr": 1e-3, "ema_decay": 0.9}))
    with pytest.raises(ValueError, match=r"optimizer\.lr: 0\.001 -> 0\.002"):
        train(tiny_run(optimizer={"steps": 4, "lr": 2e-3, "ema_decay": 0.9}), resume="latest")
    longer = tiny_run(optimizer={"steps": 4, "lr": 1e-3, "ema_decay": 0.9})
    train(longer, resume="latest")
    assert checkpoint.steps(longer.output) == [2, 4]


def test_existing_run_is_not_overwritten(tiny_run: MakeRun) -> None:
    run = tiny_run(optimizer={"steps": 2})
    train(run)
    with pytest.raises(ValueError, match="already has a training run: continue with --resume latest"):
        train(run)


def test_run_that_never_began_to_train_can_be_begun_with_other_settings(tiny_run: MakeRun) -> None:
    with pytest.raises(FileNotFoundError):
        train(tiny_run(data={"manifest": "nowhere.txt"}))
    train(tiny_run(optimizer={"steps": 1}))


def test_run_whose_first_step_fails_can_be_begun_with_other_settings(tiny_run: MakeRun) -> None:
    with register_module_forward_pre_hook(memory_full_at(1)), pytest.raises(MemoryError):
        train(tiny_run())
    train(tiny_run(optimizer={"steps": 1, "lr": 5e-4}))


def test_a_resume_that_is_refused_leaves_the_settings_of_the_run(tiny_run: MakeRun) -> None:
    run = tiny_run(optimizer={"steps": 2})
    train(run)
    config = (run.output / "config.json").read_bytes()
    refused = {"data": {"manifest": "typo.txt"}}, {"data": {"batch_size": 4}}
    for changes in refused:
        with pytest.raises((ValueError, OSError)):
            train(tiny_run(**changes), resume="latest")
        assert (run.output / "config.json").read_bytes() == config


def test_resume_latest_begins_a_run_that_is_not_there(
    tiny_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run = tiny_run(optimizer={"steps": 2})
        train(run, resume="latest")
        assert checkpoint.steps(run.output) == [2]
        assert "resuming after" not in caplog.text
        train(tiny_run(optimizer={"steps": 3}), resume="latest")
        assert "resuming after step 2 of 3" in caplog.text


def test_resume_of_a_step_that_is_not_there_is_refused(tiny_run: MakeRun) -> None:
    run = tiny_run(optimizer={"steps": 2})
    train(run)
    with pytest.raises(ValueError, match="no checkpoint '5': the nearest is 2"):
        train(run, resume="5")


def test_training_on_features_equals_training_on_clips(tiny_run: MakeRun, tmp_path: Path) -> None:
    clips = tiny_run("clips")
    train(clips)
    write_cache(clips, tmp_path / "features")
    features = tiny_run("features_run", data={"features": tmp_path / "features"})
    train(features)
    assert logged(features) == logged(clips)
    assert logged(features, "grad_norm") == logged(clips, "grad_norm")


def test_a_model_trained_on_features_alone_makes_videos_like_theirs(
    tiny_run: MakeRun, tmp_path: Path
) -> None:
    write_cache(tiny_run("clips"), tmp_path / "features")
    run = tiny_run(
        data={"features": tmp_path / "features", "manifest": None, "selection": {}}, optimizer={"steps": 1}
    )
    train(run)
    export_run(run.output, tmp_path / "model")
    made = GenerateDefaults.of(tmp_path / "model")
    assert (made.frames, made.height, made.width, made.fps) == (9, 64, 64, 12)
    (tmp_path / "features").rename(tmp_path / "elsewhere")
    export_run(run.output, tmp_path / "other")
    assert GenerateDefaults.of(tmp_path / "other").frames is None  # as the pipeline that it began from


def test_features_of_other_encoders_are_refused_by_name(
    tiny_run: MakeRun, tiny_model: Path, tmp_path: Path
) -> None:
    write_cache(tiny_run("clips"), tmp_path / "features")
    vae = load_vae(tiny_model, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        vae.encoder.conv_out.conv.bias.add_(1)
    vae.save_pretrained(tmp_path / "vae")
    others = (
        ({"vae": {"pretrained": tmp_path / "vae"}}, "VAE weights"),
        ({"vae": {"config": {"scale": [2.0] * 4}}}, "VAE config"),
        ({"text": {"clean": False}}, "caption cleaning"),
    )
    for changes, part in others:
        run = tiny_run("other", data={"features": tmp_path / "features"}, **changes)
        with pytest.raises(ValueError, match=f"is stale, it was written with another {part}"):
            train(run)


def test_micro_batches_add_up_to_the_batch(tiny_run: MakeRun) -> None:
    whole = tiny_run("whole", data={"batch_size": 4}, optimizer={"steps": 3})
    parts = tiny_run("parts", data={"batch_size": 2}, optimizer={"steps": 3, "accumulate": 2})
    train(whole)
    train(parts)
    assert logged(parts) == pytest.approx(logged(whole), rel=1e-5)
    assert logged(parts, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=1e-4)


def test_attention_may_be_chosen(tiny_run: MakeRun, undisturbed: TrainSettings) -> None:
    run = tiny_run(model={"attention": "_native_math"})
    with attention_backend("native"):  # and back: diffusers' choice is the process's
        train(run)
        model = build(run, device=torch.device("cpu"))
    assert {p._attention_backend.value for p in model.attn_processors.values()} == {"_native_math"}
    assert model.dtype == torch.float32
    assert logged(run) == pytest.approx(logged(undisturbed), rel=1e-4)


def flex_has_gradients() -> bool:
    """Whether torch's has them on CPUs: of 2.9 it has, of 2.13 it has not."""
    x = torch.ones(1, 1, 16, 16, requires_grad=True)
    with suppress(NotImplementedError):
        flex_attention(x, x, x)
        return True
    return False


def test_attention_that_cannot_train_here_is_refused(tiny_run: MakeRun) -> None:
    refused = [
        ("_native_cudnn", 1, "attention '_native_cudnn' cannot be had on cpu here"),
        (
            "_native_flash",
            2,
            "attention '_native_flash' cannot mask keys, and data.batch_size 2 makes batches of captions",
        ),
    ]
    if not flex_has_gradients():
        refused.append(("flex", 1, "attention 'flex' gives no gradients on cpu here"))
    for name, batch_size, problem in refused:
        run = tiny_run(model={"attention": name}, data={"batch_size": batch_size})
        with attention_backend("native"), pytest.raises(ValueError, match=problem):
            train(run)


def test_bf16_compute_keeps_fp32_master_weights(tiny_run: MakeRun) -> None:
    run = tiny_run(model={"compute": "bf16"}, optimizer={"steps": 2, "lr": 1e-6})
    train(run)
    exact = tiny_run("exact", optimizer={"steps": 2, "lr": 1e-6})
    train(exact)
    assert logged(run) == pytest.approx(logged(exact), rel=0.05)
    weight = final(run).parts["model"]["patch_embed.proj.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


def test_recompute_does_not_change_the_losses(tiny_run: MakeRun, undisturbed: TrainSettings) -> None:
    for name, memory in {
        "blocks": {"recompute_blocks": 8},
        "feed-forwards": {"recompute_feed_forwards": 8},
        "attention kept": {"recompute_blocks": 8, "keep_attention": True},
    }.items():
        run = tiny_run(name, memory=memory)
        train(run)
        assert logged(run) == pytest.approx(logged(undisturbed), rel=1e-6)


@pytest.mark.parametrize(("before", "after"), [([1, 1, 1], [1, 2, 1]), ([1, 2, 1], [1, 1, 1])])
def test_dense_goes_on_sparse_and_back(tiny_run: MakeRun, before: list[int], after: list[int]) -> None:
    """Right after the switch the loss is near what it was: far below that of an untrained model."""
    first = tiny_run(
        "first",
        model={"sparse_n": before},
        data={"batch_size": 4},
        optimizer={"steps": 20, "lr": 3e-3},
        checkpoint={"every": 20},
    )
    train(first)
    exported = first.output.with_name("exported")
    export_run(first.output, exported, ExportOptions(ema=False))
    second = tiny_run(
        "second",
        model={"pretrained": exported, "sparse_n": after},
        data={"batch_size": 8},
        optimizer={"steps": 1, "lr": 1e-6},
    )
    train(second)
    start, end, switched = logged(first)[0], logged(first)[-1], logged(second)[0]
    assert switched < end + 0.5 * (start - end)


def spoil(run: TrainSettings, folder: Path, *, steps: Sequence[int] | None) -> TrainSettings:
    """The run on features of which those that `steps` draw, or all of them, are not finite."""
    write_cache(run, folder)
    run = run.model_copy(update={"data": run.data.model_copy(update={"features": folder})})
    batch = run.data.batch_size * run.optimizer.accumulate
    sampler = BucketSampler([(9, 64, 64)] * 8, global_batch=batch, seed=run.seed)
    places: Sequence[int] = range(8)
    if steps is not None:
        places = [draw.index for step in steps for draw in sampler.global_batch(step - 1)]
    data = features.FeatureDataset(folder, seed=0, caption_dropout=0, use_aesthetic=False)
    moments = [data[Draw(index=index, epoch=0, step=0, slot=0)].moments for index in range(8)]
    for place in places:
        moments[place].fill_(float("inf"))
    features.write_videos(folder, 0, list(zip(data.samples, moments, strict=True)))
    return run


def test_outlier_is_skipped(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = spoil(tiny_run(optimizer={"steps": 4}, checkpoint={"every": 1}), tmp_path / "features", steps=[4])
    train(run)
    assert logged(run, "skipped") == [0, 0, 0, 1]
    before, after = (checkpoint.load(run.output, step).parts["model"] for step in (3, 4))
    assert torch.equal(before["proj_out.weight"], after["proj_out.weight"])


def test_repeated_outliers_rewind_to_the_last_checkpoint(tiny_run: MakeRun, tmp_path: Path) -> None:
    plain = tiny_run(optimizer={"steps": 4}, checkpoint={"every": 2}, clip={"patience": 1})
    run = spoil(plain, tmp_path / "features", steps=[4])
    train(run)
    assert logged(run, "skipped") == [0, 0, 0, 1]
    # Step 3 changed the weights; step 4 went back to those of step 2, the last that were saved.
    before, after = (checkpoint.load(run.output, step).parts["model"] for step in (2, 4))
    assert torch.equal(before["proj_out.weight"], after["proj_out.weight"])


def test_rewind_passes_over_checkpoints_made_between_outliers(
    tiny_run: MakeRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps 2 and 3 are outliers. The checkpoint of step 2 has the weights of step 1, but not its merit."""
    plain = tiny_run(optimizer={"steps": 4, "lr": 1e-3}, checkpoint={"every": 1}, clip={"patience": 2})
    run = spoil(plain, tmp_path / "features", steps=[2, 3])
    with caplog.at_level(logging.WARNING):
        train(run)
    assert logged(run, "skipped") == [0, 1, 1, 0]
    assert [checkpoint.load(run.output, step).state["outliers_in_a_row"] for step in (1, 2, 3)] == [0, 1, 2]
    assert "2 outliers in a row: restored the weights of step 1" in caplog.messages


def test_a_run_that_ends_in_outliers_has_failed(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = spoil(tiny_run(optimizer={"steps": 4}), tmp_path / "features", steps=[3, 4])
    with pytest.raises(FloatingPointError, match=r"has failed: the gradients of its last steps \(2\)"):
        train(run)
    assert checkpoint.steps(run.output)[-1] == 4


def test_weights_that_are_not_finite_are_not_saved_nor_exported(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run(optimizer={"steps": 2})
    infinite = run.optimizer.model_copy(update={"lr": float("inf")})  # which settings refuse
    with pytest.raises(FloatingPointError, match="the weights are not finite"):
        train(run.model_copy(update={"optimizer": infinite}))
    assert checkpoint.steps(run.output) == []
    good = tiny_run("good", optimizer={"steps": 1})
    train(good)
    path = checkpoint.path_of(good.output, 1) / "ema.safetensors"
    tensors = load_file(path)
    tensors["proj_out.weight"].fill_(float("nan"))
    save_file(tensors, path)
    with pytest.raises(FloatingPointError, match="the weights are not finite"):
        export_run(good.output, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_outliers_without_end_stop_the_run(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = spoil(tiny_run(clip={"patience": 2}), tmp_path / "features", steps=None)
    with pytest.raises(
        GradientOutlierError, match=r'2 gradient norms in a row are outliers.* clip\.outlier="clip"'
    ):
        train(run)
    # What is saved is the state before the last of them, with which another attempt begins.
    assert checkpoint.steps(run.output) == [1]
    assert final(run).state["outliers_in_a_row"] == 1


def test_an_error_in_mid_run_costs_no_step(tiny_run: MakeRun, tmp_path: Path) -> None:
    plain = tiny_run(
        optimizer={"steps": 4, "lr": 1e-3, "accumulate": 2},
        data={"batch_size": 1},
        checkpoint={"every": 9},
        log={"every": 9},
        clip={"outlier": "stop"},
    )
    run = spoil(plain, tmp_path / "features", steps=[4])
    with pytest.raises(GradientOutlierError, match="the gradient norm is"):
        train(run)
    saved = final(run)
    assert saved.step == 3
    assert saved.state["averages"]["counts"]["grad_norm"] == 3
    assert saved.state["averages"]["counts"]["loss"] == 6
    remedy = run.model_copy(update={"clip": run.clip.model_copy(update={"outlier": "skip"})})
    train(remedy, resume="latest")
    assert len(logged(remedy)) == 1
    assert logged(remedy, "skipped") == [1 / 4]


def test_what_is_logged_is_the_weighted_loss_that_is_minimised(tiny_run: MakeRun, tiny_clips: Path) -> None:
    """All three draw the same sigmas; the first step's loss is that of the same weights."""
    held_out = {"every": 1, "manifest": tiny_clips, "samples": 1, "sigmas": [0.2, 0.5]}
    runs = {
        weighting: tiny_run(
            weighting,
            data={"batch_size": 1},
            flow={"weighting": weighting},
            optimizer={"steps": 1, "lr": 1e-12},
            validation=held_out,
        )
        for weighting in ("uniform", "sigma_sqrt", "cosmap")
    }
    for run in runs.values():
        train(run)
    plain = runs["uniform"]
    sigma = draw([Draw(0, 0, step=0, slot=0)], (1, 1, 8, 8), plain.flow, seed=plain.seed).sigma
    for weighting in ("sigma_sqrt", "cosmap"):
        weighted = runs[weighting]
        weight = loss_weight(sigma, weighting).item()
        assert abs(weight - 1) > 0.01
        assert logged(weighted) == pytest.approx([weight * logged(plain)[0]])
        norms = logged(weighted, "grad_norm"), logged(plain, "grad_norm")
        assert norms[0] == pytest.approx([weight * norms[1][0]], rel=1e-4)
        for at in (0.2, 0.5):
            weight = loss_weight(torch.tensor(at), weighting).item()
            name = f"validation_loss/sigma_{at:g}"
            assert logged(weighted, name) == pytest.approx([weight * logged(plain, name)[0]], rel=1e-4)


def test_validation_logs_losses_and_writes_videos(tiny_run: MakeRun, tiny_clips: Path) -> None:
    run = tiny_run(
        optimizer={"steps": 2},
        validation={
            "every": 2,
            "manifest": tiny_clips,
            "samples": 2,
            "prompts": ["a red ball"],
            "frames": 9,
            "height": 64,
            "width": 64,
            "sampling_steps": 2,
        },
    )
    train(run)
    assert len(logged(run, "validation_loss")) == 1
    assert len(logged(run, "validation_loss/sigma_0.5")) == 1
    assert (run.output / "samples" / "step-00000002-0.mp4").stat().st_size > 0


def test_a_signal_ends_a_validation_which_is_made_up_for(
    tiny_run: MakeRun, tiny_clips: Path, begin: Callable[[TrainSettings], Running]
) -> None:
    sampling = {"prompts": ["a red ball"], "frames": 9, "height": 64, "width": 64}
    held_out = {"every": 4, "manifest": tiny_clips, "samples": 1, **sampling}
    undisturbed = tiny_run("undisturbed", validation={**held_out, "sampling_steps": 1})
    train(undisturbed)

    # Ten thousand steps take minutes: who waits for their end is not who stops at once.
    stopped = tiny_run("stopped", validation={**held_out, "sampling_steps": 10_000})
    process = begin(stopped)
    process.wait_until(lambda: lines(stopped) >= 4 and checkpoint.steps(stopped.output)[-1:] == [4])
    process.send(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert final(stopped).step == 4
    assert not logged(stopped, "validation_loss")
    go_on = tiny_run("stopped", validation={**held_out, "sampling_steps": 1})
    train(go_on, resume="latest")
    assert_equal_runs(go_on, undisturbed)
    assert logged(go_on, "validation_loss") == logged(undisturbed, "validation_loss")
    assert len(logged(go_on, "validation_loss")) == 2
    train(go_on, resume="latest")  # what was validated is not validated again
    assert len(logged(go_on, "validation_loss")) == 2


def test_held_out_clips_that_cannot_be_read_are_left_out(
    tiny_run: MakeRun, tiny_clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tiny_clips.parent, tmp_path / "held_out")
    gone = tmp_path / "held_out" / "clips" / "000000.mp4"
    held_out = {"every": 2, "manifest": tmp_path / "held_out" / tiny_clips.name, "samples": 2}
    gone.write_bytes(b"half of it")
    run = tiny_run(optimizer={"steps": 2}, validation=held_out)
    train(run)
    assert len(logged(run, "validation_loss")) == 1
    assert (
        sum("skipped an unreadable clip: " in message and gone.name in message for message in caplog.messages)
        == 1
    )
    none = tiny_run("none", optimizer={"steps": 2}, validation={**held_out, "samples": 1})
    with pytest.raises(ValueError, match="none of the 1 clips can be read"):
        train(none)
    assert final(none).step == 2


def test_new_model_starts_from_its_config(tiny_run: MakeRun) -> None:
    run = tiny_run(model={"pretrained": None, "config": DENOISER}, optimizer={"steps": 2})
    train(run)
    # A velocity of zero: the loss of the first step is that of noise - latents, of variance about 2.
    assert 1.0 < logged(run)[0] < 4.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"pretrained": None, "config": {"heads": 3}}}, "heads"),
        ({"data": {"manifest": "nowhere.txt"}}, "nowhere.txt does not exist"),
        ({"vae": {"pretrained": None}}, r"vae\.pretrained"),
        ({"data": {"batch_size": 9}}, "9"),
        (
            {"model": {"pretrained": None, "config": {"num_layers": 4}}},
            r"model\.config: num_layers: .*got 4",
        ),
        ({"validation": {"every": 1, "sigmas": []}}, r"validation\.sigmas"),
        ({"parallel": {"cpu_offload": True}}, r"parallel\.cpu_offload needs several processes"),
        ({"model": {"attention": "flahs"}}, r"no attention 'flahs' .did you mean 'flash'"),
    ],
)
def test_what_cannot_be_is_said_before_training(tiny_run: MakeRun, changes: dict, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        train(tiny_run(**changes))


def test_resume_with_other_clips_is_for_those_who_ask_for_it(
    tiny_run: MakeRun, tiny_clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = json.loads(tiny_clips.with_name("annotation.json").read_text())
    manifest = tmp_path / "clips.json"

    def write(some: list[dict[str, object]]) -> None:
        where = [{**record, "path": str(tiny_clips.parent / str(record["path"]))} for record in some]
        manifest.write_text(json.dumps(where))

    write(records)
    run = tiny_run(data={"manifest": manifest}, optimizer={"steps": 2})
    train(run)
    write(records[1:])
    longer = tiny_run(data={"manifest": manifest}, optimizer={"steps": 4})
    with pytest.raises(ValueError, match=r"not the clips that the run was started with \(8 then, 7 now"):
        train(longer, resume="latest")
    manifest = tmp_path / "moved.json"
    write(records)
    train(tiny_run(data={"manifest": manifest}, optimizer={"steps": 4}), resume="latest")
    write(records[1:])
    others = {"manifest": manifest, "other_clips": True}
    train(tiny_run(data=others, optimizer={"steps": 6}), resume="latest")
    assert len(logged(run)) == 6
    assert "not the clips that the run was started with (8 then, 7 now" in caplog.text


def test_memory_that_is_full_is_told_and_the_last_step_saved(tiny_run: MakeRun) -> None:
    run = tiny_run(checkpoint={"every": 100})
    with (
        register_module_forward_pre_hook(memory_full_at(3)),
        pytest.raises(MemoryError, match=r"latents of 2 x 4 x 2 x 8 x 8 .* raise memory\.recompute_blocks"),
    ):
        train(run)
    assert checkpoint.steps(run.output) == [2]


def test_recompute_of_more_blocks_than_there_are(tiny_run: MakeRun) -> None:
    with pytest.raises(ValueError, match=r"memory\.recompute_blocks is 99, but the model has \d+ blocks"):
        train(tiny_run(memory={"recompute_blocks": 99}))
