"""Random noise that a model adds in training mode only (dropout and the like): what it is, and how it is switched off.

An estimate runs the model as it trains, less this noise. Two ways find it. The rates that modules and configurations
hold are set to 0 (`rates` finds them; `isolation.py` sets and restores them). Functions of torch that add noise are
called without it (`NoiseOff`), whatever rate a model passes to them. Random numbers that a model draws otherwise may
be noise or part of its loss. They stay, and a warning names the module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lora_ga.warn import warn

# Names of rates: dropout, attention_dropout, drop_prob, drop_path, layerdrop, and the noise on embeddings of NEFTune
# ("NEFTune: Noisy Embeddings Improve Instruction Finetuning", Jain et al., 2023), which is not a share of 1.
RATE = re.compile(r"drop")
SIZES = ("neftune_noise_alpha",)
# SpecAugment (Park et al., 2019) in Transformers' configurations of speech models.
MASKS = ("mask_time_prob", "mask_feature_prob")
# Layers that are dropout: Dropout, DropPath, StochasticDepth, DropBlock, XDropout, in any library.
DROPS = re.compile(r"drop(out|path|block|connect|layer)|stochasticdepth", re.IGNORECASE)
# How libraries name layer dropout. Transformers draws a number for each layer even where the rate is 0.
LAYERDROP = re.compile(r"layer_?drop")


def drops(module: nn.Module) -> bool:
    """Whether a module is a dropout layer of some kind, by the name of its class or of an ancestor.

    Args:
        module: A module.

    Returns:
        Whether it is. A module with parameters or with other modules inside is none, whatever its name.
    """
    if next(module.children(), None) is not None or next(module.parameters(recurse=False), None) is not None:
        return False
    return any(DROPS.search(kind.__name__.replace("_", "")) for kind in type(module).__mro__)


def rates(holder: Any) -> list[str]:
    """The attributes of a module or of a configuration that say how much noise it adds.

    Args:
        holder: The module or the configuration.

    Returns:
        Their names. Their values are above 0, and 0 means no noise.
    """
    is_drop = isinstance(holder, nn.Module) and drops(holder)
    return [
        name
        for name, value in vars(holder).items()
        if type(value) is float
        and ((0 < value <= 1 and (RATE.search(name) or name in MASKS or (is_drop and name == "p"))) or name in SIZES)
    ]


# Functions of torch that add noise → position, name and new value of the argument that switches it off.
_FIRST = (1, "p", 0.0)
ARGUMENTS: Mapping[Callable[..., Any], tuple[int, str, Any]] = {
    **dict.fromkeys(
        (
            functional.dropout,
            functional.dropout1d,
            functional.dropout2d,
            functional.dropout3d,
            functional.alpha_dropout,
            functional.feature_alpha_dropout,
            torch.dropout,
            torch.dropout_,
            torch.feature_dropout,
            torch.feature_dropout_,
            torch.alpha_dropout,
            torch.alpha_dropout_,
            torch.feature_alpha_dropout,
            torch.feature_alpha_dropout_,
            torch.native_dropout,
        ),
        _FIRST,
    ),
    **dict.fromkeys((functional.rrelu, torch.rrelu, torch.rrelu_), (3, "training", False)),
    functional.scaled_dot_product_attention: (4, "dropout_p", 0.0),
    functional.multi_head_attention_forward: (10, "dropout_p", 0.0),
}
BACKWARD = (Tensor.backward, torch.autograd.backward)
# Functions that draw random numbers for which a model may have any use.
DRAWS = frozenset(
    {
        torch.rand,
        torch.rand_like,
        torch.randn,
        torch.randn_like,
        torch.randint,
        torch.randint_like,
        torch.randperm,
        torch.normal,
        torch.bernoulli,
        torch.multinomial,
        torch.poisson,
        Tensor.uniform_,
        Tensor.normal_,
        Tensor.bernoulli_,
        Tensor.exponential_,
        Tensor.random_,
        functional.gumbel_softmax,
        functional.fractional_max_pool2d,
        functional.fractional_max_pool3d,
    }
)


class NoiseOff(TorchFunctionMode):
    """While it is on, functions of torch add no noise, and random numbers that stay are noted.

    It may be entered again after it was left. Backward passes in it that recompute activations are covered as well.
    Every call of a function of torch passes through it, which costs the host some microseconds.

    Attributes:
        needed: Whether calls pass through it. It may be set where a pass has shown that this changes nothing.
        acted: Whether it has changed or noted a call so far.
        drawn: What draws random numbers that stay: the names of modules' classes, with the function.
    """

    def __init__(self, model: nn.Module) -> None:
        """Switch off the noise of `model` while this is on."""
        super().__init__()
        self.model = model
        self.needed, self.acted = True, False
        self.drawn: dict[str, None] = {}
        self._hooks = contextlib.ExitStack()
        self._before: Any = None

    def __enter__(self) -> NoiseOff:
        """Switch the noise off."""
        self._hooks.callback(self.model.register_forward_pre_hook(self._keep_state).remove)
        self._hooks.callback(self.model.register_forward_hook(self._compare_state).remove)
        if self.needed:
            super().__enter__()
            self._hooks.callback(super().__exit__, None, None, None)
        return self

    def __exit__(self, *error: Any) -> None:
        """Let functions of torch add noise again."""
        self._hooks.close()

    def _keep_state(self, *_: Any) -> None:
        self._before = _state_outside_of_torch()

    def _compare_state(self, model: nn.Module, *_: Any) -> None:
        if model.training and self._before != _state_outside_of_torch():
            self.drawn[f"{type(model).__name__} (numpy or random)"] = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        kwargs = kwargs or {}
        if func in BACKWARD and all(_in_graph(tensor) for tensor in _listed(args[0])):
            return self._backward(*args, **kwargs)
        if (argument := ARGUMENTS.get(func)) is not None:
            self.acted = self.acted or not _given(args, kwargs, *argument)
            args, kwargs = _replaced(args, kwargs, *argument)
        elif func in DRAWS:
            self.acted = True
            if func is Tensor.uniform_ and (mean := _mean_of_noise(*args, **kwargs)) is not None:
                return args[0].fill_(mean)
            self._note(func, args)
        return func(*args, **kwargs)

    def _backward(
        self, tensors: Any, gradient: Any = None, *, grad_tensors: Any = None, inputs: Any = None, **kwargs: Any
    ) -> None:
        """A backward pass with this mode on, for the activations that are computed again.

        torch takes a mode off before it calls `__torch_function__`, and a backward pass runs with the modes that are on
        when it starts. `torch.autograd.backward` does not hand gradient edges, unlike tensors, to a mode.
        """
        losses = _listed(tensors)
        gradients = [gradient] if gradient is not None else list(grad_tensors or [None] * len(losses))
        for index, loss in enumerate(losses):
            if gradients[index] is None and loss.numel() == 1:
                gradients[index] = torch.ones_like(loss)
        edges = None if inputs is None else _edges(_listed(inputs))
        super().__enter__()
        try:
            torch.autograd.backward(_edges(losses), gradients, inputs=edges, **kwargs)
        finally:
            super().__exit__(None, None, None)

    def report(self) -> None:
        """Warn of random numbers that were drawn. They may be noise, or part of the loss."""
        if not self.drawn:
            return
        listed, more = list(self.drawn)[:3], len(self.drawn) - 3
        warn(
            f"Random numbers were drawn in the passes of the estimate, by {', '.join(listed)}"
            f"{f' and {more} more' if more > 0 else ''}. If they are part of the loss (samples, noise to be removed), "
            "this is as in training. If they are dropout of the model's own kind, the gradient contains its noise: "
            "set its rate to 0 for the estimate, or use LoraGAConfig(training_mode=False)."
        )

    def _note(self, func: Any, args: Any) -> None:
        """Note who draws random numbers, if a module in training mode does so with gradients on."""
        if not torch.is_grad_enabled() or (args and isinstance(args[0], nn.Parameter)):
            return  # sampled answers; the first values of a lazy layer
        module = _caller()
        if module is None or not module.training or (func is torch.rand and _drops_layers(module)):
            return
        self.drawn[f"{type(module).__name__} ({func.__name__})"] = None


def _listed(tensors: Any) -> list[Any]:
    """One tensor, or several, as a list."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _in_graph(tensor: Any) -> bool:
    """Whether a backward pass may start from a tensor without a gradient of its own."""
    return isinstance(tensor, Tensor) and tensor.requires_grad


