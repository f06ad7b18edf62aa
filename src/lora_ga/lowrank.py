"""Low-rank factorisations of gradients: the streaming update, the merge, and the norm. Pure functions of tensors.

Shapes: T tokens, I inputs, O outputs, K kept directions, Q test directions (a few more than K), P probes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Random columns added to the warm start of each block, so that directions that only appear late are found.
FRESH = 12
# Columns of the linear sketch from which the norm is estimated.
PROBES = 8
# A layer's first look takes one token in so many, if enough of them are left.
STRIDE = 4
# Of the columns of Q (in units of their lengths before), and of the singular values (of the first): what is below is
# rounding noise of float32, and is left out.
SPURIOUS = 1e-2
NOISE = 1e-7


def generator(seed: int, *address: str) -> torch.Generator:
    """A CPU generator that depends on nothing but its address.

    Args:
        seed: The configuration's seed.
        *address: What the draw is for, for instance the layer's name and a purpose.

    Returns:
        A generator: equal addresses draw equal numbers in every process, on every machine.
    """
    digest = hashlib.sha256("\x1f".join([str(seed), *address]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def wide(x: Tensor) -> Tensor:
    """The tensor in float64; on the CPU if its device has no float64 (Apple's)."""
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)


def orthonormal(y: Tensor) -> Tensor:
    """Columns that span what those of `y` span, orthonormal up to rounding.

    By the Cholesky factor of their Gram matrix, in float64: a few thin products instead of Householder's many small
    steps, and nothing that makes the host wait for the device. Where columns depend on one another the surplus ones
    come out short; `truncate` takes account of that. The method is the shifted one of Fukaya et al., "Shifted Cholesky
    QR for computing the QR factorization of ill-conditioned matrices" (2020).

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
    return torch.linalg.solve_triangular(factor, y64.mT, upper=False).mT.to(y)


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The leading part `U diag(S) Vᵀ` of a gradient G = ∂L/∂W of a layer with O outputs and I inputs.

    Attributes:
        U: (O, K), orthonormal columns.
        S: (K,), descending, not negative.
        V: (I, K), orthonormal columns.
        norm: Frobenius norm of all of G, not only of the part held. Exact from the dense estimator, estimated from
            `sketch` by the streaming one.
        sketch: (O, P), `G Ω` for the fixed Gaussian probes `probes(...)` of this layer, a linear function of G: it
            adds up over batches and machines, and gives the norm of a merged estimate. None where it was not kept.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    norm: float
    sketch: Tensor | None = None

    def limit(self, rank: int) -> float:
        """The largest alignment any LoRA of rank `rank` can have with G at its first step: √(Σ_{i≤2r} σᵢ²)/‖G‖.

        Args:
            rank: The adapter's rank r.

        Returns:
            A number between 0 and 1 (Eckart and Young, "The approximation of one matrix by another of lower rank",
            1936, with rank 2r); NaN if G is zero or fewer than 2r directions are held.
        """
        if self.norm == 0 or self.S.numel() < 2 * rank:
            return math.nan
        return min(1.0, self.S[: 2 * rank].double().square().sum().sqrt().item() / self.norm)

    @property
    def held(self) -> float:
        """The share of ‖G‖² that the directions held carry, Σσᵢ²/‖G‖²: as exact as the norm is.

        What is not held is `√(1 − held)·‖G‖`. 1 for a gradient of zeros.
        """
        return min(1.0, self.S.double().square().sum().item() / self.norm**2) if self.norm else 1.0

    def scaled(self, factor: float) -> LowRank:
        """The factorisation of `factor`·G, for a factor > 0."""
        sketch = None if self.sketch is None else self.sketch * factor
        return LowRank(self.U, self.S * factor, self.V, self.norm * factor, sketch)


def fix_signs(u_OK: Tensor, v_IK: Tensor) -> tuple[Tensor, Tensor]:
    """Make the largest entry of each column of U positive, so that the factors of one G are one pair; batches too."""
    rows = u_OK.abs().argmax(dim=-2, keepdim=True)
    signs = torch.where(u_OK.gather(-2, rows) < 0, -1.0, 1.0).to(u_OK.dtype)
    return u_OK * signs, v_IK * signs


def truncated_svd(g_OI: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `kept` singular triplets of a dense matrix: U (O, K), S (K,), V (I, K)."""
    u, s, vh = torch.linalg.svd(g_OI, full_matrices=False)
    u_OK, v_IK = fix_signs(u[:, :kept], vh[:kept].mT)
    return u_OK, s[:kept], v_IK


