"""Settings, and A and B from singular directions: each direction and each scale against its formula."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

import lora_ga
from lora_ga import GradientEstimate, allocate_ranks
from lora_ga.adapter.directions import DIRECTIONS, SCALES, LayerSpec, leading_singular_values, split
from lora_ga.config import CHOICES, LoraGAConfig
from lora_ga.layers.kinds import base_weights
from lora_ga.layers.targets import find_targets
from lora_ga.linalg.low_rank import LowRank, truncated_svd
from toys import adapted, causal, llama, lora_settings

RANK, OUTPUTS, INPUTS = 3, 16, 12
G = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
W = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def part(kept: int = 10) -> LowRank:
    return LowRank(*truncated_svd(G, kept), norm=G.norm().item())


def layer(**settings: Any) -> LayerSpec:
    return LayerSpec("layer", OUTPUTS, RANK, 2.5, LoraGAConfig(**settings), lambda: W)


def alignment_ratio(a: Tensor, b: Tensor) -> float:
    """Return cos(G AᵀA + B BᵀG, G) divided by its limit."""
    step = G @ a.mT @ a + b @ b.mT @ G
    cosine = (step * G).sum() / (step.norm() * G.norm())
    return (cosine / (torch.linalg.svdvals(G)[: 2 * RANK].norm() / G.norm())).item()


def test_the_tables_have_one_entry_for_every_choice_of_the_configuration() -> None:
    assert set(DIRECTIONS) == set(CHOICES["direction"])
    assert set(SCALES) == set(CHOICES["scale"])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_direction_and_scale_reaches_the_alignment_limit(direction: str, scale: str) -> None:
    a, b = split(part(), layer(direction=direction, scale=scale))
    assert a.shape == (RANK, INPUTS)
    assert b.shape == (OUTPUTS, RANK)
    assert alignment_ratio(a, b) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rows_of_a_and_columns_of_b_come_from_disjoint_halves_of_the_first_2r_directions(direction: str) -> None:
    rows, columns = DIRECTIONS[direction](layer(direction=direction))
    assert sorted([*rows.tolist(), *columns.tolist()]) == list(range(2 * RANK))


def test_the_papers_direction_gives_a_the_first_right_and_b_the_next_left_vectors() -> None:
    a, b = split(part(), layer(scale="unit"))
    torch.testing.assert_close(a, part().V[:, :RANK].mT)
    torch.testing.assert_close(b, part().U[:, RANK : 2 * RANK])


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"scale": "stable", "stable_gamma": 16.0}, OUTPUTS**0.25 / math.sqrt(16.0)),
        ({"scale": "stable"}, 0.35 / 2.5),
        ({"scale": "stable", "reach": 0.7}, 0.7 / 2.5),
        ({"scale": "gd"}, 1 / 2.5),
        ({"scale": "unit"}, 1.0),
        ({"scale": "weight"}, (torch.linalg.svdvals(W)[:RANK] / 2.5).sqrt().mean().item()),
    ],
)
def test_both_factors_have_the_size_their_scale_states(settings: dict[str, Any], factor: float) -> None:
    a, b = split(part(), layer(**settings))
    torch.testing.assert_close(a.norm(dim=1), torch.full((RANK,), factor, dtype=torch.float64))
    torch.testing.assert_close(b.norm(dim=0), torch.full((RANK,), factor, dtype=torch.float64))


def test_random_halves_depend_only_on_the_seed() -> None:
    first, again, other = (DIRECTIONS["random"](layer(seed=seed))[0].tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_an_estimate_with_too_few_directions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer: rank 3 needs 6 gradient directions, but the estimate holds 4\."):
        split(part(kept=4), layer())


def test_the_leading_singular_values_of_a_weight_equal_those_of_the_full_svd() -> None:
    w = torch.randn(30, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = w * 0.7 ** torch.arange(40)
    torch.testing.assert_close(leading_singular_values(w, 5, 0, "layer"), torch.linalg.svdvals(w)[:5])


@pytest.mark.parametrize("settings", [{}, {"scale": "gd"}])
def test_a_scale_that_divides_by_a_scaling_of_zero_is_refused(settings: dict[str, Any]) -> None:
    still = dataclasses.replace(layer(**settings), scaling=0.0)
    with pytest.raises(ValueError, match=r"layer: the LoRA scaling is 0.0.*lora_alpha above 0, or set stable_gamma"):
        split(part(), still)


@pytest.mark.parametrize(("outputs", "rank", "scaling"), [(16, 3, 2.5), (16, 1, 2.5), (64, 3, 2.5), (16, 3, 16.0)])
def test_the_chosen_gamma_gives_every_layer_the_same_reach(outputs: int, rank: int, scaling: float) -> None:
    """The reach is the same for every width, rank and α. γ is the one that the docstring of `LoraGAConfig` states."""
    g = torch.randn(outputs, INPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    held = LowRank(*truncated_svd(g, 10), norm=g.norm().item())
    config = LoraGAConfig(reach=0.5)
    shape = dataclasses.replace(layer(), outputs=outputs, rank=rank, scaling=scaling, config=config)
    a, b = split(held, shape)
    torch.testing.assert_close(scaling * a.norm(dim=1), torch.full((rank,), 0.5, dtype=torch.float64))
    gamma = (scaling / 0.5) ** 2 * math.sqrt(outputs)
    again = split(held, dataclasses.replace(shape, config=LoraGAConfig(stable_gamma=gamma)))
    for one, other in zip((a, b), again, strict=True):
        torch.testing.assert_close(one, other)


def random_halves(name: str, seed: int = 0, rank: int = 8) -> tuple[Tensor, Tensor]:
    """Which singular directions A and B of a layer get with direction="random"."""
    eye = torch.eye(2 * rank, 2 * rank, dtype=torch.float64)
    low_rank = LowRank(eye, torch.ones(2 * rank, dtype=torch.float64), eye, norm=1.0)
    config = LoraGAConfig(direction="random", scale="unit", seed=seed)
    a, b = split(low_rank, LayerSpec(name, 2 * rank, rank, 1.0, config, lambda: eye))
    return a.argmax(dim=1), b.argmax(dim=0)


def test_random_halves_are_drawn_anew_for_every_layer_and_seed_and_alike_in_every_run() -> None:
    names = [f"model.layers.{index}.{kind}" for index in range(4) for kind in ("q_proj", "v_proj")]
    halves = {(name, seed): random_halves(name, seed) for name in names for seed in (0, 1)}
    for (name, seed), (a, b) in halves.items():
        assert sorted([*a.tolist(), *b.tolist()]) == list(range(16))
        again = random_halves(name, seed)
        assert torch.equal(a, again[0])
        assert torch.equal(b, again[1])
    assert len({tuple(a.tolist()) for a, _ in halves.values()}) == len(halves)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("direction", "ArB", "direction is 'ArB'; it must be one of ArB2r, A2rBr, ArBr, random"),
        ("scale", "weight_svd", "scale is 'weight_svd'; it must be one of stable, gd, unit, weight"),
        ("offset", "layer", "offset is 'layer'; it must be one of adapter, base"),
        ("estimator", "svd", "estimator is 'svd'; it must be one of streaming, dense, probe"),
        ("on_missing", "warn", "on_missing is 'warn'; it must be one of error, lora"),
        ("stable_gamma", 0, "stable_gamma is 0; it must be a finite number above 0"),
        ("stable_gamma", float("inf"), "stable_gamma is inf"),
        ("reach", 0, "reach is 0; it must be a finite number above 0"),
        ("reach", True, "reach is True; it must be a finite number above 0"),
        ("oversample", -1, "oversample is -1; it must be an integer of at least 0"),
        ("power_steps", 1.5, "power_steps is 1.5; it must be an integer of at least 0"),
        ("max_batches", [8], r"max_batches is \[8\]; it must be an integer of at least 1"),
        ("max_batches", 0, "max_batches is 0; it must be an integer of at least 1"),
        ("seed", True, "seed is True; it must be an integer"),
        ("tolerance", 0, "tolerance is 0; it must be None or between 0 and 1"),
        ("tolerance", 1.5, "tolerance is 1.5; it must be None or between 0 and 1"),
        ("tolerance", True, "tolerance is True; it must be None or between 0 and 1"),
    ],
)
def test_an_invalid_value_raises_an_error_that_says_what_is_allowed(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraGAConfig(**{field: value})


def test_a_tolerance_needs_the_streaming_estimator() -> None:
    for other in ("dense", "probe"):
        with pytest.raises(ValueError, match=rf'tolerance is 0.1 with estimator="{other}".* estimator="streaming"'):
            LoraGAConfig(tolerance=0.1, estimator=other)


def test_two_ways_to_choose_the_size_of_the_start_are_refused_but_in_old_files() -> None:
    with pytest.raises(ValueError, match=r"stable_gamma=16 and reach=1\. .* Leave one of them out"):
        LoraGAConfig(stable_gamma=16, reach=1)
    record = LoraGAConfig(stable_gamma=16).to_dict()
    assert LoraGAConfig.from_record(record | {"reach": 1.0}) == LoraGAConfig(stable_gamma=16)
    assert LoraGAConfig.from_record(LoraGAConfig(reach=1).to_dict()) == LoraGAConfig(reach=1)


def test_the_number_of_directions_is_twice_the_rank_plus_oversample() -> None:
    assert LoraGAConfig(oversample=5).directions(8) == 21
    assert LoraGAConfig(oversample=0).directions(3) == 6


def test_settings_survive_the_conversion_to_a_dict_and_back() -> None:
    config = LoraGAConfig(direction="random", stable_gamma=64, max_batches=None, tolerance=0.01)
    assert LoraGAConfig.from_dict(config.to_dict()) == config


def test_an_unknown_setting_raises_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no setting gamma; it has direction, estimator, .*stable_gamma"):
        LoraGAConfig.from_dict({"gamma": 16})


# --- ranks under a budget --------------------------------------------------------------------------------------------


def spectra(**values: list[float]) -> GradientEstimate:
    """Layers of 16 outputs and 12 inputs with given singular values; a rank costs 28 parameters."""
    layers = {
        name: LowRank(torch.eye(16, len(s)), torch.tensor(s), torch.eye(12, len(s)), sum(v * v for v in s) ** 0.5)
        for name, s in values.items()
    }
    return GradientEstimate(layers, LoraGAConfig(), "0" * 16, 1.0, 1)


KNOWN = spectra(a=[9, 8, 5, 4, 3, 2, 1, 1], b=[7, 7, 6, 6, 1, 1, 1, 1])


def test_the_limit_needs_two_directions_for_each_rank() -> None:
    assert KNOWN["a"].limit(4) == pytest.approx(1)
    assert math.isnan(KNOWN["a"].limit(5))


def test_ranks_go_to_the_largest_energies_under_the_budget() -> None:
    """The first two directions are rank 1. Then b's 36 + 36 come before a's 25 + 16, and a's 9 + 4 before b's 1 + 1."""
    found = [allocate_ranks(KNOWN, 28 * ranks).ranks for ranks in range(2, 7)]
    assert [(each["a"], each["b"]) for each in found] == [(1, 1), (1, 2), (2, 2), (3, 2), (4, 2)]
    assert allocate_ranks(KNOWN, 28 * 5 - 1).parameters == 28 * 4
    assert allocate_ranks(KNOWN, 28 * 4, by="uniform").ranks == {"a": 2, "b": 2}
    assert allocate_ranks(KNOWN, 28 * 6, max_rank=3).ranks == {"a": 3, "b": 3}
    assert allocate_ranks(KNOWN, 28 * 2, max_rank=1).ranks == {"a": 1, "b": 1}
    # 25 + 0 against 16 + 16: both directions count. And the last kept one bounds those that are not kept: 2 against 72.
    assert allocate_ranks(spectra(a=[9, 9, 5, 0, 0, 0], b=[7, 7, 4, 4, 0, 0]), 28 * 3).ranks == {"a": 1, "b": 2}
    assert allocate_ranks(spectra(a=[9, 9, 9, 1], b=[7, 7, 7, 7, 6, 6]), 28 * 5).ranks == {"a": 2, "b": 3}


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (55, {}, r"The budget is 55 parameters, but the 2 layers of the estimate take at least 56 \(rank 1"),
        (337, {}, "and at most 336 .half of the smaller side."),
        (196, {}, r"a: rank 5 needs 10 gradient directions, but the estimate holds 8.* up to 4 only \(max_rank=4\)\."),
        (300, {}, r"the estimate holds 8. Estimate again with a larger oversample\.$"),  # rank 4 everywhere takes 224
        (60, {"scaling": 0}, "scaling is 0; it must be above 0"),
        (60, {"scaling": math.inf}, "scaling is inf; it must be above 0 and finite"),
        (60, {"by": "norm"}, "by is 'norm'; it must be one of spectrum, importance, uniform"),
        (60, {"max_rank": 0}, "max_rank is 0; it must be at least 1"),
        (60, {"by": "importance"}, "give the model of the estimate"),
    ],
)
def test_a_budget_or_a_setting_that_cannot_be_met_is_refused(budget: int, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate_ranks(KNOWN, budget, **options)


def test_the_advice_of_a_refused_budget_works() -> None:
    assert allocate_ranks(KNOWN, 196, max_rank=4).parameters == 196


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        ("60", {}, "budget is '60'; it must be an integer"),
        (None, {}, "budget is None; it must be an integer"),
        (60, {"max_rank": 2.5}, "max_rank is 2.5; it must be an integer, or None"),
        (60, {"scaling": "2"}, "scaling is '2'; it must be a number"),
        (60, {"use_rslora": "no"}, "use_rslora is 'no'; it must be True or False"),
    ],
)
def test_a_budget_or_a_setting_of_another_kind_is_refused(budget: Any, options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        allocate_ranks(KNOWN, budget, **options)


def test_an_estimate_of_experts_gets_no_ranks() -> None:
    estimate = dataclasses.replace(KNOWN, layers={"experts.up[0]": KNOWN["a"]})
    with pytest.raises(ValueError, match=r"experts.up\[0\] is a part of a layer"):
        allocate_ranks(estimate, 100)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_settings_of_an_allocation_give_peft_its_ranks_and_one_scaling(use_rslora: bool) -> None:
    """Ranks by importance follow mean|W ⊙ G|/√(d_out + d_in). The estimate starts the adapter of these ranks."""
    targets, config = ["q_proj", "up_proj"], LoraGAConfig(estimator="dense")
    model = adapted(llama(), targets)
    estimate = lora_ga.estimate_gradients(model, causal(1), config)
    allocation = allocate_ranks(estimate, 1600, by="importance", model=model, scaling=3.0, use_rslora=use_rslora)
    assert 1500 < allocation.parameters <= 1600
    assert len(set(allocation.ranks.values())) > 1
    shares = {}
    for name, target in find_targets(model).items():
        g, w = (estimate[name].U * estimate[name].S) @ estimate[name].V.mT, base_weights(target.layer)[0]
        shares[name] = (w * g).abs().mean().item() / math.sqrt(sum(w.shape))
    proportion = {name: share / sum(shares.values()) * sum(allocation.ranks.values()) for name, share in shares.items()}
    assert all(abs(allocation.ranks[name] - proportion[name]) < 1 for name in shares)
    fresh = get_peft_model(llama(), lora_settings(targets, **allocation.lora_settings()))
    lora_ga.apply_estimate(fresh, estimate, config)
    for name, target in find_targets(fresh, fresh=False).items():
        assert target.rank == allocation.ranks[name]
        assert target.layer.scaling["default"] == pytest.approx(3.0)
