"""Linear algebra on matrices with a known spectrum, and the accumulators of the gradient against a dense sum."""

from __future__ import annotations

import math
import threading
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lora_ga.config import CHOICES
from lora_ga.gradients.setup import ESTIMATORS
from lora_ga.linalg import streaming, tensor_cores
from lora_ga.linalg.accumulator import Accumulator, Size, UnitRows, sum_dtype
from lora_ga.linalg.dense import Dense
from lora_ga.linalg.low_rank import (
    PROBES,
    LowRank,
    estimated_norm,
    generator,
    merge,
    merge_factors,
    probes,
    read,
    truncated_svd,
)
from lora_ga.linalg.streaming import Streaming
from lora_ga.linalg.subspace import STRIDE, direction_change, multiplications, orthonormal, power_step, truncate
from lora_ga.linalg.tensor_cores import exact_in_tf32, float32_products
from tf32 import Tf32, precision, rounded_to_tf32


def with_known_spectrum(
    outputs: int = 30, inputs: int = 40, decay: float = 0.7, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return a matrix with the singular values decay^i, and these values, in float64."""
    draw = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(outputs, outputs, generator=draw, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(inputs, outputs, generator=draw, dtype=torch.float64)).Q
    s = decay ** torch.arange(outputs, dtype=torch.float64)
    return (u * s) @ v.mT, s


def streamed(g: Tensor, blocks: int, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Feed a matrix to the streaming estimator as blocks of (x, g) whose products add up to it."""
    stream, columns = Streaming({"g": Size(kept, kept)}, 0, 0), torch.eye(g.shape[1], dtype=g.dtype)
    done = torch.zeros_like(g)
    for part in columns.chunk(blocks):
        stream.add("g", part, 2 * (g @ part.mT).mT, 0.5)
        stream.flush()
        done += g @ part.mT @ part
        torch.testing.assert_close(stream.state()["g.sketch"], done @ probes(g.shape[1], 0).to(g))
    return stream.streams["g"].held


def test_one_block_finds_the_leading_singular_triplets_of_a_known_spectrum() -> None:
    g, s = with_known_spectrum()
    u, found, v = streamed(g, blocks=1, kept=12)
    torch.testing.assert_close(found[:8], s[:8], rtol=1e-3, atol=0)
    torch.testing.assert_close(u.mT @ u, torch.eye(12, dtype=g.dtype))
    torch.testing.assert_close(v.mT @ v, torch.eye(12, dtype=g.dtype))


def test_many_blocks_keep_nearly_all_the_energy_that_one_svd_keeps() -> None:
    g, s = with_known_spectrum(decay=0.85)
    u, _, v = streamed(g, blocks=10, kept=16)
    captured = (u[:, :8].mT @ g @ v[:, :8]).norm()
    assert captured >= 0.995 * s[:8].norm()


def test_a_low_rank_gradient_is_held_exactly() -> None:
    g, _ = with_known_spectrum()
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    low = (u[:, :5] * s[:5]) @ vh[:5]
    held = streamed(low, blocks=7, kept=12)
    torch.testing.assert_close((held[0] * held[1]) @ held[2].mT, low)


def test_a_layer_with_fewer_directions_than_requested_is_held_whole() -> None:
    g, _ = with_known_spectrum(outputs=6, inputs=9)
    u, s, v = streamed(g, blocks=3, kept=20)
    assert s.shape == (6,)
    torch.testing.assert_close((u * s) @ v.mT, g)


def test_merged_factors_are_those_of_the_sum() -> None:
    (a, _), (b, _) = with_known_spectrum(seed=1), with_known_spectrum(seed=2)
    exact = truncated_svd(a + b, 10)
    merged = merge_factors([truncated_svd(a, 30), truncated_svd(b, 30)], 10)
    for mine, true in zip(merged, exact, strict=True):
        torch.testing.assert_close(mine, true)


def test_merging_weighs_the_parts_and_estimates_the_norm_of_the_sum() -> None:
    (a, _), (b, _) = with_known_spectrum(seed=1), with_known_spectrum(seed=2)
    omega = probes(40, 0).double()
    parts = [(LowRank(*truncated_svd(g, 30), norm=g.norm().item(), sketch=g @ omega), w) for g, w in ((a, 3), (b, 1))]
    merged = merge(parts, 30, omega)
    assert merged.norm == pytest.approx((3 * a + b).norm().item(), rel=1e-9)
    torch.testing.assert_close((merged.U * merged.S) @ merged.V.mT, 3 * a + b)


def test_merging_without_a_sketch_is_refused() -> None:
    g, _ = with_known_spectrum()
    with pytest.raises(ValueError, match="without a sketch cannot be merged"):
        merge([(LowRank(*truncated_svd(g, 4), norm=1.0), 1.0)], 4, probes(40, 0))


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_the_norm_estimate_is_unbiased_even_if_little_is_held(share: float) -> None:
    g, _ = with_known_spectrum(decay=0.95)
    u, s, v = truncated_svd(g, 4)
    held = (u, share * s, v)  # truncation may shrink the held part; then the rest is not orthogonal to it
    squares = []
    for seed in range(200):
        omega = probes(40, seed).double()
        squares.append(estimated_norm(held, g @ omega, omega) ** 2)
    error = torch.tensor(squares).std() / len(squares) ** 0.5
    assert abs(sum(squares) / len(squares) - g.square().sum().item()) < 3 * error


def test_the_alignment_limit_is_that_of_eckart_and_young() -> None:
    g, s = with_known_spectrum()
    part = LowRank(*truncated_svd(g, 16), norm=g.norm().item())
    assert part.limit(4) == pytest.approx((s[:8].norm() / s.norm()).item())
    assert math.isnan(part.limit(9))
    assert math.isnan(LowRank(part.U, part.S, part.V, norm=0.0).limit(1))


def test_signs_do_not_depend_on_those_that_the_solver_chose() -> None:
    g, _ = with_known_spectrum()
    u, s, v = truncated_svd(g, 6)
    again = merge_factors([(-u, s, -v)], 6)
    torch.testing.assert_close(again[0], u)
    torch.testing.assert_close(again[2], v)


def test_random_numbers_depend_on_seed_and_name_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draws = [torch.randn(3, generator=generator(*address)) for address in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])
    assert torch.equal(before, torch.get_rng_state())


