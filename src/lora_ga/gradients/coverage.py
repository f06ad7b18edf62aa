"""Layers, and parts of layers, without a usable gradient: the reasons, and the errors and warnings about them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_ga.gradients.checkpoint import Progress
from lora_ga.layers.targets import Target, exclusion, layer_name
from lora_ga.linalg.low_rank import LowRank
from lora_ga.warn import warn

# How the reason begins of a layer in a block whose output the model does not use at all.
BEYOND = "is beyond the last block that the loss uses of "

# What leaves out a parameter (of experts, of a router): `exclude_modules` does not.
NAME_OTHERS = "name the other layers in target_modules and target_parameters"
# Above this number, layers with one reason are counted and not listed.
MOST_LISTED = 8


def missing(targets: Mapping[str, Target], progress: Progress, factors: Mapping[str, LowRank | None]) -> dict[str, str]:
    """Find the layers that cannot be aligned.

    Args:
        targets: All layers of the adapter.
        progress: Which layers ran, and which got a gradient.
        factors: Part → the directions found.

    Returns:
        Layer name → reason.
    """
    reasons = {}
    for name, target in targets.items():
        found = [factor for key in target.keys if (factor := factors.get(key)) is not None]
        if target.unfit:
            reasons[name] = target.unfit
        elif name not in progress.ran:
            probed = ", and an adapter in its place got no gradient" if target.layout.probed else ""
            reasons[name] = f"never ran in {progress.batches} batches{probed}"
        elif name not in progress.got_gradient or (not found and target.parts == 1):
            reasons[name] = (
                "ran, but got no gradient (does the loss use its output? Does it run outside of torch.no_grad? Do "
                "quantised layers pass gradients on? With training_mode=False, some models run parts of themselves "
                "under torch.no_grad)"
            )
        elif all(factor.norm == 0 for factor in found):
            reasons[name] = "its gradient is exactly zero"
    return reasons


def unused_blocks(model: nn.Module, names: Collection[str], got_gradient: Collection[str]) -> dict[str, str]:
    """Find layers in the last blocks of a tower whose output the model does not use, whatever the data.

    LLaVA takes the output of the last but one block of its vision tower. It is known by this: earlier blocks of the
    tower got a gradient, those at its end got none, and another tower of the model got gradients to its end. Only
    blocks of Transformers' models count, not a list of heads, say, of which other data may use another one.

    Args:
        model: The model.
        names: All layers of the adapter.
        got_gradient: Those that got a gradient.

    Returns:
        Layer name → the reason.
    """
    places = {name: _block(name) for name in names}
    ends: dict[str, int] = {}
    used: dict[str, int] = {}
    for name, (tower, number) in places.items():
        ends[tower] = max(number, ends.get(tower, -1))
        if name in got_gradient:
            used[tower] = max(number, used.get(tower, -1))
    if not any(used.get(tower) == end for tower, end in ends.items() if tower):
        return {}
    modules = {layer_name(path): module for path, module in model.named_modules()}
    return {
        name: BEYOND + tower
        for name, (tower, number) in places.items()
        if number > used.get(tower, number) and isinstance(modules.get(f"{tower}.{number}"), GradientCheckpointingLayer)
    }


def _block(name: str) -> tuple[str, int]:
    """The list of blocks that a layer is in, and the block's number; ("", -1) without one."""
    steps = name.split(".")
    place = next((place for place, step in enumerate(steps) if step.isdigit()), None)
    return ("", -1) if place is None else (".".join(steps[:place]), int(steps[place]))


def warn_unused_blocks(reasons: Mapping[str, str]) -> None:
    """Warn of the layers that `unused_blocks` found.

    Args:
        reasons: Layer name → the reason.
    """
    if reasons:
        towers = ", ".join(dict.fromkeys(reason.removeprefix(BEYOND) for reason in reasons.values()))
        warn(
            f"The loss does not use the last blocks of {towers}; their {len(reasons)} layers start as plain LoRA, as "
            f"{next(iter(reasons))}. They get no gradient in training either: leave them out of target_modules."
        )


