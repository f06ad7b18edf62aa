"""Writing an adapter: factors in delta coordinates in the place of PEFT's, and their starts A₀ and B₀.

Only this module and `load` change an adapter. A structure without a start is plain LoRA: A₀ and B₀ are what PEFT drew,
one of which is zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_ga.adapter.model_card import section
from lora_ga.adapter.plan import make_plan, on_meta
from lora_ga.adapter.save import RANK_FIELDS, AlignedLoraConfig, Alignment
from lora_ga.config import LoraGAConfig
from lora_ga.distributed.processes import Held, check_same, processes
from lora_ga.distributed.sharding import adopt, partitioned, placed_like, unwrapped, whole
from lora_ga.distributed.tensor_parallel import check_together
from lora_ga.files import fingerprint
from lora_ga.gradients.coverage import settle_missing
from lora_ga.gradients.isolation import place_of
from lora_ga.gradients.result import GradientEstimate
from lora_ga.layers.embedding import FactorTable
from lora_ga.layers.factors import FACTORS, Delta, Factor, follow
from lora_ga.layers.kinds import base_weights, entries, layout_of, weight_of
from lora_ga.layers.targets import SHIFTED_BASES, Target, find_targets


class FactorDict(nn.ModuleDict):
    """PEFT's factors of a layer by adapter; one added with an aligned adapter's configuration gets its structure.

    TRL's preference trainers add such an adapter as their reference and copy into it parameter by parameter, by name.
    """

    def __init__(self, path: str, factors: nn.ModuleDict, configs: dict[str, Any]) -> None:
        super().__init__()
        self.path = path  # of the layer
        self.configs = configs  # of the model's adapters: PEFT enters a new one there before it makes its layers
        for name, factor in factors.items():
            self.add_module(name, factor)

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(key, _structured(self.path, self.configs, self._modules.get, key, module))


class EmbeddingDict(FactorTable):
    """The same of an embedding, whose factors PEFT keeps as parameters."""

    def __init__(self, path: str, factors: nn.ParameterDict, configs: dict[str, Any]) -> None:
        super().__init__()
        self.path, self.configs = path, configs
        for name, value in factors.items():
            super().__setitem__(name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        held = dict(self.items())
        if not isinstance(held.get(key), Factor):  # else PEFT puts back what it has read and moved
            value = _structured(self.path, self.configs, held.get, key, value)
        super().__setitem__(key, value)


def _structured(path: str, configs: dict[str, Any], held: Callable[[str], Any], key: str, new: Any) -> Any:
    """What adapter `key` gets in place of PEFT's factor `new`: one like its model's, if its configuration has one.

    Args:
        path: The layer's.
        configs: Of the model's adapters.
        held: Adapter → its factor in the layer.
        key: The adapter.
        new: What PEFT has made.

    Returns:
        The factor, or `new`.
    """
    alignment = getattr(configs.get(key), "alignment", None)
    if alignment is None or isinstance(new, Factor):
        return new
    alignment = _alignment_of_its_own(configs, key)
    model = held(alignment.twin or key)
    if not isinstance(model, Delta):
        return new
    trained, bias = nn.Parameter(torch.zeros_like(model.start)), getattr(new, "bias", None)
    factor = type(model)(model.start, trained, bias, rank=model.rank, parts=model.parts, compute=model.compute)
    alignment.factors[path] = (*alignment.factors.get(path, ()), factor)
    return factor


def _alignment_of_its_own(configs: dict[str, Any], key: str) -> Alignment:
    """The alignment of adapter `key`, no longer shared with the adapter whose configuration it was given."""
    config = configs[key]
    twin = next((name for name, other in configs.items() if name != key and other is config), None)
    if twin is not None:
        config = AlignedLoraConfig.of(config, dataclasses.replace(config.alignment, factors={}, twin=twin))
        configs[key] = config
    return config.alignment


def make_factors(
    layer: LoraLayer, adapter_name: str, offset: str, *, rank: int, starts: tuple[Tensor, Tensor] | None = None
) -> tuple[Factor, Factor]:
    """Factors with deltas of zero, for the place of PEFT's.

    Without `starts` they begin at PEFT's values, which are a start with a product of zero, and take over its parameters
    (which an optimizer may hold) with their values changed. Those on the meta device have neither: there the parameters
    are new, and zero until the factors are filled.

    Args:
        layer: The layer.
        adapter_name: The adapter.
        offset: "adapter" or "base".
        rank: PEFT's rank r of the adapter that trains.
        starts: A₀ and B₀, as PEFT lays them out; the parameters are then new.

    Returns:
        The factors of A and B.

    Raises:
        ValueError: DeepSpeed ZeRO-3 has taken the parameters apart already.
    """
    layout, made = layout_of(layer), []
    for side, (entry, kind) in enumerate(zip(entries(layer, adapter_name), FACTORS[offset], strict=True)):
        old: Any = weight_of(entry)
        parameter, start = old, old
        if starts is not None:
            start = starts[side]
        elif partitioned(old):
            raise ValueError(
                "The adapter's parameters are taken apart by DeepSpeed ZeRO-3, which cannot be told of a new "
                "structure. Use LoraGACallback, or call lora_ga.initialize before the model is given to DeepSpeed."
            )
        elif old.is_meta:
            start = torch.zeros_like(old, device=place_of(layer))
        if start is not old:
            zeros = torch.zeros(start.shape, dtype=old.dtype, device=start.device)
            parameter = nn.Parameter(placed_like(zeros, old, start.device), old.requires_grad)
        start = whole(start)
        bias = getattr(entry, "bias", None)
        factor = kind(start, parameter, bias, rank=rank, parts=layout.parts(layer), compute=layout.compute(entry))
        follow(factor, layer.get_base_layer())
        with torch.no_grad():
            factor.set_delta(torch.zeros_like(factor.start))
        made.append(factor.train(getattr(entry, "training", layer.training)))
    return made[0], made[1]


def place(layer: LoraLayer, adapter_name: str, pair: tuple[Factor, Factor], path: str, configs: dict[str, Any]) -> None:
    """Put factors in the place of PEFT's.

    Args:
        layer: The LoRA layer.
        adapter_name: The adapter.
        pair: The factors of A and B.
        path: The layer's, in the base model.
        configs: The configurations of the model's adapters.
    """
    embedded = adapter_name in layer.lora_embedding_A
    for letter, factor in zip("AB", pair, strict=True):
        attribute = f"lora_embedding_{letter}" if embedded else f"lora_{letter}"
        table: Any = getattr(layer, attribute)
        kind = EmbeddingDict if embedded else FactorDict
        if not isinstance(table, kind):
            table = kind(path, table, configs)
        setattr(layer, attribute, table)
        table[adapter_name] = factor


def build(
    model: PeftModel, targets: Mapping[str, Target], plain: Mapping[str, Target], config: LoraGAConfig, adapter: str
) -> Alignment:
    """Give layers the structure, without a start: the model's function and the trained parameters stay what they are.

    Args:
        model: The model.
        targets: The layers, fresh.
        plain: The other layers of the adapter, which stay plain LoRA.
        config: The settings; `offset` counts here.
        adapter: The adapter's name.

    Returns:
        What is now written into the adapter's configuration.
    """
    peft_config = model.peft_config[adapter]
    alignment = Alignment(
        factors={},
        scaling={name: target.layer.scaling[adapter] for name, target in targets.items()},
        config=config,
        fingerprint=fingerprint(model),
        plain={name: (target.layer.r[adapter], target.layer.lora_alpha[adapter]) for name, target in plain.items()},
        original={field: getattr(peft_config, field) for field in RANK_FIELDS},
    )
    moved: dict[nn.Module, tuple[nn.Module, str]] = {}
    for name, target in targets.items():
        rank = target.layer.r[adapter]
        pair = alignment.factors[name] = make_factors(target.layer, adapter, config.offset, rank=rank)
        moved |= {
            old: (factor, factor.trainable_name)
            for old, factor in zip(entries(target.layer, adapter), pair, strict=True)
            if isinstance(old, nn.Module)
        }
        place(target.layer, adapter, alignment.factors[name], name, model.peft_config)
        if config.offset == "adapter":
            set_rank(target.layer, adapter, 2 * rank)
    adopt(model, moved)
    changes = alignment.rank_fields(peft_config) if config.offset == "adapter" else {}
    model.peft_config[adapter] = AlignedLoraConfig.of(peft_config, alignment, **changes)
    return alignment


def fill(alignment: Alignment, starts: Mapping[str, tuple[Tensor, Tensor]], targets: Mapping[str, Target]) -> None:
    """Give factors their starts, in place; with `offset="base"` also take the product out of the base weights.

    Args:
        alignment: Of the adapter, whose factors are fresh.
        starts: Layer name → A₀ and B₀, as PEFT lays them out.
        targets: The layers.
    """
    for name, pair in starts.items():
        for factor, start in zip(alignment.factors[name], pair, strict=True):
            factor.begin_at(start)
        if alignment.config.offset == "base":
            a, b = alignment.factors[name]
            shift_base(targets[name].layer, a.start, b.start, alignment.scaling[name])


@torch.no_grad()
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


def set_rank(layer: LoraLayer, adapter_name: str, rank: int) -> None:
    """Tell PEFT the rank a layer computes with, the scaling staying what it is.

    Args:
        layer: The LoRA layer.
        adapter_name: The adapter.
        rank: The rank of the matrices the layer multiplies with.
    """
    root = math.sqrt(rank) if layer.use_rslora[adapter_name] else rank
    layer.r[adapter_name] = rank
    layer.lora_alpha[adapter_name] = layer.scaling[adapter_name] * root


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
