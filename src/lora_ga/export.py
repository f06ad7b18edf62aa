"""What happens to a finished adapter: compress it to a lower rank, or merge it into a full checkpoint."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_ga.targets import PREFIX


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


def scaling_of(config: LoraConfig, name: str) -> float:
    """The scaling s PEFT gives a layer: α/r, or α/√r with rsLoRA, after the patterns.

    Args:
        config: The adapter's configuration.
        name: The layer's path in the base model.

    Returns:
        s.
    """
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return alpha / rank**0.5 if config.use_rslora else alpha / rank


def _pairs(tensors: dict[str, Tensor], config: LoraConfig, path: Path) -> list[str]:
    """The layers of an adapter file that hold an A and a B of a linear layer.

    Returns:
        Their paths in the file.

    Raises:
        ValueError: The adapter holds something else of LoRA.
    """
    if config.target_parameters:
        raise ValueError(
            f"{path}: adapts parameters without a layer of their own ({config.target_parameters[0]}); merge it."
        )
    if config.use_dora:
        raise ValueError(f"{path}: a DoRA adapter; its product has magnitudes that a lower rank cannot keep. Merge it.")
    names = []
    for key, tensor in tensors.items():
        if ".lora_" not in key or key.endswith(".lora_B.bias"):
            continue
        match = re.fullmatch(r"(.+)\.lora_[AB]\.weight", key)
        if match is None or tensor.dim() != 2:
            raise ValueError(f"{path}: {key} is not a factor of a linear layer; only those can be compressed.")
        if key.endswith(".lora_A.weight"):
            names.append(match[1])
    if not names:
        raise ValueError(f"{path}: holds no LoRA layers.")
    return names


def _padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The same product with zero rows and columns up to `rank`, exactly."""
    missing = rank - len(a)
    return nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing)), 0.0


def _compress(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best rank-`rank` factors of b a, evenly balanced, and the relative error of the product (Frobenius)."""
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT)
    root = s[:rank].sqrt()
    left, right = (q_b @ u[:, :rank]) * root, (root[:, None] * vh[:rank]) @ q_a.mT
    total = s.norm()
    lost = s[rank:].norm() / total if total > 0 else total
    missing = rank - len(root)  # only where the layer is smaller than the rank: zero rows and columns
    if missing > 0:
        left = torch.cat([left, left.new_zeros(len(left), missing)], dim=1)
        right = torch.cat([right, right.new_zeros(missing, right.shape[1])])
    return right.to(a.dtype).contiguous(), left.to(b.dtype).contiguous(), lost.item()


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read a saved adapter.

    Args:
        folder: Its folder.

    Returns:
        Its configuration and its weights.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged.
    """
    for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder}: holds no {file}; give the folder that save_pretrained wrote.")
    try:
        return PeftConfig.from_pretrained(str(folder)), load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except (SafetensorError, json.JSONDecodeError) as error:
        files = f"{CONFIG_NAME} or {SAFETENSORS_WEIGHTS_NAME}"
        raise ValueError(f"{folder}: damaged, {files} cannot be read ({error}). Save the adapter anew.") from error


def compress_adapter(path: str | Path, out: str | Path, rank: int) -> dict[str, float]:
    """Write the best adapter of a lower rank, by SVD of each layer's product s·B A (Eckart and Young, 1936).

    Args:
        path: The folder of a LoRA adapter, for instance one of rank 2r written after LoRA-GA training.
        out: A new or empty folder for the compressed adapter: plain LoRA with s = 1 in every layer.
        rank: The new rank k.

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
    names = _pairs(tensors, config, source)
    largest = max(tensors[f"{name}.lora_A.weight"].shape[0] for name in names)
    if not 1 <= rank < largest:
        raise ValueError(f"rank {rank}: the adapter has rank {largest}; compress to a rank from 1 to {largest - 1}.")
    return resize_adapter(source, out, rank)


def resize_adapter(path: str | Path, out: str | Path, rank: int) -> dict[str, float]:
    """Write an adapter of one rank and s = 1 in every layer: larger layers compressed, smaller ones padded with zeros.

    Args:
        path: The folder of a LoRA adapter.
        out: A new or empty folder.
        rank: The rank of every layer.

    Returns:
        Layer name → ‖ΔW − ΔW_k‖ / ‖ΔW‖; zero for layers that were not larger.

    Raises:
        FileNotFoundError: There is no adapter in `path`.
        ValueError: The adapter is not plain LoRA of linear layers, or `out` is not empty.
    """
    source, target = Path(path), check_empty(out)
    config, tensors = read_adapter(source)
    errors = {}
    for name in _pairs(tensors, config, source):
        layer = name.removeprefix(PREFIX)
        scaling = scaling_of(config, layer)
        a, b = (f"{name}.lora_{letter}.weight" for letter in "AB")
        change = _padded if len(tensors[a]) <= rank else _compress
        tensors[a], tensors[b], errors[layer] = change(tensors[a], scaling * tensors[b], rank)
        bias = f"{name}.lora_B.bias"
        if bias in tensors:
            tensors[bias] = scaling * tensors[bias]
    values: dict[str, Any] = json.loads((source / CONFIG_NAME).read_text())
    values |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    with whole_folder(target) as folder:
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True))
    return errors


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


def merge_adapter(path: str | Path, out: str | Path, *, base: nn.Module) -> None:
    """Write the base model with an adapter merged into its weights, as a full checkpoint.

    The merged model, written and read again, is what the adapted one computes up to the rounding of the weights' dtype.

    Args:
        path: The adapter's folder.
        out: A new or empty folder.
        base: The original base model, without LoRA layers; it is changed in place.

    Raises:
        FileNotFoundError: There is no adapter in `path`.
        TypeError: The base model cannot be saved.
        ValueError: `out` is not empty, the base is quantised, an adapted weight is shared with other modules, the
            adapter is damaged, or the merged weights are not finite.
    """
    target = check_empty(out)
    if not hasattr(base, "save_pretrained"):
        raise TypeError(f"The base is a {type(base).__name__} without save_pretrained; give a Transformers model.")
    if getattr(base, "is_quantized", False):
        raise ValueError("The base model is quantised; load it in full precision to merge an adapter into it.")
    read_adapter(Path(path))
    model = PeftModel.from_pretrained(base, str(path))
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.removeprefix(PREFIX))
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            shared = owners.get(id(getattr(layer.get_base_layer(), "weight", None)), [])
            if len(shared) > 1:
                model.unload()
                raise ValueError(
                    f"{name.removeprefix(PREFIX)}: its weight is shared ({', '.join(shared)}), so merging would change "
                    "all. Untie them first: set config.tie_word_embeddings=False and give the layer a copy."
                )
    merged = model.merge_and_unload(safe_merge=True)
    with whole_folder(target) as folder:
        merged.save_pretrained(folder)
