"""The two factors of an aligned LoRA layer, as drop-in replacements of PEFT's `nn.Linear` modules.

`DeltaA` and `DeltaB` (offset="adapter") train dA and dB, from zero, and compute with the joined rank-2r matrices of
`joined.py`, so the base stays as it is. `ShiftedA` and `ShiftedB` (offset="base") train A and B themselves and compute
at rank r; the base weight has been changed. Both kinds save the joined matrices and take them apart on loading.

A factor adds to that algebra a start, a trainable parameter, and what PEFT and state dicts expect of a module. How the
parameter is stored (a plain tensor, shards, a partition) is the business of `Storage`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_ga.distributed.sharding import Storage, partitioned, placed_like, sharded, storage_of, whole
from lora_ga.distributed.state_dicts import leaves_out_frozen, loads_state
from lora_ga.distributed.tensor_parallel import PlannedStorage, Split, apply_plan, split_of
from lora_ga.layers.joined import Joined, JoinedA, JoinedB
from lora_ga.layers.optimizers import follow

Compute = Callable[[Tensor, Tensor, Tensor | None], Tensor]


# The name of the start in the state dict of a factor that DeepSpeed ZeRO-3 has partitioned.
START = "start"


class Factor(nn.Linear):
    """A LoRA factor that keeps its start, A₀ or B₀.

    The start is neither a Parameter, which PEFT would unfreeze in `set_adapter`, nor a buffer, which DDP would
    broadcast at every step; `_apply` moves it along with the parameters. Every process has the whole start, also where
    the trainable parameter is sharded. Casting to a narrower dtype does not round it: PEFT casts new adapters of a
    bfloat16 base to bfloat16 and then back to float32.

    Attributes:
        start: A₀ (r, I) or B₀ (O, r).
        rank: What PEFT calls r; of fused experts the rank of each.
        parts: The number of parts of the layer's weight.
        compute: The function of input, weight and bias by which PEFT's factor computes its output.
        split: This process's share of the base weight, under a tensor-parallel plan.
        joining: The algebra of the joined matrix, of factor A or B; a subclass names its class.
        trainable_name: The name of the trainable parameter.
        computes_joined: Whether `weight` is the joined matrix of rank 2r rather than the factor of rank r.
    """

    start: Tensor
    split: Split | None = None
    joining_class: type[Joined]
    trainable_name = "weight"
    computes_joined = False

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
        self.joining = self.joining_class(parts)
        self.rank = rank or start.shape[self.joined_dim]
        self.parts, self.compute = parts, compute
        shape = storage_of(trainable).shape
        if shape != tuple(start.shape):
            raise ValueError(f"The trainable part is {shape}, its start {tuple(start.shape)}.")
        self.start = start.detach().to(trainable.device, trainable.dtype).clone()
        self.register_parameter(self.trainable_name, trainable)
        self.register_parameter("bias", bias)
        sizes = list(self._joined_shape() if self.computes_joined else start.shape)
        self.out_features, self.in_features = sizes[:2]

    @property
    def trainable(self) -> nn.Parameter:
        """The parameter that trains, the same object the plain LoRA factor had."""
        return self._parameters[self.trainable_name]  # type: ignore[return-value]

    @property
    def storage(self) -> Storage:
        """How the trainable parameter is stored at this moment: wrappers and forward passes change that."""
        if self.split is not None and self.trainable.shape != self.start.shape:
            return PlannedStorage(self.trainable, self.split)
        return storage_of(self.trainable)

    def forward(self, x: Tensor) -> Tensor:
        """What the plain factor computes, with this weight."""
        return self.compute(x, self.weight, self.bias)

    def delta(self) -> Tensor:
        """How far the factor has moved from its start: dA (r, I) or dB (O, r)."""
        raise NotImplementedError

    def set_delta(self, delta: Tensor) -> None:
        """Move the factor to `start + delta`, in place."""
        raise NotImplementedError

    def set_joined(self, joined: Tensor) -> None:
        """Take the values of a joined matrix, (2r, I) or (O, 2r), in place."""
        raise NotImplementedError

    @torch.no_grad()
    def begin_at(self, start: Tensor) -> None:
        """Start again from `start`, with a delta of zero, in place."""
        self.start = start.detach().to(self.trainable.device, self.trainable.dtype).clone()
        self.set_delta(torch.zeros_like(self.start))

    def start_as_trained(self) -> Tensor:
        """The start in the dtype, on the device and in the shards of the trainable parameter."""
        return self.storage.part_of(self.start.to(self.trainable.dtype))

    @property
    def joined_dim(self) -> int:
        """The dimension in which the start and the delta are joined: 0 for A, 1 for B."""
        return self.joining.dim

    def joined(self) -> Tensor:
        """The factor of the plain rank-2r adapter for the original base."""
        return self.joining.joined(self.start_as_trained(), self.delta())

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """Two halves of rank r as one matrix of rank 2r."""
        return self.joining.join(first, second)

    def halves(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves that `join` joined."""
        return self.joining.halves(joined)

    def delta_in(self, joined: Tensor) -> Tensor:
        """The half of a joined matrix that is the delta: the first of A's, the second of B's."""
        return self.joining.delta_in(joined)

    def agrees(self, joined: Tensor) -> bool:
        """Whether a joined matrix of the same shape is this one, up to the rounding of the file it was stored in."""
        return self.joining.agree(whole(self.joined()), whole(self.delta()).abs(), joined)

    def _joined_shape(self) -> tuple[int, ...]:
        return tuple(2 * size if dim == self.joined_dim else size for dim, size in enumerate(self.start.shape))

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The buffers; for `set_model_state_dict`, which loads what modules name, also the joined matrix.

        Args:
            prefix: What the names begin with.
            recurse: Whether the buffers of the module's children are named too.
            remove_duplicate: Whether a buffer is named once.

        Yields:
            Name and tensor.
        """
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if loads_state() and not partitioned(self.trainable):
            yield f"{prefix}.weight" if prefix else "weight", self.joined().detach()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters; for `set_model_state_dict` without the trainable one, which is in the joined matrix.

        Args:
            prefix: What the names begin with.
            recurse: Whether the parameters of the module's children are named too.
            remove_duplicate: Whether a parameter is named once.

        Yields:
            Name and parameter.
        """
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if parameter is not self.trainable or partitioned(self.trainable) or not loads_state():
                yield name, parameter

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        with torch.no_grad():
            moved = fn(self.start)
            wide = torch.promote_types(moved.dtype, self.start.dtype)
            self.start = moved if moved.dtype == wide else self.start.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if partitioned(self.trainable):  # DeepSpeed gathers parameters by their names; see `adapter/file.py`
            destination[prefix + self.trainable_name] = self.trainable if keep_vars else self.trainable.detach()
            destination[prefix + START] = self.start
        else:
            joined = self.joined()
            destination[prefix + "weight"] = joined if keep_vars else joined.detach()
            if self.trainable_name != "weight" and not self.trainable.requires_grad and leaves_out_frozen():
                destination[prefix + self.trainable_name] = self.trainable.detach()  # for torch to take it out
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
        if partitioned(self.trainable) and prefix + self.trainable_name in state_dict:
            if prefix + START in state_dict:
                self.start = state_dict[prefix + START].to(self.start)
            return
        joined = state_dict.get(prefix + "weight")
        if joined is None:
            error_msgs.extend(without_start(state_dict, prefix))
            missing_keys.append(prefix + "weight")
        elif tuple(joined.shape) != self._joined_shape():
            error_msgs.append(
                f"{prefix}weight is {tuple(joined.shape)}, but this layer is aligned by LoRA-GA and loads "
                f"{self._joined_shape()}: rank {2 * self.rank}, twice the rank {self.rank} that trains. Load other "
                "adapters with stock PEFT, under another adapter name."
            )
        else:
            try:
                values = whole(joined.detach())
                if self.trainable.is_meta and not values.is_meta:
                    self._materialise(values.device)
                self.set_joined(values.to(self.trainable.device, self.trainable.dtype))
            except ValueError as error:
                error_msgs.append(f"{prefix}weight: {error}")

    def _materialise(self, device: torch.device) -> None:
        """Replace a trainable parameter without values by one of zeros, in its shards if it was sharded without any."""
        old = self.trainable
        zeros = placed_like(torch.zeros(self.start.shape, dtype=old.dtype, device=device), old, device)
        self.register_parameter(self.trainable_name, nn.Parameter(zeros, old.requires_grad))


