"""Loading a saved adapter, with LoRA-GA's structure if it is to train."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor, nn

from lora_ga.adapter.alignment import RANK_FIELDS, Alignment, ModelReference, alignment_of
from lora_ga.adapter.file import Padded, check_names, compiled_names, joined_in
from lora_ga.adapter.fill import fill
from lora_ga.adapter.fits import adapters_below, check_base, check_layers, check_vocabulary, shapes_in
from lora_ga.adapter.optimizer_state import check_first_steps, check_saved_optimizer
from lora_ga.adapter.save import FILE, AlignedLoraConfig, read_sidecar
from lora_ga.adapter.stock import check_scalings, load_stock
from lora_ga.adapter.structure import (
    follow_adapters,
    follow_ties,
    load_padded_layers,
    make_factors,
    padding_of,
    patterns_of,
    place,
    set_rank,
)
from lora_ga.adapter.undo import base_kept
from lora_ga.adapter.write import shift_base
from lora_ga.config import LoraGAConfig
from lora_ga.distributed.sharding import gathered, in_zero3, unwrapped, whole
from lora_ga.files import ADAPTER, damaged, read_labels
from lora_ga.layers.factors import Factor
from lora_ga.layers.kinds import entries, layout_of, weight_of
from lora_ga.layers.targets import PREFIX, SHIFTED_BASES, layer_name, peft_model_in, peft_models_in
from lora_ga.layers.tied import tied_heads
from lora_ga.version import dtype_setting, is_before
from lora_ga.warn import warn

# The task in an adapter's configuration → Transformers' class of its base model.
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


def load(
    base: nn.Module | str | Path,
    path: str | Path | None = None,
    *,
    is_trainable: bool = False,
    adapter_name: str = "default",
) -> Any:
    """Load a saved adapter, to use it or to go on training.

    To use, it is a plain LoRA of rank 2r on the unchanged base. To train, it gets LoRA-GA's structure of rank r from
    its sidecar; without a sidecar it is a plain LoRA of rank 2r, with a warning.

    A model that has an adapter already (from `get_peft_model` or `model.add_adapter`), or a network that contains one,
    keeps it, and the saved values are put into it. Its rank must be the rank r that trained. Optimizers that hold its
    parameters stay valid, and of other adapters the same parameters train as before. See `lora_ga.adapter.fill`.

    `load("runs/one/adapter")` also loads the base model that the adapter names, for the adapter's task. A classifier
    gets the names of its classes from `labels.json`, which `lora-ga train` writes beside the adapter.

    Args:
        base: The original base model, or a model with an adapter; or the adapter's folder, if `path` is None.
        path: The folder given to `save_pretrained`, or a name on the hub. For a model with an adapter: a local folder
            or file, written by `save_pretrained`, `save_lora_adapter` or `save_lora_weights` (diffusers).
        is_trainable: Whether the adapter's parameters are to train.
        adapter_name: The adapter.

    Returns:
        The adapted model: a `PeftModel` around the base, or the model that was given, if it has an adapter.

    Raises:
        FileNotFoundError: There is no such adapter.
        TypeError: There is no adapter, or no base model; or the base is no module, or has LoRA layers, but no
            configuration of their adapters.
        ValueError: The sidecar is damaged or belongs to another adapter or base model; or there is none, and the folder
            holds the optimizer state of LoRA-GA training; or the adapter file holds dA and dB without A₀ and B₀, or
            has the names of a compiled base; or PEFT does not find all its layers, or would scale one otherwise than
            it was trained; or the saved adapter does not fit the model's, or names no base model or no known task. The
            base or model is then as before.
    """
    model, folder = _base_and_folder(base, path, adapter_name)
    if not peft_models_in(unwrapped(model)):
        return _load_new(model, folder, adapter_name, is_trainable=is_trainable)
    _load_into(model, folder, adapter_name, is_trainable=is_trainable)
    return model


def _load_into(model: nn.Module, path: str | Path, adapter_name: str, *, is_trainable: bool) -> None:
    """Put the values of a saved adapter into an adapter that exists."""
    filled = fill(unwrapped(model), path, adapter_name, is_trainable=is_trainable)
    if is_trainable and not filled:
        _prepare_plain_training(peft_model_in(unwrapped(model)), path, adapter_name)


def _load_new(base: Any, path: str | Path, adapter_name: str, *, is_trainable: bool) -> PeftModel:
    """Load an adapter onto a base model without one."""
    if any(isinstance(module, LoraLayer) for module in base.modules()):
        raise TypeError("The base has LoRA layers, but no peft_config. Give the original base model.")
    if any(module in SHIFTED_BASES for module in base.modules()):
        raise ValueError('The base was changed by offset="base"; load the original base model again.')
    _check_is_adapter(path)
    check_names(Path(path), base)
    check_layers(base, Path(path))
    sidecar, names = read_sidecar(path), read_labels(Path(path))
    with base_kept(base):
        model = _loaded(base, path, adapter_name, sidecar, is_trainable=is_trainable)
    if names and getattr(base.config, "num_labels", None) == len(names):
        base.config.id2label, base.config.label2id = names, {name: number for number, name in names.items()}
    return model


def _loaded(
    base: Any,
    path: str | Path,
    adapter_name: str,
    sidecar: tuple[dict[str, Tensor], dict[str, Any]] | None,
    *,
    is_trainable: bool,
) -> PeftModel:
    """Let PEFT load an adapter, and give it LoRA-GA's structure if it is to train and has a sidecar."""
    compiled = compiled_names(base)
    renamed: dict[str, Any] = {"key_mapping": compiled} if compiled else {}
    advice = "Give the base model it was trained on, or put a complete copy of the adapter back."
    with damaged(path, advice=advice) if Path(path).is_dir() else contextlib.nullcontext():
        if sidecar is not None and not _adds_to_base(PeftConfig.from_pretrained(str(path))):
            check_base(base, sidecar[1], path)
        check_vocabulary(base, shapes_in(Path(path)), path)
        model = load_stock(base, path, adapter_name, is_trainable=is_trainable, **renamed)
    if sidecar is not None:
        check_base(model, sidecar[1], path)
        _check_tied_heads(model, adapter_name, sidecar[1], path)
        check_scalings(model, adapter_name, sidecar[1], path)
        if is_trainable:
            with damaged(path):
                _restore_structure(model, adapter_name, *sidecar, where=str(path))
    elif is_trainable:
        check_saved_optimizer(Path(path), [parameter for parameter in model.parameters() if parameter.requires_grad])
        _prepare_plain_training(model, path, adapter_name)
    return model


