"""Any start with any rule: those of `starts.py`, with AdamW or a rule for pairs of factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_ga.experiments.methods.base import BuildInputs, Method, adamw, one_rate
from lora_ga.experiments.methods.starts import STARTS
from lora_ga.experiments.optim import LoRAMuon, LoRATSD, PairOptimizer, PoLoRA, ScaledAdamW, ScaledSGD, param_groups
from lora_ga.experiments.optim.pairs import Pairs, State, adam
from lora_ga.experiments.optim.rules import roots

Groups = list[dict[str, Any]]


class MomentumSGD(PairOptimizer):
    """SGD with momentum 0.9, as torch's, for A and B; AdamW for a new head, as with all other rules."""

    def __init__(self, params: Groups, lr: float) -> None:
        super().__init__(params, lr)

    def rule(self, pairs: Pairs, state: State, group: Mapping[str, Any], step: int) -> tuple[Tensor, Tensor]:
        """ΔA and ΔB (see `PairOptimizer.rule`)."""
        a, b = state.setdefault("momentum", (torch.zeros_like(pairs.grad_a), torch.zeros_like(pairs.grad_b)))
        a.mul_(0.9).add_(pairs.grad_a)
        b.mul_(0.9).add_(pairs.grad_b)
        return -group["lr"] * a, -group["lr"] * b


class LoRAPro(PairOptimizer):
    """LoRA-Pro with Adam, only for comparison: its state is as large as the weights. Of linear layers.

    Z. Wang, J. Liang, R. He, Z. Wang, T. Tan, "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", 2024 (arXiv
    2407.18242), theorems 2.1 and 2.2 and the algorithm with AdamW. Of a gradient G of the product B A the changes are

        g_A = (BᵀB)⁻¹BᵀG + X A,   g_B = (I − P_B) G Aᵀ(AAᵀ)⁻¹ − B X,   BᵀB X + X AAᵀ = −(BᵀB)⁻¹BᵀG Aᵀ

    for which B g_A + g_B A is closest to G. Adam's averages are those of this matrix, and its direction takes the place
    of G in the same formula. The rate is one of entries of the product: the paper's is s times this. With B = 0 the
    first step is one of B alone, as in the published code.
    """

    def __init__(self, params: Groups, lr: float) -> None:
        super().__init__(params, lr)

    def rule(self, pairs: Pairs, state: State, group: Mapping[str, Any], step: int) -> tuple[Tensor, Tensor]:
        """ΔA and ΔB (see `PairOptimizer.rule`)."""
        a, b = self._closest(pairs, pairs.grad_a, pairs.grad_b)
        equivalent = pairs.B @ a + b @ pairs.A
        first, second = state.setdefault("moments", (torch.zeros_like(equivalent), torch.zeros_like(equivalent)))
        direction = adam(first, second, equivalent, step, (0.9, 0.999), 1e-8)
        a, b = self._closest(pairs, pairs.B.mT @ direction, direction @ pairs.A.mT)
        values_A, vectors_A = torch.linalg.eigh(pairs.A @ pairs.A.mT)
        values_B, vectors_B = torch.linalg.eigh(pairs.B.mT @ pairs.B)
        sums = (values_B[..., :, None] + values_A[..., None, :]).clamp_min(torch.finfo(values_A.dtype).tiny)
        x = vectors_B @ (vectors_B.mT @ (-a @ pairs.A.mT) @ vectors_A / sums) @ vectors_A.mT
        return -group["lr"] * (a + x @ pairs.A), -group["lr"] * (b - pairs.B @ x)

    @staticmethod
    def _closest(pairs: Pairs, by_A: Tensor, by_B: Tensor) -> tuple[Tensor, Tensor]:
        """The changes with X = 0, from BᵀG and G Aᵀ."""
        root_A, root_B = roots(pairs.A, pairs.B)
        a, b = root_B.mT @ (root_B @ by_A), by_B @ root_A.mT @ root_A
        return a, b - pairs.B @ (root_B.mT @ (root_B @ (pairs.B.mT @ b)))


# The rules of pairs; the options are those of the classes' defaults, except for the number of msigns of LoRATSD.
PAIRS: Mapping[str, Callable[[Groups, BuildInputs], Any]] = {
    "tsd": lambda groups, inputs: LoRATSD(groups, inputs.rate, iterations=inputs.options["iterations"]),
    "muon": lambda groups, inputs: LoRAMuon(groups, inputs.rate),
    "polora": lambda groups, inputs: PoLoRA(groups, inputs.rate),
    "scaled_sgd": lambda groups, inputs: ScaledSGD(groups, inputs.rate),
    "scaled_adamw": lambda groups, inputs: ScaledAdamW(groups, inputs.rate),
    "lora_pro": lambda groups, inputs: LoRAPro(groups, inputs.rate),
    "momentum_sgd": lambda groups, inputs: MomentumSGD(groups, inputs.rate),
}
RULES: Mapping[str, Callable[[Groups, BuildInputs], Any]] = {"adamw": adamw, **PAIRS}


def _entry(table: Mapping[str, Any], option: str, inputs: BuildInputs) -> Any:
    name = inputs.options[option]
    if name not in table:
        raise ValueError(f"steps: {option} is {name!r}; it must be one of {', '.join(table)}.")
    return table[name]


def groups(model: Any, inputs: BuildInputs) -> Groups:
    """The parameter groups: pairs of factors for a rule of pairs, all trained parameters otherwise."""
    if inputs.options["rule"] not in PAIRS:
        return one_rate(model, inputs)
    return [group | ({"lr": inputs.rate} if group["layout"] else {}) for group in param_groups(model)]


METHODS = {
    "steps": Method(
        lambda inputs: _entry(STARTS, "start", inputs)(inputs),
        options={"start": "lora_ga", "rule": "polora", "size": 0.0, "iterations": 1},
        groups=groups,
        optimizer=lambda groups, inputs: _entry(RULES, "rule", inputs)(groups, inputs),
        alone=lambda options: options["start"] == "lora_sb",  # trains a matrix between factors that stay
    )
}
