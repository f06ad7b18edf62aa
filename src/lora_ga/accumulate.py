"""Accumulators: what is kept of one layer's gradient while batches pass by.

Shapes: T tokens, I inputs, O outputs, K kept directions, P probes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from lora_ga.lowrank import (
    FRESH,
    LowRank,
    estimated_norm,
    generator,
    merge_factors,
    probes,
    truncated_svd,
    update,
)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for a float64 model, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Accumulator(Protocol):
    """One layer's running sum of `weight · gᵀ x` over blocks of tokens."""

    def add(self, x_TI: Tensor, g_TO: Tensor, weight: float) -> None:
        """Add a block: inputs (T, I) and output gradients (T, O), of any floating dtype."""

    def merge(self, other: Accumulator) -> None:
        """Add all that `other`, an accumulator of the same kind and layer, has seen."""

    def factors(self) -> LowRank | None:
        """The leading directions of the sum; None if no token has been seen."""


class _Sketched:
    """What both accumulators share: the shapes, and the linear sketch G Ω."""

    def __init__(self, name: str, inputs: int, kept: int, power_steps: int, seed: int) -> None:
        self.name, self.kept, self.power_steps, self.seed = name, kept, power_steps, seed
        self.omega_IP = probes(inputs, seed, name)
        self.sketch_OP: Tensor | None = None

    def cast(self, x_TI: Tensor, g_TO: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Bring a block into the dtype of the sums, and add it to the sketch.

        Returns:
            The inputs, and the output gradients times the weight.

        Raises:
            FloatingPointError: A number in the block is not finite.
        """
        dtype = sum_dtype(g_TO.dtype)
        x_TI, g_TO = x_TI.to(dtype), g_TO.to(dtype) * weight
        self.omega_IP = self.omega_IP.to(x_TI)
        added_OP = g_TO.mT @ (x_TI @ self.omega_IP)
        if not torch.isfinite(added_OP).all():
            raise FloatingPointError(f"{self.name}: the gradient is not finite")
        self.sketch_OP = added_OP if self.sketch_OP is None else self.sketch_OP + added_OP
        return x_TI, g_TO

    def merge_sketch(self, other: _Sketched) -> None:
        """Add the other's sketch to this one."""
        if other.sketch_OP is not None:
            self.sketch_OP = other.sketch_OP if self.sketch_OP is None else self.sketch_OP + other.sketch_OP


class Dense(_Sketched):
    """Keeps the whole gradient, (O, I). Exact: the oracle of the tests, and fine for small models."""

    gradient: Tensor | None = None

    def add(self, x_TI: Tensor, g_TO: Tensor, weight: float) -> None:
        """Add a block of tokens."""
        x_TI, g_TO = self.cast(x_TI, g_TO, weight)
        added_OI = g_TO.mT @ x_TI
        self.gradient = added_OI if self.gradient is None else self.gradient + added_OI

    def merge(self, other: Accumulator) -> None:
        """Add what another dense accumulator has seen; exact."""
        assert isinstance(other, Dense)
        self.merge_sketch(other)
        if other.gradient is not None:
            self.gradient = other.gradient if self.gradient is None else self.gradient + other.gradient

    def factors(self) -> LowRank | None:
        """The exact leading singular triplets, and the exact norm."""
        if self.gradient is None:
            return None
        norm = torch.linalg.matrix_norm(self.gradient.double()).item()
        return LowRank(*truncated_svd(self.gradient, self.kept), norm=norm, sketch=self.sketch_OP)


class Streaming(_Sketched):
    """Keeps K directions, (O + I)·K numbers, by warm-started subspace iteration; G is never formed."""

    held: tuple[Tensor, Tensor, Tensor] | None = None
    blocks = 0

    def add(self, x_TI: Tensor, g_TO: Tensor, weight: float) -> None:
        """Add a block of tokens."""
        x_TI, g_TO = self.cast(x_TI, g_TO, weight)
        columns = self.kept if self.held is None else FRESH
        draw = generator(self.seed, self.name, "test", str(self.blocks))
        omega_IQ = torch.randn(x_TI.shape[1], columns, generator=draw).to(x_TI)
        self.held = update(self.held, x_TI, g_TO, omega_IQ, kept=self.kept, power_steps=self.power_steps)
        self.blocks += 1

    def merge(self, other: Accumulator) -> None:
        """Add what another streaming accumulator has seen; what neither holds is lost."""
        assert isinstance(other, Streaming)
        self.merge_sketch(other)
        parts = [accumulator.held for accumulator in (self, other) if accumulator.held is not None]
        if parts:
            self.held = merge_factors(parts, self.kept)
        self.blocks += other.blocks

    def factors(self) -> LowRank | None:
        """The directions held, and the norm estimated from the sketch."""
        if self.held is None or self.sketch_OP is None:
            return None
        norm = estimated_norm(self.held, self.sketch_OP, self.omega_IP)
        return LowRank(*self.held, norm=norm, sketch=self.sketch_OP)


ESTIMATORS: Mapping[str, type[Dense] | type[Streaming]] = {"dense": Dense, "streaming": Streaming}
