"""The rules: how a step of A and B follows from their values and gradients.

`G` stands for the gradient of the loss by the product B A, which nobody forms: `grad_a = BᵀG`, `grad_b = G Aᵀ`. Rates
are sizes of steps of the product B A, without LoRA's scaling s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_ga.experiments.optim.algebra import (
    gram,
    inverse_root,
    orthonormal_product,
    pseudo_root,
    sign_factor,
    top_eigenvalue,
    trace,
)
from lora_ga.experiments.optim.pairs import PairOptimizer, Pairs, State, adam


class ScaledSGD(PairOptimizer):
    """SGD with the Riemannian preconditioner, and momentum that is carried over to the new factors.

    `ΔA = −η M_A`, `ΔB = −η M_B` with averages M of `(BᵀB)⁻¹ grad_a` and `grad_b (AAᵀ)⁻¹`: F. Zhang and M. Pilanci,
    "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", 2024 (arXiv 2402.02347). As in the paper's code
    a constant is added to the Gram matrices; with B = 0, as plain LoRA begins, the first steps of A depend on it. After
    a step the average is expressed in the new factors, `M_A ← (B'ᵀB')⁻¹B'ᵀB M_A`, as in X. Yu and others, "AltLoRA",
    2025 (arXiv 2505.12455), whose published code also divides by `1 − β^t`. AltLoRA steps A and B in turn; here both
    step at once. But for the constant, the change of B A does not depend on how it is factored.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        damping: float = 1e-6,
        **common: Any,
    ) -> None:
        """Make the optimizer.

        Args:
            params: What `param_groups(model)` returns.
            lr: η.
            momentum: β of the average; 0 for none.
            damping: The constant that is added to AAᵀ and BᵀB.
            **common: `weight_decay` and `other_lr` (see `PairOptimizer`).
        """
        super().__init__(params, lr, momentum=momentum, damping=damping, **common)

    def rule(self, pairs: Pairs, state: State, group: Mapping[str, Any], step: int) -> tuple[Tensor, Tensor]:
        """ΔA and ΔB (see `PairOptimizer.rule`)."""
        beta, scaled = group["momentum"], preconditioned(pairs, group["damping"])
        averages = averaged(state, scaled, beta)
        rate = -group["lr"] / (1 - beta**step)
        change = rate * averages[0], rate * averages[1]
        state["exp_avg"] = carried_over(averages, pairs, change, group["damping"])
        return change