def _base_and_folder(base: Any, path: str | Path | None, adapter_name: str) -> tuple[Any, str | Path]:
    """The base model and the adapter's folder, from the first two arguments of `load`.

    Returns:
        Both.

    Raises:
        TypeError: The adapter is missing, or the base is a name or another object.
    """
    if isinstance(base, str | Path) and path is None:
        folder = _adapter_folder(base, adapter_name)
        return _base_of(folder), folder
    if path is None:
        raise TypeError("load(base) lacks the adapter: give load(base, folder), or the folder alone.")
    if isinstance(base, str | Path):
        raise TypeError(f"load({base!r}, {path!r}): the base is a name. Give the model itself, or the folder alone.")
    if not isinstance(base, nn.Module):
        raise TypeError(f"A {type(base).__name__} is no model. Of a pipeline give the unet or the transformer.")
    return base, _adapter_folder(path, adapter_name)


def _adapter_folder(path: str | Path, adapter_name: str) -> str | Path:
    """The folder of the adapter in the folder of a run of `lora-ga train`, or in one that `save_pretrained` was given.

    `save_pretrained` writes adapters of other names than "default" into folders of their names.

    Returns:
        The folder; the path as it is if it is another.
    """
    if (Path(path) / CONFIG_NAME).is_file():
        return path
    inner = (Path(path) / name for name in (ADAPTER, adapter_name))
    return next((folder for folder in inner if (folder / CONFIG_NAME).is_file()), path)


def _check_is_adapter(path: str | Path) -> None:
    """Refuse a local folder without an adapter.

    Raises:
        FileNotFoundError: It has none.
    """
    if Path(path).is_dir() and not (Path(path) / CONFIG_NAME).is_file():
        full = " It holds a whole model, for Transformers' from_pretrained." * (Path(path) / "config.json").is_file()
        raise FileNotFoundError(
            f"{path}: there is no adapter (no {CONFIG_NAME}).{full}{adapters_below(Path(path))} Give the folder that "
            "save_pretrained wrote, or that of a run of `lora-ga train`."
        )


