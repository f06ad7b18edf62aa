"""The accumulators of the gradient, compared with a dense sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lora_ga.config import CHOICES
from lora_ga.gradients.setup import ESTIMATORS
from lora_ga.linalg.accumulator import Accumulator, Size, sum_dtype
from lora_ga.linalg.dense import Dense
from lora_ga.linalg.low_rank import merge, probes
from lora_ga.linalg.streaming import Streaming

INPUTS, OUTPUTS = 24, 20
Kind = type[Dense] | type[Streaming]
Blocks = list[tuple[Tensor, Tensor, float]]
SIZES = {name: Size(kept=10, used=4) for name in ("layer", "other", "third")}


def blocks(count: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Blocks:
    """Inputs, output gradients and weights of blocks. The gradients of all blocks share a few strong directions."""
    draw = torch.Generator().manual_seed(seed)
    shared = torch.randn(5, INPUTS, generator=draw), torch.randn(5, OUTPUTS, generator=draw)
    made = []
    for index in range(count):
        loads = torch.randn(16, 5, generator=draw) * 2.0 ** -torch.arange(5)
        x = loads @ shared[0] + 0.1 * torch.randn(16, INPUTS, generator=draw)
        g = loads @ shared[1] + 0.1 * torch.randn(16, OUTPUTS, generator=draw)
        made.append((x.to(dtype), g.to(dtype), float(index + 1)))
    return made


def total(parts: Blocks) -> Tensor:
    """The exact sum of the gradients."""
    return torch.stack([weight * g.double().mT @ x.double() for x, g, weight in parts]).sum(dim=0)


def filled(kind: Kind, parts: Blocks, names: tuple[str, ...] = ("layer",)) -> Dense | Streaming:
    """An accumulator to which every block was added, for each of the named layers."""
    accumulator = kind(SIZES, 0, 0)
    for x, g, weight in parts:
        for name in names:
            accumulator.add(name, x, g, weight)
        accumulator.flush()
    return accumulator


def test_every_estimator_of_the_configuration_has_an_accumulator() -> None:
    assert {*ESTIMATORS, "probe"} == set(CHOICES["estimator"])  # the probe adds up without an accumulator


def test_dense_keeps_the_exact_sum_and_norm() -> None:
    parts = blocks(5)
    factors = filled(Dense, parts).factors("layer")
    assert factors is not None
    u, s, vh = torch.linalg.svd(total(parts))
    torch.testing.assert_close(factors.S, s[:10])
    torch.testing.assert_close((factors.U.mT @ u[:, :10]).abs().diagonal(), torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close((factors.V.mT @ vh[:10].mT).abs().diagonal(), torch.ones(10, dtype=torch.float64))
    assert factors.norm == pytest.approx(total(parts).norm().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_streaming_finds_the_leading_directions_of_the_sum(dtype: torch.dtype) -> None:
    parts = blocks(12, dtype)
    factors = filled(Streaming, parts).factors("layer")
    assert factors is not None
    g = total(parts)
    captured = (factors.U[:, :4].double().mT @ g @ factors.V[:, :4].double()).norm()
    assert captured >= 0.999 * torch.linalg.svdvals(g)[:4].norm()
    assert factors.norm == pytest.approx(g.norm().item(), rel=0.02)
    for factor in (factors.U, factors.V):
        torch.testing.assert_close(factor.mT @ factor, torch.eye(10, dtype=dtype), atol=1e-5, rtol=0)


def test_truncating_layers_together_gives_the_factors_of_truncating_each_alone() -> None:
    parts = blocks(4)
    together = filled(Streaming, parts, ("layer", "other", "third"))
    alone = filled(Streaming, parts, ("other",))
    one, other = together.factors("other"), alone.factors("other")
    assert one is not None
    assert other is not None
    torch.testing.assert_close(one.S, other.S)
    torch.testing.assert_close((one.U * one.S) @ one.V.mT, (other.U * other.S) @ other.V.mT)


@pytest.mark.parametrize("kind", [Dense, Streaming])
def test_a_layer_that_runs_twice_in_a_pass_counts_twice(kind: Kind) -> None:
    (first, second), accumulator = blocks(2), kind(SIZES, 0, 0)
    accumulator.add("layer", *first)
    accumulator.add("layer", *second)
    accumulator.flush()
    factors = accumulator.factors("layer")
    assert factors is not None
    s = torch.linalg.svdvals(total([first, second]))
    torch.testing.assert_close(factors.S[:4], s[:4], rtol=1e-3, atol=0)


def test_streaming_finds_late_directions_after_a_first_block_of_one_token() -> None:
    (x, g, _), parts = blocks(1)[0], blocks(12, seed=1)
    accumulator = Streaming(SIZES, 0, 0)
    for block in [(x[:1], g[:1], 1.0), *parts]:
        accumulator.add("layer", *block)
        accumulator.flush()
    factors = accumulator.factors("layer")
    assert factors is not None
    true = total([(x[:1], g[:1], 1.0), *parts])
    captured = (factors.U[:, :4].mT @ true @ factors.V[:, :4]).norm()
    assert captured >= 0.999 * torch.linalg.svdvals(true)[:4].norm()


@pytest.mark.parametrize("kind", [Dense, Streaming])
def test_a_restored_accumulator_continues_as_the_uninterrupted_one(kind: Kind) -> None:
    parts = blocks(9, torch.float32)
    names = ("layer", "other")
    whole, first = filled(kind, parts, names), filled(kind, parts[:4], names)
    resumed = kind(SIZES, 0, 0)
    resumed.restore(
        {key: value.clone() for key, value in first.state().items()}, dict.fromkeys(names, torch.device("cpu"))
    )
    for x, g, weight in parts[4:]:
        for name in names:
            resumed.add(name, x, g, weight)
        resumed.flush()
    for name in names:
        mine, true = resumed.factors(name), whole.factors(name)
        assert mine is not None
        assert true is not None
        for part in ("U", "S", "V", "sketch"):
            assert torch.equal(getattr(mine, part), getattr(true, part)), (name, part)


def test_a_watched_accumulator_reports_changes_once_per_batch() -> None:
    accumulator = Streaming(SIZES, 0, 0, watched=True)
    found = []
    for x, g, weight in blocks(30):
        accumulator.add("layer", x, g, weight=weight**0)
        accumulator.flush()
        found.append(accumulator.changes())
    assert found[0] == {}  # the first batch has no batch before it to compare with
    assert all(set(change) == {"layer"} for change in found[1:])
    assert found[1]["layer"] > 10 * found[-1]["layer"] > 0
    assert accumulator.changes() == {}
    assert filled(Streaming, blocks(2)).changes() == filled(Dense, blocks(2)).changes() == {}


def test_an_empty_accumulator_has_no_factors_and_no_state() -> None:
    for kind in (Dense, Streaming):
        empty: Accumulator = kind(SIZES, 0, 0)
        empty.flush()
        assert empty.factors("layer") is None
        assert empty.state() == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_kept_in_float32_for_models_of_lower_precision(dtype: torch.dtype) -> None:
    parts = blocks(4, dtype)
    for kind in (Dense, Streaming):
        accumulator = filled(kind, parts)
        assert {tensor.dtype for tensor in accumulator.state().values()} <= {torch.float32, torch.int64}
        factors = accumulator.factors("layer")
        assert factors is not None
        assert factors.U.dtype == sum_dtype(dtype) == torch.float32
        assert factors.norm == pytest.approx(total(parts).norm().item(), rel=1e-5 if kind is Dense else 0.02)


@pytest.mark.parametrize("kind", [Dense, Streaming])
@pytest.mark.parametrize("broken", ["x", "g"])
def test_a_value_that_is_not_finite_raises_an_error_that_names_the_layer(kind: Kind, broken: str) -> None:
    x, g, weight = blocks(1)[0]
    accumulator = kind(SIZES, 0, 0)
    accumulator.add("other", x, g, weight)
    (x if broken == "x" else g)[3, 4] = torch.nan
    accumulator.add("layer", x, g, weight)
    with pytest.raises(FloatingPointError, match=r"^layer: the gradient is not finite$"):
        accumulator.flush()


class OneDevice(TorchDispatchMode):
    """Raises an error if an operation takes tensors of two devices. Copies and scalars are allowed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor) and each.dim()]
        devices = {each.device for each in tensors}
        if len(devices) > 1 and func not in {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}:
            raise AssertionError(f"{func} takes tensors on {sorted(map(str, devices))}")
        return func(*args, **kwargs)


