"""`osp cache`, `train`, `train-vae` and `export` by the command itself; each mistake ends in one message."""

import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import Command
from tiny_models import DENOISER

from opensoraplan import OpenSoraPlanPipeline
from opensoraplan.convert import load_checkpoint
from opensoraplan.data.video import probe
from opensoraplan.train.config import TrainSettings, VAETrainSettings
from opensoraplan.train.run import checkpoint

MakeRun = Callable[..., TrainSettings]
GUIDE = Path(__file__).parent / "golden"
SIZES = "\n".join(["[model.config]", *(f"{key} = {json.dumps(value)}" for key, value in DENOISER.items())])


def toml_of(run: TrainSettings, path: Path) -> Path:
    """The run as a file; JSON of the same content is what a run itself writes."""
    path.write_text(run.model_dump_json())
    return path


def test_clips_to_cache_to_model_to_video(osp: Command, tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run("run", optimizer={"steps": 2, "lr": 1e-3, "ema_decay": 0.9}, data={"features": "features"})
    config = toml_of(run, tmp_path / "run.json")
    assert osp("cache", config)[0] == 0
    assert osp("train", config)[0] == 0
    assert (
        osp("export", "run", "--out", "model", "--prompt-template", "{}", "--default-negative-prompt", "")[0]
        == 0
    )
    assert osp("generate", "a red ball", "--model", "model", "--steps", "2", "--out", "ball.mp4")[0] == 0
    info = probe(tmp_path / "ball.mp4")
    assert (info.frames, info.height, info.width, info.fps) == (9, 64, 64, 12)
    pipeline = OpenSoraPlanPipeline.from_pretrained("model")
    assert pipeline.prompt_settings.template is None
    weights = checkpoint.load(run.output, 2).parts["ema"]
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_export_in_the_originals_formats(osp: Command, tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run("run", optimizer={"steps": 1, "lr": 1e-3, "ema_decay": 0.9})
    assert osp("train", toml_of(run, tmp_path / "run.json"))[0] == 0
    for ema, part in (("--ema", "ema"), ("--no-ema", "model")):
        assert osp("export", "run", "--out", part, "--to", "release", ema)[0] == 0
        assert osp("export", "run", "--out", f"{part}_shards", "--to", "megatron", "--tp", "2", ema)[0] == 0
        released, merged = load_checkpoint(tmp_path / part), load_checkpoint(tmp_path / f"{part}_shards")
        weights = checkpoint.load(run.output, 1).parts[part]
        assert len(released) == len(weights)
        for name, tensor in released.items():  # the shards have, besides, what nothing reads
            assert torch.equal(tensor, merged[name]), name
        assert torch.equal(released["proj_out.weight"], weights["proj_out.weight"])


def guide_changes(run: TrainSettings) -> list[str]:
    """Paths and sizes of the run, in place of those in the guide's files."""
    return [
        "output=run",
        f"vae.pretrained={run.vae.pretrained}",
        "vae.config=none",
        f"text.t5={run.text.t5}",
        f"text.clip={run.text.clip}",
        "text.t5_tokenizer=none",
        "text.clip_tokenizer=none",
        "data.workers=0",
        "data.reader=pyav",
        "optimizer.steps=1",
        "data.selection.num_frames=9",
        "data.selection.min_num_frames=9",
        "data.selection.train_fps=12",
        "data.selection.max_height=64",
        "data.selection.max_width=64",
    ]


def test_the_guides_files_as_printed(osp: Command, tiny_run: MakeRun, tmp_path: Path) -> None:
    """Only paths and sizes are overridden."""
    run = tiny_run("run")
    (tmp_path / "sizes.toml").write_text(SIZES)
    changes = [*guide_changes(run), f"data.manifest={run.data.manifest}"]
    arguments = ["--model", GUIDE / "guide_model.json", "--data", GUIDE / "guide_data.json"]
    code, _, err, _ = osp("train", "sizes.toml", *arguments, "--set", *changes)
    assert code == 0, err
    settings = TrainSettings.read_file(tmp_path / "run" / "config.json")
    assert settings.optimizer.accumulate == 4
    assert settings.data.caption_dropout == 0.1
    assert settings.model.compute == "bf16"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train", r"no run is given: use a \.toml file"),
        ("train nowhere.toml", "nowhere.toml does not exist"),
        ("train --model m.json", "needs --data"),
        ("train {run} --set optimizer.steps=0", "optimizer.steps: .*got 0"),
        ("train {run} --set optimiser.lr=1", "unknown key 'optimiser.*did you mean"),
        ("train {run} --set data.manifest=nowhere", "nowhere does not exist"),
        (
            "train {run} --set data.selection.num_frames=17 data.selection.min_num_frames=17",
            "all 8 records are",
        ),
        ("train {run} --set data.batch_size=9", "8 rare shape .* 8 samples of 9x64x64, 9 needed"),
        (
            "train {run} --set memory.recompute_blocks=1 memory.recompute_feed_forwards=1",
            "exclude each other",
        ),
        ("train {run} --set memory.keep_attention=true", "about recompute_blocks, which is 0"),
        ("train {run} --resume 5", "no checkpoint to resume from"),
        ("train {run} --set data.features=nowhere", "nowhere is no feature cache"),
        ("cache {run}", "no output folder is given: use --out FOLDER"),
        ("train-vae nowhere.toml", "nowhere.toml does not exist"),
        ("export nowhere --out a", "nowhere does not exist"),
        ("export . --out a", "not the output folder of a training run"),
        ("train {folder}", r"a \.toml file such as configs/finetune\.toml"),
        ("train {run} --set optimizer.lr=fast --set seed=1", "optimizer.lr: .*'fast'"),
        ("train-vae {run}", 'has method = "flow": use osp train'),
        ("export . --out a --prompt-template x", "must hold {} once, where the prompt goes"),
        ("train {run} --set output=runs/a data.manifest=nowhere", "nowhere does not exist"),
        ("export . --out a --tp 2", "--tp 2 goes with --to megatron"),
    ],
)
def test_mistakes_are_told_in_one_message(
    osp: Command, tiny_run: MakeRun, tmp_path: Path, command: str, message: str
) -> None:
    config = toml_of(tiny_run("run"), tmp_path / "run.json")
    code, _, err, _ = osp(*command.format(run=config, folder=tmp_path).split())
    assert code == 2, err
    assert "Traceback" not in err
    assert err.count("osp: error: ") == 1
    assert re.search(message, err), err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "runs").exists()


