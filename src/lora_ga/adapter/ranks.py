"""Ranks of single layers under a budget of parameters, from an estimate."""

from __future__ import annotations

import collections
import dataclasses
import heapq
import math
import re
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from torch import nn

from lora_ga.base import another_base
from lora_ga.gradients.result import GradientEstimate
from lora_ga.layers.kinds import base_weights
from lora_ga.layers.targets import find_targets, peft_model_in
from lora_ga.linalg.low_rank import LowRank

# What one more rank is worth to a layer of this rank; the largest gets it.
Worth = Callable[[str, int], float]


@dataclasses.dataclass(frozen=True)
class RankAllocation:
    """Ranks of layers, and the settings of PEFT that give them to an adapter.

    Attributes:
        ranks: Layer name → r.
        parameters: Trained parameters of the adapter, the sum of r·(d_out + d_in).
        scaling: s, the same for all layers.
        use_rslora: Whether s is α/√r rather than α/r.
    """

    ranks: Mapping[str, int]
    parameters: int
    scaling: float
    use_rslora: bool

    @property
    def r(self) -> int:
        """The most frequent rank, for `LoraConfig.r`."""
        return collections.Counter(self.ranks.values()).most_common(1)[0][0]

    @property
    def rank_pattern(self) -> dict[str, int]:
        """`LoraConfig.rank_pattern`: an entry for each layer of another rank, by its full name."""
        return {f"^{re.escape(name)}": rank for name, rank in self.ranks.items() if rank != self.r}

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """`LoraConfig.alpha_pattern`: the α that gives these layers the scaling s."""
        return {f"^{re.escape(name)}": self._alpha(rank) for name, rank in self.ranks.items() if rank != self.r}

    def lora_settings(self) -> dict[str, Any]:
        """The arguments of `LoraConfig` about ranks and scaling."""
        return {
            "r": self.r,
            "lora_alpha": self._alpha(self.r),
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "use_rslora": self.use_rslora,
        }

    def _alpha(self, rank: int) -> float:
        return self.scaling * (math.sqrt(rank) if self.use_rslora else rank)


