"""Merging a finished adapter into its base model, and writing the model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_ga.adapter.file import check_names, compiled_names
from lora_ga.adapter.save import read_sidecar
from lora_ga.adapter.stock import check_scalings, load_stock
from lora_ga.adapter.undo import base_kept
from lora_ga.base import embeddings
from lora_ga.distributed.sharding import unwrapped
from lora_ga.export.saved_adapter import read_adapter
from lora_ga.files import Companions, check_empty, new_folder, no_companions
from lora_ga.layers.kinds import kind_of, layout_of
from lora_ga.layers.plain import follows_weight
from lora_ga.layers.targets import PREFIX
from lora_ga.layers.tied import tied_heads


def merge_adapter(
    path: str | Path, out: str | Path, *, base: nn.Module, companions: Companions = no_companions
) -> None:
    """Write the base model with an adapter merged into its weights.

    The written model computes what the adapted one does, up to the rounding of the weights' dtype.

    Args:
        path: The adapter's folder.
        out: A new or empty folder.
        base: The original base model, without LoRA layers; its weights are changed in place. torch.compile may have
            wrapped it.
        companions: Called with the new folder before it appears, to write more files into it.

    Raises:
        FileNotFoundError: There is no adapter in `path`.
        TypeError: The base model has no `save_pretrained`.
        ValueError: `out` is not empty, the base or an adapted layer is quantised, blocks of the base are compiled, an
            adapted weight is shared with other modules or is a grouped convolution's, the adapter replicates layers,
            has biases for layers without one, would be scaled otherwise than it was trained, or is damaged, PEFT does
            not find all its layers, the merged weights are not finite, or no configuration describes the merged model.
    """
    target, base = check_empty(out), unwrapped(base)
    if not hasattr(base, "save_pretrained"):
        raise TypeError(f"The base is a {type(base).__name__} without save_pretrained; give a Transformers model.")
    if getattr(base, "is_quantized", False):
        raise ValueError("The base model is quantised; load it in full precision to merge an adapter into it.")
    if compiled_names(base):
        raise ValueError(
            "Blocks of the base model are wrapped by torch.compile, so the merged model would be saved with names that "
            "no program reads. Load the base model again, and merge before its blocks are compiled."
        )
    config, tensors = read_adapter(Path(path))
    if config.layer_replication:
        raise ValueError(
            f"{path}: replicates layers (layer_replication {config.layer_replication}), and the copies share the "
            "base's weights, so it cannot be merged. Use it from Python, by lora_ga.load."
        )
    check_names(Path(path), base)
    sidecar = read_sidecar(path)
    with base_kept(base):
        model = load_stock(base, path)
    try:
        _check_complete(model, tensors)
        if sidecar is not None:
            check_scalings(model, "default", sidecar[1], path)
        _check_mergeable(model)
        heads = tied_heads(model, "default")
        _check_not_shared(model, heads)
    except ValueError:
        model.unload()
        raise
    for head in heads:  # its weight and its change are the embedding's, which is merged once
        model.get_submodule(head).delete_adapter("default")
    ties = _tying_configs(base)
    merged = model.merge_and_unload(safe_merge=True)
    _say_untied(merged, ties)
    with new_folder(target) as folder:
        merged.save_pretrained(folder)
        companions(folder)


def fit_vocabulary(base: Any, path: str | Path) -> None:
    """Give a base model the vocabulary of an adapter that was trained after tokens were added.

    PEFT saves the embedding and the head with such an adapter. Where it has left out one of them, the weights of the
    added tokens are not known, and nothing is changed.

    Args:
        base: The base model.
        path: The adapter's folder.
    """
    _, tensors = read_adapter(Path(path))
    ends = [end for end in embeddings(base) if hasattr(end, "weight")]
    held = [_whole_weights(tensors, next(name for name, m in base.named_modules() if m is end)) for end in ends]
    if len(ends) == 2 and ends[0].weight is ends[1].weight:
        held = [found for found in held if any(".base_layer." in key for key in found)] or held  # it is that of both
    sizes = {frozenset(found.values()) for found in held}
    if len(sizes) == 1 and len(size := sizes.pop()) == 1 and size != {len(ends[0].weight)}:
        base.resize_token_embeddings(*size, mean_resizing=False)  # the adapter has the values


def _whole_weights(tensors: Mapping[str, Tensor], module: str) -> dict[str, int]:
    """The weights of a module in an adapter's file, other than its factors: name → rows."""
    weight = re.compile(rf"{re.escape(PREFIX + module)}\.(?!.*lora_)(\w+\.)*weight")
    return {key: len(tensor) for key, tensor in tensors.items() if weight.fullmatch(key)}


