"""The models with adapters in a network, the layers that an adapter aligns, and why other layers are refused."""

from __future__ import annotations

import dataclasses
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import Tensor, nn

from lora_ga.base import named_modules, without_compiled
from lora_ga.distributed.sharding import gathered, whole
from lora_ga.distributed.tensor_parallel import Split, in_fsdp, split_of, unfit
from lora_ga.layers.factors import Factor
from lora_ga.layers.kinds import KINDS, entries, kind_of, layout_of, warn_never_run, weight_of
from lora_ga.layers.linear import WeightLayout
from lora_ga.layers.plain import convolves
from lora_ga.layers.tied import tied_heads, why_not_separate, why_not_tied, why_not_used_once
from lora_ga.linalg.accumulator import Inputs
from lora_ga.linalg.low_rank import read

PREFIX = "base_model.model."
# Base layers whose weight `offset="base"` has changed. Nothing on the layer shows it once the adapter is deleted.
SHIFTED_BASES: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# Variants of LoRA that can be aligned: while the product of the factors is zero the layer computes what its base layer
# does, and the gradient by the product is that by the weight (PEFT's DoRA treats the norms as constants).
VARIANTS = ("DoraLinearVariant", "DoraConv2dVariant")

# Values of `init_lora_weights`, besides True, with which the product of the factors begins at zero.
ZERO_STARTS = ("gaussian", "eva")


