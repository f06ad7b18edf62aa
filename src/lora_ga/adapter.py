"""The writer: puts A₀ and B₀ into a model's adapter, once everything is checked."""

from __future__ import annotations

from collections.abc import Container

from peft import PeftModel

from lora_ga.config import LoraGAConfig
from lora_ga.estimate import settle_missing
from lora_ga.gradient import GradientEstimate
from lora_ga.sidecar import Alignment
from lora_ga.split import Layer, split
from lora_ga.store import fingerprint
from lora_ga.structure import build, fill
from lora_ga.targets import PREFIX, Target, base_weight, find_targets
from lora_ga.tracking import section


def apply_estimate(
    model: PeftModel,
    estimate: GradientEstimate,
    config: LoraGAConfig = LoraGAConfig(),  # noqa: B008 (frozen)
    *,
    adapter_name: str = "default",
) -> None:
    """Write the start that an estimate gives into a fresh adapter. Everything is checked before anything is written.

    Parameters stay the objects they were (an optimizer may hold them) and keep rank r. With `offset="adapter"` the
    adapter computes at rank 2r, the base is not touched and the model's function stays exactly what it was. With
    `offset="base"` the base weight becomes `W − s·B₀A₀`, rounded to its dtype, as in the paper; `disable_adapter()`
    then shows the changed base. Either way `save_pretrained` writes a plain rank-2r adapter for the original base.
    After `offset="base"` the model is for this one adapter: `unload()` gives the changed base, and saving or loading
    others beside it is refused.

    Args:
        model: A `PeftModel` with a fresh LoRA adapter.
        estimate: The estimate, of this base model.
        config: The settings; `direction`, `scale`, `stable_gamma`, `offset`, `on_missing`, `seed` count here.
        adapter_name: The adapter.

    Raises:
        TypeError: The model is not a `PeftModel`.
        ValueError: The adapter cannot be aligned; the estimate belongs to another model or holds too few directions;
            layers are missing from it (see `on_missing`); `offset="base"` on weights that cannot be changed.
    """
    write_starts(model, estimate, config, adapter_name, said=())


def write_starts(
    model: PeftModel, estimate: GradientEstimate, config: LoraGAConfig, adapter_name: str, said: Container[str]
) -> None:
    """`apply_estimate`, without repeating the warning about the layers in `said`.

    Raises:
        ValueError: As `apply_estimate`.
    """
    targets = find_targets(model, adapter_name)
    alignment: Alignment | None = getattr(model.peft_config[adapter_name], "alignment", None)
    if alignment is not None and alignment.config.offset != config.offset:
        raise ValueError(
            f'Adapter {adapter_name!r} was prepared for offset="{alignment.config.offset}", but the settings say '
            f'"{config.offset}". Give the same settings to both.'
        )
    found = fingerprint(model)
    if found != estimate.fingerprint:
        raise ValueError(
            f"The estimate belongs to another model: its fingerprint is {estimate.fingerprint}, this model's {found} "
            "(module names and weight shapes). Estimate the gradients of this model."
        )
    reasons = {name: reason for name, target in targets.items() if (reason := _unusable(target, estimate))}
    if config.on_missing == "error" or len(reasons) == len(targets):
        settle_missing(reasons, targets, config.on_missing)
    settle_missing({name: why for name, why in reasons.items() if name not in said}, targets, config.on_missing)
    aligned = {name: target for name, target in targets.items() if name not in reasons}
    _check_shapes(estimate, aligned)
    if config.offset == "base":
        _check_base_can_change(model, aligned, adapter_name)
    starts = {name: split(estimate[name], _layer(target, config, adapter_name)) for name, target in aligned.items()}
    if alignment is None:
        plain = {name: target for name, target in targets.items() if name in reasons}
        alignment = build(model, aligned, plain, config, adapter_name)
    fill(alignment, starts, aligned)
    alignment.config = config
    alignment.summary = section(estimate, {name: target.rank for name, target in aligned.items()})


def give_structure(model: PeftModel, config: LoraGAConfig, adapter_name: str) -> None:
    """Prepare a fresh adapter for a start that comes later, before an optimizer or a wrapper sees its parameters.

    It computes and (but for weight decay, which pulls A towards where it began) trains as the plain LoRA it was;
    `apply_estimate` then gives it its start in place. Layers that are
    too small for their rank stay as they are, if `on_missing` allows it. An adapter that is prepared already stays so.

    Args:
        model: A `PeftModel` with a fresh LoRA adapter.
        config: The settings.
        adapter_name: The adapter.

    Raises:
        TypeError: The model is not a `PeftModel`.
        ValueError: The adapter cannot be aligned.
    """
    targets = find_targets(model, adapter_name)
    if getattr(model.peft_config[adapter_name], "alignment", None) is not None:
        return
    too_small = {name: target.too_small for name, target in targets.items() if target.too_small}
    if config.on_missing == "error" or len(too_small) == len(targets):
        settle_missing(too_small, targets, config.on_missing)
    aligned = {name: target for name, target in targets.items() if name not in too_small}
    build(model, aligned, {name: targets[name] for name in too_small}, config, adapter_name)


def _unusable(target: Target, estimate: GradientEstimate) -> str | None:
    """Why a layer cannot start from the estimate; None if it can."""
    if target.too_small:
        return target.too_small
    if target.name not in estimate:
        left_out = estimate.missing.get(target.name)
        return f"left out of the estimate: {left_out}" if left_out else "the estimate does not cover it"
    return "its gradient is exactly zero" if estimate[target.name].norm == 0 else None


def _layer(target: Target, config: LoraGAConfig, adapter_name: str) -> Layer:
    scaling = target.layer.scaling[adapter_name]
    return Layer(
        target.name, target.outputs, target.rank, scaling, config, lambda: base_weight(target.layer).detach().float()
    )


def _check_shapes(estimate: GradientEstimate, targets: dict[str, Target]) -> None:
    """Refuse an estimate whose factors do not fit the layers they are named after.

    Raises:
        ValueError: There is such a layer.
    """
    for name, target in targets.items():
        found = (estimate[name].U.shape[0], estimate[name].V.shape[0])
        if found != (target.outputs, target.inputs):
            raise ValueError(
                f"{name}: the estimate is of a {found[0]} x {found[1]} weight, the layer's is {target.outputs} x "
                f"{target.inputs}. Estimate the gradients of this model."
            )


def _check_base_can_change(model: PeftModel, targets: dict[str, Target], adapter_name: str) -> None:
    """Refuse `offset="base"` where a weight is not plain numbers, or matters to other modules or adapters too.

    Raises:
        ValueError: There is such a weight.
    """
    owners: dict[int, set[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(path)
    for name, target in targets.items():
        weight = target.layer.get_base_layer().weight
        others = [other for other in target.layer.r if other != adapter_name]
        if others:
            raise ValueError(
                f'{name}: offset="base" would change the weight under the other adapters of the layer '
                f'({", ".join(others)}); use offset="adapter", or delete them first.'
            )
        if not weight.is_floating_point() or weight.is_meta:
            raise ValueError(f'{name}: offset="base" cannot change a {weight.dtype} weight; use offset="adapter".')
        if len(owners[id(weight)]) > 1:
            shared = ", ".join(sorted(path.removeprefix(PREFIX) for path in owners[id(weight)]))
            raise ValueError(
                f'{name}: its weight is shared ({shared}), so offset="base" would change them all; use '
                'offset="adapter", or leave the layer out.'
            )