def _check_complete(model: PeftModel, tensors: Iterable[str]) -> None:
    """Refuse an adapter whose head was tied to the embedding, on a base that does not tie them: PEFT leaves it out.

    Raises:
        ValueError: It is one.
    """
    found = {name for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    saved = {key.rpartition(".lora_")[0] for key in tensors if ".lora_A." in key}
    if left_out := sorted(name.removeprefix(PREFIX) for name in saved - found):
        raise ValueError(
            f"The adapter changes {left_out[0]}, but PEFT does not load this change onto the base model. If the "
            "adapter was made with ensure_weight_tying, load the base model with tie_word_embeddings=True."
        )


def _check_mergeable(model: PeftModel) -> None:
    """Refuse layers into which PEFT does not merge, or merges something else.

    They are quantised layers, also in a model that does not say that it is quantised, grouped convolutions, layers with
    a computation of their own, and layers without a bias where the adapter has one.

    PEFT 0.21 takes a frozen layer of quanto for a plain one and adds the change to a dequantised copy of its weight, so
    the merged model is the base. Into other quantised weights it merges with rounding, and into grouped convolutions
    not at all.

    Raises:
        ValueError: There is such a layer.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base, kind = layer.get_base_layer(), kind_of(layer)
        if model.peft_config["default"].lora_bias and getattr(base, "bias", None) is None:
            raise ValueError(
                f"{name.removeprefix(PREFIX)}: the adapter has a bias here (lora_bias), but the base model's layer has "
                "none that it could be merged into. Use the adapter from Python, by lora_ga.load, or train without "
                "lora_bias."
            )
        weight = getattr(base, layout_of(layer).parameter_name(layer), None)
        if getattr(base, "groups", 1) > 1:
            raise ValueError(
                f"{name.removeprefix(PREFIX)}: PEFT cannot merge into a convolution with {base.groups} groups. Keep "
                "the adapter apart, or train without this layer."
            )
        if kind is not None and kind.read is None and not follows_weight(layer):
            raise ValueError(
                f"{name.removeprefix(PREFIX)}: a {type(base).__name__} computes something else than its weight says, "
                "so PEFT would merge another change than was trained. Keep the adapter apart, or train without this "
                "layer."
            )
        own_type = isinstance(weight, Tensor) and type(weight.data) is not Tensor
        if own_type or (kind is not None and kind.read is not None):
            raise ValueError(
                f"{name.removeprefix(PREFIX)}: its weight is quantised ({type(base).__name__}), so the adapter cannot "
                "be merged into it as it is. Load the base model in full precision to merge an adapter into it."
            )


def _check_not_shared(model: PeftModel, tied: Mapping[str, str]) -> None:
    """Refuse adapted weights that other modules use too, unless PEFT has tied these and they have one change.

    Args:
        model: The model.
        tied: Head → embedding, as `tied_heads` finds them.

    Raises:
        ValueError: There is such a weight.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.removesuffix(".base_layer.weight"))
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            shared = owners.get(id(getattr(layer.get_base_layer(), "weight", None)), [])
            one = {tied.get(each, each) for each in shared}
            if len(shared) > 1 and not (len(one) == 1 and tied):
                listed = ", ".join(each.removeprefix(PREFIX) for each in shared)
                ends = {id(end) for end in embeddings(model)}
                advice = (
                    "Untie them first: set config.tie_word_embeddings=False and give the layer a copy."
                    if id(layer) in ends or id(layer.get_base_layer()) in ends
                    else "Keep the adapter apart, as these modules are made to share it."
                )
                raise ValueError(
                    f"{name.removeprefix(PREFIX)}: its weight is shared ({listed}), so merging would change "
                    f"all of them. {advice}"
                )


def _tying_configs(model: Any) -> list[Any]:
    """The configuration of a model, and that of its text part, if they say that the head has the embedding's weight."""
    config: Any = getattr(model, "config", None)
    parts = [config, config.get_text_config(decoder=True)] if hasattr(config, "get_text_config") else []
    return [part for part in parts if getattr(part, "tie_word_embeddings", False)]


def _say_untied(model: Any, ties: Iterable[Any]) -> None:
    """Say it in the configuration if head and embedding have become two weights: else a reader ties them again.

    PEFT does so since 0.19, but not for the text part.

    Args:
        model: The merged model.
        ties: The configurations that said before that the two are one.

    Raises:
        ValueError: The model computes something else without the tie, as T5 does in Transformers 4.
    """
    weights = [end.weight for end in embeddings(model) if hasattr(end, "weight")]
    if not ties or len(weights) < 2 or _equal(*weights):
        return
    if "config.tie_word_embeddings" in _source(type(model).forward):
        raise ValueError(
            f"The adapter trained the head or the embedding of a {type(model).__name__} in full, so they are no longer "
            "one weight, but with tie_word_embeddings=False this model also scales its outputs in another way. Keep "
            "the adapter apart, or train without these modules_to_save."
        )
    for config in ties:
        config.tie_word_embeddings = False


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two weights are one, or have the same values."""
    return one.data_ptr() == other.data_ptr() or (one.device == other.device and torch.equal(one, other))


def _source(function: Callable[..., Any]) -> str:
    """The source text of a function; empty for one that was typed into a shell."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""
