"""Splitting the leading singular directions of a gradient into A and B. Pure functions; two tables that compose.

All formulas are those of "LoRA-GA: Low-Rank Adaptation with Gradient Approximation" (Wang, Yu, Li, NeurIPS 2024, arXiv
2407.05000). None uses the gradient's singular values, so the start does not depend on the size of the loss.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lora_ga.config import LoraGAConfig
from lora_ga.linalg.low_rank import LowRank, generator


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What a direction or scale may depend on.

    Attributes:
        name: The layer's name, which seeds the random draws together with `config.seed`.
        outputs: d_out.
        rank: r.
        scaling: s, the factor LoRA multiplies B A by.
        config: The settings.
        read_weight: Reads the base weight as (d_out, d_in), float32. Only the scale "weight" calls it.
    """

    name: str
    outputs: int
    rank: int
    scaling: float
    config: LoraGAConfig
    read_weight: Callable[[], Tensor]


def split(low_rank: LowRank, layer: LayerSpec) -> tuple[Tensor, Tensor]:
    """A₀ (r, d_in) and B₀ (d_out, r) of one layer.

    Args:
        low_rank: At least 2r directions of the layer's gradient.
        layer: The layer.

    Returns:
        A₀ and B₀, in the dtype of the factorisation.

    Raises:
        ValueError: The factorisation holds fewer than 2r directions, or the scale divides by a scaling of zero.
    """
    if low_rank.S.numel() < 2 * layer.rank:
        raise ValueError(
            f"{layer.name}: rank {layer.rank} needs {2 * layer.rank} gradient directions, but the estimate holds "
            f"{low_rank.S.numel()}. Estimate again with an adapter of rank {layer.rank}, or use a rank of at most "
            f"{low_rank.S.numel() // 2}."
        )
    rows, columns = DIRECTIONS[layer.config.direction](layer)
    factor = SCALES[layer.config.scale](layer)
    return factor * low_rank.V[:, rows].mT, factor * low_rank.U[:, columns]


def _places(first: int, end: int, step: int = 1) -> Tensor:
    return torch.arange(first, end, step, device="cpu")


def _random_halves(layer: LayerSpec) -> tuple[Tensor, Tensor]:
    order = torch.randperm(
        2 * layer.rank, generator=generator(layer.config.seed, layer.name, "direction"), device="cpu"
    )
    return order[: layer.rank], order[layer.rank :]


# Which of the first 2r singular directions (counted from 0) become the rows of A and the columns of B. Theorem 3.1: for
# any two disjoint halves the first step is the best rank-2r approximation of full fine-tuning's.
DIRECTIONS: Mapping[str, Callable[[LayerSpec], tuple[Tensor, Tensor]]] = {
    "ArB2r": lambda layer: (_places(0, layer.rank), _places(layer.rank, 2 * layer.rank)),  # the paper's choice
    "A2rBr": lambda layer: (_places(layer.rank, 2 * layer.rank), _places(0, layer.rank)),
    "ArBr": lambda layer: (_places(1, 2 * layer.rank, 2), _places(0, 2 * layer.rank, 2)),
    "random": _random_halves,
}


def leading_singular_values(w_OI: Tensor, count: int, seed: int, name: str) -> Tensor:
    """The `count` largest singular values of a weight, (count,), by four power steps on 4·count random directions."""
    width = min(4 * count, *w_OI.shape)
    omega = torch.randn(w_OI.shape[1], width, generator=generator(seed, name, "weight"), device="cpu").to(w_OI)
    q = torch.linalg.qr(w_OI @ omega).Q
    for _ in range(4):
        q = torch.linalg.qr(w_OI @ torch.linalg.qr(w_OI.mT @ q).Q).Q
    return torch.linalg.svdvals(q.mT @ w_OI)[:count]


def _weight_scale(layer: LayerSpec) -> float:
    values = leading_singular_values(layer.read_weight(), layer.rank, layer.config.seed, layer.name)
    return (values / layer.scaling).sqrt().mean().item()


def _over_scaling(reach: float, layer: LayerSpec) -> float:
    """`reach` / s: A and B of a size at which s times the size is `reach`."""
    if not layer.scaling > 0:
        raise ValueError(
            f"{layer.name}: the LoRA scaling is {layer.scaling}, and the size of the start is divided by it. Use a "
            "lora_alpha above 0, or set stable_gamma."
        )
    return reach / layer.scaling


def _stable_scale(layer: LayerSpec) -> float:
    gamma = layer.config.stable_gamma
    return _over_scaling(layer.config.reach, layer) if gamma is None else layer.outputs**0.25 / math.sqrt(gamma)


# The factor by which both A and B are multiplied. "stable" is Theorem 3.2, d_out^(1/4)/√γ, with the γ of the settings,
# or with a γ for each layer that makes s times this factor the same in all layers (docs/evidence.md). "gd" divides by
# s, so that one step of gradient descent on the product is one of full fine-tuning. "unit" and "weight" are the
# alternatives in the authors' code.
SCALES: Mapping[str, Callable[[LayerSpec], float]] = {
    "stable": _stable_scale,
    "gd": functools.partial(_over_scaling, 1.0),
    "unit": lambda layer: 1.0,
    "weight": _weight_scale,
}
