"""Autocast of the simulated card: which operations run in the lower precision, and which in fp32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LOWER = (
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d.input"),
    *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "scaled_dot_product_attention"),
)
_FP32 = (
    *("layer_norm", "group_norm", "rms_norm", "softmax.int", "log_softmax.int", "logsumexp", "norm.Scalar"),
    *("exp", "log", "pow.Tensor_Scalar", "rsqrt", "sum", "sum.dim_IntList", "mse_loss", "l1_loss"),
)
_EXCLUDED = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


def register(everything: torch.library.Library, library: torch.library.Library) -> None:
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for names, lower in ((_LOWER, True), (_FP32, False)):
        for name in names:
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(name, _cast(op, lower=lower), "AutocastPrivateUse1")


def _cast(op: Any, *, lower: bool) -> Callable[..., Any]:  # noqa: ANN401
    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        dtype = torch.get_autocast_dtype("npu") if lower else torch.float32
        with torch._C._ExcludeDispatchKeyGuard(_EXCLUDED):
            return op(*(_in(x, dtype) for x in args), **{key: _in(x, dtype) for key, x in kwargs.items()})

    return run


def _in(x: Any, dtype: torch.dtype) -> Any:  # noqa: ANN401
    eligible = isinstance(x, Tensor) and x.device.type == "npu" and x.is_floating_point()
    return x.to(dtype) if eligible and x.dtype != dtype else x
