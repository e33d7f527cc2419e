"""What a file says of its video, and what is counted where it says nothing: length, rate, start, sound."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition

from opensoraplan.data.manifest import read_manifest
from opensoraplan.data.record import Record, complete
from opensoraplan.data.video import count_frames, probe, read_frames, read_numbered

MILLISECOND = Fraction(1, 1000)


def write_clip(
    path: Path,
    count: int,
    *,
    codec: str = "libx264",
    rate: Fraction = Fraction(24),
    stamps: Sequence[int] | None = None,
    sound: float = 0.0,
    size: int = 32,
    options: dict[str, str] | None = None,
) -> Path:
    """So many small frames, one after the other or at `stamps` in milliseconds, and seconds of `sound`.
    `options` are the codec's.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = size, size * 3 // 2, "yuv420p"
        tick = MILLISECOND if stamps else 1 / rate
        stream.codec_context.time_base = tick
        audio = container.add_stream("pcm_s16le", rate=8000, layout="mono") if sound else None
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((size, size * 3 // 2, 3), 10 + index % 200, np.uint8))
            frame.pts, frame.time_base = stamps[index] if stamps else index, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio is not None:
            assert isinstance(audio, av.AudioStream)
            silence = np.zeros((1, round(sound * 8000)), np.int16)
            samples = av.AudioFrame.from_ndarray(silence, format="s16p", layout="mono")
            samples.sample_rate = 8000
            container.mux(audio.encode(samples) + audio.encode(None))
    return path


def cut_out(
    source: Path, target: Path, *, start: float, end: float, still: float = 99.0, **options: str
) -> Path:
    """A part of a clip without encoding it again, as ffmpeg cuts it with `-c copy`: from the keyframe before
    `start` on, in decoding order, until `end`. In mp4 an edit list skips what is before. What comes from
    `still` on, where a keyframe is, comes a second later.
    """
    with av.open(str(source)) as whole, av.open(str(target), "w", options=options) as part:
        (video,) = whole.streams.video
        copy = part.add_stream_from_template(video)
        assert video.time_base is not None
        shift = round(start / video.time_base)
        whole.seek(shift, stream=video)
        for packet in whole.demux(video):
            if packet.dts is None or packet.pts is None or packet.dts * video.time_base >= end:
                continue
            later = round(1 / video.time_base) if packet.pts * video.time_base >= still else 0
            packet.pts, packet.dts, packet.stream = (
                packet.pts - shift + later,
                packet.dts - shift + later,
                copy,
            )
            part.mux(packet)
    return target


# A pipe that nobody writes to keeps the one who reads it waiting.
PROBING = """
import sys
from pathlib import Path
from opensoraplan.data.manifest import read_manifest
from opensoraplan.data.record import Record, complete
folder = Path(sys.argv[1])
names = sorted(path.name for path in folder.glob("*.mp4"))
complete([Record(folder / name, ("",)) for name in names], cache=folder / "cache.json", save_every_s=0)
"""


def test_what_was_learned_outlives_a_kill(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_clip(tmp_path / name, 5)
    for number in range(3000):  # by so many it is still at work when it is killed
        os.link(tmp_path / "b.mp4", tmp_path / f"b{number}.mp4")
    cache, end = tmp_path / "cache.json", time.monotonic() + 120
    with subprocess.Popen([sys.executable, "-c", PROBING, tmp_path]) as process:
        try:
            while not (cache.exists() and "b.mp4" in cache.read_text()):
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
        finally:
            process.kill()
    assert "a.mp4" in cache.read_text()


@pytest.fixture
def ten_seconds() -> Iterator[None]:
    """A test that waits for longer fails."""

    def fail(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [make_pipe, make_socket, make_device])
@pytest.mark.parametrize("name", ["clip.mp4", "photo.png"])
@pytest.mark.usefixtures("ten_seconds")
def test_what_is_no_regular_file_is_refused_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], name: str
) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = Path(name)
    make(path)
    for read in (probe, read_frames, count_frames, lambda path: read_numbered(path, [0])):
        with pytest.raises(ValueError, match=f"{name} is not a regular file"):
            read(path)
    (record,) = read_manifest(Path())
    assert record.error == f"{name} is not a regular file"


def test_probe(tmp_path: Path) -> None:
    info = probe(write_clip(tmp_path / "clip.mp4", 10, codec="mpeg4", rate=Fraction(30000, 1001)))
    assert (info.frames, info.fps) == (10, Fraction(30000, 1001))
    assert (info.height, info.width, info.codec) == (32, 48, "mpeg4")
    assert info.duration == pytest.approx(10 * 1001 / 30000, abs=1e-4)


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mkv", "libx264"), ("mkv", "mpeg4"), ("webm", "libvpx"), ("webm", "libvpx-vp9")]
)
@pytest.mark.parametrize("rate", [Fraction(24), Fraction(24000, 1001)], ids=["24", "23.976"])
def test_a_rate_that_is_kept_is_told_exactly(tmp_path: Path, suffix: str, codec: str, rate: Fraction) -> None:
    for count in (1, 2, 59):
        info = probe(write_clip(tmp_path / f"clip.{suffix}", count, codec=codec, rate=rate))
        assert (info.frames, info.fps) == (count, rate)
        assert info.duration == pytest.approx(count / rate)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])  # whose packets are frames, and whose are not
