"""Putting factors in the place of PEFT's, in a layer of any kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_ga.embedding import FactorTable
from lora_ga.factors import FACTORS, Delta, Factor
from lora_ga.frozen import place_of
from lora_ga.kinds import entries, form_of, weight_of
from lora_ga.sharding import partitioned, placed_like, whole
from lora_ga.sidecar import AlignedLoraConfig, Alignment
from lora_ga.tensor_parallel import follow


class FactorDict(nn.ModuleDict):
    """PEFT's factors of a layer by adapter; one added with an aligned adapter's configuration gets its structure.

    TRL's preference trainers add such an adapter as their reference and copy into it parameter by parameter, by name.
    """

    def __init__(self, path: str, factors: nn.ModuleDict, configs: dict[str, Any]) -> None:
        super().__init__()
        self.path = path  # of the layer
        self.configs = configs  # of the model's adapters: PEFT enters a new one there before it makes its layers
        for name, factor in factors.items():
            self.add_module(name, factor)

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(key, _structured(self.path, self.configs, self._modules.get, key, module))


class EmbeddingDict(FactorTable):
    """The same of an embedding, whose factors PEFT keeps as parameters."""

    def __init__(self, path: str, factors: nn.ParameterDict, configs: dict[str, Any]) -> None:
        super().__init__()
        self.path, self.configs = path, configs
        for name, value in factors.items():
            super().__setitem__(name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        held = dict(self.items())
        if not isinstance(held.get(key), Factor):  # else PEFT puts back what it has read and moved
            value = _structured(self.path, self.configs, held.get, key, value)
        super().__setitem__(key, value)


def _structured(path: str, configs: dict[str, Any], held: Callable[[str], Any], key: str, new: Any) -> Any:
    """What adapter `key` gets in place of PEFT's factor `new`: one like its model's, if its configuration has one.

    Args:
        path: The layer's.
        configs: Of the model's adapters.
        held: Adapter → its factor in the layer.
        key: The adapter.
        new: What PEFT has made.

    Returns:
        The factor, or `new`.
    """
    alignment = getattr(configs.get(key), "alignment", None)
    if alignment is None or isinstance(new, Factor):
        return new
    alignment = _alignment_of_its_own(configs, key)
    model = held(alignment.twin or key)
    if not isinstance(model, Delta):
        return new
    trained, bias = nn.Parameter(torch.zeros_like(model.start)), getattr(new, "bias", None)
    factor = type(model)(model.start, trained, bias, rank=model.rank, parts=model.parts, compute=model.compute)
    alignment.factors[path] = (*alignment.factors.get(path, ()), factor)
    return factor


def _alignment_of_its_own(configs: dict[str, Any], key: str) -> Alignment:
    """The alignment of adapter `key`, no longer shared with the adapter whose configuration it was given."""
    config = configs[key]
    twin = next((name for name, other in configs.items() if name != key and other is config), None)
    if twin is not None:
        config = AlignedLoraConfig.of(config, dataclasses.replace(config.alignment, factors={}, twin=twin))
        configs[key] = config
    return config.alignment


def make_factors(
    layer: LoraLayer, adapter_name: str, offset: str, *, rank: int, starts: tuple[Tensor, Tensor] | None = None
) -> tuple[Factor, Factor]:
    """Factors with deltas of zero, for the place of PEFT's.

    Without `starts` they begin at PEFT's values, which are a start with a product of zero, and take over its parameters
    (which an optimizer may hold) with their values changed. Those on the meta device have neither: there the parameters
    are new, and zero until the factors are filled.

    Args:
        layer: The layer.
        adapter_name: The adapter.
        offset: "adapter" or "base".
        rank: PEFT's rank r of the adapter that trains.
        starts: A₀ and B₀, as PEFT lays them out; the parameters are then new.

    Returns:
        The factors of A and B.

    Raises:
        ValueError: DeepSpeed ZeRO-3 has taken the parameters apart already.
    """
    form, made = form_of(layer), []
    for side, (entry, kind) in enumerate(zip(entries(layer, adapter_name), FACTORS[offset], strict=True)):
        old: Any = weight_of(entry)
        parameter, start = old, old
        if starts is not None:
            start = starts[side]
        elif partitioned(old):
            raise ValueError(
                "The adapter's parameters are taken apart by DeepSpeed ZeRO-3, which cannot be told of a new "
                "structure. Use LoraGACallback, or call lora_ga.initialize before the model is given to DeepSpeed."
            )
        elif old.is_meta:
            start = torch.zeros_like(old, device=place_of(layer))
        if start is not old:
            zeros = torch.zeros(start.shape, dtype=old.dtype, device=start.device)
            parameter = nn.Parameter(placed_like(zeros, old, start.device), old.requires_grad)
        start = whole(start)
        bias = getattr(entry, "bias", None)
        factor = kind(start, parameter, bias, rank=rank, parts=form.parts(layer), compute=form.compute(entry))
        follow(factor, layer.get_base_layer())
        with torch.no_grad():
            factor.set_delta(torch.zeros_like(factor.start))
        made.append(factor.train(getattr(entry, "training", layer.training)))
    return made[0], made[1]


def place(layer: LoraLayer, adapter_name: str, pair: tuple[Factor, Factor], path: str, configs: dict[str, Any]) -> None:
    """Put factors in the place of PEFT's.

    Args:
        layer: The LoRA layer.
        adapter_name: The adapter.
        pair: The factors of A and B.
        path: The layer's, in the base model.
        configs: The configurations of the model's adapters.
    """
    embedded = adapter_name in layer.lora_embedding_A
    for letter, factor in zip("AB", pair, strict=True):
        attribute = f"lora_embedding_{letter}" if embedded else f"lora_{letter}"
        table: Any = getattr(layer, attribute)
        kind = EmbeddingDict if embedded else FactorDict
        if not isinstance(table, kind):
            table = kind(path, table, configs)
        setattr(layer, attribute, table)
        table[adapter_name] = factor
