"""Layers and parts of layers that the gradient does not reach: why, and what is said of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch

from lora_ga.gradients.checkpoint import Progress
from lora_ga.layers.targets import Target
from lora_ga.linalg.low_rank import LowRank


def missing(targets: Mapping[str, Target], progress: Progress, factors: Mapping[str, LowRank | None]) -> dict[str, str]:
    """Why layers cannot be aligned.

    Args:
        targets: All layers of the adapter.
        progress: What ran, and what got a gradient.
        factors: Part → the directions found.

    Returns:
        Layer name → reason.
    """
    reasons = {}
    for name, target in targets.items():
        found = [factor for key in target.keys if (factor := factors.get(key)) is not None]
        if target.too_small:
            reasons[name] = target.too_small
        elif name not in progress.ran:
            probed = ", and an adapter in its place got no gradient" if target.layout.probed else ""
            reasons[name] = f"never ran in {progress.batches} batches{probed}"
        elif name not in progress.got_gradient or (not found and target.parts == 1):
            reasons[name] = "ran, but got no gradient (is its output used by the loss?)"
        elif all(factor.norm == 0 for factor in found):
            reasons[name] = "its gradient is exactly zero"
    return reasons


def warn_thin(layers: Mapping[str, LowRank], targets: Mapping[str, Target]) -> None:
    """Say which layers take rounding noise for directions, because their gradient has fewer than 2r of them.

    Args:
        layers: Part → the directions found.
        targets: Part → its layer.
    """
    thin = []
    for name, layer in layers.items():
        wanted = 2 * targets[name].rank
        floor = torch.finfo(layer.S.dtype).eps * max(targets[name].inputs, targets[name].outputs) * layer.S[0]
        found = int((layer.S[:wanted] > floor).sum())
        if found < wanted:
            thin.append(f"  {name}: {found} directions, rank {targets[name].rank} uses {wanted}")
    if thin:
        listed = "\n".join(thin)
        warnings.warn(
            f"Fewer gradient directions than the start uses, in {len(thin)} of {len(layers)} layers:\n{listed}\nThe "
            "rest is arbitrary. Use more or larger batches, or a smaller rank.",
            UserWarning,
            stacklevel=3,
        )


def warn_probed(probed: Sequence[str], layers: int) -> None:
    """Say which layers ran without being seen.

    Args:
        probed: The layers.
        layers: The number of all layers.
    """
    more = f" and {len(probed) - 3} more" if len(probed) > 3 else ""
    warnings.warn(
        f"{len(probed)} of {layers} layers ran without being called, as under fused kernels that read their weights: "
        f"{', '.join(probed[:3])}{more}. Their gradients were heard through a probe adapter, in two more passes over "
        'the batches. If that is all layers, LoraGAConfig(estimator="probe") saves the pass before.',
        UserWarning,
        stacklevel=5,
    )


def refuse_unprobed(targets: Mapping[str, Target], checkpoint: object, *, sharded: bool) -> None:
    """Refuse what `estimator="probe"` cannot do.

    Args:
        targets: The layers.
        checkpoint: The checkpoint asked for, if one is.
        sharded: Whether the model's parameters are spread over processes.

    Raises:
        ValueError: There is a checkpoint, the parameters are sharded, or a layer's factors are not two linear maps.
    """
    if sharded:
        raise ValueError(
            'estimator="probe" puts factors of its own into the layers, which a sharded model cannot take. Call this '
            'before the model is sharded, or use estimator="streaming".'
        )
    if checkpoint is not None:
        raise ValueError(
            f'estimator="probe" keeps no running state, but a checkpoint was asked for ({checkpoint}). Leave it out, '
            'or use estimator="streaming", which probes the layers that it cannot hear otherwise.'
        )
    others = [name for name, target in targets.items() if not target.layout.probed]
    if others:
        kind = type(targets[others[0]].layer.get_base_layer()).__name__
        more = f" ({len(others) - 1} more layers like this)" if len(others) > 1 else ""
        raise ValueError(
            f'{others[0]} is a {kind}, and estimator="probe" works on linear layers only{more}. Use '
            'estimator="streaming", which probes the linear layers that it cannot hear otherwise, or leave it out.'
        )


def silent_parts(targets: Mapping[str, Target], factors: Mapping[str, LowRank | None]) -> dict[str, str]:
    """The parts (experts, groups) without a gradient of layers that have one, with a warning that counts them.

    Args:
        targets: The layers that have one.
        factors: Part → the directions found.

    Returns:
        Part → why it starts as plain LoRA.
    """
    parts = [key for target in targets.values() if target.parts > 1 for key in target.keys]
    silent = [key for key in parts if (factor := factors.get(key)) is None or factor.norm == 0]
    if silent:
        warn_silent(len(silent), len(parts), silent[0])
    return dict.fromkeys(silent, "got no token")


def warn_silent(silent: int, parts: int, first: str) -> None:
    """Say how many parts start as plain LoRA.

    Args:
        silent: Their number.
        parts: The number of all parts.
        first: The name of one of them.
    """
    warnings.warn(
        f"{silent} of {parts} experts (or groups) got no gradient, as {first}: no token reached them. They start as "
        "plain LoRA; use more batches to reach them.",
        UserWarning,
        stacklevel=4,
    )


def settle_missing(reasons: Mapping[str, str], targets: Mapping[str, Target], on_missing: str) -> None:
    """Raise or warn about layers that cannot be aligned.

    Args:
        reasons: Layer name → why.
        targets: All layers of the adapter.
        on_missing: The configuration's choice.

    Raises:
        ValueError: There are such layers and `on_missing` is "error", or all layers are.
    """
    if not reasons:
        return
    listed = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
    count = f"{len(reasons)} of {len(targets)} layers cannot be aligned:\n{listed}\n"
    if len(reasons) == len(targets):
        raise ValueError(count + "No layer is left. Check target_modules, the batches and the loss.")
    if on_missing == "error":
        raise ValueError(
            count + 'Leave them out of target_modules, or set on_missing="lora" to start them as plain LoRA.'
        )
    warnings.warn(count + "They start as plain LoRA.", UserWarning, stacklevel=3)
