"""Linear layers, with a weight stored as (outputs, inputs) or transposed; the base class of every weight layout.

Shapes: P parts, T tokens, I inputs, O outputs, r the rank of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from lora_ga.linalg.accumulator import Inputs

# The number of a part, the inputs (T, I) it was computed from and the gradients (T, O) of its outputs.
Rows = Iterator[tuple[int, Inputs, Tensor]]


class WeightLayout:
    """How a layer stores its weight, how its gradient becomes rows, and how PEFT's factors fit it.

    The methods of this class describe one matrix, stored as (outputs, inputs), that maps `(..., I)` to `(..., O)`.
    Subclasses override what differs. `layer` is always PEFT's LoRA layer.

    Attributes:
        gradient_from_parameter: Whether the gradient is read from the parameter, because the module that owns it does
            more than apply it. Otherwise it is read from the layer's input and output gradient.
        probed: Whether PEFT's factors are two linear maps, which a probe can replace.
        zero_factor: Which of the factors A and B is zero in a fresh adapter.
        factor_tables: The attributes of PEFT's layer that hold the factors A and B of its adapters.
    """

    gradient_from_parameter = False
    probed = True
    zero_factor = "B"
    factor_tables = ("lora_A", "lora_B")

    def parts(self, layer: Any) -> int:
        """P, the number of matrices that the weight consists of."""
        return 1

    def part_shape(self, layer: Any) -> tuple[int, int]:
        """(O, I) of one part."""
        return layer.out_features, layer.in_features

    def part_rank(self, layer: Any, rank: int) -> int:
        """The rank of one part, from the rank that PEFT gives the layer."""
        return rank

    def parameter_name(self, layer: Any) -> str:
        """The name of the weight in the base layer."""
        return "weight"

    def pattern_name(self, layer: Any, name: str) -> str:
        """The name that PEFT compares with `rank_pattern` and `alpha_pattern`, of the layer of this name."""
        return name

    def matrices(self, layer: Any, weight: Tensor) -> Tensor:
        """The base weight as (P, O, I), a view of it."""
        return weight[None]

    def rows(self, layer: Any, x: Tensor, g: Tensor) -> Rows:
        """The gradient of each part as rows: inputs x (T, I) and output gradients g (T, O), so that `G = gᵀ x`.

        Args:
            layer: PEFT's layer.
            x: The layer's input.
            g: The gradient of the loss at the layer's output.

        Yields:
            The number of a part, x and g. A part without a gradient may be left out.
        """
        yield 0, x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])

    def stack_b(self, b_POr: Tensor) -> Tensor:
        """The parts' factors B as one matrix, in PEFT's order of rows and columns."""
        return b_POr.flatten(0, 1)

    def unstack_b(self, b: Tensor, parts: int) -> Tensor:
        """PEFT's B, of any shape, as (P, O, r)."""
        return b.flatten(1).unflatten(0, (parts, -1))

    def unstack_a(self, a: Tensor, parts: int) -> Tensor:
        """PEFT's A, of any shape, as (P, r, I)."""
        return a.flatten(1).unflatten(0, (parts, -1))

    def compute(self, factor: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """The function by which PEFT's factor computes its output from its input, weight and bias."""
        return functional.linear

    def why_not_aligned(self, layer: Any, adapter_name: str) -> str | None:
        """Why a layer cannot be aligned as it stands, as the end of a sentence about it; None if it can."""
        return None

    def why_not_shifted(self, layer: Any) -> str | None:
        """Why `offset="base"` cannot change the base weight, as the object of "cannot change"; None if it can."""
        return None


class TransposedLayout(WeightLayout):
    """A weight stored as (inputs, outputs)."""

    def matrices(self, layer: Any, weight: Tensor) -> Tensor:
        """The base weight as (1, O, I)."""
        return weight.mT[None]


LINEAR, TRANSPOSED = WeightLayout(), TransposedLayout()
