"""Low-rank factorisations of gradients: how they are made, merged and sent, and how the gradient's norm is estimated.

Shapes: I inputs, O outputs, K kept directions, Q directions before truncation, P probes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_ga.linalg.tensor_cores import float32_products

# The number of columns of the linear sketch from which the norm is estimated.
PROBES = 8


def generator(seed: int, *address: str) -> torch.Generator:
    """A CPU generator that depends on the seed and an address only.

    Args:
        seed: The configuration's seed.
        *address: What the numbers are for, for instance a layer's name and a purpose.

    Returns:
        A generator. The same seed and address give the same numbers in every process and on every machine.
    """
    digest = hashlib.sha256("\x1f".join([str(seed), *address]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def wide(x: Tensor) -> Tensor:
    """The tensor in float64, moved to the CPU if its device has no float64 (Apple's)."""
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)


def read(values: Sequence[Tensor]) -> list[float]:
    """The numbers of several vectors, one after the other, which may be on several devices. The host waits once."""
    widened = [wide(each) for each in values]
    return torch.cat([each.to(widened[0].device) for each in widened]).tolist() if values else []


@dataclasses.dataclass(frozen=True, repr=False)
class LowRank:
    """The leading part `U diag(S) Vᵀ` of a gradient G = ∂L/∂W of a layer with O outputs and I inputs.

    Attributes:
        U: (O, K), orthonormal columns.
        S: (K,), descending, not negative.
        V: (I, K), orthonormal columns.
        norm: Frobenius norm of all of G, not only of the leading part. The dense estimator computes it exactly, the
            streaming one estimates it from `sketch`.
        sketch: (O, P), `G Ω` for the fixed Gaussian matrix Ω = `probes(...)`. It is linear in G, so sketches add up
            over batches and machines, and give the norm of a merged estimate. None if it was not kept.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    norm: float
    sketch: Tensor | None = None

    def __repr__(self) -> str:
        size = f"{self.U.shape[0]} x {self.V.shape[0]}"
        return f"LowRank({size}, {self.S.numel()} directions, norm {self.norm:.3g}, {self.held:.0%} of its square held)"

    def limit(self, rank: int) -> float:
        """The largest alignment with G that the first step of a LoRA of rank r can have: √(Σ_{i≤2r} σᵢ²)/‖G‖.

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
        """The share of ‖G‖² that the factorisation holds, Σσᵢ²/‖G‖², as exact as the norm; 1 if G is zero.

        The Frobenius norm of the rest is `√(1 − held)·‖G‖`.
        """
        return min(1.0, self.S.double().square().sum().item() / self.norm**2) if self.norm else 1.0

    def scaled(self, factor: float) -> LowRank:
        """The factorisation of `factor`·G, for a factor > 0."""
        sketch = None if self.sketch is None else self.sketch * factor
        return LowRank(self.U, self.S * factor, self.V, self.norm * factor, sketch)

    def to(self, device: torch.device) -> LowRank:
        """The factorisation on a device."""
        sketch = None if self.sketch is None else self.sketch.to(device)
        return LowRank(self.U.to(device), self.S.to(device), self.V.to(device), self.norm, sketch)


