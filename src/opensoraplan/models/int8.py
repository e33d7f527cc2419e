"""Matrices of a model kept as int8 on the device, half of what bf16 takes, and cast each time they are used.

On plain torch, so that it is there for every device: torchao's kernels are not for NPUs. What is computed is
computed in the model's own precision.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST = 127


class Int8Linear(nn.Module):
    """A linear layer whose weight is `integers` int8 [out, in] times `scale` [out, 1], one for each output.

    The scale is rounded to the layer's precision before the weight is divided by it, so that only the
    weight's own rounding is lost: at most half of a 127th of the largest weight of the same output.
    """

    integers: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        largest = weight.float().abs().amax(1, keepdim=True)
        scale = (largest / LARGEST).to(weight.dtype).clamp(min=torch.finfo(weight.dtype).tiny)
        integers = (weight.float() / scale.float()).round().clamp(-LARGEST, LARGEST)
        self.register_buffer("integers", integers.to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.integers.to(x.dtype) * self.scale, self.bias)


def keep_as_int8(module: nn.Module) -> None:
    """Give all linear layers inside the module, in place, int8 weights. Not for training: they have no
    gradients. Bytes of the release's: `parallel.estimate.Model.stored`.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            keep_as_int8(child)


def is_int8(module: nn.Module) -> bool:
    """Whether `keep_as_int8` was called on the module."""
    return any(isinstance(child, Int8Linear) for child in module.modules())
