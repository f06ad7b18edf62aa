"""How tensors travel between processes: as bytes, in a few large messages, so no backend has to know their dtypes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

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