class ScaledAdamW(PairOptimizer):
    """AdamW on gradients with the Riemannian preconditioner: the second rule of the paper of `ScaledSGD`.

    Adam's two averages are those of `(BᵀB)⁻¹ grad_a` and `grad_b (AAᵀ)⁻¹`; the first is carried over to the new factors
    as in `ScaledSGD` ("AltLoRA+" carries it over too, but keeps the average itself in the old factors).
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        damping: float = 1e-6,
        **common: Any,
    ) -> None:
        """Make the optimizer.

        Args:
            params: What `param_groups(model)` returns.
            lr: η, the size of the step of each entry of A and B.
            betas: Adam's.
            eps: Adam's.
            damping: The constant that is added to AAᵀ and BᵀB.
            **common: `weight_decay` and `other_lr` (see `PairOptimizer`).
        """
        super().__init__(params, lr, betas=tuple(betas), eps=eps, damping=damping, **common)

    def rule(self, pairs: Pairs, state: State, group: Mapping[str, Any], step: int) -> tuple[Tensor, Tensor]:
        """ΔA and ΔB (see `PairOptimizer.rule`)."""
        scaled = preconditioned(pairs, group["damping"])
        for name in ("exp_avg", "exp_avg_sq"):
            state.setdefault(name, zeros_like(scaled))
        first, second = state["exp_avg"], state["exp_avg_sq"]
        directions = [
            adam(first[side], second[side], scaled[side], step, group["betas"], group["eps"]) for side in (0, 1)
        ]
        change = -group["lr"] * directions[0], -group["lr"] * directions[1]
        state["exp_avg"] = carried_over(first, pairs, change, group["damping"])
        return change


class LoRATSD(PairOptimizer):
    """The tangent-space spectral step: Muon's step of the product, inside what A and B can reach.

    D. Andriianov, A. Veprikov, A. Beznosikov, "LoRA-TSD: Tangent-Space Spectral Descent for LoRA via Muon-Style
    Updates", 2026 (arXiv 2609.02734). With averages M of the factors' gradients, and the projections P_A and P_B onto
    the rows of A and the columns of B:

        X = B(BᵀB)⁻¹M_A(I − P_A) + M_B(AAᵀ)⁻¹A          the gradient's part in the tangent space
        τ times: X ← P(msign(X)),  P(Y) = P_B Y + Y P_A − P_B Y P_A
        ΔW = −ηX,  ΔB = ΔW Aᵀ(AAᵀ)⁻¹,  ΔA = (BᵀB)⁻¹Bᵀ(ΔW − ΔB A)

    The formula is that of published code; the paper's text was not at hand. That code also limits ‖ΔW‖ to 0.1, makes A
    and B equally large after each step, and uses a coarser msign; none of this is done here. With τ = 0 the step is
    Riemannian gradient descent, `ΔW = −η P(G)`. The change of B A does not depend on how it is factored.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        iterations: int = 1,
        **common: Any,
    ) -> None:
        """Make the optimizer.

        Args:
            params: What `param_groups(model)` returns.
            lr: η, about the largest singular value of a step of B A.
            momentum: β of the averages of gradients.
            nesterov: Whether to add the current gradient to the average once more, `β M + (1 − β) grad`.
            iterations: τ.
            **common: `weight_decay` and `other_lr` (see `PairOptimizer`).
        """
        super().__init__(params, lr, momentum=momentum, nesterov=nesterov, iterations=iterations, **common)

    def rule(self, pairs: Pairs, state: State, group: Mapping[str, Any], step: int) -> tuple[Tensor, Tensor]:
        """ΔA and ΔB (see `PairOptimizer.rule`)."""
        average_A, average_B = looked_ahead(pairs, state, group["momentum"], nesterov=group["nesterov"])
        root_A, root_B = roots(pairs.A, pairs.B)
        rows, columns = root_A @ pairs.A, pairs.B @ root_B.mT  # orthonormal
        # X = columns · (left − left P_A) + right · rows, in the two parts `left` (N, r, I) and `right` (N, O, r).
        left, right = root_B @ average_A, average_B @ root_A.mT
        for _ in range(group["iterations"]):
            first, second = orthonormal_product(
                torch.cat([columns, right], dim=-1), torch.cat([left - left @ rows.mT @ rows, rows], dim=-2)
            )
            left, right = columns.mT @ first @ second, first @ (second @ rows.mT)
        lr = group["lr"]
        return -lr * root_B.mT @ (left - left @ rows.mT @ rows), -lr * right @ root_A