def _compressed(q_OQ: Tensor, z_IQ: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets of `Q Zᵀ` with orthonormal Q, truncated to `kept`."""
    p_IQ, r_QQ = torch.linalg.qr(z_IQ)
    u, s, vh = torch.linalg.svd(r_QQ.mT)
    u_OK, v_IK = fix_signs((q_OQ @ u)[:, :kept], (p_IQ @ vh.mT)[:, :kept])
    return u_OK, s[:kept], v_IK


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
        (I, Q), nearly orthonormal.
    """
    if len(x_TI) >= 2 * STRIDE * omega_IQ.shape[1]:
        x_TI, g_TO = x_TI[::STRIDE], g_TO[::STRIDE]
    return orthonormal(x_TI.mT @ (g_TO @ orthonormal(g_TO.mT @ (x_TI @ omega_IQ))))


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


def merge_factors(parts: Sequence[tuple[Tensor, Tensor, Tensor]], kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading triplets of a sum of factorisations, by concatenating them: U (O, K), S (K,), V (I, K)."""
    left = torch.cat([u * s for u, s, _ in parts], dim=1)
    right = torch.cat([v for _, _, v in parts], dim=1)
    smaller = min(left.shape[0], right.shape[0])
    if left.shape[1] > smaller:  # more columns than rows: the product itself is the smaller thing to decompose
        return truncated_svd(left @ right.mT, kept)
    q_OQ, r_QQ = torch.linalg.qr(left)
    return _compressed(q_OQ, right @ r_QQ.mT, kept)


def gaussian(inputs: int, columns: int, seed: int, purpose: str) -> Tensor:
    """Standard normal numbers, (inputs, columns), on the CPU: the same for all layers with as many inputs."""
    return torch.randn(inputs, columns, generator=generator(seed, purpose, str(inputs)))


def probes(inputs: int, seed: int) -> Tensor:
    """The fixed Gaussian probes Ω of the sketch, (I, P); independent of all directions that an update starts from."""
    return gaussian(inputs, PROBES, seed, "norm")


def estimated_norm(held: tuple[Tensor, Tensor, Tensor], sketch_OP: Tensor, omega_IP: Tensor) -> float:
    """‖G‖ from what is held of G and its linear sketch `G Ω`.

    `E‖G ω‖² = ‖G‖²` for Gaussian ω. The part held is known exactly, so only what is left is left to chance:
    `‖G‖² = ‖S‖² + E[2⟨Hω, Rω⟩ + ‖Rω‖²]` with `H = U S Vᵀ` and `R = G − H`.

    Args:
        held: U (O, K), S (K,), V (I, K).
        sketch_OP: `G Ω`.
        omega_IP: The same Ω.

    Returns:
        The estimate, never below the norm of the part held.
    """
    u_OK, s_K, v_IK = (wide(part) for part in held)
    held_OP = (u_OK * s_K) @ (v_IK.mT @ wide(omega_IP))
    rest_OP = wide(sketch_OP) - held_OP
    chance = (2 * (held_OP * rest_OP).sum() + rest_OP.square().sum()) / omega_IP.shape[1]
    return math.sqrt(s_K.square().sum().item() + max(0.0, chance.item()))


def merge(parts: Sequence[tuple[LowRank, float]], kept: int, omega_IP: Tensor) -> LowRank:
    """The factorisation of `Σ weight·G` over several estimates of one layer.

    Args:
        parts: Factorisations with a sketch, and their weights.
        kept: Directions to keep.
        omega_IP: The layer's probes, the same for all parts.

    Returns:
        The merged factorisation; its norm is estimated from the summed sketches.

    Raises:
        ValueError: A part carries no sketch.
    """
    sketches = [part.sketch * weight for part, weight in parts if part.sketch is not None]
    if len(sketches) < len(parts):
        raise ValueError("A factorisation without a sketch cannot be merged: its norm would be unknown.")
    held = merge_factors([(part.U, part.S * weight, part.V) for part, weight in parts], kept)
    sketch_OP = torch.stack(sketches).sum(dim=0)
    return LowRank(*held, norm=estimated_norm(held, sketch_OP, omega_IP.to(sketch_OP)), sketch=sketch_OP)