def test_orthonormal_shortens_dependent_columns_and_normalises_the_others() -> None:
    y = torch.randn(50, 6, generator=generator(0, "y"), dtype=torch.float64)
    y[:, 4] = y[:, :4].sum(dim=1)
    y[:, 5] = 0
    scaled = y * torch.tensor([1e-9, 1.0, 1e9, 1.0, 1.0, 1.0])  # the angles of columns matter, their sizes do not
    scaled[:, 4] = scaled[:, :3].sum(dim=1)
    q = orthonormal(scaled)
    gram = q.mT @ q
    torch.testing.assert_close(gram[:4, :4], torch.eye(4, dtype=gram.dtype), atol=1e-9, rtol=0)
    assert q[:, 4].norm() < 1e-2
    assert q[:, 5].norm() == 0


def test_a_power_step_is_that_of_the_dense_sum() -> None:
    held = truncated_svd(with_known_spectrum()[0], 6)
    x, g, start = (torch.randn(50, size, generator=generator(0, str(size))).double() for size in (40, 30, 5))
    m = (held[0] * held[1]) @ held[2].mT + 0.3 * g.mT @ x
    found = power_step(held, x, g, 0.3, start[:40])
    torch.testing.assert_close(found, orthonormal(m.mT @ orthonormal(m @ start[:40])))


def test_truncation_in_float64_finds_values_that_are_lost_in_squares() -> None:
    g, s = with_known_spectrum(decay=0.1)
    q = truncated_svd(g, 12)[0] @ torch.linalg.qr(torch.randn(12, 12, generator=generator(0, "q")).double()).Q
    torch.testing.assert_close(truncate(q, g.mT @ q, 10)[1], s[:10], rtol=1e-3, atol=0)