def _edges(tensors: Iterable[Any]) -> list[Any]:
    """The places of tensors in the graph."""
    return [get_gradient_edge(tensor) if isinstance(tensor, Tensor) else tensor for tensor in tensors]


def _given(args: Any, kwargs: Any, position: int, name: str, value: Any) -> bool:
    """Whether one of the arguments of a call has this value. Where it may be left out, this is its default."""
    found = args[position] if len(args) > position else kwargs.get(name, value)
    return isinstance(found, (bool, int, float)) and found == value


def _replaced(args: Any, kwargs: Any, position: int, name: str, value: Any) -> tuple[Any, Any]:
    """The arguments of a call with one of them replaced."""
    if len(args) > position:
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}


def _mean_of_noise(tensor: Tensor, low: Any = 0.0, high: Any = 1.0, **kwargs: Any) -> float | None:
    """The mean of uniform noise: 0 if it is added (NEFTune), 1 if it multiplies (router jitter). None if it is none."""
    low, high = float(kwargs.get("from", low)), float(kwargs.get("to", high))
    mean = next((mean for mean in (0.0, 1.0) if math.isclose(low + high, 2 * mean, abs_tol=1e-6)), None)
    return None if isinstance(tensor, nn.Parameter) else mean


def _caller() -> nn.Module | None:
    """The module in whose method the call under way was made; None outside of modules."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(module := frame.f_locals.get("self"), nn.Module):
            return module
        frame = frame.f_back
    return None


def _drops_layers(module: nn.Module) -> bool:
    """Whether a module or its configuration has a rate of layer dropout, which is 0 while the noise is off."""
    holders = (holder for holder in (module, getattr(module, "config", None)) if hasattr(holder, "__dict__"))
    return any(LAYERDROP.search(name) for holder in holders for name in vars(holder))


def _state_outside_of_torch() -> tuple[Any, ...]:
    """The state of the global generators of numpy and Python."""
    state: Any = np.random.get_state(legacy=False)
    return random.getstate(), state["state"]["key"].tobytes(), state["state"]["pos"], state["gauss"]


@dataclasses.dataclass(frozen=True)
class RandomStates:
    """The states of the global random generators. The host waits for no device.

    Attributes:
        torch: Of torch, on the CPU and on CUDA's devices.
        others: Of random and of numpy.
    """

    torch: tuple[Tensor, ...]
    others: tuple[Any, Any]

    @staticmethod
    def now() -> RandomStates:
        """The present states."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ()
        return RandomStates((torch.get_rng_state(), *cuda), (random.getstate(), np.random.get_state()))

    def torch_unchanged(self) -> bool:
        """Whether torch has drawn no random number since."""
        return all(map(torch.equal, self.torch, RandomStates.now().torch))

    def restore(self) -> None:
        """Put the states back."""
        torch.set_rng_state(self.torch[0])
        if len(self.torch) > 1:
            torch.cuda.set_rng_state_all(self.torch[1:])
        random.setstate(self.others[0])
        np.random.set_state(self.others[1])
