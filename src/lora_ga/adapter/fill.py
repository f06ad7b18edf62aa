"""Putting a saved adapter into an adapter that exists, as scripts with `model.add_adapter` resume.

The file may be one that PEFT or Transformers wrote (`adapter_model.safetensors`), or one of diffusers
(`pytorch_lora_weights.safetensors`), which holds the adapters of several models. Everything is checked before anything
changes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import set_requires_grad
from peft.utils import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_ga.adapter.alignment import alignment_of, scaling_of
from lora_ga.adapter.file import ENDS, compiled_names
from lora_ga.adapter.fits import adapters_below, check_base, check_vocabulary
from lora_ga.adapter.optimizer_state import check_saved_optimizer
from lora_ga.adapter.save import FILE, read_sidecar
from lora_ga.adapter.stock import mend_patterns
from lora_ga.adapter.structure import build_structure, padding_of
from lora_ga.base import base_model, embeddings, without_compiled
from lora_ga.config import LoraGAConfig
from lora_ga.distributed.sharding import whole
from lora_ga.files import damaged
from lora_ga.layers.factors import Factor, without_start
from lora_ga.layers.joined import JoinedA, JoinedB
from lora_ga.layers.kinds import entries, weight_of
from lora_ga.layers.targets import PREFIX, Target, find_targets, layer_name, peft_model_in

# What diffusers calls its file, and the key of its metadata that holds the configurations.
PIPELINE_FILE, PIPELINE_CONFIGS = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
# How files of diffusers name A and B → how PEFT names them.
PIPELINE_NAMES = {
    ".lora.down.": ".lora_A.",
    ".lora.up.": ".lora_B.",
    ".lora_linear_layer.down.": ".lora_A.",
    ".lora_linear_layer.up.": ".lora_B.",
}


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """A saved adapter of one model.

    Attributes:
        where: The file, for messages.
        tensors: PEFT's names, relative to the model → tensors.
        config: Its configuration; None if the file has none.
        sidecar: Tensors and record of LoRA-GA's sidecar; None without one.
    """

    where: Path
    tensors: Mapping[str, Tensor]
    config: LoraConfig | None
    sidecar: tuple[dict[str, Tensor], dict[str, Any]] | None

    def factor(self, name: str, letter: str) -> Tensor | None:
        """A or B of a layer; None if the file has none."""
        return next((self.tensors[name + end] for end in ENDS[letter] if name + end in self.tensors), None)

    @property
    def layers(self) -> set[str]:
        """The names of its layers."""
        return {key.removesuffix(end) for key in self.tensors for end in ENDS["A"] if key.endswith(end)}


def fill(network: nn.Module, path: str | Path, adapter_name: str, *, is_trainable: bool) -> bool:
    """Put a saved adapter into an adapter that exists.

    Layers whose saved rank is twice the adapter's get LoRA-GA's structure, if they do not have it. Without a sidecar A₀
    is what the file gives, A less dA, which is A₀ up to rounding.

    Args:
        network: A model with the adapter, or a network that contains one; without wrappers.
        path: The file, or its folder.
        adapter_name: The adapter.
        is_trainable: Whether the adapter's parameters are to train.

    Returns:
        Whether a layer of the adapter has LoRA-GA's structure now.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file does not fit the adapter, or cannot be read. The model is then as before.
    """
    model = peft_model_in(network)
    targets = find_targets(network, adapter_name, fresh=False)
    saved = _without_padding(_read(Path(path), targets), targets, adapter_name)
    aligned = _check_shapes(saved, targets, adapter_name)
    _check_scaling(saved, targets, adapter_name)
    _check_rest(saved, model, adapter_name)
    if saved.sidecar is not None and (aligned or is_trainable):
        check_base(model, saved.sidecar[1], path)
        _check_starts(saved, aligned)
    check_vocabulary(base_model(model), {key: value.shape for key, value in saved.tensors.items()}, path)
    if is_trainable and not aligned:
        own = {id(parameter) for parameter in _parameters_of(model, adapter_name)}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad or id(parameter) in own]
        check_saved_optimizer(saved.where.parent, trained)
    record = {} if saved.sidecar is None else saved.sidecar[1]
    config = LoraGAConfig.from_record(record["config"]) if record else LoraGAConfig()
    alignment = alignment_of(model, adapter_name)
    if aligned and alignment is None:
        plain = {name: target for name, target in targets.items() if name not in aligned}
        alignment = build_structure(network, aligned, plain, config, adapter_name)
    start, compiled = PREFIX if isinstance(model, PeftModel) else "", compiled_names(base_model(model))
    named = {start + _in_compiled(key, compiled): value for key, value in saved.tensors.items()}
    set_peft_model_state_dict(model, named, adapter_name)
    if alignment is not None and saved.sidecar is not None:
        alignment.config, alignment.summary = config, record.get("summary", "")
        for name, pair in alignment.factors.items():
            for letter, factor in zip("AB", pair, strict=True):
                factor.start = saved.sidecar[0][f"{name}.{letter}0"].to(factor.trainable.device, factor.trainable.dtype)
    set_requires_grad(model, adapter_name, requires_grad=is_trainable)
    return bool(aligned)


def _parameters_of(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """The parameters of an adapter, those of whole modules and trained tokens included."""
    return [parameter for name, parameter in model.named_parameters() if adapter_name in name.split(".")]


def _read(path: Path, targets: Mapping[str, Target]) -> SavedAdapter:
    """Read the file, and take what belongs to the model.

    Returns:
        The adapter of the model.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or holds dA and dB alone, or no layer of the model, or one several times.
    """
    files = [path] if path.is_file() else [path / SAFETENSORS_WEIGHTS_NAME, path / PIPELINE_FILE]
    where = next((file for file in files if file.is_file()), None)
    if where is None:
        raise FileNotFoundError(
            f"{path}: neither a file nor a local folder with {SAFETENSORS_WEIGHTS_NAME} or {PIPELINE_FILE}."
            + adapters_below(path)
        )
    try:
        with safe_open(str(where), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {_in_peft(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{where}: damaged, or not a safetensors file ({error}). Save the adapter again.") from error
    for reason in without_start(tensors):
        raise ValueError(f"{where}: {reason}")
    first = next(iter(targets))
    found = [key.removesuffix(first + end) for key in tensors for end in ENDS["A"] if key.endswith(first + end)]
    prefixes = [prefix for prefix in found if not prefix or prefix.endswith(".")]
    if len(prefixes) != 1:
        held = f"{len(prefixes)} times ({', '.join(prefixes)})" if prefixes else "not at all"
        raise ValueError(
            f"{where}: holds the layer {first} of this model {held}. Give a file that holds the adapter of this model "
            "once; one of another model cannot be loaded."
        )
    (prefix,) = prefixes
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return SavedAdapter(where, own, _config(where, header, prefix), read_sidecar(where.parent))


def _config(where: Path, header: Mapping[str, str], prefix: str) -> Any:
    """The configuration of a saved adapter; None if there is none."""
    if where.name == SAFETENSORS_WEIGHTS_NAME and (where.parent / CONFIG_NAME).is_file():
        return _config_in(where.parent)
    if PIPELINE_CONFIGS in header:
        with damaged(where):
            fields = json.loads(header[PIPELINE_CONFIGS])
            start = prefix if any(key.startswith(prefix) for key in fields) else ""
            own = {key.removeprefix(start): value for key, value in fields.items() if key.startswith(start)}
            return LoraConfig.from_peft_type(**own)
    return None


def _without_padding(saved: SavedAdapter, targets: Mapping[str, Target], adapter_name: str) -> SavedAdapter:
    """The adapter without the zeros up to rank 2r of its plain layers, where the model's layers have their rank r."""
    tensors, plain = dict(saved.tensors), {} if saved.sidecar is None else saved.sidecar[1]["plain"]
    for name, (rank, _) in plain.items():
        padded = padding_of(targets[name].layer, adapter_name) if name in targets else None
        if padded is None or padded.rank != rank:
            continue
        for letter, ends in ENDS.items():
            for key in {name + end for end in ends} & tensors.keys():
                tensors[key] = padded.unpadded(tensors[key], letter)
    return dataclasses.replace(saved, tensors=tensors)


