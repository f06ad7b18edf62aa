"""Files: safetensors only, with a record of where they come from, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

SCHEMA = 2


def plain(model: Any) -> nn.Module:
    """The base model of a `PeftModel`, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def fingerprint(model: nn.Module) -> str:
    """A digest of a base model's structure: its modules' paths and the shapes of their weights, not their values.

    Adapters do not count, and linear layers count by their inputs and outputs, so that the plain, the wrapped and the
    quantised form of a model share one fingerprint.

    Args:
        model: A base model, or a `PeftModel` round it.

    Returns:
        16 hexadecimal digits.
    """
    base = plain(model)
    shapes: set[tuple[str, tuple[int, ...]]] = set()
    for name, module in base.named_modules():
        parts = name.split(".")
        adapter = any(part.startswith(("lora_", "trainable_tokens_")) or part == "modules_to_save" for part in parts)
        if adapter or hasattr(module, "base_layer"):
            continue
        path = ".".join(part for part in parts if part not in ("base_layer", "original_module", "token_adapter"))
        outputs, inputs = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if isinstance(outputs, int) and isinstance(inputs, int):
            shapes.add((path, (outputs, inputs)))
            continue
        for key, parameter in module.named_parameters(recurse=False):
            # of ZeRO-3's parameters the shape is kept aside, and the numbers are elsewhere
            shapes.add((f"{path}.{key}", tuple(getattr(parameter, "ds_shape", parameter.shape))))
    return hashlib.sha256(json.dumps(sorted(shapes)).encode()).hexdigest()[:16]


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """In words, where two nested records of plain values differ; "" if they do not.

    Args:
        found: One record.
        expected: The other.

    Returns:
        The first three differences, and the number of the others.
    """
    listed = []

    def compare(one: Any, other: Any, path: str) -> None:
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            for key in dict.fromkeys((*one, *other)):
                compare(one.get(key, "nothing"), other.get(key, "nothing"), f"{path}.{key}" if path else str(key))
        elif one != other:
            listed.append(f"{path} is {one!r} in one, {other!r} in the other")

    compare(found, expected, "")
    more = f"; and {len(listed) - 3} more" if len(listed) > 3 else ""
    return "; ".join(listed[:3]) + more


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that at every moment the old or the new one is there, whole.

    Args:
        path: Where to; the folder is made if need be.
        content: The bytes.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_tensors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write tensors and a record to one safetensors file, atomically.

    Args:
        path: The file.
        kind: What it is, checked on reading.
        tensors: Name → tensor, of any device.
        record: Plain values, kept as JSON in the file's header.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {
        "format": "pt",
        "kind": kind,
        "schema": str(SCHEMA),
        "record": json.dumps(record),
        "sha256": _digest(plain),
    }
    write_atomically(path, save(plain, metadata=header))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of all values, whatever the order of the tensors in the file."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        total.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote. Nothing in the file is executed.

    Args:
        path: The file.
        kind: What it has to be.

    Returns:
        The tensors, on the CPU, and the record.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, of another kind, or of a version this library does not know.
    """
    if Path(path).is_dir():
        raise FileNotFoundError(f"{path}: a folder; give the file itself (expected {kind}).")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file (expected {kind}).")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file ({error}). Write it anew.") from error
    if header.get("kind") != kind:
        raise ValueError(f"{path}: holds {header.get('kind', 'tensors of another program')}, expected {kind}.")
    if header.get("schema") != str(SCHEMA):
        raise ValueError(
            f"{path}: written in format {header.get('schema')}, this version reads format {SCHEMA}. Write it anew."
        )
    if header.get("sha256") != _digest(tensors):
        raise ValueError(f"{path}: damaged, its values do not fit their checksum. Write it anew.")
    try:
        return tensors, json.loads(header["record"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged, its record cannot be read ({error}). Write it anew.") from error


def check_empty(folder: str | Path) -> Path:
    """Refuse an output folder that holds something.

    Args:
        folder: The folder; it need not exist.

    Returns:
        The folder as a path.

    Raises:
        ValueError: It is a file, or not empty.
    """
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path}: not empty. Choose another output folder, or remove this one; nothing was written.")
    return path


class whole_folder:  # noqa: N801 (a context manager)
    """A temporary folder that becomes `target` when the block ends without an error, and vanishes otherwise."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> Path:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(dir=self.target.parent, prefix=f".{self.target.name}."))
        return self.folder

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.folder)
            return
        self.folder.chmod(0o755)
        self.folder.replace(self.target)  # an empty target is replaced as well