def test_a_config_that_is_no_runs_is_not_replaced(osp: Command, tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run("model")
    run.output.mkdir()
    (run.output / "config.json").write_text('{"_class_name": "T5EncoderModel"}')
    before = contents(run.output)
    code, _, err, _ = osp("train", toml_of(run, tmp_path / "run.json"), "--set", "optimizer.steps=1")
    assert code == 2
    assert "model/config.json is not the config.json of a training run, and would be overwritten" in err
    assert contents(run.output) == before


def test_a_vae_run_is_no_denoisers(osp: Command, tiny_clips: Path, tmp_path: Path) -> None:
    values = {"output": "run", "model": {"config": {}}, "data": {"manifest": tiny_clips}}
    (tmp_path / "run").mkdir()
    settings = VAETrainSettings.read(values, where="the test's run")
    config = tmp_path / "run" / "config.json"
    config.write_text(settings.model_dump_json())
    code, _, err, _ = osp("export", "run", "--out", "model")
    assert (code, "run/checkpoints has no checkpoint" in err) == (2, True)
    code, _, err, _ = osp("export", "run", "--out", "model", "--to", "release")
    assert (code, "give --out and --step only" in err) == (2, True)
    code, _, err, _ = osp("cache", config, "--out", "cache")
    assert (code, err.endswith('trains no denoiser: it has method = "vae"\n')) == (2, True)


def test_captions_that_are_missing_are_said(
    osp: Command, tiny_run: MakeRun, tmp_path: Path, tiny_clips: Path
) -> None:
    clip = next((tiny_clips.parent / "clips").glob("*.mp4"))
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent" / "a.mp4").write_bytes(clip.read_bytes())
    config = toml_of(tiny_run("run", data={"manifest": tmp_path / "silent"}), tmp_path / "run.json")
    code, _, err, _ = osp("train", config)
    assert code == 2
    assert "caption" in err


def test_unreadable_clips_stop_the_run_with_the_list(
    osp: Command, tiny_run: MakeRun, tmp_path: Path, tiny_clips: Path
) -> None:
    shutil.copytree(tiny_clips.parent, tmp_path / "clips")
    for number in range(3):
        path = tmp_path / "clips" / "clips" / f"{number:06d}.mp4"
        path.write_bytes(path.read_bytes()[:200])
    (tmp_path / "clips" / "data.txt").write_text(
        f"{tmp_path / 'clips'},{tmp_path / 'clips' / 'annotation.json'}\n"
    )
    over = {"manifest": tmp_path / "clips" / "data.txt", "max_bad_files": 1}
    config = toml_of(tiny_run("run", data=over), tmp_path / "run.json")
    code, _, err, _ = osp("train", config)
    assert code == 2
    assert "2 files cannot be read, 1 are allowed" in err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_resume_with_changed_settings_changes_nothing(
    osp: Command, tiny_run: MakeRun, tmp_path: Path
) -> None:
    config = toml_of(tiny_run(optimizer={"steps": 2}), tmp_path / "run.json")
    assert osp("train", config)[0] == 0
    before = contents(tmp_path / "run")
    code, _, err, _ = osp("train", config, "--resume", "latest", "--set", "optimizer.lr=1e-2")
    assert code == 2
    assert "optimizer.lr: 0.001 -> 0.01" in err
    assert contents(tmp_path / "run") == before


def test_a_full_disk_from_the_start_promises_no_checkpoint(
    osp: Command, tiny_run: MakeRun, tmp_path: Path
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        code, _, err, _ = osp("train", toml_of(tiny_run(optimizer={"steps": 2}), tmp_path / "run.json"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert code == 2
    assert "step-00000002: " in err
    assert "there is no checkpoint before it" in err
    assert "whole" not in err
    assert checkpoint.steps(tmp_path / "run") == []


def test_a_full_disk_while_saving_costs_no_checkpoint(
    osp: Command, tiny_run: MakeRun, tmp_path: Path
) -> None:
    assert osp("train", toml_of(tiny_run(optimizer={"steps": 2}), tmp_path / "run.json"))[0] == 0
    longer = toml_of(tiny_run(optimizer={"steps": 4}), tmp_path / "longer.json")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # no file may grow beyond that
    try:
        code, _, err, _ = osp("train", longer, "--resume", "latest")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert code == 2
    assert "cannot write" in err
    assert "the last checkpoint is of step 2" in err
    assert checkpoint.steps(tmp_path / "run") == [2]
    assert osp("train", longer, "--resume", "latest")[0] == 0
    assert checkpoint.steps(tmp_path / "run") == [2, 4]


def test_the_guides_files_make_the_features_that_they_load(
    osp: Command, tiny_run: MakeRun, tmp_path: Path
) -> None:
    run = tiny_run("run")
    (tmp_path / "sizes.toml").write_text(SIZES)
    for name, flag in (("model", "_features"), ("data", "use_feature_data")):
        text = (GUIDE / f"guide_{name}.json").read_text(encoding="utf-8")
        text = text.replace(f'{flag}": false', f'{flag}": true')
        text = text.replace("./examples/opensoraplan1.5/data.txt", str(run.data.manifest))
        (tmp_path / f"{name}.json").write_text(text)
    changes = guide_changes(run)
    files = ["sizes.toml", "--model", "model.json", "--data", "data.json"]
    code, _, err, _ = osp("cache", *files, "--out", "features", "--set", *changes)
    assert code == 0, err
    code, _, err, _ = osp("train", *files, "--set", *changes)
    assert code == 2
    assert "data.features is missing" in err
    changes.append("data.features=features")
    code, _, err, _ = osp("cache", *files, "--set", *changes)
    assert code == 0, err
    code, _, err, _ = osp("train", *files, "--set", *changes)
    assert code == 0, err
    code, _, err, _ = osp("train", "run/config.json", "--resume", "latest", "--set", "optimizer.steps=2")
    assert code == 0, err
    changes += ["output=other", "data.selection.speed_factor=2.0"]
    code, _, err, _ = osp("train", *files, "--set", *changes)
    assert code == 2
    assert "another selection.speed_factor (was 1.0, is 2.0)" in err
