"""Short trainings that leave a model as it was: what `find_rate` measures."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim import AdamW, Optimizer

from lora_ga.gradients.batch import BatchPass, batch_in_errors
from lora_ga.gradients.checkpoint import digest_of
from lora_ga.gradients.isolation import (
    called_modules_kept,
    grad_kept,
    modes_kept,
    random_state_kept,
    set_modes,
    unfused_attention,
)
from lora_ga.gradients.loader import data_kept
from lora_ga.gradients.loss import LossFunction, refuse_infinite_loss
from lora_ga.layers.optimizers import starts_of
from lora_ga.layers.targets import peft_model_in
from lora_ga.linalg.low_rank import read

WARMUP = 3  # steps over which the rate of a trial rises
TOLERATED = 0.1  # a loss that rises by more than this share of the loss at the start shows that the rate is too high
OPTIMIZER = "Give a function from a rate to an optimizer: optimizer=lambda rate: torch.optim.AdamW(parameters, rate)."
SAMPLED = 64  # values of each frozen parameter by which a checkpoint recognises the model


class Trials:
    """Short trainings from the start, each of which leaves the parameters as they were."""

    def __init__(
        self,
        network: nn.Module,
        batches: Sequence[Sequence[Any]],
        loss_fn: LossFunction | None,
        optimizer: Callable[[float], Optimizer] | None,
    ) -> None:
        """Train `network` on `batches`, one sequence of them for each step."""
        self.batches, self._pass = batches, BatchPass(network, loss_fn)
        self.parameters = {name: each for name, each in network.named_parameters() if each.requires_grad}
        self.frozen = {name: each for name, each in network.named_parameters() if not each.requires_grad}
        self.layers = [module for module in peft_model_in(network).modules() if isinstance(module, LoraLayer)]
        held = {id(each) for layer in self.layers for each in layer.parameters()}
        self.adapter = [each for each in self.parameters.values() if id(each) in held]
        self._given = optimizer
        self._rates: dict[float, list[float]] = {}  # given rate → those of the optimizer's groups

    def identity(self) -> str:
        """A digest of what trains, A₀ and B₀, the scaling, some values of each frozen parameter, and the batches."""
        found = starts_of(self.parameters.values())
        starts = [found[id(each)] for each in self.parameters.values() if id(each) in found]
        scalings = [layer.scaling for layer in self.layers]
        some = {
            name: each.detach().reshape(-1)[:: max(1, each.numel() // SAMPLED)][:SAMPLED]
            for name, each in self.frozen.items()
            if not each.is_meta
        }
        return digest_of((self.parameters, starts, scalings, some, self.batches))

    def _optimizer(self, rate: float) -> Optimizer:
        """A new optimizer at a rate.

        Returns:
            The given function's, or AdamW.

        Raises:
            TypeError: The given function makes no optimizer.
            ValueError: It is not of the Adam family, or has the same rates as at another rate.
        """
        if self._given is None:
            return AdamW(self.parameters.values(), rate, weight_decay=0.0)
        found = self._given(rate)
        if not isinstance(found, Optimizer):
            raise TypeError(f"optimizer={self._given!r} returned a {type(found).__name__}. {OPTIMIZER}")
        if not is_of_adam(found):
            raise ValueError(
                f"optimizer= makes a {type(found).__name__}, but the rule is for AdamW and its relatives. Leave the "
                "optimizer out, or sweep the rate."
            )
        own = [float(group["lr"]) for group in found.param_groups]
        if any(own == known for other, known in self._rates.items() if other != rate):
            shown = ", ".join(f"{each:g}" for each in own)
            raise ValueError(f"optimizer= gives the learning rates {shown} at every rate. {OPTIMIZER}")
        self._rates[rate] = own
        return found

    def at_start(self) -> tuple[list[float], float]:
        """The losses before any step, and the agreement of the adapter's gradients.

        Returns:
            The loss of each step's batches, and a.

        Raises:
            ValueError: A loss is not finite, they are not above 0, or no gradient reaches the adapter.
        """
        losses, sums, nonzero = [], [torch.zeros_like(each) for each in self.adapter], []
        for place in range(len(self.batches)):
            losses.append(self._loss(place, backward=True, at_start=True))
            for total, parameter in zip(sums, self.adapter, strict=True):
                if parameter.grad is not None:
                    total.add_(parameter.grad.sign())
                    nonzero.append(parameter.grad.count_nonzero().reshape(1))
        counts = sum(read(nonzero))
        if not counts:
            raise ValueError("No gradient reaches the adapter. Check that it is active and takes part in the loss.")
        if not statistics.fmean(losses) > 0:
            raise ValueError(
                f"The loss at the start is {statistics.fmean(losses):.3g}; a search needs one above 0, since it looks "
                "for the rate from which on the loss rises by a tenth. Set the learning rate yourself."
            )
        squares = sum(read([total.double().square().sum().reshape(1) for total in sums]))
        return losses, (squares - counts) / (counts * (len(self.batches) - 1))

    def stable(self, rate: float, losses: Sequence[float]) -> tuple[bool, int]:
        """Whether the first steps at a rate keep the loss of every batch at most slightly above that of the start.

        Returns:
            Whether they do, and how many steps were computed.
        """
        start = [each.detach().clone() for each in self.parameters.values()]
        allowed = TOLERATED * statistics.fmean(losses)
        try:
            optimizer = self._optimizer(rate)
            peaks = [group["lr"] for group in optimizer.param_groups]
            for place, before in enumerate(losses):
                last = place == len(losses) - 1
                loss = self._loss(place, backward=not last)
                if not loss <= before + allowed:  # also where it is not finite
                    return False, place + 1
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * min(1.0, (place + 1) / WARMUP)
                if not last:
                    optimizer.step()
            return True, len(losses)
        finally:
            with torch.no_grad():
                for parameter, values in zip(self.parameters.values(), start, strict=True):
                    parameter.copy_(values)

    def _loss(self, place: int, *, backward: bool, at_start: bool = False) -> float:
        """The loss of the batches of a step, and, if wanted, its gradient in `.grad`."""
        for parameter in self.parameters.values():
            parameter.grad = None
        found = []
        for number, batch in enumerate(self.batches[place], start=1 + place * len(self.batches[place])):
            with batch_in_errors(number):
                loss, weight = self._pass.forward(batch)
                if at_start:
                    refuse_infinite_loss(loss)
            if backward:
                with self._pass.noise:
                    (loss * weight).backward()
            found.append((float(loss.detach()), weight))
        total = sum(weight for _, weight in found)
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad /= total
        return sum(loss * weight for loss, weight in found) / total


def is_of_adam(optimizer: Optimizer) -> bool:
    """Whether an optimizer is of the Adam family, for which the rule is made: its name says so."""
    return "adam" in type(optimizer).__name__.lower()


@contextlib.contextmanager
def as_before(network: nn.Module, data: Any) -> Iterator[None]:
    """Prepare a network for trials; on leaving, all but the values of what trains is as it was before."""
    eager = torch.compiler.set_stance("force_eager")  # a compiled graph calls no hooks of `called_modules_kept`
    with (
        random_state_kept(),
        data_kept(data),
        torch.enable_grad(),
        eager,
        unfused_attention(),
        grad_kept(list(network.parameters())),
        modes_kept(network),
    ):
        set_modes(network, training=True)
        with called_modules_kept(network):
            yield
