"""The two factors of an aligned LoRA layer, as drop-in replacements of PEFT's `nn.Linear` modules.

With `A = A₀ + dA`, `B = B₀ + dB` the layer adds `s·(B A − B₀ A₀) x`, which is a plain LoRA of rank 2r:

    s·(B A − B₀ A₀)  =  s·[B₀, dB] · [dA ; A₀ + dA]

`DeltaA`, `DeltaB` (offset="adapter") train dA and dB, from zero, and compute with the joined rank-2r matrices, so the
base stays as it is. `ShiftedA`, `ShiftedB` (offset="base") train A and B themselves and compute at rank r; the base
weight has been changed. Both kinds save the joined matrices, and split them again on loading.

Shapes: r rank, I inputs, O outputs; a joined A is (2r, I), a joined B is (O, 2r). A convolution's have two dimensions
more. Where a layer is a stack of parts (groups, experts) r counts all of them, and A's rows are joined part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_ga.distributed.sharding import gathered, partitioned, placed_like, shape_of, sharded, whole
from lora_ga.distributed.tensor_parallel import split_of

Compute = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Factor(nn.Linear):
    """A LoRA factor that remembers its start.

    The start (A₀ or B₀) is neither a Parameter, which PEFT would unfreeze in `set_adapter`, nor a buffer, which DDP
    would broadcast at every step; `_apply` moves it along with the parameters. Where the trainable part is sharded each
    process holds the whole start, and cuts its shards of it where the two meet. A narrower dtype does not round it, as
    PEFT narrows new adapters of a bfloat16 base before it widens them again.
    """

    start: Tensor
    joined_dim: int  # the dimension in which the start and the delta are joined: 0 for A, 1 for B
    cut: Callable[[Tensor], Tensor] | None = None  # this process's part of the start, under a tensor-parallel plan

    def __init__(
        self,
        start: Tensor,
        trainable: nn.Parameter,
        bias: nn.Parameter | None = None,
        *,
        rank: int | None = None,
        parts: int = 1,
        compute: Compute = functional.linear,
    ) -> None:
        nn.Module.__init__(self)
        self.rank = rank or start.shape[self.joined_dim]  # what PEFT calls r; of fused experts that of each
        self.parts, self.compute = parts, compute
        if shape_of(trainable) != tuple(start.shape):
            raise ValueError(f"The trainable part is {shape_of(trainable)}, its start {tuple(start.shape)}.")
        self.start = start.detach().to(trainable.device, trainable.dtype).clone()
        self.register_parameter(self.trainable_name, trainable)
        self.register_parameter("bias", bias)
        joined = 2 if isinstance(self, Delta) else 1  # of the matrix it computes with
        rows, columns = start.shape[:2]
        self.out_features = rows * (joined if self.joined_dim == 0 else 1)
        self.in_features = columns * (joined if self.joined_dim == 1 else 1)

    trainable_name = "weight"

    @property
    def trainable(self) -> nn.Parameter:
        """The parameter that trains, the same object the plain LoRA factor had."""
        return self._parameters[self.trainable_name]  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """What the plain factor computes, with this weight."""
        return self.compute(x, self.weight, self.bias)

    def delta(self) -> Tensor:
        """How far the factor has moved from its start: dA (r, I) or dB (O, r)."""
        raise NotImplementedError

    def set_delta(self, delta: Tensor) -> None:
        """Move the factor to `start + delta`, in place."""
        raise NotImplementedError

    @torch.no_grad()
    def begin_at(self, start: Tensor) -> None:
        """Start anew from `start`, with a delta of zero, in place."""
        self.start = start.detach().to(self.trainable.device, self.trainable.dtype).clone()
        self.set_delta(torch.zeros_like(self.start))

    def joined(self) -> Tensor:
        """The factor of the plain rank-2r adapter for the original base."""
        start, delta = self.start_as_trained(), self.delta()
        return self.join(delta, start + delta) if self.joined_dim == 0 else self.join(start, delta)

    def start_as_trained(self) -> Tensor:
        """The start in the dtype, on the device and in the shards of the trainable part."""
        start = self.start.to(self.trainable.dtype)
        if self.cut is not None and self.trainable.shape != start.shape:  # the plan computes with this process's part
            return self.cut(start)
        return placed_like(start, self.trainable)

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """Two factors of rank r as one of rank 2r: A's rows one below the other, part by part; B's side by side."""
        if self.joined_dim == 1:
            return torch.cat([first, second], dim=1)
        rows = [half.unflatten(0, (self.parts, -1)) for half in (first, second)]
        return torch.cat(rows, dim=1).flatten(0, 1)

    def halves(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """What `join` joined."""
        if self.joined_dim == 1:
            first, second = joined.chunk(2, dim=1)
            return first, second
        first, second = joined.unflatten(0, (self.parts, -1)).chunk(2, dim=1)
        return first.flatten(0, 1), second.flatten(0, 1)

    def delta_in(self, joined: Tensor) -> Tensor:
        """The half of a joined matrix that is the delta: the first of A's, the second of B's."""
        return self.halves(joined)[self.joined_dim]

    def agrees(self, joined: Tensor) -> bool:
        """Whether a joined matrix of the same shape is this one, up to the rounding of the file it was stored in."""
        low = any(torch.equal(joined, joined.to(kind).to(joined)) for kind in (torch.bfloat16, torch.float16))
        own, delta = whole(self.joined()), whole(self.delta()).abs()
        size = joined.abs() + own.abs() + self.join(delta, delta)
        return bool(((own - joined).abs() <= (2.0**-7 if low else 1e-6) * size).all())

    def split(self, joined: Tensor) -> None:
        """Take over a joined matrix, (2r, I) or (O, 2r), in place."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        with torch.no_grad():
            moved = fn(self.start)
            wide = torch.promote_types(moved.dtype, self.start.dtype)
            self.start = moved if moved.dtype == wide else self.start.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if partitioned(self.trainable):  # ZeRO-3 gathers parameters by their own names; see `sidecar`
            destination[prefix + self.trainable_name] = self.trainable if keep_vars else self.trainable.detach()
        else:
            joined = self.joined()
            destination[prefix + "weight"] = joined if keep_vars else joined.detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = {key: value for key, value in state_dict.items() if key == prefix + "bias"}
        missing: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys.extend(key for key in missing if key == prefix + "bias")
        joined = state_dict.get(prefix + "weight")
        expected = tuple(2 * size if dim == self.joined_dim else size for dim, size in enumerate(self.start.shape))
        if joined is None:
            missing_keys.append(prefix + "weight")
        elif tuple(joined.shape) != expected:
            error_msgs.append(
                f"{prefix}weight is {tuple(joined.shape)}, but this layer is aligned by LoRA-GA and loads {expected}: "
                f"rank {2 * self.rank}, twice the rank {self.rank} that trains. Load other adapters with stock PEFT, "
                "under another adapter name."
            )
        else:
            try:
                values = whole(joined.detach())
                if self.trainable.is_meta and not values.is_meta:
                    self._materialise(values.device)
                self.split(values.to(self.trainable.device, self.trainable.dtype))
            except ValueError as error:
                error_msgs.append(f"{prefix}weight: {error}")

    def _materialise(self, device: torch.device) -> None:
        """Give the trained parameter values, zeros, in the shards it has: FSDP2 may have sharded it without any."""
        old = self.trainable
        zeros = placed_like(torch.zeros(self.start.shape, dtype=old.dtype, device=device), old, device)
        self.register_parameter(self.trainable_name, nn.Parameter(zeros, old.requires_grad))


