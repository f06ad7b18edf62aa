"""The record of an aligned adapter: plain values, and a reference to the model that holds its factors."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import nn

from lora_ga.adapter.file import Padded
from lora_ga.config import LoraGAConfig
from lora_ga.layers.factors import Factor
from lora_ga.layers.kinds import entries
from lora_ga.layers.targets import layer_name, peft_models_in

# The fields of LoraConfig that PEFT takes rank and scaling from.
RANK_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


class ModelReference:
    """A weak reference to a model; in a copy of the model (copy.deepcopy, pickle) it refers to the copy.

    A strong reference from inside the model would be a cycle, so that a deleted model would keep its memory until the
    garbage collector runs. An object that is copied without its model keeps its reference to the original model.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._reference = None if model is None else weakref.ref(model)

    def __call__(self) -> nn.Module | None:
        """The model; None if it no longer exists."""
        return None if self._reference is None else self._reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelReference:
        model = self()
        return ModelReference(memo.get(id(model), model))

    def __reduce__(self) -> tuple[type[ModelReference], tuple[nn.Module | None]]:
        return ModelReference, (self(),)


@dataclasses.dataclass
class Alignment:
    """The record of an aligned adapter.

    Attributes:
        model: The model that holds the adapter.
        adapter_name: The adapter.
        scaling: Layer name → s, of the aligned layers.
        config: The settings of the start.
        fingerprint: The fingerprint of the base model.
        plain: Layer name → (r, α), of the adapter's layers that are plain LoRA.
        original: The rank fields of the user's LoraConfig, before they were doubled.
        saved: Fields of LoraConfig that have another value in the saved configuration. A file has no rsLoRA: α/r is the
            scaling. With offset="base" the model computes at rank r, the file has rank 2r.
        padded: Layer name → how, of the plain layers whose matrices a file holds at rank 2r, padded with zeros, so that
            it needs no pattern for them.
        padded_fields: As `saved`, of a file with padded layers.
        summary: The section on the start for a model card, in Markdown; empty before the start.
        ranks: Layer name (of experts and groups: part by part) → r, of those that started from an estimate.
    """

    model: ModelReference
    adapter_name: str
    scaling: dict[str, float]
    config: LoraGAConfig
    fingerprint: str
    plain: dict[str, tuple[int, float]]
    original: dict[str, Any]
    saved: dict[str, Any] = dataclasses.field(default_factory=dict)
    padded: dict[str, Padded] = dataclasses.field(default_factory=dict)
    padded_fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    summary: str = ""
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def factors(self) -> dict[str, tuple[Factor, Factor]]:
        """The factors of the aligned layers, found in the model: layer name → (A, B)."""
        model = self.model()
        return {} if model is None else factors_of(model, self.adapter_name)


def alignment_of(model: Any, adapter_name: str = "default") -> Alignment | None:
    """The record of an aligned adapter.

    Args:
        model: A model with adapters, a network that contains one, or any other model.
        adapter_name: The adapter.

    Returns:
        The record; None if the model has no such adapter, or the adapter does not have LoRA-GA's structure.
    """
    models: list[Any] = list(peft_models_in(model).values())
    if len(models) != 1:
        return None
    alignment = getattr(models[0].peft_config.get(adapter_name), "alignment", None)
    # Two adapters may have been made with one configuration.
    return alignment if alignment is not None and alignment.adapter_name == adapter_name else None


def factors_of(model: nn.Module, adapter_name: str) -> dict[str, tuple[Factor, Factor]]:
    """The factors of an adapter's aligned layers.

    Args:
        model: The model.
        adapter_name: The adapter.

    Returns:
        Layer name → (A, B), in the model's order.
    """
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.r:
            a, b = entries(layer, adapter_name)
            if isinstance(a, Factor) and isinstance(b, Factor):
                found[layer_name(path)] = (a, b)
    return found


def scaling_of(config: LoraConfig, name: str) -> float:
    """The scaling s that PEFT gives a layer: α/r, or α/√r with rsLoRA, with the r and α of the patterns.

    Args:
        config: The adapter's configuration.
        name: The name that PEFT compares with the patterns: the layer's path in the base model, or a parameter's (see
            `WeightLayout.pattern_name`).

    Returns:
        s.
    """
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return alpha / rank**0.5 if config.use_rslora else alpha / rank
