"""A command that is refused leaves nothing: no folder and no part of a file; what was there is as it was."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Command, mistake
from tiny_models import DENOISER, SHALLOW_VAE

from opensoraplan.train.config import TrainSettings, VAETrainSettings
from opensoraplan.train.inputs.cache import write_cache

MakeRun = Callable[..., TrainSettings]
# Refused for every verb: what follows it on the command line, after the environment, and what is said.
OF_ALL: dict[str, tuple[str, str]] = {
    "unknown key": ("--set optimiser.lr=1", "unknown key 'optimiser"),
    "value": ("--set optimizer.steps=none", "optimizer.steps: "),
    "manifest": ("--set data.manifest=nowhere", "nowhere does not exist"),
    "manifest of another kind": ("--set data.manifest=mine.txt", "mine.txt"),
    "no clips": ("--set data.manifest=empty", "has no clips"),
    "no clip is used": ("--set data.selection.num_frames=97 data.selection.min_num_frames=97", "records are"),
    "device": ("--set device=gpu", "gpu"),
}
KEY = "0123456789" * 4
UNREACHABLE = f"WANDB_BASE_URL=http://127.0.0.1:9 WANDB_INIT_TIMEOUT=2 WANDB_SILENT=true WANDB_API_KEY={KEY}"
SEVERAL = "WORLD_SIZE=2 RANK=0 LOCAL_RANK=0"
OF_TRAINERS: dict[str, tuple[str, str]] = {
    **OF_ALL,
    "rare shapes": ("--set data.batch_size=9", "9 needed"),
    "weights": ("--set model.pretrained=nowhere model.config=none", "nowhere does not exist"),
    "damaged weights": ("--set model.pretrained=damaged.ckpt model.config=none", "damaged.ckpt"),
    "a run that is there": ("--set output={verb}", "already has a training run"),
    "another run": ("--set output={verb} optimizer.lr=0.01 --resume latest", "cannot be resumed with these"),
    "no such step": ("--set output={verb} --resume 7", "no checkpoint"),
    "nothing to resume": ("--resume 5", "no checkpoint to resume from"),
    "output is a file": ("--set output=mine.txt", "cannot write to mine.txt"),
    "output below a file": ("--set output=mine.txt/run", "cannot write to mine.txt/run"),
    "output of others": ("--set output=stranger", "config.json is not the config.json of a training run"),
    "another package": ("--set log.tensorboard=true", "tensorboard is not installed"),
    "wandb": ("WANDB_MODE=offline --set log.wandb_project=a/b", "wandb says"),
    "no wandb": (f"{UNREACHABLE} --set log.wandb_project=shapes", "wandb says"),
    "held-out clips": ("--set validation.every=1 validation.manifest=nowhere", "nowhere does not exist"),
    "no held-out clips": ("--set validation.every=1 validation.manifest=empty", "has no clips"),
}
TRAIN: dict[str, tuple[str, str]] = {
    **OF_TRAINERS,
    "no vae": ("--set vae.pretrained=none", "vae.pretrained"),
    "absent vae": ("--set vae.pretrained=nowhere", "nowhere"),
    "damaged vae": ("--set vae.pretrained=damaged.ckpt", "damaged.ckpt"),
    "swapped encoders": ("--set text.t5={model}/text_encoder_2", "were the two folders swapped"),
    "no tokenizer": ("--set text.clip_tokenizer=empty", "no tokenizer in empty"),
    "another denoiser": ("--set model.pretrained=none model.config={config}", "latents of 4 channels, the"),
    "config": ('--set model.pretrained=none model.config={{"heads":3}}', "heads"),
    "stages": ("--set model.sparse_n=[1,2]", "sparse_n"),
    "attention": ("--set model.attention=flahs", "no attention 'flahs'"),
    "recompute": ("--set memory.recompute_blocks=99", "recompute_blocks is 99"),
    "one process": ("--set parallel.cpu_offload=true", "cpu_offload needs several processes"),
    "mesh": ("--set parallel.tp=2", "2"),
    "features": ("--set data.features=nowhere", "nowhere is no feature cache"),
    "other features": ("--set data.features=stranger", "stranger is no feature cache"),
    "unfinished features": ("--set data.features=unfinished", "unfinished is not finished"),
    "stale features": ("--set data.features=cache data.selection.speed_factor=2", "cache is stale"),
    "prompts": ('--set validation.every=1 validation.prompts=["\\u4e00"]', "cleaning leaves nothing"),
    "loss": ("--set validation.every=1 validation.features=cache validation.sigmas=[]", "validation.sigmas"),
    "the run of a vae": ("--set method=vae", "method: Input should be 'flow'"),
}
VAE: dict[str, tuple[str, str]] = {
    **OF_TRAINERS,
    "frames": ("--set data.frames=8", "frames must be 8k"),
    "sides": ("--set data.height=12", "multiples of 8"),
    "large pieces": ("--set data.frames=17", "pieces are to be"),
    "config": ('--set model.config={{"shift":[1.0]}}', "shift has 1 values"),
    "frozen": ("--set model.freeze_encoder=true", "freeze_encoder needs"),
    "loss": ("--set loss.adversarial=0.3", "adversarial needs adversarial_start"),
    "lpips": ("--set loss.perceptual=1", "lpips"),
    "the run of a denoiser": ("--set method=flow", "method: Input should be 'vae'"),
    "several processes": (SEVERAL, "trained in one process"),
}
CACHE: dict[str, tuple[str, str]] = {
    **{name: (f"--out new/cache {words}", message) for name, (words, message) in OF_ALL.items()},
    "nowhere to write": ("", "no output folder is given"),
    "file": ("--out mine.txt", "mine.txt"),
    "below a file": ("--out mine.txt/cache", "mine.txt"),
    "stranger": ("--out stranger", "stranger exists and is no feature cache"),
    "another cache": ("--out cache --set data.selection.speed_factor=2", "cache is stale"),
    "no vae": ("--out new/cache --set vae.pretrained=none", "vae.pretrained"),
    "absent encoder": ("--out new/cache --set text.t5=nowhere", "nowhere"),
    "damaged vae": ("--out new/cache --set vae.pretrained=damaged.ckpt", "damaged.ckpt"),
    "no manifest": ("--out new/cache --set data.manifest=none data.features=cache", "data.manifest is miss"),
    "ray and torchrun": (f"{SEVERAL} --out new/cache --engine ray", "starts its own workers"),
    "no captions": ("--out new/cache --set data.manifest=silent", "no caption"),
}
CASES = {"train": TRAIN, "train-vae": VAE, "cache": CACHE}
NAMES = [(verb, case) for verb, cases in CASES.items() for case in cases]


@pytest.fixture(scope="module")
def caches(tiny_model: Path, tiny_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a feature cache, and one that is not finished."""
    folder = tmp_path_factory.mktemp("caches")
    write_cache(TrainSettings.read(values_of(tiny_model, tiny_clips), where="the test"), folder / "cache")
    shutil.copytree(folder / "cache", folder / "unfinished")
    next((folder / "unfinished").glob("videos-*")).unlink()
    return folder