def test_only_frames_are_counted(tmp_path: Path, codec: str) -> None:
    """Neither sound that goes on after them, nor the time before a late start."""
    longer = write_clip(tmp_path / "longer.mkv", 24, codec=codec, sound=3.0)
    late = write_clip(
        tmp_path / "late.mkv", 24, codec=codec, stamps=[5000 + 1000 * i // 24 for i in range(24)]
    )
    for clip in (longer, late):
        info = probe(clip)
        assert (info.frames, info.fps, info.duration) == (24, 24, 1.0)
        assert len(read_numbered(clip, [info.frames - 1])) == 1
    assert probe(write_clip(tmp_path / "one.mkv", 1, codec=codec, sound=3.0)).frames == 1


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_a_rate_that_changes_is_the_mean(tmp_path: Path, codec: str) -> None:
    # One second of 24 frames, then two of 8.
    stamps = [round(1000 * i / 24) for i in range(24)] + [1000 + 125 * i for i in range(17)]
    clip = write_clip(tmp_path / "clip.mkv", 41, codec=codec, stamps=stamps)
    info = probe(clip)
    assert (info.frames, count_frames(clip)) == (41, 41)
    assert info.fps == Fraction(40, 3)
    assert info.duration == pytest.approx(41 / (40 / 3))


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_clips_of_a_varying_rate_are_told_and_read_by_time(tmp_path: Path, suffix: str) -> None:
    even = write_clip(tmp_path / f"even.{suffix}", 40)
    # 29.97 as players round it to milliseconds is no other rate from frame to frame.
    rounded = write_clip(tmp_path / f"rounded.{suffix}", 40, stamps=[round(i * 1001 / 30) for i in range(40)])
    stamps = [round(1000 * i / 24) for i in range(24)] + [1000 + 125 * i for i in range(17)]
    uneven = write_clip(tmp_path / f"uneven.{suffix}", 41, stamps=stamps)
    assert [probe(clip).variable for clip in (even, rounded, uneven)] == [False, False, True]

    (record,) = complete([Record(uneven)], cache=tmp_path / "cache.json")
    assert record.variable
    assert record.num_frames is not None
    assert record.fps is not None
    numbers = list(range(0, record.num_frames, 5))
    frames = read_numbered(uneven, numbers, rate=record.fps)
    times = [1000 * number / record.fps + 0.5 for number in numbers]
    shown = [max(i for i, stamp in enumerate(stamps) if stamp <= time) for time in times]
    seen = [round(frame.float().mean().item()) - 10 for frame in frames]
    assert seen == pytest.approx(shown, abs=1)
    assert seen != pytest.approx(numbers, abs=1)
    # Numbers that a manifest gives are of the file's frames.
    told = [Record(uneven, cut=(3, 9)), Record(uneven, fps=24.0)]
    assert not any(one.variable for one in complete(told, cache=tmp_path / "cache.json"))
    (again,) = complete([Record(uneven)], cache=tmp_path / "cache.json")  # from what was remembered
    assert again == record


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        *(("mp4", codec) for codec in ("libx264", "libx265", "mpeg4", "mpeg2video")),
        *(("mov", "libx264"), ("ts", "libx264"), ("mkv", "libx264"), ("mpg", "mpeg2video")),
    ],
)
def test_parts_cut_without_encoding_have_the_frames_that_decode(
    tmp_path: Path, suffix: str, codec: str
) -> None:
    """Their containers claim more: frames that others were predicted from are missing at both ends."""
    options = {"g": "12", "bf": "0" if codec == "mpeg4" else "2"}
    if codec == "libx265":
        options = {"x265-params": "keyint=12:open-gop=1:bframes=3:log-level=none"}
    whole = write_clip(tmp_path / "whole.mp4", 70, codec=codec, size=64, options=options)
    for start, end in ((0, 1), (0.3, 1.27), (0.7, 1.3), (0.7, 1.35), (0.7, 1.4), (1.1, 2.9), (2.3, 2.35)):
        part = cut_out(whole, tmp_path / f"{start}-{end}.{suffix}", start=start, end=end)
        every, info = read_frames(part), probe(part)
        assert info.frames == len(every) == count_frames(part), part
        last = info.frames - 1
        assert torch.equal(read_numbered(part, [0, last]), every[[0, last]])
        # What selection takes windows from, at the file's rate or, with holes, at the rate it would have.
        (record,) = complete([Record(part)], cache=None)
        assert record.num_frames is not None
        assert record.fps == (24 if last else info.fps)
        rate = record.fps if record.variable else None
        assert len(read_numbered(part, range(record.num_frames), rate=rate)) == record.num_frames
        assert record.num_frames >= info.frames