def test_truncation_accepts_stacks_of_layers_and_columns_that_are_not_orthonormal() -> None:
    matrices = [with_known_spectrum(seed=seed)[0] for seed in (1, 2, 3)]
    q = torch.stack(
        [torch.linalg.qr(g @ torch.randn(40, 12, generator=generator(0, "q")).double()).Q for g in matrices]
    )
    mixed = q @ (torch.eye(12) + 0.1 * torch.randn(12, 12, generator=generator(0, "mix"))).double()
    z = torch.stack([g.mT @ part for g, part in zip(matrices, mixed, strict=True)])
    u, s, v = truncate(mixed, z, 5)
    for index, g in enumerate(matrices):
        exact = truncated_svd(q[index] @ (q[index].mT @ g), 5)
        torch.testing.assert_close(s[index], exact[1])
        torch.testing.assert_close((u[index] * s[index]) @ v[index].mT, (exact[0] * exact[1]) @ exact[2].mT)


def test_missing_directions_are_zero_until_a_merge_fills_them() -> None:
    g, _ = with_known_spectrum()
    low = truncated_svd(g, 3)
    held = streamed((low[0] * low[1]) @ low[2].mT, blocks=2, kept=6)
    assert held[1][3:].eq(0).all()
    assert held[2][:, 3:].eq(0).all()
    u, s, v = merge_factors([held], 6)
    torch.testing.assert_close(s[:3], low[1])
    for factor in (u, v):
        torch.testing.assert_close(factor.mT @ factor, torch.eye(6, dtype=factor.dtype))


