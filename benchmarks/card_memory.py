"""Memory of a card, as `osp plan` predicts it and as it is counted on the card in software of
tests/accelerator: no card is needed, and nothing is computed.

    python benchmarks/card_memory.py            42 cases of a small model
    python benchmarks/card_memory.py --release  the release, 121 x 576 x 1024, in some minutes

GB. Streamed weights of the release are those of its first two blocks of each stage, which cost the device as
much as all of them; the host's memory is touched for them.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests" / "accelerator"))

from counting import RELEASE, SMALL, TRAINED, Counted, Models, adapter_of, generating, training
from simulated.device import install

from opensoraplan.defaults import WeightPrecision
from opensoraplan.models.sizes import BatchShape
from opensoraplan.plan.step import TrainingOptions
from opensoraplan.requests import Request
from opensoraplan.runtime.placement import CHUNKS, PLACEMENTS

QUANTISED: tuple[WeightPrecision, ...] = ("int8", "fp8")
SIZES = ((33, 256, 256), (57, 288, 512))
OPTIONS = {
    "bf16": TrainingOptions(),
    "bf16, all blocks again": TrainingOptions(recompute_blocks=14),
    "bf16, half of the blocks again": TrainingOptions(recompute_blocks=7),
    "bf16, feed-forwards again": TrainingOptions(recompute_feed_forwards=14),
    "bf16, 2 micro-batches": TrainingOptions(accumulate=2),
    "bf16, EMA on the host": TrainingOptions(ema="host"),
    "fp32": TrainingOptions(compute="fp32"),
}
ADAPTERS: list[dict[str, Any]] = [
    {"base": base, "streamed": streamed} for base in ("whole", "int8") for streamed in (False, True)
]
SHAPES = {"20480 tokens": BatchShape((20, 64, 64), 128), "few tokens": BatchShape((2, 16, 16), 64)}


def small() -> Iterator[Counted]:
    for size in SIZES:
        request = Request(prompt="any", frames=size[0], height=size[1], width=size[2], steps=2)
        for placement in PLACEMENTS:
            yield from generating(SMALL, request, placement, chunks=(16, 1))
        for weights, placement in itertools.product(QUANTISED, ("resident", "in-turn")):
            yield from generating(SMALL, request, placement, weights=weights, chunks=(16,))
    for shape_name, shape in SHAPES.items():
        for name, options in OPTIONS.items():
            yield training(f"training, {shape_name}, {name}", TRAINED, shape, options)
        for adapter in ADAPTERS:
            asked = TrainingOptions(adapter=adapter_of(TRAINED, **adapter), recompute_blocks=14)
            yield training(f"LoRA, {shape_name}, {_said(adapter)}", TRAINED, shape, asked)


def release() -> Iterator[Counted]:
    request = Request(prompt="any", frames=121, height=576, width=1024, steps=2)
    for placement in ("resident", "in-turn"):
        yield from generating(RELEASE, request, placement, chunks=CHUNKS)
        for weights in QUANTISED:
            yield from generating(RELEASE, request, placement, weights=weights, chunks=CHUNKS)
    yield from generating(Models({"num_layers": [2] * 7}), request, "streamed", chunks=CHUNKS)
    yield training(
        "training, 57 x 576 x 1024, all blocks again",
        {},
        BatchShape((8, 72, 128), 256),
        TrainingOptions(recompute_blocks=32),
    )
    for base in ("whole", "int8"):
        asked = TrainingOptions(adapter=adapter_of({}, base=base), recompute_blocks=32)
        yield training(
            f"LoRA, 57 x 288 x 512, {base}, all blocks again", {}, BatchShape((8, 36, 64), 512), asked
        )


def _said(adapter: dict[str, Any]) -> str:
    placement = "streamed" if adapter["streamed"] else "resident"
    return f"{adapter['base']}, {placement}, all blocks again"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--release", action="store_true", help="the release's size")
    options = parser.parse_args()
    install()
    print("| case | predicted GB | counted GB | off |\n|---|---|---|---|")
    for case in release() if options.release else small():
        print(case, flush=True)


if __name__ == "__main__":
    main()
