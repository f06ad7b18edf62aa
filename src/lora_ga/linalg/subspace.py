"""Steps of subspace iteration: orthonormal columns, a power step, and the truncation of a projection.

Shapes: T tokens, I inputs, O outputs, K kept directions, Q test directions (a few more than K), J leading directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ga.linalg.accumulator import Inputs, UnitRows
from lora_ga.linalg.low_rank import wide
from lora_ga.linalg.tensor_cores import leading_digits

# `first_directions` reads one token in so many, and more if fewer than four for each direction would be left.
STRIDE = 4
# Columns of Q below this share of their length before are rounding noise, and are replaced by zeros.
SPURIOUS = 1e-2
# Columns of Y of whose length less than this share is independent of the columns before them are left out, in float32:
# dividing by a small share would magnify the rounding of Z.
DEPENDENT = 1e-3
# Columns of which less than this share of the longest column is independent are left out too: that is rounding noise.
ROUNDING = 1e-6
# So are singular values below this share of the largest, by the dtype of the sums.
NOISE = {torch.float32: 1e-7, torch.float64: 1e-14}
# The number of steps of the QR algorithm in a truncation that is not exact.
STEPS = 2


def orthonormal(y: Tensor) -> Tensor:
    """Columns with the span of those of `y`, orthonormal up to rounding.

    For float32 it uses the Cholesky factor of the Gram matrix, in float64: a few thin products instead of the many
    small steps of Householder's method, and no step at which the host waits for the device. If columns are linearly
    dependent, the surplus ones come out short, or as zeros if only rounding noise is left of them. The method is the
    shifted Cholesky QR of Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of ill-conditioned
    matrices" (2020).

    A Gram matrix keeps only half of the digits of its columns. So for float64 it uses Householder's method.

    Args:
        y: (rows, columns), columns ≤ rows.

    Returns:
        A matrix of the same shape.
    """
    y64 = wide(y)
    y64 = y64 / y64.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    if y.dtype == torch.float64:
        q64, r64 = torch.linalg.qr(y64)
        return torch.where(r64.diagonal().abs() > NOISE[y.dtype], q64, 0.0)
    gram = y64.mT @ y64
    gram.diagonal().add_(1e-12)
    factor = torch.linalg.cholesky_ex(gram, check_errors=False).L
    q64 = torch.linalg.solve_triangular(factor, y64.mT, upper=False).mT
    return torch.where(q64.norm(dim=0) > SPURIOUS, q64, 0.0).to(y)


def times(x_TI: Inputs, w_IC: Tensor) -> Tensor:
    """`x w`."""
    return w_IC[x_TI.places] if isinstance(x_TI, UnitRows) else x_TI @ w_IC


def transposed_times(x_TI: Inputs, c_TC: Tensor, *, in_parts: bool = False) -> Tensor:
    """`xᵀ c`, transposed in memory.

    Args:
        x_TI: x.
        c_TC: c.
        in_parts: Whether c is multiplied as the sum of its leading digits, which TF32 has, and the rest. So a product
            in TF32 loses no digits of c. It takes twice as many multiplications, but reads x once.

    Returns:
        (I, C).
    """
    if isinstance(x_TI, UnitRows):
        return c_TC.new_zeros(c_TC.shape[1], x_TI.width).index_add_(1, x_TI.places, c_TC.mT).mT
    if in_parts:
        leading_TC = leading_digits(c_TC)
        both_2CI = torch.cat([leading_TC, c_TC - leading_TC], dim=1).mT @ x_TI
        return both_2CI.unflatten(0, (2, -1)).sum(dim=0).mT
    return (c_TC.mT @ x_TI).mT


def multiplications(x_TI: Inputs, g_TO: Tensor, columns: int) -> int:
    """How many multiplications the four products of a block take: `x Ω`, `gᵀ(x Ω)`, `g Y` and `xᵀ(g Y)`."""
    inputs = 0 if isinstance(x_TI, UnitRows) else x_TI.shape[1]  # rows of an embedding are looked up
    return 2 * g_TO.shape[0] * columns * (inputs + g_TO.shape[1])


def power_step(
    held: tuple[Tensor, Tensor, Tensor], x_TI: Inputs, g_TO: Tensor, weight: float, start_IQ: Tensor
) -> Tensor:
    """One power step, `orth(Mᵀ orth(M start))` for `M = U S Vᵀ + weight·gᵀx`, without forming M.

    Returns:
        (I, Q), nearly orthonormal; columns of zeros for directions that M does not have.
    """
    u_OK, s_K, v_IK = held
    y_OQ = (g_TO.mT @ times(x_TI, start_IQ)).mul_(weight)
    q_OQ = orthonormal(y_OQ.addmm_(u_OK * s_K, v_IK.mT @ start_IQ))
    z_IQ = transposed_times(x_TI, g_TO @ q_OQ).mul_(weight)
    return orthonormal(z_IQ.addmm_(v_IK * s_K, u_OK.mT @ q_OQ))


def first_directions(x_TI: Inputs, g_TO: Tensor, random_OQ: Tensor, random_IQ: Tensor) -> Tensor:
    """The directions from which a layer's first block starts: `(gᵀx)ᵀ` times random ones, for some of its tokens.

    Args:
        x_TI: Inputs of the layer, in the dtype of the sums.
        g_TO: Gradients of the loss at the layer's outputs.
        random_OQ: Random directions of the outputs.
        random_IQ: Random directions of the inputs.

    Returns:
        (I, Q), nearly orthonormal. Directions that those tokens do not have are random.
    """
    stride = min(STRIDE, len(x_TI) // (4 * random_IQ.shape[1]))
    if isinstance(x_TI, Tensor) and stride > 1:
        x_TI, g_TO = x_TI[::stride], g_TO[::stride]
    p_IQ = orthonormal(transposed_times(x_TI, g_TO @ random_OQ))
    return torch.where(p_IQ.norm(dim=0) > 0, p_IQ, random_IQ)


def _whitening(gram: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """For columns C with Gram matrix `CᵀC`, the W for which `C W` has orthonormal columns, or zeros for short ones.

    Takes batches.

    Returns:
        W, its columns in descending order of the lengths of the directions, and those lengths.
    """
    values, vectors = torch.linalg.eigh(gram)
    lengths = values.clamp_min(0).sqrt().flip(-1)
    kept = lengths > floor * lengths[..., :1]
    inverse = torch.where(kept, 1 / lengths.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return vectors.flip(-1) * inverse[..., None, :], torch.where(kept, lengths, 0.0)


def _singular(c_IQ: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of `Cᵀ`, in the dtype of C; zeros for those that are rounding noise.

    Takes batches.

    Returns:
        U (…, Q, K), S (…, K), V (…, I, K).
    """
    p_IQ, r_QQ = torch.linalg.qr(c_IQ)
    u_QQ, s_Q, vh_QQ = torch.linalg.svd(r_QQ.mT)
    s_K = s_Q[..., :kept]
    found = s_K > NOISE[c_IQ.dtype] * s_K[..., :1]
    u_QK, v_IK = u_QQ[..., :kept], p_IQ @ vh_QQ.mT[..., :kept]
    u_QK, v_IK = (torch.where(found[..., None, :], each, 0.0) for each in (u_QK, v_IK))
    return u_QK, torch.where(found, s_K, 0.0), v_IK


