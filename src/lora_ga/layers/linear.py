"""Linear layers: a weight stored as (outputs, inputs) or transposed; the base class of every form.

Shapes: P parts, T tokens, I inputs, O outputs, r the rank of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

Rows = Iterator[tuple[int, Tensor, Tensor]]


class Form:
    """A weight stored as (outputs, inputs), that maps `(..., I)` to `(..., O)`.

    Attributes:
        zero: Which of the factors A and B is zero in a fresh adapter.
        probed: Whether PEFT's factors are two linear maps, in whose place a probe can be put.
    """

    zero = "B"
    probed = True

    def parts(self, layer: Any) -> int:
        """P, the number of matrices; 1 unless the form says otherwise."""
        return 1

    def shape(self, layer: Any) -> tuple[int, int]:
        """(O, I) of one part."""
        return layer.out_features, layer.in_features

    def rank(self, layer: Any, rank: int) -> int:
        """The rank of one part, from the rank PEFT gives the layer."""
        return rank

    def matrices(self, layer: Any, weight: Tensor) -> Tensor:
        """The base weight as (P, O, I), a view of it."""
        return weight[None]

    def rows(self, layer: Any, x: Tensor, g: Tensor) -> Rows:
        """Inputs (T, I) and output gradients (T, O) of each part, from the layer's input and its output's gradient."""
        yield 0, x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])

    def stack_b(self, b_POr: Tensor) -> Tensor:
        """The parts' B as PEFT lays them out, (rows, columns)."""
        return b_POr.flatten(0, 1)

    def unstack_b(self, b: Tensor, parts: int) -> Tensor:
        """PEFT's B, of any shape, as (P, O, r)."""
        return b.flatten(1).unflatten(0, (parts, -1))

    def unstack_a(self, a: Tensor, parts: int) -> Tensor:
        """PEFT's A, of any shape, as (P, r, I)."""
        return a.flatten(1).unflatten(0, (parts, -1))

    def compute(self, factor: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """What PEFT's factor does with its input, its weight and its bias."""
        return functional.linear


class Transposed(Form):
    """A weight stored as (inputs, outputs)."""

    def matrices(self, layer: Any, weight: Tensor) -> Tensor:
        """The base weight as (1, O, I)."""
        return weight.mT[None]


LINEAR, TRANSPOSED = Form(), Transposed()
