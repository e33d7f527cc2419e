"""torch.compile of a denoiser's blocks, without a silent end: once torch has compiled a function for too many
kinds of inputs, it runs it eagerly, and says so in a log only.
"""

from typing import Any

import torch._dynamo

from opensoraplan.models.sparse_ummdit import SparseUMMDiT


def compile_blocks(model: SparseUMMDiT, **options: Any) -> None:  # noqa: ANN401 (torch.compile's)
    """Compile what all blocks share, see `SparseUMMDiTBlock.compile`. From now on, too many kinds of inputs
    are an error in the whole process.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    model.compile_repeated_blocks(**options)
