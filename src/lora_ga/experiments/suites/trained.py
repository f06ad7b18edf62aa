"""Trained models that wait for their evaluation: saved after training, removed when the record is in the store.

Training takes hours, and an evaluation that asks a judge over the network may fail after it. The saved model is then
evaluated by the next run, without training again.

A file holds every tensor of the model's state but the frozen parameters that still have the values of the base model.
To restore it, the method builds its model once more, which gives the same modules, and the tensors are loaded into it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_ga.files import parse_json, write_atomically, write_safetensors

TENSORS, FACTS = "model.safetensors", "facts.json"
SCHEMA = 1  # facts without a version are of the first


def fingerprints(model: nn.Module) -> dict[int, str]:
    """The id of every parameter → a digest of its values, to find out later which ones have changed."""
    return {id(parameter): _digest(parameter) for parameter in model.parameters()}


def save(folder: Path, model: nn.Module, base: Mapping[int, str], facts: Mapping[str, Any]) -> None:
    """Saves a trained model.

    Args:
        folder: Its folder; what is in it is replaced.
        model: The trained model.
        base: `fingerprints` of the base model before the method changed it. The base model must still be in memory.
        facts: What the record says about the training, as JSON values.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    parameters = model.named_parameters(remove_duplicate=False)
    unchanged = {name for name, p in parameters if id(p) in base and not p.requires_grad and base[id(p)] == _digest(p)}
    # Clones, as safetensors refuses tensors that share memory (tied weights).
    tensors = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items() if name not in unchanged}
    about = {"schema": SCHEMA, "facts": facts, "unchanged": sorted(unchanged)}
    write_safetensors(folder / TENSORS, tensors, {"format": "pt"})
    write_atomically(folder / FACTS, json.dumps(about).encode())


def is_saved(folder: Path) -> bool:
    """Whether a model was saved here completely: the facts are written last."""
    return (folder / FACTS).is_file()


def restore(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Loads the saved tensors into a model that the method has built anew.

    Args:
        folder: Where `save` put it.
        model: Gets the tensors; what is trained must have its dtype already.

    Returns:
        The facts.

    Raises:
        ValueError: The files are damaged, or the model has other modules or shapes.
    """
    try:
        saved = parse_json((folder / FACTS).read_text(encoding="utf-8"))
        schema, facts, unchanged = saved.get("schema", SCHEMA), dict(saved["facts"]), {*saved["unchanged"]}
        found = model.load_state_dict(load_file(folder / TENSORS), strict=False) if schema == SCHEMA else None
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: the trained model cannot be loaded ({error}). Remove this folder to train it again."
        ) from error
    if found is None:
        raise ValueError(
            f"{folder}: written in format {schema}, this version reads format {SCHEMA}. Judge it with the version that "
            "wrote it, or remove this folder to train it again."
        )
    wrong = sorted({*found.unexpected_keys, *(set(found.missing_keys) ^ unchanged)})
    if wrong:
        raise ValueError(
            f"{folder}: the saved model and the one that was built differ in {', '.join(wrong[:3])}. "
            "Remove this folder to train it again."
        )
    return facts


def discard(folder: Path) -> None:
    """Removes a saved model, if there is one, and the folder above it if that is empty then."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()
