"""What the dense and the streaming estimator share: their interface, and the dtype and the check of sums.

Shapes: T tokens, I inputs, O outputs, K kept directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lora_ga.linalg.low_rank import LowRank, read


class Size(NamedTuple):
    """How many directions of a layer's gradient to keep, K, and how many of them a start uses, 2r."""

    kept: int
    used: int


@dataclasses.dataclass(frozen=True)
class UnitRows:
    """Rows that are unit vectors, as the inputs of an embedding are. They are never formed.

    Attributes:
        places: (T,), where each row is 1.
        width: I, the length of the rows.
    """

    places: Tensor
    width: int

    def __len__(self) -> int:
        return len(self.places)

    @property
    def shape(self) -> tuple[int, int]:
        """(T, I)."""
        return len(self.places), self.width


Inputs = Tensor | UnitRows


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for a float64 model, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Accumulator(Protocol):
    """Running sums of `weight · gᵀ x` over blocks of tokens, one for each layer."""

    def add(self, name: str, x_TI: Inputs, g_TO: Tensor, weight: float) -> None:
        """Add a block to a layer: inputs (T, I) and output gradients (T, O), of any floating dtype."""

    def flush(self, loss: Tensor | None = None) -> None:
        """Finish the blocks that were added since the last call; called once after each batch.

        Args:
            loss: The batch's loss, which is checked together with the blocks: one wait for the device serves both.

        Raises:
            FloatingPointError: A value in a block, or the loss, was not finite.
        """

    def changes(self) -> dict[str, float]:
        """How far the last batch has moved each layer's leading directions (see `streaming.direction_change`)."""

    def factors(self, names: Iterable[str]) -> dict[str, LowRank]:
        """The leading directions of the sums of layers, without those to which nothing was added."""

    def state(self) -> dict[str, Tensor]:
        """The whole state after a `flush`, as "layer.part" → tensor."""

    def restore(self, tensors: Mapping[str, Tensor], devices: Mapping[str, torch.device]) -> None:
        """Go on from a state that `state` returned, each layer on its device."""

    def absorb(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the state of another process, which has read other batches."""


def all_finite(values: Sequence[Tensor]) -> bool:
    """Whether scalars are finite. The host waits for the device here, and nowhere else in a batch.

    Args:
        values: Scalars of any floating dtype.

    Returns:
        True if all are.
    """
    if not values:
        return True
    first = values[0]
    # A copy from a GPU to the CPU that does not wait could be read before it has arrived.
    waits_not = first.device.type != "cpu"
    own = [each.detach().reshape(()).to(first, non_blocking=waits_not) for each in values]
    return bool(torch.stack(own).isfinite().all())


def refuse_infinite(sums: Mapping[str, Tensor]) -> None:
    """Refuse sums that are not finite.

    Args:
        sums: Layer → a tensor that is not finite if the layer's sum is not.

    Raises:
        FloatingPointError: A sum is not finite; the message names the first layer.
    """
    finite = read([torch.isfinite(each).all().reshape(1) for each in sums.values()])
    bad = [name for name, fine in zip(sums, finite, strict=True) if not fine]
    if bad:
        more = f" (and in {len(bad) - 1} more layers)" if len(bad) > 1 else ""
        raise FloatingPointError(f"{bad[0]}: the gradient is not finite{more}")