class NotOneMatrixError(Exception):
    """A layer does not apply its weight as one matrix; the message is the end of a sentence about it."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A LoRA layer to align.

    Attributes:
        name: The module's path in the base model; messages and files name the layer by it.
        layer: PEFT's LoRA layer.
        layout: How the layer stores its weight.
        parts: The number of matrices that the weight consists of; above 1 in grouped convolutions and fused experts.
        inputs: Inputs of one part, d_in.
        outputs: Outputs of one part, d_out.
        rank: The adapter's rank r in one part.
        split: This process's share of the weight, where a tensor-parallel plan splits it.
        unknown: Why a layer of an unknown kind cannot be aligned; None for others.
        heads: Of an embedding: name → the linear layers that PEFT has tied to it, which share its factors and its
            weight. The gradient is that of all uses, and they are no targets of their own.
    """

    name: str
    layer: LoraLayer
    layout: WeightLayout
    parts: int
    inputs: int
    outputs: int
    rank: int
    split: Split | None = None
    unknown: str | None = None
    heads: Mapping[str, LoraLayer] = dataclasses.field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """The names of the parts in an estimate: the layer's name if there is one part."""
        return [self.name] if self.parts == 1 else [f"{self.name}[{part}]" for part in range(self.parts)]

    def rows(self, x: Tensor, g: Tensor) -> Iterator[tuple[str, Inputs, Tensor]]:
        """The gradient of each part as rows x (T, I) and g (T, O), with `G = gᵀ x`.

        Args:
            x: The layer's input.
            g: The gradient of the loss at the layer's output, or at the parameter.

        Yields:
            The part's key, x and g.

        Raises:
            NotOneMatrixError: The layer does not apply its weight as a matrix of its shape.
        """
        keys = self.keys
        for part, x_TI, g_TO in self.layout.rows(self.layer, x, g):
            if self.split is None and (g_TO.shape[-1], x_TI.shape[-1]) != (self.outputs, self.inputs):
                raise NotOneMatrixError(
                    f"gives {g_TO.shape[-1]} outputs for {x_TI.shape[-1]} inputs, but its weight is {self.outputs} x "
                    f"{self.inputs}: it does not apply it as one matrix"
                )
            yield keys[part], *((x_TI, g_TO) if self.split is None else self.split.padded(x_TI, g_TO))

    def head_rows(self, x: Tensor, g: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The gradient of a tied head's use of the weight, which is the transposed of this layer's.

        Args:
            x: The head's input.
            g: The gradient of the loss at the head's output.

        Yields:
            This layer's key, the output gradients in the place of inputs, and the inputs in that of output gradients.
        """
        yield self.name, g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])

    @property
    def largest_rank(self) -> int:
        """The largest rank that can be aligned: half of the smaller side."""
        return min(self.inputs, self.outputs) // 2

    @property
    def unfit(self) -> str | None:
        """Why this layer cannot be aligned, whatever its gradient: its kind, or its size. None if it can."""
        if self.unknown:
            return self.unknown
        if self.rank <= self.largest_rank:
            return None
        pattern = self.layout.pattern_name(self.layer, self.name)
        return (
            f"rank {self.rank} needs {2 * self.rank} gradient directions, but the weight is {self.outputs} x "
            f"{self.inputs}: use a rank of at most {self.largest_rank} (rank_pattern sets it for one layer"
            + (f", as {pattern})" if pattern != self.name else ")")
        )


def layer_name(path: str) -> str:
    """The name of a layer in messages and files: its path in the base model, also if that was compiled.

    Args:
        path: Its path in the model with adapters.

    Returns:
        The name.
    """
    return without_compiled(path.removeprefix(PREFIX))


def peft_models_in(network: Any) -> dict[str, nn.Module]:
    """The models with PEFT's adapters in a network: a `PeftModel`, or one into which adapters were injected.

    Adapters are injected by `model.add_adapter` of Transformers and diffusers, and by `peft.inject_adapter_in_model`.
    All these models have `peft_config`, which holds the configurations of their adapters by name.

    Args:
        network: Any module.

    Returns:
        Path in the network ("" is the network itself) → model. Layers are named by `layer_name`.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    if not isinstance(network, nn.Module):
        return {}
    for path, module in named_modules(network, lambda parent, _: not isinstance(parent, LoraLayer)):
        # PEFT gives the same dictionary to a PeftModel, its tuner and the base model in it.
        if isinstance(module, PeftModel):
            found[id(module.peft_config)] = path, module
        elif (configs := vars(module).get("peft_config")) and not isinstance(module, BaseTuner):
            found.setdefault(id(configs), (path, module))
    return dict(found.values())


def peft_model_in(network: Any) -> Any:
    """The one model with PEFT's adapters that a network is or contains.

    Args:
        network: A model that `peft_models_in` finds, or a module that contains one: with a head beside it, say.

    Returns:
        The model.

    Raises:
        TypeError: There is none.
        ValueError: There are several.
    """
    found = peft_models_in(network)
    if not found:
        if isinstance(network, nn.Module):
            advice = (
                "Add an adapter first, with peft.get_peft_model(model, LoraConfig(...)) or model.add_adapter, or call "
                "lora_ga.get_lora_ga_model."
            )
        else:
            advice = "Give the module that has the adapter: of a pipeline its unet or transformer."
        raise TypeError(f"The {type(network).__name__} has no LoRA layers. {advice}")
    if len(found) > 1:
        places = ", ".join(path or "the network itself" for path in found)
        raise ValueError(
            f"The {type(network).__name__} contains {len(found)} models with adapters ({places}). Give one of them "
            "at a time, with a loss_fn that runs the whole network."
        )
    return next(iter(found.values()))


def _lora_layers(model: Any, adapter_name: str) -> dict[str, LoraLayer]:
    """The LoRA layers of a model with adapters that have the adapter.

    Returns:
        Module path in the model → layer.

    Raises:
        ValueError: No such adapter, or no LoRA layers.
    """
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


def _why_not_aligned(name: str, layer: LoraLayer, adapter_name: str) -> str | None:
    """Why a layer cannot be aligned, whatever its gradient is; None if it can."""
    variant = type(layer.lora_variant.get(adapter_name)).__name__
    if adapter_name in layer.lora_variant and variant not in VARIANTS:
        variant = variant.removesuffix("Variant")
        return f"{name} uses the LoRA variant {variant}, which is not supported; switch the variant off"
    kind, base = kind_of(layer), layer.get_base_layer()
    if base in SHIFTED_BASES and not isinstance(entries(layer, adapter_name)[0], Factor):
        return f'{name}: offset="base" has changed its base weight for another adapter; load the base model again'
    if layer.merged:
        return (
            f"{name} has merged adapters ({', '.join(layer.merged_adapters)}); call model.unmerge_adapter() first "
            "(of a diffusers model unfuse_lora)"
        )
    if kind is None:
        return None
    if not kind.ready(base):
        return (
            f"{name} is a {type(base).__name__} whose weight has not been quantised yet (the first move to a device "
            "quantises it): load the model with from_pretrained(..., quantization_config=...), or move it "
            "to its device"
        )
    reason = kind.layout.why_not_aligned(layer, adapter_name)
    return None if reason is None else f"{name} {reason}"


def exclusion(names: Iterable[str], others: Iterable[str]) -> str:
    """The setting of LoraConfig that leaves layers out of an adapter, and no others.

    Args:
        names: The layers to leave out.
        others: The layers that stay.

    Returns:
        `exclude_modules=[...]`, with the shortest ends of the names that no other layer has.
    """
    kept = {end for name in others for end in _ends(name)}
    chosen = (next((end for end in _ends(name) if end not in kept), name) for name in names)
    return f"exclude_modules={list(dict.fromkeys(chosen))}"


def exclusion_of_class(kind: type, layers: Mapping[str, nn.Module]) -> str:
    """The setting of LoraConfig that leaves out the layers of a class, and no others.

    Args:
        kind: The class of the base layers.
        layers: Layer name → layer.

    Returns:
        As `exclusion`.
    """
    alike = {name: None for name, layer in layers.items() if type(getattr(layer, "base_layer", layer)) is kind}
    return exclusion(alike, layers.keys() - alike.keys())


def _ends(name: str) -> list[str]:
    """The ends of a path, the shortest first: c, b.c, a.b.c."""
    steps = name.split(".")
    return [".".join(steps[-count:]) for count in range(1, len(steps) + 1)]


def _unknown_kinds(layers: Mapping[str, LoraLayer], adapter_name: str) -> dict[str, str]:
    """The layers of an unknown kind, and those inside them.

    PEFT makes LoRA layers of the parts of a `MultiheadAttention`, but does not call them. It makes the factors of a
    convolution of the class of its base layer, so they may compute something else than a product.

    Returns:
        Layer name → why it cannot be aligned.
    """
    known_layers = (kind.base for kind in KINDS if not kind.layout.gradient_from_parameter)
    known = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in known_layers))
    reasons: dict[str, str] = {}
    for name, layer in layers.items():
        outer = next((other for other in reasons if name.startswith(f"{other}.")), None)
        if outer is not None:
            reasons[name] = f"is a part of {outer}, whose kind is not known"
            continue
        base = type(layer.get_base_layer())
        if kind_of(layer) is None:
            peft_name = f"{type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__}"
            reason = f"is a {base.__name__} (PEFT: {peft_name}); known are {known}"
        elif not all(convolves(entry) for entry in entries(layer, adapter_name)):
            reason = (
                f"is a {base.__name__}, which computes something else than torch's convolution. PEFT makes A and B of "
                "this class too, so they are no factors of a change of the weight"
            )
        else:
            continue
        # One text for all layers of a class, so that they are counted and not listed.
        reasons[name] = f"{reason}. Leave such layers out with LoraConfig({exclusion_of_class(base, layers)})"
    return reasons


