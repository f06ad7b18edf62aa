"""The plan of a start: every check, and A₀ and B₀ of every layer. Reads the model and changes nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_ga.adapter.alignment import Alignment, alignment_of
from lora_ga.adapter.directions import LayerSpec, split
from lora_ga.adapter.stock import warn_not_found
from lora_ga.adapter.structure import on_meta
from lora_ga.base import another_base, embeddings, fingerprint
from lora_ga.config import LoraGAConfig
from lora_ga.distributed.sharding import sharded, whole
from lora_ga.gradients.coverage import BEYOND, report_missing, warn_parts, warn_unused_blocks
from lora_ga.gradients.result import GradientEstimate
from lora_ga.layers.factors import Factor
from lora_ga.layers.kinds import base_weights, entries, kind_of, weight_of
from lora_ga.layers.plain import follows_weight
from lora_ga.layers.targets import PREFIX, Target, find_targets, peft_model_in
from lora_ga.warn import warn


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be written into an adapter, after every check.

    Attributes:
        network: The model, or the network that contains it.
        aligned: The layers that get a start.
        plain: The adapter's other layers.
        starts: Layer name → A₀ and B₀.
        alignment: The record of an adapter that has the structure already, else None.
        identity: The values that have to be equal in all processes.
    """

    network: nn.Module
    aligned: dict[str, Target]
    plain: dict[str, Target]
    starts: dict[str, tuple[Tensor, Tensor]]
    alignment: Alignment | None
    identity: dict[str, Any]

    def tensors(self) -> Iterator[tuple[str, int, Tensor]]:
        """The starts one by one: layer name, 0 for A or 1 for B, tensor."""
        return ((name, side, pair[side]) for name, pair in self.starts.items() for side in (0, 1))


def make_plan(
    network: nn.Module,
    estimate: GradientEstimate,
    config: LoraGAConfig,
    adapter_name: str,
    already_warned: Container[str],
) -> Plan:
    """Check everything, and compute the starts.

    Args:
        network: The model or a network that contains it, without wrappers.
        estimate: The estimate.
        config: The settings.
        adapter_name: The adapter.
        already_warned: Layers, experts and groups that the estimate has warned about, to be left out of warnings.

    Returns:
        What is to be written.

    Raises:
        ValueError: As `apply_estimate`.
    """
    model, targets = peft_model_in(network), find_targets(network, adapter_name)
    alignment = alignment_of(model, adapter_name)
    found = fingerprint(model)
    _check_belongs_together(model, found, alignment, estimate, config, adapter_name)
    reasons = {name: reason for name, target in targets.items() if (reason := _why_plain(target, estimate))}
    for name in reasons:
        if on_meta(targets[name], adapter_name):
            raise ValueError(
                f"{name} is on the meta device and has to start as plain LoRA, but has no values. Make the adapter "
                "without low_cpu_mem_usage, or leave the layer out of target_modules."
            )
    unused = {name: reason for name in reasons if (reason := estimate.missing.get(name, "")).startswith(BEYOND)}
    others = {name: reason for name, reason in reasons.items() if name not in unused}
    if config.on_missing == "error" or len(reasons) == len(targets):
        report_missing(others, targets, config.on_missing)
    report_missing({n: r for n, r in others.items() if n not in already_warned}, targets, config.on_missing)
    warn_unused_blocks({name: reason for name, reason in unused.items() if name not in already_warned})
    aligned = {name: target for name, target in targets.items() if name not in reasons}
    _check_shapes(estimate, aligned)
    if config.offset == "base":
        _check_base_can_change(network, aligned, adapter_name)
    _warn_parts_without_gradient(estimate, aligned, already_warned)
    _warn_cannot_train(model, targets, adapter_name)
    if isinstance(model, PeftModel):
        warn_not_found(model, targets, adapter_name)
    starts = {name: _start(target, estimate, config, adapter_name) for name, target in aligned.items()}
    plain = {name: target for name, target in targets.items() if name in reasons}
    identity = {
        "fingerprint": found,
        "config": config.to_dict(),
        "scaling": {name: target.layer.scaling[adapter_name] for name, target in targets.items()},
        "estimate": {name: [estimate[name].norm, estimate[name].S.numel()] for name in estimate},
    }
    return Plan(network, aligned, plain, starts, alignment, identity)


