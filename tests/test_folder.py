"""Folders in the place of a manifest: lists in them, links, what is skipped, and formats that are read."""

import json
import logging
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from opensoraplan.data.manifest import read_manifest
from opensoraplan.data.video import VideoWriter, read_frames


def write_clip(path: Path) -> Path:
    """Twelve grey frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, fps=24) as writer:
        writer.write(torch.full((12, 24, 32, 3), 90, dtype=torch.uint8))
    return path


def test_a_folder_with_a_list_is_read_by_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_clip(tmp_path / "clips" / "a.mp4")
    (tmp_path / "list.json").write_text(json.dumps([{"path": "a.mp4", "cap": "of the list"}]))
    (tmp_path / "data.txt").write_text("\n clips,list.json\n")
    caplog.set_level(logging.INFO)
    assert [record.captions for record in read_manifest(tmp_path)] == [("of the list",)]
    assert f"{tmp_path}: using the clips listed in its data.txt" in caplog.text
    # A caption, or a note, is no list.
    write_clip(tmp_path / "data.mp4")
    (tmp_path / "data.txt").write_text("a clip, of data")
    caplog.clear()
    assert [record.captions for record in read_manifest(tmp_path)] == [(), ("a clip, of data",)]
    (tmp_path / "data.txt").unlink()
    assert [record.captions for record in read_manifest(tmp_path)] == [(), ()]
    assert "as in a.txt; if their captions are in list.json, name that instead" in caplog.text


def test_links_are_followed_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    clip = write_clip(elsewhere / "deep" / "a.mp4")
    clip.with_suffix(".txt").write_text("a clip")
    write_clip(folder / "b.mp4")
    (folder / "link").symlink_to(elsewhere, target_is_directory=True)
    (folder / "more").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "loop").symlink_to(folder, target_is_directory=True)
    (elsewhere / "self").symlink_to(elsewhere, target_is_directory=True)
    (folder / "c.mp4").symlink_to(clip)
    found = read_manifest(folder)
    assert [str(record.path.relative_to(folder)) for record in found] == ["b.mp4", "c.mp4", "link/deep/a.mp4"]
    assert [record.captions for record in found] == [(), (), ("a clip",)]
    assert not any(record.error for record in found)
    assert "skipped" not in caplog.text


def test_what_is_skipped_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_clip(tmp_path / "a.mp4")
    (tmp_path / "a.TXT").write_text("in capitals")
    for name in ("x.heic", "y.HEIC", "z.heic", "README.md", "alone.txt", "LICENSE", ".hidden"):
        (tmp_path / name).touch()
    assert read_manifest(tmp_path)[0].captions == ("in capitals",)
    assert f"{tmp_path}: 6 files are skipped: 3 .heic, " in caplog.text
    assert all(kind in caplog.text for kind in ("1 .md", "1 .txt", "1 without suffix"))
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(ValueError, match=r"has no clips \(\.mp4 .*\); it has 3 \.heic, 1 "):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        *((".gif", "gif"), (".wmv", "wmv2"), (".flv", "flv"), (".3gp", "mpeg4"), (".mts", "libx264")),
        *((".m2ts", "libx264"), (".ogv", "libvpx"), (".vob", "mpeg2video"), (".qt", "libx264")),
    ],
)
def test_videos_of_other_formats(tmp_path: Path, suffix: str, codec: str) -> None:
    formats = {".mts": "mpegts", ".m2ts": "mpegts", ".qt": "mov"}
    with av.open(str(tmp_path / f"a{suffix}"), "w", format=formats.get(suffix)) as container:
        stream = container.add_stream(codec, rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "rgb8" if codec == "gif" else "yuv420p"
        for level in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 10 * level, np.uint8))
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode(None))
    (record,) = read_manifest(tmp_path)
    assert not record.error
    assert (record.num_frames, record.fps, record.height, record.width) == (20, 25, 32, 48)
    assert len(read_frames(record.path)) == 20
