"""Pictures: every EXIF orientation, transparency, palettes, CMYK, 16 bits, animations; and side data of
videos that PyAV does not know.
"""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from opensoraplan.data.manifest import read_manifest
from opensoraplan.data.pictures import PICTURE_SUFFIXES
from opensoraplan.data.video import count_frames, probe, read_frames, read_numbered

ORIENTATION = 0x0112
# How a picture of each EXIF orientation is made from the upright one.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


def picture(height: int = 48, width: int = 80) -> np.ndarray:
    """A smooth picture that no turn or flip maps to itself."""
    y, x = np.mgrid[:height, :width]
    return np.stack([200 * x // width, 200 * y // height, 20 + x // 2 + y], axis=-1).astype(np.uint8)


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def differs(frames: torch.Tensor, expected: np.ndarray) -> float:
    """The largest difference of a file's one frame [1, H, W, 3] from what it should show."""
    assert frames.shape == (1, *expected.shape)
    return float((frames[0].int() - torch.from_numpy(expected.copy()).int()).abs().max())


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".avif"])
def test_pictures_are_turned_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright, path = picture(), tmp_path / f"photo{suffix}"
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    stored.save(path, exif=exif_of(orientation), quality=100)
    limit = {".png": 0, ".tif": 0}.get(suffix, 12)
    assert differs(read_frames(path), upright) <= limit
    crop = (8, 40, 4, 36)
    assert differs(read_numbered(path, [0], crop=crop), upright[4:36, 8:40]) <= limit
    info = probe(path)
    assert (info.frames, info.height, info.width, info.variable) == (1, 48, 80, False)
    assert count_frames(path, fps=8) == 1


