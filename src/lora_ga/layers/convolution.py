"""2-D convolutions, grouped ones included: how their inputs and output gradients become rows.

Shapes: P parts, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from lora_ga.layers.linear import Form, Rows


class Convolution(Form):
    """A 2-D convolution, (outputs, inputs, height, width); PEFT's A sees all inputs, its B the rank's own group."""

    probed = False

    def parts(self, layer: Any) -> int:
        """The number of groups."""
        return layer.get_base_layer().groups

    def shape(self, layer: Any) -> tuple[int, int]:
        """(outputs of a group, inputs x height x width)."""
        base = layer.get_base_layer()
        return base.out_channels // base.groups, base.in_channels * base.kernel_size[0] * base.kernel_size[1]

    def rank(self, layer: Any, rank: int) -> int:
        """PEFT shares the rank out among the groups."""
        return rank // layer.get_base_layer().groups

    def matrices(self, layer: Any, weight: Tensor) -> Tensor:
        """The base weight as (P, O, I); of a grouped one, I are the inputs of the group only."""
        return weight.flatten(1).unflatten(0, (layer.get_base_layer().groups, -1))

    def rows(self, layer: Any, x: Tensor, g: Tensor) -> Rows:
        """A row for every place of the kernel: what PEFT's A sees there, which pads with zeros."""
        base = layer.get_base_layer()
        batched, g = x if x.dim() == 4 else x[None], g if g.dim() == 4 else g[None]
        padding = base.padding
        if isinstance(padding, str):  # "same" and "valid"; the first may be uneven
            batched, padding = functional.pad(batched, base._reversed_padding_repeated_twice), 0
        x_NIT = functional.unfold(batched, base.kernel_size, padding=padding, stride=base.stride)
        x_TI = x_NIT.mT.flatten(0, 1)
        for part, g_group in enumerate(g.flatten(2).chunk(base.groups, dim=1)):
            yield part, x_TI, g_group.mT.flatten(0, 1)

    def compute(self, factor: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """A convolution with the factor's own stride, padding and groups."""
        names = ("stride", "padding", "groups")
        return functools.partial(functional.conv2d, **{name: getattr(factor, name) for name in names})


CONVOLUTION = Convolution()
