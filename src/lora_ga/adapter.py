"""The writer: puts A₀ and B₀ into a model's adapter, once everything is checked."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from peft import PeftModel

from lora_ga.agreement import check_same
from lora_ga.config import LoraGAConfig
from lora_ga.distributed import Held, processes
from lora_ga.gradient import GradientEstimate
from lora_ga.missing import settle_missing
from lora_ga.plan import make_plan, on_meta
from lora_ga.sharding import unwrapped
from lora_ga.structure import build, fill
from lora_ga.targets import find_targets
from lora_ga.tensor_parallel import check_together
from lora_ga.tracking import section


def apply_estimate(
    model: PeftModel,
    estimate: GradientEstimate,
    config: LoraGAConfig = LoraGAConfig(),  # noqa: B008 (frozen)
    *,
    adapter_name: str = "default",
    process_group: Any = None,
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
        config: The settings; `direction`, `scale`, `stable_gamma`, `reach`, `offset`, `on_missing`, `seed` count here.
        adapter_name: The adapter.
        process_group: As in `estimate_gradients`: all processes call this, and end with the starts of the first.

    Raises:
        TypeError: The model is not a `PeftModel`, or wrapped by FSDP 1.
        RuntimeError: Another process failed, or can no longer be reached.
        ValueError: The adapter cannot be aligned; the estimate belongs to another model or holds too few directions;
            layers are missing from it (see `on_missing`); `offset="base"` on weights that cannot be changed; the
            processes were given different models, estimates or settings.
    """
    write_starts(model, estimate, config, adapter_name, process_group, said=())


def write_starts(
    wrapped: PeftModel,
    estimate: GradientEstimate,
    config: LoraGAConfig,
    adapter_name: str,
    process_group: Any,
    said: Container[str],
) -> None:
    """`apply_estimate`, without repeating the warning about the layers in `said`.

    Raises:
        ValueError: As `apply_estimate`.
    """
    together, held, plan = processes(process_group), Held(), None
    with held:
        check_together(unwrapped(wrapped), together.size)
        plan = make_plan(unwrapped(wrapped), estimate, config, adapter_name, said)
    check_same(together.exchange(held, None if plan is None else plan.identity))
    assert plan is not None
    own = set(together.own(plan.starts))
    shared = together.share({f"{name}.{side}": tensor for name, side, tensor in plan.tensors() if name in own})
    starts = {name: (shared[f"{name}.0"], shared[f"{name}.1"]) for name in plan.starts}
    alignment = plan.alignment
    if alignment is None:
        alignment = build(plan.model, plan.aligned, plan.plain, config, adapter_name)
    fill(alignment, starts, plan.aligned)
    alignment.config = config
    by_key = {key: target for target in plan.aligned.values() for key in target.keys}
    alignment.ranks = {key: target.rank for key, target in by_key.items() if key in estimate}
    alignment.summary = section(estimate, alignment.ranks)


def give_structure(model: PeftModel, config: LoraGAConfig, adapter_name: str) -> None:
    """Prepare a fresh adapter for a start that comes later, before an optimizer or a wrapper sees its parameters.

    It computes and (but for weight decay, which pulls A towards where it began) trains as the plain LoRA it was;
    `apply_estimate` then gives it its start in place. Layers that are too small for their rank stay as they are, if
    `on_missing` allows it. An adapter that is prepared already stays so.

    Args:
        model: A `PeftModel` with a fresh LoRA adapter.
        config: The settings.
        adapter_name: The adapter.

    Raises:
        TypeError: The model is not a `PeftModel`.
        ValueError: The adapter cannot be aligned, or is on the meta device, so that it cannot compute until its start.
    """
    targets = find_targets(model, adapter_name)
    if getattr(model.peft_config[adapter_name], "alignment", None) is not None:
        return
    for name, target in targets.items():
        if on_meta(target, adapter_name):
            raise ValueError(
                f"{name}: its adapter is on the meta device and has no values to compute with until it is started. "
                "Make the adapter without low_cpu_mem_usage, or start it at once with lora_ga.initialize."
            )
    too_small = {name: target.too_small for name, target in targets.items() if target.too_small}
    if config.on_missing == "error" or len(too_small) == len(targets):
        settle_missing(too_small, targets, config.on_missing)
    aligned = {name: target for name, target in targets.items() if name not in too_small}
    build(model, aligned, {name: targets[name] for name in too_small}, config, adapter_name)
