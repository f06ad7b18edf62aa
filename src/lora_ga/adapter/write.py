"""`apply_estimate`: write the start that an estimate gives into an adapter."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_ga.adapter.alignment import Alignment
from lora_ga.adapter.model_card import start_section
from lora_ga.adapter.plan import Plan, make_plan
from lora_ga.adapter.structure import build_structure
from lora_ga.config import LoraGAConfig
from lora_ga.distributed.agreement import check_same
from lora_ga.distributed.processes import DeferredError, processes
from lora_ga.distributed.sharding import in_ddp, unwrapped
from lora_ga.distributed.tensor_parallel import check_together
from lora_ga.gradients.result import GradientEstimate
from lora_ga.layers.kinds import base_weights, layout_of
from lora_ga.layers.targets import SHIFTED_BASES, Target
from lora_ga.linalg.tensor_cores import float32_products


def apply_estimate(
    model: nn.Module,
    estimate: GradientEstimate,
    config: LoraGAConfig = LoraGAConfig(),  # noqa: B008 (frozen)
    *,
    adapter_name: str = "default",
    process_group: Any = None,
) -> None:
    """Write the start that an estimate gives into a fresh adapter. Everything is checked before anything is written.

    The trained parameters have rank r and stay the same objects, which an optimizer may hold already. In both cases
    `save_pretrained` writes a plain rank-2r adapter for the original base.

    - `offset="adapter"`: the adapter computes at rank 2r. The base does not change, nor does the model's function.
    - `offset="base"`: the base weight becomes `W − s·B₀A₀`, rounded to its dtype, as in the paper. The model can then
      be used with this adapter only: `disable_adapter()` and `unload()` give the changed base, and saving or loading
      other adapters is refused.

    Args:
        model: A model with a fresh LoRA adapter, or a network that contains one (see `estimate_gradients`).
        estimate: The estimate, of this base model.
        config: The settings; `direction`, `scale`, `stable_gamma`, `reach`, `offset`, `on_missing`, `seed` count here.
        adapter_name: The adapter.
        process_group: As in `estimate_gradients`: all its processes call this, and get the same start.

    Raises:
        TypeError: There are no LoRA layers, the model is wrapped by FSDP 1, or `estimate` or `config` is of another
            type.
        RuntimeError: Another process failed, or can no longer be reached.
        ValueError: The adapter cannot be aligned; the estimate belongs to another model or holds too few directions;
            layers are missing from it (see `on_missing`); `offset="base"` on weights that cannot be changed; the
            processes were given different models, estimates or settings.
    """
    write_starts(model, estimate, config, adapter_name, process_group, already_warned=())


def write_starts(
    wrapped: nn.Module,
    estimate: GradientEstimate,
    config: LoraGAConfig,
    adapter_name: str,
    process_group: Any,
    already_warned: Container[str],
) -> None:
    """`apply_estimate`, for a caller that has just made the estimate.

    Args:
        wrapped: The model.
        estimate: The estimate.
        config: The settings.
        adapter_name: The adapter.
        process_group: As in `apply_estimate`.
        already_warned: Layers, experts and groups that the estimate has warned about, to be left out of warnings.

    Raises:
        TypeError: As `apply_estimate`.
        ValueError: As `apply_estimate`.
    """
    together, held, plan = processes(process_group), DeferredError(), None
    with held:
        network = unwrapped(wrapped)
        LoraGAConfig.check(config)
        GradientEstimate.check(estimate)
        config = config.resolved()
        check_together(network, together.size)
        plan = make_plan(network, estimate, config, adapter_name, already_warned)
        _check_wrapper(wrapped, plan)
    check_same(together.exchange(held, None if plan is None else plan.identity))
    assert plan is not None
    own = set(together.own(plan.starts))
    shared = together.share({f"{name}.{side}": tensor for name, side, tensor in plan.tensors() if name in own})
    starts = {name: (shared[f"{name}.0"], shared[f"{name}.1"]) for name in plan.starts}
    alignment = plan.alignment
    if alignment is None:
        alignment = build_structure(plan.network, plan.aligned, plan.plain, config, adapter_name)
    _fill(alignment, starts, plan.aligned)
    alignment.config = config
    by_key = {key: target for target in plan.aligned.values() for key in target.keys}
    alignment.ranks = {key: target.rank for key, target in by_key.items() if key in estimate}
    alignment.summary = start_section(estimate, alignment.ranks)


def _check_wrapper(wrapped: nn.Module, plan: Plan) -> None:
    """Refuse to take the parameters of a tied head from DistributedDataParallel, which waits for their gradients.

    Raises:
        ValueError: There is such a head.
    """
    heads = [head for target in plan.aligned.values() for head in target.heads]
    if heads and plan.alignment is None and in_ddp(wrapped):
        raise ValueError(
            f"{heads[0]} is tied to the embedding (ensure_weight_tying) and is to compute with its factors, but "
            "DistributedDataParallel holds the head's own. Call this before the model is wrapped, or use "
            "LoraGACallback."
        )


def _fill(alignment: Alignment, starts: Mapping[str, tuple[Tensor, Tensor]], targets: Mapping[str, Target]) -> None:
    """Give the factors their starts, in place; with `offset="base"` also take the product out of the base weights.

    Args:
        alignment: The record of the adapter, whose factors are fresh.
        starts: Layer name → A₀ and B₀, in PEFT's layout.
        targets: The layers.
    """
    factors = alignment.factors
    for name, pair in starts.items():
        for factor, start in zip(factors[name], pair, strict=True):
            factor.begin_at(start)
        if alignment.config.offset == "base":
            a, b = factors[name]
            shift_base(targets[name].layer, a.start, b.start, alignment.scaling[name])


@torch.no_grad()
@float32_products("ieee")
def shift_base(layer: LoraLayer, a: Tensor, b: Tensor, scaling: float) -> None:
    """`W ← W − s·B₀A₀` in place, computed in float32 or better and rounded once.

    Args:
        layer: The LoRA layer round the base weight.
        a: A₀, as PEFT lays it out: (r, d_in).
        b: B₀, likewise: (d_out, r).
        scaling: s.
    """
    SHIFTED_BASES.add(layer.get_base_layer())
    layout, weight_POI = layout_of(layer), base_weights(layer)
    wide = torch.promote_types(weight_POI.dtype, torch.float32)
    a_PrI = layout.unstack_a(a.to(weight_POI.device, wide), len(weight_POI))
    b_POr = layout.unstack_b(b.to(weight_POI.device, wide), len(weight_POI))
    weight_POI.copy_(weight_POI.to(wide) - scaling * (b_POr @ a_PrI))