class Delta(Factor):
    """Trains the delta; `weight` is the joined matrix, as PEFT's merge, dtype probes and fused kernels read it."""

    trainable_name = "delta_weight"

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The joined matrix: (2r, I) or (O, 2r)."""
        return self.joined()

    def delta(self) -> Tensor:
        """The trained parameter itself."""
        return self.trainable

    def set_delta(self, delta: Tensor) -> None:
        """Copy into the trained parameter, unless it holds that: an optimizer of ZeRO-3's has a copy of its own."""
        with gathered([self.trainable]):
            if hasattr(self.trainable, "ds_id") and torch.equal(self.trainable, delta.to(self.trainable)):
                return
            self.trainable.copy_(placed_like(delta, self.trainable))

    @torch.no_grad()
    def split(self, joined: Tensor) -> None:
        """Take over a joined matrix of any start. An exact start is kept, since A₀ + dA in the file is rounded."""
        first, second = self.halves(joined)
        if self.joined_dim == 1:
            self.start = first.clone()
        elif self.start.is_meta or not torch.equal(self.start.to(first) + first, second):
            self.start = second - first
        self.set_delta(self.delta_in(joined))


class Shifted(Factor):
    """Trains the factor itself, whose start has been taken out of the base weight."""

    def delta(self) -> Tensor:
        """The trained parameter less its start."""
        return self.trainable - self.start_as_trained()

    def set_delta(self, delta: Tensor) -> None:
        """Copy `start + delta` into the trained parameter."""
        self.trainable.copy_(placed_like(self.start.to(delta) + delta, self.trainable))

    @torch.no_grad()
    def split(self, joined: Tensor) -> None:
        """Take over a joined matrix of the same start; the base weight is shifted by that one.

        Args:
            joined: (2r, I) or (O, 2r).

        Raises:
            ValueError: It has another start.
        """
        if torch.equal(joined, whole(self.joined())):  # A = A₀ + dA is rounded: keep what is already held exactly
            return
        held = self.trainable.clone()
        self.set_delta(self.delta_in(joined))
        if not self.agrees(joined):
            self.trainable.copy_(held)
            raise ValueError(
                "the adapter in the file started elsewhere than this one, whose start has been taken out of the base "
                'weight (offset="base"). Load it with lora_ga.load on the original base model.'
            )