def warn_few_directions(layers: Mapping[str, LowRank], targets: Mapping[str, Target]) -> None:
    """Warn of layers whose gradient has fewer than 2r directions, so that the others are rounding noise.

    Args:
        layers: Part → the directions found.
        targets: Part → its layer.
    """
    wanted = {name: 2 * targets[name].rank for name in layers}
    above = []
    for name, layer in layers.items():
        floor = torch.finfo(layer.S.dtype).eps * max(targets[name].inputs, targets[name].outputs) * layer.S[0]
        above.append((layer.S[: wanted[name]] > floor).sum())
    counts = torch.stack([count.to(above[0].device) for count in above]).tolist() if above else []  # read once
    found = {name: count for name, count in zip(layers, counts, strict=True) if count < wanted[name]}
    if found:
        named = list(found)[: MOST_LISTED if len(found) <= MOST_LISTED else 3]
        listed = [
            f"  {name}: {count} direction{'s' * (count != 1)}, rank {targets[name].rank} uses {wanted[name]}"
            for name, count in ((name, found[name]) for name in named)
        ]
        listed += [f"  and {len(found) - len(named)} more"] if len(found) > len(named) else []
        warn(
            f"Fewer gradient directions than the start uses, in {len(found)} of {len(layers)} layers:\n"
            + "\n".join(listed)
            + "\nThe other directions are arbitrary; the layers train all the same. Use more or larger batches, or a "
            "smaller rank. Just below a head with few classes there may be no more directions."
        )


def warn_probed(probed: Sequence[str], layers: int) -> None:
    """Warn that layers ran without being called, and were probed.

    Args:
        probed: The layers.
        layers: The number of all layers.
    """
    more = f" and {len(probed) - 3} more" if len(probed) > 3 else ""
    warn(
        f"{len(probed)} of {layers} layers ran without being called, as under fused kernels that read their weights: "
        f"{', '.join(probed[:3])}{more}. Their gradients were found with a probe adapter, in two more passes over "
        'the batches. If these are all layers, LoraGAConfig(estimator="probe") saves the first pass.'
    )


def refuse_probe(targets: Mapping[str, Target], checkpoint: object, *, sharded: bool) -> None:
    """Refuse `estimator="probe"` where it does not work.

    Args:
        targets: The layers.
        checkpoint: The file of a checkpoint; None without one.
        sharded: Whether the model's parameters are spread over processes.

    Raises:
        ValueError: There is a checkpoint, the parameters are sharded, or a layer's factors are not two linear maps.
    """
    if sharded:
        raise ValueError(
            'estimator="probe" puts other factors into the layers, which is not possible in a sharded model. Call this '
            'before the model is sharded, or use estimator="streaming".'
        )
    if checkpoint is not None:
        raise ValueError(
            f'estimator="probe" keeps no running state, but a checkpoint was given ({checkpoint}). Leave it out, or '
            'use estimator="streaming", which probes the layers that are never called.'
        )
    others = [name for name, target in targets.items() if not target.layout.probed]
    if others:
        kind = type(targets[others[0]].layer.get_base_layer()).__name__
        more = f" ({len(others) - 1} more layers like this)" if len(others) > 1 else ""
        raise ValueError(
            f'{others[0]} is a {kind}, and estimator="probe" works on linear layers only{more}. Use '
            'estimator="streaming", which probes the linear layers that are never called, or leave the layer out.'
        )