def _by_size(h_QQ: Tensor, *, exactly: bool) -> Tensor:
    """A rotation R for which `Rᵀ H R` is nearly diagonal, with its largest entries first. Takes batches.

    Args:
        h_QQ: Symmetric and not negative, in float64.
        exactly: Whether R has the eigenvectors of H. Otherwise two steps of the QR algorithm, made of Cholesky
            factors: with `H = C Cᵀ` and `Cᵀ C = Tᵀ T` it is `R = C T⁻¹`, and `Rᵀ H R = T Tᵀ`. These are a few small
            products, and nothing that the host waits for. Directions whose values differ by a factor f are
            separated by f² in each step. Stewart, "The QLP approximation to the singular value decomposition"
            (1999), shows how good two steps are.

    Returns:
        R, of the same shape.
    """
    if exactly:
        return torch.linalg.eigh(h_QQ).eigenvectors.flip(-1)
    diagonal = h_QQ.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(diagonal.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(h_QQ.dtype).tiny * 1e13), alpha=1e-13)
    t_QQ, rotation = _step(h_QQ)
    for _ in range(STEPS - 1):
        t_QQ, step = _step(t_QQ @ t_QQ.mT)
        rotation = rotation @ step
    return rotation


def _step(h_QQ: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the QR algorithm on H: T and R, for which `Rᵀ H R = T Tᵀ`; see `_by_size`."""
    c_QQ = torch.linalg.cholesky_ex(h_QQ).L
    t_QQ = torch.linalg.cholesky_ex(c_QQ.mT @ c_QQ).L.mT
    return t_QQ, torch.linalg.solve_triangular(t_QQ, c_QQ, upper=True, left=False)


def truncate(y_OQ: Tensor, z_IQ: Tensor, kept: int, *, exactly: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The leading part of the projection of M on the columns of Y, from Y and `Z = Mᵀ Y`.

    `M ≈ Y (YᵀY)⁻¹ Zᵀ`, so Y need not be orthonormal. For float32, only Gram matrices, Q × Q, are decomposed, in
    float64; a Z in float64 is decomposed itself. Takes batches: leading dimensions are those of a stack of layers.

    Args:
        y_OQ: (…, O, Q); for float64 nearly orthonormal.
        z_IQ: (…, I, Q).
        kept: K.
        exactly: Whether to return singular triplets. Otherwise U is orthonormal, and `V S = Mᵀ U`, so V has columns of
            length 1 that are only nearly orthogonal, and S descends only roughly. Float64 is always exact.

    Returns:
        U (…, O, K), S (…, K), V (…, I, K). Of directions that M does not have, S is zero and the columns of U and V
        are arbitrary.
    """
    if z_IQ.dtype == torch.float64:
        whitening, _ = _whitening(y_OQ.mT @ y_OQ, SPURIOUS)
        left, s_K, v_IK = _singular(z_IQ @ whitening, kept)
        return y_OQ @ (whitening @ left), s_K, v_IK
    tiny = torch.finfo(torch.float64).tiny
    y64, z64 = wide(y_OQ), wide(z_IQ)  # Z has the squares of singular values, which need more than float32
    gram, other = y64.mT @ y64, z64.mT @ z64
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(tiny)[..., None]
    gram = gram / lengths / lengths.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(1e-12)
    factor = torch.linalg.cholesky_ex(gram).L
    shares = factor.diagonal(dim1=-2, dim2=-1)
    rounding = lengths.amax(dim=-2) / lengths[..., 0] * ROUNDING
    independent = (shares > rounding.clamp_min(DEPENDENT)).to(factor.dtype)
    inverse = torch.linalg.solve_triangular(factor.mT, torch.diag_embed(independent), upper=True) / lengths
    mixed = inverse @ _by_size(inverse.mT @ other @ inverse, exactly=exactly)[..., :kept]
    s_K = ((other @ mixed) * mixed).sum(dim=-2).clamp_min(tiny).sqrt()
    v_IK = z64 @ (mixed / s_K[..., None, :])
    s_K = s_K * (s_K > NOISE[z_IQ.dtype] * s_K.amax(dim=-1, keepdim=True))
    return (y64 @ mixed).to(y_OQ), s_K.to(y_OQ), v_IK.to(z_IQ)


def direction_change(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """How far the leading directions have moved: the mean squared sine of principal angles, between 0 and 1.

    The mean is over left and right directions, weighted by σ²: `1 − Σ σᵢ²(‖U₀ᵀuᵢ‖² + ‖V₀ᵀvᵢ‖²) / (2 Σ σᵢ²)`. It stays
    0 if directions mix within the leading J, and is small if only a weak one is exchanged for another.

    Args:
        before: The leading U₀ (O, J) and V₀ (I, J).
        after: U (O, K), S (K,), V (I, K) with K ≥ J; the first J are compared.

    Returns:
        The mean, a scalar on the device.
    """
    count = before[0].shape[1]
    energy = after[1][:count].square()
    left, right = (
        (old.mT @ new[:, :count]).square().sum(dim=0) for old, new in ((before[0], after[0]), (before[1], after[2]))
    )
    return 1 - (energy * (left + right)).sum() / (2 * energy.sum()).clamp_min(torch.finfo(energy.dtype).tiny)