def _base_of(folder: str | Path) -> Any:
    """The base model that an adapter names, with the classes that the file beside it names.

    Returns:
        The model.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: Its configuration is damaged, it names no base model, or has a task for which there is no class.
    """
    if not Path(folder).is_dir():
        read_sidecar(folder)  # refuses a name that the hub does not give
    _check_is_adapter(folder)
    with damaged(folder):
        config = PeftConfig.from_pretrained(str(folder))
    name, kind = config.base_model_name_or_path, AUTO_CLASSES.get(config.task_type)
    if not name or kind is None:
        lacks = f"its task type is {config.task_type}" if name else "it names no base model"
        raise ValueError(f"{folder}: {lacks}. Load the base model yourself, and call lora_ga.load(base, folder).")
    return load_base(partial(getattr(transformers, kind).from_pretrained, name, **dtype_setting("auto")), Path(folder))


def load_base(load: Callable[..., Any], folder: Path) -> Any:
    """Load an adapter's base model, with the classes that the file beside the adapter names.

    Transformers reports that a head is new, with random weights. That is left out where the adapter holds the weights.

    Args:
        load: Transformers' `from_pretrained` with the name of the model.
        folder: The adapter's folder.

    Returns:
        The model.

    Raises:
        ValueError: The file with the classes is damaged.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        return load(**_class_settings(folder))
    with damaged(file), safe_open(file, framework="pt") as tensors:
        held = {name.removeprefix(PREFIX) for name in tensors.keys()}  # noqa: SIM118 (not a dictionary)
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_no_report)
    try:
        model, info = load(output_loading_info=True, **_class_settings(folder))
    finally:
        logger.removeFilter(_no_report)
    if lost := sorted(set(info["missing_keys"]) - held):
        some = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        warn(f"Neither the base model nor the adapter has {some}: random weights.")
    return model


def _no_report(record: logging.LogRecord) -> bool:
    """Whether a log message is another than Transformers' report of the weights that it did not find."""
    text = record.getMessage()
    return "LOAD REPORT" not in text and "newly initialized" not in text


def _class_settings(folder: Path) -> dict[str, Any]:
    """The settings of `from_pretrained` that give a base model the classes of an adapter."""
    if not (names := read_labels(folder)):
        return {}
    return {
        "id2label": names,
        "label2id": {label: number for number, label in names.items()},
        "ignore_mismatched_sizes": True,  # a head for other classes, which the adapter replaces
    }


def _adds_to_base(config: Any) -> bool:
    """Whether the fingerprint in a sidecar may be one that the base has only together with the adapter.

    With `layer_replication` PEFT adds layers to the base. With whole modules and tied weights earlier versions of this
    library counted a wrapper of PEFT.

    Returns:
        Whether the base alone need not have the fingerprint.
    """
    return bool(config.layer_replication or (config.modules_to_save and getattr(config, "ensure_weight_tying", False)))


def _check_tied_heads(model: PeftModel, adapter_name: str, record: Mapping[str, Any], path: str | Path) -> None:
    """Refuse an adapter whose head PEFT loads in another way than it was trained.

    Raises:
        ValueError: The head is tied to the embedding now, and was not, or the other way round.
    """
    tied = {layer_name(found) for found in tied_heads(model, adapter_name)}
    for head in tied.intersection(record["scaling"]):
        raise ValueError(
            f"{path}: an earlier version of LoRA-GA gave {head} a start of its own, but ensure_weight_tying makes PEFT "
            "load one change for it and the embedding, so it would not be what was trained. In the adapter's "
            f'adapter_config.json set "ensure_weight_tying" to false and add "{head}" to "target_modules".'
        )
    for head in set(record.get("tied", ())) - tied:
        if is_before("peft", "0.19"):
            reason = "but this version of PEFT does not tie the two. Upgrade it to PEFT 0.19 or newer."
        else:
            reason = (
                "but in this base model the two are not tied, so PEFT would leave out the change of the head. Load the "
                "base model with tie_word_embeddings=True."
            )
        raise ValueError(f"{path}: trained with {head} tied to the embedding (ensure_weight_tying), {reason}")


