"""Listening to parameters: the gradient of a weight that no layer of its own applies, as of fused experts.

Shapes: E experts, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_ga.capture import Heard, Rows, Sink


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