def test_a_picture_with_broken_exif_is_as_stored(tmp_path: Path) -> None:
    for name, exif in (
        ("a.jpg", b"Exif\0\0nonsense"),
        ("b.png", b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        ("c.jpg", b""),
    ):
        Image.fromarray(picture()).save(tmp_path / name, exif=exif, quality=100)
        assert differs(read_frames(tmp_path / name), picture()) <= 12


def test_transparency_is_shown_over_white(tmp_path: Path) -> None:
    alpha = np.zeros((48, 80), np.uint8)
    alpha[:, 40:], alpha[:, 60:] = 51, 255
    share = alpha[..., None] / 255
    expected = np.round(picture() * share + 255 * (1 - share)).astype(np.uint8)
    Image.fromarray(np.dstack([picture(), alpha])).save(tmp_path / "rgba.png")
    assert differs(read_frames(tmp_path / "rgba.png"), expected) <= 1
    Image.fromarray(np.dstack([picture(), alpha])).save(tmp_path / "rgba.webp", lossless=True, exact=True)
    assert differs(read_frames(tmp_path / "rgba.webp"), expected) <= 1
    grey = picture()[..., 0]
    Image.fromarray(np.dstack([grey, alpha])).save(tmp_path / "la.png")
    expected = np.round(grey[..., None] * share + 255 * (1 - share)).astype(np.uint8).repeat(3, axis=2)
    assert differs(read_frames(tmp_path / "la.png"), expected) <= 1
    # One colour of a palette, or of RGB, is transparent.
    few = np.zeros((8, 8), np.uint8)
    few[:, 4:] = 1
    palette = Image.frombytes("P", (8, 8), few.tobytes())
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.save(tmp_path / "p.png", transparency=0)
    expected = np.full((8, 8, 3), 255, np.uint8)
    expected[:, 4:] = (200, 100, 50)
    assert differs(read_frames(tmp_path / "p.png"), expected) == 0
    palette.convert("RGB").save(tmp_path / "rgb.png", transparency=(10, 20, 30))
    assert differs(read_frames(tmp_path / "rgb.png"), expected) == 0
    palette.save(tmp_path / "opaque.png")
    expected[:, :4] = (10, 20, 30)
    assert differs(read_frames(tmp_path / "opaque.png"), expected) == 0


def test_other_kinds_of_pixels(tmp_path: Path) -> None:
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert differs(read_frames(tmp_path / "cmyk.jpg"), picture()) <= 12
    Image.fromarray(picture()).convert("1").save(tmp_path / "one.png")
    assert set(read_frames(tmp_path / "one.png").unique().tolist()) == {0, 255}
    deep = (np.arange(48 * 80, dtype=np.uint32).reshape(48, 80) * 17).astype(np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        expected = np.round(deep / 257).astype(np.uint8)[..., None].repeat(3, axis=2)
        assert differs(read_frames(tmp_path / name), expected) == 0
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif cannot be read as a picture: its pixels have 32 bits"):
        read_frames(tmp_path / "float.tif")
    # 16 bits in colour: three samples of two bytes, which FFmpeg reads if Pillow does not.
    frame = av.VideoFrame.from_ndarray(picture().astype(np.uint16) * 257, format="rgb48le")
    with av.open(str(tmp_path / "colour.png"), "w", format="image2") as container:
        stream = container.add_stream("png", rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = 48, 80, "rgb48be"
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert differs(read_frames(tmp_path / "colour.png"), picture()) <= 1


@pytest.mark.parametrize("suffix", [".webp", ".avif"])
def test_an_animation_is_a_video(tmp_path: Path, suffix: str) -> None:
    pictures = [Image.fromarray(np.full((32, 48, 3), 10 + 20 * i, np.uint8)) for i in range(10)]
    durations = [100] * 4 + [1000] + [100] * 5
    animation, still = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    pictures[0].save(animation, save_all=True, append_images=pictures[1:], duration=durations, quality=100)
    pictures[0].save(still)
    shown = [round((float(frame.float().mean()) - 10) / 20) for frame in read_frames(animation, fps=10)]
    assert shown == [0, 1, 2, 3, *[4] * 10, 5, 6, 7, 8, 9]
    assert len(read_frames(animation)) == 10
    moving, one = read_manifest(tmp_path)
    assert (moving.num_frames, moving.fps, moving.variable, moving.is_image) == (19, 10, True, False)
    assert (one.num_frames, one.fps, one.variable, one.is_image) == (1, None, False, True)
    info = probe(animation)
    assert (info.frames, info.resampled, info.fps, info.codec) == (10, 19, Fraction(10), suffix[1:])


def test_pages_are_no_frames(tmp_path: Path) -> None:
    pages = [Image.fromarray(picture() // (1 + i)) for i in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    assert differs(read_frames(tmp_path / "pages.tif"), picture()) == 0
    assert probe(tmp_path / "pages.tif").frames == 1


@pytest.mark.parametrize("suffix", [suffix for suffix in PICTURE_SUFFIXES if suffix != ".bmp"])
def test_a_damaged_picture_is_one_sentence(tmp_path: Path, suffix: str) -> None:
    path, noise = (
        tmp_path / f"a{suffix}",
        np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8),
    )
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for read in (probe, read_frames):
        with pytest.raises(ValueError, match=rf"a\{suffix} .*(cannot be read as a picture|cut off)"):
            read(path)
    path.write_text("no picture")
    with pytest.raises(ValueError, match=rf"a\{suffix}"):
        probe(path)
    (record,) = read_manifest(tmp_path)
    assert record.error
    assert "\n" not in record.error


@pytest.mark.parametrize(("orientation", "size"), [(1, (48, 80)), (6, (80, 48))])
@pytest.mark.parametrize("suffix", [".mov", ".avi", ".mkv"])
def test_side_data_that_pyav_does_not_know(
    tmp_path: Path, suffix: str, orientation: int, size: tuple[int, int]
) -> None:
    """Such as EXIF data in the frames of a camera's motion JPEG."""
    photo = io.BytesIO()
    Image.fromarray(picture()).save(photo, "JPEG", exif=exif_of(orientation), quality=95)
    path = tmp_path / f"clip{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=24)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = 48, 80, "yuvj420p"
        for number in range(3):
            packet = av.Packet(photo.getvalue())
            packet.pts = packet.dts = number
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 24), stream, True
            container.mux(packet)
    frames, info = read_frames(path), probe(path)
    assert frames.shape == (3, *size, 3)
    assert (info.frames, info.height, info.width) == (3, *size)
    upright = np.rot90(picture(), -1) if orientation == 6 else picture()
    assert (frames.float().mean(dim=0) - torch.from_numpy(upright.copy())).abs().mean() < 6
