"""Hooks that record the gradients of layers and of parameters, which may be frozen, quantised or sharded.

The gradient of a layer's weight is `G = gᵀ x`, with x its input and g the gradient of its output. The hooks pass x and
g on and never form G. Only a parameter that no layer applies (fused experts) has its gradient formed.

Shapes: T tokens, E experts, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_ga.gradients.isolation import shadow_parameter, unshadow_parameter
from lora_ga.layers.targets import NotOneMatrixError, exclusion_of_class
from lora_ga.linalg.accumulator import Inputs

# Receives the name of a layer or of a part of one, x as (T, I) and g as (T, O), with G = gᵀ x.
Sink = Callable[[str, Inputs, Tensor], None]
# A layer's input and the gradient of its output → the name, (T, I) and (T, O) of each of its parts.
Rows = Callable[[Tensor, Tensor], Iterable[tuple[str, Inputs, Tensor]]]


@dataclasses.dataclass
class Coverage:
    """Which layers ran, and which of them got a gradient.

    These are sets, not counts: a pass may call a layer twice, and gradient checkpointing calls it once more.

    Attributes:
        ran: Layers that ran.
        got_gradient: Layers whose output got a gradient.
        remove_hooks: Layer → removes its hooks.
        start: A leaf that every recorded layer depends on. A backward pass to this leaf alone reaches all of them, and
            accumulates nothing elsewhere. Its own gradient stays None.
    """

    ran: set[str] = dataclasses.field(default_factory=set)
    got_gradient: set[str] = dataclasses.field(default_factory=set)
    remove_hooks: dict[str, Callable[[], None]] = dataclasses.field(default_factory=dict)
    start: Tensor = dataclasses.field(default_factory=lambda: torch.zeros((), requires_grad=True))


# Layers


@contextlib.contextmanager
def record_layers(
    layers: Mapping[str, nn.Module], sink: Sink, rows: Mapping[str, Rows] | None = None
) -> Iterator[Coverage]:
    """Call `sink(name, x, g)` for every call of every layer, when its gradient arrives in the backward pass.

    The graph starts at every layer, also where its output does not require a gradient (see `Coverage.start`). All hooks
    are removed on leaving, also after an error.

    Args:
        layers: Layer name → module; x is its first argument.
        sink: Receives x and g in the dtypes of the pass.
        rows: Layer name → how x and g become rows, for layers that do not map `(..., I)` to `(..., O)` or that have
            several parts.

    Yields:
        Which layers ran and got a gradient so far.

    Raises:
        ValueError: A layer does not return a tensor, or does not apply its weight as one matrix.
    """
    coverage = Coverage()

    def receive(name: str, x: Tensor, g: Tensor) -> None:
        coverage.got_gradient.add(name)
        with torch.no_grad():
            try:
                for key, x_TI, g_TO in (rows or {}).get(name, functools.partial(flat, name))(x, g):
                    if len(x_TI):
                        sink(key, x_TI, g_TO)
            except NotOneMatrixError as error:
                raise _refusal(name, layers, str(error)) from None

    def forward_hook(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            coverage.ran.add(name)
            if not isinstance(output, Tensor):
                reason = f"returns a {type(output).__name__} and not a tensor, so LoRA cannot adapt it"
                raise _refusal(name, layers, reason)
            if not torch.is_grad_enabled():  # the first pass of reentrant checkpointing; the second has gradients on
                return output
            x = args[0] if args else next(iter(kwargs.values()))
            return _RecordOutputGradient.apply(output, x.detach(), coverage.start, name, receive)

        return hook

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_hook(forward_hook(name), with_kwargs=True)
            stack.callback(handle.remove)
            coverage.remove_hooks[name] = handle.remove
        yield coverage


def _refusal(name: str, layers: Mapping[str, nn.Module], reason: str) -> ValueError:
    """The error about a layer whose class cannot be adapted. It says how to leave out all layers of the class."""
    kind = type(getattr(layers[name], "base_layer", layers[name]))
    line = exclusion_of_class(kind, layers)
    return ValueError(f"{name} is a {kind.__name__} that {reason}. Leave such layers out with LoraConfig({line}).")


def flat(name: str, x: Tensor, g: Tensor) -> Iterator[tuple[str, Inputs, Tensor]]:
    """The rows of a layer that maps `(..., I)` to `(..., O)`."""
    yield name, x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])


class _RecordOutputGradient(torch.autograd.Function):
    """The identity; its backward pass calls `receive(name, x, g)`.

    A tensor hook on the output would not do: torch drops it without an error when the layer has a bias, its input is
    3-D (the output is then a view) and the model changes the output in place. Nor would a closure that holds x:
    activation checkpointing only sees what goes through `save_for_backward`.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, start: Tensor, name: str, receive: Callable[[str, Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name, ctx.receive = name, receive
        # Neither `y` nor a view of it: autograd would not let the model change such an output in place.
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (g,) = gradients
        (x,) = ctx.saved_tensors
        ctx.receive(ctx.name, x, g)
        return g, None, None, None, None


# Parameters that no layer applies


@contextlib.contextmanager
def record_parameters(
    owners: Mapping[str, tuple[nn.Module, str]], sink: Sink, rows: Mapping[str, Rows], coverage: Coverage
) -> Iterator[None]:
    """Call `sink` for every part of a parameter that got a gradient in a backward pass.

    The whole gradient of one parameter, (E, O, I), exists while the backward pass is in its layer, as in training it.

    Args:
        owners: Layer name → the module that holds the parameter, and the parameter's name.
        sink: Receives the name of a part, and x and g with G = gᵀ x.
        rows: Layer name → how ∂L/∂W, given as both arguments, becomes rows of its parts.
        coverage: Updated with the layers that ran and got a gradient.

    Yields:
        Nothing.
    """

    def receive(name: str, gradient: Tensor) -> None:
        coverage.got_gradient.add(name)
        with torch.no_grad():
            for key, x_TI, g_TO in rows[name](gradient, gradient):
                sink(key, x_TI, g_TO)

    with contextlib.ExitStack() as stack:
        for name, (module, parameter) in owners.items():
            before, after = _parameter_hooks(name, parameter, coverage, receive)
            hooks = contextlib.ExitStack()
            hooks.callback(unshadow_parameter, module, parameter)
            hooks.callback(module.register_forward_pre_hook(before).remove)
            hooks.callback(module.register_forward_hook(after, always_call=True).remove)
            coverage.remove_hooks[name] = hooks.close  # a second close does nothing
            stack.callback(hooks.close)
        yield


def _parameter_hooks(
    name: str, parameter: str, coverage: Coverage, receive: Callable[[str, Tensor], None]
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks that put the recording tensor in the parameter's place for the length of a call.

    So one graph node serves the whole call, however often the module reads the parameter.

    Returns:
        The hook before the call, and the one after it.
    """

    def before(module: nn.Module, *_: Any) -> None:
        coverage.ran.add(name)
        weight = getattr(module, parameter)
        if weight.is_meta:
            raise ValueError(
                f"{name}: its weight is on the meta device while the layer runs. The gradient of a fused layer cannot "
                "be recorded while its parameters are offloaded. Load the model without offloading this layer."
            )
        if torch.is_grad_enabled():
            recorded = _RecordParameterGradient.apply(weight.detach(), coverage.start, name, receive)
            shadow_parameter(module, parameter, recorded)

    def after(module: nn.Module, *_: Any) -> None:
        unshadow_parameter(module, parameter)

    return before, after


class _RecordParameterGradient(torch.autograd.Function):
    """The identity of a parameter; its backward pass calls `receive(name, ∂L/∂W)` and gives the parameter nothing."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, start: Tensor, name: str, receive: Callable[[str, Tensor], None]) -> Tensor:
        ctx.name, ctx.receive = name, receive
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, None]:
        ctx.receive(ctx.name, gradients[0])
        return None, None, None, None
