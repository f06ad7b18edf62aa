"""Converting a run of another LoRA-GA implementation into an adapter for the original base.

The authors' fork and PEFT's `init_lora_weights="lora_ga"` train A and B on the changed base W − s·B₀A₀, so the trained
adapter is wrong on the original W. The initial adapter gives the change:

    W − s·B₀A₀ + s·B A  =  W + s·(B A − B₀A₀)  =  W + s·[B₀, B − B₀]·[A − A₀ ; A],

a plain LoRA of rank 2r and the same s. The form [B, −B₀]·[A ; A₀] is the same product, but a difference of two large
products, which loses digits in low precision. DoRA's magnitudes, biases and modules trained in full act on the same
weight as before, and are copied from the final adapter.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lora_ga.adapter.save import FILE as SIDECAR
from lora_ga.files import (
    Companions,
    adapters_in,
    check_empty,
    damaged,
    new_folder,
    no_companions,
    parse_json,
    write_safetensors,
)
from lora_ga.warn import warn

# The factors of linear and convolution layers, and of embeddings: letter → the dimension of the rank.
FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<kind>embedding_)?(?P<letter>[AB])(?P<weight>\.weight)?")
JOINED_DIM = {"A": 0, "B": 1}
# Fields of the configuration that must be equal in both adapters, and their names in messages.
MUST_AGREE = {
    "r": "rank",
    "lora_alpha": "alpha",
    "use_rslora": "rank-stabilised scaling",
    "rank_pattern": "rank pattern",
    "alpha_pattern": "alpha pattern",
    "use_dora": "DoRA",
    "target_modules": "target modules",
    "fan_in_fan_out": "storage of the weights",
}
# Below this cosine between A and A₀ (median over layers) two adapters are probably of two runs.
UNRELATED = 0.1

Config = dict[str, Any]
Tensors = dict[str, Tensor]


def convert_run(
    init: str | Path, final: str | Path, out: str | Path, *, companions: Companions = no_companions
) -> dict[str, float]:
    """Write an adapter for the original base, from the initial and the final adapter of a run on a changed base.

    Args:
        init: The folder of the adapter as it was before training.
        final: The folder of the adapter after training (or any checkpoint of it).
        out: A new or empty folder: a plain rank-2r adapter in float32.
        companions: Called with the new folder before it appears, to write more files into it.

    Returns:
        Layer name → relative error (Frobenius) of the product read back against s·(B A − B₀A₀) in float64.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, the two adapters do not belong together, nothing was trained, the adapter needs
            no conversion or allows none, or what was written cannot be read back.
    """
    first, last, target = Path(init), Path(final), check_empty(out)
    with damaged(first, last):
        return _convert(first, last, target, companions)


def _convert(first: Path, last: Path, target: Path, companions: Companions) -> dict[str, float]:
    """Convert the run; see `convert_run`."""
    (config_0, tensors_0), (config, tensors) = _read(first), _read(last)
    _check_convertible(config, tensors, last)
    _check_same_run(config_0, config, first, last)
    pairs = _factor_keys(tensors, last)
    _check_tensors(tensors_0, tensors, pairs, first, last)
    joined = dict(tensors)
    for a, b in pairs.values():
        a_0, b_0 = tensors_0[a].float(), tensors_0[b].float()
        joined[a] = torch.cat([tensors[a].float() - a_0, tensors[a].float()], dim=JOINED_DIM["A"])
        joined[b] = torch.cat([b_0, tensors[b].float() - b_0], dim=JOINED_DIM["B"])
    with new_folder(target) as folder:
        contiguous = {key: tensor.contiguous() for key, tensor in joined.items()}
        write_safetensors(folder / SAFETENSORS_WEIGHTS_NAME, contiguous, {"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(_rank_2r_config(config), indent=2, sort_keys=True))
        companions(folder)
        return _check_written(folder, pairs, tensors_0, tensors)


def _read(folder: Path) -> tuple[Config, Tensors]:
    """Read an adapter's configuration and tensors. The configuration may have fields that PEFT does not know.

    Returns:
        The configuration and the tensors.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or the adapter is not LoRA.
    """
    for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / file).is_file():
            found = f"holds no {file}" if folder.is_dir() else "there is no such folder"
            wanted = " or ".join(map(str, adapters_in(folder))) or "the folder that save_pretrained wrote"
            raise FileNotFoundError(f"{folder}: {found}; give {wanted}.")
    try:
        config = parse_json((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{folder}: damaged, its files cannot be read ({error}). Take another copy.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder}: damaged, {CONFIG_NAME} is not a mapping. Take another copy.")
    if config.get("peft_type") not in {"LORA", "LORAGA"}:  # the second in the authors' fork
        raise ValueError(f"{folder}: an adapter of type {config.get('peft_type')}; only LoRA can be converted.")
    return config, tensors


def _check_convertible(config: Config, tensors: Tensors, path: Path) -> None:
    """Refuse a final adapter that needs no conversion, or whose change of the base no adapter can undo.

    Raises:
        ValueError: The adapter is one of these.
    """
    if (path / SIDECAR).is_file():
        raise ValueError(
            f"{path}: holds {SIDECAR}, so it was trained with this library and needs no conversion: it is for the "
            "original base."
        )
    if config.get("layer_replication"):
        raise ValueError(
            f"{path}: layer_replication makes several layers share one base weight, which each of them has changed; "
            "the adapter of one layer cannot undo that. Merge it on the base it was trained on."
        )
    if config.get("target_parameters"):
        raise ValueError(
            f"{path}: adapts parameters by target_parameters ({config['target_parameters'][0]}), whose factors cannot "
            "be joined. Merge it on the base it was trained on."
        )
    infinite = [
        key for key, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if infinite:
        raise ValueError(f"{path}: {infinite[0]} holds numbers that are not finite. Take an earlier checkpoint.")


def _check_same_run(config_0: Config, config: Config, first: Path, last: Path) -> None:
    """Refuse two adapters whose configurations cannot be of one run.

    Raises:
        ValueError: They differ; the message names the first difference.
    """
    bases = [each.get("base_model_name_or_path") for each in (config_0, config)]
    if all(bases) and bases[0] != bases[1]:
        raise ValueError(
            f"{first} and {last} do not belong together: their base models are {bases[0]} and {bases[1]}. Give the "
            "initial and the final adapter of one run."
        )
    for field, words in MUST_AGREE.items():
        one, other = (_normalised(each.get(field)) for each in (config_0, config))
        if one != other:
            raise ValueError(
                f"{first} and {last} do not belong together: their {words} ({field}) is {one} and {other}. Give the "
                "initial and the final adapter of one run; one that was converted already is for the original base."
            )


def _normalised(value: Any) -> Any:
    """A field's value for comparison: lists sorted, and None for every empty value."""
    return sorted(value) if isinstance(value, list) else value or None


