"""Draws scenes of moving, shaded shapes.

Lengths are in units of the frame's shorter side, x to the right and y down from the frame's centre; a clip's
motion spans the whole clip whatever its length and rate.
"""

import math
import random
from typing import NamedTuple

import torch
from moving_shapes.scenes import (
    COLOURS,
    NEW_COLOURS,
    NEW_SHAPES,
    ROUND,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    check_name,
)
from torch import Tensor

_MOST_PIXELS = 10**9
# In scenes of two things, each has half of the frame.
_TWO_SCALE = 0.85
# Growing goes from the first multiple of the size's radius to the second; shrinking the other way.
_GROWTH = (0.72, 1.32)
# The part of its motions, from -1 to 1, that a clip of a slow scene shows.
_SLOW_PART = 0.5
# Width of a thing's outline in pixels, as a lens draws it.
_BLUR = 2.0
# Towards the light, x to the right, y down, z to the viewer.
_LIGHT = (-0.46, -0.62, 0.64)
# Width of the rounded rim that shading sees: 1 makes a ball of a disc, half the band's width a torus of a
# ring.
_BEVEL = {
    "ball": 1.0,
    "square": 0.30,
    "triangle": 0.40,
    "star": 0.42,
    "ring": 0.29,
    "cross": 0.30,
    "heart": 0.40,
}


