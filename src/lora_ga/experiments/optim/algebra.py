"""Small linear algebra of pairs of factors, on the Gram matrices of many layers at once.

Shapes: N matrices, r rows (or columns), n their length. Matrices of r x r are in float64, where the device has it.
Only `pseudo_root` waits for the device. A function takes few operations, whatever N is: a GPU is slow at starting them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ga.linalg.low_rank import wide

# Coefficients (a, b, c) of the steps y ← a·y + b·(y yᵀ)y + c·(y yᵀ)²y, which act on singular values. The first kind (K.
# Jordan and others, "Muon: An optimizer for hidden layers in neural networks", 2024) raises small ones 3.4-fold a step
# and leaves them near 1; the second kind (Newton and Schulz, of fifth order) then takes them to 1.
RAISE, SETTLE = (3.4445, -4.7750, 2.0315), (1.875, -1.25, 0.375)
STEPS = (RAISE,) * 5 + (SETTLE,) * 5
ROUNDS, SQUARINGS = 4, 3
DEAD = 1e-4  # directions with less than this share of the largest eigenvalue count as absent
LEAST = 1e-36  # a matrix whose squares sum up to less counts as zero


def gram(x_Nrn: Tensor, weights_Nn: Tensor | None = None) -> Tensor:
    """`x diag(weights) xᵀ` of each matrix with few rows, (N, r, r)."""
    rows = x_Nrn if x_Nrn.device.type == "mps" else wide(x_Nrn)
    return rows @ (rows if weights_Nn is None else rows * weights_Nn[..., None, :].to(rows)).mT


def trace(gram_Nrr: Tensor) -> Tensor:
    """The trace of each matrix, (N, 1, 1)."""
    return gram_Nrr.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]


def sign_factor(gram_Nrr: Tensor) -> Tensor:
    """Q with `Q x = msign(x)`, the polar factor U Vᵀ of x = U S Vᵀ, from the Gram matrix `x xᵀ`.

    Singular values above a thousandth of the matrix' Frobenius norm become 1. Those far below it grow 11,000-fold at
    most, so rounding errors stay small and zero stays zero.

    Args:
        gram_Nrr: Gram matrices.

    Returns:
        Q, (N, r, r), symmetric.
    """
    size = trace(gram_Nrr)
    alive = size > LEAST
    size = torch.where(alive, size, 1.0)
    rest, factor = gram_Nrr / size, None
    for a, b, c in STEPS:
        step = torch.baddbmm(rest, rest, rest, beta=b, alpha=c)
        step.diagonal(dim1=-2, dim2=-1).add_(a)
        factor = step if factor is None else torch.bmm(step, factor)
        rest = torch.bmm(torch.bmm(step, rest), step)
    assert factor is not None
    return factor * (alive * size.rsqrt())


def inverse_root(gram_Nrr: Tensor, damping: float | Tensor = 0.0) -> Tensor:
    """W with W S Wᵀ = I and so WᵀW = S⁻¹, for a Gram matrix S: the inverse of the Cholesky factor of S.

    Args:
        gram_Nrr: S.
        damping: Added to the diagonal of S, as a share of its mean; a number, or (N, 1, 1).

    Returns:
        W. It is zero where S is zero, as the pseudo-inverse is: plain LoRA begins with B = 0.
    """
    size = trace(gram_Nrr) / gram_Nrr.shape[-1]
    alive = size > 0
    size = torch.where(alive, size, 1.0)
    eye = torch.eye(gram_Nrr.shape[-1], dtype=gram_Nrr.dtype, device=gram_Nrr.device)
    least = 1e-12 if gram_Nrr.dtype == torch.float64 else 1e-6  # so that rounding leaves a positive definite matrix
    share = damping.clamp_min(least) if isinstance(damping, Tensor) else max(damping, least)
    lower, _ = torch.linalg.cholesky_ex(gram_Nrr / size + torch.where(alive, share, 1.0) * eye)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return inverse * (alive * size.rsqrt())


def pseudo_root(gram_Nrr: Tensor) -> Tensor:
    """W with WᵀW = S⁺, the pseudo-inverse of S without directions whose eigenvalues are below `DEAD` of the largest.

    Factors lack directions where the rank exceeds a side of the layer, and in plain LoRA's B after steps on fewer rows
    than the rank. There S⁻¹ would make steps without bound out of rounding errors.

    Args:
        gram_Nrr: S.

    Returns:
        W, that of `inverse_root` unless a direction may be absent.
    """
    root = inverse_root(gram_Nrr)
    doubtful = root.square().sum(dim=(-2, -1), keepdim=True) * trace(gram_Nrr) > gram_Nrr.shape[-1] / DEAD
    if not bool(doubtful.any()):
        return root
    values, vectors = torch.linalg.eigh(gram_Nrr)
    kept = values > DEAD * values[..., -1:]
    inverse = torch.where(kept, values, 1.0).rsqrt() * kept
    return torch.where(doubtful, inverse[..., None] * vectors.mT, root)


def top_eigenvalue(gram_Nrr: Tensor) -> Tensor:
    """The largest eigenvalue of each Gram matrix, at most 0.025%·log(r) above the true one.

    It is `tr(S^p)^(1/p)` with p = 4096, by squaring S twelve times.

    Args:
        gram_Nrr: S.

    Returns:
        (N, 1, 1), zero for a matrix of zeros.
    """
    tiny, power, exponent = torch.finfo(gram_Nrr.dtype).tiny, gram_Nrr, 1
    log_size = torch.zeros((), dtype=gram_Nrr.dtype, device=gram_Nrr.device)
    for _ in range(ROUNDS):
        size = trace(power).clamp_min(tiny)
        log_size = size.log() / exponent + log_size
        power = power / size
        for _ in range(SQUARINGS):
            power = torch.bmm(power, power)
        exponent *= 2**SQUARINGS
    return (trace(power).clamp_min(tiny).log() / exponent + log_size).exp()


def orthonormal_product(left_Nmk: Tensor, right_Nkn: Tensor) -> tuple[Tensor, Tensor]:
    """`msign(left @ right)` as two factors, without the m x n product.

    Args:
        left_Nmk: Columns.
        right_Nkn: Rows.

    Returns:
        Factors whose product it is: (N, m, k') and (N, k', n).
    """
    q_left, r_left = torch.linalg.qr(left_Nmk)
    q_right, r_right = torch.linalg.qr(right_Nkn.mT)
    core = r_left @ r_right.mT
    return q_left, sign_factor(gram(core)).to(core.dtype) @ core @ q_right.mT
