"""Optimizers that read the values of their parameters: during a step they find A and B.

With offset="adapter" the trained parameters hold dA and dB, which are zero at the start. Most optimizers compute their
step from gradients alone, so this makes no difference to them. Others multiply A and B with each other, or scale the
step by a parameter's norm. For the time of such an optimizer's step the parameters hold A₀ + dA and B₀ + dB. The path
of training is then that of offset="base".
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lora_ga.warn import warn

if TYPE_CHECKING:
    from lora_ga.layers.factors import Delta

# The names of the classes whose step depends on the values of the parameters. Found by running each optimizer of torch
# 2.13, Transformers 5.24, PEFT 0.21.2, bitsandbytes 0.50.2, pytorch-optimizer 4.1.0 and timm 1.0.31 from two starts
# with the same gradients and without weight decay. Not run: FusedLAMB (apex), FusedLamb (DeepSpeed), GSAM.
READERS = frozenset(
    {
        # These multiply A and B.
        *("LoRARite", "LoraFAOptimizer", "RiemannianPreconditionedOptimizer"),
        # These scale the step by the norm of the parameter.
        *("Adafactor", "AdaFactor", "Adalite", "Amos", "Fromage", "Nero", "Ranger21", "SpectralSphere"),
        *("FusedLAMB", "FusedLamb", "LAMB", "LAMB32bit", "LAMB8bit", "Lamb"),
        *("LARS", "LARS32bit", "LARS8bit", "Lars", "PytorchLARS"),
        # These remove the part of the step along the parameter, or average the parameters' values.
        *("AdamP", "OrthoGrad", "SGDP", "FOCUS", "SRMM"),
        # These scale the disturbance of sharpness-aware minimisation by the parameter.
        *("FriendlySAM", "GSAM", "LookSAM", "SAM", "WSAM"),
    }
)
# Options of parameter groups without which these classes do not read values: the first is Adafactor's (torch's own
# Adafactor has no such option, and always reads), the second SAM's.
OPTIONS = ("scale_parameter", "adaptive")

_deltas: weakref.WeakSet[Delta] = weakref.WeakSet()
_changed: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[Delta]] = weakref.WeakKeyDictionary()
_seen_moving: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def follow(factor: Delta) -> None:
    """From now on let optimizers that read values find the factor itself in the parameter of a `Delta`.

    Args:
        factor: The new factor, or a copy of one.
    """
    _deltas.add(factor)
    _watch_steps()


@functools.cache
def _watch_steps() -> None:
    """Register the hooks below, once, with every optimizer of torch. They act on the parameters of factors alone."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def reads_values(optimizer: Optimizer) -> bool:
    """Whether an optimizer's step depends on the values of its parameters, apart from weight decay."""
    if READERS.isdisjoint(kind.__name__ for kind in type(optimizer).__mro__):
        return False
    return any(all(group.get(option, True) for option in OPTIONS) for group in optimizer.param_groups)


def starts_of(parameters: Iterable[Tensor]) -> dict[int, Tensor]:
    """The starts A₀ and B₀ of parameters that hold changes, for optimizers that add them up themselves.

    Args:
        parameters: Parameters of any kind.

    Returns:
        `id` of a parameter → its start. Parameters that hold A or B themselves have no entry.
    """
    held = {id(parameter) for parameter in parameters}
    found = ((id(factor.trainable), factor) for factor in _deltas)
    return {key: factor.start for key, factor in found if key in held and not factor.holds_factor}


def _factors_of(optimizer: Optimizer) -> list[Delta]:
    """The factors whose parameters an optimizer holds."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [factor for factor in _deltas if id(factor.trainable) in held]


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    """Put A or B into the parameters, if the optimizer reads them."""
    if not reads_values(optimizer):
        return
    for factor in _factors_of(optimizer):
        if not factor.holds_factor:
            factor.hold_factor(True)
            _changed.setdefault(optimizer, weakref.WeakSet()).add(factor)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    """Put dA or dB back into the parameters that this optimizer's step found otherwise.

    A step that raises an error ends without this. Its factors then go on holding A or B, and compute with them as they
    should, until the optimizer's next step.
    """
    for factor in _changed.pop(optimizer, ()):
        factor.hold_factor(False)
    if optimizer not in _seen_moving and not reads_values(optimizer):
        _check_movement(optimizer)


def _check_movement(optimizer: Optimizer) -> None:
    """Warn if a step of an optimizer that is not among `READERS` has moved no factor, though it should have."""
    factors = [factor for factor in _factors_of(optimizer) if not factor.storage.spread]
    if not any(map(_rate, optimizer.param_groups)):  # a warm-up begins with zero
        return
    gradients = [factor.trainable.grad for factor in factors]
    if factors and not any(gradient is not None and bool(gradient.any()) for gradient in gradients):
        return
    _seen_moving.add(optimizer)
    if factors and not any(bool(factor.trainable.any()) for factor in factors):
        name = type(optimizer).__name__
        warn(
            f"The first step of {name} has changed no parameter of the adapter, though their gradients are not zero. "
            f"{name} may compute with the values of its parameters: by default LoRA-GA trains the changes of A and B, "
            'which are zero at the start. Use LoraGAConfig(offset="base"), whose parameters are A and B, or another '
            "optimizer."
        )


def _rate(group: Mapping[str, Any]) -> float:
    """The learning rate of a parameter group; 1 if the group states none."""
    return float(group.get("lr", 1.0) or 0.0)
