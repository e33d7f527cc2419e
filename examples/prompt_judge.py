"""Tells from the frames alone what a clip of moving shapes shows: colour, shape, motion.

    python examples/prompt_judge.py --clips 200

Classical vision (chroma segmentation, polar template matching, tracks), no network, nothing learnt. The
command renders held-out scenes, writes them as mp4, reads them back, and prints how often the judge is right.
"""

import argparse
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from moving_shapes.drawing import empty, render, signed_distance
from moving_shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    NEW_COLOURS,
    NEW_SHAPES,
    ROUND,
    SHAPES,
    Scene,
    scene_for,
)
from torch import Tensor

from opensoraplan.data.video import VideoWriter, read_frames

ATTRIBUTES = ("colour", "shape", "motion")
# Polar grid of the templates: radii up to REACH times that of a disc of equal area, and angles.
RADII, ANGLES, REACH = 24, 120, 1.9
# Degrees between hues of colours that only their brightness tells apart.
SAME_HUE = 10.0
# Turning is known only up to these angles, by which the shape comes out the same.
SYMMETRY = {"square": 90.0, "triangle": 120.0, "star": 72.0, "cross": 90.0}
# A clip moves in that one way which exceeds its share the most; below all of them it stands still. The
# renderer's least: 0.11 of the shorter side, a factor of 1.94 in width, 90 degrees.
LEAST_WAY, LEAST_GROWTH, LEAST_TURN = 0.05, math.log(1.4), 40.0
# Least area of a thing in parts of the frame.
LEAST_AREA = 0.003


@dataclass(frozen=True)
class Verdict:
    """What one thing is and does; an attribute is "none" if nothing was found.

    `way` is the path (right, down) in parts of the shorter side, `growth` the factor in width, `turn` degrees
    clockwise, each over the whole clip. `others`: area of all other coloured things, in parts of this one's.
    """

    colour: str
    shape: str
    motion: str
    way: tuple[float, float] = (0.0, 0.0)
    growth: float = 1.0
    turn: float = 0.0
    others: float = 0.0


NOTHING = Verdict(colour="none", shape="none", motion="none")


@dataclass(frozen=True)
class Looks:
    """The colours (sRGB) and shapes that things may have, and the least distance of these colours from any
    background, in the chroma plane (0 .. about 0.6).
    """

    colours: Mapping[str, tuple[float, float, float]] = field(default_factory=lambda: COLOURS)
    shapes: tuple[str, ...] = tuple(SHAPES)
    least_chroma: float = 0.10


KNOWN = Looks()
# Brown things may lie on a brown table.
KNOWN_AND_NEW = Looks(COLOURS | NEW_COLOURS, (*SHAPES, *NEW_SHAPES), least_chroma=0.06)


