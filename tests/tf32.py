"""What CUDA does to products of float32 matrices where TF32 is on, on any machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def precision() -> Any:
    """The setting of products, under the name that this version of torch has for it."""
    setting: Any = torch.backends.cuda.matmul
    return getattr(setting, "fp32_precision" if hasattr(setting, "fp32_precision") else "allow_tf32")


def rounded_to_tf32(x: Tensor) -> Tensor:
    """What CUDA's tensor cores read of float32 numbers: the first 10 of 23 digits of the mantissa."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


class Tf32(TorchDispatchMode):
    """Rounds the factors of products of float32 matrices as CUDA would, by the setting of the moment."""

    rounded = 0
    first_factor = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}  # noqa: RUF012

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = self.first_factor.get(func.overloadpacket.__name__)
        if first is not None and args[first].dtype == torch.float32 and precision() in ("tf32", True):
            self.rounded += 1
            factors = [rounded_to_tf32(factor) for factor in args[first : first + 2]]
            args = (*args[:first], *factors, *args[first + 2 :])
        return func(*args, **(kwargs or {}))
