"""Writing a finished adapter with another rank: compressed to a lower one, or padded with zeros to a higher one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from lora_ga.adapter.alignment import scaling_of
from lora_ga.export.saved_adapter import read_adapter
from lora_ga.files import Companions, check_empty, damaged, new_folder, no_companions, write_safetensors
from lora_ga.layers.targets import PREFIX


def compress_adapter(
    path: str | Path, out: str | Path, rank: int, *, companions: Companions = no_companions
) -> dict[str, float]:
    """Write the best adapter of a lower rank, by SVD of each layer's product s·B A (Eckart and Young, 1936).

    Args:
        path: The folder of a LoRA adapter, for instance one of rank 2r written after LoRA-GA training.
        out: A new or empty folder for the compressed adapter: plain LoRA with s = 1 in every layer.
        rank: The new rank k.
        companions: Called with the new folder before it appears, to write more files into it.

    Returns:
        Layer name → ‖ΔW − ΔW_k‖ / ‖ΔW‖.

    Raises:
        FileNotFoundError: There is no adapter in `path`.
        ValueError: The rank is not below the adapter's, the adapter is not plain LoRA of linear layers, or `out` is
            not empty.
    """
    source = Path(path)
    check_empty(out)
    config, tensors = read_adapter(source)
    with damaged(source):
        names = _linear_layers(tensors, config, source)
    largest = max(tensors[f"{name}.lora_A.weight"].shape[0] for name in names)
    if not 1 <= rank < largest:
        raise ValueError(f"rank {rank}: the adapter has rank {largest}; compress to a rank from 1 to {largest - 1}.")
    return resize_adapter(source, out, rank, companions=companions)


def resize_adapter(
    path: str | Path, out: str | Path, rank: int, *, companions: Companions = no_companions
) -> dict[str, float]:
    """Write an adapter that has one rank and s = 1 in every layer.

    Layers of a higher rank are compressed, those of a lower rank padded with zeros.

    Args:
        path: The folder of a LoRA adapter.
        out: A new or empty folder.
        rank: The rank of every layer.
        companions: Called with the new folder before it appears, to write more files into it.

    Returns:
        Layer name → ‖ΔW − ΔW_k‖ / ‖ΔW‖; zero for layers that were not compressed.

    Raises:
        FileNotFoundError: There is no adapter in `path`.
        ValueError: The adapter is not plain LoRA of linear layers, or `out` is not empty.
    """
    source, target = Path(path), check_empty(out)
    tensors, errors = resized(source, rank)
    values: dict[str, Any] = json.loads((source / CONFIG_NAME).read_text())
    values |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    with new_folder(target) as folder:
        write_safetensors(folder / SAFETENSORS_WEIGHTS_NAME, tensors, {"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True))
        companions(folder)
    return errors


def resized(source: Path, rank: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors of an adapter, with one rank and s = 1 in every layer.

    Args:
        source: The adapter's folder.
        rank: The rank.

    Returns:
        The tensors by PEFT's names, and layer name → relative error, as `resize_adapter` returns it.

    Raises:
        ValueError: A file is damaged.
    """
    with damaged(source):
        return _resized(source, rank)


def _resized(source: Path, rank: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """See `resized`."""
    config, tensors = read_adapter(source)
    errors = {}
    for name in _linear_layers(tensors, config, source):
        layer = name.removeprefix(PREFIX)
        scaling = scaling_of(config, layer)
        a, b = (f"{name}.lora_{letter}.weight" for letter in "AB")
        change = _padded if len(tensors[a]) <= rank else _truncated
        tensors[a], tensors[b], errors[layer] = change(tensors[a], scaling * tensors[b], rank)
        bias = f"{name}.lora_B.bias"
        if bias in tensors:
            tensors[bias] = scaling * tensors[bias]
    return tensors, errors


def _linear_layers(tensors: Mapping[str, Tensor], config: LoraConfig, path: Path) -> list[str]:
    """The layers in an adapter file, which all have to be linear.

    Returns:
        Their paths in the file.

    Raises:
        ValueError: The adapter holds other LoRA parameters too.
    """
    if config.target_parameters:
        raise ValueError(
            f"{path}: adapts parameters by target_parameters ({config.target_parameters[0]}), whose rank cannot be "
            "changed. Merge it."
        )
    if config.use_dora:
        raise ValueError(f"{path}: a DoRA adapter; its magnitudes do not fit a product of lower rank. Merge it.")
    names = []
    for key, tensor in tensors.items():
        if ".lora_" not in key or key.endswith(".lora_B.bias"):
            continue
        match = re.fullmatch(r"(.+)\.lora_[AB]\.weight", key)
        if match is None or tensor.dim() != 2:
            raise ValueError(
                f"{path}: {key} is not a factor of a linear layer; only linear layers can be compressed. Merge it."
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {key} holds numbers that are not finite. Take an earlier checkpoint.")
        if key.endswith(".lora_A.weight"):
            names.append(match[1])
    if not names:
        raise ValueError(f"{path}: holds no LoRA layers. Give the folder of a LoRA adapter.")
    return names


def _padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A and B with zero rows and columns up to `rank`, and the relative error of their product, which is 0."""
    missing = rank - len(a)
    return nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing)), 0.0


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best A and B of `rank` for the product b a, of equal norms, and the relative error (Frobenius)."""
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT)
    root = s[:rank].sqrt()
    left, right = (q_b @ u[:, :rank]) * root, (root[:, None] * vh[:rank]) @ q_a.mT
    total = s.norm()
    lost = s[rank:].norm() / total if total > 0 else total
    missing = rank - len(root)  # if the layer is smaller than the rank: zero rows and columns
    if missing > 0:
        left = torch.cat([left, left.new_zeros(len(left), missing)], dim=1)
        right = torch.cat([right, right.new_zeros(missing, right.shape[1])])
    return right.to(a.dtype).contiguous(), left.to(b.dtype).contiguous(), lost.item()
