"""How well a model trained on moving shapes keeps to frames that it is given, and goes on from its own end.

    python examples/picture_following.py [FOLDER] --count 40 --sheet pictures.png

FOLDER is a diffusers folder of an OpenSoraPlanPipeline (default: the built-in model). Scenes are those that
training leaves out, with one thing. Tasks: "first" begins with the scene's first frame, "ends" also has its
last one, "prefix" goes on from 9 frames of it, "extend" from its own end, of a slow scene. For each task it
prints how often colour, shape, motion and background are right (by prompt_judge.py), how near the frames are
to the drawn ones and, of extended videos, how much changes over the seams.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from moving_shapes.captions import caption
from moving_shapes.drawing import render
from moving_shapes.scenes import Scene, scene_for
from PIL import Image
from prompt_judge import background_of, judge
from torch import Tensor
from tqdm import tqdm

from opensoraplan import builtin
from opensoraplan.data.video import VideoWriter
from opensoraplan.generate.session import Session
from opensoraplan.pipeline import OpenSoraPlanPipeline
from opensoraplan.requests import Request
from opensoraplan.shapes import RELEASE

HEIGHT, WIDTH, FRAMES, OVERLAP, FPS = 96, 128, 25, 9, 12
SHEET_CLIPS, SHEET_FRAMES = 6, 6
# Frames on each side of a seam that it is compared with.
NEIGHBOURS = 4


@dataclass(frozen=True)
class Made:
    """A video uint8 [T, H, W, 3], what it was given of the drawn one, and that one."""

    scene: Scene
    video: Tensor
    drawn: Tensor


def psnr(found: Tensor, wanted: Tensor) -> float:
    """In dB, of uint8 pixels."""
    return float(10 * (255**2 / (found.float() - wanted.float()).square().mean().clamp(min=1e-3)).log10())


def given_of(task: str, drawn: Tensor, folder: Path) -> dict[str, str]:
    """The fields of a request for what a task is given of a drawn clip, in files."""
    files = {"image": folder / "first.png", "last_image": folder / "last.png", "video": folder / "clip.mp4"}
    for name, place in (("image", 0), ("last_image", -1)):
        Image.fromarray(drawn[place].numpy()).save(files[name])
    files["video"].unlink(missing_ok=True)
    with VideoWriter(files["video"], fps=FPS, crf=1) as writer:
        writer.write(drawn[:OVERLAP])
    needed = {"first": ("image",), "ends": ("image", "last_image"), "prefix": ("video",), "extend": ()}
    return {name: str(files[name]) for name in needed[task]}


def make(session: Session, task: str, index: int, options: argparse.Namespace, folder: Path) -> Made:
    """The video of a task for scene number `index`."""
    scene = scene_for(index, seed=options.seed, held_out=True, objects=1, slow=task == "extend")
    drawn = render(scene, frames=FRAMES, height=HEIGHT, width=WIDTH)
    request = Request(
        prompt=caption(scene),
        frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        fps=FPS,
        steps=options.steps,
        solver=options.solver,
        guidance=options.guidance,
        seed=index,
        overlap=OVERLAP,
        extend=options.extend if task == "extend" else 0,
        **given_of(task, drawn, folder),
    )
    video = session.run(request).frames
    assert video is not None
    return Made(scene, video, drawn)


def shares(made: list[Made], *, part: Callable[[Tensor], Tensor] = lambda video: video) -> str:
    """How often each attribute is right."""
    right = {"colour": 0, "shape": 0, "motion": 0, "background": 0}
    for one in made:
        (verdict,) = judge(part(one.video))
        thing = one.scene.things[0]
        for name in ("colour", "shape", "motion"):
            right[name] += getattr(verdict, name) == getattr(thing, name)
        right["background"] += background_of(part(one.video)) == one.scene.background
    return ", ".join(f"{name} {count / len(made):.1%}" for name, count in right.items())


def seams(video: Tensor, *, extend: int) -> list[tuple[float, float, float]]:
    """For each seam the mean change of a pixel over it, the median of those of the frames around it, and the
    mean of those from one latent frame to the next before and after it, where videos of the VAE change most.
    """
    change = (video[1:].float() - video[:-1].float()).abs().mean((1, 2, 3))
    found = []
    for place in range(FRAMES - 1, FRAMES + extend - 1, FRAMES - OVERLAP):
        around = [*range(place - NEIGHBOURS, place), *range(place + 1, place + 1 + NEIGHBOURS)]
        steps = [p for p in (place - RELEASE.temporal, place + RELEASE.temporal) if p < len(change)]
        near = change[[p for p in around if p < len(change)]].median()
        found.append((float(change[place]), float(near), float(change[steps].mean())))
    return found


def report(task: str, made: list[Made], options: argparse.Namespace) -> None:
    print(f"{task}, {len(made)} scenes: {shares(made)}")
    if task == "extend":
        print(f"  the last {FRAMES} frames: {shares(made, part=lambda video: video[-FRAMES:])}")
        over = [seam for one in made for seam in seams(one.video, extend=options.extend)]
        seam, around, steps = (sum(column) for column in zip(*over, strict=True))
        print(
            f"  change over seams: {seam / around:.2f} of the median of the {2 * NEIGHBOURS} around them, "
            f"{seam / steps:.2f} of that between latent frames before and after"
        )
        return
    for name, place in (("first", 0), ("last", -1)):
        near = [psnr(one.video[place], one.drawn[place]) for one in made]
        met = sum(value > options.met for value in near) / len(near)
        mean = sum(near) / len(near)
        print(f"  the {name} frame: {mean:.1f} dB to the drawn one; {met:.0%} above {options.met:g} dB")


def sheet(made: list[Made]) -> Tensor:
    """Rows of frames of some videos, each under those of the drawn clip."""
    rows = []
    for one in made[:SHEET_CLIPS]:
        for video in (one.drawn, one.video):
            places = torch.linspace(0, len(video) - 1, SHEET_FRAMES).round().long()
            rows.append(torch.cat(list(video[places]), dim=1))
    return torch.cat(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help="default: the built-in model")
    parser.add_argument("--tasks", nargs="+", default=["first", "ends", "prefix", "extend"])
    parser.add_argument("--count", type=int, default=40, help="scenes of each task")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--solver", default="adams")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--extend", type=int, default=72, help="further frames of extended videos")
    parser.add_argument("--met", type=float, default=20.0, help="dB from which a frame is met")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--sheet", type=Path, help="a png of the first clips, for each task one")
    options = parser.parse_args()
    pipeline = OpenSoraPlanPipeline.from_pretrained(options.folder or builtin.folder(), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    session = Session(pipeline, str(options.folder))
    for task in options.tasks:
        with tempfile.TemporaryDirectory() as folder:
            scenes = tqdm(range(options.count), desc=task, unit="scene")
            made = [make(session, task, index, options, Path(folder)) for index in scenes]
        report(task, made, options)
        if options.sheet:
            path = options.sheet.with_stem(f"{options.sheet.stem}_{task}")
            Image.fromarray(sheet(made).numpy()).save(path)
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