def _factor_keys(tensors: Tensors, path: Path) -> dict[str, tuple[str, str]]:
    """Find the factors in an adapter file.

    Returns:
        Layer → keys of A and B.

    Raises:
        ValueError: There are none, or one is incomplete.
    """
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        match = FACTOR.fullmatch(key)
        if match:
            found.setdefault(match["layer"], {})[match["letter"]] = key
    if not found:
        raise ValueError(f"{path}: holds no LoRA layers.")
    for layer, keys in found.items():
        if len(keys) < 2:
            raise ValueError(f"{path}: damaged, {layer} has only one of the factors A and B.")
    return {layer: (keys["A"], keys["B"]) for layer, keys in found.items()}


def _check_tensors(
    tensors_0: Tensors, tensors: Tensors, pairs: Mapping[str, tuple[str, str]], first: Path, last: Path
) -> None:
    """Refuse two files whose factors cannot be the start and the end of one run.

    Raises:
        ValueError: They differ in layers or shapes, nothing moved, or the initial product is zero everywhere.
    """
    others = {key for pair in _factor_keys(tensors_0, first).values() for key in pair} ^ {
        key for pair in pairs.values() for key in pair
    }
    if others:
        raise ValueError(
            f"{first} and {last} do not belong together: only one of them holds {min(others)} ({len(others)} such)."
        )
    for key in (key for pair in pairs.values() for key in pair):
        if tensors_0[key].shape != tensors[key].shape:
            raise ValueError(
                f"{first} and {last} do not belong together: {key} is {tuple(tensors_0[key].shape)} and "
                f"{tuple(tensors[key].shape)}."
            )
    if all(torch.equal(tensors_0[key], tensors[key]) for pair in pairs.values() for key in pair):
        raise ValueError(f"{first} and {last} hold the same factors: nothing was trained, or one was given twice.")
    if not any(bool(tensors_0[a].any()) and bool(tensors_0[b].any()) for a, b in pairs.values()):
        raise ValueError(
            f"{first}: every product B₀A₀ is zero, as plain LoRA starts: its base was not changed, and {last} is for "
            "the original base as it is."
        )
    cosines = [_cosine(tensors_0[a], tensors[a]) for a, _ in pairs.values()]
    if median(cosines) < UNRELATED:
        warn(
            f"{first} and {last} may not be of one run: the cosine between their A is {median(cosines):.2f} (median "
            "over layers). If the initial adapter is another run's, the result is wrong."
        )


def _cosine(one: Tensor, other: Tensor) -> float:
    one, other = one.double().flatten(), other.double().flatten()
    size = (one.norm() * other.norm()).item()
    return (one @ other).item() / size if size else 1.0


def _rank_2r_config(config: Config) -> Config:
    """The configuration of the rank-2r adapter, with the scaling of every layer unchanged."""
    root = math.sqrt(2) if config.get("use_rslora") else 2
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    # A layer with one of the two patterns takes the other number from the defaults, so both are doubled everywhere.
    known = {field.name for field in dataclasses.fields(LoraConfig)}  # the authors' fork writes more
    return {field: value for field, value in config.items() if field in known} | {
        "peft_type": "LORA",
        "r": 2 * config["r"],
        "lora_alpha": root * config["lora_alpha"],
        "rank_pattern": {key: 2 * value for key, value in ranks.items()},
        "alpha_pattern": {key: root * value for key, value in alphas.items()},
        "init_lora_weights": True,
        "lora_ga_config": None,
    }


def _check_written(
    folder: Path, pairs: Mapping[str, tuple[str, str]], tensors_0: Tensors, tensors: Tensors
) -> dict[str, float]:
    """Read the written file, and compare every product with B A − B₀A₀ in float64.

    Returns:
        Layer → relative error.

    Raises:
        ValueError: A product differs.
    """
    written = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    errors = {}
    for layer, (a, b) in pairs.items():
        wanted = _product(tensors[a], tensors[b]) - _product(tensors_0[a], tensors_0[b])
        size = _product(tensors[a], tensors[b]).norm() + _product(tensors_0[a], tensors_0[b]).norm()
        errors[layer] = ((_product(written[a], written[b]) - wanted).norm() / size).item() if size else 0.0
        if not errors[layer] <= 1e-5:
            raise ValueError(f"{folder}: {layer} was not written as computed (relative error {errors[layer]:.1e}).")
    return errors


def _product(a: Tensor, b: Tensor) -> Tensor:
    """B A of one layer, (outputs, inputs), in float64. A convolution has inputs times height times width inputs."""
    return b.double().flatten(1) @ a.double().flatten(1)
