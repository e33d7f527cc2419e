"""The files of jobs, a folder each: the request and its picture, latents until the video is written, the
video, pictures of it, and what the worker logged.
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from opensoraplan.disk import write_whole

Variant = Literal["video", "thumbnail", "spritesheet"]
# The picture that a video begins with, whatever its format and the client's name for it.
PICTURE = "picture"
_ID = re.compile(r"video_[0-9a-f]{32}")
# Frames in a contact sheet, and the longest side of a thumbnail in pixels.
_COLUMNS, _THUMBNAIL = 7, 320
# A folder without a job may be of one that is being sent now.
_ORPHAN_S = 3600


def is_id(text: str) -> bool:
    """Whether this is the id of a job, so that it may be part of a path."""
    return _ID.fullmatch(text) is not None


class Artefacts:
    """The folders of jobs in the data folder."""

    def __init__(self, data: Path) -> None:
        self.root = data.absolute() / "jobs"
        self.root.mkdir(parents=True, exist_ok=True)

    def folder(self, job_id: str) -> Path:
        assert is_id(job_id), job_id
        return self.root / job_id

    def create(self, job_id: str, request: Mapping[str, Any], picture: bytes | None = None) -> Path:
        """Make the folder of a new job, with its request, and the picture that its video begins with."""
        folder = self.folder(job_id)
        folder.mkdir()
        text = json.dumps(dict(request), ensure_ascii=False, indent=2) + "\n"
        write_whole(folder / "request.json", lambda file: file.write_text(text, encoding="utf-8"))
        if picture is not None:
            write_whole(self.picture(job_id), lambda file: file.write_bytes(picture))
        return folder

    def picture(self, job_id: str) -> Path:
        """Where the picture is that the video of a job begins with, if it has one."""
        return self.folder(job_id) / PICTURE

    def remove(self, job_id: str) -> None:
        """Remove the folder of a job, if it is there."""
        shutil.rmtree(self.folder(job_id), ignore_errors=True)

    def video(self, job_id: str, frames: int) -> Path:
        """Where the video of a job is, or will be: a png for one frame, else an mp4."""
        return self.folder(job_id) / ("video.png" if frames == 1 else "video.mp4")

    def file(self, job_id: str, frames: int, variant: Variant) -> Path:
        """The file that a client may have."""
        names = {"thumbnail": "thumbnail.webp", "spritesheet": "spritesheet.png"}
        return self.folder(job_id) / names[variant] if variant in names else self.video(job_id, frames)

    def draw_pictures(self, job_id: str, frames: int) -> None:
        """Make thumbnail and contact sheet of a video."""
        from PIL import Image

        from opensoraplan.data.sheet import contact_sheet
        from opensoraplan.data.video import read_numbered

        video = self.video(job_id, frames)
        small = Image.fromarray(read_numbered(video, [frames // 2])[0].numpy())
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
        write_whole(self.file(job_id, frames, "thumbnail"), lambda file: small.save(file, format="WEBP"))
        sheet = self.file(job_id, frames, "spritesheet")
        sheet.unlink(missing_ok=True)  # of an earlier try
        contact_sheet([video], sheet, columns=_COLUMNS)

    def remove_orphans(self, known: Callable[[list[str]], set[str]]) -> None:
        """Remove folders whose jobs are gone; `known` tells which of some ids are of jobs."""
        old = []
        for folder in self.root.iterdir():
            with suppress(OSError):
                if is_id(folder.name) and time.time() - folder.stat().st_mtime > _ORPHAN_S:
                    old.append(folder.name)
        for job_id in set(old) - known(old) if old else ():
            self.remove(job_id)
