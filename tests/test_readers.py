"""decord and torchcodec in the place of PyAV: absent, broken, installed, and files that they cannot read."""

import logging
import re
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from opensoraplan.data import reading
from opensoraplan.data.video import Reader, VideoWriter, installed_reader, read_frames, read_numbered

OTHERS = [reader for reader in get_args(Reader) if reader != "pyav"]
# decord has wheels for Linux on x86 only, torchcodec none that load without FFmpeg.
INSTALLED = [reader for reader in OTHERS if installed_reader(reader) == reader]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Twenty frames of slopes that move."""
    y, x = np.mgrid[:48, :128]
    frames = [np.stack([2 * ((x + t) % 128), 5 * y, x + y], axis=-1).astype(np.uint8) for t in range(20)]
    with VideoWriter(tmp_path / "clip.mp4", fps=12) as writer:
        writer.write(torch.from_numpy(np.stack(frames)))
    return writer.path


@pytest.mark.parametrize("reader", OTHERS)
@pytest.mark.parametrize("state", ["absent", "broken"])
def test_a_reader_that_cannot_be_had_is_named_once(
    clip: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, reader: Reader, state: str
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == reader]:
        monkeypatch.delitem(sys.modules, module)
    if state == "absent":
        monkeypatch.setitem(sys.modules, reader, None)
        problem = "is not installed"
    else:  # as torchcodec is where FFmpeg's libraries are not
        (clip.parent / f"{reader}.py").write_text('raise OSError("no libavutil.so\\nand more")')
        monkeypatch.syspath_prepend(clip.parent)
        problem = "cannot be loaded (no libavutil.so)"
    reading._is_installed.cache_clear()  # of other tests in this process
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(read_numbered(clip, [0, 2], reader=reader), read_frames(clip)[[0, 2]])
    reading._is_installed.cache_clear()
    assert caplog.messages == [f"reader {reader} {problem}: videos are read with PyAV"]


@pytest.mark.parametrize("reader", INSTALLED)
def test_the_same_frames_in_nearly_the_same_colours(
    clip: Path, caplog: pytest.LogCaptureFixture, reader: Reader
) -> None:
    frames = read_frames(clip)
    caplog.set_level(logging.INFO)
    found = read_numbered(clip, [0, 7, 7, 19], crop=(5, 120, 10, 40), reader=reader)
    assert (found.float() - frames[[0, 7, 7, 19], 10:40, 5:120].float()).abs().mean() < 2
    with pytest.raises(ValueError, match=r"clip\.mp4 has 20 frames, asked for frame 20"):
        read_numbered(clip, [20], reader=reader)
    with pytest.raises(ValueError, match=r"clip\.mp4 is 48 x 128 \(height x width\), crop is"):
        read_numbered(clip, [0], crop=(5, 129, 10, 40), reader=reader)
    assert not caplog.messages


@pytest.mark.parametrize("reader", INSTALLED)
def test_a_file_that_it_cannot_read_is_left_to_pyav(
    clip: Path, caplog: pytest.LogCaptureFixture, reader: Reader
) -> None:
    clip.write_bytes(clip.read_bytes()[:300])
    caplog.set_level(logging.DEBUG, logger=reading.logger.name)
    reading._warn_of_fallback.cache_clear()  # of other tests in this process
    for _ in range(2):
        with pytest.raises(ValueError, match=r"clip\.mp4"):
            read_numbered(clip, [0], reader=reader)
    named = re.compile(rf".*clip\.mp4 cannot be read by {reader} \(.+\): it is read with PyAV")
    assert len([message for message in caplog.messages if named.match(message)]) == 2
    assert (
        caplog.messages.count(f"not all videos can be read by {reader}: the others are read with PyAV") == 1
    )
