"""What is said of a scene of moving shapes, in many wordings."""

import random
from collections.abc import Sequence

from moving_shapes.scenes import BACKGROUNDS, Scene

_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "bright red"),
    "orange": ("orange", "bright orange"),
    "yellow": ("yellow", "bright yellow"),
    "green": ("green", "bright green"),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue", "bright blue"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "bright pink"),
    "ball": ("ball", "sphere"),
    "square": ("square", "block"),
    "triangle": ("triangle",),
    "star": ("star", "five-pointed star"),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus sign"),
    "brown": ("brown",),
    "heart": ("heart",),
    "small": ("small", "little", "tiny"),
    "medium": ("medium-sized", "mid-sized"),
    "large": ("large", "big"),
}
# What a thing does, and the same as "-ing".
_DOES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "left": (
        ("moves to the left", "moves left", "slides to the left", "glides from right to left"),
        ("moving to the left", "moving left", "sliding to the left", "travelling from right to left"),
    ),
    "right": (
        ("moves to the right", "moves right", "slides to the right", "glides from left to right"),
        ("moving to the right", "moving right", "sliding to the right", "travelling from left to right"),
    ),
    "up": (
        ("moves up", "rises", "floats upwards", "moves from the bottom to the top"),
        ("moving up", "rising", "floating upwards", "going up"),
    ),
    "down": (
        ("moves down", "falls", "sinks downwards", "moves from the top to the bottom"),
        ("moving down", "falling", "sinking downwards", "going down"),
    ),
    "growing": (
        ("grows", "gets bigger", "grows bigger and bigger", "becomes larger"),
        ("growing", "getting bigger", "growing bigger and bigger", "becoming larger"),
    ),
    "shrinking": (
        ("shrinks", "gets smaller", "shrinks more and more", "becomes smaller"),
        ("shrinking", "getting smaller", "shrinking more and more", "becoming smaller"),
    ),
    "clockwise": (
        ("turns clockwise", "rotates clockwise", "spins clockwise"),
        ("turning clockwise", "rotating clockwise", "spinning clockwise"),
    ),
    "anticlockwise": (
        ("turns anticlockwise", "rotates anticlockwise", "spins counterclockwise", "turns counterclockwise"),
        ("turning anticlockwise", "rotating anticlockwise", "spinning counterclockwise"),
    ),
    "still": (
        ("stands still", "stays still", "does not move", "rests in place"),
        ("standing still", "staying still", "not moving", "resting in place"),
    ),
}
# {a}, {b}: "a small red ball"; {a_does}: "moves left"; {a_doing}: "moving left"; {where}: the background.
_ONE = (
    "{a} {a_does} {where}",
    "{where}, {a} {a_does}",
    "a video of {a} {a_doing} {where}",
    "{where} there is {a}, {a_doing}",
    "{a} that {a_does}, {where}",
    "one object: {a} {a_doing} {where}",
)
_ONE_SHORT = ("{a} {a_does}", "{a} {a_doing}", "a video of {a} {a_doing}")
_TWO = (
    "on the left, {a} {a_does}; on the right, {b} {b_does}, {where}",
    "two objects {where}: {a} on the left {a_does}, and {b} on the right {b_does}",
    "{where}, {a} {a_does} on the left side while {b} {b_does} on the right side",
    "{b} on the right {b_does}, and {a} on the left {a_does}, {where}",
    "a video of two objects: left, {a} {a_doing}; right, {b} {b_doing}, {where}",
    "to the left of {b} that {b_does}, {a} {a_does} {where}",
)
_TWO_SHORT = (
    "on the left, {a} {a_does}; on the right, {b} {b_does}",
    "{a} on the left {a_does}, {b} on the right {b_does}",
    "left: {a} {a_doing}; right: {b} {b_doing}",
)


def caption(scene: Scene, *, variant: int = 0, short: bool = False) -> str:
    """Say in plain English what the scene shows. Variant 0 is the plainest wording; others are drawn.

    All attributes are named; `short` leaves out sizes and background. The same arguments always give
    the same words.
    """
    if variant < 0:
        raise ValueError(f"variant must be at least 0, got {variant}")
    rng = random.Random(f"caption {variant} {scene}") if variant else None
    forms = {1: (_ONE, _ONE_SHORT), 2: (_TWO, _TWO_SHORT)}[len(scene.things)]
    words = {"where": _pick(BACKGROUNDS[scene.background], rng)}
    for name, thing in zip("ab", scene.things, strict=False):
        parts = [thing.colour, thing.shape] if short else [thing.size, thing.colour, thing.shape]
        noun = " ".join(_pick(_WORDS[part], rng) for part in parts)
        does, doing = _DOES[thing.motion]
        if scene.slow and thing.motion != "still":
            does, doing = ([f"slowly {word}" for word in words] for words in (does, doing))
        words[name] = f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
        words[f"{name}_does"] = _pick(does, rng)
        words[f"{name}_doing"] = _pick(doing, rng)
    text = _pick(forms[short], rng).format(**words)
    return f"{text[0].upper()}{text[1:]}."


def _pick(choices: Sequence[str], rng: random.Random | None) -> str:
    return choices[0] if rng is None else rng.choice(choices)