class _Track(NamedTuple):
    """Where a thing is in each frame, all [T, 1, 1]: centre, radius, and angle (radians, clockwise)."""

    x: Tensor
    y: Tensor
    radius: Tensor
    angle: Tensor


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance of points from the outline of a shape of radius 1, upright at the origin; negative inside.

    `x` and `y` broadcast. Exact, save the rounded corners' insides.
    """
    check_name("shape", shape, SHAPES | NEW_SHAPES)
    if shape == "heart":
        return _heart(x, y, side=0.60)
    if shape == "ball":
        return torch.hypot(x, y) - 1
    if shape == "ring":
        return (torch.hypot(x, y) - 0.76).abs() - _BEVEL["ring"]
    if shape == "square":
        return _box(x.abs(), y.abs(), 0.74, 0.74) - 0.10
    if shape == "cross":
        far, near = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
        return _cross(far, near, length=1.04, half_width=0.30) - 0.05
    if shape == "triangle":
        return _star(x, y, points=3, inner=0.5 * 1.12, outer=1.12) - 0.06
    return _star(x, y, points=5, inner=0.52, outer=1.15) - 0.04


def render(scene: Scene, *, frames: int = 25, height: int = 96, width: int = 128) -> Tensor:
    """Draw the scene: uint8 [frames, height, width, 3], sRGB.

    Raises ValueError unless height and width are multiples of 16 from 64 on and frames is 8k + 1.
    """
    check_size(frames=frames, height=height, width=width)
    unit = min(height, width)
    y = ((torch.arange(height) + 0.5 - height / 2) / unit)[:, None]  # [H, 1]
    x = ((torch.arange(width) + 0.5 - width / 2) / unit)[None, :]  # [1, W]
    rng = random.Random(f"render {scene.seed}")
    canvas, horizon = _background(scene.background, x, y)
    video = canvas[:, None].expand(-1, frames, -1, -1).clone()  # [3, T, H, W]
    tracks = [
        _track(scene, index, frames, width / unit / 2, height / unit / 2, rng)
        for index in range(len(scene.things))
    ]
    # All shadows first, for none falls on a thing. The night sky is too far away for any.
    if scene.background != "night":
        for thing, track in zip(scene.things, tracks, strict=True):
            video *= 1 - _shadow(thing, track, x, y, horizon=horizon, bottom=height / unit / 2)
    for thing, track in zip(scene.things, tracks, strict=True):
        _draw(video, thing, track, x, y, pixel=1 / unit)
    return (video * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def empty(background: str, height: int, width: int) -> Tensor:
    """A background alone: [height, width, 3] in 0 .. 1."""
    unit = min(height, width)
    y = ((torch.arange(height) + 0.5 - height / 2) / unit)[:, None]
    x = ((torch.arange(width) + 0.5 - width / 2) / unit)[None, :]
    return _background(background, x, y)[0].permute(1, 2, 0)


def check_size(*, frames: int, height: int, width: int) -> None:
    for name, value in (("height", height), ("width", width)):
        if value < 64 or value % 16:
            nearest = max(64, round(value / 16) * 16)
            raise ValueError(f"{name} must be a multiple of 16 from 64 on, got {value}: use {nearest}")
    if frames < 1 or frames % 8 != 1:
        raise ValueError(
            f"frames must be 8k + 1, got {frames}: use {max(1, round((frames - 1) / 8) * 8 + 1)}"
        )
    if (pixels := frames * height * width) > _MOST_PIXELS:
        raise ValueError(
            f"a clip has at most {_MOST_PIXELS:,} pixels, since it is rendered in memory, got {pixels:,} "
            f"({frames} x {height} x {width})"
        )


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    """Distance from a box around the origin, for x, y >= 0."""
    dx, dy = x - half_width, y - half_height
    return torch.hypot(dx.clamp(min=0), dy.clamp(min=0)) + torch.maximum(dx, dy).clamp(max=0)


def _cross(far: Tensor, near: Tensor, *, length: float, half_width: float) -> Tensor:
    """Distance from two crossing bars, for far >= near >= 0, where all its arms lie on each other."""
    outside = torch.hypot((far - length).clamp(min=0), (near - half_width).clamp(min=0))
    end, side = length - far, half_width - near
    corner = torch.hypot((far - half_width).clamp(max=0), (near - half_width).clamp(max=0))
    inside = torch.where(far > half_width, torch.minimum(end, side), torch.minimum(end, corner))
    return torch.where((end > 0) & (side > 0), -inside, outside)


def _heart(x: Tensor, y: Tensor, *, side: float) -> Tensor:
    """Distance from a square that stands on a corner, with a disc on each of its upper sides. `side`: half of
    one, and the radius of the discs.
    """
    along, across = (x - y).abs() / math.sqrt(2), (x + y).abs() / math.sqrt(2)
    square = _box(along, across, side, side)
    lobe = torch.hypot(x.abs() - side / math.sqrt(2), y + side / math.sqrt(2)) - side
    return torch.minimum(square, lobe)


def _star(x: Tensor, y: Tensor, *, points: int, inner: float, outer: float) -> Tensor:
    """Distance from a star with a tip on top; with 3 points and half the radius inside, a triangle."""
    sector = 2 * math.pi / points
    angle = torch.atan2(x, -y)  # clockwise from the top
    angle = (angle - sector * (angle / sector).round()).abs()
    radius = torch.hypot(x, y)
    # All edges lie on each other now: from the tip (outer, 0) to the notch.
    px, py = radius * angle.cos() - outer, radius * angle.sin()
    ex, ey = inner * math.cos(sector / 2) - outer, inner * math.sin(sector / 2)
    along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
    distance = torch.hypot(px - along * ex, py - along * ey)
    return torch.where(px * ey - py * ex > 0, distance, -distance)


def _track(
    scene: Scene, index: int, frames: int, half_width: float, half_height: float, rng: random.Random
) -> _Track:
    """Place and move thing `index` so that it stays in its part of the frame all the time."""
    thing, two = scene.things[index], len(scene.things) == 2
    time = _time(scene, frames)
    radius = torch.full_like(time, SIZES[thing.size] * (_TWO_SCALE if two else 1))
    if thing.motion in ("growing", "shrinking"):
        low, high = _GROWTH
        sign = 1 if thing.motion == "growing" else -1
        radius = radius * ((low + high) / 2 + time * sign * (high - low) / 2)
    reach = float(radius.max()) * (SHAPES | NEW_SHAPES)[thing.shape] + 0.015
    cell = half_width / 2 if two else half_width
    free_x, free_y = cell - reach, half_height - reach
    way_x = way_y = 0.0
    if thing.motion in ("left", "right"):
        way_x = min(free_x, rng.uniform(0.20, 0.26)) * (1 if thing.motion == "right" else -1)
    elif thing.motion in ("up", "down"):
        way_y = min(free_y, rng.uniform(0.20, 0.26)) * (1 if thing.motion == "down" else -1)
    spare_x, spare_y = min(free_x - abs(way_x), 0.12), min(free_y - abs(way_y), 0.12)
    x = rng.uniform(-spare_x, spare_x) + (cell * (2 * index - 1) if two else 0) + way_x * time
    y = rng.uniform(-spare_y, spare_y) + way_y * time
    angle = torch.full_like(time, math.radians(rng.uniform(-5, 5)))
    if thing.motion.endswith("clockwise"):
        half_turn = math.radians(rng.uniform(45, 55))
        angle = angle + time * (half_turn if thing.motion == "clockwise" else -half_turn)
    return _Track(x=x, y=y, radius=radius, angle=angle)


def _time(scene: Scene, frames: int) -> Tensor:
    """How far the motions are in each frame, from -1 to 1: [T, 1, 1]."""
    if frames == 1:
        return torch.zeros(1, 1, 1)
    start, end = -1.0, 1.0
    if scene.slow:
        start = random.Random(f"part {scene.seed}").uniform(-1, 1 - _SLOW_PART)
        end = start + _SLOW_PART
    return torch.linspace(start, end, frames)[:, None, None]


def _local(track: _Track, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Points in the thing's own upright frame, where its radius is 1."""
    dx, dy = (x - track.x) / track.radius, (y - track.y) / track.radius
    cos, sin = track.angle.cos(), track.angle.sin()
    return dx * cos + dy * sin, dy * cos - dx * sin


