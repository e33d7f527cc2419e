"""Another text encoder and another VAE, from clips to a cache, a trained denoiser and videos. All that knows
of them, beside the files with their classes, is a line in each table.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import Command, mistake
from made_up_text import ByteGRU, ByteGRUConfig, Bytes
from made_up_vae import PatchVAE
from tiny_models import DENOISER
from transformers import ByT5Tokenizer

from opensoraplan.data.buckets import Draw
from opensoraplan.data.features import FeatureDataset
from opensoraplan.formats.assemble import Sources, save_diffusers
from opensoraplan.generate import saved
from opensoraplan.generate.session import Session, SessionOptions
from opensoraplan.models import text, vae
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.text import FEATURES
from opensoraplan.pipeline import OpenSoraPlanPipeline
from opensoraplan.requests import Request
from opensoraplan.train.config import TrainSettings, VAETrainSettings
from opensoraplan.train.inputs.cache import write_cache
from opensoraplan.train.inputs.encoders import load_encoders
from opensoraplan.train.run.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread", "lines_in_the_tables")
SIZE = {"frames": 9, "height": 32, "width": 48, "steps": 2}
MakeRun = Callable[..., TrainSettings]


@pytest.fixture
def lines_in_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(text.TEXT_ENCODERS, "byte_gru", Bytes)
    monkeypatch.setitem(vae.VAES, "PatchVAE", PatchVAE)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A whole pipeline with them, put together of its parts; CLIP is the tiny release's."""
    parts = tmp_path / "parts"
    PatchVAE(channels=3).save_pretrained(parts / "vae")
    SparseUMMDiT(**{**DENOISER, "in_channels": 3, "out_channels": 3, "caption_channels": 10}).save_pretrained(
        parts / "transformer"
    )
    ByteGRU(ByteGRUConfig(width=10)).save_pretrained(parts / "text_encoder")
    ByT5Tokenizer().save_pretrained(parts / "tokenizer")
    for name in ("text_encoder_2", "tokenizer_2"):
        (parts / name).symlink_to(tiny_model / name)
    save_diffusers(Sources.of_folder(parts), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run(tiny_run: MakeRun, model: Path) -> MakeRun:
    def settings(output: str, **data: object) -> TrainSettings:
        return tiny_run(
            output,
            model={"pretrained": model},
            vae={"pretrained": model},
            text={"t5": model, "clip": model},
            data={"new_windows": False, **data},
            optimizer={"steps": 2},
            validation={"every": 2, "prompts": ["a red ball"], "sampling_steps": 2} | _validated(),
        )

    return settings


def _validated() -> dict[str, int]:
    return {name: SIZE[name] for name in ("frames", "height", "width")}


def losses(settings: TrainSettings) -> list[float]:
    train(settings)
    rows = (settings.output / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, rows) if "loss" in row]


def test_features_are_cached_by_name(run: MakeRun, tmp_path: Path) -> None:
    settings = run("run")
    write_cache(settings, tmp_path / "cache")
    cached = FeatureDataset(tmp_path / "cache", seed=0, caption_dropout=0.0, use_aesthetic=False)
    assert cached.text_features == {"sequence": (None, 10), "pooled": (20,)}
    assert cached.latent_channels == 3
    assert cached.description.vae_class == "PatchVAE"
    item = cached[Draw(index=0, epoch=0, step=0, slot=0)]
    assert item.moments.shape == (6, 3, 16, 16)  # 9 x 64 x 64 pixels
    encoders = load_encoders(settings.vae, settings.text, device="cpu")
    assert {"Bytes", "CLIP", "CLIP tokenizer"} < encoders.fingerprint().keys()
    (features,) = encoders.encode_captions([item.caption])
    assert item.text.keys() == features.keys() == set(FEATURES)
    assert all(torch.equal(item.text[name], feature) for name, feature in features.items())
    assert len(features["sequence"]) > len(item.caption)  # every byte and the end, of a cleaned caption


