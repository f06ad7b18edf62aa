"""Estimates add up: any order and grouping gives the estimate of one run over all batches."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import safe_open, save_file
from torch import Tensor

import lora_ga
from cases import EXPERTS, mixtral, seeded
from lora_ga import GradientEstimate, LoraGAConfig
from lora_ga.linalg.low_rank import LowRank, probes, truncated_svd
from toys import adapted, causal, llama, tokens

INPUTS, OUTPUTS = 9, 7
WEIGHTS = (5.0, 1.0, 12.0, 3.0)
BATCHES = (2, 1, 4, 1)
# Layer → which of the four runs reached it, as an expert is reached by the tokens of some batches only.
REACHED = {"dense": (0, 1, 2, 3), "common": (0, 2, 3), "rare": (1,), "late": (2, 3), "first": (0,)}
# Layer → the run in which it converged, and after how many batches and label tokens.
SETTLED = {"late": (3, 1, 2.0), "first": (0, 1, 2.0)}


def gradient(name: str, run: int) -> Tensor:
    """The mean gradient of a layer over the batches of one run."""
    seed = 10 * list(REACHED).index(name) + run
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def single(run: int) -> GradientEstimate:
    """The estimate of one run, which keeps every direction."""
    layers = {}
    for name, runs in REACHED.items():
        if run in runs:
            g = gradient(name, run)
            layers[name] = LowRank(*truncated_svd(g, OUTPUTS), g.norm().item(), g @ probes(INPUTS, 0).double())
    settled = {name: (batches, weight) for name, (when, batches, weight) in SETTLED.items() if when == run}
    return GradientEstimate(
        layers,
        LoraGAConfig(),
        "0" * 16,
        WEIGHTS[run],
        BATCHES[run],
        missing={name: "got no token" for name in REACHED if name not in layers},
        settled={name: batches for name, (batches, _) in settled.items()},
        settled_weight={name: weight for name, (_, weight) in settled.items()},
    )


def weight_in(name: str, run: int) -> float:
    """How many label tokens of a run a layer has seen, whether or not they reached it."""
    when, _, weight = SETTLED.get(name, (None, 0, 0.0))
    return weight if when == run else WEIGHTS[run]


def groupings(parts: Sequence[GradientEstimate]) -> Iterator[GradientEstimate]:
    """Every way to add up estimates in their order: all at once, or groups of neighbours first."""
    if len(parts) == 1:
        yield parts[0]
        return
    for cuts in itertools.product((False, True), repeat=len(parts) - 1):
        if not any(cuts):
            continue
        edges = [0, *(at for at, cut in enumerate(cuts, start=1) if cut), len(parts)]
        for groups in itertools.product(*(list(groupings(parts[a:b])) for a, b in itertools.pairwise(edges))):
            yield groups[0].merge(*groups[1:])


def product(layer: LowRank) -> Tensor:
    return (layer.U * layer.S) @ layer.V.mT


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_every_grouping_and_order_gives_the_mean_over_all_label_tokens(order: tuple[int, ...]) -> None:
    parts = [single(run) for run in order]
    merged = list(groupings(parts))
    assert len(merged) == 11
    for whole in merged:
        assert (whole.weight, whole.batches) == (sum(WEIGHTS), sum(BATCHES))
        assert whole.settled == {"late": 8 - 1 + 1, "first": 8 - 2 + 1}
        assert not whole.missing
        assert sorted(whole.merged_from) == sorted(digest for run in range(4) for digest in single(run)._digests())
        for name, runs in REACHED.items():
            total = sum(weight_in(name, run) for run in range(4))
            assert whole.weight_of(name) == total
            true = torch.stack([weight_in(name, run) / total * gradient(name, run) for run in runs]).sum(dim=0)
            torch.testing.assert_close(product(whole[name]), true, rtol=1e-11, atol=1e-12)
            assert whole[name].norm == pytest.approx(true.norm().item(), rel=1e-11)
            torch.testing.assert_close(whole[name].sketch, true @ probes(INPUTS, 0).double(), rtol=1e-11, atol=1e-11)


def test_estimates_of_a_mixture_with_silent_experts_add_up_to_that_of_one_run() -> None:
    config = LoraGAConfig(estimator="dense", oversample=64, on_missing="lora")
    base = seeded(mixtral)()
    model = adapted(base, **EXPERTS)
    # One token repeated reaches few experts.
    ids = [torch.full((1, 3), 5), torch.full((1, 4), 40), tokens(2, 8)]
    batches: list[Any] = [{"input_ids": each, "labels": each} for each in ids]
    with pytest.warns(UserWarning, match="experts .or groups. got no gradient"):
        parts = [lora_ga.estimate_gradients(model, [batch], config) for batch in batches]
    whole = lora_ga.estimate_gradients(model, batches, config)
    silent = {name for part in parts for name in part.missing} & {*whole}
    assert silent, "every expert got a token in every part, so the test shows nothing"
    a, b, c = parts
    for merged in (a.merge(b, c), a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a, b), b.merge(c.merge(a))):
        assert set(merged) == set(whole)
        for name in whole:
            difference = (product(merged[name]) - product(whole[name])).norm()
            assert difference <= 1e-5 * whole[name].norm, name
            assert merged[name].norm == pytest.approx(whole[name].norm, rel=1e-5)


@pytest.mark.parametrize(
    ("runs", "numbers"),
    [((0, 0), "1 and 2"), ((0, 1, 1), "2 and 3"), ((0, 1, 0), "1 and 3"), ((2, 1, 0, 1), "2 and 4")],
)
def test_the_same_estimate_given_twice_is_refused_wherever_it_stands(runs: tuple[int, ...], numbers: str) -> None:
    first, *others = [single(run) for run in runs]
    with pytest.raises(ValueError, match=f"Estimates {numbers} are one and the same, which would count twice"):
        first.merge(*others)


def test_an_estimate_that_is_in_a_sum_is_refused_also_after_saving(tmp_path: Path) -> None:
    a, b, c = (single(run) for run in range(3))
    a.merge(b).save(tmp_path / "sum.safetensors")
    b.save(tmp_path / "b.safetensors")
    both, again = (GradientEstimate.load(tmp_path / f"{name}.safetensors") for name in ("sum", "b"))
    for parts, numbers in (((both, again), "1 and 2"), ((c, again, both), "2 and 3"), ((both, c.merge(b)), "1 and 2")):
        with pytest.raises(ValueError, match=f"(?s)Estimates {numbers} contain the same estimate.*each of them once"):
            parts[0].merge(*parts[1:])
    with pytest.raises(ValueError, match="1 and 2 are one and the same"):
        both.merge(b.merge(a))
    assert both.merge(c).merged_from == a.merge(b, c).merged_from


def test_files_written_before_sums_listed_their_parts_still_load(tmp_path: Path) -> None:
    single(0).merge(single(1)).save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    record = json.loads(header["record"])
    del record["merged_from"]
    save_file(tensors, tmp_path / "old.safetensors", header | {"record": json.dumps(record)})
    old = GradientEstimate.load(tmp_path / "old.safetensors")
    assert old.merged_from == ()
    assert old.merge(single(2)).weight == sum(WEIGHTS[:3])


def test_ranks_are_compared_between_estimates_that_the_first_lacks() -> None:
    first, second, third = (single(run) for run in (1, 2, 3))
    late = third["late"]
    shorter = LowRank(late.U[:, :5], late.S[:5], late.V[:, :5], late.norm, late.sketch)
    with pytest.raises(ValueError, match="Estimates 2 and 3 hold 7 and 5 directions of late; make both with one rank"):
        first.merge(second, dataclasses.replace(third, layers=dict(third) | {"late": shorter}))


def test_estimates_of_a_model_without_experts_are_what_they_were() -> None:
    """The weight of all parts is that of the parts which have the layer, if all have it."""
    model = adapted(llama())
    one, other = (lora_ga.estimate_gradients(model, part) for part in (causal(3)[:1], causal(3)[1:]))
    merged = one.merge(other)
    for name in merged:
        sketches = [each[name].sketch * (each.weight / merged.weight) for each in (one, other)]  # type: ignore[operator]
        assert torch.equal(merged[name].sketch, torch.stack(sketches).sum(dim=0))  # type: ignore[arg-type]
