"""The streaming estimator: a low-rank factorisation, updated block by block by warm-started subspace iteration.

Shapes: T tokens, I inputs, O outputs, K kept directions, Q test directions (a few more than K), P probes, J leading
directions.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lora_ga.linalg.accumulator import Size, refuse_infinite, sum_dtype
from lora_ga.linalg.low_rank import PROBES, LowRank, estimated_norm, gaussian, merge_factors, probes, wide

# The number of random columns added to the warm start of each block, to find directions that only appear late.
FRESH = 12
# `first_directions` reads one token in so many, if enough tokens are left.
STRIDE = 4
# Columns of Q below this share of their length before are rounding noise, and are replaced by zeros.
SPURIOUS = 1e-2
# So are singular values below this share of the largest, by the dtype of the sums.
NOISE = {torch.float32: 1e-7, torch.float64: 1e-14}
# The number of layers truncated at once: enough to keep a device busy, few enough that their float64 copies stay small.
STACKED = 8


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


def first_directions(x_TI: Tensor, g_TO: Tensor, omega_IQ: Tensor) -> Tensor:
    """The directions from which a layer's first block starts: one power iteration on some of its tokens.

    Args:
        x_TI: Inputs of the layer, in the dtype of the sums.
        g_TO: Gradients of the loss at the layer's outputs.
        omega_IQ: Random directions.

    Returns:
        (I, Q), nearly orthonormal. Directions that those tokens do not have are random.
    """
    if len(x_TI) >= 2 * STRIDE * omega_IQ.shape[1]:
        x_TI, g_TO = x_TI[::STRIDE], g_TO[::STRIDE]
    p_IQ = orthonormal(x_TI.mT @ (g_TO @ orthonormal(g_TO.mT @ (x_TI @ omega_IQ))))
    return torch.where(p_IQ.norm(dim=0) > 0, p_IQ, omega_IQ)


def project(
    held: tuple[Tensor, Tensor, Tensor] | None,
    x_TI: Tensor,
    g_TO: Tensor,
    weight: float,
    start_IQ: Tensor,
    omega_IP: Tensor,
    power_steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add one block of tokens to a factorisation: `M = U S Vᵀ + weight·gᵀx ≈ Q Zᵀ`, without forming M.

    `Q = orth(M start)`; for each power step `P = orth(Mᵀ Q)`, `Q = orth(M P)`; then `Z = Mᵀ Q`. This is Algorithm 4.4
    of Halko, Martinsson and Tropp, "Finding structure with randomness" (2011). With the directions found so far as its
    start it is one step of subspace iteration for each block.

    Args:
        held: The factorisation so far, U (O, K), S (K,), V (I, K); None for the first block.
        x_TI: Inputs of the layer, in the dtype of the sums.
        g_TO: Gradients of the loss at the layer's outputs.
        weight: The weight of the block in the sum.
        start_IQ: The directions to start from.
        omega_IP: The matrix Ω of the sketch.
        power_steps: The number of power steps for this block.

    Returns:
        Q (O, Q), nearly orthonormal, Z (I, Q), and the block's term of the sketch, (O, P).
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


def truncate(q_OQ: Tensor, z_IQ: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of the projection of M on the columns of Q, from Q and `Z = Mᵀ Q`.

    `M ≈ Q (QᵀQ)⁻¹ Zᵀ`, so Q need not be exactly orthonormal. For float32, only Gram matrices, Q × Q, are decomposed, in
    float64; a Z in float64 is decomposed itself. Takes batches: leading dimensions are those of a stack of layers.

    Args:
        q_OQ: (…, O, Q).
        z_IQ: (…, I, Q).
        kept: K.

    Returns:
        U (…, O, K), S (…, K), V (…, I, K). Directions that M does not have are columns of zeros.
    """
    z64 = wide(z_IQ)  # its columns have the lengths of singular values, whose squares need more than float32
    whitening, _ = _whitening(wide(q_OQ.mT @ q_OQ), SPURIOUS)
    if z_IQ.dtype == torch.float64:
        left, lengths, v_IK = _singular(z64 @ whitening, kept)
        return q_OQ @ (whitening @ left), lengths, v_IK
    rotation, lengths = _whitening(whitening.mT @ (z64.mT @ z64) @ whitening, NOISE[z_IQ.dtype])
    right = (whitening @ rotation)[..., :kept]
    lengths = lengths[..., :kept]
    return q_OQ @ (right * lengths[..., None, :]).to(q_OQ), lengths.to(q_OQ), z_IQ @ right.to(z_IQ)


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