class Delta(Factor):
    """Trains the delta; `weight` is the joined matrix, as PEFT's merge, dtype probes and fused kernels read it.

    Attributes:
        holds_factor: Whether the parameter holds A or B at this moment, rather than dA or dB (see `optimizers.py`).
    """

    trainable_name = "delta_weight"
    computes_joined = True
    holds_factor = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        follow(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy
        super().__setstate__(state)
        follow(self)

    @torch.no_grad()
    def hold_factor(self, factor: bool) -> None:
        """Make the parameter hold A or B (True), or dA or dB (False), in place; the factor computes the same."""
        if factor != self.holds_factor:
            self.trainable.add_(self.start_as_trained(), alpha=1 if factor else -1)
            self.holds_factor = factor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The joined matrix: (2r, I) or (O, 2r)."""
        return self.joined()

    def delta(self) -> Tensor:
        """The trained parameter itself, or what it differs from the start by."""
        return self.trainable - self.start_as_trained() if self.holds_factor else self.trainable

    def set_delta(self, delta: Tensor) -> None:
        """Copy into the trained parameter."""
        self.storage.write(self.start.to(delta) + delta if self.holds_factor else delta)

    @torch.no_grad()
    def set_joined(self, joined: Tensor) -> None:
        """Take the values of a joined matrix of any start, in place.

        The start is kept if the matrix agrees with it, since A₀ + dA in a file is rounded.
        """
        self.start = self.joining.start_in(joined, self.start)
        self.set_delta(self.delta_in(joined))


class Shifted(Factor):
    """Trains the factor itself, whose start has been taken out of the base weight."""

    def delta(self) -> Tensor:
        """The trained parameter less its start."""
        return self.trainable - self.start_as_trained()

    def set_delta(self, delta: Tensor) -> None:
        """Copy `start + delta` into the trained parameter."""
        self.storage.write(self.start.to(delta) + delta)

    @torch.no_grad()
    def set_joined(self, joined: Tensor) -> None:
        """Take the values of a joined matrix of the same start, in place: the base weight is shifted by that start.

        Args:
            joined: (2r, I) or (O, 2r).

        Raises:
            ValueError: It has another start.
        """
        if torch.equal(joined, whole(self.joined())):  # A = A₀ + dA is rounded: keep the exact values
            return
        before = self.trainable.clone()
        self.set_delta(self.delta_in(joined))
        if not self.agrees(joined):
            self.trainable.copy_(before)
            raise ValueError(
                "the adapter in the file has another start than this one, whose start has been taken out of the base "
                'weight (offset="base"). Load it with lora_ga.load on the original base model.'
            )


def without_start(names: Iterable[str], prefix: str = "") -> list[str]:
    """What to say about tensors that hold the trained deltas of rank r alone, as `named_parameters` gives them.

    Args:
        names: The names of the tensors.
        prefix: The factor whose tensors count; by default all do.

    Returns:
        One sentence about the first of them, or nothing.
    """
    deltas = (name for name in names if name.startswith(prefix) and name.endswith(f".{Delta.trainable_name}"))
    return [
        f"{name} holds a trained change (dA or dB, rank r) without its start A₀ or B₀. An adapter of LoRA-GA has rank "
        "2r. Write it with model.save_pretrained, or take its tensors from model.state_dict() or "
        "peft.get_peft_model_state_dict(model), not from named_parameters(). If the run is over and its "
        "lora_ga.safetensors is there, join them: A is [dA; A₀ + dA], B is [B₀, dB]."
        for name in itertools.islice(deltas, 1)
    ]


class DeltaA(Delta):
    """[dA ; A₀ + dA], (2r, I), training dA (r, I)."""

    joining_class = JoinedA


class DeltaB(Delta):
    """[B₀, dB], (O, 2r), training dB (O, r)."""

    joining_class = JoinedB


class ShiftedA(Shifted):
    """A, (r, I), saved as [A − A₀ ; A]."""

    joining_class = JoinedA


class ShiftedB(Shifted):
    """B, (O, r), saved as [B₀, B − B₀]."""

    joining_class = JoinedB

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        layer, _, own = prefix.removesuffix(".").rpartition("lora_B.")
        saved = (key.removeprefix(f"{layer}lora_A.") for key in destination if key.startswith(f"{layer}lora_A."))
        others = sorted({key.partition(".")[0] for key in saved} - {own})
        if others:
            raise ValueError(
                f'{layer.removesuffix(".")}: offset="base" has changed the weight under adapter {own!r}, so the other '
                f"adapters of the layer ({', '.join(others)}) would be saved or loaded for a base model that exists "
                'only here. Keep one adapter on this model, or use offset="adapter".'
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)


# The classes of factors A and B for each `LoraGAConfig.offset`.
FACTORS: Mapping[str, tuple[type[Factor], type[Factor]]] = {
    "adapter": (DeltaA, DeltaB),
    "base": (ShiftedA, ShiftedB),
}


def follow_plan(factor: Factor, base: Any) -> None:
    """Make a factor compute in the shards of a tensor-parallel plan, as the factor in whose place it is put did.

    Args:
        factor: The new factor.
        base: The base layer it belongs to; nothing happens if no plan splits it.
    """
    split = split_of(base)
    if split is not None and sharded(factor.trainable):
        factor.split = split
        apply_plan(factor, base)
