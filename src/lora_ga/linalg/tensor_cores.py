"""Products of float32 matrices on the tensor cores of a GPU, which round the factors to TF32."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# With a model on several devices, the backward pass has a thread for each, and the setting is one for all.
_one_at_a_time = threading.Lock()


def exact_in_tf32(tensor: Tensor) -> bool:
    """Whether a tensor is on CUDA and in a dtype whose numbers TF32 has: bfloat16 or float16."""
    return tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Let CUDA multiply float32 matrices in TF32 (8 bits of exponent, 10 of mantissa), with sums in float32.

    Args:
        on: Whether to; otherwise nothing changes.

    Yields:
        Nothing. On leaving, the setting is as before.
    """
    if not on:
        yield
        return
    setting: Any = torch.backends.cuda.matmul
    # torch up to 2.8 has `allow_tf32` alone; later it refuses to read it once the new name was written.
    name, wanted = ("fp32_precision", "tf32") if hasattr(setting, "fp32_precision") else ("allow_tf32", True)
    with _one_at_a_time:
        before = getattr(setting, name)
        setattr(setting, name, wanted)
        try:
            yield
        finally:
            setattr(setting, name, before)
