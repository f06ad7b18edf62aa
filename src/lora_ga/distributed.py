"""Several processes: who there is, small values exchanged, tensors of layers merged and shared.

The only module that imports torch.distributed (the wrappers of a model are `sharding`'s). In one process nothing is
communicated, and every function here gives back what it was given. Tensors travel as bytes in a few large messages, so
there is no dtype that a backend could not reduce.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lora_ga.messages import as_bytes, buckets, of_layers

Result = TypeVar("Result")


class Held:
    """Keeps the exception of a block until the processes next exchange values, where all of them learn of it.

    A process that raised at once would leave the others waiting for it.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> Held:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if isinstance(error, Exception):
            self.error = error
        return isinstance(error, Exception)


def _named(exchange: Callable[..., Result]) -> Callable[..., Result]:
    """Say in the backend's errors (a closed connection, a time-out) who was talking."""

    @functools.wraps(exchange)
    def wrapped(self: Processes, *args: Any, **kwargs: Any) -> Result:
        try:
            return exchange(self, *args, **kwargs)
        except RuntimeError as error:
            raise RuntimeError(
                f"Process {self.rank} of {self.size}: an exchange with the other processes failed ({error}). One of "
                "them may have died; its own output says why. The model is unchanged."
            ) from error

    return wrapped


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes that make one estimate together.

    Attributes:
        rank: This process, from 0, in the group.
        size: How many there are; with 1 nothing is communicated.
        group: The process group; None for the default one.
        device: Where tensors have to be to be sent.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    device: str = "cpu"

    @property
    def identity(self) -> dict[str, Any]:
        """What a file of one of several processes belongs to; nothing in one process."""
        return {"process": [self.rank, self.size]} if self.size > 1 else {}

    def own_file(self, path: Path) -> Path:
        """A path of this process's own, beside the one given: `state-1-of-4.safetensors`; in one process that one."""
        return path if self.size == 1 else path.with_name(f"{path.stem}-{self.rank}-of-{self.size}{path.suffix}")

    def share_of(self, count: int | None) -> int | None:
        """How many of `count` batches each process reads: ⌈count/size⌉; None for all."""
        return None if count is None else math.ceil(count / self.size)

    @_named
    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order; values are small, and can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def exchange(self, held: Held, value: Any = None) -> list[Any]:
        """The values of all processes, unless one of them holds an error.

        Args:
            held: What has been raised in this process, if anything.
            value: Its value.

        Returns:
            The values in the processes' order.

        Raises:
            Exception: What this process holds.
            RuntimeError: Another process holds an error; all others raise this one, which names it.
        """
        said = None if held.error is None else f"{type(held.error).__name__}: {held.error}"
        reports = self.gather((said, None if said else value))
        if held.error is not None:
            raise held.error
        for rank, (error, _) in enumerate(reports):
            if error is not None:
                raise RuntimeError(
                    f"Process {rank} of {self.size} failed, so all of them stop: {error.rstrip('.')}. The model is "
                    "unchanged."
                )
        return [each for _, each in reports]

    @property
    def _paired(self) -> int:
        """The largest power of two of processes: those beyond it hand all they hold to one of these."""
        return 1 << (self.size.bit_length() - 1)

    def _levels(self, keys: Collection[str]) -> Iterator[tuple[int, list[str], list[str]]]:
        """How layers are shared out, level by level.

        Yields:
            The process to exchange with, and the layers that this one keeps and gives.
        """
        mine, distance = list(keys), self._paired // 2
        while distance:
            second = bool(self.rank & distance)
            keeps, gives = mine[second::2], mine[not second :: 2]
            yield self.rank ^ distance, keeps, gives
            mine, distance = keeps, distance // 2

    def own(self, keys: Collection[str]) -> list[str]:
        """The layers that this process does the work of, of those that all have; in one process all of them."""
        if self.rank >= self._paired:
            return []
        mine = list(keys)
        for _, keeps, _ in self._levels(keys):
            mine = keeps
        return mine

    def merge(
        self,
        keys: Collection[str],
        state: Callable[[], Mapping[str, Tensor]],
        absorb: Callable[[dict[str, Tensor]], None],
    ) -> list[str]:
        """Add up what the processes hold, pair by pair: each gives half of the layers, and takes the other half.

        After log₂ size exchanges of 1/2, 1/4, 1/8 … of all layers each process has merged a share of them with what
        all others held (recursive halving). It has sent, and merged, less than all layers once.

        Args:
            keys: Names of layers, the same in all processes.
            state: What this process holds, by names that are a layer's and a part's after a dot.
            absorb: Adds what another process held to it.

        Returns:
            The layers whose sums are whole in this process: `own(keys)`.
        """
        beyond = self._paired
        if self.rank >= beyond:
            self._send(state(), self.rank - beyond)
            return []
        if self.rank + beyond < self.size:
            absorb(self._receive(self.rank + beyond))
        for other, _, gives in self._levels(keys):
            absorb(self._swap(of_layers(state(), gives), other))
        return self.own(keys)

    def share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What all processes hold, bit for bit the same in each: the way of `merge` back (recursive doubling).

        Args:
            tensors: What this process adds, by names that are its alone.

        Returns:
            The tensors of all; those received are on the device of the messages.
        """
        shared, beyond, distance = dict(tensors), self._paired, 1
        if self.rank >= beyond:
            return self._receive(self.rank - beyond)
        while distance < beyond:
            shared |= self._swap(shared, self.rank ^ distance)
            distance *= 2
        if self.rank + beyond < self.size:
            self._send(shared, self.rank + beyond)
        return shared

    def _swap(self, tensors: Mapping[str, Tensor], other: int) -> dict[str, Tensor]:
        """Give tensors to another process, which gives its own."""
        if self.rank < other:
            self._send(tensors, other)
            return self._receive(other)
        received = self._receive(other)
        self._send(tensors, other)
        return received

    @_named
    def _send(self, tensors: Mapping[str, Tensor], to: int) -> None:
        """Send tensors: the length of a table, the table, and the bytes in buckets."""
        table = [
            (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in tensors.items()
        ]
        head = torch.frombuffer(bytearray(json.dumps(table).encode()), dtype=torch.uint8)
        for message in (torch.tensor([len(head)]), head):
            dist.send(message.to(self.device), group=self.group, group_dst=to)
        names = list(tensors)
        for bucket in buckets([tensor.nbytes for tensor in tensors.values()]):
            parts = [as_bytes(tensors[names[index]].to(self.device)) for index in bucket]
            dist.send(torch.cat(parts), group=self.group, group_dst=to)

    @_named
    def _receive(self, source: int) -> dict[str, Tensor]:
        """Receive what `_send` sends."""

        def message(length: int, dtype: torch.dtype = torch.uint8) -> Tensor:
            buffer = torch.empty(length, dtype=dtype, device=self.device)
            dist.recv(buffer, group=self.group, group_src=source)
            return buffer

        head = message(int(message(1, torch.int64)))
        table = [(name, getattr(torch, kind), shape) for name, kind, shape in json.loads(bytes(head.tolist()))]
        lengths = [math.prod(shape) * kind.itemsize for _, kind, shape in table]
        tensors = {}
        for bucket in buckets(lengths):
            content, end = message(sum(lengths[index] for index in bucket)), 0
            for index in bucket:
                name, kind, shape = table[index]
                begin, end = end, end + lengths[index]
                tensors[name] = content[begin:end].clone().view(kind).view(shape)
        return tensors


def processes(group: Any = None) -> Processes:
    """The processes of a group, or of the default one if there is one; otherwise this process alone.

    Args:
        group: A process group of torch.distributed.

    Returns:
        The processes.

    Raises:
        ValueError: This process is not in the group, or its backend serves no device that this machine has.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Processes()
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(
            "This process is not in the process_group it was given. Call this in the group's processes only, or pass a "
            "group that this process is in."
        )
    if size == 1:
        return Processes()
    return Processes(rank, size, group, device_for(dist.get_backend_config(group)))


def device_for(backends: str) -> str:
    """Where tensors have to be for a group's backends: the accelerator, unless gloo serves it, else the CPU.

    Args:
        backends: As `torch.distributed.get_backend_config` says: "cpu:gloo,cuda:nccl".

    Returns:
        The device.

    Raises:
        ValueError: No backend serves a device that this machine has.
    """
    served = dict(pair.split(":") for pair in backends.split(","))
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and served.get(accelerator.type, "gloo") != "gloo":
        return f"{accelerator.type}:{torch.accelerator.current_device_index()}"
    if "cpu" in served:
        return "cpu"
    raise ValueError(
        f"The process group's backend ({backends}) serves neither the CPU nor a device that this machine has, so "
        'estimates cannot be merged. Make the group with "gloo", or "cpu:gloo,cuda:nccl", or pass process_group=.'
    )
