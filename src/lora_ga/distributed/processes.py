"""The processes that make one estimate together, and what they exchange: small values, and tensors of layers.

In order: which processes there are; small values, gathered from all processes at once; tensors, merged pair by pair and
shared again; how tensors travel. With one process nothing is communicated, by the same calls.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import json
import math
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# The largest message in bytes, unless a single tensor is larger.
BUCKET = 64 * 2**20
# Functions in which processes wait for each other, of torch.distributed and of libraries that wrap them.
COLLECTIVES = frozenset(
    {
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_object",
        "all_reduce",
        "all_to_all",
        "all_to_all_single",
        "barrier",
        "broadcast",
        "broadcast_object_list",
        "gather_for_metrics",
        "gather_object",
        "monitored_barrier",
        "nested_gather",
        "pad_across_processes",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "scatter_object_list",
        "wait_for_everyone",
    }
)
# Those whose names other functions have too, as methods of tensors. They count as functions of these packages, and as
# methods of something that is called `accelerator`.
SHARED_NAMES = frozenset({"gather", "reduce", "scatter"})
OWNER = "accelerator"
PACKAGES = ("accelerate", "torch.distributed")

Result = TypeVar("Result")


def in_group() -> bool:
    """Whether this process is in a process group of torch.distributed."""
    return dist.is_available() and dist.is_initialized()


def processes(group: Any = None) -> Processes:
    """The processes of a group, or of the default group if there is one; otherwise this process alone.

    Args:
        group: A process group of torch.distributed.

    Returns:
        The processes.

    Raises:
        ValueError: This process is not in the group, or the group's backend supports no device that this machine has.
    """
    if not in_group():
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
    """The device that tensors are sent from: the accelerator, unless gloo is its backend, else the CPU.

    Args:
        backends: What `torch.distributed.get_backend_config` returns, for instance "cpu:gloo,cuda:nccl".

    Returns:
        The device.

    Raises:
        ValueError: No backend supports a device that this machine has.
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


def others_wait(error: BaseException) -> bool:
    """Whether an error has left a function that communicates, so that the other processes wait in that function.

    That is so where one process reads the data for all, as Accelerate's and ms-swift's `DataLoaderDispatcher` do: if it
    fails before it sends a batch, the others wait for the batch. Such a loader may be inside of anything that iterates
    over it, so the frames that the error has left are searched. It is so too where a loss gathers values, as GRPO's. A
    function communicates if it uses a name of `COLLECTIVES`, or one of `SHARED_NAMES` of such a library.

    Args:
        error: The error.

    Returns:
        Whether it, or an error that it comes from, has left such a function.
    """
    waiting, seen = [error], set()
    while waiting:
        each = waiting.pop()
        if id(each) not in seen:
            seen.add(id(each))
            if any(_communicates(frame) for frame, _ in traceback.walk_tb(each.__traceback__)):
                return True
            waiting += [other for other in (each.__cause__, each.__context__) if other is not None]
    return False


def _communicates(frame: FrameType) -> bool:
    """Whether the function of a frame uses one that communicates."""
    code = frame.f_code
    if any(name.lstrip("_") in COLLECTIVES for name in code.co_names):
        return True
    if SHARED_NAMES.isdisjoint(code.co_names):
        return False
    scope, before = {**frame.f_globals, **frame.f_locals}, ""
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if isinstance(name, tuple):  # of two names that one instruction loads, the second; or a constant
            name = name[-1] if name else None
        owner = before if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") else name
        if name in SHARED_NAMES and (owner == OWNER or _in_packages(scope.get(owner))):
            return True
        before = name if instruction.opname.startswith("LOAD_") else ""
    return False


def _in_packages(value: Any) -> bool:
    """Whether a module, a function or the class of an object is in one of `PACKAGES`."""
    named = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", "")
    return str(named).startswith(PACKAGES)


