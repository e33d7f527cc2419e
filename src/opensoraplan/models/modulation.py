"""AdaLN vectors of a whole request, computed before its first step.

The linear layers that make them are a seventh of the release's weights, and what they give depends on nothing
but the timestep and the pooled prompt. Once it is computed for all steps, they need not be on the device.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from opensoraplan.models.adaln import AdaNormOut, AdaNormZero, Modulation
from opensoraplan.models.sparse_ummdit import SparseUMMDiT, SparseUMMDiTBlock


class HostLayer(nn.Module):
    """A layer whose weights stay on the host, whatever device the model is moved to, and come over each time
    that they are used. They are no longer in the model's `state_dict`.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer.to("cpu"),)  # in a tuple, where `nn.Module.to` does not look

    def forward(self, x: Tensor) -> Tensor:
        return self.on(x.device)(x)

    def on(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The layer with its weights on the device, as long as what is returned is kept."""
        (layer,) = self._layer
        weights = {name: tensor.to(device) for name, tensor in layer.state_dict().items()}
        return lambda x: functional_call(layer, weights, (x,))


def layer_of(layer: nn.Module) -> nn.Module:
    """The layer itself, of one that is kept on the host."""
    return layer._layer[0] if isinstance(layer, HostLayer) else layer


def adaln_layers(model: SparseUMMDiT) -> Iterator[AdaNormZero | AdaNormOut]:
    """All that the condition modulates: both of each block, then the last one."""
    for block in model.transformer_blocks:
        block = cast(SparseUMMDiTBlock, block)
        yield from (block.norm1, block.norm2)
    yield model.norm_out


def keep_on_host(model: SparseUMMDiT) -> None:
    """Keep the linear layers of all AdaLN on the host from now on, in place. For denoising only."""
    for adaln in adaln_layers(model):
        if not isinstance(adaln.linear, HostLayer):
            adaln.linear = cast(Any, HostLayer(adaln.linear))


def is_kept_on_host(model: SparseUMMDiT) -> bool:
    """Whether `keep_on_host` was called on the model."""
    return isinstance(model.norm_out.linear, HostLayer)


@torch.no_grad()
def modulations(
    model: SparseUMMDiT, conditions: Sequence[tuple[Tensor, Tensor]], *, device: torch.device
) -> list[Modulation]:
    """What a `forward` of each (timestep [B] or [B, T], pooled vector [B, P]) would compute, on the device:
    the weights of one layer after the other are there meanwhile. The condition is computed on the device that
    has the weights for it.
    """
    home = model.time_text_embed.text_embedder.linear_1.weight.device
    inputs = []
    for timestep, pooled in conditions:
        cond, _ = model.condition(timestep, pooled.to(home))
        inputs.append(F.silu(cond).to(device, pooled.dtype))
    outputs = []
    for adaln in adaln_layers(model):
        layer = adaln.linear.on(device) if isinstance(adaln.linear, HostLayer) else adaln.linear
        outputs.append([layer(x) for x in inputs])
    return [
        Modulation(blocks=list(zip(vectors[:-1:2], vectors[1::2], strict=True)), out=vectors[-1])
        for vectors in zip(*outputs, strict=True)
    ]