@pytest.mark.parametrize(
    ("name", "start", "options"),
    [
        ("part.mp4", 0.5, {}),
        ("fragments.mp4", 0, {"movflags": "frag_keyframe+empty_moov"}),
        ("first_whole.mp4", 0, {"movflags": "frag_keyframe"}),
        ("stream.ts", 0, {}),
        ("program.mpg", 0, {}),
    ],
)
def test_a_varying_rate_is_seen_without_a_whole_index(
    tmp_path: Path, name: str, start: float, options: dict[str, str]
) -> None:
    codec, bframes = ("mpeg2video", "0") if name.endswith("mpg") else ("libx264", "2")
    whole = write_clip(tmp_path / "whole.mp4", 60, codec=codec, options={"g": "12", "bf": bframes})
    clip = cut_out(whole, tmp_path / name, start=start, end=9, still=1.5, **options)
    (record,) = complete([Record(clip)], cache=None)
    assert record.variable
    assert record.fps == pytest.approx(24, abs=0.02)
    assert record.num_frames == 84 - round(start * 24)
    frames = read_numbered(clip, range(record.num_frames), rate=record.fps)
    shown = [round(frame.float().mean().item()) - 10 for frame in frames]
    assert shown == pytest.approx([*range(round(start * 24), 36), *[35] * 24, *range(36, 60)], abs=1)


def test_a_late_start_is_no_cut_off_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    late = write_clip(tmp_path / "late.mkv", 24, stamps=[5000 + round(1000 * i / 24) for i in range(24)])
    assert count_frames(late) == probe(late).frames == 24
    assert not caplog.messages


def test_packets_are_counted_without_decoding(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mkv", 60, sound=5.0)
    with av.open(str(clip)) as container:
        places = [(packet.pos or 0, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(clip.read_bytes())
    # Sizes of H.264's units, behind the header of a Matroska block, become nonsense.
    for position, size in places[40:]:
        data[position + 6 : position + size] = b"\xff" * (size - 6)
    clip.write_bytes(data)
    assert probe(clip).frames == 60
    with pytest.raises(ValueError, match="is damaged or cut off"):
        count_frames(clip)


@pytest.mark.parametrize(
    ("name", "codec", "cover", "found"),
    [("sound.wav", "pcm_s16le", False, r"audio$"), ("song.mp3", "libmp3lame", True, "audio, cover$")],
)
def test_sound_is_no_video_even_with_a_cover(
    tmp_path: Path, name: str, codec: str, cover: bool, found: str
) -> None:
    with av.open(str(tmp_path / name), "w") as container:
        sound = container.add_stream(codec, rate=8000, layout="mono")
        assert isinstance(sound, av.AudioStream)
        packets = []
        if cover:
            image = container.add_stream("png", rate=25)
            assert isinstance(image, av.VideoStream)
            image.height, image.width, image.pix_fmt = 16, 16, "rgb24"
            image.disposition = Disposition.attached_pic
            blank = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))
            packets = image.encode(blank) + image.encode(None)
        container.mux(packets)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 576), np.int16), format="s16p", layout="mono")
        samples.sample_rate = 8000
        container.mux(sound.encode(samples) + sound.encode(None))
    with pytest.raises(ValueError, match=rf"{name} .* has no video; found: {found}"):
        probe(tmp_path / name)
