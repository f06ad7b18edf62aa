"""Accumulators against the dense sum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_ga.accumulate import ESTIMATORS, Accumulator, Dense, Streaming, sum_dtype
from lora_ga.config import CHOICES

INPUTS, OUTPUTS = 24, 20


def blocks(count: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[tuple[Tensor, Tensor, float]]:
    """Blocks whose gradients share a few strong directions, with weights."""
    draw = torch.Generator().manual_seed(seed)
    shared = torch.randn(5, INPUTS, generator=draw), torch.randn(5, OUTPUTS, generator=draw)
    made = []
    for index in range(count):
        loads = torch.randn(16, 5, generator=draw) * 2.0 ** -torch.arange(5)
        x = loads @ shared[0] + 0.1 * torch.randn(16, INPUTS, generator=draw)
        g = loads @ shared[1] + 0.1 * torch.randn(16, OUTPUTS, generator=draw)
        made.append((x.to(dtype), g.to(dtype), float(index + 1)))
    return made


def total(parts: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """The oracle."""
    return torch.stack([weight * g.double().mT @ x.double() for x, g, weight in parts]).sum(dim=0)


def filled(kind: type[Dense] | type[Streaming], parts: list[tuple[Tensor, Tensor, float]]) -> Dense | Streaming:
    accumulator = kind("layer", INPUTS, 10, 1, 0)
    for x, g, weight in parts:
        accumulator.add(x, g, weight)
    return accumulator


def test_every_estimator_of_the_configuration_has_an_accumulator() -> None:
    assert set(ESTIMATORS) == set(CHOICES["estimator"])


def test_dense_keeps_the_exact_sum_and_norm() -> None:
    parts = blocks(5)
    factors = filled(Dense, parts).factors()
    assert factors is not None
    u, s, vh = torch.linalg.svd(total(parts))
    torch.testing.assert_close(factors.S, s[:10])
    torch.testing.assert_close((factors.U.mT @ u[:, :10]).abs().diagonal(), torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close((factors.V.mT @ vh[:10].mT).abs().diagonal(), torch.ones(10, dtype=torch.float64))
    assert factors.norm == pytest.approx(total(parts).norm().item())


def test_streaming_finds_the_leading_directions_of_the_sum() -> None:
    parts = blocks(12)
    factors = filled(Streaming, parts).factors()
    assert factors is not None
    g = total(parts)
    captured = (factors.U[:, :4].mT @ g @ factors.V[:, :4]).norm()
    assert captured >= 0.999 * torch.linalg.svdvals(g)[:4].norm()
    assert factors.norm == pytest.approx(g.norm().item(), rel=0.02)


@pytest.mark.parametrize("kind", [Dense, Streaming])
def test_accumulators_of_two_halves_merge_to_that_of_the_whole(kind: type[Dense] | type[Streaming]) -> None:
    parts = blocks(10)
    whole, first, second = (filled(kind, some) for some in (parts, parts[:5], parts[5:]))
    first.merge(second)
    mine, true = first.factors(), whole.factors()
    assert mine is not None
    assert true is not None
    torch.testing.assert_close(mine.S[:5], true.S[:5], rtol=1e-3, atol=0)
    cosines = torch.linalg.svdvals(mine.V[:, :4].mT @ true.V[:, :4])
    assert cosines.min() > 0.999
    torch.testing.assert_close(mine.sketch, true.sketch)


@pytest.mark.parametrize("kind", [Dense, Streaming])
def test_merging_an_empty_accumulator_changes_nothing(kind: type[Dense] | type[Streaming]) -> None:
    mine = filled(kind, blocks(3))
    before = mine.factors()
    mine.merge(kind("layer", INPUTS, 10, 1, 0))
    after = mine.factors()
    assert before is not None
    assert after is not None
    torch.testing.assert_close(before.S, after.S)
    empty: Accumulator = kind("layer", INPUTS, 10, 1, 0)
    assert empty.factors() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_kept_in_float32_for_models_of_lower_precision(dtype: torch.dtype) -> None:
    parts = blocks(4, dtype)
    factors = filled(Dense, parts).factors()
    assert factors is not None
    assert factors.U.dtype == sum_dtype(dtype) == torch.float32
    assert factors.norm == pytest.approx(total(parts).norm().item(), rel=1e-5)


@pytest.mark.parametrize("kind", [Dense, Streaming])
@pytest.mark.parametrize("spoiled", ["x", "g"])
def test_a_number_that_is_not_finite_is_refused(kind: type[Dense] | type[Streaming], spoiled: str) -> None:
    x, g, weight = blocks(1)[0]
    (x if spoiled == "x" else g)[3, 4] = torch.nan
    with pytest.raises(FloatingPointError, match="layer: the gradient is not finite"):
        kind("layer", INPUTS, 10, 1, 0).add(x, g, weight)
