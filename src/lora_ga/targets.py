"""Which layers of a PEFT model an adapter aligns, by name. Holds the only table of layer kinds."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as lora_layers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ga.factors import Factor

PREFIX = "base_model.model."
# Base layers whose weight `offset="base"` has changed: the layer itself does not say so once the adapter is gone.
SHIFTED_BASES: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of layer: how PEFT wraps it, what it wraps, and whether its weight is stored as (inputs, outputs)."""

    layer: type[nn.Module]
    base: type[nn.Module]
    transposed: bool


# A new kind is a new row, with a test in tests/test_targets.py that its captured gradient is autograd's.
KINDS: tuple[Kind, ...] = (
    Kind(lora_layers.Linear, nn.Linear, transposed=False),
    Kind(lora_layers.Linear, Conv1D, transposed=True),
)


@dataclasses.dataclass(frozen=True)
class Target:
    """A LoRA layer to align.

    Attributes:
        name: The module's path in the base model, the key of estimates and messages.
        layer: PEFT's LoRA layer.
        inputs: Inputs of the weight, d_in.
        outputs: Outputs of the weight, d_out.
        rank: The adapter's rank r in this layer.
    """

    name: str
    layer: LoraLayer
    inputs: int
    outputs: int
    rank: int

    @property
    def too_small(self) -> str | None:
        """Why 2r directions do not fit this layer; None if they do."""
        largest = min(self.inputs, self.outputs) // 2
        if self.rank <= largest:
            return None
        return (
            f"rank {self.rank} needs {2 * self.rank} gradient directions, but the weight is {self.outputs} x "
            f"{self.inputs}: use a rank of at most {largest} (rank_pattern sets it for one layer)"
        )


def _lora_layers(model: PeftModel, adapter_name: str) -> dict[str, LoraLayer]:
    """The LoRA layers that hold the adapter.

    Returns:
        Module path → layer.

    Raises:
        TypeError: Not a PeftModel.
        ValueError: No such adapter, or no LoRA layers.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"The model is a {type(model).__name__}, not a PeftModel with LoRA layers. Call "
            "peft.get_peft_model(model, LoraConfig(...)) first (not model.add_adapter), or lora_ga.get_lora_ga_model."
        )
    if adapter_name not in model.peft_config:
        raise ValueError(f"The model has no adapter {adapter_name!r}; it has {', '.join(model.peft_config)}.")
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }
    if not found:
        kind = getattr(model.peft_config[adapter_name], "peft_type", "unknown")
        raise ValueError(
            f"Adapter {adapter_name!r} (of type {kind}) has no LoRA layers; LoRA-GA needs one made by LoraConfig."
        )
    return found


def _kind(layer: LoraLayer) -> Kind | None:
    """The layer's row of `KINDS`; None if it has none."""
    base = layer.get_base_layer()
    return next((kind for kind in KINDS if type(layer) is kind.layer and isinstance(base, kind.base)), None)


def base_weight(layer: LoraLayer) -> Tensor:
    """The base weight of a LoRA layer of a known kind, as (d_out, d_in): the weight itself or a transposed view."""
    kind = _kind(layer)
    weight = layer.get_base_layer().weight
    return weight.mT if kind is not None and kind.transposed else weight


def _refusal(name: str, layer: LoraLayer, adapter_name: str) -> str | None:
    """Why a layer cannot be aligned whatever its gradient; None if it can."""
    if adapter_name in layer.lora_variant or layer.use_dora.get(adapter_name):
        variant = type(layer.lora_variant.get(adapter_name)).__name__.removesuffix("Variant")
        return f"{name} uses the LoRA variant {variant}, which is not supported yet; switch the variant (use_dora) off"
    if _kind(layer) is None:
        base = type(layer.get_base_layer()).__name__
        known = ", ".join(kind.base.__name__ for kind in KINDS)
        return (
            f"{name} is a {base} (PEFT: {type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__}); known are "
            f"{known}. Leave it out with LoraConfig(exclude_modules=[{name.rpartition('.')[2]!r}])"
        )
    if layer.get_base_layer() in SHIFTED_BASES and not isinstance(layer.lora_A[adapter_name], Factor):
        return (
            f'{name} sits on a base weight that offset="base" has changed for another adapter; load the base model anew'
        )
    if layer.merged:
        return f"{name} has merged adapters ({', '.join(layer.merged_adapters)}); call model.unmerge_adapter() first"
    return None


def find_targets(model: PeftModel, adapter_name: str = "default") -> dict[str, Target]:
    """The layers that the adapter `adapter_name` aligns.

    Args:
        model: A model with a fresh LoRA adapter.
        adapter_name: The adapter.

    Returns:
        Layer name → target, in the model's order.

    Raises:
        TypeError: Not a `PeftModel`.
        ValueError: The adapter does not exist, has no LoRA layers, layers of an unknown kind or of a LoRA variant
            (DoRA and others), is merged, trained or aligned already.
    """
    layers = _lora_layers(model, adapter_name)
    named = {full.removeprefix(PREFIX): layer for full, layer in layers.items()}
    refusals = [reason for name, layer in named.items() if (reason := _refusal(name, layer, adapter_name))]
    if refusals:
        more = f" ({len(refusals) - 1} more layers like this)" if len(refusals) > 1 else ""
        raise ValueError(f"Cannot align adapter {adapter_name!r}: {refusals[0]}.{more}")
    _check_fresh(named, adapter_name)
    return {
        name: Target(name, layer, layer.in_features, layer.out_features, _rank(layer, adapter_name))
        for name, layer in named.items()
    }


def _rank(layer: LoraLayer, adapter_name: str) -> int:
    """The rank r that trains; a layer with LoRA-GA's structure computes with 2r."""
    factor = layer.lora_A[adapter_name]
    return factor.rank if isinstance(factor, Factor) else layer.r[adapter_name]


def _check_fresh(layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
    """Refuse an adapter that is aligned or trained already.

    Raises:
        ValueError: It is, with the way to reset it.
    """
    reset = (
        f"Start from a fresh one: model.delete_adapter({adapter_name!r}), then "
        f"model.add_adapter({adapter_name!r}, LoraConfig(...))."
    )
    if any(layer.get_base_layer() in SHIFTED_BASES for layer in layers.values()):
        reset = 'Load the base model anew: offset="base" has changed its weights.'
    for name, layer in layers.items():
        if not bool(layer.lora_B[adapter_name].weight.any()):  # plain, or LoRA-GA's structure without a start
            continue
        if isinstance(layer.lora_B[adapter_name], Factor):
            raise ValueError(f"Adapter {adapter_name!r} is already aligned (at {name}). {reset}")
        raise ValueError(
            f"Adapter {adapter_name!r} is not fresh: lora_B of {name} is not zero, so it was trained, or made with "
            f"an init_lora_weights that sets it. {reset}"
        )