def _in_compiled(key: str, compiled: Mapping[str, str]) -> str:
    """A name in a file as the model has it (see `compiled_names`)."""
    for pattern, replacement in compiled.items():
        key = re.sub(pattern, replacement, key)
    return key


def _config_in(folder: Path) -> LoraConfig:
    """The configuration of an adapter.

    Returns:
        The configuration.

    Raises:
        ValueError: It is damaged, or of another kind of adapter than LoRA.
    """
    with damaged(folder / CONFIG_NAME):
        config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        kind = PeftType(config.peft_type).value
        raise ValueError(f"{folder}: an adapter of type {kind}; into this LoRA adapter goes LoRA alone.")
    return config


def _in_peft(key: str) -> str:
    """A name in a file as PEFT writes it."""
    for theirs, ours in PIPELINE_NAMES.items():
        key = key.replace(theirs, ours)
    return key


def _check_shapes(saved: SavedAdapter, targets: Mapping[str, Target], adapter_name: str) -> dict[str, Target]:
    """Refuse an adapter with other layers, ranks or sizes.

    Returns:
        The layers whose saved rank is twice the rank that trains.

    Raises:
        ValueError: It is one of these.
    """
    tied = {head: name for name, target in targets.items() for head in target.heads}
    _check_tied(saved, tied)
    different = sorted((saved.layers - set(tied)) ^ set(targets))
    if different:
        raise ValueError(
            f"{saved.where}: of an adapter with other layers: {len(different)} are in only one of the two, as "
            f"{different[0]}. Give the adapter the target_modules of the run that saved it."
        )
    aligned = {}
    for name, target in targets.items():
        pair = entries(target.layer, adapter_name)
        structured = isinstance(pair[0], Factor)
        for letter, entry, dim in zip("AB", pair, (0, 1), strict=True):
            value = saved.factor(name, letter)
            held = entry.start if structured else weight_of(entry)
            found, plain = [] if value is None else list(value.shape), list(held.shape)
            double = [2 * size if dim == index else size for index, size in enumerate(plain)]
            if found == double and not target.unknown:
                aligned[name] = target
            elif found != plain or structured or name in aligned:
                rank = plain[dim] // target.parts
                raise ValueError(
                    f"{saved.where}: {letter} of {name} is {_shape(found)}; into this adapter of rank {rank} goes "
                    f"{_shape(double)} (twice its rank, as LoRA-GA saves it)"
                    + ("" if structured else f" or {_shape(plain)} (plain LoRA)")
                    + ". Give the adapter the rank of the run that saved it: half of what its configuration says."
                )
    return aligned


