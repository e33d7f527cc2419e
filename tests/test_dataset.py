"""data/dataset.py on real tiny files, some damaged or gone: what a draw becomes, and what a failure costs."""

import gc
import logging
import pickle
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from opensoraplan.data import reading
from opensoraplan.data.buckets import BucketSampler, Draw
from opensoraplan.data.dataset import (
    BadFiles,
    Batch,
    Clip,
    ClipDataset,
    Failure,
    all_captions,
    caption_of,
    collate,
)
from opensoraplan.data.record import Record
from opensoraplan.data.selection import Sample
from opensoraplan.data.video import Reader, VideoWriter, fit, read_frames, to_uint8

FRAMES = 12


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six clips of 12 frames of 32 x 48, each frame of a level of its own."""
    folder = tmp_path_factory.mktemp("clips")
    paths = [folder / f"clip{i}.mp4" for i in range(6)]
    for i, path in enumerate(paths):
        levels = torch.arange(FRAMES, dtype=torch.uint8) * 15 + 10 + i
        with VideoWriter(path, fps=24, crf=1) as writer:
            writer.write(levels[:, None, None, None].expand(FRAMES, 32, 48, 3))
    return paths


def sample(path: Path, *, index: int = 0, frames: int = 9, windows: int = 4, **known: object) -> Sample:
    record = Record(path, ("a grey clip", "a clip of grey"), num_frames=FRAMES, fps=24.0, height=32, width=48)
    for name, value in known.items():
        object.__setattr__(record, name, value)
    return Sample(
        index,
        record,
        num_frames=frames,
        height=16,
        width=16,
        resampled=FRAMES,
        thinned=FRAMES,
        window=1 if windows > 1 else 0,
        windows=windows,
    )


def samples(paths: Sequence[Path]) -> list[Sample]:
    return [sample(path, index=index) for index, path in enumerate(paths)]


def draw(index: int, *, epoch: int = 0) -> Draw:
    return Draw(index=index, epoch=epoch, step=epoch, slot=0)


# --- Captions -----------------------------------------------------------------------------------------------


def test_captions_are_drawn_and_dropped() -> None:
    one = sample(Path("a.mp4"))
    said = Counter(
        caption_of(one, draw(index, epoch=epoch), seed=3, dropout=0.25)
        for index in range(100)
        for epoch in range(10)
    )
    assert set(said) == {"", *all_captions(one)}
    assert 200 < said[""] < 300
    assert all(count > 300 for caption, count in said.items() if caption)
    # The place in a batch decides nothing, so that a cache or other batches give the same run.
    moved = draw(5)._replace(step=77, slot=3)
    for seed in range(5):
        captions = {caption_of(one, turn, seed=seed, dropout=0.5) for turn in (draw(5), moved)}
        assert len(captions) == 1


def test_dropout_at_its_ends_and_no_caption() -> None:
    one, mute = sample(Path("a.mp4")), sample(Path("a.mp4"), captions=())
    turns = [draw(index) for index in range(50)]
    assert {caption_of(one, turn, seed=0, dropout=1) for turn in turns} == {""}
    assert "" not in {caption_of(one, turn, seed=0, dropout=0) for turn in turns}
    assert caption_of(mute, draw(0), seed=0, dropout=0) == ""
    assert all_captions(mute) == ("",)


# --- Clips --------------------------------------------------------------------------------------------------


def test_a_clip_is_its_window_cropped_and_resized(clips: list[Path]) -> None:
    one = sample(clips[2], crop=(4, 36, 0, 32))
    clip = ClipDataset([one], seed=0, new_windows=False, caption_dropout=0)[draw(0)]
    assert (clip.video.shape, clip.video.dtype) == ((3, 9, 16, 16), torch.float32)
    expected = fit(read_frames(clips[2], start=1, count=9)[:, :, 4:36], height=16, width=16)
    assert torch.equal(clip.video, expected)
    assert (clip.sample, clip.failures) == (one, ())
    assert clip.caption in one.record.captions


def test_windows_are_drawn_anew_each_epoch(clips: list[Path]) -> None:
    dataset = ClipDataset(samples(clips), seed=0)
    windows = {dataset[draw(1, epoch=epoch)].sample.window for epoch in range(12)}
    assert windows == {0, 1, 2, 3}
    clip = dataset[draw(1, epoch=4)]
    assert torch.equal(clip.video, dataset[draw(1, epoch=4)._replace(step=9, slot=5)].video)
    start = clip.sample.window
    assert torch.equal(clip.video, fit(read_frames(clips[1], start=start, count=9), height=16, width=16))
    fixed = ClipDataset(samples(clips), seed=0, new_windows=False)
    assert {fixed[draw(1, epoch=epoch)].sample.window for epoch in range(5)} == {1}


def test_pictures_are_clips_of_one_frame(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    av.VideoFrame.from_ndarray(np.full((32, 48, 3), 255, np.uint8)).save(path)
    one = Sample(0, Record(path, ("white",), num_frames=1, height=32, width=48), 1, 16, 16)
    clip = ClipDataset([one], seed=0)[draw(0)]
    torch.testing.assert_close(clip.video, torch.ones(3, 1, 16, 16))


@pytest.fixture
def damaged(clips: list[Path], tmp_path: Path) -> list[Path]:
    """Six clips, of which the first is cut off, the second gone and the third too short."""
    half = tmp_path / "half.mp4"
    half.write_bytes(clips[0].read_bytes()[: clips[0].stat().st_size // 2])
    short = tmp_path / "short.mp4"
    with VideoWriter(short, fps=24) as writer:
        writer.write(torch.zeros(5, 32, 48, 3, dtype=torch.uint8))
    return [half, tmp_path / "gone.mp4", short, *clips[3:]]


def test_another_clip_takes_the_place_of_a_bad_one(damaged: list[Path]) -> None:
    other = sample(damaged[5], index=6, frames=1)
    dataset = ClipDataset([*samples(damaged), other], seed=0)
    stand_ins = set()
    for epoch in range(12):
        for index in range(6):
            clip = dataset[draw(index, epoch=epoch)]
            assert clip.sample.index in (3, 4, 5)
            if index < 3:
                assert clip.failures[0].path == damaged[index]
                stand_ins.add((index, clip.sample.index))
            else:
                assert (clip.sample.index, clip.failures) == (index, ())
        again = dataset[draw(5, epoch=epoch)]
        assert torch.equal(clip.video, again.video)
        assert (clip.caption, clip.sample) == (again.caption, again.sample)
    # Never the same one for all, which would be trained on too often.
    assert len(stand_ins) == 9
    messages = [dataset[draw(index)].failures[0].message for index in range(3)]
    assert "half.mp4" in messages[0]
    assert "cut off" in messages[0]
    assert "gone.mp4 does not exist" in messages[1]
    assert "short.mp4 has 5 frames, asked for frame" in messages[2]


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_a_window_is_moved_inside_of_what_decodes(clips: list[Path], reader: Reader) -> None:
    """Where a manifest counts the frames that the file claims."""
    claimed = replace(sample(clips[0]), resampled=15, thinned=15, windows=7, window=6)
    dataset = ClipDataset([claimed], seed=0, new_windows=False, reader=reader, replace=False)
    assert claimed.frame_numbers == tuple(range(6, 15))
    expected = fit(read_frames(clips[0], start=3, count=9), height=16, width=16)
    assert (dataset[draw(0)].video - expected).abs().max() < 0.05
    # But not out of its cut, nor by many frames.
    cut = replace(claimed, start=4, window=2, record=replace(claimed.record, cut=(4, 15)))
    far = replace(claimed, thinned=99, resampled=99, windows=90, window=80)
    for other in (cut, far):
        with pytest.raises(ValueError, match=r"clip0\.mp4 has 12 frames, asked for frame"):
            ClipDataset([other], seed=0, new_windows=False, reader=reader)[draw(0)]


def test_a_bad_film_of_many_cuts_is_one_bad_file(damaged: list[Path], clips: list[Path]) -> None:
    cuts = [sample(damaged[0], index=index) for index in range(40)]
    dataset = ClipDataset([*cuts, sample(clips[3], index=40)], seed=0)
    for index in range(40):
        clip = dataset[draw(index)]
        assert clip.sample.index == 40
        assert len(clip.failures) == 1


def test_a_bad_cut_can_be_replaced_by_another_of_its_film(clips: list[Path]) -> None:
    beyond = sample(clips[3], index=0, crop=(0, 99, 0, 32))
    assert ClipDataset([beyond, sample(clips[3], index=1)], seed=0)[draw(0)].sample.index == 1


def test_only_bad_clips_of_a_shape(damaged: list[Path]) -> None:
    dataset = ClipDataset([*samples(damaged[:3]), sample(damaged[4], frames=1)], seed=0)
    with pytest.raises(ValueError, match=r"none of 3 clips of 9x16x16 can be read: ") as caught:
        dataset[draw(1)]
    assert all(path.name in str(caught.value) for path in damaged[:3])


def test_bad_files_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    bad = [Failure(Path(f"{i}.mp4"), f"{i}.mp4 is cut off") for i in range(3)]
    account = BadFiles(2)
    with caplog.at_level(logging.WARNING):
        account.add(())
        account.add(bad[:1])
        account.add([bad[0], bad[1], bad[0]])
    assert len(account) == 2
    assert [message.split(": ")[1] for message in caplog.messages] == ["0.mp4 is cut off", "1.mp4 is cut off"]
    with pytest.raises(ValueError, match=r"3 files .*, 2 are allowed: 0.mp4 .*; 1.mp4 .*; 2.mp4 is cut off"):
        account.add(bad)
    with pytest.raises(ValueError, match="1 files cannot be read, 0 are allowed"):
        BadFiles(0).add(bad[:1])


# --- Batches ------------------------------------------------------------------------------------------------


def load(dataset: ClipDataset, turns: list[list[Draw]], *, workers: int) -> list[Batch]:
    return list(DataLoader(dataset, batch_sampler=turns, collate_fn=collate, num_workers=workers))


def test_batches_of_worker_processes_are_the_same(damaged: list[Path]) -> None:
    mixed = [*samples(damaged), *(sample(path, frames=1, index=6) for path in damaged[3:])]
    dataset = ClipDataset(mixed, seed=1)
    sampler = BucketSampler([one.shape for one in mixed], global_batch=3, seed=1)
    turns = [sampler.share(step, rank=0, ranks=1, accumulate=1)[0] for step in range(4)]
    here, there = (load(dataset, turns, workers=workers) for workers in (0, 2))
    assert {batch.video.shape for batch in here} == {(3, 3, 9, 16, 16), (3, 3, 1, 16, 16)}
    assert any(batch.failures for batch in here)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.video, other.video)
        assert (one.captions, one.failures) == (other.captions, other.failures)
        assert len(one.captions) == 3
    account = BadFiles(3)
    for batch in there:
        account.add(batch.failures)
    assert 0 < len(account) <= 3


def threads() -> int:
    """Threads of this process, also those of libraries (Linux)."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 0