class LoRAMuon(PairOptimizer):
    """Muon's step of the product, half of it by A and half of it by B.

    F. L. Cesista, K. Crowson, C. Simal, S. Biderman, "LoRA-Muon: Spectral Steepest Descent on the Low-Rank Manifold",
    2026 (arXiv 2606.12921): `ΔA = −η/2 · S_B^(−½) msign(S_B^(−½) M_A)`, `ΔB = −η/2 · msign(M_B S_A^(−½)) S_A^(−½)`
    with `S_A = AAᵀ`, `S_B = BᵀB`. Any other root of S⁻¹ gives the same; here it is Cholesky's. Weight decay is the
    usual one, not the paper's split one. The change of B A does not depend on how it is factored.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, *, momentum: float = 0.9, **common: Any) -> None:
        """Make the optimizer.

        Args:
            params: What `param_groups(model)` returns.
            lr: η, a bound of the largest singular value of a step of B A.
            momentum: β of the averages M of gradients.
            **common: `weight_decay` and `other_lr` (see `PairOptimizer`).
        """
        super().__init__(params, lr, momentum=momentum, **common)

    def rule(self, pairs: Pairs, state: State, group: Mapping[str, Any], step: int) -> tuple[Tensor, Tensor]:
        """ΔA and ΔB (see `PairOptimizer.rule`)."""
        average_A, average_B = averaged(state, (pairs.grad_a, pairs.grad_b), group["momentum"])
        root_A, root_B = roots(pairs.A, pairs.B)
        sign_A, sign_B = msign(root_B @ average_A, average_B @ root_A.mT)
        half = -group["lr"] / 2
        return half * root_B.mT @ sign_A, half * sign_B @ root_A


class PoLoRA(PairOptimizer):
    """Spectral steps of A and B in a metric of diagonal curvature, with a bound on the step of the product.

    N. Ghosh, T. Parshakova, R. M. Gower, "PoLoRA: A Preconditioned Orthogonalized LoRA Optimizer", 2026 (arXiv
    2607.17620). With diagonal curvatures P of outputs and Q of inputs, `C_A = A Q Aᵀ`, `C_B = BᵀP B` and averages M:

        D_A = C_B^(−½) msign(C_B^(−½) M_A Q^(−½)) Q^(−½),   D_B = P^(−½) msign(P^(−½) M_B C_A^(−½)) C_A^(−½)
        ΔA = −ρ D_A/‖D_A‖₂,  ΔB = −ρ D_B/‖D_B‖₂,  ρ = η/(‖A‖₂ + ‖B‖₂)
        Q ← β₂ Q + (1 − β₂)/r · diag(grad_aᵀ C_B⁻¹ grad_a),  P likewise

    M looks ahead as Nesterov's momentum. P and Q enter divided by their largest entry, plus δ; C_A and C_B have δ of
    their largest eigenvalue added. The formulas are those of published code (the paper's text was not at hand), whose
    roots and norms are computed by other iterations. The change of B A stays the same if A and B are rotated.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        damping: float = 1e-4,
        **common: Any,
    ) -> None:
        """Make the optimizer.

        Args:
            params: What `param_groups(model)` returns.
            lr: η, a bound of the largest singular value of a step of B A. It has to fall to zero in training.
            betas: β₁ of the averages of gradients, β₂ of the curvatures.
            damping: δ.
            **common: `weight_decay` and `other_lr` (see `PairOptimizer`).
        """
        super().__init__(params, lr, betas=tuple(betas), damping=damping, **common)

    def rule(self, pairs: Pairs, state: State, group: Mapping[str, Any], step: int) -> tuple[Tensor, Tensor]:
        """ΔA and ΔB (see `PairOptimizer.rule`)."""
        damping, (beta, beta2) = group["damping"], group["betas"]
        average_A, average_B = looked_ahead(pairs, state, beta, nesterov=True)
        if "curvature" not in state:
            state["curvature"] = torch.ones_like(pairs.A[:, 0]), torch.ones_like(pairs.B[:, :, 0])
        curvature_Q, curvature_P = state["curvature"]
        q_NI, p_NO = relative(curvature_Q, damping), relative(curvature_P, damping)
        inputs, outputs = q_NI.rsqrt()[:, None, :], p_NO.rsqrt()[:, :, None]
        curved = torch.cat([gram(pairs.A, q_NI), gram(pairs.B.mT, p_NO)])
        top = top_eigenvalue(torch.cat([gram(pairs.A), gram(pairs.B.mT), curved]))
        top_A, top_B, *top_curved = top.chunk(4)
        root_A, root_B = with_constant(curved, damping * torch.cat(top_curved)).to(pairs.A.dtype).chunk(2)
        sign_A, sign_B = msign(root_B @ average_A * inputs, outputs * (average_B @ root_A.mT))
        direction_A, direction_B = root_B.mT @ sign_A * inputs, outputs * sign_B @ root_A
        size_A, size_B = top_eigenvalue(torch.cat([gram(direction_A), gram(direction_B.mT)])).sqrt().chunk(2)
        rate = -group["lr"] / (top_A.sqrt() + top_B.sqrt())
        tiny = torch.finfo(pairs.A.dtype).tiny
        rank, first = pairs.A.shape[1], step == 1
        seen = (root_B @ pairs.grad_a).square().sum(dim=1) / rank, (pairs.grad_b @ root_A.mT).square().sum(dim=2) / rank
        kept = 0.0 if first else beta2  # the ones of the first step stand for no curvature
        state["curvature"] = (
            kept * curvature_Q + (1 - beta2) * seen[0],
            kept * curvature_P + (1 - beta2) * seen[1],
        )
        return (
            direction_A * (rate / size_A.clamp_min(tiny)).to(direction_A.dtype),
            direction_B * (rate / size_B.clamp_min(tiny)).to(direction_B.dtype),
        )