@torch.no_grad()
def _restore_structure(
    model: PeftModel, adapter_name: str, tensors: dict[str, Tensor], record: dict[str, Any], *, where: str
) -> None:
    """Give a plain rank-2r adapter the structure its sidecar describes."""
    config, peft_config = LoraGAConfig.from_record(record["config"]), model.peft_config[adapter_name]
    layers = {layer_name(path): module for path, module in model.named_modules()}
    alignment = Alignment(
        model=ModelReference(model),
        adapter_name=adapter_name,
        scaling=record["scaling"],
        config=config,
        fingerprint=record["fingerprint"],
        plain={name: (rank, alpha) for name, (rank, alpha) in record["plain"].items()},
        original=record["original"],
        summary=record.get("summary", ""),
    )
    factors = {
        name: _restore_pair(name, layers[name], adapter_name, tensors, config.offset, where)
        for name in alignment.scaling
    }
    changes: dict[str, Any] = {}
    in_file = {field: getattr(peft_config, field) for field in RANK_FIELDS}
    alignment.padded = _narrow_padded(alignment.plain, layers, adapter_name)
    if alignment.padded:
        alignment.padded_fields = in_file
        changes = _exact_fields(in_file, layers, adapter_name)
    if config.offset == "base":
        alignment.saved, changes = in_file | changes, alignment.original
        for name, (a, b) in factors.items():
            set_rank(layers[name], adapter_name, a.rank)
            shift_base(layers[name], a.start, b.start, alignment.scaling[name])
    follow_ties(model, adapter_name)
    model.peft_config[adapter_name] = AlignedLoraConfig.of(peft_config, alignment, **changes)
    follow_adapters(model)


@torch.no_grad()
def _narrow_padded(
    plain: Mapping[str, tuple[int, float]], layers: Mapping[str, Any], adapter: str
) -> dict[str, Padded]:
    """Give plain layers that a file holds padded to rank 2r the rank r that trains.

    Args:
        plain: Layer name → (r, α), of the plain layers.
        layers: Layer name → module, as loaded.
        adapter: The adapter.

    Returns:
        Layer name → how it is padded, of the layers that were.
    """
    found = {}
    for name, (rank, _) in plain.items():
        layer = layers[name]
        pair, padded = entries(layer, adapter), padding_of(layer, adapter, loaded=True)
        if layer.r[adapter] != 2 * rank or padded is None:
            continue
        values = [padded.unpadded(weight_of(entry), letter) for letter, entry in zip("AB", pair, strict=True)]
        if any(value is weight_of(entry) for value, entry in zip(values, pair, strict=True)):
            continue
        sizes = (("out_features", "out_channels"), ("in_features", "in_channels"))
        tables = layout_of(layer).factor_tables
        for entry, value, attributes, table in zip(pair, values, sizes, tables, strict=True):
            parameter = nn.Parameter(value, weight_of(entry).requires_grad)
            if not isinstance(entry, nn.Module):  # of an embedding
                getattr(layer, table)[adapter] = parameter
                continue
            entry.weight = parameter
            for attribute in attributes:
                if attribute in vars(entry):
                    setattr(entry, attribute, padded.rows)
        set_rank(layer, adapter, rank)
        found[name] = layer
    return load_padded_layers(found, adapter)


def _exact_fields(in_file: Mapping[str, Any], layers: Mapping[str, Any], adapter: str) -> dict[str, Any]:
    """The rank fields of the adapter as it trains, if a file has padded some of its layers."""
    held = {name: layer for name, layer in layers.items() if isinstance(layer, LoraLayer) and adapter in layer.r}
    own = {
        layout_of(layer).pattern_name(layer, name): (layer.r[adapter], layer.lora_alpha[adapter])
        for name, layer in held.items()
    }
    ranks, alphas = patterns_of(own, in_file["r"], in_file["lora_alpha"])
    return {**in_file, "rank_pattern": ranks, "alpha_pattern": alphas}


