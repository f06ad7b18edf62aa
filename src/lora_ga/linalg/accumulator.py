"""What both estimators have in common: the interface, the sizes, the dtype of sums, the check that they are finite.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lora_ga.linalg.low_rank import (
    LowRank,
)


class Size(NamedTuple):
    """What an accumulator has to know of a layer: the directions K to keep, and how many of them, 2r, a start uses."""

    kept: int
    used: int


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for a float64 model, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Accumulator(Protocol):
    """Running sums of `weight · gᵀ x` over blocks of tokens, by layer."""

    def add(self, name: str, x_TI: Tensor, g_TO: Tensor, weight: float) -> None:
        """Add a block to a layer: inputs (T, I) and output gradients (T, O), of any floating dtype."""

    def flush(self) -> None:
        """Settle what has been added, once a batch.

        Raises:
            FloatingPointError: A number in a block was not finite.
        """

    def changes(self) -> dict[str, float]:
        """How far the last batch has turned the leading directions (`lowrank.turned`), of layers seen before it."""

    def factors(self, name: str) -> LowRank | None:
        """The leading directions of a layer's sum; None if no token has been seen."""

    def state(self) -> dict[str, Tensor]:
        """All that is held, by a name that begins with the layer's; after a `flush`."""

    def restore(self, tensors: Mapping[str, Tensor], devices: Mapping[str, torch.device]) -> None:
        """Take up what `state` gave."""

    def absorb(self, tensors: Mapping[str, Tensor]) -> None:
        """Add what another process's `state` gave, of other batches."""


def refuse_infinite(sums: Mapping[str, Tensor]) -> None:
    """Refuse sums that are not finite; the one moment in a batch at which the host waits for the device.

    Raises:
        FloatingPointError: There are such, with the layers' names.
    """
    if not sums:
        return
    finite = torch.stack([torch.isfinite(each).all() for each in sums.values()]).tolist()
    bad = [name for name, fine in zip(sums, finite, strict=True) if not fine]
    if bad:
        more = f" (and in {len(bad) - 1} more layers)" if len(bad) > 1 else ""
        raise FloatingPointError(f"{bad[0]}: the gradient is not finite{more}")
