"""How tensors travel between processes: as bytes, in a few large messages, so no backend has to know their dtypes."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lora_ga.files import differences

# Bytes in one message at most, unless a single tensor is larger.
BUCKET = 64 * 2**20


def of_layers(tensors: Mapping[str, Tensor], layers: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of some layers."""
    wanted = set(layers)
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in wanted}


def buckets(lengths: list[int]) -> Iterator[list[int]]:
    """Indices of tensors that travel in one message, in their order.

    Args:
        lengths: Bytes of each.

    Yields:
        Indices whose bytes together are within `BUCKET`, or one alone; those of no bytes are in one too.
    """
    bucket: list[int] = []
    for index, length in enumerate(lengths):
        if bucket and sum(lengths[each] for each in bucket) + length > BUCKET:
            yield bucket
            bucket = []
        bucket.append(index)
    if bucket:
        yield bucket


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's numbers as a row of bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


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


def check_same(records: Sequence[Mapping[str, Any]]) -> None:
    """Refuse processes that were given different things; all of them raise the same.

    Args:
        records: What each process was given, in their order.

    Raises:
        ValueError: Two differ, with the first differences.
    """
    for rank, record in enumerate(records):
        if found := differences(records[0], record):
            raise ValueError(
                f"Processes 0 and {rank} of {len(records)} differ: {found}. Give all processes the same model, adapter "
                "and settings, or pass process_group= to those that work together."
            )


def check_same_data(digests: Sequence[str]) -> None:
    """Refuse different batches in processes that hold parts of one model; all of them raise the same.

    Args:
        digests: Of each process's batch; "" where there is none, or none that can be read.

    Raises:
        ValueError: Two differ.
    """
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise ValueError(
                f"Processes 0 and {rank} of {len(digests)} were given different batches, but a tensor-parallel plan "
                "splits the model's layers between them, so that each batch passes through all of them at once. Give "
                "all of them the same batches, in the same order."
            )


def warn_same_data(digests: Sequence[str]) -> None:
    """Warn if the first batches of all processes are one and the same.

    Args:
        digests: Of each process's first batch; "" where there is none, or none that can be read.
    """
    seen = [digest for digest in digests if digest]
    if len(seen) > 1 and len(set(seen)) == 1:
        warnings.warn(
            f"All {len(seen)} processes begin with the same batch: each seems to read all of the data, not a share of "
            "its own, so they do one process's work over again. Give each its share (accelerator.prepare, or a "
            "DistributedSampler).",
            UserWarning,
            stacklevel=4,
        )


def warn_idle(batches: Sequence[int]) -> None:
    """Warn of processes without a batch, if others have some.

    Args:
        batches: Batches that each process has read.
    """
    idle = [str(rank) for rank, count in enumerate(batches) if count == 0]
    if idle and len(idle) < len(batches):
        warnings.warn(
            f"{len(idle)} of {len(batches)} processes had no batch (the first is process {idle[0]}); the estimate is "
            f"that of the others' {sum(batches)}.",
            UserWarning,
            stacklevel=3,
        )
