"""Starts of A and B that the method `steps` combines with rules: LoRA's, LoRA-GA's, and others from the same gradient.

G is the gradient of a layer's weight W₀ (d_out x d_in), s the adapter's scaling, r its rank. The gradient is exact: the
dense estimator keeps all its directions, which small models allow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lora_ga
from lora_ga.config import LoraGAConfig
from lora_ga.experiments.methods import lora_ga as own
from lora_ga.experiments.methods.base import BuildInputs
from lora_ga.linalg.low_rank import LowRank, generator

Factors = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a start is made from.

    Attributes:
        gradient: G.
        weight: W₀.
        A: The A that PEFT has drawn, (r, d_in).
        scaling: s.
        size: The option `size`, or the start's default.
        noise: A generator of random numbers.
    """

    gradient: LowRank
    weight: Tensor
    A: Tensor
    scaling: float
    size: float
    noise: torch.Generator

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.A.shape[0]

    @property
    def dense(self) -> Tensor:
        """G, (d_out, d_in)."""
        return (self.gradient.U * self.gradient.S) @ self.gradient.V.mT


def lora_one(layer: Layer) -> Factors:
    """LoRA-One: Y. Zhang, F. Liu, Y. Chen, "LoRA-One", 2025 (arXiv 2502.01235).

    The leading directions of −G, each factor times √(σᵢ/σ₁)/√γ. The product is a step of gradient descent; nothing
    takes it back. `size` is γ.

    Args:
        layer: The layer.

    Returns:
        A and B.
    """
    u, s, v = layer.gradient.U[:, : layer.rank], layer.gradient.S[: layer.rank], layer.gradient.V[:, : layer.rank]
    root = (s / s[0]).sqrt() / layer.size**0.5
    return (v * root).mT, -u * root


def gora(layer: Layer) -> Factors:
    """GoRA's B: H. He and others, "GoRA", 2025 (arXiv 2502.12171), after its published code; ranks stay equal.

    A is LoRA's, and B the least-squares fit of −G to its rows, `B = −γ√(d_in/r)/s · G Aᵀ(AAᵀ)⁻¹`. `size` is γ.

    Args:
        layer: The layer.

    Returns:
        A and B.
    """
    fit = layer.dense @ torch.linalg.pinv(layer.A)
    return layer.A, -layer.size * (layer.A.shape[1] / layer.rank) ** 0.5 / layer.scaling * fit


def nystrom(layer: Layer) -> Factors:
    """The Nyström start `B = W₀Ω`, `A = 0`, with Ω ~ N(0, ξ²): B. Li and others, 2025 (arXiv 2410.18965).

    The title is "On the Crucial Role of Initialization for Matrix Factorization". Its text was not at hand: which
    factor is zero, and the size ξ (here `size`), are not verified.

    Args:
        layer: The layer.

    Returns:
        A and B.
    """
    omega = torch.randn(layer.weight.shape[1], layer.rank, generator=layer.noise) * layer.size
    return torch.zeros_like(layer.A), layer.weight @ omega.to(layer.weight)


# Name → formula, and the default of the option `size`.
FORMULAS: Mapping[str, tuple[Callable[[Layer], Factors], float]] = {
    "lora_one": (lora_one, 128.0),
    "gora": (gora, 0.05),
    "nystrom": (nystrom, 0.1),
}


def from_formula(formula: Callable[[Layer], Factors], default: float) -> Callable[[BuildInputs], Any]:
    """The function that builds an adapter with the A and B of a formula, s = α/√r."""

    def build(inputs: BuildInputs) -> Any:
        model, layers = _layers(inputs, default)
        for name, layer in layers.items():
            module = model.get_base_model().get_submodule(name)
            with torch.no_grad():
                for table, value in zip((module.lora_A, module.lora_B), formula(layer), strict=True):
                    table["default"].weight.copy_(value)
        return model

    return build


def _layers(inputs: BuildInputs, default: float) -> tuple[Any, dict[str, Layer]]:
    """A fresh rank-stabilised adapter, and what starts of its layers are made from."""
    model = get_peft_model(inputs.base, inputs.lora(use_rslora=True))
    config = LoraGAConfig(estimator="dense", oversample=1_000_000, max_batches=None, seed=inputs.seed)
    estimate = lora_ga.estimate_gradients(model, inputs.batches, config)
    found = {}
    for name, gradient in estimate.items():
        module: Any = model.get_base_model().get_submodule(name)
        found[name] = Layer(
            gradient,
            module.get_base_layer().weight.detach(),
            module.lora_A["default"].weight.detach().clone(),
            module.scaling["default"],
            inputs.options["size"] or default,
            generator(inputs.seed, name, "start"),
        )
    return model, found


class Between(nn.Module):
    """A as `R A₀` with a trained R (r x r); A₀ has orthonormal rows."""

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)

    def forward(self, r: Tensor) -> Tensor:
        """`R A₀`."""
        return r @ self.rows

    def right_inverse(self, a: Tensor) -> Tensor:
        """R of an A whose rows A₀ spans."""
        return a @ self.rows.mT


def lora_sb(inputs: BuildInputs) -> Any:
    """LoRA-SB: K. Ponkshe and others, "Initialization using Update Approximation …", 2024 (arXiv 2411.19557).

    The first step of full fine-tuning is taken for −η·sign(G). Its leading directions are B and A, which are frozen;
    between them trains an r x r matrix, which starts at the singular values over s. The product is the step's best
    approximation. `size` is η; by default the learning rate of the run.

    Args:
        inputs: What the model is built from.

    Returns:
        The model.
    """
    model, layers = _layers(inputs, inputs.rate)
    for name, layer in layers.items():
        module: Any = model.get_base_model().get_submodule(name)
        u, s, vh = torch.linalg.svd(-layer.size * layer.dense.sign(), full_matrices=False)
        a, b = module.lora_A["default"], module.lora_B["default"]
        with torch.no_grad():
            b.weight.copy_(u[:, : layer.rank])
            a.weight.copy_(s[: layer.rank, None] / layer.scaling * vh[: layer.rank])
        b.weight.requires_grad_(False)
        parametrize.register_parametrization(a, "weight", Between(vh[: layer.rank].to(a.weight)))
    return model


def _own(**changes: Any) -> Callable[[BuildInputs], Any]:
    """LoRA-GA's start, whose `size` is the reach."""

    def build(inputs: BuildInputs) -> Any:
        reach = {"scale": "reach", "reach": inputs.options["size"] or 0.35}
        options = {**own.METHODS["lora_ga"].options, **reach, **changes}
        return own.build(dataclasses.replace(inputs, options=options))

    return build


STARTS: Mapping[str, Callable[[BuildInputs], Any]] = {
    "lora": lambda inputs: get_peft_model(inputs.base, inputs.lora()),
    "lora_ga": _own(),
    "random": _own(directions="random"),
    **{name: from_formula(*entry) for name, entry in FORMULAS.items()},
    "lora_sb": lora_sb,
}