def values_of(model: Path, clips: Path) -> dict[str, Any]:
    """A run that would train."""
    size = {"num_frames": 9, "min_num_frames": 9, "train_fps": 12, "max_height": 64, "max_width": 64}
    return {
        "output": "new/runs/run",
        "model": {"pretrained": model, "compute": "fp32"},
        "vae": {"pretrained": model},
        "text": {"t5": model, "clip": model, "compute": "fp32"},
        "data": {"manifest": clips, "workers": 0, "selection": size},
        "optimizer": {"steps": 1},
        "log": {"peak_tflops": 0.1},
    }


def vae_values_of(clips: Path) -> dict[str, Any]:
    size = {"num_frames": 9, "min_num_frames": 9, "train_fps": 12, "max_height": 64, "max_width": 64}
    piece = {"frames": 9, "height": 32, "width": 32, "workers": 0}
    return {
        "method": "vae",
        "output": "new/runs/run",
        "model": {"config": SHALLOW_VAE},
        "data": {"manifest": clips, "selection": size, **piece},
        "optimizer": {"steps": 1},
    }


@pytest.fixture
def place(caches: Path, tiny_model: Path, tiny_clips: Path, tmp_path: Path) -> Iterator[Path]:
    """The current folder of the commands: runs, caches, and files that are none of theirs."""
    run = TrainSettings.read(values_of(tiny_model, tiny_clips), where="the test")
    vae = VAETrainSettings.read(vae_values_of(tiny_clips), where="the test")
    (tmp_path / "train.json").write_text(run.model_dump_json())
    (tmp_path / "cache.json").write_text(run.model_dump_json())
    (tmp_path / "train-vae.json").write_text(vae.model_dump_json())
    for verb in ("train", "train-vae"):  # runs that have logged a step
        (tmp_path / verb).mkdir()
        shutil.copy(tmp_path / f"{verb}.json", tmp_path / verb / "config.json")
        (tmp_path / verb / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "damaged.ckpt").write_bytes(b"\x80\x02}q\x00X\x05")
    for name in ("empty", "stranger", "silent"):
        (tmp_path / name).mkdir()
    (tmp_path / "stranger" / "config.json").write_text('{"model_type": "t5"}')
    clip = next(tiny_clips.parent.rglob("*.mp4"))
    shutil.copy(clip, tmp_path / "silent" / "clip.mp4")
    for name in ("cache", "unfinished"):
        shutil.copytree(caches / name, tmp_path / name)
    yield tmp_path
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # it keeps the environment that it was begun in


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder, hidden files included."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(("verb", "case"), NAMES, ids=[f"{verb}, {case}" for verb, case in NAMES])
def test_a_refused_command_leaves_everything_as_it_was(
    osp: Command, place: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, verb: str, case: str
) -> None:
    line, message = CASES[verb][case]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    before = contents(place)
    config = json.dumps({**DENOISER, "in_channels": 8})
    words = line.format(verb=verb, model=tiny_model, config=config.replace(" ", "")).split()
    while words and words[0].partition("=")[0].isupper():
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    said = mistake(osp(verb, f"{verb}.json", *words))
    assert message in said, said
    assert contents(place) == before
