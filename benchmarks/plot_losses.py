"""Draw what training runs logged: python benchmarks/plot_losses.py RUN [RUN ...] --out docs/losses.png

A panel for each run: the smoothed loss, a denoiser's by sigma quarter, a VAE's PSNR, and those of validation.
Needs matplotlib: pip install "opensoraplan[plot]".
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path

from matplotlib import pyplot
from matplotlib.axes import Axes


def series(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of everything in a run's metrics.jsonl, by name."""
    values: dict[str, list[tuple[int, float]]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        logged = json.loads(line)
        for name, value in logged.items():
            if isinstance(value, int | float):
                values.setdefault(name, []).append((logged["step"], value))
    return values


def smoothed(points: list[tuple[int, float]], share: float) -> list[tuple[int, float]]:
    """An exponential mean in which a new value counts `share`, from the first value on."""
    result = [points[0]]
    for _, (step, value) in pairwise(points):
        result.append((step, result[-1][1] + share * (value - result[-1][1])))
    return result


def draw(axes: Axes, run: Path, *, share: float) -> None:
    values = series(run)
    is_vae = "psnr" in values
    wanted = ["psnr"] if is_vae else ["loss", *sorted(name for name in values if name.startswith("loss/"))]
    for name in wanted:
        label = name.removeprefix("loss/").replace("_", " ")
        axes.plot(*zip(*smoothed(values[name], share), strict=True), label=label, linewidth=1)
    for name in ("validation_psnr", "validation_loss"):
        if name in values:
            axes.plot(*zip(*values[name], strict=True), "k.-", label=name.replace("_", " "))
    axes.set(title=run.name, xlabel="step", ylabel="PSNR, dB" if is_vae else "loss")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.1, help="of a new value in the running mean")
    arguments = parser.parse_args()
    figure, axes = pyplot.subplots(
        1, len(arguments.runs), figsize=(4.5 * len(arguments.runs), 3.4), squeeze=False
    )
    for one, run in zip(axes[0], arguments.runs, strict=True):
        draw(one, run, share=arguments.share)
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=110)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
