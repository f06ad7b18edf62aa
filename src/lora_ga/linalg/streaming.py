"""The streaming estimator: a low-rank factorisation, updated block by block by warm-started subspace iteration.

Shapes: T tokens, I inputs, O outputs, K kept directions, Q test directions (a few more than K), P probes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ga.linalg.accumulator import Inputs, Size, all_finite, refuse_infinite, sum_dtype
from lora_ga.linalg.low_rank import (
    PROBES,
    LowRank,
    estimated_norms,
    fix_signs,
    gaussian,
    merge_factors,
    probes,
    read,
)
from lora_ga.linalg.subspace import (
    direction_change,
    first_directions,
    multiplications,
    orthonormal,
    power_step,
    times,
    transposed_times,
    truncate,
)
from lora_ga.linalg.tensor_cores import cut_to_tf32_, exact_in_tf32, float32_products, gains_from_tf32

# The number of random columns added to the warm start of each block, to find directions that only appear late. With the
# default `oversample` and a rank divisible by 8, Y and Z have a multiple of 16 columns, which suits kernels.
FRESH = 16
# The number of layers truncated at once: enough to keep a device busy, few enough that their float64 copies stay small.
STACKED = 32


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

    Ω, Y and Z lie transposed in memory: on a CPU their products with x and g then take less time.

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

    def on(self, device: torch.device) -> _Stream:
        """The state on another device, between batches."""
        u, s, omega, y = (part.to(device) for part in (self.u, self.s, self.omega, self.y))
        return _Stream(u, s, omega[:, : len(s)], omega, y, blocks=self.blocks)

    def turn(self, start_IQ: Tensor) -> None:
        """Let the next block start from other directions; those that are zero stay as they are."""
        start_IQ = torch.where(start_IQ.norm(dim=0) > 0, start_IQ, self.start)
        u_OK, s_K, v_IK = self.held
        self.y[:, :-PROBES] = (u_OK * s_K) @ (v_IK.mT @ start_IQ)
        self.omega = torch.cat([start_IQ.mT, self.omega[:, -PROBES:].mT]).mT


class Streaming:
    """Keeps K directions of each gradient, (O + I)·K numbers, by warm-started subspace iteration; G is never formed.

    For a block a layer computes four thin products: `Y += gᵀ(x Ω)` and `Z = xᵀ(g Y)`, where Ω has the directions found
    so far and a few random ones, and Y begins as `M Ω`. This is Algorithm 4.4 of Halko, Martinsson and Tropp, "Finding
    structure with randomness" (2011), without its orthonormalisations, which can wait: the columns of Y have the angles
    of the left singular vectors, so they are nearly orthogonal. What is left is done for layers of one shape together,
    by products and Cholesky factors. The host does not wait for the device before `flush`, and there once.

    On CUDA the four products of large blocks in bfloat16 and float16 run in TF32, which has the numbers of x and g
    exactly. It rounds Ω and `x Ω`, which moves Y: only its span matters. But Z has to belong to Y exactly, because the
    truncation divides by what is left of nearly dependent columns. So Y itself is cut to the digits of TF32, and `g Y`
    is multiplied as the sum of two parts. All other products round as float32, also where the user allows TF32.

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

    @float32_products("ieee")
    def add(self, name: str, x_TI: Inputs, g_TO: Tensor, weight: float) -> None:
        """Add a block of tokens to a layer's sum."""
        dtype, half = sum_dtype(g_TO.dtype), exact_in_tf32(g_TO)
        x_TI, g_TO = x_TI.to(dtype) if isinstance(x_TI, Tensor) else x_TI, g_TO.to(dtype)
        stream = self.streams.get(name)
        if stream is None:
            stream = self.streams[name] = self._begun(name, x_TI, g_TO)
        elif stream.y.device != g_TO.device:  # restored to where its weight is, which FSDP can keep on the CPU
            stream = self.streams[name] = stream.on(g_TO.device)
        elif stream.z is not None:  # the layer runs twice in this batch
            self._truncate(self._waiting.pop(self._shape(name)))
            stream = self.streams[name]
        if self.watched and stream.blocks and stream.before is None:
            used = self.sizes[name].used
            stream.before = (stream.u[:, :used].clone(), stream.held[2][:, :used].clone(), stream.sketch.clone())
        for _ in range(self.power_steps):
            stream.turn(power_step(stream.held, x_TI, g_TO, weight, stream.start))
        rounds = half and gains_from_tf32(multiplications(x_TI, g_TO, stream.omega.shape[1]))
        with float32_products("tf32" if rounds else "ieee"):
            stream.y.addmm_(g_TO.mT, times(x_TI, stream.omega), alpha=weight)
            y_OQ = stream.y[:, :-PROBES]
            # Rounding hides weak directions behind strong ones. So float64 models do not leave Y as it is, nor do
            # layers so small that all directions are kept: their sums are exact.
            if dtype == torch.float64 or y_OQ.shape[1] == min(x_TI.shape[1], g_TO.shape[1]):
                y_OQ.copy_(orthonormal(y_OQ))
            if rounds:
                cut_to_tf32_(y_OQ)
            stream.z, stream.weight = transposed_times(x_TI, g_TO @ y_OQ, in_parts=rounds), weight
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
        random_2OQ, _ = self._gaussian(outputs, columns, g_TO)
        start_IQ = first_directions(x_TI, g_TO, random_2OQ[:outputs], random_2IQ[:inputs])
        y = g_TO.new_zeros(columns + PROBES, outputs).mT
        omega = torch.cat([start_IQ.mT, probes_IP.mT]).mT
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
        z_NIQ = torch.stack([stream.z.mT for stream in streams if stream.z is not None]).mT
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
        u, s = (torch.stack([getattr(stream, part) for stream in streams]) for part in ("u", "s"))
        v, y = (torch.stack([getattr(stream, part).mT for stream in streams]).mT for part in ("v", "y"))
        return _Stack(tuple(names), u, s, v, y)

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
        # Random directions in the place of those that M does not have are orthogonal to the others too. A part of a
        # strong direction in them would hide what is weak.
        found_NK = s_NK[:, None] > 0
        held_NIK = torch.where(found_NK, v_NIK, 0.0)
        fresh_NIQ = torch.baddbmm(fresh_NIQ, held_NIK, held_NIK.mT @ fresh_NIQ, alpha=-1)
        v_NIK, new_NIF = torch.where(found_NK, v_NIK, fresh_NIQ[..., :kept]), fresh_NIQ[..., kept:]
        omega_NIC = torch.cat([v_NIK.mT, new_NIF.mT, probes_IP.mT.expand(len(names), -1, -1)], dim=-2).mT
        crossed_NKQ = s_NK[..., None] * (v_NIK.mT @ omega_NIC[..., :columns])
        y_NOC = torch.cat([crossed_NKQ.mT @ u_NOK.mT, sketch_NOP.mT], dim=-2).mT
        stack = _Stack(tuple(names), u_NOK, s_NK, omega_NIC[..., :kept], y_NOC)
        # Views of a stack keep all of it in memory. They are copied where the layers will not be replaced together.
        stacks = [self.streams[name].stack for name in names if name in self.streams]
        apart = any(each is not None and each.names != stack.names for each in stacks)
        for name, count, *views in zip(names, blocks, u_NOK, s_NK, omega_NIC, y_NOC, strict=True):
            u, s, omega, y = (part.clone() for part in views) if apart else views
            before = self.streams[name].before if name in self.streams else None
            found = None if apart else stack
            self.streams[name] = _Stream(u, s, omega[:, :kept], omega, y, blocks=count, stack=found, before=before)

    @float32_products("ieee")
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

    @float32_products("ieee")
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
        values = read([change.reshape(1) for change in found.values()])
        return {name: value for name, value in zip(found, values, strict=True) if not math.isnan(value)}

    @float32_products("ieee")
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
            u_OK, found_K, v_IK = merge_factors([self.streams[name].held], len(s_K))
            s_K = torch.where(s_K > 0, found_K, 0.0)  # without the rounding noise of those that M does not have
        return LowRank(u_OK, s_K, v_IK, norm, sketch_OP)

    def state(self) -> dict[str, Tensor]:
        """U, S, V, the sketch and the number of blocks of every layer.

        Returns:
            "layer.part" → tensor, contiguous as in a file: how products round depends on the layout in memory.
        """
        tensors = {}
        for name, stream in self.streams.items():
            for part, tensor in zip("USV", stream.held, strict=True):
                tensors[f"{name}.{part}"] = tensor.contiguous()
            tensors[f"{name}.sketch"] = stream.sketch.contiguous()
            tensors[f"{name}.blocks"] = torch.tensor([stream.blocks], device="cpu")
        return tensors

    @float32_products("ieee")
    def restore(self, tensors: Mapping[str, Tensor], devices: Mapping[str, torch.device]) -> None:
        """Go on from a state that `state` returned."""
        for name in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
            parts = (tensors[f"{name}.{part}"].to(devices[name])[None] for part in ("U", "S", "V", "sketch"))
            u_NOK, s_NK, v_NIK, sketch_NOP = parts
            self._prepare([name], (u_NOK, s_NK, v_NIK), sketch_NOP, [int(tensors[f"{name}.blocks"])])

    @float32_products("ieee")
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
