"""The streaming estimator: a low-rank factorisation, updated block by block by warm-started subspace iteration.

Shapes: T tokens, I inputs, O outputs, K kept directions, Q test directions (a few more than K), P probes, J leading
directions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ga.linalg.accumulator import Inputs, Size, UnitRows, all_finite, refuse_infinite, sum_dtype
from lora_ga.linalg.low_rank import (
    PROBES,
    LowRank,
    estimated_norms,
    fix_signs,
    gaussian,
    merge_factors,
    probes,
    read,
    wide,
)

# The number of random columns added to the warm start of each block, to find directions that only appear late.
FRESH = 12
# `first_directions` reads one token in so many, if enough tokens are left.
STRIDE = 4
# Columns of Q below this share of their length before are rounding noise, and are replaced by zeros.
SPURIOUS = 1e-2
# Columns of Y of whose length less than this share is independent of the columns before them are left out, in float32:
# dividing by a small share would magnify the rounding of Z.
DEPENDENT = 1e-3
# So are singular values below this share of the largest, by the dtype of the sums.
NOISE = {torch.float32: 1e-7, torch.float64: 1e-14}
# The number of layers truncated at once: enough to keep a device busy, few enough that their float64 copies stay small.
STACKED = 32
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


def _times(x_TI: Inputs, w_IC: Tensor) -> Tensor:
    """`x w`."""
    return w_IC[x_TI.places] if isinstance(x_TI, UnitRows) else x_TI @ w_IC


def _transposed_times(x_TI: Inputs, c_TC: Tensor) -> Tensor:
    """`xᵀ c`."""
    if isinstance(x_TI, UnitRows):
        return c_TC.new_zeros(x_TI.width, c_TC.shape[1]).index_add_(0, x_TI.places, c_TC)
    return x_TI.mT @ c_TC


def _power_step(
    held: tuple[Tensor, Tensor, Tensor] | None, x_TI: Inputs, g_TO: Tensor, weight: float, start_IQ: Tensor
) -> Tensor:
    """One power step, `orth(Mᵀ orth(M start))` for `M = U S Vᵀ + weight·gᵀx`, without forming M.

    Returns:
        (I, Q), nearly orthonormal; columns of zeros for directions that M does not have.
    """
    y_OQ = (g_TO.mT @ _times(x_TI, start_IQ)).mul_(weight)
    if held is not None:
        y_OQ.addmm_(held[0] * held[1], held[2].mT @ start_IQ)
    q_OQ = orthonormal(y_OQ)
    z_IQ = _transposed_times(x_TI, g_TO @ q_OQ).mul_(weight)
    if held is not None:
        z_IQ.addmm_(held[2] * held[1], held[0].mT @ q_OQ)
    return orthonormal(z_IQ)


def first_directions(x_TI: Inputs, g_TO: Tensor, omega_IQ: Tensor) -> Tensor:
    """The directions from which a layer's first block starts: one power iteration on some of its tokens.

    Args:
        x_TI: Inputs of the layer, in the dtype of the sums.
        g_TO: Gradients of the loss at the layer's outputs.
        omega_IQ: Random directions.

    Returns:
        (I, Q), nearly orthonormal. Directions that those tokens do not have are random.
    """
    if isinstance(x_TI, Tensor) and len(x_TI) >= 2 * STRIDE * omega_IQ.shape[1]:
        x_TI, g_TO = x_TI[::STRIDE], g_TO[::STRIDE]
    p_IQ = _power_step(None, x_TI, g_TO, 1.0, omega_IQ)
    return torch.where(p_IQ.norm(dim=0) > 0, p_IQ, omega_IQ)


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
    diagonal, rotation = h_QQ.diagonal(dim1=-2, dim2=-1), None
    diagonal.add_(1e-13 * diagonal.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(h_QQ.dtype).tiny))
    for _ in range(STEPS):
        c_QQ = torch.linalg.cholesky_ex(h_QQ).L
        t_QQ = torch.linalg.cholesky_ex(c_QQ.mT @ c_QQ).L.mT
        step = torch.linalg.solve_triangular(t_QQ, c_QQ, upper=True, left=False)
        rotation = step if rotation is None else rotation @ step
        h_QQ = t_QQ @ t_QQ.mT
    assert rotation is not None
    return rotation


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
    independent = (factor.diagonal(dim1=-2, dim2=-1) > DEPENDENT).to(factor.dtype)
    inverse = torch.linalg.solve_triangular(factor.mT, torch.diag_embed(independent), upper=True) / lengths
    mixed = inverse @ _by_size(inverse.mT @ other @ inverse, exactly=exactly)[..., :kept]
    s_K = ((other @ mixed) * mixed).sum(dim=-2).clamp_min(0).sqrt()
    v_IK = z64 @ (mixed / s_K.clamp_min(tiny)[..., None, :])
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


class _Stack(NamedTuple):
    """The states of layers of one shape, one tensor for each part. Each layer's state is a view of them.

    Attributes:
        names: The layers.
        u: (N, O, K).
        s: (N, K).
        v: (N, I, K).
        y: (N, O, Q + P).
    """

    names: tuple[str, ...]
    u: Tensor
    s: Tensor
    v: Tensor
    y: Tensor


@dataclasses.dataclass
class _Stream:
    """The state of one layer, `M = U S Vᵀ`, and what its next block is multiplied with.

    Attributes:
        u: (O, K).
        s: (K,).
        v: (I, K), random where S is zero.
        omega: (I, Q + P), the directions from which the next block starts, and the probes Ω of the sketch. The first K
            are those of `v`, which is a view of it.
        y: (O, Q + P), `M omega`; the last P columns are the sketch. A block adds its part.
        z: (I, Q), `(gᵀx)ᵀ Y` of the last block; None if no block waits to be truncated.
        weight: The weight of the last block.
        blocks: The number of blocks added.
        stack: The states of the layers that were truncated together with this one. Its parts u, s, v and y are views of
            it, or it is None.
        before: The leading U and V, and the sketch, before the last batch, where changes are compared.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    omega: Tensor
    y: Tensor
    z: Tensor | None = None
    weight: float = 1.0
    blocks: int = 0
    stack: _Stack | None = None
    before: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, S and V; the columns of directions that M does not have are zeros."""
        return torch.where(self.s > 0, self.u, 0.0), self.s, torch.where(self.s > 0, self.v, 0.0)

    @property
    def sketch(self) -> Tensor:
        """The sum of the sketches, (O, P)."""
        return self.y[:, -PROBES:]

    @property
    def start(self) -> Tensor:
        """The directions from which the next block starts, (I, Q)."""
        return self.omega[:, :-PROBES]

    def turn(self, start_IQ: Tensor) -> None:
        """Let the next block start from other directions; those that are zero stay as they are."""
        start_IQ = torch.where(start_IQ.norm(dim=0) > 0, start_IQ, self.start)
        u_OK, s_K, v_IK = self.held
        self.y[:, :-PROBES] = (u_OK * s_K) @ (v_IK.mT @ start_IQ)
        self.omega = torch.cat([start_IQ, self.omega[:, -PROBES:]], dim=1)


class Streaming:
    """Keeps K directions of each gradient, (O + I)·K numbers, by warm-started subspace iteration; G is never formed.

    For a block a layer computes four thin products: `Y += gᵀ(x Ω)` and `Z = xᵀ(g Y)`, where Ω has the directions found
    so far and a few random ones, and Y begins as `M Ω`. This is Algorithm 4.4 of Halko, Martinsson and Tropp, "Finding
    structure with randomness" (2011), without its orthonormalisations, which can wait: the columns of Y have the angles
    of the left singular vectors, so they are nearly orthogonal. What is left is done for layers of one shape together,
    by products and Cholesky factors. The host does not wait for the device before `flush`, and there once.

    Args:
        sizes: Layer → how many directions to keep.
        power_steps: The number of power steps for each block.
        seed: The seed of the random directions.
        watched: Whether to keep what `changes` compares with.
    """

    def __init__(self, sizes: Mapping[str, Size], power_steps: int, seed: int, *, watched: bool = False) -> None:
        self.sizes, self.power_steps, self.seed, self.watched = sizes, power_steps, seed, watched
        self.streams: dict[str, _Stream] = {}
        self._waiting: dict[Hashable, list[str]] = {}
        self._totals: list[Tensor] = []
        self._random: dict[tuple[int, int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def _gaussian(self, inputs: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Random directions, twice one below the other, and the probes: for all layers with this number of inputs."""
        key = (inputs, columns, like.device, like.dtype)
        if key not in self._random:
            drawn = gaussian(inputs, columns, self.seed, "test").to(like)
            self._random[key] = torch.cat([drawn, drawn]), probes(inputs, self.seed).to(like)
        return self._random[key]

    def _fresh(self, name: str, random_2IQ: Tensor, blocks: int) -> Tensor:
        """Random directions of a layer, new for each block."""
        # Rolled rows are as random as new numbers, and need no transfer from the host.
        inputs = len(random_2IQ) // 2
        digest = hashlib.sha256(f"{self.seed}\x1f{name}\x1f{blocks}".encode()).digest()
        first = int.from_bytes(digest[:6], "big") % inputs
        return random_2IQ[first : first + inputs]

    def add(self, name: str, x_TI: Inputs, g_TO: Tensor, weight: float) -> None:
        """Add a block of tokens to a layer's sum."""
        dtype = sum_dtype(g_TO.dtype)
        x_TI, g_TO = x_TI.to(dtype) if isinstance(x_TI, Tensor) else x_TI, g_TO.to(dtype)
        stream = self.streams.get(name)
        if stream is None:
            stream = self.streams[name] = self._begun(name, x_TI, g_TO)
        elif stream.z is not None:  # the layer runs twice in this batch
            self._truncate(self._waiting.pop(self._shape(name)))
            stream = self.streams[name]
        if self.watched and stream.blocks and stream.before is None:
            used = self.sizes[name].used
            stream.before = (stream.u[:, :used].clone(), stream.held[2][:, :used].clone(), stream.sketch.clone())
        for _ in range(self.power_steps):
            stream.turn(_power_step(stream.held, x_TI, g_TO, weight, stream.start))
        stream.y.addmm_(g_TO.mT, _times(x_TI, stream.omega), alpha=weight)
        y_OQ = stream.y[:, :-PROBES]
        # Rounding hides weak directions behind strong ones. So float64 models do not leave Y as it is, nor do layers so
        # small that all directions are kept: their sums are exact.
        if dtype == torch.float64 or y_OQ.shape[1] == min(x_TI.shape[1], g_TO.shape[1]):
            y_OQ.copy_(orthonormal(y_OQ))
        stream.z, stream.weight = _transposed_times(x_TI, g_TO @ y_OQ), weight
        stream.blocks += 1
        waiting = self._waiting.setdefault(self._shape(name), [])
        waiting.append(name)
        if len(waiting) == STACKED:
            self._truncate(self._waiting.pop(self._shape(name)))

    def _begun(self, name: str, x_TI: Inputs, g_TO: Tensor) -> _Stream:
        """A layer before its first block."""
        inputs, outputs = x_TI.shape[1], g_TO.shape[1]
        columns = min(self.sizes[name].kept + FRESH, inputs, outputs)
        kept = min(self.sizes[name].kept, columns)
        random_2IQ, probes_IP = self._gaussian(inputs, columns, g_TO)
        start_IQ = first_directions(x_TI, g_TO, random_2IQ[:inputs])
        y = g_TO.new_zeros(outputs, columns + PROBES)
        omega = torch.cat([start_IQ, probes_IP], dim=1)
        return _Stream(y[:, :kept].clone(), y.new_zeros(kept), omega[:, :kept], omega, y)

    def _shape(self, name: str) -> Hashable:
        """What layers need to have in common to be truncated together."""
        stream = self.streams[name]
        kind = (stream.y.dtype, stream.y.device, stream.weight)
        return (stream.omega.shape, stream.y.shape, self.sizes[name].kept, kind)

    def _truncate(self, names: Sequence[str]) -> None:
        """Truncate layers of one shape, and prepare their next block."""
        streams = [self.streams[name] for name in names]
        exactly = self.watched or streams[0].y.dtype == torch.float64
        if exactly:  # solvers of eigenvalues refuse NaN with an error of their own
            self._refuse_infinite(names)
        _, u_NOK, s_NK, v_NIK, y_NOC = self._stacked(names)
        z_NIQ = torch.stack([stream.z for stream in streams if stream.z is not None])
        y_NOQ, sketch_NOP = y_NOC.split([y_NOC.shape[-1] - PROBES, PROBES], dim=-1)
        z_NIQ.baddbmm_(v_NIK * s_NK[:, None], u_NOK.mT @ y_NOQ, beta=streams[0].weight)
        self._totals.append(sketch_NOP.sum())
        u_NOK, s_NK, v_NIK = truncate(y_NOQ, z_NIQ, s_NK.shape[-1], exactly=exactly)
        self._prepare(names, (u_NOK, s_NK, v_NIK), sketch_NOP, [stream.blocks for stream in streams])

    def _stacked(self, names: Sequence[str]) -> _Stack:
        """The states of layers of one shape; not copied if these layers were truncated together before."""
        streams = [self.streams[name] for name in names]
        stack = streams[0].stack
        if stack is not None and stack.names == tuple(names) and all(stream.stack is stack for stream in streams):
            return stack
        parts = (torch.stack([getattr(stream, part) for stream in streams]) for part in ("u", "s", "v", "y"))
        return _Stack(tuple(names), *parts)

    def _prepare(
        self, names: Sequence[str], held: tuple[Tensor, Tensor, Tensor], sketch_NOP: Tensor, blocks: Sequence[int]
    ) -> None:
        """Store the factorisations of layers of one shape, with what their next block is multiplied with."""
        u_NOK, s_NK, v_NIK = held
        inputs, kept = v_NIK.shape[1:]
        columns = min(self.sizes[names[0]].kept + FRESH, inputs, u_NOK.shape[1])
        random_2IQ, probes_IP = self._gaussian(inputs, columns, u_NOK)
        fresh_NIQ = torch.stack(
            [self._fresh(name, random_2IQ, count) for name, count in zip(names, blocks, strict=True)]
        )
        v_NIK = torch.where(s_NK[:, None] > 0, v_NIK, fresh_NIQ[..., :kept])
        new_NIF = torch.baddbmm(fresh_NIQ[..., kept:], v_NIK, v_NIK.mT @ fresh_NIQ[..., kept:], alpha=-1)
        omega_NIC = torch.cat([v_NIK, new_NIF, probes_IP.expand(len(names), -1, -1)], dim=-1)
        crossed_NKQ = s_NK[..., None] * (v_NIK.mT @ omega_NIC[..., :columns])
        y_NOC = torch.cat([u_NOK @ crossed_NKQ, sketch_NOP], dim=-1)
        stack = _Stack(tuple(names), u_NOK, s_NK, omega_NIC[..., :kept], y_NOC)
        # Views of a stack keep all of it in memory. They are copied where the layers will not be replaced together.
        stacks = [self.streams[name].stack for name in names if name in self.streams]
        apart = any(each is not None and each.names != stack.names for each in stacks)
        for name, count, *views in zip(names, blocks, u_NOK, s_NK, omega_NIC, y_NOC, strict=True):
            u, s, omega, y = (part.clone() for part in views) if apart else views
            before = self.streams[name].before if name in self.streams else None
            found = None if apart else stack
            self.streams[name] = _Stream(u, s, omega[:, :kept], omega, y, blocks=count, stack=found, before=before)

    def flush(self, loss: Tensor | None = None) -> None:
        """Truncate the layers that the batch has reached to K directions.

        Args:
            loss: The batch's loss.

        Raises:
            FloatingPointError: A value in a block, or the loss, was not finite.
        """
        while self._waiting:
            self._truncate(self._waiting.popitem()[1])
        totals, self._totals = self._totals, []
        if not all_finite([*totals, *([] if loss is None else [loss])]):
            self._refuse_infinite(self.streams)
            refuse_infinite({} if loss is None else {"the loss": loss})

    def _refuse_infinite(self, names: Iterable[str]) -> None:
        refuse_infinite({name: self.streams[name].sketch for name in names})

    def changes(self) -> dict[str, float]:
        """How far the last batch has moved each layer's leading directions, if `watched`; see `direction_change`."""
        found = {}
        for name, stream in self.streams.items():
            if stream.before is not None:
                *directions, sketch_OP = stream.before
                change = direction_change((directions[0], directions[1]), stream.held)
                # An expert without a token has not seen the batch.
                found[name] = torch.where((stream.sketch == sketch_OP).all(), torch.nan, change)
                stream.before = None
        if not found:
            return {}
        values = torch.stack(list(found.values())).tolist()
        return {name: value for name, value in zip(found, values, strict=True) if not math.isnan(value)}

    def factors(self, names: Iterable[str]) -> dict[str, LowRank]:
        """The leading directions of the sums of layers, and the norms estimated from their sketches.

        Layers of one shape are decomposed together, and their values are read from the device at once.

        Returns:
            Layer → its factorisation.
        """
        shapes: dict[Hashable, list[str]] = {}
        for name in sorted(self.streams.keys() & set(names)):
            shapes.setdefault(self._shape(name), []).append(name)
        parts = [each[at : at + STACKED] for each in shapes.values() for at in range(0, len(each), STACKED)]
        held: dict[str, tuple[Tensor, ...]] = {}
        norms, weakest = [], []
        for part in parts:
            u_NOK, s_NK, v_NIK, sketch_NOP = self._decomposed(part)
            norms.append(estimated_norms((u_NOK, s_NK, v_NIK), sketch_NOP, probes(v_NIK.shape[1], self.seed)))
            weakest.append(s_NK[:, -1])
            held |= dict(zip(part, zip(u_NOK, s_NK, v_NIK, sketch_NOP, strict=True), strict=True))
        values = zip(held, read(norms), read(weakest), strict=True)
        return {name: self._low_rank(name, held[name], norm, whole=least > 0) for name, norm, least in values}

    def _decomposed(self, names: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The singular triplets of layers of one shape, and their sketches.

        Returns:
            U (N, O, K), S (N, K), V (N, I, K); of directions that a layer does not have, S is zero. And (N, O, P).
        """
        _, u_NOK, s_NK, v_NIK, y_NOC = self._stacked(names)
        u_NOK, s_NK, v_NIK = truncate(torch.where(s_NK[:, None] > 0, u_NOK, 0.0), v_NIK * s_NK[:, None], s_NK.shape[1])
        u_NOK, v_NIK = fix_signs(u_NOK, v_NIK)
        return u_NOK, s_NK, v_NIK, y_NOC[..., -PROBES:]

    def _low_rank(self, name: str, parts: tuple[Tensor, ...], norm: float, *, whole: bool) -> LowRank:
        """A layer's factorisation; one that is not `whole` has fewer than K directions, and gets arbitrary ones."""
        u_OK, s_K, v_IK, sketch_OP = parts
        if not whole:
            u_OK, s_K, v_IK = merge_factors([self.streams[name].held], len(s_K))
        return LowRank(u_OK, s_K, v_IK, norm, sketch_OP)

    def state(self) -> dict[str, Tensor]:
        """U, S, V, the sketch and the number of blocks of every layer."""
        tensors = {}
        for name, stream in self.streams.items():
            for part, tensor in zip("USV", stream.held, strict=True):
                tensors[f"{name}.{part}"] = tensor
            tensors[f"{name}.sketch"] = stream.sketch
            tensors[f"{name}.blocks"] = torch.tensor([stream.blocks])
        return tensors

    def restore(self, tensors: Mapping[str, Tensor], devices: Mapping[str, torch.device]) -> None:
        """Go on from a state that `state` returned."""
        for name in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
            parts = (tensors[f"{name}.{part}"].to(devices[name])[None] for part in ("U", "S", "V", "sketch"))
            u_NOK, s_NK, v_NIK, sketch_NOP = parts
            self._prepare([name], (u_NOK, s_NK, v_NIK), sketch_NOP, [int(tensors[f"{name}.blocks"])])

    def absorb(self, tensors: Mapping[str, Tensor]) -> None:
        """Merge the directions of another process into those held, layer by layer, and add up the sketches."""
        places = {key.removesuffix(".U"): tensor.device for key, tensor in tensors.items() if key.endswith(".U")}
        places |= {name: mine.y.device for name, mine in self.streams.items()}
        other = Streaming(self.sizes, self.power_steps, self.seed)
        other.restore(tensors, places)
        for name, theirs in other.streams.items():
            mine = self.streams.setdefault(name, theirs)
            if mine is theirs:
                continue
            u_OK, s_K, v_IK = merge_factors([mine.held, theirs.held], self.sizes[name].kept)
            sketch_NOP, blocks = (mine.sketch + theirs.sketch)[None], mine.blocks + theirs.blocks
            self._prepare([name], (u_OK[None], s_K[None], v_IK[None]), sketch_NOP, [blocks])
