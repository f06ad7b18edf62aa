"""The structure of an aligned adapter: factors in delta coordinates in the place of PEFT's, and their starts.

Only this module, `adapter` and `restore` change a model. A structure without a start is plain LoRA: A₀ is the A that
PEFT drew, B₀ is zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_ga.config import LoraGAConfig
from lora_ga.factors import FACTORS, Delta, Factor
from lora_ga.sidecar import RANK_FIELDS, AlignedLoraConfig, Alignment
from lora_ga.store import fingerprint
from lora_ga.targets import SHIFTED_BASES, Target, base_weight


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
        alignment = getattr(self.configs.get(key), "alignment", None)
        if alignment is not None and isinstance(module, nn.Linear) and not isinstance(module, Factor):
            alignment = _alignment_of_its_own(self.configs, key)
            model = self._modules.get(alignment.twin or key)
            if isinstance(model, Delta):
                module = type(model)(model.start, nn.Parameter(torch.zeros_like(model.start)), module.bias)
                alignment.factors[self.path] = (*alignment.factors.get(self.path, ()), module)
        super().__setitem__(key, module)


def _alignment_of_its_own(configs: dict[str, Any], key: str) -> Alignment:
    """The alignment of adapter `key`, no longer shared with the adapter whose configuration it was given."""
    config = configs[key]
    twin = next((name for name, other in configs.items() if name != key and other is config), None)
    if twin is not None:
        config = AlignedLoraConfig.of(config, dataclasses.replace(config.alignment, factors={}, twin=twin))
        configs[key] = config
    return config.alignment


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
        plain={name: (target.rank, target.layer.lora_alpha[adapter]) for name, target in plain.items()},
        original={field: getattr(peft_config, field) for field in RANK_FIELDS},
    )
    for name, target in targets.items():
        alignment.factors[name] = _replace(target, adapter, config.offset, model.peft_config)
        if config.offset == "adapter":
            set_rank(target.layer, adapter, 2 * target.rank)
    changes = alignment.rank_fields(peft_config) if config.offset == "adapter" else {}
    model.peft_config[adapter] = AlignedLoraConfig.of(peft_config, alignment, **changes)
    return alignment


@torch.no_grad()
def _replace(target: Target, adapter: str, offset: str, configs: dict[str, Any]) -> tuple[Factor, Factor]:
    """Put factors in the place of PEFT's, reusing their parameters; returns them."""
    pair = []
    for attribute, kind in zip(("lora_A", "lora_B"), FACTORS[offset], strict=True):
        old = getattr(target.layer, attribute)[adapter]
        factor = kind(old.weight, old.weight, old.bias)
        factor.begin_at(old.weight)
        factor.train(old.training)
        put(factor, target.name, target.layer, attribute, adapter, configs)
        pair.append(factor)
    return pair[0], pair[1]


def put(factor: Factor, path: str, layer: LoraLayer, attribute: str, adapter: str, configs: dict[str, Any]) -> None:
    """Put a factor in the place of PEFT's.

    Args:
        factor: The factor.
        path: The LoRA layer's, in the base model.
        layer: The LoRA layer.
        attribute: "lora_A" or "lora_B".
        adapter: The adapter.
        configs: The configurations of the model's adapters.
    """
    modules = getattr(layer, attribute)
    modules[adapter] = factor
    if not isinstance(modules, FactorDict):
        setattr(layer, attribute, FactorDict(path, modules, configs))


def fill(alignment: Alignment, starts: Mapping[str, tuple[Tensor, Tensor]], targets: Mapping[str, Target]) -> None:
    """Give factors their starts, in place; with `offset="base"` also take the product out of the base weights.

    Args:
        alignment: Of the adapter, whose factors are fresh.
        starts: Layer name → A₀ (r, d_in), B₀ (d_out, r).
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
        a: A₀, (r, d_in).
        b: B₀, (d_out, r).
        scaling: s.
    """
    SHIFTED_BASES.add(layer.get_base_layer())
    weight = base_weight(layer)
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight.copy_(weight.to(wide) - scaling * (b.to(weight.device, wide) @ a.to(weight.device, wide)))


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
