"""data/video.py on tiny clips that the tests write themselves: time stamps, colours, turns, damage, names."""

import logging
import math
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from opensoraplan.data.video import (
    VideoWriter,
    count_frames,
    fit,
    frame_rate,
    iter_frames,
    probe,
    read_frames,
    read_numbered,
    to_uint8,
)

STEP = 20


def grey_frames(count: int, *, height: int = 32, width: int = 48) -> list[np.ndarray]:
    """Flat frames whose level tells their number: `numbers` reads it back."""
    return [np.full((height, width, 3), 10 + STEP * i, np.uint8) for i in range(count)]


def numbers(frames: torch.Tensor) -> list[int]:
    """The numbers of `grey_frames`, which any codec keeps."""
    return [round((float(frame.float().mean()) - 10) / STEP) for frame in frames]


def picture(height: int, width: int) -> np.ndarray:
    """A picture that no turn or flip maps to itself."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x // width, 255 * y // height, 60 + 90 * (x > y)], axis=-1).astype(np.uint8)


def write_clip(
    path: Path,
    frames: Sequence[np.ndarray | av.VideoFrame],
    *,
    codec: str = "mpeg4",
    pix_fmt: str = "yuv420p",
    rate: Fraction = Fraction(25),
    stamps: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    options: dict[str, str] | None = None,
    **movflags: str,
) -> Path:
    """Encode frames with the time stamps given, or one after the other; `options` are the codec's."""
    with av.open(str(path), "w", options=movflags) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        assert isinstance(stream, av.VideoStream)
        first = frames[0]
        stream.height, stream.width = (
            first.shape[:2] if isinstance(first, np.ndarray) else (first.height, first.width)
        )
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = time_base or 1 / rate
        for index, content in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(content) if isinstance(content, np.ndarray) else content
            frame.pts = stamps[index] if stamps else index
            frame.time_base = time_base or 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cut(path: Path, *, share: float) -> Path:
    """Keep the first part of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


# --- Reading ------------------------------------------------------------------------------------------------


def test_frames_come_in_order_and_by_number(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", grey_frames(10))
    frames = read_frames(clip)
    assert frames.shape == (10, 32, 48, 3)
    assert frames.dtype == torch.uint8
    assert numbers(frames) == list(range(10))
    assert numbers(read_frames(clip, start=3, count=4)) == [3, 4, 5, 6]
    assert numbers(read_frames(clip, start=8)) == [8, 9]
    assert numbers(torch.stack(list(iter_frames(clip, count=1)))) == [0]
    assert count_frames(clip) == 10
    assert count_frames(clip, limit=4) == 4


def test_frames_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", grey_frames(5))
    with pytest.raises(ValueError, match=r"clip.mp4 has 5 frames, asked for frames 2 to 6"):
        read_frames(clip, start=2, count=5)
    with pytest.raises(ValueError, match=r"has 5 frames, asked for frame 5 on"):
        read_frames(clip, start=5)
    with pytest.raises(ValueError, match=r"has 10 frames at 50 a second, asked for frames 0 to 10"):
        read_frames(clip, count=11, fps=50)
    with pytest.raises(ValueError, match="start -1"):
        iter_frames(clip, start=-1)
    with pytest.raises(ValueError, match="count 0"):
        iter_frames(clip, count=0)


def test_variable_rate_and_late_start_are_resampled_by_time_stamps(tmp_path: Path) -> None:
    # Shown from 0, 40, 50, 200 and 300 ms on, after a start at 5 s.
    stamps = [5000, 5040, 5050, 5200, 5300]
    for name in ("clip.mkv", "clip.mp4"):
        clip = write_clip(
            tmp_path / name, grey_frames(5), rate=Fraction(20), stamps=stamps, time_base=Fraction(1, 1000)
        )
        assert numbers(read_frames(clip)) == [0, 1, 2, 3, 4]
        assert numbers(read_frames(clip, fps=20, count=7)) == [0, 2, 2, 2, 3, 3, 4]
        assert numbers(read_frames(clip, fps=20, start=3, count=3)) == [2, 3, 3]
        assert numbers(read_frames(clip, fps=10, count=4)) == [0, 2, 3, 4]
        assert numbers(read_frames(clip, fps=100, count=6)) == [0, 0, 0, 0, 1, 2]


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(24000, 1001), Fraction(25)])
def test_own_rate_keeps_every_frame_once(tmp_path: Path, suffix: str, rate: Fraction) -> None:
    # Matroska's time stamps are rounded to milliseconds, which must neither repeat nor skip frames.
    codec = "libx264" if suffix == "mkv" else "mpeg4"
    clip = write_clip(tmp_path / f"clip.{suffix}", grey_frames(12), codec=codec, rate=rate)
    assert numbers(read_frames(clip, fps=float(rate))) == list(range(12))
    assert numbers(read_frames(clip, fps=rate / 2)) == list(range(0, 12, 2))


def test_raw_stream_without_time_stamps(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.h264", grey_frames(9), codec="libx264", rate=Fraction(24000, 1001))
    assert numbers(read_frames(clip)) == list(range(9))
    info = probe(clip)
    assert (info.frames, info.codec) == (9, "h264")


def test_a_picture_is_a_video_of_one_frame(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    av.VideoFrame.from_ndarray(picture(31, 47)).save(path)
    assert torch.equal(read_frames(path), torch.from_numpy(picture(31, 47))[None])
    assert (probe(path).frames, count_frames(path, fps=8)) == (1, 1)


def test_odd_sizes_come_back_exactly(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mkv", [picture(81, 121)] * 2, codec="ffv1", pix_fmt="bgr0")
    assert torch.equal(read_frames(clip), torch.from_numpy(np.stack([picture(81, 121)] * 2)))
    assert read_frames(write_clip(tmp_path / "clip.mp4", [picture(81, 121)])).shape == (1, 81, 121, 3)


MATRICES = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}  # turns to the right
FLIPPED = {angle: (-a, b, -c, d) for angle, (a, b, c, d) in MATRICES.items()}  # then mirrored left to right


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("angle", MATRICES)
def test_display_matrix_turns_and_mirrors(tmp_path: Path, angle: int, mirrored: bool) -> None:
    clip = write_clip(tmp_path / "clip.mp4", [picture(32, 48)] * 2)
    stored = read_frames(clip)
    matrix = (FLIPPED if mirrored else MATRICES)[angle]
    set_display_matrix(clip, matrix)
    upright = torch.rot90(stored, k=-angle // 90, dims=(1, 2))
    upright = upright.flip(2) if mirrored else upright
    assert torch.equal(read_frames(clip), upright)
    assert (probe(clip).height, probe(clip).width) == upright.shape[1:3]


def test_slanted_display_is_refused(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", grey_frames(2))
    set_display_matrix(clip, (math.sqrt(0.5), math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(0.5)))
    with pytest.raises(ValueError, match="rotated by -45 degrees; only multiples of 90"):
        read_frames(clip)


def set_display_matrix(clip: Path, matrix: tuple[float, float, float, float]) -> None:
    """Write a, b, c, d of (x, y) -> (a x + c y, b x + d y) into the track header (ISO/IEC 14496-12)."""
    data = bytearray(clip.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (round(value * 65536) for value in matrix)
    struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    clip.write_bytes(data)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le"])
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize(
    ("matrix", "red", "blue"),
    [(1, 0.2126, 0.0722), (5, 0.299, 0.114), (9, 0.2627, 0.0593)],
    ids=["709", "601", "2020"],
)
def test_colours_are_right(
    tmp_path: Path, pix_fmt: str, full_range: bool, matrix: int, red: float, blue: float
) -> None:
    colours = [(200, 40, 90), (16, 235, 128), (255, 255, 255), (0, 0, 0), (30, 60, 250)]
    depth = 10 if pix_fmt.endswith("10le") else 8
    frames = [
        flat_yuv(colour, pix_fmt=pix_fmt, depth=depth, full_range=full_range, red=red, blue=blue)
        for colour in colours
    ]
    for frame in frames:
        frame.colorspace, frame.color_range = matrix, 2 if full_range else 1
    clip = tmp_path / "clip.mkv"
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = 16, 32, pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full_range else 1
        for frame in frames:
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    read = read_frames(clip)[:, 8, 16]
    assert (read.int() - torch.tensor(colours)).abs().max() <= (2 if depth == 8 else 1)


def flat_yuv(
    colour: tuple[int, int, int], *, pix_fmt: str, depth: int, full_range: bool, red: float, blue: float
) -> av.VideoFrame:
    """A frame of 16 x 32 in one colour, with the luma weights of red and blue (ITU-T H.273)."""
    r, g, b = (value / 255 for value in colour)
    luma = red * r + (1 - red - blue) * g + blue * b
    chroma = ((b - luma) / (2 * (1 - blue)), (r - luma) / (2 * (1 - red)))
    top = 2**depth - 1
    unit = 2 ** (depth - 8)
    levels = (
        [luma * top, *(c * top + 128 * unit for c in chroma)]
        if full_range
        else [(16 + 219 * luma) * unit, *((128 + 224 * c) * unit for c in chroma)]
    )
    frame = av.VideoFrame(32, 16, pix_fmt)
    for plane, level in zip(frame.planes, levels, strict=True):
        dtype = np.uint8 if depth == 8 else np.uint16
        values = np.full(plane.buffer_size // np.dtype(dtype).itemsize, min(round(level), top), dtype)
        plane.update(values.tobytes())
    return frame


def test_a_size_that_changes_is_an_error(tmp_path: Path) -> None:
    small = write_clip(tmp_path / "small.h264", grey_frames(3), codec="libx264")
    large = write_clip(tmp_path / "large.h264", grey_frames(3, height=64), codec="libx264")
    both = tmp_path / "both.h264"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    with pytest.raises(ValueError, match="changes its size from 32 x 48 to 64 x 48 at frame 3"):
        read_frames(both)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    missing = tmp_path / "missing.mp4"
    for read in (probe, read_frames, count_frames):
        with pytest.raises(FileNotFoundError, match=r"missing\.mp4"):
            read(missing)
    text = tmp_path / "text.mp4"
    text.write_text("no video at all")
    with pytest.raises(ValueError, match=r"text\.mp4 \(15 bytes\) is not a video"):
        probe(text)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    with pytest.raises(ValueError, match=r"empty\.mp4 \(0 bytes\) is not a video"):
        probe(empty)
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder"):
        probe(tmp_path)


def test_a_clip_cut_off_before_its_index(tmp_path: Path) -> None:
    clip = cut(write_clip(tmp_path / "clip.mp4", grey_frames(10)), share=0.6)
    with pytest.raises(ValueError, match=r"clip\.mp4 .* is cut off"):
        read_frames(clip)


def test_a_clip_cut_off_in_its_frames_gives_those_before(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 48, 3), dtype=np.uint8)
    clip = cut(
        write_clip(tmp_path / "clip.mp4", list(noise), codec="libx264", movflags="+faststart"), share=0.7
    )
    with pytest.raises(ValueError, match=r"clip\.mp4 is cut off: it has \d+ of at least \d+ bytes"):
        probe(clip)
    frames = iter_frames(clip)
    good = [next(frames) for _ in range(20)]
    with pytest.raises(ValueError, match=r"clip\.mp4 is damaged or cut off after \d+ frames") as caught:
        good.extend(frames)
    assert f"after {len(good)} frames" in str(caught.value)
    assert 20 < len(good) < 35
    assert torch.equal(read_frames(clip, count=len(good)), torch.stack(good))


def test_a_short_matroska_file_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 48, 3), dtype=np.uint8)
    clip = write_clip(tmp_path / "clip.mkv", list(noise))
    with caplog.at_level(logging.WARNING):
        assert count_frames(clip) == 40
        assert not caplog.messages
        assert 10 < count_frames(cut(clip, share=0.5)) < 30
    assert "of 1.60 s: is the file truncated?" in caplog.text


# --- Reading by number --------------------------------------------------------------------------------------

NUMBERS = ([0], [3, 3, 7], [0, 69], [34, 34, 36, 50], [47], [60, 61, 62], [68, 69])
# Milliseconds: a late start; uneven all along; even in most of the file, after a hole at its start.
EVEN = [1000 + 40 * i for i in range(70)]
UNEVEN = [40 * i + 7 * (i * i % 5) for i in range(70)]
HOLE = [40 * (i + 9 * (i > 4)) for i in range(70)]


def moving_frames(count: int, *, height: int = 32, width: int = 48) -> list[np.ndarray]:
    """Frames that all differ, and of which codecs predict each from others."""
    base = picture(height, width)
    return [np.roll(base, 3 * i, axis=1) // 2 + np.uint8(i) for i in range(count)]


def x264(**parameters: int) -> dict[str, str]:
    return {
        "x264-params": ":".join(f"{name.replace('_', '-')}={value}" for name, value in parameters.items())
    }


def check_numbered(clip: Path) -> None:
    """Frames by number are those that decoding everything gives."""
    every = read_frames(clip)
    assert len(every) == 70
    for wanted in NUMBERS:
        assert torch.equal(read_numbered(clip, wanted), every[wanted]), (clip, wanted)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("stamps", [EVEN, UNEVEN, HOLE], ids=["even", "uneven", "hole"])
def test_frames_by_number_at_any_times(tmp_path: Path, suffix: str, stamps: list[int]) -> None:
    check_numbered(
        write_clip(
            tmp_path / f"clip.{suffix}",
            moving_frames(70),
            codec="libx264",
            options=x264(keyint=12, min_keyint=12, bframes=3, open_gop=1),
            stamps=stamps,
            time_base=Fraction(1, 1000),
        )
    )


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "options"),
    [
        ("libx264", "yuv420p", x264(keyint=2, bframes=1)),
        ("libx264", "yuv420p", x264(keyint=12, intra_refresh=1)),
        ("libx264", "yuv420p10le", x264(keyint=12, bframes=2)),
        ("libx265", "yuv420p", {"x265-params": "keyint=12:open-gop=1:log-level=none"}),
        ("mpeg2video", "yuv420p", {"g": "12", "bf": "2"}),
        ("mpeg4", "yuv420p", {"g": "12", "bf": "2"}),
    ],
    ids=["short", "refresh", "10-bit", "hevc", "mpeg2", "mpeg4"],
)
def test_frames_by_number_of_any_codec(
    tmp_path: Path, codec: str, pix_fmt: str, options: dict[str, str]
) -> None:
    # x265 corrupts its memory at smaller sizes.
    frames = moving_frames(70, height=64, width=64)
    for name in ("clip.mp4", "clip.mkv"):
        check_numbered(write_clip(tmp_path / name, frames, codec=codec, pix_fmt=pix_fmt, options=options))


def test_numbered_frames_of_other_files(tmp_path: Path) -> None:
    frames = moving_frames(70, height=31, width=47)
    groups = x264(keyint=12, bframes=2)
    clips = [
        write_clip(tmp_path / "raw.h264", moving_frames(70), codec="libx264", options=groups),
        write_clip(tmp_path / "odd.mkv", frames, codec="ffv1", pix_fmt="bgr0"),
        write_clip(tmp_path / "hidden.webm", moving_frames(70), codec="libvpx", options={"g": "20"}),
        write_clip(tmp_path / "stream.ts", moving_frames(70), codec="libx264", options=groups),
        write_clip(
            tmp_path / "fragments.mp4",
            moving_frames(70),
            codec="libx264",
            options=groups,
            movflags="frag_keyframe+empty_moov",
        ),
        write_clip(tmp_path / "turned.mp4", moving_frames(70), codec="libx264", options=groups),
    ]
    set_display_matrix(clips[-1], MATRICES[90])
    assert read_numbered(clips[-1], [40]).shape == (1, 48, 32, 3)
    for clip in clips:
        check_numbered(clip)
    path = tmp_path / "picture.png"
    av.VideoFrame.from_ndarray(picture(31, 47)).save(path)
    assert torch.equal(read_numbered(path, [0, 0]), read_frames(path)[[0, 0]])


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_before_the_keyframe_are_not_decoded(tmp_path: Path, suffix: str) -> None:
    noise = list(np.random.default_rng(0).integers(0, 256, (70, 32, 48, 3), dtype=np.uint8))
    clip = write_clip(
        tmp_path / f"clip.{suffix}", noise, codec="libx264", options=x264(keyint=12, scenecut=0)
    )
    every = read_frames(clip)
    with av.open(str(clip)) as container:
        places = [(packet.pos or 0, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(clip.read_bytes())
    # Behind the header of a Matroska block. In mp4 also the size of H.264's units becomes nonsense.
    header = 0 if suffix == "mp4" else 20
    for position, size in places[14:20] + places[61:]:
        data[position + header : position + size] = b"\xff" * (size - header)
    clip.write_bytes(data)
    assert torch.equal(read_numbered(clip, [40, 45]), every[[40, 45]])
    if suffix == "mkv":
        assert not torch.equal(read_frames(clip, start=14, count=6), every[14:20])
        return
    with pytest.raises(ValueError, match="is damaged or cut off after"):
        read_numbered(clip, [40, 69])
    with pytest.raises(ValueError, match="is damaged or cut off after"):
        read_frames(clip, count=45)


def test_a_crop_is_cut_out_of_the_upright_picture(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", moving_frames(3))
    set_display_matrix(clip, MATRICES[90])
    assert torch.equal(read_numbered(clip, [1], crop=(5, 32, 10, 48)), read_frames(clip)[1:2, 10:48, 5:32])
    with pytest.raises(
        ValueError, match=r"clip\.mp4 is 48 x 32 \(height x width\), crop is \[5, 33, 10, 48\]"
    ):
        read_numbered(clip, [1], crop=(5, 33, 10, 48))


def test_numbers_that_cannot_be_read(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", moving_frames(40), codec="libx264")
    for wanted in ([30, 40], [39, 40], [40]):
        with pytest.raises(ValueError, match=r"clip\.mp4 has 40 frames, asked for frame 40"):
            read_numbered(clip, wanted)
    with pytest.raises(FileNotFoundError, match=r"missing\.mp4"):
        read_numbered(tmp_path / "missing.mp4", [0])
    with pytest.raises(ValueError, match=r"clip\.mp4 .* is cut off"):
        read_numbered(cut(clip, share=0.6), [0])


# --- Pixels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "rows", "columns"),
    [
        ((30, 80), (16, 32), slice(0, 30), slice(10, 70)),  # too wide
        ((90, 40), (16, 32), slice(35, 55), slice(0, 40)),  # too high
        ((20, 40), (32, 64), slice(0, 20), slice(0, 40)),  # enlarged
    ],
)
def test_fit_is_the_crop_and_resize_of_the_original(
    source: tuple[int, int], target: tuple[int, int], rows: slice, columns: slice
) -> None:
    frames = torch.randint(
        0, 256, (3, *source, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    fitted = fit(frames, height=target[0], width=target[1])
    pixels = frames.permute(0, 3, 1, 2)[:, :, rows, columns] / 255
    pixels = F.interpolate(pixels, target, mode="bicubic", antialias=True, align_corners=True)
    expected = (pixels.permute(1, 0, 2, 3) * 2 - 1).clamp(-1, 1)
    assert fitted.shape == (3, 3, *target)
    torch.testing.assert_close(fitted, expected, atol=1e-6, rtol=0)


def test_fit_keeps_pixels_of_the_right_size() -> None:
    frames = torch.from_numpy(np.stack([picture(16, 24), picture(16, 24)[::-1]]))
    assert torch.equal(to_uint8(fit(frames, height=16, width=24)), frames)


def test_fit_keeps_to_its_range() -> None:
    checks = torch.zeros(1, 20, 20, 3, dtype=torch.uint8)
    checks[:, :10] = 255
    fitted = fit(checks, height=48, width=48)
    assert (fitted.min(), fitted.max()) == (-1, 1)


@pytest.mark.parametrize("frames", [torch.zeros(2, 8, 8, 3), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)])
def test_fit_refuses(frames: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \[T, H, W, 3\], got"):
        fit(frames, height=8, width=8)


def test_to_uint8_rounds_and_clamps() -> None:
    levels = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.999, 1.0, 3.0])
    video = levels[None, :, None, None].expand(3, 7, 2, 4)
    frames = to_uint8(video)
    assert frames.shape == (7, 2, 4, 3)
    assert frames[:, 0, 0, 0].tolist() == [0, 0, 64, 128, 255, 255, 255]


# --- Writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fps", "exact"),
    [
        (24, Fraction(24)),
        (8.0, Fraction(8)),
        (12.5, Fraction(25, 2)),
        (14.9, Fraction(149, 10)),
        (23.976, Fraction(24000, 1001)),
        (23.98, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (119.88, Fraction(120000, 1001)),
        (Fraction(2997, 100), Fraction(2997, 100)),
    ],
)
def test_frame_rate(fps: float | Fraction, exact: Fraction) -> None:
    assert frame_rate(fps) == exact


@pytest.mark.parametrize("fps", [0, -1, 1e-6, 1001, math.inf, math.nan])
def test_frame_rate_refuses(fps: float) -> None:
    with pytest.raises(ValueError, match="fps must be in"):
        frame_rate(fps)


def write(path: Path, frames: torch.Tensor, *, fps: float | Fraction = 24) -> Path:
    with VideoWriter(path, fps=fps) as writer:
        writer.write(frames)
    return writer.path


def test_written_chunks_are_one_clip(tmp_path: Path) -> None:
    frames = torch.from_numpy(np.stack(grey_frames(11)))
    comment = '{"prompt": "ein Bär, 一只熊",\n"seed": 7, "filler": "' + "x" * 5000 + '"}'
    with VideoWriter(tmp_path / "clip.mp4", fps=23.976, title="Bär", comment=comment) as writer:
        for chunk in (frames[:1], frames[1:9], frames[9:9], frames[9:]):
            writer.write(chunk)
        assert not (tmp_path / "clip.mp4").exists()
    assert writer.path == tmp_path / "clip.mp4"
    assert os.listdir(tmp_path) == ["clip.mp4"]
    assert numbers(read_frames(writer.path)) == list(range(11))
    with av.open(str(writer.path)) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, codec.height, codec.width) == ("h264", "yuv420p", 32, 48)
        assert (stream.average_rate, stream.frames) == (Fraction(24000, 1001), 11)
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)
        assert (container.metadata["title"], container.metadata["comment"]) == ("Bär", comment)
        assert stream.time_base == Fraction(1, 24000)
        assert stream.duration == 11 * 1001
        assert [frame.pts for frame in container.decode(stream)] == [1001 * i for i in range(11)]
    data = writer.path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("fps", [8, 12.5, 29.97, Fraction(60000, 1001)])
def test_one_frame_is_a_clip(tmp_path: Path, fps: float | Fraction) -> None:
    path = write(tmp_path / "one.mp4", torch.full((1, 32, 48, 3), 130, dtype=torch.uint8), fps=fps)
    info = probe(path)
    assert (info.frames, info.fps, count_frames(path)) == (1, frame_rate(fps), 1)
    assert numbers(read_frames(path)) == [6]


def test_colours_survive_writing(tmp_path: Path) -> None:
    colours = torch.tensor([[200, 40, 90], [16, 235, 128], [255, 255, 255], [0, 0, 0], [30, 60, 250]])
    frames = colours.byte()[:, None, None].expand(5, 32, 48, 3)
    with VideoWriter(tmp_path / "clip.mp4", fps=24, crf=1) as writer:
        writer.write(frames)
    assert (read_frames(writer.path)[:, 16, 24].int() - colours).abs().max() <= 3


def test_a_name_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    frames = torch.from_numpy(np.stack(grey_frames(3)))
    (tmp_path / "clip_2.mp4").write_text("mine")
    paths = [write(tmp_path / "clip.mp4", frames[i : i + 1]) for i in range(3)]
    assert [path.name for path in paths] == ["clip.mp4", "clip_1.mp4", "clip_3.mp4"]
    assert [numbers(read_frames(path)) for path in paths] == [[0], [1], [2]]
    assert (tmp_path / "clip_2.mp4").read_text() == "mine"


def test_nothing_is_left_of_a_clip_that_failed(tmp_path: Path) -> None:
    frames = torch.from_numpy(np.stack(grey_frames(3)))

    def write_chunks(chunks: Iterable[torch.Tensor]) -> None:
        with VideoWriter(tmp_path / "clip.mp4", fps=24) as writer:
            for chunk in chunks:
                writer.write(chunk)

    def stopped() -> Iterator[torch.Tensor]:
        yield frames
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_chunks(stopped())
    with pytest.raises(ValueError, match="frames of 32 x 24 after 32 x 48"):
        write_chunks([frames, frames[:, :, :24]])
    with pytest.raises(ValueError, match="no frames were written"):
        write_chunks([])
    with pytest.raises(ValueError, match="no frames were written"):
        write_chunks([frames[:0]])
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="height x width 81 x 121: use 80 x 120 or 82 x 122"):
        write(tmp_path / "clip.mp4", torch.zeros(1, 81, 121, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"must be uint8 \[T, H, W, 3\]"):
        write(tmp_path / "clip.mp4", torch.zeros(1, 32, 48, 3))
    with pytest.raises(ValueError, match=r"crf must be in 1 \.\. 51, got 0"):
        VideoWriter(tmp_path / "clip.mp4", fps=24, crf=0)
    with pytest.raises(ValueError, match=r"clip\.avi: use .*clip\.mp4"):
        VideoWriter(tmp_path / "clip.avi", fps=24)
    with (
        pytest.raises(FileNotFoundError, match="missing"),
        VideoWriter(tmp_path / "missing" / "clip.mp4", fps=24),
    ):
        pass
    assert os.listdir(tmp_path) == []


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    path = write(tmp_path / "clip.mp4", torch.zeros(1, 32, 48, 3, dtype=torch.uint8))
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)
