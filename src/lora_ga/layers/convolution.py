"""1-D and 2-D convolutions, grouped ones included: how their inputs and output gradients become rows.

Shapes: P parts, T places in the output, I inputs, O outputs, N images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from lora_ga.layers.linear import Rows, WeightLayout


class ConvolutionLayout(WeightLayout):
    """The weight of a convolution, (outputs, inputs of a group, width or height and width); a part is a group.

    PEFT's A is a convolution over all inputs, also of a grouped layer. Its B has the layer's groups.
    """

    probed = False

    def parts(self, layer: Any) -> int:
        """The number of groups."""
        return layer.get_base_layer().groups

    def part_shape(self, layer: Any) -> tuple[int, int]:
        """(outputs of a group, all inputs x size of the kernel): what the product of PEFT's factors spans."""
        base = layer.get_base_layer()
        return base.out_channels // base.groups, base.in_channels * math.prod(base.kernel_size)

    def part_rank(self, layer: Any, rank: int) -> int:
        """PEFT divides the rank among the groups."""
        return rank // layer.get_base_layer().groups

    def matrices(self, layer: Any, weight: Tensor) -> Tensor:
        """The base weight as (P, O, I); of a grouped one I counts the inputs of the group only."""
        return weight.flatten(1).unflatten(0, (layer.get_base_layer().groups, -1))

    def rows(self, layer: Any, x: Tensor, g: Tensor) -> Rows:
        """One row for each place in the output: the patch of the zero-padded input that PEFT's A reads there.

        Args:
            layer: PEFT's layer.
            x: The input, (N, channels, width), (N, channels, height, width), or one image.
            g: The gradient at the output, likewise.

        Yields:
            The number of a group, the patches (T, I) and the group's output gradients (T, O).
        """
        base = layer.get_base_layer()
        dims = 2 + len(base.kernel_size)
        batched, g = x if x.dim() == dims else x[None], g if g.dim() == dims else g[None]
        if isinstance(base.padding, str):  # "same" may pad one side by one more than the other, which unfold cannot
            batched, padding = functional.pad(batched, _padding_by_side(base)), (0,) * len(base.kernel_size)
        else:
            padding = base.padding
        if dims == 3:  # unfold takes images only: here of height 1
            x_NIT = functional.unfold(
                batched.unsqueeze(2), (1, *base.kernel_size), padding=(0, *padding), stride=(1, *base.stride)
            )
        else:
            x_NIT = functional.unfold(batched, base.kernel_size, padding=padding, stride=base.stride)
        x_TI = x_NIT.mT.flatten(0, 1)
        for part, g_group in enumerate(g.flatten(2).chunk(base.groups, dim=1)):
            yield part, x_TI, g_group.mT.flatten(0, 1)

    def compute(self, factor: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """A convolution with the factor's stride, padding and groups."""
        names = ("stride", "padding", "groups")
        convolve = functional.conv1d if isinstance(factor, nn.Conv1d) else functional.conv2d
        return functools.partial(convolve, **{name: getattr(factor, name) for name in names})

    def why_not_aligned(self, layer: Any, adapter_name: str) -> str | None:
        """PEFT's factors are not dilated, so their product cannot follow a dilated convolution."""
        if set(layer.get_base_layer().dilation) == {1}:
            return None
        return "is a dilated convolution, which PEFT adapts by one without dilation; leave it out"

    def why_not_shifted(self, layer: Any) -> str | None:
        """PEFT's factors span all inputs, the weight of a grouped convolution only a group's; and they pad by zeros."""
        if self.parts(layer) > 1:
            return "a grouped convolution, whose adapter reaches across the groups"
        mode = layer.get_base_layer().padding_mode
        return None if mode == "zeros" else f"a convolution with {mode} padding, whose adapter pads by zeros"


def _padding_by_side(base: Any) -> list[int]:
    """The padding that "same" or "valid" stands for: left and right, in two dimensions also top and bottom."""
    padding = []
    for size in reversed(base.kernel_size):
        total = size - 1 if base.padding == "same" else 0
        padding += [total // 2, total - total // 2]
    return padding


CONVOLUTION = ConvolutionLayout()
