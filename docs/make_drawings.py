"""Draws the pictures of docs/model.md: `python docs/make_drawings.py` writes docs/*.svg. Depths, rates and
channels are those of the models' defaults.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import torch

from opensoraplan import WFVAE, SparseUMMDiT
from opensoraplan.models.skiparse import swap_skip, to_single_skip

HERE = Path(__file__).parent
INK, LINE, FILL = "#1f2937", "#6b7280", "#eef2ff"
COLOURS = ("#93c5fd", "#fca5a5", "#86efac", "#fcd34d")


class Drawing:
    """An SVG picture that is made of boxes, lines and words."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        self._parts = [f'<rect width="{width}" height="{height}" fill="#ffffff"/>']

    def box(self, x: float, y: float, w: float, h: float, text: str = "", *, fill: str = FILL) -> None:
        """A box from (x, y), with lines of text in its middle."""
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="4" fill="{fill}" stroke="{LINE}"/>'
        )
        lines = text.split("\n") if text else []
        for index, line in enumerate(lines):
            self.text(x + w / 2, y + h / 2 + 4.5 + (index - (len(lines) - 1) / 2) * 15, line)

    def text(self, x: float, y: float, text: str, *, size: int = 12, anchor: str = "middle") -> None:
        """One line of text whose base line is at y."""
        self._parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{INK}">'
            f"{escape(text)}</text>"
        )

    def arrow(self, points: Sequence[tuple[float, float]], *, dashed: bool = False) -> None:
        """A line through the points, with a head at its end."""
        path = " ".join(f"{x},{y}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="1.5"{dash} '
            'marker-end="url(#head)"/>'
        )

    def write(self, name: str) -> None:
        """Write docs/NAME."""
        width, height = self.size
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker>'
        )
        (HERE / name).write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="Helvetica, Arial, sans-serif"><defs>{head}</defs>\n'
            + "\n".join(self._parts)
            + "\n</svg>\n",
            encoding="utf-8",
        )


def defaults_of(model: type) -> dict[str, object]:
    """The default of each argument of a model's constructor."""
    return {name: value.default for name, value in inspect.signature(model).parameters.items()}


def draw_u() -> None:
    """The stages of the denoiser, and what the later ones take from the earlier ones."""
    config = defaults_of(SparseUMMDiT)
    depths, rates = config["num_layers"], config["sparse_n"]
    assert isinstance(depths, Sequence)
    assert isinstance(rates, Sequence)
    picture = Drawing(900, 330)
    middle, step, width = len(depths) // 2, 122, 108
    places = []
    for index, (depth, rate) in enumerate(zip(depths, rates, strict=True)):
        x, y = 26 + index * step, 84 + 46 * (middle - abs(middle - index))
        places.append((x, y))
        attention = "full attention" if rate == 1 else f"Skiparse, n = {rate}"
        picture.box(x, y, width, 52, f"{depth} blocks\n{attention}")
    for index in range(len(depths) - 1):
        (x, y), (nx, ny) = places[index], places[index + 1]
        picture.arrow([(x + width, y + 26), (nx - 9, y + 26), (nx - 9, ny + 26), (nx, ny + 26)])
    for index in range(middle):
        (x, y), (tx, ty) = places[index], places[-1 - index]
        top = 66 - 16 * (middle - 1 - index)
        picture.arrow([(x + 54, y), (x + 54, top), (tx + 54, top), (tx + 54, ty)], dashed=True)
    picture.text(
        450, 16, "kept output of a stage: Linear(concat(hidden, kept)) at the start of its counterpart"
    )
    x, y = places[0]
    picture.text(x, y + 120, "in: 2 x 2 patches of latents, T5 states", anchor="start")
    x, y = places[-1]
    picture.text(x + width, y + 120, "out: norm, Linear, velocity", anchor="end")
    picture.text(450, 318, "Each block: video and text streams, AdaLN from timestep and CLIP vector")
    picture.write("suv.svg")


def draw_skiparse() -> None:
    """Which of 16 tokens attend to each other at n = 2, by the model's own orders."""
    n, tokens = 2, 16
    picture = Drawing(760, 250)
    single = to_single_skip(torch.arange(tokens)[None], n)  # [n, 1, S/n]
    orders = {"single-skip (even blocks): every n-th token": single}
    orders["group-skip (odd blocks): n tokens in a row, every n-th group"] = swap_skip(single)
    for row, (title, order) in enumerate(orders.items()):
        y = 40 + row * 110
        picture.text(40, y - 12, title, size=13, anchor="start")
        for subsequence in range(n):
            for token in order[subsequence, 0].tolist():
                picture.box(40 + token * 42, y, 38, 30, str(token), fill=COLOURS[subsequence])
        words = "; ".join(f"{{{', '.join(map(str, order[index, 0].tolist()))}}}" for index in range(n))
        picture.text(40, y + 52, f"attend within: {words}", anchor="start")
    picture.text(
        40, 240, "Two blocks, one of each kind, connect every token with every other.", anchor="start"
    )
    picture.write("skiparse.svg")


def draw_vae() -> None:
    """Main path and wavelet path of the VAE's encoder; the decoder is its mirror image."""
    config = defaults_of(WFVAE)
    base, flow, latent = (config[key] for key in (
        "base_channels", "encoder_energy_flow_hidden_size", "latent_channels",
    ))  # fmt: skip
    assert isinstance(base, int)
    picture = Drawing(900, 300)
    rows = (50, 190)
    columns = (20, 190, 380, 570, 750)
    picture.box(columns[0], rows[0], 110, 60, "video\n3 x T x H x W")
    for level in range(1, 4):
        scale = 2**level
        words = f"24 coefficients\nT/{scale} x H/{scale} x W/{scale}"
        picture.box(columns[level], rows[0], 140, 60, f"Haar, level {level}\n{words}")
        before = columns[level - 1] + (110 if level == 1 else 140)
        picture.arrow([(before, rows[0] + 30), (columns[level], rows[0] + 30)])
    names = ("conv 2-D, resnets", "resnets", "resnets, attention")
    widths = (base, 2 * base, 4 * base)
    for level, (name, width) in enumerate(zip(names, widths, strict=True), start=1):
        extra = "" if level == 1 else f"+ {flow} of the wavelets"
        picture.box(
            columns[level], rows[1], 140, 66, "\n".join(filter(None, (name, extra, f"{width} channels")))
        )
        x = columns[level] + 70
        picture.arrow([(x, rows[0] + 60), (x, rows[1])], dashed=level > 1)
        if level < 3:
            picture.arrow([(columns[level] + 140, rows[1] + 33), (columns[level + 1], rows[1] + 33)])
            picture.text(columns[level] + 165, rows[1] + 24, "/ 2")
    picture.box(columns[4], rows[1], 135, 66, f"mean, variance\n{latent} channels\n(T-1)/8+1, H/8, W/8")
    picture.arrow([(columns[3] + 140, rows[1] + 33), (columns[4], rows[1] + 33)])
    picture.text(20, 24, "The low-pass channels of each level are the input of the next one.", anchor="start")
    picture.text(20, 286, "Solid: main path. Dashed: wavelet path, joined by concatenation.", anchor="start")
    picture.write("wfvae.svg")


if __name__ == "__main__":
    draw_u()
    draw_skiparse()
    draw_vae()
