"""Putting factors in the place of PEFT's, in a layer of any kind."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_ga.embedding import FactorTable
from lora_ga.factors import FACTORS, Factor
from lora_ga.kinds import entries, form_of


def _tables(layer: LoraLayer, adapter_name: str) -> tuple[Any, Any]:
    """Where a layer keeps A and B, by adapter name, made fit to hold factors."""
    if adapter_name not in layer.lora_embedding_A:
        return layer.lora_A, layer.lora_B
    layer.lora_embedding_A = FactorTable.of(layer.lora_embedding_A)
    layer.lora_embedding_B = FactorTable.of(layer.lora_embedding_B)
    return layer.lora_embedding_A, layer.lora_embedding_B


def make_factors(
    layer: LoraLayer, adapter_name: str, starts: tuple[Tensor, Tensor], offset: str, *, rank: int, new: bool
) -> tuple[Factor, Factor]:
    """Factors with deltas of zero, for the place of PEFT's; changes nothing but the values of reused parameters.

    Args:
        layer: The layer.
        adapter_name: The adapter.
        starts: A₀ and B₀, as PEFT lays them out.
        offset: "adapter" or "base".
        rank: PEFT's rank r of the adapter that trains.
        new: Whether to make parameters, in place of reusing PEFT's (which an optimizer may hold). Those on the meta
            device cannot be reused.

    Returns:
        The factors of A and B.
    """
    form = form_of(layer)
    made = []
    for entry, start, kind in zip(entries(layer, adapter_name), starts, FACTORS[offset], strict=True):
        old = getattr(entry, "weight", entry)
        parameter = old
        if new or old.is_meta:
            device = start.device if old.is_meta else old.device
            parameter = nn.Parameter(torch.zeros_like(start, dtype=old.dtype, device=device), old.requires_grad)
        factor = kind(
            start,
            parameter,
            getattr(entry, "bias", None),
            rank=rank,
            parts=form.parts(layer),
            compute=form.compute(entry),
        )
        with torch.no_grad():
            factor.set_delta(torch.zeros_like(parameter))
        made.append(factor.train(getattr(entry, "training", layer.training)))
    return made[0], made[1]


def place(layer: LoraLayer, adapter_name: str, pair: tuple[Factor, Factor]) -> None:
    """Put factors in the place of PEFT's."""
    for table, factor in zip(_tables(layer, adapter_name), pair, strict=True):
        table[adapter_name] = factor


def put_factors(
    layer: LoraLayer, adapter_name: str, starts: tuple[Tensor, Tensor], offset: str
) -> tuple[Factor, Factor]:
    """Put factors in the place of PEFT's, reusing their parameters.

    Args:
        layer: The layer, with a fresh adapter.
        adapter_name: The adapter.
        starts: A₀ and B₀, as PEFT lays them out.
        offset: "adapter" or "base".

    Returns:
        The factors.
    """
    pair = make_factors(layer, adapter_name, starts, offset, rank=layer.r[adapter_name], new=False)
    place(layer, adapter_name, pair)
    return pair
