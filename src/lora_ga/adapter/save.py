"""The small file beside a saved adapter that lets training go on as LoRA-GA, and PEFT's configuration that writes it.

The adapter file itself is a plain LoRA of rank 2r. The sidecar holds what that form rounds or forgets: the exact A₀ and
B₀ of every aligned layer (and A and B where offset="base"), the scaling, the settings, the base's fingerprint.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lora_ga.adapter.model_card import write_section
from lora_ga.config import LoraGAConfig
from lora_ga.distributed.sharding import sharded
from lora_ga.files import read_tensors, write_atomically, write_tensors
from lora_ga.layers.factors import Factor, Shifted
from lora_ga.layers.targets import PREFIX

FILE = "lora_ga.safetensors"
FILE_KIND = "the LoRA-GA sidecar of an adapter"
# The fields of LoraConfig that rank and scaling are read from.
RANK_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")


@dataclasses.dataclass
class Alignment:
    """What a saved adapter has to remember.

    Attributes:
        factors: Module path → (A, B) of the aligned layers.
        scaling: Module path → s.
        config: The settings of the start.
        fingerprint: Of the base model.
        plain: Module path → (r, α) of layers of the adapter that are plain LoRA.
        original: The rank fields of the user's LoraConfig, before they were doubled.
        twin: The adapter whose configuration this one was given, if it was: it has that one's start.
        summary: What a model card says about the start, in Markdown; empty if there is nothing to say.
        ranks: Part of a layer (the layer itself where it has one) → r, of those that have started from an estimate.
    """

    factors: dict[str, tuple[Factor, Factor]]
    scaling: dict[str, float]
    config: LoraGAConfig
    fingerprint: str
    plain: dict[str, tuple[int, float]]
    original: dict[str, Any]
    twin: str | None = None
    summary: str = ""
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)

    def rank_fields(self, config: LoraConfig) -> dict[str, Any]:
        """Values of `RANK_FIELDS` for the rank-2r adapter, with every layer's scaling unchanged.

        Where all layers are aligned the user's patterns are doubled. Otherwise each layer that differs gets an entry of
        its own: PEFT writes patterns sorted and takes the first that matches, so the two cannot be mixed.

        Args:
            config: The configuration of rank r.

        Returns:
            Field name → value.
        """
        root = math.sqrt(2) if config.use_rslora else 2
        ranks = {key: 2 * value for key, value in (config.rank_pattern or {}).items()}
        alphas = {key: root * value for key, value in (config.alpha_pattern or {}).items()}
        rank, alpha = 2 * config.r, root * config.lora_alpha
        if self.plain:
            layers = dict(self.plain)
            for name, (factor, _) in self.factors.items():
                full = 2 * factor.rank
                layers[name] = (full, self.scaling[name] * (math.sqrt(full) if config.use_rslora else full))
            ranks = {f"^{re.escape(name)}": own for name, (own, _) in layers.items() if own != rank}
            alphas = {f"^{re.escape(name)}": own for name, (_, own) in layers.items() if own != alpha}
        return {"r": rank, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas}

    def write(self, folder: Path) -> None:
        """Write the sidecar into `folder`, atomically, if the adapter in it is the aligned one.

        It is not where PEFT was given this adapter's configuration for another adapter; a warning says so.
        """
        weights = folder / SAFETENSORS_WEIGHTS_NAME
        if weights.is_file():
            self._join_saved(weights)
            name, (_, b) = next(iter(self.factors.items()))
            with safe_open(str(weights), framework="pt") as file:
                held = {f"{PREFIX}{name}.lora_B.weight", f"{PREFIX}{name}.lora_embedding_B"} & set(file.keys())
                saved = file.get_tensor(held.pop()) if held else torch.empty(0)
            if not _holds(saved, b):
                warnings.warn(
                    f"{folder}: no {FILE} was written, since the adapter in this folder is not the one that was "
                    "aligned; it trains on as plain LoRA.",
                    UserWarning,
                    stacklevel=2,
                )
                return
        tensors: dict[str, Tensor] = {}
        for name, pair in self.factors.items():
            for letter, factor in zip("AB", pair, strict=True):
                tensors[f"{name}.{letter}0"] = factor.start
                if isinstance(factor, Shifted) and not sharded(factor.trainable):
                    tensors[f"{name}.{letter}"] = factor.trainable
        record = {
            "config": self.config.to_dict(),
            "fingerprint": self.fingerprint,
            "scaling": self.scaling,
            "plain": self.plain,
            "original": self.original,
            "summary": self.summary,
        }
        write_tensors(folder / FILE, FILE_KIND, tensors, record)
        write_section(folder, self.summary)

    def _join_saved(self, weights: Path) -> None:
        """Make plain rank-2r matrices of a file that was gathered by the parameters' names, as by DeepSpeed ZeRO-3."""
        names = {
            f"{PREFIX}{name}.lora_{letter}.{factor.trainable_name}": (f"{PREFIX}{name}.lora_{letter}.weight", factor)
            for name, pair in self.factors.items()
            for letter, factor in zip("AB", pair, strict=True)
            if factor.trainable_name != "weight"
        }
        with safe_open(str(weights), framework="pt") as file:
            if not names.keys() & set(file.keys()):
                return
            header, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for key in names.keys() & tensors.keys():
            plain, factor = names[key]
            delta = tensors.pop(key)
            start = factor.start.to(delta)
            tensors[plain] = factor.join(delta, start + delta) if factor.joined_dim == 0 else factor.join(start, delta)
        write_atomically(weights, save({key: each.contiguous() for key, each in tensors.items()}, metadata=header))


