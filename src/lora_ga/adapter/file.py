"""The adapter file: what PEFT and wrappers have written is rewritten as a plain LoRA for the original base model."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import save as as_safetensors
from torch import Tensor, nn

from lora_ga.base import COMPILED, without_compiled
from lora_ga.files import damaged, write_atomically
from lora_ga.layers.factors import Factor, without_start
from lora_ga.layers.targets import PREFIX

# How the names of A and of B end in a file, of layers and of embeddings.
ENDS = {"A": (".lora_A.weight", ".lora_embedding_A"), "B": (".lora_B.weight", ".lora_embedding_B")}
Factors = Mapping[str, tuple[Factor, Factor]]


def adapter_file(folder: Path) -> Path:
    """The file of an adapter's tensors: as safetensors, or as PEFT writes it with `safe_serialization=False`.

    Args:
        folder: The adapter's folder.

    Returns:
        The file that PEFT would load; if there is none, the path that it would have as safetensors.
    """
    safe, other = folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME
    return other if other.is_file() and not safe.is_file() else safe


@contextlib.contextmanager
def opened(weights: Path) -> Iterator[tuple[Mapping[str, str] | None, list[str], Callable[[str], Tensor]]]:
    """Open an adapter file.

    Args:
        weights: The file.

    Yields:
        Its metadata, the names of its tensors, and a function from a name to the tensor.
    """
    if weights.name == WEIGHTS_NAME:
        tensors = torch.load(weights, weights_only=True, map_location="cpu")
        yield None, list(tensors), tensors.__getitem__
    else:
        with safe_open(str(weights), framework="pt") as file:
            yield file.metadata(), list(file.keys()), file.get_tensor


@contextlib.contextmanager
def joined_in(folder: Path) -> Iterator[Callable[[str, str], Tensor | None]]:
    """Open an adapter's folder, to read the joined matrices of its factors.

    Args:
        folder: The folder.

    Yields:
        A function from a layer and "A" or "B" to the matrix, (2r, I) or (O, 2r); None if there is no adapter file, or
        it does not hold the factor.

    Raises:
        ValueError: The file is damaged.
    """
    if not (weights := adapter_file(folder)).is_file():
        yield lambda name, letter: None
        return
    with contextlib.ExitStack() as stack:
        with damaged(weights):
            _, keys, tensor = stack.enter_context(opened(weights))
        held = set(keys)

        def joined(name: str, letter: str) -> Tensor | None:
            key = next((key for end in ENDS[letter] if (key := f"{PREFIX}{name}{end}") in held), None)
            with damaged(weights):
                return None if key is None else tensor(key)

        yield joined


def _write(weights: Path, tensors: dict[str, Tensor], header: Mapping[str, str] | None) -> None:
    """Write an adapter file in the format that its name has."""
    if weights.name != WEIGHTS_NAME:
        write_atomically(weights, as_safetensors(tensors, metadata=None if header is None else dict(header)))
        return
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write_atomically(weights, buffer.getvalue())


def rewrite(weights: Path, factors: Factors) -> None:
    """Rewrite an adapter file where it is not a plain LoRA of rank 2r for the original base.

    - `get_peft_model(torch.compile(base))` has another step in the names of its tensors. PEFT would load none of them
      onto the base.
    - DeepSpeed ZeRO-3 gathers parameters by their names, so files saved under it hold the trained halves of factors.

    Args:
        weights: The file, just written.
        factors: The factors of the aligned layers.
    """
    halves = {
        f"{PREFIX}{name}.lora_{letter}.{factor.trainable_name}": (f"{PREFIX}{name}.lora_{letter}.weight", factor)
        for name, pair in factors.items()
        for letter, factor in zip("AB", pair, strict=True)
        if factor.trainable_name != "weight"
    }
    with opened(weights) as (header, keys, tensor):
        names = {key: without_compiled(key) for key in keys}
        if not halves.keys() & set(names.values()) and all(key == name for key, name in names.items()):
            return
        tensors = {name: tensor(key) for key, name in names.items()}
    for key in halves.keys() & tensors.keys():
        plain, factor = halves[key]
        delta = tensors.pop(key)
        start = factor.start.to(delta)
        tensors[plain] = factor.join(delta, start + delta) if factor.joined_dim == 0 else factor.join(start, delta)
    _write(weights, {key: value.contiguous() for key, value in tensors.items()}, header)


class Padded(NamedTuple):
    """A plain layer whose matrices a file holds at twice their rank.

    Attributes:
        rank: Its rank r.
        parts: Its parts: experts of a layer, groups of a convolution. Each has its own rows of A, side by side.
        rows: The rows of A.
        columns: The columns of B. Appending columns appends them to every part: experts take turns, and each group of a
            convolution reads all of them.
    """

    rank: int
    parts: int
    rows: int
    columns: int

    def padded(self, value: Tensor, letter: str) -> Tensor | None:
        """A or B with zeros up to twice its rank; None if it does not have this rank."""
        dim, size, parts = self._along(letter)
        if value.dim() <= dim or value.shape[dim] != size:
            return None
        own = value.unflatten(dim, (parts, -1))
        return torch.cat([own, torch.zeros_like(own)], dim=dim + 1).flatten(dim, dim + 1)

    def unpadded(self, value: Tensor, letter: str) -> Tensor:
        """A or B of a file as it trains: without the zeros up to twice its rank, if it has them."""
        dim, size, parts = self._along(letter)
        if value.dim() <= dim or value.shape[dim] != 2 * size:
            return value
        own, added = value.unflatten(dim, (parts, 2, -1)).unbind(dim + 1)
        return value if bool(added.any()) else own.flatten(dim, dim + 1).clone()

    def _along(self, letter: str) -> tuple[int, int, int]:
        """The dimension that is padded, its size, and into how many parts it falls."""
        return (0, self.rows, self.parts) if letter == "A" else (1, self.columns, 1)


def pad(weights: Path, layers: Mapping[str, Padded]) -> bool:
    """Pad layers of an adapter file with zeros to twice their rank, if the file holds all of them at their rank.

    Args:
        weights: The file.
        layers: Layer name → how it is padded.

    Returns:
        Whether they were padded.
    """
    with opened(weights) as (header, keys, tensor):
        tensors = {key: tensor(key) for key in keys}
    for name, layer in layers.items():
        for letter, ends in ENDS.items():
            key = next((f"{PREFIX}{name}{end}" for end in ends if f"{PREFIX}{name}{end}" in tensors), None)
            value = None if key is None else layer.padded(tensors[key], letter)
            if key is None or value is None:
                return False
            tensors[key] = value
    _write(weights, tensors, header)
    return True


def load_padded(table: Any, adapter: str, layer: Padded, letter: str) -> None:
    """Let one of PEFT's tables of factors load the padded matrix of a file, as where a trainer resumes.

    Args:
        table: A layer's `lora_A` or `lora_B`, or the same of an embedding.
        adapter: The adapter.
        layer: How the layer is padded.
        letter: "A" or "B".
    """
    module, key = (table, adapter) if isinstance(table, nn.ParameterDict) else (table[adapter], "weight")
    module.register_load_state_dict_pre_hook(functools.partial(_unpad, key=key, layer=layer, letter=letter))


def _unpad(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: Any, key: str, layer: Padded, letter: str
) -> None:
    if (name := prefix + key) in state_dict:
        state_dict[name] = layer.unpadded(state_dict[name], letter)


def compiled_names(base: nn.Module) -> dict[str, str]:
    """How a base model that was compiled, or whose blocks were, names what a file holds: PEFT's `key_mapping`.

    Args:
        base: A base model, plain or compiled.

    Returns:
        Pattern → replacement of names that lack the step that torch.compile adds; empty if nothing is compiled.
    """
    wrapped = [path for path, module in base.named_modules() if COMPILED in dict(module.named_children())]
    starts = [f"{path}." if path else "" for path in wrapped]
    return {rf"^{re.escape(without_compiled(start))}(?!{COMPILED}\.)": f"{start}{COMPILED}." for start in starts}


def check_names(folder: Path, base: nn.Module | None = None) -> None:
    """Refuse an adapter file of which PEFT would load nothing.

    Args:
        folder: The adapter's folder; nothing happens if it holds no adapter file.
        base: The base model it is for; None if it is only to be read.

    Raises:
        ValueError: The file is damaged, was written by hand and holds dA and dB alone, or has the names of a compiled
            base and `base` is not compiled.
    """
    if not (file := adapter_file(folder)).is_file():
        return
    with damaged(file), opened(file) as (_, keys, _):
        names = keys
    for reason in without_start(names):
        raise ValueError(f"{file}: {reason}")
    compiled = [name for name in names if name != without_compiled(name)]
    if compiled and base is not None and not compiled_names(base):
        raise ValueError(
            f"{file}: was saved from get_peft_model(torch.compile(base)), so its names contain {COMPILED} (as "
            f"{compiled[0]}) and PEFT would load nothing of it onto this base. Load it once with "
            "lora_ga.load(torch.compile(base), ...) and save it again: the new file has the plain names."
        )
