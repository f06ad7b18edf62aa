"""Whether a layer computes what its class says: a subclass may have another `forward`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def convolves(module: Any) -> bool:
    """Whether a module that is a convolution by its class computes that of torch. Of other modules: whether it is none.

    Args:
        module: A module.

    Returns:
        Whether it computes the convolution.
    """
    own = next((kind for kind in CONVOLUTIONS if isinstance(module, kind)), None)
    if own is None:
        return True
    kind: Any = type(module)
    return kind.forward is own.forward and kind._conv_forward is own._conv_forward


@torch.no_grad()
def follows_weight(layer: Any) -> bool:
    """Whether a change of the base weight changes the base layer's output as the same change in an adapter does.

    If not, the change cannot be merged into the weight. A class with torch's own `forward` is believed; any other is
    run once, with its weight and with a changed one.

    Args:
        layer: A LoRA layer whose base weight is not quantised.

    Returns:
        Whether it does; True where the weight is not whole in this process.
    """
    base = layer.get_base_layer()
    own: Any = next((kind for kind in (nn.Linear, Conv1D, *CONVOLUTIONS, nn.Embedding) if isinstance(base, kind)), None)
    if own is None or (type(base).forward is own.forward and convolves(base)):
        return True
    weight = base.weight
    if weight.is_meta or not weight.numel() or type(weight.data) is not Tensor:
        return True
    rows = min(8, len(weight)) if own is nn.Embedding else len(weight)  # only rows that are looked up change
    change = _spread((rows, *weight.shape[1:]), weight) * (weight[:8].abs().max() or 1.0)
    if own is nn.Embedding:
        x = torch.arange(rows, device=weight.device)
        wanted = functional.embedding(x, change) * getattr(base, "embed_scale", 1.0)  # PEFT multiplies by it too
    elif own in CONVOLUTIONS:
        x = _spread((2, base.in_channels, *(size * 2 + 8 for size in base.kernel_size)), weight)
        wanted = own._conv_forward(base, x, change, None)
    else:
        x = _spread((4, layer.in_features), weight)
        wanted = functional.linear(x, change.mT if own is Conv1D else change)
    changed, bias = weight.clone(), getattr(base, "bias", None)
    changed[:rows] += change
    without_bias = {} if bias is None else {"bias": torch.zeros_like(bias)}  # a large one would hide the change
    try:
        with _silent(base):
            found, before = (functional_call(base, {"weight": each} | without_bias, (x,)) for each in (changed, weight))
            rounding = 2 * torch.finfo(before.dtype).eps * before.abs().max().item()
            found = found - before
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # it takes or gives something else
        return False
    near = 0.02 * wanted.abs().max().item() + rounding  # the layers may compute in half precision
    return found.shape == wanted.shape and torch.allclose(found, wanted.to(found), rtol=0, atol=near)


def _spread(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of different numbers between -1 and 1, without a random generator or a large tensor besides."""
    sizes = shape[0], math.prod(shape[1:])
    one, other = (torch.arange(1, size + 1, device=like.device).double().sin().to(like.dtype) for size in sizes)
    return torch.outer(one, other).reshape(shape)


@contextlib.contextmanager
def _silent(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode, without dropout; modes and random states are as before afterwards."""
    modes = [(each, each.training) for each in module.modules()]
    devices = {parameter.device for parameter in module.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=devices):
        try:
            module.eval()
            yield
        finally:
            for each, training in modes:
                each.train(training)  # its children follow it in this list