def test_clips_and_their_features_train_the_same(run: MakeRun, tmp_path: Path) -> None:
    online = losses(run("clips"))
    write_cache(run("clips"), tmp_path / "cache")
    assert losses(run("features", features=tmp_path / "cache")) == online
    assert len(online) == 2
    assert (tmp_path / "clips" / "samples" / "step-00000002-0.mp4").exists()  # of validation.prompts


def test_a_cache_of_the_usual_parts_is_stale(run: MakeRun, tiny_run: MakeRun, tmp_path: Path) -> None:
    write_cache(tiny_run("usual"), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"stale, .* another VAE weights .* Bytes \(was not there"):
        train(run("run", features=tmp_path / "cache"))


def test_the_pipeline_makes_videos(model: Path) -> None:
    pipeline = OpenSoraPlanPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    assert [type(part) for part in (pipeline.vae, pipeline.text_encoder)] == [PatchVAE, ByteGRU]
    call = {"num_frames": 9, "height": 32, "width": 48, "num_inference_steps": 2, "output_type": "pt"}
    frames = pipeline("a red ball", **call, seed=1).frames
    assert frames.shape == (1, 9, 3, 32, 48)
    assert not torch.equal(pipeline("a blue ball", **call, seed=1).frames, frames)
    options = SessionOptions(model, device="cpu", dtype="fp32", progress=False)
    request = Request(prompt="a red ball", **SIZE, seed=1)
    with Session.open(options, request) as session:
        result = session.run(request)
    assert result.latents.shape == (1, 3, 3, 8, 12)
    assert result.frames is not None
    assert result.frames.shape == (9, 32, 48, 3)


def test_the_command_generates_inspects_and_decodes(osp: Command, model: Path, tmp_path: Path) -> None:
    size = [f"--{name}={value}" for name, value in SIZE.items()]
    on_cpu = ["--device", "cpu", "--dtype", "fp32"]
    assert osp("generate", "a red ball", "--model", model, *on_cpu, *size, "--out", "a.mp4").code == 0
    assert (tmp_path / "a.mp4").exists()
    assert "PatchVAE, VAE" in osp("inspect", model / "vae").out
    record = json.loads((tmp_path / "a.json").read_text())
    latents = torch.zeros(1, 3, 3, 8, 12)
    unscaled = {"shift": None, "scale": None}
    kept = saved.SavedLatents(latents, SIZE["steps"], record, unscaled, strides=PatchVAE.strides)
    saved.write(tmp_path / "b.latents.safetensors", kept)
    assert osp("decode", "b.latents.safetensors", *on_cpu).code == 0
    assert (tmp_path / "b.mp4").exists()


def test_the_original_has_no_such_vae(osp: Command, model: Path, tiny_clips: Path, tmp_path: Path) -> None:
    refused = mistake(osp("convert", "--model", model, "--to", "release", "--out", "release"))
    assert "the original has no PatchVAE" in refused
    assert not (tmp_path / "release").exists()
    values = {"output": tmp_path / "vae", "model": {"pretrained": model}, "optimizer": {"steps": 1}}
    size = {"num_frames": 9, "min_num_frames": 9, "train_fps": 12, "max_height": 64, "max_width": 64}
    piece = {"frames": 9, "height": 32, "width": 32, "workers": 0}
    values["data"] = {"manifest": tiny_clips, "selection": size, **piece}
    settings = VAETrainSettings.read(values, where="the test")
    with pytest.raises(ValueError, match="is a PatchVAE: only a WFVAE can be trained"):
        train(settings)


def test_what_an_encoder_does_not_read_is_logged(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = OpenSoraPlanPipeline.from_pretrained(model)
    pipeline.register_to_config(max_text_tokens=4, prompt_template=None)
    with caplog.at_level(logging.WARNING):
        pipeline.encode_prompts(["abcdef", "abcdef"])
    assert caplog.messages == ["3 bytes of 'abcdef' are not read"]


def test_two_encoders_of_one_feature_are_refused(model: Path) -> None:
    parts = OpenSoraPlanPipeline.from_pretrained(model).components
    with pytest.raises(ValueError, match="of the text encoders Bytes, Bytes, two give sequence"):
        OpenSoraPlanPipeline(**parts | {"text_encoder_2": parts["text_encoder"]})
