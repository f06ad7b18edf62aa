"""LoRA-GA's structure in an adapter: factors that train their difference from a start, in the place of PEFT's.

An adapter with the structure and without an estimate is plain LoRA: its start A₀, B₀ is what PEFT drew, and one of the
two is zero.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_ga.adapter.alignment import RANK_FIELDS, Alignment, ModelReference, alignment_of, factors_of
from lora_ga.adapter.file import Padded, compiled_names, load_padded
from lora_ga.adapter.save import AlignedLoraConfig
from lora_ga.base import base_model, fingerprint
from lora_ga.config import LoraGAConfig
from lora_ga.distributed.sharding import partitioned, placed_like, register_moved, whole
from lora_ga.gradients.coverage import report_missing
from lora_ga.gradients.isolation import compute_device
from lora_ga.layers.embedding import FactorTable
from lora_ga.layers.factors import FACTORS, Factor, follow_plan
from lora_ga.layers.kinds import entries, layout_of, weight_of
from lora_ga.layers.plain import convolves
from lora_ga.layers.targets import Target, find_targets, layer_name, peft_model_in
from lora_ga.layers.tied import TiedFactor, tied_heads


def give_structure(model: nn.Module, config: LoraGAConfig, adapter_name: str) -> None:
    """Give a fresh adapter the structure now, so that `apply_estimate` can give it its start in place later.

    Trainers need this: an optimizer and wrappers take the parameters before the gradient can be estimated. Until its
    start the adapter computes and trains as the plain LoRA it was, except that weight decay pulls A towards its initial
    value instead of zero. Layers that are too small for their rank stay plain LoRA, if `on_missing` allows it. An
    adapter that has the structure is left as it is.

    Args:
        model: A model with a fresh LoRA adapter, or a network that contains one (see `estimate_gradients`).
        config: The settings.
        adapter_name: The adapter.

    Raises:
        TypeError: There are no LoRA layers.
        ValueError: The adapter cannot be aligned, or is on the meta device, so that it cannot compute until its start.
    """
    targets = find_targets(model, adapter_name)
    if alignment_of(model, adapter_name) is not None:
        return
    for name, target in targets.items():
        if on_meta(target, adapter_name):
            raise ValueError(
                f"{name}: its adapter is on the meta device and has no values to compute with until it is started. "
                "Make the adapter without low_cpu_mem_usage, or start it at once with lora_ga.initialize."
            )
    unfit = {name: target.unfit for name, target in targets.items() if target.unfit}
    if config.on_missing == "error" or len(unfit) == len(targets):
        report_missing(unfit, targets, config.on_missing)
    aligned = {name: target for name, target in targets.items() if name not in unfit}
    build_structure(model, aligned, {name: targets[name] for name in unfit}, config, adapter_name)


def on_meta(target: Target, adapter_name: str) -> bool:
    """Whether a layer's adapter is on the meta device, without values."""
    return not target.unknown and any(weight_of(entry).is_meta for entry in entries(target.layer, adapter_name))


