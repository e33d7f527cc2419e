"""What `memory = "auto"` chooses for a LoRA of the release on cards of several sizes, with nothing else on
them: features are in place of text encoders and VAE. By the formulas of `osp plan`; nothing is run.

    python benchmarks/lora_plans.py --tflops 100

TFLOP/s are those of all products, recomputed ones included. GB/s: the rate at which copies to the card take
no longer than the products.
"""

import argparse
from itertools import product
from pathlib import Path

from opensoraplan.models.sizes import BatchShape
from opensoraplan.plan.fits import Fit
from opensoraplan.plan.memory import copied_by_step
from opensoraplan.runtime.placement import MARGIN
from opensoraplan.shapes import latent_shape
from opensoraplan.train.learner.fitting import possible_fits
from opensoraplan.train.run.files import read_run
from opensoraplan.train.run.planning import training_step

RUN = Path(__file__).parents[1] / "configs" / "lora.toml"
SIZES = ((57, 288, 512), (121, 576, 1024))
CARDS = (12, 16, 24, 48, 80)
GB = 10**9


def row(fits: list[Fit], card: int, tflops: float) -> str:
    """What is chosen for a card, behind its size."""
    fit = next((fit for fit in fits if fit.device <= card * GB * (1 - MARGIN)), None)
    if fit is None:
        return "does not fit | | | | |"
    step, adapter = fit.step, fit.step.options.adapter
    assert adapter is not None
    again = f"{step.options.recompute_blocks} of {len(step.model.blocks)}"
    again += " from the host" if step.options.inputs_on_host else ""
    seconds = (step.flops + step.recomputed_flops) / tflops / 1e12
    link = f"{copied_by_step(step) / step.options.accumulate / seconds / GB:.0f}" if adapter.streamed else ""
    where = "streamed" if adapter.streamed else "resident"
    return f"{where} | {again} | {fit.device / GB:.1f} | {fit.host / GB:.1f} | {seconds:.1f} | {link} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tflops", type=float, default=100, help="TFLOP/s that the card computes")
    tflops = parser.parse_args().tflops
    print("| clips | base | card | frozen weights | blocks recomputed | GB | host GB | s a sample | GB/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    run = read_run(RUN)
    for size, base in product(SIZES, ("whole", "int8", "nf4")):
        asked = run.model_copy(update={"adapter": run.adapter.model_copy(update={"base": base})})
        step = training_step(asked, BatchShape(latent_shape(*size), run.text.max_tokens))
        fits = possible_fits(asked, step, device=None)
        for card in CARDS:
            said = "bf16" if base == "whole" else base
            print(f"| {' x '.join(map(str, size))} | {said} | {card} | {row(fits, card, tflops)}", flush=True)


if __name__ == "__main__":
    main()