class DeferredError:
    """Keeps the exception of a block until the processes next exchange values, when it is raised in all of them.

    If a process raised at once, the others would wait for it forever. Only an error inside of a communication is raised
    at once: the others wait there, not at the exchange, and end when this process ends (see `others_wait`).

    Attributes:
        error: The exception; None if there was none.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> DeferredError:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if not isinstance(error, Exception) or others_wait(error):
            return False
        self.error = error
        return True


def _with_rank_in_errors(exchange: Callable[..., Result]) -> Callable[..., Result]:
    """Add to the backend's errors (a closed connection, a time-out) which process raised them."""

    @functools.wraps(exchange)
    def wrapped(self: Processes, *args: Any, **kwargs: Any) -> Result:
        try:
            return exchange(self, *args, **kwargs)
        except RuntimeError as error:
            raise RuntimeError(
                f"Process {self.rank} of {self.size}: an exchange with the other processes failed ({error}). One of "
                "them may have died; its output says why. The model is unchanged."
            ) from error

    return wrapped


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes that make one estimate together, seen from one of them.

    Attributes:
        rank: The rank of this process in the group, from 0.
        size: The number of processes; with 1 nothing is communicated.
        group: The process group; None for the default one.
        device: The device that tensors are sent from and received on.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    device: str = "cpu"

    @property
    def identity(self) -> dict[str, Any]:
        """What a file of one process records, so that another process does not read it; empty with one process."""
        return {"process": [self.rank, self.size]} if self.size > 1 else {}

    @property
    def communications(self) -> int:
        """How many operations this process has begun in the group and the default group; 0 where nobody counts them."""
        if self.size == 1 or not in_group():
            return 0
        groups: set[Any] = {self.group or dist.group.WORLD, dist.group.WORLD}
        try:
            return sum(group._get_sequence_number_for_group() for group in groups)
        except RuntimeError:  # a backend that does not count
            return 0

    def own_file(self, path: Path) -> Path:
        """The path of this process's file: `state-1-of-4.safetensors` for `state.safetensors`, if there are several."""
        return path if self.size == 1 else path.with_name(f"{path.stem}-{self.rank}-of-{self.size}{path.suffix}")

    def share_of(self, count: int | None) -> int | None:
        """The largest number of batches that each process reads, of `count` in all: ⌈count/size⌉; None for no limit."""
        return None if count is None else math.ceil(count / self.size)

    # Small values

    @_with_rank_in_errors
    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank. Values are small and can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def exchange(self, deferred: DeferredError, value: Any = None) -> list[Any]:
        """Gather the values of all processes, or raise in all of them if one has a deferred error.

        Args:
            deferred: The error of this process, if there was one.
            value: Its value.

        Returns:
            The values by rank.

        Raises:
            Exception: The deferred error of this process.
            RuntimeError: Another process has an error; the message names the process and repeats the error.
        """
        message = None if deferred.error is None else f"{type(deferred.error).__name__}: {deferred.error}"
        try:
            reports = self.gather((message, None if message else value))
        except Exception as failed:
            if (error := deferred.error) is None:
                raise
            raise error from (error.__cause__ or error.__context__ or failed)
        if deferred.error is not None:
            raise deferred.error
        for rank, (error, _) in enumerate(reports):
            if error is not None:
                raise RuntimeError(
                    f"Process {rank} of {self.size} failed, so all of them stop: {error.rstrip('.')}. The model is "
                    "unchanged."
                )
        return [each for _, each in reports]

    # Tensors of layers, merged and shared

    @property
    def _paired(self) -> int:
        """The largest power of two up to `size`. Processes of this rank or above send all they have to a lower one."""
        return 1 << (self.size.bit_length() - 1)

    def _levels(self, keys: Collection[str]) -> Iterator[tuple[int, list[str], list[str]]]:
        """How layers are divided among the processes, level by level.

        Yields:
            The rank of the process to exchange with, the layers that this process keeps, and those that it sends.
        """
        mine, distance = list(keys), self._paired // 2
        while distance:
            second = bool(self.rank & distance)
            keeps, gives = mine[second::2], mine[not second :: 2]
            yield self.rank ^ distance, keeps, gives
            mine, distance = keeps, distance // 2

    def own(self, keys: Collection[str]) -> list[str]:
        """The layers that this process works on, of those that all processes have. With one process all layers.

        Args:
            keys: Names of layers, the same in all processes.

        Returns:
            This process's share of the names. Each name is in the share of exactly one process.
        """
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
        """Add up what the processes have, pair by pair: each sends half of its layers, and receives the other half.

        After log₂ size exchanges of 1/2, 1/4, 1/8, … of all layers, each process has the sums of all processes for its
        own share of the layers (recursive halving). It has sent, and merged, less than all layers once.

        Args:
            keys: Names of layers, the same in all processes.
            state: Returns what this process has, as "layer.part" → tensor.
            absorb: Adds what another process had to it.

        Returns:
            The layers whose sums are complete in this process: `own(keys)`.
        """
        beyond = self._paired
        if self.rank >= beyond:
            self._send(state(), self.rank - beyond)
            return []
        if self.rank + beyond < self.size:
            absorb(self._receive(self.rank + beyond))
        for other, _, gives in self._levels(keys):
            absorb(self._swap(_of_layers(state(), gives), other))
        return self.own(keys)

    def share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give all processes the tensors of all, bit for bit the same: `merge` in reverse (recursive doubling).

        Args:
            tensors: What this process adds; no other process uses the same names.

        Returns:
            The tensors of all processes. Those received are on `device`.
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

    # How tensors travel: as bytes, in few large messages, so that a backend need not support their dtypes

    def _swap(self, tensors: Mapping[str, Tensor], other: int) -> dict[str, Tensor]:
        """Send tensors to another process, and receive those that it sends."""
        if self.rank < other:
            self._send(tensors, other)
            return self._receive(other)
        received = self._receive(other)
        self._send(tensors, other)
        return received

    @_with_rank_in_errors
    def _send(self, tensors: Mapping[str, Tensor], to: int) -> None:
        """Send tensors: the length of a table of names, dtypes and shapes; the table; and the bytes in buckets."""
        table = [
            (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in tensors.items()
        ]
        head = torch.frombuffer(bytearray(json.dumps(table).encode()), dtype=torch.uint8)
        for message in (torch.tensor([len(head)], device="cpu"), head):
            dist.send(message.to(self.device), group=self.group, group_dst=to)
        names = list(tensors)
        for bucket in buckets([tensor.nbytes for tensor in tensors.values()]):
            parts = [_as_bytes(tensors[names[index]].to(self.device)) for index in bucket]
            dist.send(torch.cat(parts), group=self.group, group_dst=to)

    @_with_rank_in_errors
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


def _of_layers(tensors: Mapping[str, Tensor], layers: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of some layers, by names "layer.part"."""
    wanted = set(layers)
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in wanted}


def buckets(lengths: list[int]) -> Iterator[list[int]]:
    """Divide tensors, in their order, into messages of at most `BUCKET` bytes.

    Args:
        lengths: The number of bytes of each tensor.

    Yields:
        The indices of the tensors of one message. A tensor above `BUCKET` bytes gets a message to itself.
    """
    bucket: list[int] = []
    for index, length in enumerate(lengths):
        if bucket and sum(lengths[each] for each in bucket) + length > BUCKET:
            yield bucket
            bucket = []
        bucket.append(index)
    if bucket:
        yield bucket


def _as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's values as a vector of bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