def preconditioned(pairs: Pairs, damping: float) -> tuple[Tensor, Tensor]:
    """`(BᵀB + δI)⁻¹ grad_a` and `grad_b (AAᵀ + δI)⁻¹`."""
    root_A, root_B = roots(pairs.A, pairs.B, damping)
    return root_B.mT @ (root_B @ pairs.grad_a), pairs.grad_b @ root_A.mT @ root_A


def carried_over(
    averages: tuple[Tensor, Tensor], pairs: Pairs, change: tuple[Tensor, Tensor], damping: float
) -> tuple[Tensor, Tensor]:
    """Averages of changes of A and B, in the factors after a step: `(B'ᵀB')⁻¹B'ᵀB M_A` and `M_B A A'ᵀ(A'A'ᵀ)⁻¹`."""
    new_A, new_B = pairs.A + change[0], pairs.B + change[1]
    root_A, root_B = roots(new_A, new_B, damping)
    return (
        root_B.mT @ (root_B @ (new_B.mT @ pairs.B)) @ averages[0],
        averages[1] @ (pairs.A @ new_A.mT @ root_A.mT @ root_A),
    )


def zeros_like(both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Zeros of the shapes of A and B."""
    return torch.zeros_like(both[0]), torch.zeros_like(both[1])


def averaged(state: State, values: tuple[Tensor, Tensor], beta: float) -> tuple[Tensor, Tensor]:
    """The new averages `β M + (1 − β) value` of A and B, which begin at zero; kept in the state."""
    averages = state.setdefault("exp_avg", zeros_like(values))
    for average, value in zip(averages, values, strict=True):
        average.lerp_(value, 1 - beta)
    return averages


def looked_ahead(pairs: Pairs, state: State, beta: float, *, nesterov: bool) -> tuple[Tensor, Tensor]:
    """The averages of the gradients; with `nesterov` those that the same gradient would give once more."""
    gradients = pairs.grad_a, pairs.grad_b
    averages = averaged(state, gradients, beta)
    if not nesterov:
        return averages
    return averages[0].lerp(gradients[0], 1 - beta), averages[1].lerp(gradients[1], 1 - beta)


def relative(curvature: Tensor, damping: float) -> Tensor:
    """Curvatures over the largest of their layer, plus `damping`; of a layer without any 1 plus `damping`."""
    largest = curvature.amax(dim=-1, keepdim=True)
    return torch.where(largest > 0, curvature / torch.where(largest > 0, largest, 1.0), 1.0) + damping


def roots(a_NrI: Tensor, b_NOr: Tensor, constant: float = 0.0) -> tuple[Tensor, Tensor]:
    """W_A and W_B with `W_AᵀW_A = (AAᵀ + constant I)⁻¹`, likewise of BᵀB; without a constant the pseudo-inverse."""
    grams = torch.cat([gram(a_NrI), gram(b_NOr.mT)])
    both = with_constant(grams, constant) if constant else pseudo_root(grams)
    root_A, root_B = both.to(a_NrI.dtype).chunk(2)
    return root_A, root_B


def with_constant(gram_Nrr: Tensor, constant: float | Tensor) -> Tensor:
    """W with `W (S + constant I) Wᵀ = I`; zero where S is zero."""
    return inverse_root(gram_Nrr, constant / (trace(gram_Nrr) / gram_Nrr.shape[-1]))


def msign(a_NrI: Tensor, b_NOr: Tensor) -> tuple[Tensor, Tensor]:
    """The polar factors of matrices with few rows, and of matrices with few columns."""
    sign_A, sign_B = sign_factor(torch.cat([gram(a_NrI), gram(b_NOr.mT)])).to(a_NrI.dtype).chunk(2)
    return sign_A @ a_NrI, b_NOr @ sign_B