def parts_without_gradient(targets: Mapping[str, Target], factors: Mapping[str, LowRank | None]) -> dict[str, str]:
    """Find the parts (experts, groups) without a gradient, in layers whose other parts have one, and warn of them.

    Args:
        targets: The layers that have a gradient.
        factors: Part → the directions found.

    Returns:
        Part → why it starts as plain LoRA.
    """
    parts = [key for target in targets.values() if target.parts > 1 for key in target.keys]
    empty = [key for key in parts if (factor := factors.get(key)) is None or factor.norm == 0]
    if empty:
        warn_parts(len(empty), len(parts), empty[0])
    return dict.fromkeys(empty, "got no token")


def warn_parts(empty: int, parts: int, first: str) -> None:
    """Warn of parts that start as plain LoRA, because no token reached them.

    Args:
        empty: Their number.
        parts: The number of all parts.
        first: The name of one of them.
    """
    warn(
        f"{empty} of {parts} experts (or groups) got no gradient, for example {first}: no token reached them. They "
        "start as plain LoRA. Use more batches to reach them."
    )


def _too_large(target: Target, reason: str) -> bool:
    """Whether the reason against a layer is its rank."""
    return target.unknown is None and reason == target.unfit


def _listed(reasons: Mapping[str, str], targets: Mapping[str, Target]) -> str:
    """The layers and the reasons against them, a line for each; one line where many layers have one reason.

    Returns:
        The lines.
    """
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault("rank" if _too_large(targets[name], reason) else reason, []).append(name)
    lines = []
    for reason, names in groups.items():
        if len(names) == 1 or (len(names) <= MOST_LISTED and reason != "rank"):
            lines += [f"  {name}: {reasons[name]}" for name in names]
            continue
        what = _largest_that_fits([targets[name] for name in names]) if reason == "rank" else reason
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"  {', '.join(names[:3])}{more}: {what}")
    return "\n".join(lines)


def _largest_that_fits(targets: Sequence[Target]) -> str:
    """The text for layers whose rank is too large: the largest rank that fits all of them."""
    smallest = min(targets, key=lambda target: target.largest_rank)
    return (
        f"rank {smallest.rank} is more than half of a layer's smaller side. The largest rank that fits all is "
        f"{smallest.largest_rank} ({smallest.name} is {smallest.outputs} x {smallest.inputs})"
    )


def _exclusion(reasons: Mapping[str, str], targets: Mapping[str, Target]) -> str | None:
    """The setting that leaves these layers out; None if there is none, or a long one."""
    line = exclusion(reasons, (name for name in targets if name not in reasons))
    return line if line.count(",") < MOST_LISTED else None


def report_missing(reasons: Mapping[str, str], targets: Mapping[str, Target], on_missing: str) -> None:
    """Raise an error, or warn, where layers cannot be aligned.

    Args:
        reasons: Layer name → why.
        targets: All layers of the adapter.
        on_missing: `LoraGAConfig.on_missing`: "error" or "lora".

    Raises:
        ValueError: There are such layers and `on_missing` is "error", or all layers are.
    """
    if not reasons:
        return
    count = f"{len(reasons)} of {len(targets)} layers cannot be aligned:\n{_listed(reasons, targets)}\n"
    if len(reasons) == len(targets):
        small = [target for name, target in targets.items() if _too_large(target, reasons[name])]
        if len(small) == len(targets) and min(target.largest_rank for target in small) > 0:
            raise ValueError(f"{len(small)} of {len(targets)} layers cannot be aligned: {_largest_that_fits(small)}.")
        raise ValueError(count + "No layer is left. Check target_modules, the batches and the loss.")
    if on_missing == "error":
        if any(targets[name].layout.gradient_from_parameter for name in reasons):  # exclude_modules leaves none out
            raise ValueError(f'{count}Set on_missing="lora" to start them as plain LoRA, or {NAME_OTHERS}.')
        out = "of target_modules" if (line := _exclusion(reasons, targets)) is None else f"with LoraConfig({line})"
        raise ValueError(count + f'Leave them out {out}, or set on_missing="lora" to start them as plain LoRA.')
    warn(count + "They start as plain LoRA.")