def judge(frames: Tensor, *, objects: int = 1, looks: Looks = KNOWN) -> list[Verdict]:
    """Judge uint8 frames [T, H, W, 3] with T >= 5: one verdict for the frame, or two, left half and right.

    Raises ValueError for frames or a number of objects that cannot be.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8 or len(frames) < 5:
        raise ValueError(
            f"frames must be uint8 [T, H, W, 3] with T >= 5, got {frames.dtype} {list(frames.shape)}"
        )
    if objects not in (1, 2):
        raise ValueError(f"objects must be 1 or 2, got {objects}")
    pixels = frames.float() / 255
    soft = _saliency(pixels)
    if objects == 1:
        return [_judge_part(pixels, soft, looks)]
    middle = pixels.shape[2] // 2
    return [
        _judge_part(pixels[:, :, part], soft[:, :, part], looks)
        for part in (slice(middle), slice(middle, None))
    ]


def background_of(frames: Tensor) -> str:
    """The background of frames [T, H, W, 3]: the one that their borders are nearest to."""
    height, width = frames.shape[1:3]
    edge = max(2, height // 12)
    border = torch.ones(height, width, dtype=torch.bool)
    border[edge:-edge, edge:-edge] = False
    seen = frames.float().median(dim=0).values[border] / 255
    return min(BACKGROUNDS, key=lambda name: float((empty(name, height, width)[border] - seen).abs().mean()))


def right(scene: Scene, verdicts: list[Verdict]) -> dict[str, bool]:
    """Which attributes were judged as the scene has them, of all its things at once; "all": every one."""
    result = {
        name: all(
            getattr(thing, name) == getattr(verdict, name)
            for thing, verdict in zip(scene.things, verdicts, strict=True)
        )
        for name in ATTRIBUTES
    }
    return result | {"all": all(result.values())}


def _saliency(pixels: Tensor) -> Tensor:
    """Distance in chroma from the background, each row's colour at the border, [T, H, W]."""
    red, green, blue = pixels.unbind(-1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = torch.stack([(blue - luma) * 0.564, (red - luma) * 0.713])  # [2, T, H, W], Cb and Cr
    edge = max(2, pixels.shape[2] // 24)
    border = torch.cat([chroma[..., :edge], chroma[..., -edge:]], dim=-1)
    background = border.transpose(1, 2).flatten(2).median(dim=2).values  # [2, H]
    return (chroma - background[:, None, :, None]).norm(dim=0)


def _largest(mask: Tensor) -> Tensor:
    """The largest connected part of each mask, bool [T, H, W]."""
    across = _runs(mask)
    down = _runs(mask.transpose(1, 2)).transpose(1, 2)
    labels = torch.arange(mask.numel()).view_as(mask) * mask
    while True:
        # Every pixel gets the highest label in its run along the row, then along the column.
        grown = _highest(_highest(labels, across), down) * mask
        if torch.equal(grown, labels):
            break
        labels = grown
    sizes = torch.zeros(mask.numel()).scatter_add_(0, labels.flatten(), mask.flatten().float())
    area = sizes[labels] * mask  # [T, H, W], of the part that a pixel belongs to
    best = area.flatten(1).argmax(dim=1)
    return mask & (labels == labels.flatten(1).gather(1, best[:, None])[:, :, None])


def _runs(mask: Tensor) -> Tensor:
    """Number the unbroken runs along the last dimension; 0 outside of the mask."""
    starts = mask & ~F.pad(mask[..., :-1], (1, 0))
    return starts.flatten().cumsum(0).view_as(mask) * mask


def _highest(labels: Tensor, runs: Tensor) -> Tensor:
    """Each pixel's label replaced by the highest of its run."""
    numbers = runs.flatten()
    top = labels.new_zeros(int(numbers.max()) + 1).scatter_reduce_(0, numbers, labels.flatten(), "amax")
    return top[numbers].view_as(labels)


def _judge_part(pixels: Tensor, soft: Tensor, looks: Looks) -> Verdict:
    """Judge the largest thing in frames [T, H, W, 3], given how much each pixel stands out [T, H, W]."""
    height, width = soft.shape[1:]
    found = _largest(soft > looks.least_chroma)
    seen = found.flatten(1).sum(dim=1) > LEAST_AREA * height * width  # [T]
    if seen.sum() < 0.8 * len(seen):
        return NOTHING
    pixels, soft, found = pixels[seen], soft[seen], found[seen]
    # The outline is where a pixel is half covered: half the thing's own chroma.
    level = torch.stack([frame[mask].median() for frame, mask in zip(soft, found, strict=True)])
    mask = _largest(soft > 0.5 * level[:, None, None])
    cover = (soft / level[:, None, None]).clamp(0, 1) * F.max_pool2d(mask[:, None].float(), 3, 1, 1)[:, 0]
    others = (soft > 0.5 * level[:, None, None]).sum() / mask.sum() - 1
    area, x, y = _moments(cover)
    shape, turn = _match(cover, x, y, (area / math.pi).sqrt(), looks.shapes)
    side = height  # the frame's shorter one, of a half, too: frames are no higher than wide
    # Over the whole clip, by straight lines through all frames.
    time = torch.linspace(-0.5, 0.5, len(seen))[seen]
    way_x, way_y, growth = _slope(time, x) / side, _slope(time, y) / side, _slope(time, area.log()) / 2
    total_turn = 0.0 if turn is None else _slope(time, turn)
    return Verdict(
        colour=_colour(pixels, soft, mask, looks.colours),
        shape=shape,
        motion=_motion(way_x, way_y, growth, total_turn),
        way=(way_x, way_y),
        growth=math.exp(growth),
        turn=total_turn,
        others=float(others),
    )


def _moments(cover: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Area and centroid of each frame [T], in pixels."""
    height, width = cover.shape[1:]
    area = cover.sum(dim=(1, 2))
    x = (cover.sum(dim=1) * (torch.arange(width) + 0.5)).sum(dim=1) / area
    y = (cover.sum(dim=2) * (torch.arange(height) + 0.5)).sum(dim=1) / area
    return area, x, y


def _colour(
    pixels: Tensor, soft: Tensor, mask: Tensor, colours: Mapping[str, tuple[float, float, float]]
) -> str:
    """The colour of the nearest hue to the most colourful half of the thing; of two with nearly the same hue,
    as brown and orange have, the one that is as bright.
    """
    values = pixels[mask]
    strength = soft[mask]
    mean = values[strength >= strength.median()].mean(dim=0)
    hues = {name: _hue(torch.tensor(colour)) for name, colour in colours.items()}
    nearest = min(hues, key=lambda name: _between(_hue(mean), hues[name]))
    alike = [name for name in hues if _between(hues[nearest], hues[name]) < SAME_HUE]
    return min(alike, key=lambda name: abs(max(colours[name]) - float(mean.max())))


def _between(one: float, other: float) -> float:
    """Degrees between two hues."""
    return abs((one - other + 180) % 360 - 180)


def _hue(colour: Tensor) -> float:
    """Hue in degrees of an RGB colour."""
    red, green, blue = colour.tolist()
    return math.degrees(math.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360


def _polar(cover: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Frames [T, H, W] around their centroids on the polar grid, [T, RADII, ANGLES]; angles clockwise."""
    height, width = cover.shape[1:]
    angle = torch.arange(ANGLES) * (2 * math.pi / ANGLES)
    away = (torch.arange(RADII) + 0.5) * (REACH / RADII)
    reach = away[:, None] * radius[:, None, None]
    grid_x = (x[:, None, None] + reach * angle.sin()) * (2 / width) - 1
    grid_y = (y[:, None, None] - reach * angle.cos()) * (2 / height) - 1
    grid = torch.stack([grid_x, grid_y], dim=-1)
    return F.grid_sample(cover[:, None], grid, mode="bilinear", align_corners=False)[:, 0]


def _templates(pixels_wide: float, shapes: Iterable[str]) -> dict[str, Tensor]:
    """Each upright shape on the polar grid, as blurred as one of that radius in pixels, [RADII, ANGLES]."""
    size, radius = 128, 40.0
    place = (torch.arange(size) + 0.5 - size / 2) / radius
    result = {}
    for shape in shapes:
        distance = signed_distance(shape, place[None, :], place[:, None])
        cover = (0.5 - distance * pixels_wide / 1.5).clamp(0, 1)[None]
        area, x, y = _moments(cover)
        result[shape] = _polar(cover, x, y, (area / math.pi).sqrt())[0]
    return result


def _match(
    cover: Tensor, x: Tensor, y: Tensor, radius: Tensor, shapes: Iterable[str]
) -> tuple[str, Tensor | None]:
    """The shape whose silhouette fits best at any angle, and its angles in degrees clockwise [T]."""
    weight = ((torch.arange(RADII) + 0.5) * (REACH / RADII)).sqrt()[:, None]  # area grows with the radius
    seen = torch.fft.rfft(_unit(_polar(cover, x, y, radius) * weight))
    scores = {}
    for shape, template in _templates(float(radius.median()), shapes).items():
        like = torch.fft.rfft(_unit(template[None] * weight))
        # Correlation over all turns at once.
        scores[shape] = torch.fft.irfft((seen * like.conj()).sum(dim=1), n=ANGLES)  # [T, ANGLES]
    shape = max(scores, key=lambda name: float(scores[name].amax(dim=1).mean()))
    if shape in ROUND:
        return shape, None
    # A parabola through the best angle and its neighbours is finer than the grid.
    best = scores[shape].argmax(dim=1)
    left, top, after = (
        scores[shape].gather(1, ((best + step) % ANGLES)[:, None])[:, 0] for step in (-1, 0, 1)
    )
    fine = (left - after) / (2 * (left - 2 * top + after)).clamp(max=-1e-9)
    angle = (best + fine) * (360 / ANGLES)
    period = SYMMETRY.get(shape, 360.0)
    step = (angle.diff() + period / 2) % period - period / 2
    return shape, torch.cat([angle[:1], angle[:1] + step.cumsum(0)])


def _unit(values: Tensor) -> Tensor:
    """Each [RADII, ANGLES] without its mean, at length 1."""
    centred = values - values.mean(dim=(1, 2), keepdim=True)
    return centred / centred.norm(dim=(1, 2), keepdim=True).clamp(min=1e-6)


def _slope(time: Tensor, values: Tensor) -> float:
    """Change over the whole clip, by least squares."""
    centred = time - time.mean()
    return float((centred * (values - values.mean())).sum() / centred.square().sum())


def _motion(way_x: float, way_y: float, growth: float, turn: float) -> str:
    """The motion that exceeds its least amount the most."""
    strength = {
        "right": way_x / LEAST_WAY,
        "left": -way_x / LEAST_WAY,
        "down": way_y / LEAST_WAY,
        "up": -way_y / LEAST_WAY,
        "growing": growth / LEAST_GROWTH,
        "shrinking": -growth / LEAST_GROWTH,
        "clockwise": turn / LEAST_TURN,
        "anticlockwise": -turn / LEAST_TURN,
        "still": 1.0,
    }
    return max(strength, key=lambda name: strength[name])


def main() -> None:
    """Judge rendered scenes of one thing and of two, before and after mp4; print the shares of right ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=200, help="scenes of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--height", type=int, default=96, help="pixels")
    parser.add_argument("--width", type=int, default=128, help="pixels")
    parser.add_argument("--crf", type=int, default=23, help="x264's quality: the higher, the worse")
    parser.add_argument("--verbose", action="store_true", help="print every wrong verdict")
    options = parser.parse_args()
    # Frames are too small for more threads to pay.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for objects in (1, 2):
            counts: dict[str, Counter[str]] = {"rendered": Counter(), "after mp4": Counter()}
            for index in range(options.clips):
                scene = scene_for(index, seed=options.seed, held_out=True, objects=objects)
                frames = render(scene, height=options.height, width=options.width)
                with VideoWriter(Path(folder) / "clip.mp4", fps=12, crf=options.crf) as writer:
                    writer.write(frames)
                clips = {"rendered": frames, "after mp4": read_frames(writer.path)}
                for kind, clip in clips.items():
                    verdicts = judge(clip, objects=objects)
                    result = right(scene, verdicts)
                    counts[kind].update(name for name, good in result.items() if good)
                    if options.verbose and not result["all"]:
                        print(f"{kind} {index}: {scene}\n  judged {verdicts}")
            for kind, count in counts.items():
                shares = ", ".join(
                    f"{name} {count[name] / options.clips:.1%}" for name in (*ATTRIBUTES, "all")
                )
                print(f"{objects} object{'s' * (objects > 1)}, {options.clips} clips {kind}: {shares}")


if __name__ == "__main__":
    main()
