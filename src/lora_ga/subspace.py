"""The streaming update of a low-rank factorisation: warm-started subspace iteration. Pure functions of tensors.

Shapes: T tokens, I inputs, O outputs, K kept directions, Q test directions (a few more than K), P probes, J leading.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ga.lowrank import wide

# Random columns added to the warm start of each block, so that directions that only appear late are found.
FRESH = 12
# A layer's first look takes one token in so many, if enough of them are left.
STRIDE = 4
# Of the columns of Q (in units of their lengths before), and of the singular values (of the first): what is below is
# rounding noise of float32, and is left out.
SPURIOUS = 1e-2
NOISE = 1e-7


def orthonormal(y: Tensor) -> Tensor:
    """Columns that span what those of `y` span, orthonormal up to rounding.

    By the Cholesky factor of their Gram matrix, in float64: a few thin products instead of Householder's many small
    steps, and nothing that makes the host wait for the device. Where columns depend on one another the surplus ones
    come out short, or as zeros where rounding noise is all that is left of them. The method is the shifted one of
    Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices" (2020).

    Args:
        y: (rows, columns), columns ≤ rows.

    Returns:
        A matrix of the same shape.
    """
    y64 = wide(y)
    y64 = y64 / y64.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    gram = y64.mT @ y64
    gram.diagonal().add_(1e-12)
    factor = torch.linalg.cholesky_ex(gram, check_errors=False).L
    q64 = torch.linalg.solve_triangular(factor, y64.mT, upper=False).mT
    return torch.where(q64.norm(dim=0) > SPURIOUS, q64, 0.0).to(y)


def project(
    held: tuple[Tensor, Tensor, Tensor] | None,
    x_TI: Tensor,
    g_TO: Tensor,
    weight: float,
    start_IQ: Tensor,
    omega_IP: Tensor,
    power_steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add one block of tokens to what is held: `M = U S Vᵀ + weight·gᵀx ≈ Q Zᵀ`, M itself never being formed.

    `Q = orth(M start)`; for every power step `P = orth(Mᵀ Q)`, `Q = orth(M P)`; then `Z = Mᵀ Q`. The scheme is that of
    Halko, Martinsson and Tropp, "Finding structure with randomness" (2011), Algorithm 4.4; with the directions held
    as its start it is one step of subspace iteration a block.

    Args:
        held: U (O, K), S (K,), V (I, K) so far; None for the first block.
        x_TI: Inputs of the layer, in the dtype of the sums.
        g_TO: Gradients of the loss at the layer's outputs.
        weight: What the block counts.
        start_IQ: The directions to start from.
        omega_IP: The probes of the sketch.
        power_steps: Power steps for this block.

    Returns:
        Q (O, Q), nearly orthonormal, Z (I, Q), and the block's part of the sketch, (O, P).
    """

    def with_held(y_OQ: Tensor, w_IQ: Tensor) -> Tensor:
        return y_OQ if held is None else y_OQ.addmm_(held[0] * held[1], held[2].mT @ w_IQ)

    def adjoint(w_OQ: Tensor) -> Tensor:
        z_IQ = (x_TI.mT @ (g_TO @ w_OQ)).mul_(weight)
        return z_IQ if held is None else z_IQ.addmm_(held[2] * held[1], held[0].mT @ w_OQ)

    both = (g_TO.mT @ (x_TI @ torch.cat([start_IQ, omega_IP], dim=1))).mul_(weight)
    y_OQ, sketch_OP = both.split([start_IQ.shape[1], omega_IP.shape[1]], dim=1)
    q_OQ = orthonormal(with_held(y_OQ, start_IQ))
    for _ in range(power_steps):
        p_IQ = orthonormal(adjoint(q_OQ))
        q_OQ = orthonormal(with_held((g_TO.mT @ (x_TI @ p_IQ)).mul_(weight), p_IQ))
    return q_OQ, adjoint(q_OQ), sketch_OP.clone()


def first_look(x_TI: Tensor, g_TO: Tensor, omega_IQ: Tensor) -> Tensor:
    """Directions to start a layer's first block from: one power iteration on a part of its tokens.

    Args:
        x_TI: Inputs of the layer, in the dtype of the sums.
        g_TO: Gradients of the loss at the layer's outputs.
        omega_IQ: Random directions.

    Returns:
        (I, Q), nearly orthonormal; where those tokens have fewer directions, random ones.
    """
    if len(x_TI) >= 2 * STRIDE * omega_IQ.shape[1]:
        x_TI, g_TO = x_TI[::STRIDE], g_TO[::STRIDE]
    p_IQ = orthonormal(x_TI.mT @ (g_TO @ orthonormal(g_TO.mT @ (x_TI @ omega_IQ))))
    return torch.where(p_IQ.norm(dim=0) > 0, p_IQ, omega_IQ)


def _whitening(gram: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """The map W of columns C with Gram matrix `CᵀC`, to `C W` with orthonormal columns; short directions go to zero.

    Returns:
        W, its columns in descending order of the lengths of the directions, and those lengths; of batches too.
    """
    values, vectors = torch.linalg.eigh(gram)
    lengths = values.clamp_min(0).sqrt().flip(-1)
    kept = lengths > floor * lengths[..., :1]
    inverse = torch.where(kept, 1 / lengths.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return vectors.flip(-1) * inverse[..., None, :], torch.where(kept, lengths, 0.0)


def truncate(q_OQ: Tensor, z_IQ: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of the projection of M on the columns of Q, from Q and `Z = Mᵀ Q`.

    `M ≈ Q (QᵀQ)⁻¹ Zᵀ`, so Q need not be quite orthonormal. All that is decomposed are Gram matrices of Q × Q numbers,
    in float64. Takes batches: leading dimensions are those of a stack of layers.

    Args:
        q_OQ: (…, O, Q).
        z_IQ: (…, I, Q).
        kept: K.

    Returns:
        U (…, O, K), S (…, K), V (…, I, K); directions that M does not have are columns of zeros.
    """
    z64 = wide(z_IQ)  # its columns are as long as singular values: their squares need more than float32
    whitening, _ = _whitening(wide(q_OQ.mT @ q_OQ), SPURIOUS)
    rotation, lengths = _whitening(whitening.mT @ (z64.mT @ z64) @ whitening, NOISE)
    right = (whitening @ rotation)[..., :kept]
    lengths = lengths[..., :kept]
    return q_OQ @ (right * lengths[..., None, :]).to(q_OQ), lengths.to(q_OQ), z_IQ @ right.to(z_IQ)


def turned(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """How far the leading directions have turned: a mean squared sine of principal angles, between 0 and 1.

    Each direction counts by its σ², left and right ones alike: `1 − Σ σᵢ²(‖U₀ᵀuᵢ‖² + ‖V₀ᵀvᵢ‖²) / (2 Σ σᵢ²)`. So
    directions of nearly equal σ may mix, and one at the edge may be exchanged for another as strong, without counting.

    Args:
        before: The leading U₀ (O, J) and V₀ (I, J).
        after: U (O, K), S (K,), V (I, K), of which the first J count; K ≥ J.

    Returns:
        The mean, a scalar on the device.
    """
    count = before[0].shape[1]
    energy = after[1][:count].square()
    left, right = (
        (old.mT @ new[:, :count]).square().sum(dim=0) for old, new in ((before[0], after[0]), (before[1], after[2]))
    )
    return 1 - (energy * (left + right)).sum() / (2 * energy.sum()).clamp_min(torch.finfo(energy.dtype).tiny)
