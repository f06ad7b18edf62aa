"""A data loader while somebody reads it, and afterwards as it was: its attributes, and all generators that it holds.

A generator may be anywhere below a loader: in its sampler, its data set or a transform of it, its collator, another
collator in that one, or a function that closes over one. Some collators make theirs with their first batch.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import random
from collections.abc import Iterable, Iterator
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

# Where a data loader keeps what a pass over the data may change: Accelerate's loader wraps torch's, which has samplers;
# Transformers' trainer wraps its collator.
PARTS_OF_A_LOADER = ("base_dataloader", "sampler", "batch_sampler", "dataset", "collate_fn", "data_collator")
GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
WITHOUT_GENERATORS = (str, bytes, int, float, type(None), type, ModuleType, Tensor, np.ndarray, nn.Module)
CONTAINERS = (
    dict,
    collections.OrderedDict,
    collections.defaultdict,
    list,
    tuple,
    set,
    frozenset,
    collections.deque,
)
FEW = 64  # a container with more items holds rows or words, not samplers or transforms
MOST_VALUES = 20_000  # so many are looked at, near ones first; it takes some milliseconds


@contextlib.contextmanager
def data_kept(data: Any) -> Iterator[None]:
    """Let training read a `DataLoader` as if nobody had read it before; other data stays as reading leaves it.

    Args:
        data: The data, or what holds a `DataLoader` as its `data`, as the batches of `integrations.diffusers` do.

    Yields:
        Nothing.
    """
    loader = data if isinstance(data, DataLoader) else (_attributes(data) or {}).get("data")
    with loader_kept(loader) if isinstance(loader, DataLoader) else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def loader_kept(loader: Any) -> Iterator[None]:
    """Restore the attributes of a data loader, its samplers, data set and collator on leaving, and all generators.

    A trainer may return one loader, or loaders with one sampler, each time.

    Args:
        loader: The loader.

    Yields:
        Nothing.
    """
    saved = [(part, dict(vars(part))) for part in _parts(loader)]
    lists = [(value, list(value)) for _, values in saved for value in values.values() if type(value) is list]
    with generators_kept(loader):
        try:
            yield
        finally:
            for part, values in saved:
                vars(part).clear()
                vars(part).update(values)
            for value, items in lists:  # a sampler may shuffle its list in place
                value[:] = items


def _parts(loader: Any) -> Iterator[Any]:
    """The loader, the loader that it wraps, its samplers, data set and collator, as far as they have attributes."""
    seen: set[int] = set()
    waiting = [loader]
    while waiting:
        part = waiting.pop()
        if id(part) not in seen and _attributes(part) is not None:
            seen.add(id(part))
            yield part
            waiting += [getattr(part, name, None) for name in PARTS_OF_A_LOADER]


@contextlib.contextmanager
def generators_kept(*values: Any) -> Iterator[None]:
    """Restore the state of all random generators that values hold on leaving, and take new ones out again.

    Args:
        *values: Generators, or what holds some.

    Yields:
        Nothing.
    """
    reached = _reached(values)
    tables = [value if type(value) is dict else _attributes(value) for value in reached]
    before = [(table, dict(table)) for table in tables if table is not None]
    with contextlib.ExitStack() as stack:
        for value in reached:
            if isinstance(value, torch.Generator):
                stack.callback(value.set_state, value.get_state())
            elif isinstance(value, random.Random):
                stack.callback(value.setstate, value.getstate())
            elif isinstance(value, np.random.RandomState):
                stack.callback(value.set_state, value.get_state())
            elif isinstance(value, np.random.Generator):
                stack.callback(setattr, value.bit_generator, "state", value.bit_generator.state)
        try:
            yield
        finally:
            for table, values_before in before:
                _take_out_new_generators(table, values_before)


def _take_out_new_generators(table: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Give names for which there is another generator now the value that they had, if they had one."""
    for name, value in list(table.items()):
        if isinstance(value, GENERATORS) and before.get(name) is not value:
            del table[name]
            table.update({name: before[name]} if name in before else {})


def _reached(values: Iterable[Any]) -> list[Any]:
    """The values and what they hold, near ones first: attributes, items of small containers, what functions use."""
    found: dict[int, Any] = {}
    waiting = collections.deque(values)
    for _ in range(MOST_VALUES):
        if not waiting:
            break
        value = waiting.popleft()
        many = type(value) in CONTAINERS and len(value) > FEW
        if id(value) not in found and not many and not isinstance(value, WITHOUT_GENERATORS):
            found[id(value)] = value
            waiting.extend(_held(value))
    return list(found.values())


def _held(value: Any) -> Iterable[Any]:
    """What a value holds."""
    if type(value) in CONTAINERS:
        return value.values() if isinstance(value, dict) else value
    if isinstance(value, MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, FunctionType):
        closed = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]  # not an empty one
        named = [value.__globals__.get(name) for name in value.__code__.co_names]
        return [*closed, value.__defaults__, value.__kwdefaults__, *named]
    given = [value.func, value.args, value.keywords] if isinstance(value, functools.partial) else []
    return [*given, *(_attributes(value) or {}).values()]


def _attributes(value: Any) -> dict[str, Any] | None:
    """The attributes of an object itself, as it holds them; None for one that cannot have any, and for a class."""
    found = getattr(value, "__dict__", None)
    return found if type(found) is dict else None