def _warn_cannot_train(model: Any, targets: Mapping[str, Target], adapter_name: str) -> None:
    """Warn of an adapter that does not train as the model stands. No error: it may be made to train later."""
    layers = [target.layer for target in targets.values() if not target.unknown]
    factors = [entry for layer in layers for entry in entries(layer, adapter_name)]
    off = any(layer.disable_adapters for layer in layers)
    active = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    trains = any(
        parameter.requires_grad
        for entry in factors
        for parameter in (entry.parameters() if isinstance(entry, nn.Module) else [entry])
    )
    if trains and not off and adapter_name in active:
        return
    if off:
        found = "is switched off (disable_adapter_layers)"
    elif adapter_name not in active:
        found = f"is not active (active: {', '.join(active) or 'none'})"
    elif model.peft_config[adapter_name].inference_mode:
        found = "was made for inference (LoraConfig.inference_mode is True)"
    else:
        found = "is frozen (no A or B has requires_grad)"
    if isinstance(model, PeftModel):
        on = "model.enable_adapter_layers(), then " if off else ""
        advice = f"Call {on}model.set_adapter({adapter_name!r})"
    else:
        on = "enable_adapters(True), then " if off else ""
        advice = f"Call {on}set_adapter({adapter_name!r}) of each of its LoRA layers"
    warn(
        f"Adapter {adapter_name!r} {found}, so none of its A and B trains. {advice} before the optimizer or the "
        "trainer is made."
    )


def _check_belongs_together(
    model: Any,
    found: str,
    alignment: Alignment | None,
    estimate: GradientEstimate,
    config: LoraGAConfig,
    adapter_name: str,
) -> None:
    """Refuse settings for another offset than the structure's, and an estimate of another model.

    Raises:
        ValueError: It is one of these.
    """
    if alignment is not None and alignment.config.offset != config.offset:
        raise ValueError(
            f'Adapter {adapter_name!r} was prepared for offset="{alignment.config.offset}", but the settings say '
            f'"{config.offset}". Give the same settings to both.'
        )
    if difference := another_base(model, estimate.fingerprint, found, estimate.shapes()):
        raise ValueError(f"The estimate belongs to another model: {difference}. Estimate the gradients of this model.")


def _why_plain(target: Target, estimate: GradientEstimate) -> str | None:
    """Why a layer cannot start from the estimate and stays plain LoRA; None if it can."""
    if target.unfit:
        return target.unfit
    held = [estimate[key] for key in target.keys if key in estimate]
    if not held:
        left_out = estimate.missing.get(target.name)
        return f"left out of the estimate: {left_out}" if left_out else "the estimate does not cover it"
    return "its gradient is exactly zero" if all(part.norm == 0 for part in held) else None


def _start(
    target: Target, estimate: GradientEstimate, config: LoraGAConfig, adapter_name: str
) -> tuple[Tensor, Tensor]:
    """A₀ and B₀ of a layer, in PEFT's layout.

    A part (expert, group) without a gradient starts as plain LoRA: with the A that PEFT drew, and B = 0.

    Returns:
        A₀ and B₀.
    """
    layer = target.layer
    # In an adapter that has the structure already, PEFT's A and B are the factors' starts.
    plain_A, plain_B = (
        entry.start if isinstance(entry, Factor) else weight_of(entry) for entry in entries(layer, adapter_name)
    )
    starts = []
    for part, key in enumerate(target.keys):
        if key in estimate and estimate[key].norm > 0:
            spec = LayerSpec(
                name=key,
                outputs=target.outputs,
                rank=target.rank,
                scaling=layer.scaling[adapter_name],
                config=config,
                read_weight=functools.partial(_float32_weight, layer, part),
            )
            starts.append(split(estimate[key], spec))
        else:
            a = target.layout.unstack_a(whole(plain_A.detach()), target.parts)[part]
            starts.append((a.float(), a.new_zeros(target.outputs, target.rank, dtype=torch.float32)))
    a_PrI, b_POr = (torch.stack([start[side].cpu() for start in starts]) for side in (0, 1))
    return a_PrI.flatten(0, 1).reshape(plain_A.shape), target.layout.stack_b(b_POr).reshape(plain_B.shape)


