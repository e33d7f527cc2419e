"""Writing a feature cache from real clips by real, tiny encoders: equal to encoding online,
resumable, never overwritten.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import Running
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from opensoraplan.data.buckets import Draw
from opensoraplan.data.dataset import ClipDataset
from opensoraplan.data.features import FeatureDataset, check_fresh, collate_features
from opensoraplan.data.manifest import read_manifest
from opensoraplan.data.selection import SelectionSettings, select
from opensoraplan.data.video import VideoWriter
from opensoraplan.models import wfvae
from opensoraplan.train.config import DataSettings, ModelSettings, TextSettings, TrainSettings, VAESettings
from opensoraplan.train.inputs.cache import CacheSummary, write_cache
from opensoraplan.train.inputs.encoders import load_encoders
from opensoraplan.train.inputs.sources import open_source
from opensoraplan.train.run.files import read_run

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")
CAPTIONS = ["A Red ball rolls", "a drone view of waves", "the camera moves", "rain is falling", "a red ball"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips with captions: of 9 frames, but the last one longer. Read only."""
    folder = tmp_path_factory.mktemp("clips")
    for number, caption in enumerate(CAPTIONS):
        frames = torch.randint(0, 256, (20 if number == 4 else 9, 4, 4, 3), dtype=torch.uint8)
        with VideoWriter(folder / f"{number}.mp4", fps=24) as writer:
            writer.write(frames.repeat_interleave(8, 1).repeat_interleave(8, 2))
        (folder / f"{number}.txt").write_text(caption)
    read_manifest(folder)  # remember what is in the files, so that one may break later
    return folder


@pytest.fixture(scope="module")
def settings(clips: Path, tiny_model: Path) -> TrainSettings:
    selection = SelectionSettings(num_frames=9, min_num_frames=9, max_height=32, max_width=32)
    return TrainSettings(
        output=Path("unused"),
        device="cpu",
        model=ModelSettings(config={}),
        vae=VAESettings(pretrained=tiny_model),
        text=TextSettings(t5=tiny_model, clip=tiny_model),
        data=DataSettings(manifest=clips, selection=selection, workers=0, max_bad_files=1),
    )


def write(settings: TrainSettings, out: Path, *, rank: int = 0, ranks: int = 1) -> CacheSummary:
    return write_cache(settings, out, rank=rank, ranks=ranks, videos_per_shard=2, texts_per_shard=4)


