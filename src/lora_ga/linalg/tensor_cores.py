"""How products of float32 matrices round: as float32, or on the tensor cores of a GPU to TF32."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

# With a model on several devices, the backward pass has a thread for each, and the setting is one for all.
_one_at_a_time = threading.RLock()
# The five operations that products in TF32 need besides take some 5 µs each to start. In that time an A100, without
# its tensor cores, multiplies this many pairs of float32 numbers (19.5 TFLOPS by its data sheet).
LARGE = 2**28
_LEADING = -(1 << 13)  # of the 23 digits of float32's mantissa, the first 10


def exact_in_tf32(tensor: Tensor) -> bool:
    """Whether a tensor is on CUDA and in a dtype whose numbers TF32 has: bfloat16 or float16."""
    return tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16)


def gains_from_tf32(multiplications: int) -> bool:
    """Whether tensor cores save more time in a block than the operations cost that keep its sums exact."""
    return multiplications >= LARGE


@contextlib.contextmanager
def float32_products(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Set how float32 matrices are multiplied. Threads take turns in this block; it may be nested.

    Args:
        precision: "tf32": CUDA may round the factors to TF32 (8 bits of exponent, 10 of mantissa), with sums in
            float32. "ieee": no device rounds them, also where the user allows it
            (`torch.set_float32_matmul_precision`).

    Yields:
        Nothing. On leaving, the setting is as before.
    """
    rounds = precision == "tf32"
    with _one_at_a_time, contextlib.ExitStack() as stack:
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            backends = [torch.backends.cuda] if rounds else [torch.backends.cuda, torch.backends.mkldnn]
            for setting in [backend.matmul for backend in backends]:
                _change(setting, precision, stack)
        else:  # torch up to 2.8; a later one refuses to read the old setting once the new one was written
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("high" if rounds else "highest")
        yield


def _change(setting: Any, precision: str, stack: contextlib.ExitStack) -> None:
    """Change a setting of products, until `stack` is left."""
    before = setting.fp32_precision
    if before != precision and (before, precision) != ("none", "ieee"):  # "none" is ieee
        stack.callback(setattr, setting, "fp32_precision", before)
        setting.fp32_precision = precision


def leading_digits(x: Tensor) -> Tensor:
    """Float32 numbers cut to the digits that TF32 has."""
    return x.view(torch.int32).bitwise_and(_LEADING).view(torch.float32)


def cut_to_tf32_(x: Tensor) -> Tensor:
    """Cut float32 numbers in place to the digits that TF32 has, so that a product does not round them."""
    x.view(torch.int32).bitwise_and_(_LEADING)
    return x
