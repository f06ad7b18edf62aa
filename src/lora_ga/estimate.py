"""The gradient estimate: batches → loss → backward → {layer name: LowRank}. Reads the model, changes nothing."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor

from lora_ga.accumulate import ESTIMATORS, Accumulator
from lora_ga.capture import Heard, record
from lora_ga.config import LoraGAConfig
from lora_ga.forms import EXPERTS
from lora_ga.frozen import device_of, frozen, in_half, random_state_kept
from lora_ga.gradient import GradientEstimate
from lora_ga.loss import BatchError, LossFunction, weighed_loss
from lora_ga.lowrank import LowRank
from lora_ga.store import fingerprint
from lora_ga.targets import Target, find_targets
from lora_ga.weights import record_weights


def _run(
    model: PeftModel,
    data: Iterable[Any],
    accumulators: Mapping[str, Accumulator],
    targets: Mapping[str, Target],
    limit: int | None,
    loss_fn: LossFunction | None,
) -> tuple[Heard, float, int]:
    """Pass the batches through the model.

    Returns:
        What was heard, the total weight, and the number of batches.

    Raises:
        ValueError: A batch's loss or gradient cannot be used.
    """
    index, weight, total, magnified = 0, 1.0, 0.0, 1.0
    device = device_of(model)
    half = in_half(model, device)

    def sink(name: str, x_TI: Tensor, g_TO: Tensor) -> None:
        try:
            with torch.autocast(g_TO.device.type, enabled=False):
                accumulators[name].add(x_TI, g_TO, weight / magnified)
        except FloatingPointError as error:
            raise ValueError(
                f"batch {index}: {error}. Check that batch, or compute in float32 or bfloat16 (float16 overflows)."
            ) from error

    rows = {name: target.rows for name, target in targets.items()}
    layers = {name: target.layer for name, target in targets.items() if target.form is not EXPERTS}
    owners = {
        name: (target.layer.get_base_layer(), target.layer.parameter_name)
        for name, target in targets.items()
        if target.form is EXPERTS
    }
    with record(layers, sink, rows) as heard, record_weights(owners, sink, rows) as heard_weights:
        for index, batch in enumerate(itertools.islice(data, limit), start=1):
            try:
                loss, weight = weighed_loss(model, send_to_device(batch, device), loss_fn)
            except BatchError as error:
                raise ValueError(f"batch {index}: {error}.") from error
            if half:  # a mean over many tokens would vanish in float16: pass the power of two next to the sum back
                magnified = 2.0 ** round(math.log2(weight))
            if loss.requires_grad:  # else no target ran; said with their names once the pass is over
                (loss * magnified if half else loss).backward()
            total += weight
    heard.ran |= heard_weights.ran
    heard.got_gradient |= heard_weights.got_gradient
    return heard, total, index


def _reasons(
    targets: Mapping[str, Target], heard: Heard, factors: Mapping[str, LowRank | None], batches: int
) -> dict[str, str]:
    """Why layers cannot be aligned, by name."""
    reasons = {}
    for name, target in targets.items():
        found = [factor for key in target.keys if (factor := factors.get(key)) is not None]
        if target.too_small:
            reasons[name] = target.too_small
        elif name not in heard.ran:
            reasons[name] = f"never ran in {batches} batches"
        elif name not in heard.got_gradient or (not found and target.parts == 1):
            reasons[name] = "ran, but got no gradient (is its output used by the loss?)"
        elif all(factor.norm == 0 for factor in found):
            reasons[name] = "its gradient is exactly zero"
    return reasons


def _warn_thin(layers: Mapping[str, LowRank], targets: Mapping[str, Target]) -> None:
    """Say which layers take rounding noise for directions, because their gradient has fewer than 2r of them."""
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


def _silent_parts(targets: Mapping[str, Target], factors: Mapping[str, LowRank | None]) -> dict[str, str]:
    """The parts (experts, groups) without a gradient of layers that have one, with a warning that counts them."""
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
            count + 'Leave them out of target_modules, or pass LoraGAConfig(on_missing="lora") to start them as '
            "plain LoRA."
        )
    warnings.warn(count + "They start as plain LoRA.", UserWarning, stacklevel=3)


def estimate_gradients(
    model: PeftModel,
    data: Iterable[Any],
    config: LoraGAConfig = LoraGAConfig(),  # noqa: B008 (frozen)
    *,
    loss_fn: LossFunction | None = None,
    adapter_name: str = "default",
) -> GradientEstimate:
    """Estimate the loss gradient of every weight the adapter adapts, from a few batches.

    The base weights are asked for no gradient: it is read from what passes by, each layer's inputs x and output
    gradients g, as G = Σ gᵀx. The model is left exactly as it was (mode, `requires_grad`, `.grad`, hooks), and so are
    the global random generators, also after an error.

    Args:
        model: A `PeftModel` with a fresh LoRA adapter.
        data: Batches: mappings (keyword arguments of the model), tuples, or whatever `loss_fn` takes. They are moved
            to the model's device. A micro-batch counts by its label tokens, so that many small batches give the
            gradient of the one large one.
        config: The settings; `estimator`, `oversample`, `power_steps`, `max_batches`, `on_missing`, `seed` count here.
        loss_fn: `(model, batch) → loss` or `→ (loss, weight)`, the loss being a mean and the weight the number of
            terms it is a mean over. By default `model(**batch).loss`.
        adapter_name: The adapter that is to be aligned.

    Returns:
        The estimate, of the gradient of the mean loss.

    Raises:
        TypeError: The model is not a `PeftModel`.
        ValueError: The adapter cannot be aligned; there are no batches; a batch has no label, no loss, or a loss or
            gradient that is not finite; layers without a gradient (see `on_missing`).
    """
    targets = find_targets(model, adapter_name)
    too_small = {name: target.too_small for name, target in targets.items() if target.too_small}
    if config.on_missing == "error":
        settle_missing(too_small, targets, "error")
    kind = ESTIMATORS[config.estimator]
    fitting = {name: target for name, target in targets.items() if name not in too_small}
    accumulators: dict[str, Accumulator] = {
        key: kind(key, target.inputs, 2 * target.rank + config.oversample, config.power_steps, config.seed)
        for target in fitting.values()
        for key in target.keys
    }
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode() is on, in which there are no gradients; call this outside of it.")
    eager = torch.compiler.set_stance("force_eager")  # compiled graphs do not know of hooks
    with random_state_kept(), torch.enable_grad(), eager, frozen(model, adapter_name):
        heard, weight, batches = _run(model, data, accumulators, fitting, config.max_batches, loss_fn)
    if batches == 0:
        raise ValueError("The data holds no batch; the gradient needs at least one. An iterator may be used up.")
    with torch.no_grad(), torch.autocast(device_of(model).type, enabled=False):
        factors = {name: accumulator.factors() for name, accumulator in accumulators.items()}
    reasons = _reasons(targets, heard, factors, batches)
    settle_missing(reasons, targets, config.on_missing)
    aligned = {name: target for name, target in fitting.items() if name not in reasons}
    silent = _silent_parts(aligned, factors)
    by_key = {key: target for target in aligned.values() for key in target.keys}
    layers = {
        key: factor.scaled(1 / weight)
        for key, factor in factors.items()
        if factor is not None and key in by_key and key not in silent
    }
    _warn_thin(layers, by_key)
    return GradientEstimate(layers, config, fingerprint(model), weight, batches, reasons | silent)
