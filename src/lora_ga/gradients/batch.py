"""One batch through the model: its loss, its backward pass, and the scale of its gradients."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor

from lora_ga.base import base_model
from lora_ga.distributed.processes import in_group
from lora_ga.gradients.isolation import computes_in_float16, grad_kept, input_device
from lora_ga.gradients.loss import BatchError, LossFunction, counted_labels, weighed_loss
from lora_ga.gradients.noise import NoiseOff, RandomStates
from lora_ga.layers.targets import peft_model_in


@contextlib.contextmanager
def batch_in_errors(number: int) -> Iterator[None]:
    """Name the batch in the errors of the block: in the message of ours, in a note below those of the model.

    Args:
        number: The batch's number, from 1.

    Yields:
        Nothing.

    Raises:
        ValueError: The batch's loss or gradient cannot be used.
    """
    try:
        yield
    except BatchError as error:
        raise ValueError(f"batch {number}: {error}.") from error
    except FloatingPointError as error:
        raise ValueError(
            f"batch {number}: {error}. Check that batch, or compute in float32 or bfloat16 (float16 overflows)."
        ) from error
    except Exception as error:
        if sys.version_info >= (3, 11):
            error.add_note(f"This happened in batch {number} of those that LoRA-GA reads.")
        raise


class BatchPass:
    """The forward and backward pass of one batch, without the noise of training (see `noise`).

    Attributes:
        noise: Switches the noise off, and has noted the random numbers that were drawn all the same.
    """

    def __init__(self, model: Any, loss_fn: LossFunction | None, passed: Callable[[], None] = lambda: None) -> None:
        """Pass batches through `model` with `loss_fn`, or with the model's own loss; `passed` is called after each."""
        self.model, self.loss_fn, self.passed = model, loss_fn, passed
        self.device = input_device(model)
        self.float16 = computes_in_float16(model, self.device)
        self.noise = NoiseOff(base_model(peft_model_in(model)))
        # Whether `NoiseOff` may be left out, as far as the passes have shown. Only where a batch can run twice: a loss
        # of the caller may have a state, and other processes may wait for each pass.
        self._silent = loss_fn is None and self.device.type in ("cpu", "cuda") and not in_group()

    def forward(self, batch: Any) -> tuple[Tensor, float]:
        """The loss of a batch, and the batch's weight in the mean of all.

        `NoiseOff` slows down every call. If it had nothing to do in the first batch, the next ones run without it, and
        the random generators show whether it was needed after all: then the batch runs again, and it stays on.

        Returns:
            The loss and the weight.
        """
        # Labels are counted where the data has them: on a device, the host would wait for the count.
        counted = counted_labels(self.model, batch, self.loss_fn)
        batch = send_to_device(batch, self.device)
        states = RandomStates.now() if self._silent else None
        with self.noise:
            found = weighed_loss(self.model, batch, self.loss_fn, counted)
        if states is None or states.torch_unchanged():
            return found
        self._silent = False
        if self.noise.needed:
            return found
        del found
        states.restore()
        self.noise.needed = True
        with self.noise:
            return weighed_loss(self.model, batch, self.loss_fn, counted)

    def backward(self, loss: Tensor, weight: float, starts: Sequence[Tensor]) -> None:
        """The backward pass of a batch. No other `.grad` changes than those of `starts`.

        Args:
            loss: The loss.
            weight: The batch's weight.
            starts: The leaves to which the pass has to go so that the gradients are recorded.
        """
        states = RandomStates.now() if self._silent else None
        self._backward(loss, weight, starts)
        self._silent = self._silent and states is not None and states.torch_unchanged() and not self.noise.acted
        self.noise.needed = not self._silent
        self.passed()

    def _backward(self, loss: Tensor, weight: float, starts: Sequence[Tensor]) -> None:
        if not loss.requires_grad:  # no layer of the adapter ran; these are named after the pass
            return
        scaled = loss * self._magnification(weight) if self.float16 else loss
        leaves, reentrant = _leaves(scaled)
        reached = any(leaf is start for leaf in leaves for start in starts)
        if reached and not reentrant:
            with self.noise:  # checkpointed layers run again
                scaled.backward(inputs=list(starts))
            return
        # A reentrant checkpoint makes a backward pass of its own, which accumulates in all leaves, and it refuses
        # `inputs`. So does a loss whose graph ends before the model, and whose hook runs the model again, as cached
        # losses of sentence-transformers have it. `Setup.isolated` keeps the `.grad` of parameters that it uses.
        with grad_kept([leaf for leaf in leaves if not any(leaf is start for start in starts)]), self.noise:
            scaled.backward()

    def scale(self, weight: float) -> float:
        """The factor that turns the gradients of `backward` into those of the batch's share in the sum of all."""
        return weight / self._magnification(weight)

    def _magnification(self, weight: float) -> float:
        """The factor of the loss in the backward pass: 1, or in float16 the power of two nearest to the weight."""
        # In float16 the gradients of a mean over many tokens would vanish. Multiplying by a power of two is exact.
        return 2.0 ** round(math.log2(weight)) if self.float16 else 1.0


def _leaves(loss: Tensor) -> tuple[list[Tensor], bool]:
    """The leaves in which a backward pass from a loss accumulates gradients.

    Returns:
        The leaves, and whether the graph has a reentrant checkpoint. What such a checkpoint uses inside is not in the
        graph before the backward pass.
    """
    if loss.grad_fn is None:
        return [loss], False
    leaves, reentrant = [], False
    waiting = [loss.grad_fn]
    seen = set(waiting)
    while waiting:
        node: Any = waiting.pop()
        name = type(node).__name__  # `node.name()` may be hidden by what a Function has stored in its `ctx`
        if name == "AccumulateGrad":
            leaves.append(node.variable)
        # CheckpointFunction (torch, DeepSpeed), Unsloth_Offloaded_Gradient_Checkpointer and others.
        reentrant = reentrant or "checkpoint" in name.lower()
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return leaves, reentrant
