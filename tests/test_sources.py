"""Where batches come from: clips and features are selected alike, held against each other, and need no more
models than they must.
"""

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import DENOISER, SHALLOW_VAE

from opensoraplan.data import reading
from opensoraplan.data.buckets import Draw
from opensoraplan.data.record import Record
from opensoraplan.data.selection import Sample
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.wfvae import WFVAE
from opensoraplan.shapes import Strides
from opensoraplan.train.config import TrainSettings, VAETrainSettings
from opensoraplan.train.inputs.cache import write_cache
from opensoraplan.train.inputs.sources import Source, digest_of, open_source, preprocessing_parts
from opensoraplan.train.run.trainer import train

MakeRun = Callable[..., TrainSettings]
CPU = torch.device("cpu")

SELECTION = {
    "num_frames": 9,
    "min_num_frames": 1,
    "drop_short_ratio": 0,
    "train_fps": 12,
    "max_height": 64,
    "max_width": 64,
}


@pytest.fixture
def mixed_run(tiny_run: MakeRun, tiny_mixed: Path) -> MakeRun:
    """Settings of a run on clips of two shapes, one of them rare; `changes` are of the section data."""

    def settings(validation: dict[str, Any] | None = None, **changes: object) -> TrainSettings:
        data = {"manifest": tiny_mixed, "selection": SELECTION, "caption_dropout": 0.4, **changes}
        return tiny_run(data=data, validation=validation or {})

    return settings


@pytest.fixture
def cached(mixed_run: MakeRun, tmp_path: Path) -> Path:
    """The features of those clips, also of the rare ones."""
    assert write_cache(mixed_run(), tmp_path / "features").samples == 11
    return tmp_path / "features"