def packed(factors: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Factorisations with a sketch as "layer.part" → tensor, to be sent to other processes."""
    tensors: dict[str, Tensor] = {}
    for name, factor in factors.items():
        assert factor.sketch is not None
        tensors |= {
            f"{name}.U": factor.U,
            f"{name}.S": factor.S,
            f"{name}.V": factor.V,
            f"{name}.sketch": factor.sketch,
        }
        tensors[f"{name}.norm"] = torch.tensor(factor.norm, dtype=torch.float64, device="cpu")
    return tensors


def unpacked(tensors: Mapping[str, Tensor], places: Mapping[str, torch.device]) -> dict[str, LowRank]:
    """Read what `packed` made.

    Args:
        tensors: "layer.part" → tensor.
        places: Layer → the device for its factorisation.

    Returns:
        The factorisations of the layers in `places` that `tensors` contains.
    """
    factors = {}
    for name, place in places.items():
        if f"{name}.norm" in tensors:
            u_OK, s_K, v_IK, sketch_OP = (tensors[f"{name}.{part}"].to(place) for part in ("U", "S", "V", "sketch"))
            factors[name] = LowRank(u_OK, s_K, v_IK, tensors[f"{name}.norm"].item(), sketch_OP)
    return factors


def fix_signs(u_OK: Tensor, v_IK: Tensor) -> tuple[Tensor, Tensor]:
    """Make the largest entry of each column of U positive: solvers return either sign. Takes batches."""
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


def merge_factors(parts: Sequence[tuple[Tensor, Tensor, Tensor]], kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of a sum of factorisations, from their concatenated factors.

    Args:
        parts: U (O, ·), S and V (I, ·) of each.
        kept: K.

    Returns:
        U (O, K), S (K,), V (I, K).
    """
    left = torch.cat([u * s for u, s, _ in parts], dim=1)
    right = torch.cat([v for _, _, v in parts], dim=1)
    smaller = min(left.shape[0], right.shape[0])
    if left.shape[1] > smaller:  # more columns than rows: the product itself is the smaller matrix
        return truncated_svd(left @ right.mT, kept)
    q_OQ, r_QQ = torch.linalg.qr(left)
    return _compressed(q_OQ, right @ r_QQ.mT, kept)


def gaussian(inputs: int, columns: int, seed: int, purpose: str) -> Tensor:
    """Standard normal numbers, (inputs, columns), on the CPU; the same for all layers with this number of inputs."""
    return torch.randn(inputs, columns, generator=generator(seed, purpose, str(inputs)), device="cpu")


def probes(inputs: int, seed: int) -> Tensor:
    """The fixed Gaussian matrix Ω of the sketch, (I, P), independent of the random directions of the updates."""
    return gaussian(inputs, PROBES, seed, "norm")


def estimated_norms(held: tuple[Tensor, Tensor, Tensor], sketch_OP: Tensor, omega_IP: Tensor) -> Tensor:
    """Estimate ‖G‖ from a factorisation of its leading part and its linear sketch `G Ω`. Takes batches.

    `E‖G ω‖² = ‖G‖²` for Gaussian ω. The norm of `H = U S Vᵀ` is known exactly, so only the rest `R = G − H` is
    estimated: `‖G‖² = ‖S‖² + E[2⟨Hω, Rω⟩ + ‖Rω‖²]`.

    Args:
        held: U (…, O, K), S (…, K), V (…, I, K).
        sketch_OP: `G Ω`.
        omega_IP: The same Ω, on any device.

    Returns:
        The estimates (…), at least ‖S‖, in float64.
    """
    u_OK, s_K, v_IK = (wide(part) for part in held)
    held_OP = (u_OK * s_K[..., None, :]) @ (v_IK.mT @ wide(omega_IP.to(v_IK.device)))
    rest_OP = wide(sketch_OP) - held_OP
    chance = (2 * (held_OP * rest_OP) + rest_OP.square()).sum(dim=(-2, -1)) / omega_IP.shape[1]
    return (s_K.square().sum(dim=-1) + chance.clamp_min(0)).sqrt()


def estimated_norm(held: tuple[Tensor, Tensor, Tensor], sketch_OP: Tensor, omega_IP: Tensor) -> float:
    """`estimated_norms` of one matrix."""
    return estimated_norms(held, sketch_OP, omega_IP).item()


@float32_products("ieee")
def merge(parts: Sequence[tuple[LowRank, float]], kept: int, omega_IP: Tensor) -> LowRank:
    """The factorisation of `Σ weight·G` over several estimates of one layer.

    Args:
        parts: Factorisations with a sketch, and their weights.
        kept: Directions to keep.
        omega_IP: The Ω of the sketches, the same for all parts.

    Returns:
        The merged factorisation, on the device of the first part; its norm is estimated from the summed sketches.

    Raises:
        ValueError: A part has no sketch.
    """
    place = parts[0][0].U.device
    parts = [(part.to(place), weight) for part, weight in parts]
    sketches = [part.sketch * weight for part, weight in parts if part.sketch is not None]
    if len(sketches) < len(parts):
        raise ValueError("A factorisation without a sketch cannot be merged: its norm would be unknown.")
    held = merge_factors([(part.U, part.S * weight, part.V) for part, weight in parts], kept)
    sketch_OP = torch.stack(sketches).sum(dim=0)
    return LowRank(*held, norm=estimated_norm(held, sketch_OP, omega_IP), sketch=sketch_OP)