def build_structure(
    network: nn.Module, targets: Mapping[str, Target], plain: Mapping[str, Target], config: LoraGAConfig, adapter: str
) -> Alignment:
    """Give layers the structure. The model's function and the trained parameters' identities do not change.

    Args:
        network: The model, or the network that contains it.
        targets: The layers, fresh.
        plain: The adapter's other layers, which stay plain LoRA.
        config: The settings; only `offset` is used here.
        adapter: The adapter's name.

    Returns:
        The adapter's record, which its configuration now holds.
    """
    model = peft_model_in(network)
    peft_config = model.peft_config[adapter]
    ranks = {name: target.layer.r[adapter] for name, target in targets.items()}
    plain_layers = {name: target.layer for name, target in plain.items()}
    for target in plain.values():
        plain_layers |= target.heads
    alignment = Alignment(
        model=ModelReference(model),
        adapter_name=adapter,
        scaling={name: target.layer.scaling[adapter] for name, target in targets.items()},
        config=config,
        fingerprint=fingerprint(model),
        plain={name: (layer.r[adapter], layer.lora_alpha[adapter]) for name, layer in plain_layers.items()},
        original={field: getattr(peft_config, field) for field in RANK_FIELDS},
    )
    moved = _place_factors(targets, ranks, config, adapter)
    follow_ties(model, adapter)
    register_moved(network, moved)
    heads = {head: name for name, target in targets.items() for head in target.heads}
    ranks |= {head: ranks[name] for head, name in heads.items()}
    scaling = alignment.scaling | {head: alignment.scaling[name] for head, name in heads.items()}
    layers = {name: target.layer for name, target in targets.items()} | plain_layers
    names = {name: layout_of(layer).pattern_name(layer, name) for name, layer in layers.items()}
    doubled, alignment.saved = _doubled_fields(peft_config, ranks, scaling, alignment.plain, names)
    alignment.padded = load_padded_layers(
        {name: target.layer for name, target in plain.items() if not target.heads}, adapter
    )
    if alignment.padded:
        ranks |= {name: layer.rank for name, layer in alignment.padded.items()}
        scaling |= {name: plain_layers[name].scaling[adapter] for name in alignment.padded}
        others = {name: own for name, own in alignment.plain.items() if name not in alignment.padded}
        alignment.padded_fields = operator.or_(*_doubled_fields(peft_config, ranks, scaling, others, names))
    if config.offset == "base":
        alignment.saved, doubled = doubled | alignment.saved, {}
    model.peft_config[adapter] = AlignedLoraConfig.of(peft_config, alignment, **doubled)
    if isinstance(model, PeftModel):
        follow_adapters(model)
    return alignment


def _place_factors(
    targets: Mapping[str, Target], ranks: Mapping[str, int], config: LoraGAConfig, adapter: str
) -> dict[nn.Module, tuple[nn.Module, str]]:
    """Put factors in the place of PEFT's in all layers.

    Returns:
        PEFT's module of a factor → the factor, and the name of its parameter.
    """
    moved: dict[nn.Module, tuple[nn.Module, str]] = {}
    for name, target in targets.items():
        pair = make_factors(target.layer, adapter, config.offset, rank=ranks[name])
        moved |= {
            old: (factor, factor.trainable_name)
            for old, factor in zip(entries(target.layer, adapter), pair, strict=True)
            if isinstance(old, nn.Module)
        }
        place(target.layer, adapter, pair)
        for layer in (target.layer, *target.heads.values()):
            if config.offset == "adapter":
                set_rank(layer, adapter, 2 * ranks[name])
    return moved