def _shadow(
    thing: Thing, track: _Track, x: Tensor, y: Tensor, *, horizon: float | None, bottom: float
) -> Tensor:
    """How much light the thing takes from the background, [T, H, W] in 0 .. 1."""
    if horizon is None:  # a wall, or a table seen from above: its soft outline, down to the right
        u, v = _local(track, x - 0.22 * track.radius, y - 0.30 * track.radius)
        soft = (0.5 - signed_distance(thing.shape, u, v) / 0.7).clamp(0, 1)
        return 0.42 * soft * soft * (3 - 2 * soft)
    # A floor: an ellipse below the thing, fainter and wider the higher it is.
    below = track.y + track.radius * 0.97
    floor = min(max(float(below.max()), horizon + 0.10), bottom - 0.04)
    lift = ((floor - below) / 0.5).clamp(min=0)
    wide = track.radius * (0.95 + 0.5 * lift)
    distance = torch.hypot((x - track.x) / wide, (y - floor) / (0.30 * wide))
    return (0.55 / (1 + 2.2 * lift)) * torch.exp(-1.6 * distance**2)


def _draw(video: Tensor, thing: Thing, track: _Track, x: Tensor, y: Tensor, *, pixel: float) -> None:
    """Draw a shaded thing onto `video` [3, T, H, W] in place."""
    u, v = _local(track, x, y)
    distance = signed_distance(thing.shape, u, v)  # [T, H, W], in radii
    cover = (0.5 - distance * track.radius / (_BLUR * pixel)).clamp(0, 1)
    cover = cover * cover * (3 - 2 * cover)
    # The surface's normal leans outward along the distance's gradient, the more the nearer to the outline.
    slope_y, slope_x = torch.gradient(distance, dim=(1, 2))
    length = torch.hypot(slope_x, slope_y).clamp(min=1e-6)
    lean = (1 + distance / _BEVEL[thing.shape]).clamp(0, 1)
    flat = 1.0 if thing.shape in ROUND else 0.8
    normal_x, normal_y = slope_x / length * lean * flat, slope_y / length * lean * flat
    normal_z = (1 - (lean * flat) ** 2).clamp(min=0).sqrt()
    light_x, light_y, light_z = _LIGHT
    facing = normal_x * light_x + normal_y * light_y + normal_z * light_z
    # Lambert's law, softened by light from all around.
    lit = (0.44 + 0.68 * (0.75 * facing.clamp(min=0) + 0.125 * (facing + 1))).clamp(max=1)
    # Blinn's highlight, with the viewer in front.
    half = math.sqrt(light_x**2 + light_y**2 + (light_z + 1) ** 2)
    gloss = (normal_x * light_x + normal_y * light_y + normal_z * (light_z + 1)) / half
    shine = 0.55 * gloss.clamp(min=0) ** 40
    for channel, value in zip(video, (COLOURS | NEW_COLOURS)[thing.colour], strict=True):
        colour = value * lit
        channel.lerp_(colour + (1 - colour) * shine, cover)