def allocate_ranks(
    estimate: GradientEstimate,
    budget: int,
    by: str = "spectrum",
    *,
    model: nn.Module | None = None,
    max_rank: int | None = None,
    scaling: float = 2.0,
    use_rslora: bool = False,
) -> RankAllocation:
    """Divide a budget of trained parameters among the layers of an estimate. Every layer gets a rank of at least 1.

    One rank after the other goes to the layer where it is worth most, as long as the budget holds one.

    - "spectrum": worth is the gradient's energy in the next two directions, σ²₂ᵣ₊₁ + σ²₂ᵣ₊₂, which one more rank of
      LoRA-GA can follow.
    - "importance": ranks in proportion to mean|W ⊙ G|/√(d_out + d_in), as in H. He and others, "GoRA: Gradient-driven
      Adaptive Low Rank Adaptation", 2025 (arXiv 2502.12171), with the part of G that the estimate keeps. Needs `model`.
    - "uniform": equal ranks.

    The adapter of rank r that trains is saved with rank 2r, twice the parameters.

    Args:
        estimate: The estimate. A layer of rank r needs 2r of its directions: make it with a large `oversample`.
        budget: Trained parameters, the sum of r·(d_out + d_in) over the layers.
        by: "spectrum", "importance" or "uniform".
        model: For "importance", the model of the estimate, with its adapter.
        max_rank: The largest rank of a layer; None for half of its smaller side.
        scaling: s, the same for all layers.
        use_rslora: Whether the adapter's s is α/√r rather than α/r.

    Returns:
        The ranks; `LoraConfig(**allocation.lora_settings(), target_modules=...)` makes their adapter.

    Raises:
        TypeError: `estimate` is no `GradientEstimate`, or a setting is of another kind.
        ValueError: The budget is below one rank for every layer, or above all ranks; a rank needs more directions than
            the estimate keeps; a setting is not allowed; the estimate has layers of several parts, or is of another
            model.
    """
    GradientEstimate.check(estimate)
    layers = {name: layer for name, layer in estimate.items() if layer.norm > 0}
    _check_layers(layers)
    _check_numbers(budget, max_rank, scaling, use_rslora)
    largest = {name: min(layer.U.shape[0], layer.V.shape[0]) // 2 for name, layer in layers.items()}
    if max_rank is not None:
        largest = {name: min(rank, max_rank) for name, rank in largest.items()}
    costs = {name: layer.U.shape[0] + layer.V.shape[0] for name, layer in layers.items()}
    least, most = sum(costs.values()), sum(costs[name] * largest[name] for name in layers)
    if not least <= budget <= most:
        raise ValueError(
            f"The budget is {budget:,} parameters, but the {len(layers)} layers of the estimate take at least "
            f"{least:,} (rank 1 everywhere) and at most {most:,} ({_at_most(max_rank)}). Give a budget between these."
        )
    if by not in WORTHS:
        raise ValueError(f"by is {by!r}; it must be one of {', '.join(WORTHS)}.")
    ranks = _greedy(layers, costs, largest, budget, WORTHS[by](estimate, model))
    return RankAllocation(ranks, sum(costs[name] * rank for name, rank in ranks.items()), scaling, use_rslora)


def _check_numbers(budget: Any, max_rank: Any, scaling: Any, use_rslora: Any) -> None:
    """Refuse arguments of another kind.

    Raises:
        TypeError: One of them is.
        ValueError: max_rank or the scaling is too small.
    """
    for name, value in (("budget", budget), ("max_rank", max_rank)):
        if not isinstance(value, Integral) and not (value is None and name == "max_rank"):
            raise TypeError(f"{name} is {value!r}; it must be an integer{', or None' * (name == 'max_rank')}.")
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank is {max_rank}; it must be at least 1, or None.")
    if not isinstance(use_rslora, bool):
        raise TypeError(f"use_rslora is {use_rslora!r}; it must be True or False.")
    if not isinstance(scaling, Real):
        raise TypeError(f"scaling is {scaling!r}; it must be a number.")
    if not 0 < float(scaling) < math.inf:
        raise ValueError(f"scaling is {scaling}; it must be above 0 and finite: α/r, or α/√r with use_rslora.")


def _at_most(max_rank: int | None) -> str:
    return "half of the smaller side" if max_rank is None else f"half of the smaller side, and max_rank={max_rank}"


def _check_layers(layers: Mapping[str, LowRank]) -> None:
    """Refuse an estimate that has no layers, or layers of several parts.

    Raises:
        ValueError: It is one of these.
    """
    if not layers:
        raise ValueError("The estimate has no layer with a gradient; there is nothing to give ranks to.")
    part = next((name for name in layers if name.endswith("]")), None)
    if part is not None:
        raise ValueError(
            f"{part} is a part of a layer (a group or an expert), and PEFT gives all parts of a layer one rank. Make "
            "the estimate without target_parameters and grouped convolutions."
        )


def _greedy(
    layers: Mapping[str, LowRank],
    costs: Mapping[str, int],
    largest: Mapping[str, int],
    budget: int,
    worth: Worth,
) -> dict[str, int]:
    """Ranks, given one at a time to the layer where one more is worth most; the first of equals.

    Returns:
        Layer name → rank.

    Raises:
        ValueError: A layer would get a rank that needs more directions than the estimate keeps.
    """
    ranks, left = dict.fromkeys(layers, 1), budget - sum(costs.values())
    order = {name: index for index, name in enumerate(layers)}
    waiting = [(-worth(name, 1), order[name], name) for name in layers]
    heapq.heapify(waiting)
    while waiting:
        _, _, name = heapq.heappop(waiting)
        if ranks[name] >= largest[name] or costs[name] > left:
            continue
        kept = layers[name].S.numel()
        if 2 * ranks[name] + 2 > kept:
            fits = sum(costs[each] * min(largest[each], kept // 2) for each in layers) >= budget
            lower = f", or allow ranks up to {kept // 2} only (max_rank={kept // 2})" if fits else ""
            raise ValueError(
                f"{name}: rank {ranks[name] + 1} needs {2 * ranks[name] + 2} gradient directions, but the estimate "
                f"holds {kept}. Estimate again with a larger oversample{lower}."
            )
        ranks[name] += 1
        left -= costs[name]
        heapq.heappush(waiting, (-worth(name, ranks[name]), order[name], name))
    return ranks


def _by_spectrum(estimate: GradientEstimate, model: nn.Module | None) -> Worth:
    """Energies of the next two directions; where they are not kept, the last kept one bounds them."""
    energies = {name: layer.S.double().square().tolist() for name, layer in estimate.items()}

    def worth(name: str, rank: int) -> float:
        held = energies[name]
        return sum(held[index] if index < len(held) else held[-1] for index in (2 * rank, 2 * rank + 1))

    return worth


def _by_importance(estimate: GradientEstimate, model: nn.Module | None) -> Worth:
    if model is None:
        raise ValueError('by="importance" compares gradients with weights: give the model of the estimate (model=...).')
    if difference := another_base(peft_model_in(model), estimate.fingerprint, layers=estimate.shapes()):
        raise ValueError(f"The estimate belongs to another model: {difference}. Give the model of the estimate.")
    adapter = next(iter(peft_model_in(model).peft_config))
    targets = find_targets(model, adapter, fresh=False)
    shares = {}
    for name, layer in estimate.items():
        if name not in targets:
            raise ValueError(f"{name} is in the estimate, but adapter {adapter!r} of the model does not have it.")
        weight = base_weights(targets[name].layer)[0].detach()
        product = weight * ((layer.U * layer.S) @ layer.V.mT).to(weight)
        shares[name] = product.abs().float().mean().item() / math.sqrt(sum(weight.shape))
    return lambda name, rank: shares[name] / (rank + 1)


# How `by` makes the worth of one more rank. Worth c/(r + 1) gives ranks in proportion to c.
WORTHS: Mapping[str, Callable[[GradientEstimate, nn.Module | None], Worth]] = {
    "spectrum": _by_spectrum,
    "importance": _by_importance,
    "uniform": lambda estimate, model: lambda name, rank: 1 / (rank + 1),
}
