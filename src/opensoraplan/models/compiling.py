"""torch.compile of a denoiser's blocks, without a silent end: once torch has compiled a function for eight
kinds of inputs, it runs it eagerly, and says so in a log only.
"""

from typing import Any

import torch._dynamo

from opensoraplan.models.sparse_ummdit import SparseUMMDiT

# Kinds of inputs that blocks meet: rate 1, others, the last block; one sample or several; one text token (an
# empty negative prompt) or several; masks of video and text; AdaLN vectors given or not; gradients or not.
_MOST_KINDS = 64


def compile_blocks(model: SparseUMMDiT, **options: Any) -> None:  # noqa: ANN401 (torch.compile's)
    """Compile what all blocks share, see `SparseUMMDiTBlock.compile`. From now on, too many kinds of inputs
    are an error in the whole process.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_KINDS)
    config.fail_on_recompile_limit_hit = True
    model.compile_repeated_blocks(**options)