def _background(name: str, x: Tensor, y: Tensor) -> tuple[Tensor, float | None]:
    """Colours [3, H, W] and, where there is a floor, the height of its far end."""
    rng = random.Random(f"background {name}")
    if name == "meadow":
        horizon = 0.02
        depth = ((y - horizon) / 0.5).clamp(0, 1)
        grass = _mix((0.62, 0.70, 0.52), (0.44, 0.58, 0.38), depth + 0 * x)
        grass = grass * (1 + 0.05 * (1 + depth) * _ripple(x, y, rng, across=5, down=7))
        sky = _mix((0.66, 0.77, 0.88), (0.86, 0.90, 0.92), ((y + 0.5) / (horizon + 0.5)).clamp(0, 1) + 0 * x)
        return _above(sky, grass, y, horizon), horizon
    if name == "beach":
        horizon = -0.01
        sand = _mix((0.86, 0.81, 0.70), (0.77, 0.70, 0.58), ((y - horizon) / 0.5).clamp(0, 1) + 0 * x)
        sand = sand * (1 + 0.03 * _ripple(x, y, rng, across=3, down=6))
        sky = _mix((0.74, 0.83, 0.90), (0.92, 0.91, 0.87), ((y + 0.5) / (horizon + 0.5)).clamp(0, 1) + 0 * x)
        sea = torch.tensor((0.50, 0.63, 0.68))[:, None, None].expand_as(sand)
        return _above(_above(sky, sea, y, horizon - 0.10), sand, y, horizon), horizon
    if name == "table":
        boards = torch.sin(math.pi * (y + 0.06) / 0.25) + 0 * x
        seam = torch.exp(-((boards / 0.2) ** 2))
        grain = _ripple(x, y, rng, across=2, down=11) + 0.6 * _ripple(x, y, rng, across=3, down=6)
        wood = _mix((0.62, 0.52, 0.42), (0.72, 0.62, 0.51), 0.5 + 0.3 * grain)
        return wood * (1 - 0.22 * seam) * (1.04 - 0.14 * (x + y)), None
    if name == "night":
        sky = _mix((0.05, 0.06, 0.13), (0.17, 0.18, 0.28), (y + 0.5).clamp(0, 1) ** 1.5 + 0 * x)
        for _ in range(12):
            away = ((x - rng.uniform(-0.5, 0.5)) ** 2 + (y - rng.uniform(-0.5, 0.4)) ** 2) / 0.015**2
            sky = sky + rng.uniform(0.2, 0.55) * torch.exp(-away)
        return sky.clamp(max=1), None
    if name == "tiles":
        period = 0.25
        checks = torch.sin(math.pi * (x + 0.125) / period) * torch.sin(math.pi * (y + 0.125) / period)
        tiles = _mix((0.70, 0.71, 0.75), (0.86, 0.86, 0.87), 0.5 + 0.5 * torch.tanh(3 * checks))
        return tiles * (1 - 0.12 * (x + y)), None
    tone = 0.67
    glow = torch.exp(-((x + 0.15) ** 2 + (y + 0.2) ** 2) / 0.35)
    grey = torch.tensor((tone, tone, tone * 1.02))[:, None, None]
    return grey * (0.74 + 0.42 * glow), None


def _mix(first: tuple[float, ...], second: tuple[float, ...], amount: Tensor) -> Tensor:
    """Between two colours, [3, H, W] for amounts [H, W] (0: the first)."""
    start, end = torch.tensor(first)[:, None, None], torch.tensor(second)[:, None, None]
    return start + (end - start) * amount.clamp(0, 1)


def _above(upper: Tensor, lower: Tensor, y: Tensor, edge: float) -> Tensor:
    """`upper` above the height `edge` and `lower` below it, over about two pixels."""
    return torch.lerp(upper, lower, (0.5 + (y - edge) / 0.025).clamp(0, 1).expand_as(upper))


def _ripple(x: Tensor, y: Tensor, rng: random.Random, *, across: float, down: float) -> Tensor:
    """Smooth irregular waves in about -1 .. 1 [H, W], with so many crests per unit along each axis."""
    total = torch.zeros(1)
    for _ in range(4):
        fx, fy = across * rng.uniform(-1, 1), down * rng.uniform(0.4, 1)
        total = total + torch.sin(2 * math.pi * (fx * x + fy * y) + rng.uniform(0, 2 * math.pi))
    return total / 2.5