@pytest.fixture(scope="module")
def cache(settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole cache, written at once. Read only."""
    folder = tmp_path_factory.mktemp("cache") / "features"
    summary = write(settings, folder)
    assert (summary.samples, summary.texts, summary.written, summary.present) == (5, 6, 5, 0)
    assert (summary.missing, summary.left_out) == (0, ())
    return folder


def changed(settings: TrainSettings, **data: object) -> TrainSettings:
    return settings.model_copy(update={"data": settings.data.model_copy(update=data)})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_cache_equals_online(settings: TrainSettings, clips: Path, cache: Path) -> None:
    encoders = load_encoders(settings.vae, settings.text, device="cpu")
    check_fresh(cache, encoders.fingerprint())
    cached = FeatureDataset(cache, seed=5, caption_dropout=0.4, use_aesthetic=False)
    samples = select(read_manifest(clips), settings.data.selection, seed=settings.seed).kept
    assert samples[4].windows == 12
    online = ClipDataset(samples, seed=5, new_windows=False, caption_dropout=0.4, reader="pyav")
    draws = [Draw(index=slot, epoch=0, step=3, slot=slot) for slot in range(5)]
    batch = collate_features([cached[draw] for draw in draws])
    drawn = [online[draw] for draw in draws]
    assert batch.captions == tuple(clip.caption for clip in drawn)
    assert 0 < batch.captions.count("") < 5
    texts = encoders.encode_captions([clip.caption for clip in drawn])
    assert torch.equal(batch.moments, encoders.encode_videos(torch.stack([clip.video for clip in drawn])))
    for cached_text, text in zip(batch.texts, texts, strict=True):
        assert cached_text.keys() == text.keys() == {"sequence", "pooled"}
        for name, feature in text.items():
            assert feature.dtype == torch.bfloat16
            assert torch.equal(cached_text[name], feature)
    assert cached.description.vae["scale"] == encoders.vae.config["scale"]


def test_sentences_on_quality_are_those_of_training_on_the_clips(
    settings: TrainSettings, clips: Path, tmp_path: Path
) -> None:
    """Whatever the run's seed draws of captions: the sentence of each is in the cache."""
    scored = tmp_path / "scored.json"
    scores = (3.0, 5.0, 6.0, 7.0)
    rows = [
        {"path": f"{clips}/{number}.mp4", "cap": [caption, f"again {caption}"], "aes": score}
        for number, (caption, score) in enumerate(zip(CAPTIONS, scores, strict=False))
    ]
    scored.write_text(json.dumps(rows))
    settings = changed(settings, manifest=scored, use_aesthetic=True)
    write(settings, tmp_path / "cache")
    online, _ = open_source(settings, device=CPU)
    features = changed(settings, features=tmp_path / "cache", caption_dropout=0.0)
    cached, _ = open_source(features, device=CPU)
    captions = [sample.record.captions for sample in online.samples]
    assert [sample.record.captions for sample in cached.samples] == captions
    assert captions[1] == (CAPTIONS[1], f"again {CAPTIONS[1]}")
    assert all(len(text) > len(CAPTIONS[2]) + 20 for text in captions[2])
    for index in range(4):
        draw = Draw(index=index, epoch=3, step=9, slot=0)
        assert cached.dataset[draw].caption in captions[index]
    other = features.model_copy(update={"seed": settings.seed + 1})
    with pytest.raises(ValueError, match=r"is stale.*captions"):
        open_source(other, device=CPU)
    # Without the clips' manifest there is nothing to hold it against, and the captions are the cache's.
    alone = changed(other, manifest=None)
    assert open_source(alone, device=CPU)[0].samples == cached.samples


def test_killed_and_gone_on_with_by_two_ranks(settings: TrainSettings, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"

    def die(step: str, done: int, total: int) -> None:
        assert total == {"texts": 6, "videos": 5}[step]
        if (step, done) == ("videos", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(settings, out, progress=die, videos_per_shard=2, texts_per_shard=4)
    assert sorted(contents(out)) == [
        "features.json",
        "texts-00000.safetensors",
        "texts-00001.safetensors",
        "videos-00000.safetensors",
    ]
    with pytest.raises(ValueError, match="2 of 5 shards are missing"):
        check_fresh(out, {})
    first = write(settings, out, rank=1, ranks=2)
    assert (first.written, first.present, first.missing) == (1, 1, 1)
    second = write(settings, out, rank=0, ranks=2)
    assert (second.written, second.present, second.missing) == (1, 2, 0)
    assert contents(out) == contents(cache)


def write_slowly() -> None:
    """Write the cache of the settings in a file; at the first video, wait for a file named "goes-on"."""
    settings, out = Path(sys.argv[1]), Path(sys.argv[2])

    def wait(step: str, done: int, _total: int) -> None:
        if (step, done) == ("videos", 1):
            Path("waits").touch()
            while not Path("goes-on").exists():
                time.sleep(0.02)

    run = TrainSettings.model_validate_json(settings.read_text())
    write_cache(run, out, progress=wait, videos_per_shard=2, texts_per_shard=4)


@pytest.mark.parametrize(("workers", "dies"), [(0, False), (1, True)])
def test_two_processes_share_the_shards(
    start: Callable[..., Running],
    settings: TrainSettings,
    cache: Path,
    tmp_path: Path,
    workers: int,
    dies: bool,
) -> None:
    """Without torchrun, started one after the other: nothing is encoded twice, but what a dead one was at."""
    settings, out = changed(settings, workers=workers), tmp_path / "cache"
    (tmp_path / "settings.json").write_text(settings.model_dump_json())
    other = start("settings.json", "cache", program=write_slowly)
    other.wait_until((tmp_path / "waits").exists)

    def end_the_wait(step: str, done: int, _total: int) -> None:
        if (step, done) == ("videos", 3):  # all but the shard that the other is at
            if dies:
                other.kill()
            else:
                (tmp_path / "goes-on").touch()

    mine = write_cache(settings, out, progress=end_the_wait, videos_per_shard=2, texts_per_shard=4)
    assert dies or other.wait() == 0
    assert (mine.written, mine.present, mine.missing) == ((3, 2, 0) if dies else (2, 3, 0))
    shards, expected = contents(out), contents(cache)
    del shards["features.json"], expected["features.json"]  # which has train_fps as 24.0
    assert shards == expected


def test_a_number_of_the_settings_is_the_same_however_it_is_written(
    settings: TrainSettings, cache: Path, tmp_path: Path
) -> None:
    shutil.copytree(cache, tmp_path / "cache")
    assert settings.data.selection.train_fps == 24
    other = settings.data.selection.model_copy(update={"train_fps": 24.0})
    assert write(changed(settings, selection=other), tmp_path / "cache").present == 5


def test_unreadable_clips_are_left_out(settings: TrainSettings, clips: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(clips, broken)
    read_manifest(broken)
    (broken / "1.mp4").unlink()
    settings = changed(settings, manifest=_listed(broken), workers=1)
    with pytest.raises(ValueError, match=r"1 files cannot be read, data\.max_bad_files is 0: .*1\.mp4"):
        write(changed(settings, max_bad_files=0), tmp_path / "cache")
    summary = write(settings, tmp_path / "cache")
    assert [os.path.basename(entry.path) for entry in summary.left_out] == ["1.mp4"]
    cached = FeatureDataset(tmp_path / "cache", seed=0, caption_dropout=0.0, use_aesthetic=False)
    assert [sample.index for sample in cached.samples] == [0, 2, 3, 4]
    assert cached.description.left_out == summary.left_out


def _listed(folder: Path) -> Path:
    """A manifest that has everything to know of the clips, so that none is opened before it is encoded."""
    rows = [
        f"{number}.mp4,{caption},{20 if number == 4 else 9},24,32,32"
        for number, caption in enumerate(CAPTIONS)
    ]
    path = folder / "clips.csv"
    path.write_text("\n".join(["path,caption,num_frames,fps,height,width", *rows]))
    return path


def test_a_clip_that_was_replaced_is_noticed_and_encoded_again(
    settings: TrainSettings, clips: Path, tmp_path: Path
) -> None:
    """Under the same name, of the same length. Other times alone change nothing."""
    shutil.copytree(clips, tmp_path / "mine")
    run, folder = changed(settings, manifest=tmp_path / "mine"), tmp_path / "features"
    write(run, folder)
    trained = changed(run, features=folder)
    first, second = (tmp_path / "mine" / f"{number}.mp4" for number in (0, 1))
    os.utime(second)
    open_source(trained, device=CPU)
    before = first.stat()
    first.write_bytes(second.read_bytes())
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match=r"is stale: 1 clips have changed .*0\.mp4\); `osp cache --out"):
        open_source(trained, device=CPU)
    again = write(run, folder)
    assert (again.written, again.present) == (1, 4)
    source, _ = open_source(trained, device=CPU)
    one, two = (source.dataset[Draw(index=index, epoch=0, step=0, slot=0)].moments for index in (0, 1))
    assert torch.equal(one, two)


def test_memory_that_is_full_is_told(settings: TrainSettings, tmp_path: Path) -> None:
    def full(module: nn.Module, _arguments: object) -> None:
        if isinstance(module, wfvae.Encoder):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with (
        register_module_forward_pre_hook(full),
        pytest.raises(MemoryError, match=r"a clip or its caption cannot be encoded, memory is full"),
    ):
        write(settings, tmp_path / "cache")


def test_another_cache_is_not_overwritten(settings: TrainSettings, cache: Path, tmp_path: Path) -> None:
    before = contents(cache)
    other = settings.model_copy(update={"text": settings.text.model_copy(update={"max_tokens": 5})})
    with pytest.raises(
        ValueError, match=r"stale, it was written with another max_tokens \(was 512, is 5\): "
    ):
        write(other, cache)
    # Found before the encoders are loaded, which are not there.
    gone = tmp_path / "empty.ckpt"
    gone.write_bytes(b"")
    other = changed(settings, selection=settings.data.selection.model_copy(update={"speed_factor": 1.5}))
    other = other.model_copy(update={"vae": VAESettings(pretrained=gone)})
    with pytest.raises(
        ValueError, match=r"another selection\.speed_factor \(was 1\.0, is 1\.5\), clips, win"
    ):
        write(other, cache)
    assert contents(cache) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="mine exists and is no feature cache"):
        write(settings, tmp_path / "mine")


def test_settings_are_checked_first(settings: TrainSettings, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    silent = tmp_path / "silent.csv"
    silent.write_text("path,num_frames,fps,height,width\na.mp4,9,24,32,32")
    with pytest.raises(ValueError, match=r"with 2 ranks, rank must be in 0 \.\. 1, got 2"):
        write(settings, out, rank=2, ranks=2)
    with pytest.raises(ValueError, match=r"data\.manifest is missing"):
        write(changed(settings, manifest=None), out)
    with pytest.raises(ValueError, match=r"missing: vae\.pretrained"):
        write(settings.model_copy(update={"vae": VAESettings()}), out)
    with pytest.raises(ValueError, match="all 1 records are dropped: 1 no caption"):
        write(changed(settings, manifest=silent), out)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*file: give another"):
        write(settings, tmp_path / "file" / "cache")
    assert not out.exists()


def test_the_guides_files_that_load_features_make_them(clips: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The same two files for the cache and for training, which is without the clips."""
    files: dict[str, Path] = {}
    for name, flag in (("model", "_features"), ("data", "use_feature_data")):
        text = (GOLDEN / f"guide_{name}.json").read_text(encoding="utf-8")
        text = text.replace(f'{flag}": false', f'{flag}": true')
        files[f"{name}_json"] = tmp_path / f"{name}.json"
        files[f"{name}_json"].write_text(text.replace("./examples/opensoraplan1.5/data.txt", str(clips)))
    changes = [
        *("output=run", "device=cpu", "data.workers=0", "data.reader=pyav", "optimizer.accumulate=1"),
        *(f"vae.pretrained={tiny_model}", "vae.config=none", f"text.t5={tiny_model}", "text.compute=fp32"),
        *(f"text.clip={tiny_model}", "text.t5_tokenizer=none", "text.clip_tokenizer=none"),
        *("data.selection.num_frames=9", "data.selection.min_num_frames=9"),
        *("data.selection.max_height=32", "data.selection.max_width=32"),
    ]
    run = read_run(None, **files, changes=changes, to_cache=True)
    assert write(run, tmp_path / "features").samples == 5
    changes.append(f"data.features={tmp_path / 'features'}")
    run = read_run(None, **files, changes=changes)
    assert run.data.manifest is None
    assert len(open_source(run, device=CPU)[0].samples) == 5
    other = read_run(None, **files, changes=[*changes, "data.selection.speed_factor=1.5"])
    with pytest.raises(
        ValueError, match=r"is stale, .*another selection\.speed_factor \(was 1\.0, is 1\.5\): write"
    ):
        open_source(other, device=CPU)


def test_features_without_clips_are_held_against_what_is_given(
    settings: TrainSettings, cache: Path, tmp_path: Path
) -> None:
    run = settings.model_copy(update={"vae": VAESettings(), "text": TextSettings()})

    def train_on(features: Path, **data: object) -> int:
        given = DataSettings.read({"features": features, **data}, where="the test's run")
        return len(open_source(run.model_copy(update={"data": given}), device=CPU)[0].samples)

    assert train_on(cache) == 5  # num_frames, say, was another than the default
    # How large batches are is for training to say.
    size = {"num_frames": 9, "min_num_frames": 9, "max_width": 32, "min_batches": 1}
    assert train_on(cache, selection=size, reader="pyav") == 5
    with pytest.raises(
        ValueError,
        match=r"another selection\.num_frames \(was 9, is 121\), selection\.max_width \(was 32, is",
    ):
        train_on(cache, selection={"num_frames": 121, "max_width": 64})
    # The reader need not be installed here.
    read = tmp_path / "read"
    shutil.copytree(cache, read)
    description = json.loads((read / "features.json").read_text())
    description["parts"]["reader"] = "torchcodec"
    (read / "features.json").write_text(json.dumps(description))
    assert train_on(read, reader="torchcodec") == 5
    with pytest.raises(ValueError, match=r"another reader \(was torchcodec, is pyav\)"):
        train_on(read, reader="pyav")