def test_direction_change_weighs_angles_by_energy_and_ignores_mixtures_of_equal_values() -> None:
    u = torch.eye(6, dtype=torch.float64)[:, :4]
    s = torch.tensor([2.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    before = (u[:, :3], u[:, :3])
    assert direction_change(before, (u, s, u)).item() == pytest.approx(0)
    angle = 0.3
    rotated = u.clone()
    rotated[:, 1], rotated[:, 2] = (u[:, 1] + u[:, 2]) / 2**0.5, (u[:, 1] - u[:, 2]) / 2**0.5
    assert direction_change(before, (rotated, s, rotated)).item() == pytest.approx(0)
    tilted = u.clone()
    tilted[:, 0] = math.cos(angle) * u[:, 0]
    tilted[5, 0] = math.sin(angle)
    share = 4 / (4 + 1 + 1)
    assert direction_change(before, (tilted, s, tilted)).item() == pytest.approx(share * math.sin(angle) ** 2)
    assert direction_change(before, (tilted, s, u)).item() == pytest.approx(share * math.sin(angle) ** 2 / 2)


@pytest.mark.parametrize("kept", [4, 12, 30])
def test_the_held_share_is_estimated_without_the_gradient(kept: int) -> None:
    g, s = with_known_spectrum(outputs=120, inputs=160, decay=0.98)
    omega = probes(160, 0).double()
    u, found, v = truncated_svd(g, kept)
    part = LowRank(u, found, v, norm=estimated_norm((u, found, v), g @ omega, omega))
    true = 1 - (g - (u * found) @ v.mT).square().sum() / g.square().sum()
    assert part.held == pytest.approx(true.item(), abs=0.05)
    assert 1 - part.held == pytest.approx((s[kept:].norm() / s.norm()).item() ** 2, rel=0.25)
    assert LowRank(u, found, v, norm=0.0).held == 1.0


# --- accumulators ----------------------------------------------------------------------------------------------------

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
    factors = filled(Dense, parts).factors(["layer"])["layer"]
    assert factors is not None
    u, s, vh = torch.linalg.svd(total(parts))
    torch.testing.assert_close(factors.S, s[:10])
    torch.testing.assert_close((factors.U.mT @ u[:, :10]).abs().diagonal(), torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close((factors.V.mT @ vh[:10].mT).abs().diagonal(), torch.ones(10, dtype=torch.float64))
    assert factors.norm == pytest.approx(total(parts).norm().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_streaming_finds_the_leading_directions_of_the_sum(dtype: torch.dtype) -> None:
    parts = blocks(12, dtype)
    factors = filled(Streaming, parts).factors(["layer"])["layer"]
    assert factors is not None
    g = total(parts)
    captured = (factors.U[:, :4].double().mT @ g @ factors.V[:, :4].double()).norm()
    assert captured >= 0.999 * torch.linalg.svdvals(g)[:4].norm()
    assert factors.norm == pytest.approx(g.norm().item(), rel=0.02)
    for factor in (factors.U, factors.V):
        torch.testing.assert_close(factor.mT @ factor, torch.eye(10, dtype=dtype), atol=1e-5, rtol=0)


def test_streaming_finds_the_same_directions_in_gradients_of_any_size() -> None:
    parts = blocks(4, torch.float32)
    usual = filled(Streaming, parts).factors(["layer"])["layer"]
    tiny = filled(Streaming, [(x, g, weight * 2.0**-20) for x, g, weight in parts]).factors(["layer"])["layer"]
    assert usual is not None
    assert tiny is not None
    assert torch.equal(tiny.S * 2**20, usual.S)
    assert torch.equal(tiny.U, usual.U)


def test_the_first_block_finds_directions_that_a_look_at_some_of_its_tokens_misses() -> None:
    x, g = (torch.randn(1024, size, generator=generator(0, "block")).double() for size in (INPUTS, OUTPUTS))
    x[::STRIDE], g[::STRIDE] = x[0], g[0]  # the tokens of `first_directions`
    factors = filled(Streaming, [(x, g, 1.0)]).factors(["layer"])["layer"]
    assert factors is not None
    torch.testing.assert_close(factors.S, torch.linalg.svdvals(g.mT @ x)[:10])


def test_truncating_layers_together_gives_the_factors_of_truncating_each_alone() -> None:
    parts = blocks(4)
    together = filled(Streaming, parts, ("layer", "other", "third"))
    alone = filled(Streaming, parts, ("other",))
    one, other = (each.factors(["other"])["other"] for each in (together, alone))
    assert isinstance(together, Streaming)
    names = ["layer", "other", "third"]
    assert together._stacked(names) is together.streams["layer"].stack  # without a copy
    assert one is not None
    assert other is not None
    torch.testing.assert_close(one.S, other.S)
    torch.testing.assert_close((one.U * one.S) @ one.V.mT, (other.U * other.S) @ other.V.mT)


class Solvers(TorchDispatchMode):
    """Counts the calls of solvers: eigenvalues, singular values and Householder's QR."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names += [name] if name in {"_linalg_eigh", "_linalg_svd", "linalg_qr"} else []
        return func(*args, **(kwargs or {}))


def test_layers_of_one_shape_are_decomposed_by_one_solver_at_the_end() -> None:
    accumulator, devices = Streaming(SIZES, 0, 0), dict.fromkeys(SIZES, torch.device("cpu"))
    s = torch.logspace(0, -6.5, 10)
    state: dict[str, Tensor] = {}
    for index, name in enumerate(devices):
        draw = torch.Generator().manual_seed(index)
        state |= {f"{name}.{part}": torch.linalg.qr(torch.randn(30, 10, generator=draw)).Q for part in "UV"}
        state |= {f"{name}.S": s, f"{name}.sketch": torch.zeros(30, 8), f"{name}.blocks": torch.ones(1)}
    accumulator.restore(state, devices)
    with Solvers() as solvers:
        factors = accumulator.factors(devices)
    assert solvers.names == ["_linalg_eigh"]
    for name, factor in factors.items():
        product = (state[f"{name}.U"] * s) @ state[f"{name}.V"].mT
        torch.testing.assert_close((factor.U * factor.S) @ factor.V.mT, product, rtol=0, atol=1e-6)
        for side in (factor.U, factor.V):
            torch.testing.assert_close(side.mT @ side, torch.eye(10), rtol=0, atol=1e-5)


def test_a_layer_with_few_directions_beside_a_whole_one_gets_orthonormal_ones_for_the_rest() -> None:
    torch.manual_seed(0)
    few, whole = (torch.randn(tokens, 40) for tokens in (3, 60))
    accumulator = Streaming(SIZES, 0, 0)
    for name, x in (("layer", few), ("other", whole)):
        accumulator.add(name, x, torch.randn(len(x), 30), 1.0)
    accumulator.flush()
    factors = accumulator.factors(["layer", "other"])
    assert [int((1e-4 * factor.S[0] < factor.S).sum()) for factor in factors.values()] == [3, 10]
    for factor in factors.values():
        for side in (factor.U, factor.V):
            torch.testing.assert_close(side.mT @ side, torch.eye(10), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [Dense, Streaming])
def test_a_layer_that_runs_twice_in_a_pass_counts_twice(kind: Kind) -> None:
    (first, second), accumulator = blocks(2), kind(SIZES, 0, 0)
    accumulator.add("layer", *first)
    accumulator.add("layer", *second)
    accumulator.flush()
    factors = accumulator.factors(["layer"])["layer"]
    assert factors is not None
    s = torch.linalg.svdvals(total([first, second]))
    torch.testing.assert_close(factors.S[:4], s[:4], rtol=1e-3, atol=0)


def test_streaming_finds_late_directions_after_a_first_block_of_one_token() -> None:
    (x, g, _), parts = blocks(1)[0], blocks(12, seed=1)
    accumulator = Streaming(SIZES, 0, 0)
    for block in [(x[:1], g[:1], 1.0), *parts]:
        accumulator.add("layer", *block)
        accumulator.flush()
    factors = accumulator.factors(["layer"])["layer"]
    assert factors is not None
    true = total([(x[:1], g[:1], 1.0), *parts])
    captured = (factors.U[:, :4].mT @ true @ factors.V[:, :4]).norm()
    assert captured >= 0.999 * torch.linalg.svdvals(true)[:4].norm()


@pytest.mark.parametrize("power_steps", [0, 1])
def test_what_tokens_are_multiplied_with_lies_transposed_in_memory(power_steps: int) -> None:
    """In the other order these products take longer on a CPU."""
    accumulator = Streaming({"layer": Size(8, 4), "rows": Size(8, 4)}, power_steps, 0)
    for _ in range(2):  # the first block, and one after a truncation
        for x, g, weight in blocks(1, torch.float32):
            accumulator.add("layer", x, g, weight)
            accumulator.add("rows", UnitRows(torch.arange(len(x)) % INPUTS, INPUTS), g, weight)
        for stream in accumulator.streams.values():
            assert stream.z is not None
            for each in (stream.omega, stream.y, stream.z):
                assert each.mT.is_contiguous()
                assert not each.is_contiguous()
        accumulator.flush()
    accumulator.restore(accumulator.state(), dict.fromkeys(accumulator.streams, torch.device("cpu")))
    for stream in accumulator.streams.values():
        assert stream.omega.mT.is_contiguous()
        assert stream.y.mT.is_contiguous()


@pytest.mark.parametrize("kind", [Dense, Streaming])
def test_a_restored_accumulator_continues_as_the_uninterrupted_one(kind: Kind) -> None:
    """After each save a run goes on from what it has saved, so a resumed run computes on the same memory layout."""
    parts, names = blocks(9, torch.float32), ("layer", "other")
    devices = dict.fromkeys(names, torch.device("cpu"))
    whole, resumed = filled(kind, parts[:4], names), kind(SIZES, 0, 0)
    state = whole.state()
    assert all(value.is_contiguous() for value in state.values())
    resumed.restore({key: value.clone() for key, value in state.items()}, devices)
    whole.restore(state, devices)
    for x, g, weight in parts[4:]:
        for accumulator in (whole, resumed):
            for name in names:
                accumulator.add(name, x, g, weight)
            accumulator.flush()
    for name in names:
        mine, true = (each.factors([name])[name] for each in (resumed, whole))
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
        assert empty.factors(["layer"]) == {}
        assert empty.state() == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_kept_in_float32_for_models_of_lower_precision(dtype: torch.dtype) -> None:
    parts = blocks(4, dtype)
    for kind in (Dense, Streaming):
        accumulator = filled(kind, parts)
        assert {tensor.dtype for tensor in accumulator.state().values()} <= {torch.float32, torch.int64}
        factors = accumulator.factors(["layer"])["layer"]
        assert factors is not None
        assert factors.U.dtype == sum_dtype(dtype) == torch.float32
        assert factors.norm == pytest.approx(total(parts).norm().item(), rel=1e-5 if kind is Dense else 0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", [Dense, Streaming])
@pytest.mark.parametrize("broken", ["x", "g"])
def test_a_value_that_is_not_finite_raises_an_error_that_names_the_layer(
    kind: Kind, broken: str, dtype: torch.dtype
) -> None:
    x, g, weight = blocks(1, dtype)[0]
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
        found = accumulator.factors(["layer"])["layer"]
        assert found is not None
        merged = merge([(found, 1.0), (found.scaled(0.5), 2.0)], 8, probes(INPUTS, 0))
        limit = merged.limit(2)
    loaded = filled(kind, blocks(3, torch.float32)).factors(["layer"])["layer"]
    mixed = merge([(found, 1.0), (loaded, 2.0)], 8, probes(INPUTS, 0))  # a fresh estimate, and one from a file
    assert {part.device.type for each in (found, merged, mixed) for part in (each.U, each.S, each.V)} == {"meta"}
    assert 0 < limit <= 1


@pytest.mark.parametrize("kind", [Dense, Streaming])
@pytest.mark.parametrize("unit_rows", [False, True])
def test_a_restored_state_moves_to_where_the_layer_computes(kind: Kind, unit_rows: bool) -> None:
    """A state is restored to the device of the layer's parameters, which FSDP can keep on the CPU."""
    x, g, weight = blocks(1, torch.float32)[0]
    again = kind(SIZES, 0, 0)
    again.restore(filled(kind, [(x, g, weight)]).state(), {"layer": torch.device("cpu")})
    inputs = UnitRows(torch.zeros(len(g), dtype=torch.int64, device="meta"), INPUTS) if unit_rows else x.to("meta")
    again.add("layer", inputs, g.to("meta"), weight)
    places = {name: tensor.device.type for name, tensor in again.state().items() if not name.endswith("blocks")}
    assert set(places.values()) == {"meta"}


# --- products in TF32 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["ieee", "tf32"])
@pytest.mark.parametrize("before", ["none", "ieee", "tf32", "bf16"])
def test_the_setting_of_products_is_as_before_after_an_error_too(
    before: str, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, cpu = types.SimpleNamespace(fp32_precision=before), types.SimpleNamespace(fp32_precision=before)
    monkeypatch.setattr(torch.backends.cuda, "matmul", cuda)
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", cpu, raising=False)  # torch up to 2.8 has none
    found = []

    def fail() -> None:
        with float32_products(wanted):
            found.extend([cuda.fp32_precision, cpu.fp32_precision])
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert (cuda.fp32_precision, cpu.fp32_precision) == (before, before)
    if wanted == "tf32":
        assert found == ["tf32", before]
    else:
        assert set(found) <= {"none", "ieee"}


@pytest.mark.parametrize(("wanted", "expected"), [("ieee", "highest"), ("tf32", "high")])
@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_older_versions_of_torch_have_the_setting_under_another_name(
    before: str, wanted: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = [before]
    monkeypatch.setattr(torch.backends.cuda, "matmul", types.SimpleNamespace(allow_tf32=before != "highest"))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting[-1])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", setting.append)
    with float32_products(wanted):
        assert setting[-1] == expected
    assert setting[-1] == before


def test_threads_of_several_devices_do_not_see_each_others_setting() -> None:
    """Without a lock, the second would begin while the first is on."""
    before, inside, leave = precision(), [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def multiply(number: int) -> None:
        with float32_products("tf32" if number == 0 else "ieee"):
            inside[number].set()
            leave[number].wait(10)

    threads = [threading.Thread(target=multiply, args=(number,)) for number in (0, 1)]
    threads[0].start()
    assert inside[0].wait(10)
    threads[1].start()
    assert not inside[1].wait(0.3)
    for thread, event in zip(threads, leave, strict=True):
        event.set()
        thread.join(10)
    assert precision() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_only_numbers_that_tf32_has_are_multiplied_in_it(dtype: torch.dtype) -> None:
    half = dtype in (torch.bfloat16, torch.float16)
    on_cuda: Any = types.SimpleNamespace(is_cuda=True, dtype=dtype)
    assert exact_in_tf32(on_cuda) is half
    assert not exact_in_tf32(torch.zeros(1, dtype=dtype))
    if half:  # the largest and the smallest normal number, and one with all digits
        limits = torch.finfo(dtype)
        numbers = torch.tensor([limits.max, limits.tiny, 2 - limits.eps]).to(dtype).float()
        assert torch.equal(rounded_to_tf32(numbers), numbers)


def hard_blocks(kind: str, dtype: torch.dtype) -> Blocks:
    """Blocks in which the rounding of Z counts: inputs of few directions, or tokens that nearly cancel."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    outputs, inputs, tokens = 96, 128, 200
    few, common = normal(12, inputs), 10 * normal(1, inputs)
    mixing = normal(outputs, outputs) * torch.logspace(0, -3, outputs)
    found = []
    for _ in range(6):
        g = normal(tokens, outputs) @ mixing.mT
        if kind == "few directions":
            x = normal(tokens, 12) @ few
        else:
            x, g = normal(tokens, inputs) + common, g - g.mean(dim=0)
        found.append((x.to(dtype), g.to(dtype), 1.0))
    return found


def test_rounding_noise_is_not_taken_for_directions() -> None:
    """Columns of Y as short as the rounding of the others once gave singular values of 3 % of the first."""
    parts = hard_blocks("few directions", torch.float32)
    accumulator, exact = Streaming({"layer": Size(32, 32)}, 0, 0), torch.zeros(())
    for x, g, weight in parts:
        accumulator.add("layer", x, g, weight)
        accumulator.flush()
        exact = exact + weight * g.double().mT @ x.double()
        found = accumulator.factors(["layer"])["layer"]
        held = (found.U.double() * found.S.double()) @ found.V.double().mT
        assert (held - exact).norm() <= 1e-5 * exact.norm()
        assert found.norm == pytest.approx(float(exact.norm()), rel=1e-5)
        assert found.S[12] <= 1e-5 * found.S[0]


@pytest.mark.parametrize(
    "singular_values",
    [[1e4] + [1.0] * 20, [10.0**-i for i in range(12)], [1e3] + [1.0] * 4],
    ids=["one strong", "decaying", "few"],
)
def test_weak_directions_survive_where_a_layer_has_fewer_than_are_kept(singular_values: list[float]) -> None:
    """Where fewer than K directions are known, random ones take the place of the others."""
    outputs, inputs, count = 96, 120, len(singular_values)
    draw = torch.Generator().manual_seed(0)
    u, v, rows = (
        torch.linalg.qr(torch.randn(size, count, generator=draw, dtype=torch.float64)).Q
        for size in (outputs, inputs, 200)
    )
    exact = (u * torch.tensor(singular_values, dtype=torch.float64)) @ v.mT
    x, g = (rows @ v.mT).float(), (rows @ (u * torch.tensor(singular_values, dtype=torch.float64)).mT).float()
    accumulator = Streaming({"layer": Size(32, 16)}, 0, 0)
    for _ in range(4):
        accumulator.add("layer", x, g, 0.25)
        accumulator.flush()
    found = accumulator.factors(["layer"])["layer"]
    held = (found.U.double() * found.S.double()) @ found.V.double().mT
    assert (held - exact).norm() <= 1e-5 * exact.norm()
    assert (found.S[count:] == 0).all()
    assert found.V.mT @ found.V == pytest.approx(torch.eye(32), abs=1e-4)


@pytest.mark.parametrize("kind", ["few directions", "tokens that cancel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_estimate_loses_nothing_where_tf32_is_on(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision the estimate uses TF32 by itself. Here the user allows it too, in float32 as well."""
    parts = hard_blocks(kind, dtype)
    exact = total(parts)

    def error() -> float:
        accumulator = Streaming({"layer": Size(32, 32)}, 0, 0)
        for x, g, weight in parts:
            accumulator.add("layer", x, g, weight)
            accumulator.flush()
        found = accumulator.factors(["layer"])["layer"]
        return float(((found.U.double() * found.S.double()) @ found.V.double().mT - exact).norm() / exact.norm())

    in_float32 = error()
    monkeypatch.setattr(streaming, "exact_in_tf32", lambda g: g.dtype != torch.float32)
    monkeypatch.setattr(tensor_cores, "LARGE", 0)
    with float32_products("tf32"), Tf32() as mode:
        in_tf32 = error()
    assert mode.rounded == (0 if dtype == torch.float32 else 4 * len(parts))
    assert in_tf32 == pytest.approx(in_float32, rel=1e-3, abs=1e-3)


def test_only_large_blocks_are_multiplied_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of 200 tokens, 96 outputs and 128 inputs, and Ω with 48 directions and the probes."""
    ((x, g, weight),) = hard_blocks("few directions", torch.bfloat16)[:1]
    monkeypatch.setattr(streaming, "exact_in_tf32", lambda g: g.dtype == torch.bfloat16)
    for large, rounded in ((2 * 200 * (48 + PROBES) * (96 + 128), 4), (2 * 200 * (48 + PROBES) * (96 + 128) + 1, 0)):
        monkeypatch.setattr(tensor_cores, "LARGE", large)
        with Tf32() as mode:
            Streaming({"layer": Size(32, 32)}, 0, 0).add("layer", x, g, weight)
        assert mode.rounded == rounded
    rows = UnitRows(torch.zeros(200, dtype=torch.long), 50_000)
    assert multiplications(rows, g, 48) == 2 * 200 * 48 * 96  # an embedding's rows are looked up


@pytest.mark.parametrize("kind", [Dense, Streaming])
def test_sums_are_never_rounded_to_tf32_where_it_is_allowed(kind: Kind) -> None:
    parts = blocks(3, torch.float32)
    with float32_products("tf32"), Tf32() as mode:
        one, other = (kind(SIZES, 1, 0, watched=kind is Streaming) for _ in range(2))
        for x, g, weight in parts:
            for each in (one, other):
                each.add("layer", x, g, weight)
                each.flush()
            one.changes()
        again = kind(SIZES, 1, 0)
        again.restore(other.state(), {"layer": torch.device("cpu")})
        one.absorb(again.state())
        found = one.factors(["layer"])["layer"]
        merged = merge([(found, 1.0), (found.scaled(0.5), 2.0)], 8, probes(INPUTS, 0))
    assert mode.rounded == 0
    assert merged.norm == pytest.approx(2 * float(2 * total(parts).norm()), rel=0.2)


def test_values_are_read_from_a_device_without_float64() -> None:
    class OnApple:
        device = torch.device("mps")

        def to(self, device: Any, dtype: torch.dtype) -> Tensor:
            if torch.device(device).type == "mps":
                raise TypeError("MPS has no float64")
            return torch.tensor([2.5, 3.0], dtype=dtype, device=device)

    values: Any = [OnApple(), torch.tensor([4])]
    assert read(values) == [2.5, 3.0, 4.0]
    assert read([]) == []
