"""Training of the VAE: losses, resuming, the finished folder, a frozen encoder,
and the optional adversary.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SHALLOW_VAE
from torch.nn import functional as F

from opensoraplan.claims import hold_claim
from opensoraplan.data.buckets import BucketSampler
from opensoraplan.data.video import fit, read_frames
from opensoraplan.formats.assemble import load_vae
from opensoraplan.models.wfvae import WFVAE, haar, haar_levels
from opensoraplan.train.config import VAETrainSettings
from opensoraplan.train.methods import vae_losses
from opensoraplan.train.methods.vae import export_vae, spread
from opensoraplan.train.run import checkpoint
from opensoraplan.train.run.trainer import train

MakeRun = Callable[..., VAETrainSettings]


@pytest.fixture
def vae_run(tiny_clips: Path, tmp_path: Path) -> MakeRun:
    def settings(output: str = "run", **changes: dict[str, Any]) -> VAETrainSettings:
        size = {"num_frames": 9, "min_num_frames": 9, "train_fps": 12, "max_height": 64, "max_width": 64}
        values: dict[str, Any] = {
            "model": {"config": SHALLOW_VAE},
            "data": {
                "manifest": tiny_clips,
                "frames": 9,
                "height": 32,
                "width": 32,
                "workers": 0,
                "selection": size,
            },
            "optimizer": {"steps": 4, "lr": 1e-3, "eps": 1e-8, "ema_decay": 0.9},
            "log": {"every": 1},
            "checkpoint": {"every": 2},
        }
        for section, over in changes.items():
            values[section] = {**values.get(section, {}), **over}
        return VAETrainSettings.read({"output": tmp_path / output, **values}, where="the test's run")

    return settings


def logged(run: VAETrainSettings, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_losses_are_those_of_the_paper() -> None:
    torch.manual_seed(0)
    model = WFVAE(**SHALLOW_VAE, shift=None, scale=None)
    x, noise = torch.rand(2, 3, 9, 32, 32) * 2 - 1, torch.randn(2, 4, 2, 4, 4)
    made = vae_losses.reconstruct(model, x, noise)
    posterior = model.encode(x).latent_dist
    z = posterior.mean + posterior.std * noise
    torch.testing.assert_close(made.pixels, model.decode(z).sample, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.l1, F.l1_loss(made.pixels, x))
    torch.testing.assert_close(made.kl * x.numel(), posterior.kl().sum(), rtol=1e-4, atol=1e-3)
    _, level1, level2 = model.decoder.with_coefficients(z)
    low = haar(x, None)[:, :3]
    wavelet = (level1 - haar(low, None)).abs().sum() + (
        level2 - haar(haar(low, None)[:, :3], None)
    ).abs().sum()
    torch.testing.assert_close(made.wavelet * x.numel(), wavelet, rtol=1e-4, atol=1e-2)


def test_haar_levels_are_what_the_encoder_sees() -> None:
    x = torch.rand(1, 3, 9, 32, 32)
    assert [tuple(level.shape) for level in haar_levels(x)] == [
        (1, 24, 5, 16, 16),
        (1, 24, 3, 8, 8),
        (1, 24, 2, 4, 4),
    ]


def test_training_lowers_the_loss_and_writes_a_vae_with_shift_and_scale(
    vae_run: MakeRun, tiny_clips: Path
) -> None:
    run = vae_run(
        optimizer={"steps": 80, "lr": 4e-3},
        validation={"every": 80, "manifest": tiny_clips, "samples": 2},
        checkpoint={"every": 80},
    )
    out = train(run)
    losses = logged(run, "l1")
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    assert len(logged(run, "validation_psnr")) == len(logged(run, "validation_ssim")) == 1
    vae = load_vae(out, dtype=torch.float32, device=torch.device("cpu"))
    saved = checkpoint.load(run.output, 80).parts["ema"]
    assert torch.equal(vae.encoder.conv_out.conv.weight, saved["encoder.conv_out.conv.weight"])
    videos = (
        fit(read_frames(path), height=64, width=64) for path in (tiny_clips.parent / "clips").glob("*.mp4")
    )
    posteriors = [vae.encode(video[None]).latent_dist for video in videos]
    normal = torch.cat([vae.normalize_latents(posterior.mode()) for posterior in posteriors])
    spread = torch.cat([posterior.var for posterior in posteriors])
    assert normal.mean((0, 2, 3, 4)).abs().max() < 0.05
    # Of samples the variance is 1: what the modes have of it, and the posteriors around them.
    scale = torch.tensor(vae.config["scale"])
    variance = normal.var((0, 2, 3, 4)) + spread.mean((0, 2, 3, 4)) * scale**2
    assert (variance - 1).abs().max() < 0.05


@pytest.mark.parametrize(("adversarial", "compute"), [(False, "fp32"), (True, "fp32"), (True, "bf16")])
def test_resumed_run_equals_an_undisturbed_one(vae_run: MakeRun, adversarial: bool, compute: str) -> None:
    changes = {"loss": {"adversarial_start": 1} if adversarial else {}, "model": {"compute": compute}}
    whole, broken = vae_run("whole", **changes), vae_run("broken", **changes)
    train(whole)
    short = {"steps": 2, "lr": 1e-3, "eps": 1e-8, "ema_decay": 0.9}
    train(vae_run("broken", **changes, optimizer=short))
    train(broken, resume="latest")
    assert logged(broken, "loss") == logged(whole, "loss")
    one, two = (checkpoint.load(run.output, 4).parts for run in (whole, broken))
    assert set(one) == set(two)
    assert ("discriminator" in one) == adversarial
    for part, tensors in one.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, two[part][name]), f"{part} {name}"


def test_bf16_learns_what_fp32_learns(vae_run: MakeRun) -> None:
    losses = {}
    for compute in ("fp32", "bf16"):
        run = vae_run(compute, model={"compute": compute})
        train(run)
        losses[compute] = torch.tensor(logged(run, "loss"))
        weights = checkpoint.load(run.output, 4).parts["model"]
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert not torch.equal(losses["fp32"], losses["bf16"])
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=0.02, atol=0)


def test_an_error_in_mid_run_costs_no_step(vae_run: MakeRun, tiny_clips: Path, tmp_path: Path) -> None:
    """Also the discriminator is that of the step before, though some clips of the failed one were read."""
    common: dict[str, Any] = {
        "loss": {"adversarial_start": 0},
        "optimizer": {"steps": 3, "lr": 1e-3, "eps": 1e-8, "ema_decay": 0.9, "accumulate": 2},
    }
    whole = vae_run("whole", **common, checkpoint={"every": 1})
    train(whole)
    shutil.copytree(tiny_clips.parent, tmp_path / "clips")
    bad = BucketSampler([(9, 64, 64)] * 8, global_batch=2, seed=0).global_batch(2)[1].index
    path = tmp_path / "clips" / "clips" / f"{bad:06d}.mp4"
    path.write_bytes(path.read_bytes()[:200])
    manifest = tmp_path / "clips" / "data.txt"
    manifest.write_text(f"{tmp_path / 'clips'},{tmp_path / 'clips' / 'annotation.json'}\n")
    data = {"manifest": manifest, "max_bad_files": 0}
    broken = vae_run("broken", **common, checkpoint={"every": 9}, log={"every": 9}, data=data)
    with pytest.raises(ValueError, match=f"1 files cannot be read, 0 are allowed.*{bad:06d}"):
        train(broken)
    assert checkpoint.steps(broken.output) == [2]
    one, two = (checkpoint.load(run.output, 2) for run in (whole, broken))
    for part, tensors in one.parts.items():
        for name, tensor in tensors.items():
            # Running statistics of the discriminator's norms are written and never read.
            if "running" not in name and "num_batches" not in name:
                assert torch.equal(tensor, two.parts[part][name]), f"{part} {name}"
    assert two.state["bad_files"] == {}
    assert two.state["averages"]["counts"]["loss"] == 4


def with_rate(run: VAETrainSettings, rate: float) -> VAETrainSettings:
    """The run with a learning rate that settings refuse."""
    return run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"lr": rate})})


@pytest.mark.parametrize(
    ("rate", "message"),
    [(1e30, "has failed: .* last steps"), (float("inf"), "weights are not finite")],
)
def test_a_run_that_diverges_writes_no_vae(vae_run: MakeRun, rate: float, message: str) -> None:
    run = with_rate(vae_run(optimizer={"steps": 3, "ema_decay": None}), rate)
    with pytest.raises(FloatingPointError, match=message):
        train(run)
    assert not (run.output / "vae").exists()


def test_steps_without_a_finite_gradient_are_left_out(
    vae_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    """The first step, far too long, breaks the model for good."""
    optimizer = {"steps": 40, "eps": 1e-8, "ema_decay": None}
    run = with_rate(vae_run(optimizer=optimizer, checkpoint={"every": 1, "keep": 40}), 1e30)
    with pytest.raises(FloatingPointError, match=r"step 21: 20 gradient norms in a row are.* nan: start"):
        train(run)
    assert checkpoint.steps(run.output)[-1] == 20
    assert sum("the step is skipped" in message for message in caplog.messages) == 20
    one, two = (checkpoint.load(run.output, step).parts["model"] for step in (1, 20))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_an_extended_run_keeps_its_vae_until_the_new_one_is_whole(vae_run: MakeRun) -> None:
    first = train(vae_run(optimizer={"steps": 1}))
    written = (first / "diffusion_pytorch_model.safetensors").read_bytes()
    longer = vae_run(optimizer={"steps": 2})
    with hold_claim(longer.output / ".vae.new", doing="it"), pytest.raises(ValueError, match="is writing"):
        train(longer, resume="latest")
    assert (first / "diffusion_pytorch_model.safetensors").read_bytes() == written
    assert train(longer, resume="latest") == first
    assert (first / "diffusion_pytorch_model.safetensors").read_bytes() != written
    assert [path.name for path in longer.output.glob("*vae*")] == ["vae"]


def test_frozen_encoder_shift_and_scale_stay_as_they_are(vae_run: MakeRun) -> None:
    first = train(vae_run("first"))
    run = vae_run("second", model={"config": None, "pretrained": first, "freeze_encoder": True})
    second = train(run)
    before, after = (
        load_vae(path, dtype=torch.float32, device=torch.device("cpu")) for path in (first, second)
    )
    for name, tensor in before.encoder.state_dict().items():
        assert torch.equal(tensor, after.encoder.state_dict()[name]), name
    assert before.config["shift"] == after.config["shift"]
    assert before.config["scale"] == after.config["scale"]
    assert not torch.equal(before.decoder.conv_out.weight, after.decoder.conv_out.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"frames": 10}}, r"frames must be 8k \+ 1 .* got 10: use 9 or 17"),
        ({"data": {"height": 20}}, "multiples of 8, got height 20"),
        ({"data": {"height": 128}}, "gives 9 x 64 x 64 .* pieces are to be 9 x 128 x 32"),
        ({"validation": {"every": 1}}, r"validation: `manifest` is missing"),
        ({"loss": {"perceptual": 1.0}}, "lpips"),
    ],
)
def test_what_cannot_be_is_said_before_training(vae_run: MakeRun, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(vae_run(**changes))


def test_export_of_an_unfinished_run_is_what_it_would_have_been(vae_run: MakeRun, tmp_path: Path) -> None:
    train(vae_run(optimizer={"steps": 2}))
    train(vae_run(), resume="latest")
    export_vae(tmp_path / "run", tmp_path / "half", step="2")
    export_vae(tmp_path / "run", tmp_path / "whole")
    for step, folder in ((2, "half"), (4, "whole")):
        average = checkpoint.load(tmp_path / "run", step).parts["ema"]
        vae = load_vae(tmp_path / folder, dtype=torch.float32, device=torch.device("cpu"))
        assert all(torch.equal(value, average[name]) for name, value in vae.named_parameters())
        assert vae.config["shift"] is not None
    finished = tmp_path / "run" / "vae" / "config.json"
    assert (tmp_path / "whole" / "config.json").read_text() == finished.read_text()


def test_export_of_a_frozen_encoder_needs_no_clips(
    vae_run: MakeRun, tiny_clips: Path, tmp_path: Path
) -> None:
    first = train(vae_run("first", optimizer={"steps": 1}))
    manifest = tmp_path / "clips.txt"
    manifest.write_text(f"{tiny_clips.parent},{tiny_clips.with_name('annotation.json')}\n")
    frozen = {"config": None, "pretrained": first, "freeze_encoder": True}
    run = vae_run(model=frozen, data={"manifest": manifest})
    finished = train(run)
    manifest.unlink()
    shutil.rmtree(first)
    export_vae(run.output, tmp_path / "exported")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "exported" / name).read_bytes() == (finished / name).read_bytes()


def test_held_out_clips_may_be_smaller_than_pieces(
    vae_run: MakeRun, tiny_clips: Path, tiny_mixed: Path
) -> None:
    short = {"min_num_frames": 1, "drop_short_ratio": 0}
    run = vae_run(
        data={"selection": {**vae_run().data.selection.model_dump(), **short}},
        optimizer={"steps": 1},
        validation={"every": 1, "manifest": tiny_mixed},
    )
    assert run.data.manifest == tiny_clips
    train(run)
    assert len(logged(run, "validation_psnr")) == 1


def test_a_folder_that_has_a_run_is_refused_before_clips_are_read(vae_run: MakeRun, tmp_path: Path) -> None:
    train(vae_run(optimizer={"steps": 1}))
    with pytest.raises(ValueError, match="already has a training run"):
        train(vae_run(data={"manifest": tmp_path / "nowhere.txt"}))


def test_micro_batches_do_not_wait_for_the_device(vae_run: MakeRun, watch: Callable[..., Any]) -> None:
    waits = []
    for accumulate in (1, 3):
        optimizer = {"steps": 2, "lr": 1e-3, "eps": 1e-8, "ema_decay": 0.9, "accumulate": accumulate}
        run = vae_run(f"{accumulate}", optimizer=optimizer, loss={"adversarial_start": 0})
        with watch(torch.ops.aten._local_scalar_dense.default, len) as number_read:
            train(run)
        waits.append(len(number_read.seen))
    assert waits[0] == waits[1] > 0


def test_what_is_measured_is_spread_evenly() -> None:
    assert spread("abcde", most=9) == list("abcde")
    assert spread(range(10), most=4) == [0, 2, 5, 7]
    assert len(spread(range(511), most=256)) == 256
    assert spread([], most=3) == []
