"""The algebra of the joined matrices: what a rank-2r factor is made of, and how it is taken apart again.

With `A = A₀ + dA` and `B = B₀ + dB`, where A₀ and B₀ are the start and dA and dB the deltas,

    s·(B A − B₀ A₀)  =  s·[B₀, dB] · [dA ; A₀ + dA]

so a layer that starts at A₀ and B₀ without changing its base is a plain LoRA of rank 2r. The classes below hold the
numbers of parts and no tensors.

Shapes: r rank, I inputs, O outputs. A joined A is (2r, I), a joined B is (O, 2r); a convolution's have two dimensions
more. Where a layer is a stack of parts (groups, experts) r counts the rows of all parts together.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Joined(abc.ABC):
    """How a start and a delta of rank r make one matrix of rank 2r.

    Attributes:
        parts: The number of parts of the layer's weight.
        dim: The dimension in which the two halves are joined.
    """

    parts: int = 1
    dim: ClassVar[int]

    @abc.abstractmethod
    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """Two halves of rank r as one matrix of rank 2r."""

    @abc.abstractmethod
    def halves(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves that `join` joined."""

    @abc.abstractmethod
    def joined(self, start: Tensor, delta: Tensor) -> Tensor:
        """The factor of the plain rank-2r adapter for the original base."""

    @abc.abstractmethod
    def delta_in(self, joined: Tensor) -> Tensor:
        """The half of a joined matrix that is the delta."""

    @abc.abstractmethod
    def start_in(self, joined: Tensor, known: Tensor) -> Tensor:
        """The start in a joined matrix.

        Args:
            joined: The matrix, as it was read from a file.
            known: The start that the factor has; kept where the matrix agrees with it but holds a rounded sum.

        Returns:
            The start.
        """

    def agree(self, own: Tensor, delta: Tensor, joined: Tensor) -> bool:
        """Whether a joined matrix is `own`, up to the rounding of the file that it was stored in.

        Args:
            own: The joined matrix that is expected.
            delta: The size of its delta, entry by entry: the rounding of a sum is relative to its terms.
            joined: The matrix that was read.

        Returns:
            Whether they agree.
        """
        low = any(torch.equal(joined, joined.to(kind).to(joined)) for kind in (torch.bfloat16, torch.float16))
        size = joined.abs() + own.abs() + self.join(delta, delta)
        return bool(((own - joined).abs() <= (2.0**-7 if low else 1e-6) * size).all())


class JoinedA(Joined):
    """[dA ; A₀ + dA]: the rows of dA above those of A, part by part."""

    dim = 0

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """(r, I) and (r, I) as (2r, I)."""
        rows = [half.unflatten(0, (self.parts, -1)) for half in (first, second)]
        return torch.cat(rows, dim=1).flatten(0, 1)

    def halves(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """(2r, I) as (r, I) and (r, I)."""
        first, second = joined.unflatten(0, (self.parts, -1)).chunk(2, dim=1)
        return first.flatten(0, 1), second.flatten(0, 1)

    def joined(self, start: Tensor, delta: Tensor) -> Tensor:
        """[dA ; A₀ + dA]."""
        return self.join(delta, start + delta)

    def delta_in(self, joined: Tensor) -> Tensor:
        """dA, the first half."""
        return self.halves(joined)[0]

    def start_in(self, joined: Tensor, known: Tensor) -> Tensor:
        """A₀ = A − dA, or the known start if it gives the same A: A in the matrix is rounded.

        Args:
            joined: (2r, I).
            known: The start that the factor has.

        Returns:
            A₀, (r, I).
        """
        delta, moved = self.halves(joined)
        if not known.is_meta and torch.equal(known.to(delta) + delta, moved):
            return known
        return moved - delta


class JoinedB(Joined):
    """[B₀, dB]: the columns of B₀ to the left of those of dB."""

    dim = 1

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """(O, r) and (O, r) as (O, 2r)."""
        return torch.cat([first, second], dim=1)

    def halves(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """(O, 2r) as (O, r) and (O, r)."""
        first, second = joined.chunk(2, dim=1)
        return first, second

    def joined(self, start: Tensor, delta: Tensor) -> Tensor:
        """[B₀, dB]."""
        return self.join(start, delta)

    def delta_in(self, joined: Tensor) -> Tensor:
        """dB, the second half."""
        return self.halves(joined)[1]

    def start_in(self, joined: Tensor, known: Tensor) -> Tensor:
        """B₀, which the matrix holds as it is.

        Args:
            joined: (O, 2r).
            known: Not used.

        Returns:
            B₀, (O, r).
        """
        return self.halves(joined)[0].clone()