def made_up_values(tensor: Tensor) -> Any:
    """The values that the test gives to tensors without values."""
    shape: Any = tensor.shape
    if len(shape) > 1:
        return [made_up_values(tensor[0])] * shape[0]
    one = True if tensor.dtype == torch.bool else 1.0
    return [one] * shape[0] if shape else one


@pytest.mark.parametrize("kind", [Dense, Streaming])
def test_all_computation_stays_on_the_device_of_the_gradients(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is "meta", which every machine has. Its tensors have no values, so the test makes them up."""
    for name in ("item", "tolist", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, made_up_values)
    on_meta = [tuple(part.to("meta") for part in block[:2]) for block in blocks(3, torch.float32)]
    with OneDevice():
        accumulator, other = (kind(SIZES, 1, 0, watched=kind is Streaming) for _ in range(2))
        for x, g in on_meta:
            for each in (accumulator, other):
                each.add("layer", x, g, 2.0)
                each.flush()
            accumulator.changes()
        accumulator.absorb(other.state())
        found = accumulator.factors("layer")
        assert found is not None
        merged = merge([(found, 1.0), (found.scaled(0.5), 2.0)], 8, probes(INPUTS, 0))
        limit = merged.limit(2)
    assert {part.device.type for each in (found, merged) for part in (each.U, each.S, each.V)} == {"meta"}
    assert 0 < limit <= 1