@dataclasses.dataclass
class _Stream:
    """The state of one layer.

    Attributes:
        held: The factorisation U, S, V; None before the first block, and between a block and the flush.
        pending: Q and Z of a block that is not truncated yet.
        before: The leading U and V before the last batch, where changes are compared.
        sketch: The sum of the sketches.
        blocks: The number of blocks added.
    """

    held: tuple[Tensor, Tensor, Tensor] | None = None
    pending: tuple[Tensor, Tensor] | None = None
    before: tuple[Tensor, Tensor] | None = None
    sketch: Tensor | None = None
    blocks: int = 0


class Streaming:
    """Keeps K directions of each gradient, (O + I)·K numbers, by warm-started subspace iteration; G is never formed.

    A block costs two thin products to multiply by gᵀx, two for its transpose, and one Cholesky QR. The small
    decompositions are done in `flush`, for layers of one shape together. The host does not wait for the device before
    `flush`.

    Args:
        sizes: Layer → how many directions to keep.
        power_steps: The number of power steps for each block.
        seed: The seed of the random directions.
        watched: Whether to keep what `changes` compares with.
    """

    def __init__(self, sizes: Mapping[str, Size], power_steps: int, seed: int, *, watched: bool = False) -> None:
        self.sizes, self.power_steps, self.seed, self.watched = sizes, power_steps, seed, watched
        self.streams: dict[str, _Stream] = {}
        self._random: dict[tuple[str, int, int, torch.device, torch.dtype], Tensor] = {}

    def _gaussian(self, like: Tensor, columns: int, purpose: str) -> Tensor:
        """Gaussian numbers for all layers with this number of inputs, drawn once, and kept by device and dtype."""
        key = (purpose, like.shape[1], columns, like.device, like.dtype)
        if key not in self._random:
            drawn = gaussian(like.shape[1], columns, self.seed, purpose)
            self._random[key] = drawn.to(like)
        return self._random[key]

    def _start(self, name: str, stream: _Stream, x_TI: Tensor, g_TO: Tensor, columns: int) -> Tensor:
        """The directions from which a block's iteration starts: those held, and a few random ones, new each time."""
        random_IQ = self._gaussian(x_TI, columns, "test")
        if stream.held is None:
            return first_directions(x_TI, g_TO, random_IQ)
        # Rolled rows are as random as new numbers, and need no transfer from the host.
        digest = hashlib.sha256(f"{self.seed}\x1f{name}\x1f{stream.blocks}".encode()).digest()
        random_IQ = random_IQ.roll(int.from_bytes(digest[:6], "big") % len(random_IQ), dims=0)
        _, s_K, v_IK = stream.held
        known = s_K.numel()
        started_IK = torch.where(s_K > 0, v_IK, random_IQ[:, :known])
        return torch.cat([started_IK, random_IQ[:, known:]], dim=1)

    def add(self, name: str, x_TI: Tensor, g_TO: Tensor, weight: float) -> None:
        """Add a block of tokens to a layer's sum.

        Raises:
            FloatingPointError: A value in an earlier block of this batch was not finite.
        """
        stream = self.streams.setdefault(name, _Stream())
        if stream.pending is not None:  # the layer ran twice in this batch
            self._refuse_infinite([name])
            self._truncate([name])
        dtype = sum_dtype(g_TO.dtype)
        x_TI, g_TO = x_TI.to(dtype), g_TO.to(dtype)
        columns = min(self.sizes[name].kept + FRESH, x_TI.shape[1], g_TO.shape[1])
        start_IQ = self._start(name, stream, x_TI, g_TO, columns)
        omega_IP = self._gaussian(x_TI, PROBES, "norm")
        q_OQ, z_IQ, added_OP = project(stream.held, x_TI, g_TO, weight, start_IQ, omega_IP, self.power_steps)
        if self.watched and stream.held is not None and stream.before is None:
            used = self.sizes[name].used
            stream.before = (stream.held[0][:, :used].clone(), stream.held[2][:, :used].clone())
        stream.held, stream.pending = None, (q_OQ, z_IQ)
        stream.sketch = added_OP if stream.sketch is None else stream.sketch.add_(added_OP)
        stream.blocks += 1

    def flush(self) -> None:
        """Truncate the layers that the batch has reached to K directions.

        Raises:
            FloatingPointError: A value in a block was not finite.
        """
        waiting = {name: stream for name, stream in self.streams.items() if stream.pending is not None}
        self._refuse_infinite(waiting)
        shapes: dict[object, list[str]] = defaultdict(list)
        for name, stream in waiting.items():
            assert stream.pending is not None
            q_OQ, z_IQ = stream.pending
            shapes[(q_OQ.shape, z_IQ.shape, self.sizes[name].kept, q_OQ.dtype, q_OQ.device)].append(name)
        for names in shapes.values():
            for first in range(0, len(names), STACKED):
                self._truncate(names[first : first + STACKED])

    def _refuse_infinite(self, names: Iterable[str]) -> None:
        refuse_infinite({name: sum for name in names if (sum := self.streams[name].sketch) is not None})

    def _truncate(self, names: Sequence[str]) -> None:
        """Truncate layers of one shape in one stack."""
        pending = [each for name in names if (each := self.streams[name].pending) is not None]
        q_NOQ, z_NIQ = (torch.stack(parts) for parts in zip(*pending, strict=True))
        u_NOK, s_NK, v_NIK = truncate(q_NOQ, z_NIQ, self.sizes[names[0]].kept)
        for index, name in enumerate(names):
            self.streams[name].pending = None
            # Copies, since views would keep the whole stack in memory.
            self.streams[name].held = (u_NOK[index].clone(), s_NK[index].clone(), v_NIK[index].clone())

    def changes(self) -> dict[str, float]:
        """How far the last batch has moved each layer's leading directions, if `watched`; see `direction_change`."""
        found = {}
        for name, stream in self.streams.items():
            if stream.before is not None and stream.held is not None:
                found[name] = direction_change(stream.before, stream.held)
                stream.before = None
        return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True)) if found else {}

    def factors(self, name: str) -> LowRank | None:
        """The leading directions of a layer's sum, and the norm estimated from its sketch."""
        stream = self.streams.get(name)
        if stream is None or stream.held is None or stream.sketch is None:
            return None
        held = merge_factors([stream.held], self.sizes[name].kept)
        norm = estimated_norm(held, stream.sketch, probes(held[2].shape[0], self.seed))
        return LowRank(*held, norm=norm, sketch=stream.sketch)

    def state(self) -> dict[str, Tensor]:
        """U, S, V, the sketch and the number of blocks of every layer."""
        tensors = {}
        for name, stream in self.streams.items():
            assert stream.held is not None
            assert stream.sketch is not None
            for part, tensor in zip("USV", stream.held, strict=True):
                tensors[f"{name}.{part}"] = tensor
            tensors[f"{name}.sketch"] = stream.sketch
            tensors[f"{name}.blocks"] = torch.tensor([stream.blocks])
        return tensors

    def restore(self, tensors: Mapping[str, Tensor], devices: Mapping[str, torch.device]) -> None:
        """Go on from a state that `state` returned."""
        for name in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
            parts = (tensors[f"{name}.{part}"].to(devices[name]) for part in ("U", "S", "V", "sketch"))
            u_OK, s_K, v_IK, sketch_OP = parts
            blocks = int(tensors[f"{name}.blocks"])
            self.streams[name] = _Stream(held=(u_OK, s_K, v_IK), sketch=sketch_OP, blocks=blocks)

    def absorb(self, tensors: Mapping[str, Tensor]) -> None:
        """Merge the directions of another process into those held, layer by layer, and add up the sketches."""
        places = {key.removesuffix(".U"): tensor.device for key, tensor in tensors.items() if key.endswith(".U")}
        places |= {name: mine.sketch.device for name, mine in self.streams.items() if mine.sketch is not None}
        other = Streaming(self.sizes, self.power_steps, self.seed)
        other.restore(tensors, places)
        for name, theirs in other.streams.items():
            mine = self.streams.setdefault(name, theirs)
            if mine is theirs:
                continue
            assert mine.held is not None
            assert mine.sketch is not None
            assert theirs.held is not None
            assert theirs.sketch is not None
            mine.held = merge_factors([mine.held, theirs.held], self.sizes[name].kept)
            mine.sketch, mine.blocks = mine.sketch + theirs.sketch, mine.blocks + theirs.blocks
