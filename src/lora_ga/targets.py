"""Which layers of a PEFT model an adapter aligns, by name. Holds the only table of layer kinds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as lora_layers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ga.factors import Factor

PREFIX = "base_model.model."


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
            f"The model is a {type(model).__name__} without LoRA layers; LoRA-GA fills the adapter of a PeftModel. "
            "Call peft.get_peft_model(model, LoraConfig(...)) first, or lora_ga.get_lora_ga_model."
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
        name: Target(name, layer, layer.in_features, layer.out_features, layer.r[adapter_name])
        for name, layer in named.items()
    }


def _check_fresh(layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
    """Refuse an adapter that is aligned or trained already.

    Raises:
        ValueError: It is, with the way to reset it.
    """
    reset = (
        f"Start from a fresh one: model.delete_adapter({adapter_name!r}), then "
        f"model.add_adapter({adapter_name!r}, LoraConfig(...))."
    )
    for name, layer in layers.items():
        if isinstance(layer.lora_A[adapter_name], Factor):
            raise ValueError(f"Adapter {adapter_name!r} is already aligned (at {name}). {reset}")
        if bool(layer.lora_B[adapter_name].weight.any()):
            raise ValueError(
                f"Adapter {adapter_name!r} is not fresh: lora_B of {name} is not zero, so it was trained, or made with "
                f"an init_lora_weights that sets it. {reset}"
            )


@contextlib.contextmanager
def frozen(model: PeftModel, adapter_name: str) -> Iterator[None]:
    """The model as the estimate needs it, and on leaving exactly as it was.

    No parameter asks for a gradient (so no `.grad` is touched); the adapter `adapter_name` is out of the pass while
    other active ones stay in it; modules are in evaluation mode, except those that checkpoint activations, which do
    so only in training mode; no key-value cache is filled.

    Args:
        model: The model.
        adapter_name: The adapter to leave out.

    Yields:
        Nothing.
    """
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules = [(module, module.training) for module in model.modules()]
    active = [(module, module._active_adapter) for module in model.modules() if isinstance(module, LoraLayer)]
    config: Any = getattr(model.get_base_model(), "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        for module, _ in modules:
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        for module, _ in active:
            module._active_adapter = [name for name in module.active_adapters if name != adapter_name]
        if use_cache:
            config.use_cache = False
        yield
    finally:
        for parameter, required in parameters:
            parameter.requires_grad_(required)
        for module, training in modules:
            module.training = training
        for module, names in active:
            module._active_adapter = names
        if use_cache:
            config.use_cache = use_cache


def device_of(model: nn.Module) -> torch.device:
    """Where batches go: the device of the input embeddings, or of the first parameter."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    parameter = next((embeddings or model).parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