class DeltaA(Delta):
    """[dA ; A₀ + dA], (2r, I), training dA (r, I)."""

    joined_dim = 0


class DeltaB(Delta):
    """[B₀, dB], (O, 2r), training dB (O, r)."""

    joined_dim = 1


class ShiftedA(Shifted):
    """A, (r, I), saved as [A − A₀ ; A]."""

    joined_dim = 0


class ShiftedB(Shifted):
    """B, (O, r), saved as [B₀, B − B₀]."""

    joined_dim = 1

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        layer, _, own = prefix.removesuffix(".").rpartition("lora_B.")
        saved = (key.removeprefix(f"{layer}lora_A.") for key in destination if key.startswith(f"{layer}lora_A."))
        others = sorted({key.partition(".")[0] for key in saved} - {own})
        if others:
            raise ValueError(
                f'{layer.removesuffix(".")}: offset="base" has changed the weight under adapter {own!r}, so the other '
                f"adapters of the layer ({', '.join(others)}) would be saved or loaded for a base model that nobody "
                'else has. Keep one adapter on this model, or use offset="adapter".'
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)


FACTORS: Mapping[str, tuple[type[Factor], type[Factor]]] = {
    "adapter": (DeltaA, DeltaB),
    "base": (ShiftedA, ShiftedB),
}


def follow(factor: Factor, base: Any) -> None:
    """Let a factor compute in the shards of the one whose place it takes.

    Args:
        factor: The new factor.
        base: The base layer it belongs to.
    """
    split = split_of(base)
    if split is None or not sharded(factor.trainable):
        return
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    factor.cut = split.cut
    ALL_PARALLEL_STYLES[base._hf_tp_plan].install_forward(factor, base._hf_device_mesh)
