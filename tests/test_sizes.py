"""data/sizes.py against sizes measured on the original, and that training scales and cuts its pixels so."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from opensoraplan.data.buckets import Draw
from opensoraplan.data.dataset import ClipDataset
from opensoraplan.data.record import Record
from opensoraplan.data.selection import Reason, Sample, SelectionSettings, select
from opensoraplan.data.sizes import Framing, frame_five_ratios, frame_freely
from opensoraplan.data.video import VideoWriter, read_frames, scale_and_cut

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sizes.json").read_text())
DRAW = Draw(index=0, epoch=0, step=0, slot=0)


def picture(height: int, width: int) -> Record:
    return Record(Path("a.jpg"), ("x",), num_frames=1, height=height, width=width)


@pytest.mark.parametrize("setting", range(len(GOLDEN)))
def test_every_size_of_the_original(setting: int) -> None:
    values = {key: value for key, value in GOLDEN[setting].items() if key != "sizes"}
    settings = SelectionSettings.read({**values, "force_resolution": False}, where="golden")
    rows = GOLDEN[setting]["sizes"]
    found = []
    for height, width, _ in rows:
        selection = select([picture(height, width)], settings, allow_empty=True)
        if not selection.kept:
            assert selection.dropped[0].reason is Reason.TOO_SMALL
            found.append([height, width, None])
            continue
        framing = selection.kept[0].framing
        assert framing is not None
        assert selection.kept[0].shape == (1, framing.height, framing.width)
        found.append([height, width, {"resized": [*framing.resized], "crop": [*framing[1:]]}])
    assert len(rows) == 48
    assert found == rows


def test_the_unit_of_the_ratios_is_not_the_stride() -> None:
    """3:4 by 16 is 240 x 320, which is cut to 224 x 320; by 32 it would be 192 x 256."""
    framing = frame_five_ratios(480, 640, largest_area=80_000, stride=32)
    assert framing == Framing((240, 320), top=8, left=0, height=224, width=320)


def test_less_than_one_unit_of_a_ratio() -> None:
    assert frame_five_ratios(90, 160, largest_area=14_400, stride=16).height == 80
    assert frame_five_ratios(1, 1, largest_area=14_400, stride=16) == Framing((1, 1), 0, 0, 0, 0)


@pytest.mark.parametrize(("height", "width"), [(1080, 1080), (1000, 1010), (719, 1283), (50, 70)])
@pytest.mark.parametrize("stride", [16, 48])
def test_a_part_is_inside_of_what_is_scaled(height: int, width: int, stride: int) -> None:
    for frame in (frame_freely, frame_five_ratios):
        framing = frame(height, width, largest_area=256 * 256, stride=stride)
        assert framing.height % stride == framing.width % stride == 0
        assert framing.top + framing.height <= framing.resized[0] <= height
        assert framing.left + framing.width <= framing.resized[1] <= width


def test_scaled_whole_and_then_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 50, 70, 3), dtype=torch.uint8, generator=generator)
    scaled = scale_and_cut(frames, Framing((40, 56), top=4, left=12, height=32, width=32))
    pixels = F.interpolate(
        frames.permute(0, 3, 1, 2) / 255, (40, 56), mode="bicubic", antialias=True, align_corners=True
    )
    expected = pixels[:, :, 4:36, 12:44].permute(1, 0, 2, 3) * 2 - 1
    torch.testing.assert_close(scaled, expected.clamp(-1, 1), atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two frames of 90 x 160 that grow brighter from top to bottom and from left to right."""
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    slope = torch.arange(90)[:, None] + torch.arange(160)
    with VideoWriter(path, fps=24, crf=1) as writer:
        writer.write(slope[None, :, :, None].expand(9, 90, 160, 3).to(torch.uint8))
    return path


@pytest.mark.parametrize(
    ("changes", "framing"),
    [
        ({"max_hxw": 80 * 96}, Framing((65, 116), 0, 2, 64, 112)),
        ({"max_hxw": 80 * 96, "hw_stride": 32}, Framing((65, 116), 0, 10, 64, 96)),
        ({"max_hxw": 160 * 160}, Framing((90, 160), 5, 0, 80, 160)),
        ({"max_hxw": 64 * 64, "force_5_ratio": True}, Framing((48, 85), 7, 2, 32, 80)),
        ({"max_hxw": 80 * 96, "force_5_ratio": True}, Framing((65, 116), 0, 1, 64, 112)),
    ],
)
def test_training_reads_the_pixels_so(clip: Path, changes: dict[str, object], framing: Framing) -> None:
    settings = SelectionSettings(
        num_frames=9, min_num_frames=9, force_resolution=False, max_h_div_w_ratio=2.0, **changes
    )
    record = Record(clip, ("a slope",), num_frames=9, fps=24.0, height=90, width=160)
    (sample,) = select([record], settings).kept
    assert sample.framing == framing
    video = ClipDataset([sample], seed=0)[DRAW].video
    assert video.shape == (3, *sample.shape)
    assert torch.equal(video, scale_and_cut(read_frames(clip), framing))
    # The field of view: what is cut off at the left is what the scaled frame has beside its centre.
    left = (framing.left + 0.5) * 160 / framing.resized[1]
    top = (framing.top + 0.5) * 90 / framing.resized[0]
    assert abs((video[0, 0, 0, 0] + 1) * 127.5 - (left + top - 1)) < 4


def test_a_clip_of_another_size_than_the_manifest_says(clip: Path) -> None:
    """Where only the scale differs the plan still holds; another aspect is a bad file."""
    settings = SelectionSettings(
        num_frames=9, min_num_frames=9, force_resolution=False, max_hxw=80 * 96, max_h_div_w_ratio=2.0
    )

    def read(height: int, width: int) -> torch.Tensor:
        record = Record(clip, ("a slope",), num_frames=9, fps=24.0, height=height, width=width)
        samples: list[Sample] = [*select([record], settings).kept]
        return ClipDataset(samples, seed=0, replace=False)[DRAW].video

    assert torch.equal(read(1080, 1920), read(90, 160))
    with pytest.raises(ValueError, match=r"is 90 x 160 \(height x width\), the manifest says 120 x 160"):
        read(120, 160)