def test_a_reader_that_is_missing_is_said_once_and_not_by_every_worker(
    clips: list[Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)  # as if it were not installed
    reading._is_installed.cache_clear()  # of other tests in this process
    handler = logging.StreamHandler(sys.stderr)
    reading.logger.addHandler(handler)
    try:
        dataset = ClipDataset([sample(clips[0])] * 4, seed=0, reader="decord")
        load(dataset, [[draw(index)] for index in range(4)], workers=2)
    finally:
        reading.logger.removeHandler(handler)
        reading._is_installed.cache_clear()
    assert capfd.readouterr().err.count("reader decord is not installed") == 1


def test_no_threads_are_left_to_be_forked(damaged: list[Path], tmp_path: Path) -> None:
    # A worker process that inherits such garbage but not its threads hangs or crashes when it is collected.
    dataset = ClipDataset(samples(damaged), seed=1)
    clip = dataset[draw(4)]
    gc.collect()
    before = threads()
    gc.disable()
    try:
        for index in range(6):
            dataset[draw(index)]
        with VideoWriter(tmp_path / "clip.mp4", fps=24) as writer:
            writer.write(to_uint8(clip.video))
        assert threads() == before
    finally:
        gc.enable()


def test_what_travels_between_processes_can(damaged: list[Path]) -> None:
    dataset = pickle.loads(pickle.dumps(ClipDataset(samples(damaged), seed=1)))
    clip = dataset[draw(0)]
    copy: Clip = pickle.loads(pickle.dumps(clip))
    assert torch.equal(copy.video, clip.video)
    assert (copy.sample, copy.failures) == (clip.sample, clip.failures)