def find_targets(network: nn.Module, adapter_name: str = "default", *, fresh: bool = True) -> dict[str, Target]:
    """The layers of an adapter.

    Args:
        network: A model with a LoRA adapter (see `peft_models_in`), or a network that contains one.
        adapter_name: The adapter.
        fresh: Whether to refuse an adapter that is trained or aligned already.

    Returns:
        Layer name → target, in the model's order.

    Raises:
        TypeError: There is no model with adapters.
        ValueError: There are several; the adapter does not exist, has no LoRA layers, layers of a LoRA variant other
            than DoRA, is merged, trained or aligned already; a tensor-parallel plan splits it in an unknown way; layers
            share a factor in another way than PEFT's `ensure_weight_tying`.
    """
    model = peft_model_in(network)
    layers = _lora_layers(model, adapter_name)
    named, fsdp = {layer_name(full): layer for full, layer in layers.items()}, in_fsdp(network)
    tied = {layer_name(head): layer_name(source) for head, source in tied_heads(model, adapter_name).items()}
    reasons = [
        _why_not_aligned(name, layer, adapter_name) or unfit(name, layer.get_base_layer(), fsdp=fsdp)
        for name, layer in named.items()
    ]
    ties = ((head, why_not_tied(named[head], named[source], adapter_name)) for head, source in tied.items())
    reasons += [f"{head} {reason}" for head, reason in ties if reason]
    everywhere = {layer_name(path): layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    reasons += [why_not_separate(everywhere, adapter_name, tied), why_not_used_once(network, named)]
    reasons.append(_why_two(model, [name for name in named if name not in tied], adapter_name))
    refusals = [reason for reason in reasons if reason]
    if refusals:
        more = f" ({len(refusals) - 1} more layers like this)" if len(refusals) > 1 else ""
        raise ValueError(f"Cannot align adapter {adapter_name!r}: {refusals[0]}.{more}")
    unknown = _unknown_kinds(named, adapter_name)
    known = {name: layer for name, layer in named.items() if name not in unknown}
    if fresh:
        _check_fresh(known, adapter_name, model)
    for kind in {kind_of(layer) for layer in known.values()}:
        if kind is not None and not kind.ran:
            warn_never_run(kind)
    heads = {name: {head: named[head] for head in tied if tied[head] == name} for name in named if name not in tied}
    return {name: _target(name, named[name], adapter_name, heads[name], unknown.get(name)) for name in heads}


def _why_two(model: Any, names: Sequence[str], adapter_name: str) -> str | None:
    """Why layers belong to two adapters of one name: one was injected before a `PeftModel` was made of the model.

    The configuration is that of the second, so the layers of the first would be lost when the adapter is loaded.

    Returns:
        The reason; None if all layers are those of the configuration.
    """
    if not isinstance(model, PeftModel):
        return None
    config, made = model.peft_config[adapter_name], {*model.base_model.targeted_module_names}
    for name in names:
        # Wrappers of layers, put around them later, have made the path longer.
        path = re.sub(r"_(checkpoint_wrapped_module|fsdp_wrapped_module|orig_mod)\.", "", name)
        if made.intersection((name, path)) or check_target_module_exists(config, path) or ".base_layer" in name:
            continue
        if not layout_of(model.get_submodule(f"{PREFIX}{name}")).gradient_from_parameter:
            return (
                f"{name} is not among the target_modules of the PeftModel's adapter: an adapter of the same name was "
                "injected before. Load the base model again and make one adapter for all layers, or give the second "
                "another adapter_name"
            )
    return None


def _target(
    name: str, layer: LoraLayer, adapter_name: str, heads: Mapping[str, LoraLayer], unknown: str | None
) -> Target:
    layout = layout_of(layer)
    if unknown is not None:
        return Target(
            name, layer, layout, 1, layer.in_features, layer.out_features, layer.r[adapter_name], unknown=unknown
        )
    factor = entries(layer, adapter_name)[0]
    split = split_of(layer.get_base_layer())
    outputs, inputs = layout.part_shape(layer) if split is None else split.shape
    # The rank r that trains: PEFT's own entry is 2r in a layer whose factors are joined.
    rank = factor.rank if isinstance(factor, Factor) else layer.r[adapter_name]
    rank = layout.part_rank(layer, rank)
    return Target(name, layer, layout, layout.parts(layer), inputs, outputs, rank, split, heads=heads)


def _check_fresh(layers: Mapping[str, LoraLayer], adapter_name: str, model: Any) -> None:
    """Refuse an adapter that is aligned or trained already.

    Args:
        layers: Layer name → layer.
        adapter_name: The adapter.
        model: The model that has the adapter.

    Raises:
        ValueError: It is; the message says how to reset it.
    """
    reset = "Start from a fresh one: load the base model again, and add the adapter to it."
    if isinstance(model, PeftModel):  # which deletes and adds adapters in one known way
        reset = (
            f"Start from a fresh one: model.delete_adapter({adapter_name!r}), model.add_adapter({adapter_name!r}, "
            f"LoraConfig(...)), then model.set_adapter({adapter_name!r}), without which it does not train."
        )
    if any(layer.get_base_layer() in SHIFTED_BASES for layer in layers.values()):
        reset = 'Load the base model again: offset="base" has changed its weights.'
    nonzero: dict[str, Tensor] = {}
    for name, layer in layers.items():
        entry = entries(layer, adapter_name)["AB".index(layout_of(layer).zero_factor)]
        with gathered([factor.trainable for factor in [entry] if isinstance(factor, Factor)]):
            weight = whole(weight_of(entry))
            if not weight.is_meta:  # a meta tensor has no values yet
                nonzero[name] = weight.any().reshape(1)
    for name, changed in zip(nonzero, read(list(nonzero.values())), strict=True):
        if not changed:  # fresh, or prepared but not started
            continue
        if isinstance(entries(layers[name], adapter_name)[0], Factor):
            raise ValueError(
                f"Adapter {adapter_name!r} is already aligned (at {name}); it trains on without another start. {reset}"
            )
        letter = layout_of(layers[name]).zero_factor
        found = f"Adapter {adapter_name!r} is not fresh: lora_{letter} of {name} is not zero"
        setting = getattr(model.peft_config[adapter_name], "init_lora_weights", True)
        if setting is False or (isinstance(setting, str) and setting not in ZERO_STARTS):
            raise ValueError(
                f"{found}, as init_lora_weights={setting!r} makes it. Load the base model again, whose weights some of "
                "these settings change, and make the adapter with init_lora_weights=True. To train a saved adapter on, "
                "load it with lora_ga.load(..., is_trainable=True); it needs no start."
            )
        raise ValueError(
            f"{found}, so it was trained, or loaded from a file. {reset} To train a saved adapter on, load it with "
            "lora_ga.load(..., is_trainable=True); it needs no start."
        )
