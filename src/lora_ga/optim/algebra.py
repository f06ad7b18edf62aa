"""Small linear algebra of pairs of factors, batched over the layers of one shape.

Shapes: N layers, r rank, m and n the sides of a matrix, m ≤ n. Nothing here waits for the device. Matrices of r x r are
inverted in float64, where the device has it.
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
SQUARINGS = 10


def msign(x_Nmn: Tensor) -> Tensor:
    """The polar factor U Vᵀ of each matrix U S Vᵀ, by matrix products alone.

    Singular values above a thousandth of the matrix' Frobenius norm become 1. Those far below it grow 11,000-fold at
    most, so rounding errors stay small and zero stays zero.

    Args:
        x_Nmn: Matrices of any shape.

    Returns:
        The polar factors, in the same shape and dtype.
    """
    tall = x_Nmn.shape[-2] > x_Nmn.shape[-1]
    y = x_Nmn.mT if tall else x_Nmn
    y = y / y.flatten(-2).norm(dim=-1)[..., None, None].clamp_min(torch.finfo(y.dtype).tiny)
    for a, b, c in STEPS:
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.mT if tall else y


def inverse_root(gram_Nrr: Tensor, damping: float | Tensor) -> Tensor:
    """W with W S Wᵀ = I and so WᵀW = S⁻¹, for positive semi-definite S: the inverse of the Cholesky factor of S.

    Args:
        gram_Nrr: S.
        damping: Added to the diagonal of S, as a share of its mean; a number, or (N, 1, 1).

    Returns:
        W, in the dtype of S. It is zero where S is zero, as the pseudo-inverse is: plain LoRA begins with B = 0.
    """
    size = gram_Nrr.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    alive = size > 0
    eye = torch.eye(gram_Nrr.shape[-1], dtype=gram_Nrr.dtype, device=gram_Nrr.device)
    least = 1e-12 if gram_Nrr.dtype == torch.float64 else 1e-6  # so that rounding leaves a positive definite matrix
    damped = torch.where(alive, gram_Nrr / torch.where(alive, size, 1.0), eye)
    damped = damped + torch.as_tensor(damping, dtype=eye.dtype, device=eye.device).clamp_min(least) * eye
    lower, _ = torch.linalg.cholesky_ex(damped)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return inverse * alive * torch.where(alive, size, 1.0).rsqrt()


def gram(x_Nrn: Tensor, weights_Nn: Tensor | None = None) -> Tensor:
    """`x diag(weights) xᵀ` of each matrix with few rows, (N, r, r), in float64 where the device has it."""
    rows = x_Nrn if x_Nrn.device.type == "mps" else wide(x_Nrn)
    return rows @ (rows if weights_Nn is None else rows * weights_Nn[..., None, :].to(rows)).mT


def whitener(x_Nrn: Tensor, damping: float | Tensor = 0.0, weights_Nn: Tensor | None = None) -> Tensor:
    """W (N, r, r) such that the rows of `W x` are orthonormal, `diag(weights)` being the inner product; see above."""
    return inverse_root(gram(x_Nrn, weights_Nn), damping).to(x_Nrn.dtype)


def spectral_norm(x_Nmn: Tensor) -> Tensor:
    """The largest singular value of each matrix, at most 0.05%·log(m) above the true one.

    It is `tr(S^p)^(1/2p)` with p = 1024 and S the smaller Gram matrix, by squaring S ten times.

    Args:
        x_Nmn: Matrices.

    Returns:
        (N,), zero for a matrix of zeros.
    """
    power = gram(x_Nmn if x_Nmn.shape[-2] <= x_Nmn.shape[-1] else x_Nmn.mT)
    log_scale = torch.zeros(power.shape[:-2], dtype=power.dtype, device=power.device)
    tiny = torch.finfo(power.dtype).tiny
    for squaring in range(SQUARINGS + 1):
        trace = power.diagonal(dim1=-2, dim2=-1).sum(dim=-1).clamp_min(tiny)
        log_scale = log_scale + trace.log() / 2**squaring
        power = power / trace[..., None, None]
        power = power @ power
    return (log_scale / 2).exp().to(x_Nmn.dtype)


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
    return q_left, msign(r_left @ r_right.mT) @ q_right.mT