def _check_rest(saved: SavedAdapter, model: Any, adapter_name: str) -> None:
    """Refuse an adapter that has other parts than A and B that the model's lacks, or lacks some, or in other sizes.

    These are DoRA's magnitudes, biases, whole modules and trained tokens.

    Raises:
        ValueError: There is such a part.
    """
    known = {id(module) for module in embeddings(model)}  # whose base weights may be in the file
    paths = tuple(f"{layer_name(path)}." for path, module in model.named_modules() if id(module) in known)
    factors = (*ENDS["A"], *ENDS["B"])
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    own = {layer_name(key): value for key, value in state.items()}
    held = {without_compiled(key): value for key, value in saved.tensors.items()}
    ours, theirs = (
        {key for key in tensors if not key.endswith(factors) and not (paths and key.startswith(paths))}
        for tensors in (own, held)
    )
    for keys, found in ((theirs - ours, "holds {}, which this adapter has not"), (ours - theirs, "does not hold {}")):
        if keys:
            raise ValueError(
                f"{saved.where}: {found.format(min(keys))}. Give the adapter the settings of the run that saved it "
                "(use_dora, lora_bias, bias, modules_to_save, trainable_token_indices)."
            )
    for key in sorted(ours):
        found, wanted = _shape(held[key].shape), _shape(own[key].shape)
        if found != wanted and own[key].numel():  # DeepSpeed ZeRO-3 leaves empty tensors
            raise ValueError(
                f"{saved.where}: {key} is {found} in this adapter, and {wanted} in the model. Give the model the "
                "number of classes, and the adapter the settings, of the run that saved it."
            )


def _check_tied(saved: SavedAdapter, tied: Mapping[str, str]) -> None:
    """Refuse an adapter in which a head has another change than the embedding that it is tied to here.

    Raises:
        ValueError: It has.
    """
    for head, embedding in tied.items():
        for letter, other in zip("AB", "BA", strict=True):
            theirs, ours = saved.factor(head, letter), saved.factor(embedding, other)
            if theirs is None or ours is None or not torch.equal(theirs, ours.mT):
                raise ValueError(
                    f"{saved.where}: {head} has not the change of {embedding}, which this model ties to it "
                    "(ensure_weight_tying). Give the adapter the ensure_weight_tying and target_modules of the run "
                    "that saved it."
                )


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes)) or "missing"


def _check_scaling(saved: SavedAdapter, targets: Mapping[str, Target], adapter_name: str) -> None:
    """Refuse an adapter that multiplies B A by another factor.

    Raises:
        ValueError: It does.
    """
    if saved.config is None:
        return
    mend_patterns(saved.config, {name: target.layer for name, target in targets.items()}, saved.where)
    for name, target in targets.items():
        theirs = scaling_of(saved.config, target.layout.pattern_name(target.layer, name))
        ours = target.layer.scaling[adapter_name]
        if not math.isclose(theirs, ours, rel_tol=1e-6):
            raise ValueError(
                f"{saved.where}: multiplies B A of {name} by {theirs:g}, this adapter by {ours:g}. Give the "
                "adapter the lora_alpha, rank and use_rslora of the run that saved it."
            )


def _check_starts(saved: SavedAdapter, aligned: Mapping[str, Target]) -> None:
    """Refuse a sidecar of another adapter, and one that needs another base.

    Raises:
        ValueError: It is one of these.
    """
    assert saved.sidecar is not None
    tensors, record = saved.sidecar
    if record["config"]["offset"] == "base":
        raise ValueError(
            f'{saved.where}: trained with offset="base", for which the base has to change. Give lora_ga.load the '
            "original base model without an adapter."
        )
    different = sorted(set(record["scaling"]) ^ set(aligned))
    if different:
        raise ValueError(
            f"{saved.where}: of its layers {len(record['scaling'])} train at half their rank, and in this adapter "
            f"{len(aligned)}; {different[0]} differs. Give the adapter the rank of the run that saved it, or load it "
            "with is_trainable=False."
        )
    for name, target in aligned.items():
        for letter, joining in (("A", JoinedA(target.parts)), ("B", JoinedB(target.parts))):
            value, start = saved.factor(name, letter), tensors[f"{name}.{letter}0"]
            assert value is not None
            delta = joining.delta_in(value.to(start.dtype))
            if not joining.agree(joining.joined(start, delta), delta.abs(), whole(value).to(start.dtype)):
                raise ValueError(
                    f"{saved.where}: {FILE} beside it does not belong to it: {letter} of {name} has another start. Put "
                    "the right one back, or remove it."
                )
