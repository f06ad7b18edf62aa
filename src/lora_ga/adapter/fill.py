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
from collections.abc import Iterable, Mapping, Sequence
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
from lora_ga.adapter.save import FILE, read_sidecar
from lora_ga.adapter.structure import build_structure, padding_of
from lora_ga.base import another_base, base_model, embeddings, without_compiled
from lora_ga.config import LoraGAConfig
from lora_ga.distributed.sharding import whole
from lora_ga.files import adapters_in, damaged
from lora_ga.layers.factors import Factor, without_start
from lora_ga.layers.joined import JoinedA, JoinedB
from lora_ga.layers.kinds import entries, weight_of
from lora_ga.layers.targets import PREFIX, Target, find_targets, layer_name, peft_model_in

# What diffusers calls its file, and the key of its metadata that holds the configurations.
PIPELINE_FILE, PIPELINE_CONFIGS = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
# The parts of an optimizer's state that have the shape of the parameter, in Adam, AdamW, SGD and similar optimizers.
SAME_SHAPE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
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


def check_base(model: nn.Module, trained_on: str, path: str | Path) -> None:
    """Refuse another base model than the one the adapter was trained on.

    Args:
        model: A base model, or a model with adapters.
        trained_on: The fingerprint in the sidecar.
        path: The adapter, for the message.

    Raises:
        ValueError: It is another.
    """
    if difference := another_base(model, trained_on):
        raise ValueError(
            f"{path}: trained on another base model: {difference}. Give the base model it was trained on. If another "
            f"adapter was saved over it since, {FILE} is that of the old one: remove the file."
        )


def check_layers(base: nn.Module, folder: Path) -> None:
    """Refuse a base model in which a layer of a saved adapter has another shape, before PEFT loads the adapter.

    Embeddings are left out: `check_base` and `check_vocabulary` name the two sizes of the vocabulary.

    Args:
        base: The base model.
        folder: The adapter's folder. One without `adapter_model.safetensors` is not looked at.

    Raises:
        ValueError: There is such a layer; the message gives its two shapes.
    """
    saved, ends = shapes_in(folder), embeddings(base)
    others = ((path, module) for path, module in base.named_modules() if not any(module is end for end in ends))
    modules = {layer_name(path): module for path, module in others}
    for key, shape in saved.items():
        layer, _, parameter = key.rpartition(".")
        module = modules.get(layer)
        weight = getattr(module, parameter, None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and tuple(weight.shape) != shape:
            classes = len(weight) == getattr(getattr(base, "config", None), "num_labels", None)
            advice = f"Load the base model with num_labels={shape[0]}" if classes else "Give its own base model"
            raise ValueError(
                f"{folder}: {layer} is {shape[0]} x {shape[1]} in this adapter, and {weight.shape[0]} x "
                f"{weight.shape[1]} in the model. {advice}."
            )
    for key in saved:
        layer = key.removesuffix(ENDS["A"][0])
        b = saved.get(layer + ENDS["B"][0])
        sides = tuple(getattr(modules.get(layer), side, None) for side in ("out_features", "in_features"))
        if b is not None and key != layer and len(b) == 2 and None not in sides and sides != (b[0], saved[key][1]):
            raise ValueError(
                f"{folder}: trained on another base model: {layer} is {b[0]} x {saved[key][1]} there, and {sides[0]} x "
                f"{sides[1]} in this model. Give the base model it was trained on."
            )


def adapters_below(folder: Path) -> str:
    """Name the adapters in the subfolders of a folder, for the message that it holds none itself.

    Args:
        folder: The folder.

    Returns:
        A sentence, after a space; empty if there are none.
    """
    found = adapters_in(folder)
    if not found:
        return ""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    names = ", ".join(str(each.relative_to(folder)) for each in found[:3])
    return f" Its subfolders hold adapters: {names}{more}. Give one of them, as {found[0]}."


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a folder's `adapter_model.safetensors`, by their names in the base model.

    Args:
        folder: The adapter's folder.

    Returns:
        Name → shape; empty if there is no such file, or one that PEFT refuses.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        return {}
    try:
        with safe_open(str(file), framework="pt") as opened:
            return {layer_name(key): tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError:
        return {}


def check_vocabulary(base: nn.Module, shapes: Mapping[str, Sequence[int]], path: str | Path) -> None:
    """Refuse a base model with another vocabulary than that of the embeddings that an adapter holds.

    Args:
        base: The base model, also with adapters.
        shapes: Name of a saved tensor in the base model → its shape.
        path: The adapter, for the message.

    Raises:
        ValueError: It has another.
    """
    ends = embeddings(base)
    for name, module in base.named_modules():
        inner = getattr(module, "base_layer", module)
        tokens = getattr(inner, "num_embeddings", None) or getattr(inner, "out_features", None)
        if tokens is None or not any(module is end for end in ends):
            continue
        layer = layer_name(name)
        a_or_weight = {f"{layer}.weight": 0, f"{layer}.base_layer.weight": 0, f"{layer}.lora_embedding_A": 1}
        for key, dim in (a_or_weight | {f"{layer}.lora_B.weight": 0}).items():
            if key in shapes and shapes[key][dim] != tokens:
                raise ValueError(
                    f"{path}: {layer} has {shapes[key][dim]} tokens in this adapter, and {tokens} in the model. Call "
                    f"resize_token_embeddings({shapes[key][dim]}) on the base model, before it has an adapter."
                )


def check_saved_optimizer(folder: Path, trained: Iterable[Tensor]) -> None:
    """Refuse a checkpoint without a sidecar whose optimizer state is that of LoRA-GA's structure.

    Args:
        folder: The checkpoint; nothing happens if it holds no optimizer state.
        trained: The parameters that are to train.

    Raises:
        ValueError: The state has other shapes than the parameters.
    """
    if not (folder / "optimizer.pt").is_file():
        return
    states = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")["state"].values()
    shapes = {tuple(state[key].shape) for state in states for key in SAME_SHAPE if key in state}
    if others := shapes - {tuple(parameter.shape) for parameter in trained}:
        raise ValueError(
            f"{folder}: {FILE} is missing, so the adapter would train as a plain LoRA, every row of its full rank; "
            f"but the optimizer state beside it has other shapes ({min(others)}): it belongs to "
            "LoRA-GA's structure. Put the sidecar back, or remove optimizer.pt to train as plain LoRA."
        )


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
        check_base(model, saved.sidecar[1]["fingerprint"], path)
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
    for name, target in targets.items():
        theirs, ours = scaling_of(saved.config, name), target.layer.scaling[adapter_name]
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
