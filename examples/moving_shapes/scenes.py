"""Scenes of moving shapes: what there is, what is kept from training, and an endless list of them."""

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from opensoraplan.names import did_you_mean

# sRGB. Hues lie at least 22 degrees apart and every colour is far more saturated than any background.
COLOURS = {
    "red": (0.90, 0.10, 0.12),
    "orange": (1.00, 0.51, 0.04),
    "yellow": (0.98, 0.89, 0.12),
    "green": (0.14, 0.70, 0.20),
    "cyan": (0.08, 0.80, 0.84),
    "blue": (0.12, 0.30, 0.94),
    "purple": (0.52, 0.16, 0.82),
    "pink": (1.00, 0.40, 0.74),
}
# How far each shape reaches from its centre at radius 1.
SHAPES = {"ball": 1.0, "square": 1.15, "triangle": 1.2, "star": 1.2, "ring": 1.05, "cross": 1.13}
# What the built-in model has never seen: for LoRAs.
NEW_COLOURS = {"brown": (0.45, 0.25, 0.09)}
NEW_SHAPES = {"heart": 1.2}
# Shapes whose turning nobody could see.
ROUND = ("ball", "ring")
# The radius, of a growing or shrinking thing the one halfway.
SIZES = {"small": 0.18, "medium": 0.225, "large": 0.28}
MOTIONS = ("left", "right", "up", "down", "growing", "shrinking", "clockwise", "anticlockwise", "still")
# Where a thing is, as the captions say it; the first wording is the plain one. A place always looks the same.
BACKGROUNDS = {
    "studio": ("in front of a grey wall", "in a grey studio", "against a plain grey background"),
    "meadow": ("over a green meadow", "on a green field under a pale sky", "above a grassy field"),
    "beach": ("on a sandy beach", "over the sand of a beach", "on a beach by the sea"),
    "table": ("on a wooden table", "over wooden boards", "on a table of brown wood"),
    "night": ("in a dark night sky", "under the stars at night", "against a dark starry sky"),
    "tiles": ("in front of pale tiles", "on a floor of pale tiles", "against a chequered pale wall"),
}

# One part in this many of all (colour, shape, motion) combinations is kept from training.
_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Thing:
    """One object: a colour of COLOURS, a shape of SHAPES, or new ones, a size of SIZES and a
    motion of MOTIONS.

    Raises ValueError for other names, and for a round shape that is to turn.
    """

    colour: str
    shape: str
    size: str
    motion: str

    def __post_init__(self) -> None:
        check_name("colour", self.colour, COLOURS | NEW_COLOURS)
        check_name("shape", self.shape, SHAPES | NEW_SHAPES)
        check_name("size", self.size, SIZES)
        check_name("motion", self.motion, MOTIONS)
        if self.shape in ROUND and self.motion in ("clockwise", "anticlockwise"):
            angular = ", ".join(shape for shape in SHAPES if shape not in ROUND)
            raise ValueError(f"nobody sees a {self.shape} turn {self.motion}: use one of {angular}")


@dataclass(frozen=True)
class Scene:
    """What a clip shows: one thing, or two (left, right), in front of a background of BACKGROUNDS.

    `seed` settles what no caption tells: exact places and speeds. `slow`: a clip shows a quarter of the
    motions, some part of them. Raises ValueError for another number of things or an unknown background.
    """

    things: tuple[Thing, ...]
    background: str
    seed: int = 0
    slow: bool = field(default=False, repr=False)  # captions are drawn by the repr

    def __post_init__(self) -> None:
        if len(self.things) not in (1, 2):
            raise ValueError(f"a scene has 1 or 2 things, got {len(self.things)}")
        check_name("background", self.background, BACKGROUNDS)


def is_held_out(scene: Scene) -> bool:
    """Whether any (colour, shape, motion) of the scene is kept from training: a tenth, by a stable hash."""
    return any(_combination_held_out(thing.colour, thing.shape, thing.motion) for thing in scene.things)


def scene_for(
    index: int,
    *,
    seed: int = 0,
    held_out: bool | None = False,
    objects: int | None = None,
    slow: bool = False,
) -> Scene:
    """Scene number `index` of an endless list, which `seed`, `held_out`, `objects` and `slow` determine.

    `held_out`: only scenes kept from training (True), only scenes to train on (False), or any (None).
    `objects`: how many things, 1 or 2; None mixes three scenes of one with two of two. Two things of a scene
    never share a colour. Raises ValueError for other numbers.
    """
    if objects not in (None, 1, 2):
        raise ValueError(f"objects must be 1, 2 or None, got {objects}")
    rng = random.Random(f"scene {seed} {index} {held_out} {objects}{' slow' if slow else ''}")
    count = objects or (1 if rng.random() < 0.6 else 2)
    while True:
        things = tuple(_draw_thing(rng, count=count) for _ in range(count))
        background, own_seed = rng.choice(list(BACKGROUNDS)), rng.getrandbits(32)
        scene = Scene(things=things, background=background, seed=own_seed, slow=slow)
        colours = {thing.colour for thing in things}
        if len(colours) == count and held_out in (None, is_held_out(scene)):
            return scene


def scene_of(thing: str, index: int, *, seed: int = 0) -> Scene:
    """Scene number `index` of an endless list in which all is drawn but one thing's colour and shape, as in
    "brown heart". Raises ValueError for other words.
    """
    colour, _, shape = thing.strip().partition(" ")
    check_name("colour", colour, COLOURS | NEW_COLOURS)
    check_name("shape", shape, SHAPES | NEW_SHAPES)
    rng = random.Random(f"{thing} {seed} {index}")
    drawn = _draw_thing(rng, count=1, colour=colour, shape=shape)
    return Scene(things=(drawn,), background=rng.choice(list(BACKGROUNDS)), seed=rng.getrandbits(32))


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        raise ValueError(f"unknown {kind} {name!r}{did_you_mean(name, names)}: there are {', '.join(names)}")


def _combination_held_out(colour: str, shape: str, motion: str) -> bool:
    digest = hashlib.sha256(f"{colour} {shape} {motion}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % _HELD_OUT_ONE_IN == 0


def _draw_thing(
    rng: random.Random, *, count: int, colour: str | None = None, shape: str | None = None
) -> Thing:
    shape = shape or rng.choice(list(SHAPES))
    motions = [motion for motion in MOTIONS if shape not in ROUND or not motion.endswith("clockwise")]
    # Half of a frame is too narrow for the large ones.
    sizes = list(SIZES) if count == 1 else ["small", "medium"]
    return Thing(
        colour=colour or rng.choice(list(COLOURS)),
        shape=shape,
        size=rng.choice(sizes),
        motion=rng.choice(motions),
    )