def _restore_pair(
    name: str, layer: LoraLayer, adapter_name: str, tensors: dict[str, Tensor], offset: str, where: str
) -> tuple[Factor, Factor]:
    """Replace a layer's plain rank-2r factors by factors with the sidecar's starts.

    Returns:
        The factors.

    Raises:
        ValueError: The sidecar does not belong to the adapter.
    """
    plain = [whole(weight_of(entry)) for entry in entries(layer, adapter_name)]
    a, b = (tensors[f"{name}.{letter}0"].to(old) for letter, old in zip("AB", plain, strict=True))
    pair = make_factors(layer, adapter_name, offset, rank=layer.r[adapter_name] // 2, starts=(a, b))
    for letter, old, factor in zip("AB", plain, pair, strict=True):
        fits = factor.joined().shape == old.shape
        if fits:
            factor.set_delta(factor.delta_in(old))
            if f"{name}.{letter}" in tensors:  # offset="base": B₀ + dB is rounded, so B itself is kept
                factor.trainable.copy_(tensors[f"{name}.{letter}"])
        if not fits or not factor.agrees(old):
            raise ValueError(
                f"{where}: {FILE} does not belong to this adapter: {letter} of {name} has another start. It may be "
                "from before the adapter was trained as plain LoRA. Remove it to load the adapter as plain LoRA, or "
                "put the right one back."
            )
    place(layer, adapter_name, pair)
    return pair


@torch.no_grad()
def restore_starts(model: nn.Module, path: Path, adapter_name: str = "default") -> None:
    """Give an adapter with the structure the exact starts of the checkpoint whose adapter file it has loaded.

    The adapter file holds A₀ + dA, which is rounded. Training continues bit for bit only from the sidecar's A₀ and B₀.

    Args:
        model: The model, its adapter loaded by PEFT's `load_adapter`.
        path: The checkpoint.
        adapter_name: The adapter.

    Raises:
        ValueError: The checkpoint has no sidecar, or that of another adapter. The starts are then as loaded.
    """
    folder = path if adapter_name == "default" else path / adapter_name
    sidecar = read_sidecar(folder)
    if sidecar is None:
        raise ValueError(
            f"{folder}: there is no {FILE}, so this is not a checkpoint of a LoRA-GA run, or the file is lost. Put it "
            "back, or resume from an earlier checkpoint that has it. For a new run from this adapter, as plain LoRA, "
            "remove optimizer.pt, load it with lora_ga.load(base, folder, is_trainable=True), and train without "
            "LoraGACallback."
        )
    tensors, record = sidecar
    alignment = alignment_of(model, adapter_name)
    assert alignment is not None, "the adapter has the structure"
    factors = alignment.factors
    different = sorted(set(record["scaling"]) ^ set(factors))
    if different:
        raise ValueError(
            f"{folder}: {FILE} belongs to an adapter with other layers: {len(different)} layers are in only one of the "
            f"two, as {different[0]}. Give the adapter the settings of the run that is resumed."
        )
    _restore_all(factors, tensors, folder)
    alignment.config = LoraGAConfig.from_record(record["config"])
    alignment.summary = record.get("summary", "")


def _restore_all(factors: Mapping[str, tuple[Factor, Factor]], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Give factors their starts from a checkpoint.

    Raises:
        ValueError: A factor's joined matrix has another start.
    """
    each = [(name, *both) for name, pair in factors.items() for both in zip("AB", pair, strict=True)]
    with contextlib.ExitStack() as stack:
        # DeepSpeed ZeRO-3 restores dA and dB from files of its own, with the start that the model had.
        partitioned = any(in_zero3(factor.trainable) for *_, factor in each)
        read = stack.enter_context(joined_in(folder)) if partitioned else None
        for name, letter, factor in each:
            start = tensors[f"{name}.{letter}0"].to(factor.trainable.device, factor.trainable.dtype)
            loaded = whole(factor.joined()) if read is None else read(name, letter)
            if not _take_start(factor, start, loaded):
                raise ValueError(
                    f"{folder}: {FILE} does not belong to the adapter that was loaded: {letter} of {name} has "
                    "another start. Put the right one back."
                )


def _take_start(factor: Factor, start: Tensor, loaded: Tensor | None) -> bool:
    """Give a factor another start, if its joined matrix then is the one that was loaded. Its delta stays.

    Args:
        factor: The factor.
        start: A₀ or B₀.
        loaded: The joined matrix, whole; None if it is not known.

    Returns:
        Whether the factor has the start now.
    """
    if start.shape != factor.start.shape:
        return False
    given, factor.start = factor.start, start
    with gathered([factor.trainable]):
        agrees = loaded is None or factor.agrees(loaded.to(start.device, start.dtype))
    if not agrees:
        factor.start = given
    return agrees


def _prepare_plain_training(model: nn.Module, path: str | Path, adapter_name: str) -> None:
    """Warn that every row of the adapter trains, and refuse optimizer states that do not fit it later."""
    warn(f"{path} has no {FILE}: it trains on as plain LoRA, every row of its full rank.")
    check_first_steps(model, adapter_name)