def test_clips_and_features_of_rare_shapes_are_dropped_alike(
    mixed_run: MakeRun, cached: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        clips, _ = open_source(mixed_run(), device=CPU)
    assert clips.shapes == [(9, 64, 64)] * 8
    for reason in ("3 dropped, rare shape: ", "1 dropped, low fps: "):
        assert any(reason in message for message in caplog.messages)
    features, _ = open_source(mixed_run(features=cached), device=CPU)
    assert features.shapes == clips.shapes
    for index in range(8):
        draw = Draw(index=index, epoch=1, step=3, slot=0)
        one, other = (source.dataset[draw] for source in (clips, features))
        assert one.caption == other.caption
        assert one.sample.index == other.sample.index
    # Three short clips fill no four batches of one, either. Batches of three are filled four times by none.
    assert len(open_source(mixed_run(features=cached, batch_size=1), device=CPU)[0].samples) == 8
    assert len(open_source(mixed_run(features=cached, batch_size=3), device=CPU)[0].samples) == 11
    with pytest.raises(ValueError, match="no shape has the 9 samples of a global batch, the most are 8"):
        open_source(mixed_run(features=cached, batch_size=9), device=CPU)


def test_validation_drops_no_rare_shapes(mixed_run: MakeRun, tiny_mixed: Path) -> None:
    run = mixed_run(validation={"every": 1, "manifest": tiny_mixed})
    assert len(open_source(run, device=CPU, held_out=True)[0].samples) == 11


@pytest.mark.parametrize("from_cache", [False, True])
def test_clips_come_again_that_an_expression_finds(
    mixed_run: MakeRun, cached: Path, tiny_mixed: Path, from_cache: bool
) -> None:
    where: dict[str, Any] = {"features": cached} if from_cache else {}
    once, _ = open_source(mixed_run(**where), device=CPU)
    captions = [sample.record.captions for sample in once.samples]
    word = captions[0][0].split()[-1].strip(".")
    found = [any(word in caption for caption in some) for some in captions]
    assert 0 < sum(found) < len(found)
    run = mixed_run(repeat={f"{word}\\b": 2, "^": 1}, **where)
    again, _ = open_source(run, device=CPU)
    expected = [index for index, more in enumerate(found) for _ in range(2 + 2 * more)]
    assert [sample.index for sample in again.samples] == [once.samples[index].index for index in expected]
    drawn = [again.dataset[Draw(index=index, epoch=0, step=0, slot=0)].sample for index in range(4)]
    assert drawn == list(again.samples[:4])
    validation = mixed_run(repeat={"^": 1}, validation={"every": 1, "manifest": tiny_mixed})
    assert len(open_source(validation, device=CPU, held_out=True)[0].samples) == 11
    with pytest.raises(ValueError, match=r"data.repeat: 'nowhere' is found in no caption of the 8 clips"):
        open_source(mixed_run(repeat={"nowhere": 1}, **where), device=CPU)
    with pytest.raises(ValueError, match=r"'\(' is no regular expression: missing \)"):
        mixed_run(repeat={"(": 1})


def test_a_vae_is_trained_on_what_is_selected_and_logged(
    tiny_mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The rare clips of one frame have no pieces of nine.
    piece = {"frames": 9, "height": 32, "width": 32, "workers": 0}
    values = {
        "output": tmp_path / "run",
        "model": {"config": SHALLOW_VAE},
        "data": {"manifest": tiny_mixed, "selection": SELECTION, **piece},
        "optimizer": {"steps": 1},
    }
    with caplog.at_level(logging.INFO):
        train(VAETrainSettings.read(values, where="the test's run"))
    assert f"{tiny_mixed}: 8 of 12 clips are used" in caplog.messages
    for reason in ("3 dropped, rare shape: ", "1 dropped, low fps: "):
        assert any(reason in message for message in caplog.messages)


def test_features_let_go_of_encoders_that_only_tell_what_they_are(
    mixed_run: MakeRun, cached: Path, tiny_mixed: Path
) -> None:
    assert open_source(mixed_run(features=cached), device=CPU)[1] is None
    for wanted in ({"prompts": ["a ball"]}, {"manifest": tiny_mixed}):
        run = mixed_run(features=cached, validation={"every": 1, **wanted})
        _, encoders = open_source(run, device=CPU)
        assert encoders is not None
        _, same = open_source(run, device=CPU, encoders=encoders)
        assert same is encoders
    # On a device without storage any use of it fails.
    source, encoders = open_source(mixed_run(features=cached), device=torch.device("meta"))
    assert encoders is None
    assert source.text_features == {"sequence": (None, 24), "pooled": (20,)}


def test_paths_are_looked_at_before_the_clips(mixed_run: MakeRun, tmp_path: Path) -> None:
    run = mixed_run(manifest=tmp_path / "no.json")
    run = run.model_copy(update={"vae": run.vae.model_copy(update={"pretrained": tmp_path / "no-vae"})})
    with pytest.raises(FileNotFoundError, match=r"vae\.pretrained: .*no-vae"):
        open_source(run, device=CPU)


@pytest.mark.parametrize("features", [False, True])
def test_a_denoiser_of_other_widths_is_refused_with_both_numbers(
    mixed_run: MakeRun, cached: Path, features: bool
) -> None:
    source, _ = open_source(mixed_run(features=cached if features else None), device=CPU)
    source.check_fits(SparseUMMDiT(**DENOISER))
    other = SparseUMMDiT(**{**DENOISER, "caption_channels": 32, "pooled_projection_dim": 8})
    with pytest.raises(
        ValueError,
        match=r"sequence \[tokens, 24\], .* \[tokens, 32\] \(caption_channels\); .* pooled \[20\], .* \[8\]",
    ):
        source.check_fits(other)
    sizes = {**SHALLOW_VAE, "latent_channels": 16, "shift": None, "scale": None}
    channels = replace(source, vae=WFVAE(**sizes))
    with pytest.raises(ValueError, match="latents of 16 channels, the denoiser has in_channels 4"):
        Source.check_fits(channels, SparseUMMDiT(**DENOISER))
    coarse = WFVAE(**SHALLOW_VAE, shift=None, scale=None)
    coarse.strides = Strides(temporal=8, spatial=64)  # clips of 64 x 64 are one latent, tokens are 2 x 2
    with pytest.raises(ValueError, match="sides must be multiples of 128, got height 64 and width 64"):
        replace(source, vae=coarse).check_fits(SparseUMMDiT(**DENOISER))
    with pytest.raises(ValueError, match=r"^the VAE makes latents of 4 channels, .* out_channels 8$"):
        source.check_fits(SparseUMMDiT(**{**DENOISER, "out_channels": 8}))


def test_features_name_the_reader_that_read_them(mixed_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)  # as if it were not installed
    reading._is_installed.cache_clear()  # of other tests in this process
    assert preprocessing_parts(mixed_run(reader="decord"), [])["reader"] == "pyav"
    reading._is_installed.cache_clear()


def sample(name: str, *, caption: str = "a ball", start: int = 0) -> Sample:
    return Sample(0, Record(Path(name), (caption,)), num_frames=9, height=16, width=16, start=start)


def test_digest_is_of_clips_order_captions_and_frames_but_not_of_folders() -> None:
    first, second = sample("clips/a.mp4"), sample("clips/b.mp4")
    digest = digest_of([first, second])
    assert digest == digest_of([sample("elsewhere/a.mp4"), second])
    others = (
        [second, first],
        [first],
        [first, sample("clips/c.mp4")],
        [first, sample("clips/b.mp4", caption="a cube")],
        [first, sample("clips/b.mp4", start=1)],
    )
    assert len({digest, *map(digest_of, others)}) == 1 + len(others)


@pytest.mark.parametrize("missing", [(), ("shift",), ("scale",), ("shift", "scale")])
def test_latents_are_normalized_as_in_generation(
    mixed_run: MakeRun, cached: Path, missing: tuple[str, ...]
) -> None:
    description = json.loads((cached / "features.json").read_text())
    config = description["vae"] = {**description["vae"], **dict.fromkeys(missing)}
    (cached / "features.json").write_text(json.dumps(description))
    source, _ = open_source(mixed_run(features=cached), device=CPU)
    latents = torch.randn(2, 4, 2, 3, 3)
    expected = WFVAE(**config).normalize_latents(latents)
    assert torch.equal(latents, expected) == (len(missing) == 2)
    assert torch.equal(source.vae.normalize_latents(latents), expected)