def _doubled_fields(
    config: LoraConfig,
    ranks: Mapping[str, int],
    scaling: Mapping[str, float],
    plain: Mapping[str, tuple[int, float]],
    names: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rank fields of rank 2r, and those of a file that differ from them.

    Args:
        config: The configuration of rank r.
        ranks: Layer name → r, of the layers of rank 2r.
        scaling: Layer name → s, of the same layers.
        plain: Layer name → (r, α), of the others.
        names: Layer name → the name that PEFT compares with patterns, where it is another.

    Returns:
        Both.
    """
    own = {names.get(name, name): (rank, scaling[name]) for name, rank in ranks.items()}
    others = {names.get(name, name): pair for name, pair in plain.items()}
    ranks, scaling = {name: rank for name, (rank, _) in own.items()}, {name: s for name, (_, s) in own.items()}
    doubled = doubled_rank_fields(config, ranks, scaling, others)
    return doubled, without_rslora(config, doubled, ranks, scaling, others)


def make_factors(
    layer: LoraLayer, adapter_name: str, offset: str, *, rank: int, starts: tuple[Tensor, Tensor] | None = None
) -> tuple[Factor, Factor]:
    """Make factors with deltas of zero, to put in the place of PEFT's.

    Without `starts` the factors begin at PEFT's values, whose product is zero. They take over PEFT's parameters, which
    an optimizer may hold, and change their values. Parameters on the meta device cannot be taken over: the factors get
    new ones, and a start of zero.

    Args:
        layer: The layer.
        adapter_name: The adapter.
        offset: "adapter" or "base".
        rank: PEFT's rank r of the adapter that trains.
        starts: A₀ and B₀, in PEFT's layout; the factors then get new parameters.

    Returns:
        The factors of A and B.

    Raises:
        ValueError: DeepSpeed ZeRO-3 has partitioned the parameters already.
    """
    layout, made = layout_of(layer), []
    for side, (entry, kind) in enumerate(zip(entries(layer, adapter_name), FACTORS[offset], strict=True)):
        old: Any = weight_of(entry)
        parameter, start = old, old
        if starts is not None:
            start = starts[side]
        elif partitioned(old):
            raise ValueError(
                "The adapter's parameters are partitioned by DeepSpeed ZeRO-3, which does not follow a change of the "
                "modules. Use LoraGACallback, or call lora_ga.initialize before DeepSpeed wraps the model."
            )
        elif old.is_meta:
            start = torch.zeros_like(old, device=compute_device(layer))
        if start is not old:
            zeros = torch.zeros(start.shape, dtype=old.dtype, device=start.device)
            parameter = nn.Parameter(placed_like(zeros, old, start.device), old.requires_grad)
        start = whole(start)
        bias = getattr(entry, "bias", None)
        factor = kind(start, parameter, bias, rank=rank, parts=layout.parts(layer), compute=layout.compute(entry))
        follow_plan(factor, layer.get_base_layer())
        with torch.no_grad():
            factor.set_delta(torch.zeros_like(factor.start))
        made.append(factor.train(getattr(entry, "training", layer.training)))
    return made[0], made[1]


def place(layer: LoraLayer, adapter_name: str, pair: tuple[Factor, Factor]) -> None:
    """Put factors in the place of PEFT's.

    Args:
        layer: The LoRA layer.
        adapter_name: The adapter.
        pair: The factors of A and B.
    """
    embedded = adapter_name in layer.lora_embedding_A
    for letter, factor in zip("AB", pair, strict=True):
        attribute = f"lora_embedding_{letter}" if embedded else f"lora_{letter}"
        table: Any = getattr(layer, attribute)
        if embedded and not isinstance(table, FactorTable):
            table = FactorTable(table)
            setattr(layer, attribute, table)
        table[adapter_name] = factor


def follow_ties(model: PeftModel, adapter_name: str) -> None:
    """Let the heads that PEFT has tied to an embedding compute with its factors, if these have the structure.

    Args:
        model: The model.
        adapter_name: The adapter.
    """
    for head, embedding in tied_heads(model, adapter_name).items():
        layer: Any = model.get_submodule(head)
        source: Any = model.get_submodule(embedding)
        a, b = entries(source, adapter_name)
        if isinstance(a, Factor):
            layer.lora_A[adapter_name], layer.lora_B[adapter_name] = TiedFactor(b), TiedFactor(a)


def set_rank(layer: LoraLayer, adapter_name: str, rank: int) -> None:
    """Set the rank that PEFT reads from a layer, and α with it, so that the scaling stays the same.

    Args:
        layer: The LoRA layer.
        adapter_name: The adapter.
        rank: The rank of the matrices the layer multiplies with.
    """
    root = math.sqrt(rank) if layer.use_rslora[adapter_name] else rank
    layer.r[adapter_name] = rank
    layer.lora_alpha[adapter_name] = layer.scaling[adapter_name] * root


def doubled_rank_fields(
    config: LoraConfig, ranks: Mapping[str, int], scaling: Mapping[str, float], plain: Mapping[str, tuple[int, float]]
) -> dict[str, Any]:
    """The rank fields of the rank-2r adapter's configuration, with the scaling of every layer unchanged.

    If all layers are aligned, the user's patterns are doubled. Otherwise each layer that differs from the default gets
    an entry with its full name: PEFT writes patterns sorted and takes the first that matches, so entries for single
    layers cannot be mixed with the user's patterns.

    Args:
        config: The configuration of rank r.
        ranks: Name in patterns → r, of the aligned layers.
        scaling: Name in patterns → s, of the aligned layers.
        plain: Name in patterns → (r, α), of the plain layers.

    Returns:
        Values of `RANK_FIELDS`.
    """
    root = math.sqrt(2) if config.use_rslora else 2
    rank_pattern = {key: 2 * value for key, value in (config.rank_pattern or {}).items()}
    alpha_pattern = {key: root * value for key, value in (config.alpha_pattern or {}).items()}
    rank, alpha = 2 * config.r, root * config.lora_alpha
    if plain:
        layers = dict(plain)
        for name in ranks:
            full = 2 * ranks[name]
            layers[name] = (full, scaling[name] * (math.sqrt(full) if config.use_rslora else full))
        rank_pattern, alpha_pattern = patterns_of(layers, rank, alpha)
    return {"r": rank, "lora_alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}


def patterns_of(
    layers: Mapping[str, tuple[int, float]], rank: int, alpha: float
) -> tuple[dict[str, int], dict[str, float]]:
    """The rank and alpha patterns that give each layer its own numbers.

    Args:
        layers: Name in patterns (see `WeightLayout.pattern_name`) → (r, α).
        rank: The rank without a pattern.
        alpha: The α without a pattern.

    Returns:
        An entry with its full name for each layer that differs.
    """
    ranks = {f"^{re.escape(name)}": own for name, (own, _) in layers.items() if own != rank}
    return ranks, {f"^{re.escape(name)}": own for name, (_, own) in layers.items() if own != alpha}


def load_padded_layers(layers: Mapping[str, LoraLayer], adapter: str) -> dict[str, Padded]:
    """Let plain layers load the matrices of a file that was padded to twice their rank.

    Args:
        layers: Layer name → plain LoRA layer.
        adapter: The adapter's name.

    Returns:
        Layer name → how it is padded, of the layers whose matrices are whole.
    """
    found = {}
    for name, layer in layers.items():
        if (padded := padding_of(layer, adapter)) is not None:
            found[name] = padded
            for letter, table in zip("AB", layout_of(layer).factor_tables, strict=True):
                load_padded(getattr(layer, table), adapter, padded, letter)
    return found


def padding_of(layer: LoraLayer, adapter: str, *, loaded: bool = False) -> Padded | None:
    """How a file holds a plain layer at twice its rank.

    Args:
        layer: The layer.
        adapter: The adapter's name.
        loaded: Whether the layer was loaded from such a file, and has twice its rank.

    Returns:
        The rank that trains, and the sizes of its matrices; None if they are not whole in this process, or if zeros
        would change what PEFT computes from the others.
    """
    rank, parts, pair = layer.r[adapter], layout_of(layer).parts(layer), entries(layer, adapter)
    if not all(convolves(entry) for entry in pair):
        return None
    a, b = (weight_of(entry) for entry in pair)
    rows, columns = a.shape[0], b.shape[1] if b.dim() > 1 else 0
    if (rows, columns) not in ((rank * parts, rank * parts), (rank, rank // parts)):  # a convolution divides its rank
        return None
    by = 2 if loaded else 1
    return Padded(rank // by, parts, rows // by, columns // by)


def without_rslora(
    config: LoraConfig,
    doubled: Mapping[str, Any],
    ranks: Mapping[str, int],
    scaling: Mapping[str, float],
    plain: Mapping[str, tuple[int, float]],
) -> dict[str, Any]:
    """The fields by which a saved adapter has the same scalings without rsLoRA: α/r is the scaling of every layer.

    llama.cpp's converter, mlx and others compute α/r and know nothing of rsLoRA.

    Args:
        config: The configuration of rank r.
        doubled: Its rank fields at rank 2r.
        ranks: Name in patterns → r, of the aligned layers.
        scaling: Name in patterns → s, of the aligned layers.
        plain: Name in patterns → (r, α), of the plain layers.

    Returns:
        The fields; none if the adapter does not use rsLoRA.
    """
    if not config.use_rslora:
        return {}
    alpha = _alpha(config.lora_alpha / math.sqrt(config.r), doubled["r"])
    layers = {name: _alpha(scaling[name], 2 * rank) for name, rank in ranks.items()}
    layers |= {name: _alpha(own / math.sqrt(rank), rank) for name, (rank, own) in plain.items()}
    pattern = {f"^{re.escape(name)}": own for name, own in layers.items() if own != alpha}
    return {"use_rslora": False, "lora_alpha": alpha, "alpha_pattern": pattern}


def _alpha(scaling: float, rank: int) -> float:
    """The α with which α/rank is the scaling exactly, if there is one."""
    alpha = scaling * rank
    near = (alpha, math.nextafter(alpha, 0), math.nextafter(alpha, math.inf))
    return next((each for each in near if each / rank == scaling), alpha)


def copy_structure(model: PeftModel, source: str, target: str) -> None:
    """Give a fresh adapter the structure and the start of an aligned one, with deltas of zero.

    The parameters of the two then have the same names (up to the adapter's) and shapes, so values can be copied one by
    one. Layers that are plain LoRA in the source stay so in the target.

    Args:
        model: The model.
        source: An adapter aligned with offset="adapter".
        target: An adapter that was made with the source's configuration, of rank 2r.

    Raises:
        ValueError: The source does not have the structure, or has it with offset="base".
    """
    alignment = alignment_of(model, source)
    if alignment is None or alignment.config.offset == "base":
        raise ValueError(f'Adapter {source!r} has no structure to copy; it needs LoRA-GA\'s, with offset="adapter".')
    layers: dict[str, Any] = {layer_name(path): module for path, module in model.named_modules()}
    for name, (a, b) in factors_of(model, source).items():
        layer = layers[name]
        if target in layer.r:
            pair = make_factors(layer, target, "adapter", rank=a.rank, starts=(a.start, b.start))
            place(layer, target, pair)
    load_padded_layers({name: layers[name] for name in alignment.padded if target in layers[name].r}, target)
    for head in tied_heads(model, source):
        layer = model.get_submodule(head)
        if target not in layer.r:  # PEFT ties the head of the first adapter alone
            layer.update_layer(
                target, layer.r[source], layer.lora_alpha[source], config=model.peft_config[target], target_name=head
            )
    follow_ties(model, target)
    copied = dataclasses.replace(alignment, adapter_name=target)
    model.peft_config[target] = AlignedLoraConfig.of(model.peft_config[target], copied)


class AddAdapter:
    """`add_adapter` of a model with an aligned adapter: adapters made with its configuration get its structure.

    TRL's preference trainers make their reference adapter with `model.add_adapter("ref", model.peft_config["default"])`
    and copy the parameters of "default" into it by name. PEFT has no event for this, so the method itself is replaced,
    on the one model. It can be copied and pickled with the model. `load_adapter` also calls it, with a configuration
    read from a file, which is nobody else's.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = ModelReference(model)

    def __call__(self, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; arguments as PEFT's."""
        model: Any = self.model()
        assert model is not None, "the model calls it"
        source = next((name for name, config in model.peft_config.items() if config is peft_config), None)
        type(model).add_adapter(model, adapter_name, peft_config, *args, **kwargs)
        alignment = None if source is None else alignment_of(model, source)
        if source is not None and alignment is not None and alignment.config.offset == "adapter":
            copy_structure(model, source, adapter_name)


class LoadAdapter:
    """`load_adapter` of a model whose base was compiled: files have the names of the original base.

    Trainers resume by it. It can be copied and pickled with the model.
    """

    def __init__(self, model: PeftModel, names: Mapping[str, str]) -> None:
        self.model, self.names = ModelReference(model), dict(names)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter; arguments and result as PEFT's."""
        model: Any = self.model()
        assert model is not None, "the model calls it"
        return type(model).load_adapter(model, *args, **({"key_mapping": self.names} | kwargs))


def follow_adapters(model: PeftModel) -> None:
    """From now on give the structure to adapters that are added with an aligned adapter's configuration.

    In a model with a compiled base, adapters are also loaded by the names of the original base.

    Args:
        model: The model.
    """
    model.add_adapter = AddAdapter(model)
    if names := compiled_names(base_model(model)):
        model.load_adapter = LoadAdapter(model, names)
