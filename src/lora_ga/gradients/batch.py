"""One batch through the model: its loss, its backward pass, and what its gradient counts for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor

from lora_ga.gradients.isolation import device_of, in_half
from lora_ga.gradients.loss import BatchError, LossFunction, weighed_loss


@contextlib.contextmanager
def numbered(index: int) -> Iterator[None]:
    """Say of which batch an error is.

    Args:
        index: The batch's number, from 1.

    Yields:
        Nothing.

    Raises:
        ValueError: The batch's loss or gradient cannot be used.
    """
    try:
        yield
    except BatchError as error:
        raise ValueError(f"batch {index}: {error}.") from error
    except FloatingPointError as error:
        raise ValueError(
            f"batch {index}: {error}. Check that batch, or compute in float32 or bfloat16 (float16 overflows)."
        ) from error


class Pass:
    """Passes batches through a model, one at a time.

    Attributes:
        scale: What the gradients of the backward pass under way are to be multiplied with: the batch's weight over
            what its loss was multiplied with; 0 while nothing is listened to.
    """

    def __init__(self, model: Any, loss_fn: LossFunction | None) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.device = device_of(model)
        self.half = in_half(model, self.device)
        self.scale = 1.0

    def forward(self, batch: Any) -> tuple[Tensor, float]:
        """The loss of a batch and the batch's weight."""
        return weighed_loss(self.model, send_to_device(batch, self.device), self.loss_fn)

    def backward(self, loss: Tensor, weight: float, *, heard: bool = True) -> None:
        """The backward pass of a batch.

        Args:
            loss: Its loss.
            weight: Its weight.
            heard: Whether it counts; else the pass is made for other processes' sake.
        """
        # A mean over many tokens would vanish in float16: pass the power of two next to the sum back.
        magnified = 2.0 ** round(math.log2(weight)) if self.half else 1.0
        self.scale = weight / magnified if heard else 0.0
        if loss.requires_grad:  # else no target ran; said with their names once the pass is over
            (loss * magnified if self.half else loss).backward()
