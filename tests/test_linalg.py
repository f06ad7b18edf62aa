"""Linear algebra on matrices with a known spectrum: streaming, merging, truncation, norms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lora_ga.linalg.accumulator import Size
from lora_ga.linalg.low_rank import LowRank, estimated_norm, generator, merge, merge_factors, probes, truncated_svd
from lora_ga.linalg.streaming import Streaming, direction_change, orthonormal, truncate


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
