"""The streaming estimator: a low-rank factorisation updated block by block, by warm-started subspace iteration.

Shapes: T tokens, I inputs, O outputs, K kept directions, Q test directions (a few more than K), P probes, J leading.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_ga.linalg.accumulator import Size, refuse_infinite, sum_dtype
from lora_ga.linalg.low_rank import (
    PROBES,
    LowRank,
    estimated_norm,
    gaussian,
    merge_factors,
    probes,
    wide,
)

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


# Layers truncated at once: enough that a device is busy, few enough that their float64 copies stay small.
STACKED = 8


@dataclasses.dataclass
class _Stream:
    """One layer's stream: what is held, or (between its block and the flush) its untruncated Q and Z."""

    held: tuple[Tensor, Tensor, Tensor] | None = None
    pending: tuple[Tensor, Tensor] | None = None
    before: tuple[Tensor, Tensor] | None = None
    sketch: Tensor | None = None
    blocks: int = 0


class Streaming:
    """Keeps K directions of each gradient, (O + I)·K numbers, by warm-started subspace iteration; G is never formed.

    What a block costs in the backward pass are two thin products there and two back, and one Cholesky QR. The small
    decompositions wait for the flush, where layers of one shape go together; nothing before it makes the host wait.
    """

    def __init__(self, sizes: Mapping[str, Size], power_steps: int, seed: int, *, watched: bool = False) -> None:
        self.sizes, self.power_steps, self.seed, self.watched = sizes, power_steps, seed, watched
        self.streams: dict[str, _Stream] = {}
        self._random: dict[tuple[str, int, int, torch.device], Tensor] = {}

    def _gaussian(self, like: Tensor, columns: int, purpose: str) -> Tensor:
        """Gaussian numbers shared by the layers with as many inputs, made once on each device."""
        key = (purpose, like.shape[1], columns, like.device)
        if key not in self._random:
            drawn = gaussian(like.shape[1], columns, self.seed, purpose)
            self._random[key] = drawn.to(like)
        return self._random[key]

    def _start(self, name: str, stream: _Stream, x_TI: Tensor, g_TO: Tensor, columns: int) -> Tensor:
        """Where the block's iteration starts: the directions held, and a few that are new with each block."""
        random_IQ = self._gaussian(x_TI, columns, "test")
        if stream.held is None:
            return first_look(x_TI, g_TO, random_IQ)
        # A roll is as good as a draw, and needs no numbers from the host.
        digest = hashlib.sha256(f"{self.seed}\x1f{name}\x1f{stream.blocks}".encode()).digest()
        random_IQ = random_IQ.roll(int.from_bytes(digest[:6], "big") % len(random_IQ), dims=0)
        _, s_K, v_IK = stream.held
        known = s_K.numel()
        started_IK = torch.where(s_K > 0, v_IK, random_IQ[:, :known])
        return torch.cat([started_IK, random_IQ[:, known:]], dim=1)

    def add(self, name: str, x_TI: Tensor, g_TO: Tensor, weight: float) -> None:
        """Add a block of tokens."""
        stream = self.streams.setdefault(name, _Stream())
        if stream.pending is not None:  # a layer that runs twice in a pass
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
        """Truncate what the batch has added to K directions.

        Raises:
            FloatingPointError: A number in it was not finite.
        """
        waiting = {name: stream for name, stream in self.streams.items() if stream.pending is not None}
        refuse_infinite({name: stream.sketch for name, stream in waiting.items() if stream.sketch is not None})
        shapes: dict[object, list[str]] = defaultdict(list)
        for name, stream in waiting.items():
            assert stream.pending is not None
            q_OQ, z_IQ = stream.pending
            shapes[(q_OQ.shape, z_IQ.shape, self.sizes[name].kept, q_OQ.dtype, q_OQ.device)].append(name)
        for names in shapes.values():
            for first in range(0, len(names), STACKED):
                self._truncate(names[first : first + STACKED])

    def _truncate(self, names: Sequence[str]) -> None:
        """Truncate layers of one shape together."""
        pending = [each for name in names if (each := self.streams[name].pending) is not None]
        q_NOQ, z_NIQ = (torch.stack(parts) for parts in zip(*pending, strict=True))
        u_NOK, s_NK, v_NIK = truncate(q_NOQ, z_NIQ, self.sizes[names[0]].kept)
        for index, name in enumerate(names):
            self.streams[name].pending = None
            # Copies, so that no layer keeps the whole stack alive.
            self.streams[name].held = (u_NOK[index].clone(), s_NK[index].clone(), v_NIK[index].clone())

    def changes(self) -> dict[str, float]:
        """Compare with the directions before the last batch, which are kept for it where `watched` is set."""
        found = {}
        for name, stream in self.streams.items():
            if stream.before is not None and stream.held is not None:
                found[name] = turned(stream.before, stream.held)
                stream.before = None
        return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True)) if found else {}

    def factors(self, name: str) -> LowRank | None:
        """The directions held, and the norm estimated from the sketch."""
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
        """Take up what `state` gave."""
        for name in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
            parts = (tensors[f"{name}.{part}"].to(devices[name]) for part in ("U", "S", "V", "sketch"))
            u_OK, s_K, v_IK, sketch_OP = parts
            blocks = int(tensors[f"{name}.blocks"])
            self.streams[name] = _Stream(held=(u_OK, s_K, v_IK), sketch=sketch_OP, blocks=blocks)

    def absorb(self, tensors: Mapping[str, Tensor]) -> None:
        """Merge another's directions into those held, layer by layer; sketches add up."""
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