def _float32_weight(layer: LoraLayer, part: int) -> Tensor:
    """The base weight of one part of a layer, (d_out, d_in)."""
    return whole(base_weights(layer)[part]).detach().float()


def _warn_parts_without_gradient(
    estimate: GradientEstimate, targets: dict[str, Target], already_warned: Container[str]
) -> None:
    """Warn how many experts or groups start as plain LoRA, unless the estimate has just done so."""
    parts = [key for target in targets.values() if target.parts > 1 for key in target.keys]
    silent = [key for key in parts if key not in estimate]
    if any(key not in already_warned for key in silent):
        warn_parts(len(silent), len(parts), silent[0])


def _check_shapes(estimate: GradientEstimate, targets: dict[str, Target]) -> None:
    """Refuse an estimate whose directions do not have the shapes of the layers.

    Raises:
        ValueError: A layer has another shape.
    """
    by_key = {key: target for target in targets.values() for key in target.keys if key in estimate}
    for key, target in by_key.items():
        found = (estimate[key].U.shape[0], estimate[key].V.shape[0])
        if found != (target.outputs, target.inputs):
            raise ValueError(
                f"{key}: the estimate is of a {found[0]} x {found[1]} weight, the layer's is {target.outputs} x "
                f"{target.inputs}. Estimate the gradients of this model."
            )


def _why_not_shifted(target: Target) -> str | None:
    """Why `offset="base"` cannot change a layer's base weight, as the object of "cannot change"; None if it can."""
    reason = target.layout.why_not_shifted(target.layer)
    if reason is None and not follows_weight(target.layer):
        kind = type(target.layer.get_base_layer()).__name__
        return f"a {kind}, whose output does not change with its weight as with an adapter"
    return reason


def _check_base_can_change(network: nn.Module, targets: dict[str, Target], adapter_name: str) -> None:
    """Refuse `offset="base"` for weights that cannot be changed, or that other modules or adapters use too.

    Raises:
        ValueError: There is such a weight.
    """
    owners: dict[int, set[str]] = {}
    for path, parameter in network.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(path)
    saved = embeddings(peft_model_in(network))
    for name, target in targets.items():
        base, kind = target.layer.get_base_layer(), kind_of(target.layer)
        others = [other for other in target.layer.r if other != adapter_name]
        if others:
            raise ValueError(
                f'{name}: offset="base" would change the weight under the other adapters of the layer '
                f'({", ".join(others)}); use offset="adapter", or delete them first.'
            )
        if kind is not None and kind.read is not None:
            raise ValueError(
                f'{name}: offset="base" cannot change a quantised weight ({type(base).__name__}); use offset="adapter".'
            )
        if reason := _why_not_shifted(target):
            raise ValueError(f'{name}: offset="base" cannot change {reason}; use offset="adapter".')
        weight = getattr(base, target.layout.parameter_name(target.layer))
        if sharded(weight):
            raise ValueError(
                f'{name}: offset="base" cannot change a sharded weight; use offset="adapter", or call this before '
                "the model is sharded."
            )
        if not weight.is_floating_point() or weight.itemsize < 2 or weight.is_meta:
            where = " on the meta device" if weight.is_meta else ""
            raise ValueError(
                f'{name}: offset="base" cannot change a {weight.dtype} weight{where}; use offset="adapter".'
            )
        if len(owners[id(weight)]) > 1:
            shared = ", ".join(sorted(path.removeprefix(PREFIX) for path in owners[id(weight)]))
            raise ValueError(
                f'{name}: its weight is shared ({shared}), so offset="base" would change them all; use '
                'offset="adapter", or leave the layer out.'
            )
        if any(target.layer is layer for layer in saved):
            raise ValueError(
                f'{name}: PEFT saves the weights of adapted embeddings and heads beside the adapter, so offset="base" '
                'would put the changed weight into the file; use offset="adapter", or leave the layer out.'
            )
