"""Writes scenes of moving shapes as mp4 files with a manifest: data for the small built-in model."""

import json
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

from moving_shapes.captions import caption
from moving_shapes.drawing import check_size, render
from moving_shapes.scenes import Scene, scene_for, scene_of
from tqdm import tqdm

from opensoraplan.claims import claim, share_out
from opensoraplan.data.video import VideoWriter, frame_rate
from opensoraplan.disk import clear_dead, make_folder, write_whole
from opensoraplan.settings import Settings

# Raise it when the same scene comes out with other pixels or captions: old data sets are then not continued.
VERSION = 4
_SETTINGS = "settings.json"
_MOST_CLIPS = 10**6
# Full captions of a clip; a short one comes on top.
CAPTIONS = 4
_CRF = 12


class _ClipSettings(Settings):
    """What the clips in a folder were made with: its settings.json."""

    version: int
    seed: int
    held_out: bool | None
    objects: int | None
    only: str | None = None
    slow: bool = False
    frames: int
    height: int
    width: int
    fps: str
    crf: int


def write_dataset(
    folder: str | Path,
    *,
    count: int,
    seed: int = 0,
    held_out: bool | None = False,
    size: tuple[int, int, int] = (25, 96, 128),
    fps: int = 12,
    only: str | None = None,
    slow: bool = False,
) -> Path:
    """Write scenes 0 .. count - 1 of `scene_for` as mp4 files of `size` (frames, height, width) with
    the original's manifest.

    `only`: scenes of `scene_of` with that thing instead; `slow`: slow scenes. Makes
    `folder/clips/000000.mp4`, ..., `folder/annotation.json` (path, cap, num_frames, fps, resolution; `cap`
    lists four full wordings and a short one) and `folder/data.txt` (line `.,annotation.json`, so that the
    folder may be moved), and returns the path of the last. Clips that are there already are kept, so that a
    broken-off call can be repeated and a data set be extended with a larger `count`. Several processes that
    make the same data set share its clips.

    Raises ValueError for a folder that holds clips of other settings, or files of these names that were not
    made here, and for numbers that cannot be. Nothing is written then.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if count > _MOST_CLIPS:
        raise ValueError(f"count must be at most {_MOST_CLIPS:,}, got {count:,}")
    frames, height, width = size
    check_size(frames=frames, height=height, width=width)
    root = Path(folder).resolve()
    clips = root / "clips"
    settings = _ClipSettings(
        version=VERSION,
        seed=seed,
        held_out=held_out,
        objects=None,
        only=only,
        slow=slow,
        frames=frames,
        height=height,
        width=width,
        fps=str(frame_rate(fps)),
        crf=_CRF,
    )
    _scene(0, settings)  # raises for a thing that nobody knows
    _check_folder(root, settings)
    with make_folder(root):
        text = settings.model_dump_json(indent=1)
        # Before the clips: another process that sees these has to see whose they are.
        write_whole(root / _SETTINGS, lambda file: file.write_text(text))
        with make_folder(clips):
            return _write_clips(root, settings, count)


def _write_clips(root: Path, settings: _ClipSettings, count: int) -> Path:
    """The clips of `write_dataset` that are not there yet, and the manifest of all."""
    frames, height, width = settings.frames, settings.height, settings.width
    rate = Fraction(settings.fps)
    scenes = [_scene(index, settings) for index in range(count)]
    clear_dead(root / "clips")
    with tqdm(total=count, desc="clips", unit="clip") as progress:

        def make(index: int) -> bool:
            path = root / "clips" / f"{index:06d}.mp4"
            if not path.exists():
                own = claim(path)
                if own is None:
                    return False
                with own:
                    if not path.exists():  # until just now
                        with VideoWriter(path, fps=rate, crf=settings.crf) as writer:
                            writer.write(render(scenes[index], frames=frames, height=height, width=width))
            progress.update()
            return True

        share_out(range(count), make, what="clips")
    records = []
    for index, scene in enumerate(scenes):
        texts = [caption(scene, variant=variant) for variant in range(CAPTIONS)]
        records.append(
            {
                "path": f"clips/{index:06d}.mp4",
                "cap": [*texts, caption(scene, variant=index + 1, short=True)],
                "num_frames": frames,
                "fps": rate.numerator if rate.denominator == 1 else float(rate),
                "resolution": {"height": height, "width": width},
                "scene": asdict(scene),
            }
        )
    annotation = json.dumps(records, indent=1)
    write_whole(root / "annotation.json", lambda file: file.write_text(annotation))
    write_whole(root / "data.txt", lambda file: file.write_text(".,annotation.json\n"))
    return root / "data.txt"


def _scene(index: int, settings: _ClipSettings) -> Scene:
    if settings.only is not None:
        return scene_of(settings.only, index, seed=settings.seed)
    return scene_for(index, seed=settings.seed, held_out=settings.held_out, slow=settings.slow)


def _check_folder(root: Path, settings: _ClipSettings) -> None:
    """Raise ValueError unless a folder has clips of these settings, or nothing that would be replaced."""
    path = root / _SETTINGS
    if not path.exists():
        names = [name for name in ("clips", "annotation.json", "data.txt") if (root / name).exists()]
        if names:
            raise ValueError(
                f"{root} has {', '.join(names)}, which render_clips.py has not made: use another folder"
            )
        return
    try:
        before = _ClipSettings.read_file(path)
    except ValueError as error:
        raise ValueError(f"{error}; render_clips.py has not made what is there: use another folder") from None
    changed = [
        f"{key} {getattr(before, key)} (now {value})"
        for key, value in settings.model_dump().items()
        if getattr(before, key) != value
    ]
    if changed:
        raise ValueError(
            f"{root} holds clips made with other settings: {', '.join(changed)}; use another folder"
        )
