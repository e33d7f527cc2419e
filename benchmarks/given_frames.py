"""Time of a denoising step whose first frame is given, as a multiple of one without.

    python benchmarks/given_frames.py

Both are measured by turns in one run. Models: the built-in one on 25 x 96 x 128, and a wider one, eager.
"""

import statistics
import time

import torch

from opensoraplan import builtin
from opensoraplan.models.sparse_ummdit import SparseUMMDiT

WIDE = {
    "num_attention_heads": 6,
    "attention_head_dim": 128,
    "num_layers": (2, 2, 2),
    "sparse_n": (1, 2, 1),
    "caption_channels": 256,
}
TURNS = 9


@torch.no_grad()
def ratio(model: SparseUMMDiT, grid: tuple[int, int, int]) -> tuple[float, float]:
    """Seconds of a forward pass without given frames, and the median ratio of those with to it."""
    config = model.config
    told = {
        "hidden_states": torch.randn(2, config["in_channels"], *grid),
        "encoder_hidden_states": torch.randn(2, 40, config["caption_channels"]),
        "pooled_projections": torch.randn(2, config["pooled_projection_dim"]),
    }
    plain = torch.full((2,), 500.0)
    given = plain[:, None].repeat(1, grid[0])
    given[:, 0] = 0
    times: dict[str, list[float]] = {"plain": [], "given": []}
    for _ in range(TURNS + 1):
        for name, timestep in (("plain", plain), ("given", given)):
            start = time.process_time()
            model(**told, timestep=timestep)
            times[name].append(time.process_time() - start)
    pairs = zip(times["plain"][1:], times["given"][1:], strict=True)
    return statistics.median(times["plain"][1:]), statistics.median(other / one for one, other in pairs)


def main() -> None:
    torch.set_num_threads(1)
    small = SparseUMMDiT.from_pretrained(builtin.folder() / "transformer", torch_dtype=torch.float32)
    for name, model, grid in (
        ("built-in, 4 x 12 x 16", small, (4, 12, 16)),
        ("width 768, 4 x 16 x 24", SparseUMMDiT(**WIDE), (4, 16, 24)),
    ):
        seconds, times = ratio(model.eval(), grid)
        print(f"{name}: {seconds:.3f} s without, x {times:.3f} with a first frame")


if __name__ == "__main__":
    main()
