"""Hooks that read the gradient of layers and of parameters, without asking anything of their weights.

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

Sink = Callable[[str, Tensor, Tensor], None]
# What a layer was called with, and its output's gradient → the parts of its weight, with (T, I) and (T, O) for each.
Rows = Callable[[Tensor, Tensor], Iterable[tuple[str, Tensor, Tensor]]]


@dataclasses.dataclass
class Heard:
    """Names of the layers that ran, and of those whose output got a gradient.

    Sets, never counts: a layer may be called twice in a pass, or once more by gradient checkpointing.

    Attributes:
        ran: Layers that ran.
        got_gradient: Layers whose output got a gradient.
        release: Layer → what ends the listening to it.
    """

    ran: set[str] = dataclasses.field(default_factory=set)
    got_gradient: set[str] = dataclasses.field(default_factory=set)
    release: dict[str, Callable[[], None]] = dataclasses.field(default_factory=dict)


class _Listen(torch.autograd.Function):
    """The identity, whose backward pass hands (x, g) to the sink.

    A tensor hook on the output would be dropped without an error when the layer has a bias, its input is 3-D (the
    output is then a view) and the model changes the output in place; and a closure over x would hide x from
    activation checkpointing, which only sees what goes through `save_for_backward`.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, name: str, hand_over: Sink) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name, ctx.hand_over = name, hand_over
        # Not `y` nor a view of it: autograd refuses to let the model change such an output in place.
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (g,) = gradients
        (x,) = ctx.saved_tensors
        ctx.hand_over(ctx.name, x, g)
        return g, None, None, None


def flat(name: str, x: Tensor, g: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The rows of a layer that maps `(..., I)` to `(..., O)`."""
    yield name, x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])


@contextlib.contextmanager
def record(layers: Mapping[str, nn.Module], sink: Sink, rows: Mapping[str, Rows] | None = None) -> Iterator[Heard]:
    """Call `sink(name, x, g)` for every call of every layer, when its gradient arrives in the backward pass.

    The layers' parameters may be frozen, quantised or sharded. Where a layer's output does not require a gradient,
    the graph is started there. Owns all its hooks and removes them on leaving, also after an error.

    Args:
        layers: Modules, with their first argument as x.
        sink: Receives the layer's (or part's) name, x as (T, I) and ∂L/∂y as (T, O), in the dtypes of the pass.
        rows: For layers that do not map `(..., I)` to `(..., O)`, or have several parts: layer name → how x and ∂L/∂y
            become rows.

    Yields:
        What has been heard so far.
    """
    heard = Heard()

    def hand_over(name: str, x: Tensor, g: Tensor) -> None:
        heard.got_gradient.add(name)
        with torch.no_grad():
            for key, x_TI, g_TO in (rows or {}).get(name, functools.partial(flat, name))(x, g):
                if len(x_TI):
                    sink(key, x_TI, g_TO)

    def listen(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            heard.ran.add(name)
            if not torch.is_grad_enabled():  # the first pass of reentrant checkpointing; the second comes with grad
                return output
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            x = args[0] if args else next(iter(kwargs.values()))
            return _Listen.apply(output, x.detach(), name, hand_over)

        return hook

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_hook(listen(name), with_kwargs=True)
            stack.callback(handle.remove)
            heard.release[name] = handle.remove
        yield heard


class _ListenToWeight(torch.autograd.Function):
    """The identity of a frozen weight, whose backward pass hands over ∂L/∂W and asks nothing of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, name: str, hand_over: Callable[[str, Tensor], None]) -> Tensor:
        ctx.name, ctx.hand_over = name, hand_over
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.hand_over(ctx.name, gradients[0])
        return None, None, None


def _shadowed(
    name: str, parameter: str, heard: Heard, hand_over: Callable[[str, Tensor], None]
) -> tuple[Callable[..., None], Callable[..., None]]:
    """The two hooks of one parameter: for the length of a call the module's attribute is the listening tensor.

    An entry in the module's `__dict__` is found before the parameter, so one graph node serves the whole call, however
    often the module reads the weight.

    Returns:
        The hook before the call and the one after it.
    """

    def before(module: nn.Module, *_: Any) -> None:
        heard.ran.add(name)
        weight = getattr(module, parameter)
        if weight.is_meta:
            raise ValueError(
                f"{name}: its weight is on the meta device while the layer runs (offloaded parameters of fused layers "
                "cannot be listened to). Load the model without offloading this layer."
            )
        if torch.is_grad_enabled():
            leaf = weight.detach().requires_grad_()
            module.__dict__[parameter] = _ListenToWeight.apply(leaf, name, hand_over)

    def after(module: nn.Module, *_: Any) -> None:
        module.__dict__.pop(parameter, None)

    return before, after


@contextlib.contextmanager
def record_weights(
    owners: Mapping[str, tuple[nn.Module, str]], sink: Sink, rows: Mapping[str, Rows], heard: Heard
) -> Iterator[None]:
    """Call `sink` for every part of a parameter that got a gradient in a backward pass.

    The whole gradient of one parameter, (E, O, I), exists while its layer is passed, as it does in training it.

    Args:
        owners: Layer name → the module that holds the parameter, and the parameter's name.
        sink: Receives a part's name, and x and g with `G = gᵀ x`.
        rows: Layer name → how ∂L/∂W becomes rows of its parts (called with it twice).
        heard: Where what has been heard so far is noted.

    Yields:
        Nothing.
    """

    def hand_over(name: str, gradient: Tensor) -> None:
        heard.got_gradient.add(name)
        with torch.no_grad():
            for key, x_TI, g_TO in rows[name](gradient, gradient):
                sink(key, x_TI, g_TO)

    with contextlib.ExitStack() as stack:
        for name, (module, parameter) in owners.items():
            before, after = _shadowed(name, parameter, heard, hand_over)
            ends = contextlib.ExitStack()  # called twice it does nothing the second time
            ends.callback(module.__dict__.pop, parameter, None)
            ends.callback(module.register_forward_pre_hook(before).remove)
            ends.callback(module.register_forward_hook(after, always_call=True).remove)
            heard.release[name] = ends.close
            stack.callback(ends.close)
        yield
