"""Whether a layer computes what its class says: a subclass may have another `forward`."""

from __future__ import annotations

import math
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
    change = _spread(weight.shape, weight)
    if own is nn.Embedding:
        x = torch.arange(min(8, len(weight)), device=weight.device)
        wanted = functional.embedding(x, change) * getattr(base, "embed_scale", 1.0)  # PEFT multiplies by it too
    elif own in CONVOLUTIONS:
        x = _spread((2, base.in_channels, *(size * 2 + 8 for size in base.kernel_size)), weight)
        wanted = own._conv_forward(base, x, change, None)
    else:
        x = _spread((4, layer.in_features), weight)
        wanted = functional.linear(x, change.mT if own is Conv1D else change)
    try:
        found = functional_call(base, {"weight": weight + change}, (x,)) - base(x)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # it takes or gives something else
        return False
    near = 0.02 * wanted.abs().max().item()  # the layers may compute in half precision
    return found.shape == wanted.shape and torch.allclose(found, wanted.to(found), rtol=0, atol=near)


def _spread(shape: Any, like: Tensor) -> Tensor:
    """A tensor of different numbers between -1 and 1, without a random generator."""
    return torch.arange(math.prod(shape), device=like.device).double().sin().reshape(shape).to(like.dtype)
