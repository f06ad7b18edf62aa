"""The adapter file: what PEFT and wrappers have written is rewritten as a plain LoRA for the original base model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import save as as_safetensors
from torch import nn

from lora_ga.files import COMPILED, damaged, without_compiled, write_atomically
from lora_ga.layers.factors import Factor, without_start
from lora_ga.layers.targets import PREFIX

Factors = Mapping[str, tuple[Factor, Factor]]


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
    with safe_open(str(weights), framework="pt") as file:
        names = {key: without_compiled(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        if not halves.keys() & set(names.values()) and all(key == name for key, name in names.items()):
            return
        header, tensors = file.metadata(), {name: file.get_tensor(key) for key, name in names.items()}
    for key in halves.keys() & tensors.keys():
        plain, factor = halves[key]
        delta = tensors.pop(key)
        start = factor.start.to(delta)
        tensors[plain] = factor.join(delta, start + delta) if factor.joined_dim == 0 else factor.join(start, delta)
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    write_atomically(weights, as_safetensors(contiguous, metadata=header))


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
    if (file := folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        with damaged(file), safe_open(str(file), framework="pt") as opened:
            names = list(opened.keys())
    elif (file := folder / WEIGHTS_NAME).is_file():
        with damaged(file):
            names = list(torch.load(file, weights_only=True, map_location="meta"))
    else:
        return
    for reason in without_start(names):
        raise ValueError(f"{file}: {reason}")
    compiled = [name for name in names if name != without_compiled(name)]
    if compiled and base is not None and not compiled_names(base):
        raise ValueError(
            f"{file}: was saved from get_peft_model(torch.compile(base)), so its names contain {COMPILED} (as "
            f"{compiled[0]}) and PEFT would load nothing of it onto this base. Load it once with "
            "lora_ga.load(torch.compile(base), ...) and save it again: the new file has the plain names."
        )
