"""The small file beside a saved adapter that lets training go on as LoRA-GA, and PEFT's configuration that writes it.

The adapter file itself is a plain LoRA of rank 2r. The sidecar holds what that form rounds or forgets: the exact A₀ and
B₀ of every aligned layer (and A and B where offset="base"), the scaling, the settings, the base's fingerprint.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig
from torch import Tensor

from lora_ga.config import LoraGAConfig
from lora_ga.factors import Factor, Shifted
from lora_ga.store import read_tensors, write_tensors

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
    """

    factors: dict[str, tuple[Factor, Factor]]
    scaling: dict[str, float]
    config: LoraGAConfig
    fingerprint: str
    plain: dict[str, tuple[int, float]]
    original: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write the sidecar into `folder`, atomically."""
        tensors: dict[str, Tensor] = {}
        for name, pair in self.factors.items():
            for letter, factor in zip("AB", pair, strict=True):
                tensors[f"{name}.{letter}0"] = factor.start
                if isinstance(factor, Shifted):
                    tensors[f"{name}.{letter}"] = factor.trainable
        record = {
            "config": self.config.to_dict(),
            "fingerprint": self.fingerprint,
            "scaling": self.scaling,
            "plain": self.plain,
            "original": self.original,
        }
        write_tensors(folder / FILE, FILE_KIND, tensors, record)


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
        return read_tensors(file, FILE_KIND) if file.exists() else None
    try:
        return read_tensors(hf_hub_download(str(path), FILE), FILE_KIND)
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):  # the hub was asked: the adapter has no sidecar
            return None
        reason: Exception = error
    except (OSError, HFValidationError) as error:  # no such name, no access, no network
        reason = error
    raise FileNotFoundError(f"{path}: not a local folder, and not to be had from the hub ({reason}).") from reason


def doubled(config: LoraConfig, plain: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """The rank fields of the rank-2r adapter, with every layer's scaling unchanged.

    Args:
        config: The configuration of rank r.
        plain: Layers that keep their rank → (r, α); each gets an entry of its own, before the user's patterns.

    Returns:
        Values of `RANK_FIELDS`.
    """
    alpha = math.sqrt(2) if config.use_rslora else 2
    exact = {re.escape(name): values for name, values in plain.items()}
    ranks = {key: 2 * value for key, value in (config.rank_pattern or {}).items()}
    alphas = {key: alpha * value for key, value in (config.alpha_pattern or {}).items()}
    return {
        "r": 2 * config.r,
        "lora_alpha": alpha * config.lora_alpha,
        "rank_pattern": {key: rank for key, (rank, _) in exact.items()} | ranks,
        "alpha_pattern": {key: value for key, (_, value) in exact.items()} | alphas,
    }


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
            saved.__dict__.update(doubled(self, self.alignment.plain))
        LoraConfig.save_pretrained(saved, save_directory, **kwargs)
        if self.alignment is not None:
            self.alignment.write(Path(save_directory))