def _holds(saved: Tensor, b: Factor) -> bool:
    """Whether a saved B is the factor's; of a sharded one, which one process cannot gather, its frozen half decides."""
    if sharded(b.trainable):
        start = b.start
        return (
            saved.dim() == 2
            and saved.shape[1] == 2 * start.shape[1]
            and torch.equal(b.halves(saved)[0], start.to(saved))
        )
    return saved.shape == b.joined().shape and torch.equal(saved, b.joined().detach().to(saved))


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read the sidecar of a saved adapter.

    Args:
        path: The adapter's folder, or its name on the hub.

    Returns:
        Tensors and record; None if the adapter has no sidecar.

    Raises:
        FileNotFoundError: There is no such folder, and the hub has no such adapter or cannot be asked.
        ValueError: The sidecar is damaged.
    """
    if Path(path).is_dir():
        file = Path(path) / FILE
        return _checked(file) if file.exists() else None
    try:
        return _checked(hf_hub_download(str(path), FILE))
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):  # the hub was asked: the adapter has no sidecar
            return None
        reason: Exception = error
    except (OSError, HFValidationError) as error:  # no such name, no access, no network
        reason = error
    raise FileNotFoundError(f"{path}: not a local folder, and not to be had from the hub ({reason}).") from reason


def _checked(file: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a sidecar file.

    Returns:
        Tensors and record.

    Raises:
        ValueError: The file is damaged.
    """
    tensors, record = read_tensors(file, FILE_KIND)
    missing = [key for key in ("config", "fingerprint", "scaling", "plain", "original") if key not in record]
    missing += [f"{name}.{part}" for name in record.get("scaling", ()) for part in ("A0", "B0")]
    missing = [key for key in missing if key not in tensors]
    if missing:
        raise ValueError(f"{file}: damaged, it holds no {missing[0]}. Put the whole file back, or remove it.")
    return tensors, record


class AlignedLoraConfig(LoraConfig):
    """The LoraConfig of an aligned adapter: PEFT calls its `save_pretrained` last whenever it saves the adapter.

    Copies made by `dataclasses.replace`, as PEFT makes them for combined adapters, carry no alignment and save as any
    LoraConfig does.
    """

    alignment: Alignment | None = None

    @classmethod
    def of(cls, config: LoraConfig, alignment: Alignment, **changes: Any) -> AlignedLoraConfig:
        """A copy of `config` with `changes`, tied to `alignment`."""
        made = cls.__new__(cls)
        made.__dict__.update(copy.copy(config).__dict__, **changes)
        made.alignment = alignment
        return made

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` for the rank-2r adapter, and the sidecar.

        Args:
            save_directory: The adapter's folder.
            **kwargs: As PEFT's.
        """
        saved: LoraConfig = self
        if self.alignment is not None and self.alignment.config.offset == "base":
            # In memory the adapter has rank r; what leaves the house has rank 2r.
            saved = copy.copy(self)
            saved.__dict__.update(self.alignment.rank_fields(self))
        LoraConfig.save_pretrained(saved, save_directory, **kwargs)
        if self.alignment is not None:
            self.alignment.write(Path(save_directory))
