"""The sidecar: a small file beside a saved adapter, from which training can go on in LoRA-GA's structure.

The adapter file itself is a plain LoRA of rank 2r. The sidecar holds what cannot be read from it exactly: A₀ and B₀ of
every aligned layer (with offset="base" also A and B), the scaling, the settings and the base model's fingerprint.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_ga.adapter.alignment import Alignment, alignment_of
from lora_ga.adapter.file import Factors, adapter_file, opened, pad, rewrite
from lora_ga.adapter.model_card import write_section
from lora_ga.base import without_compiled
from lora_ga.config import LoraGAConfig
from lora_ga.distributed.sharding import sharded
from lora_ga.files import read_tensors, write_tensors
from lora_ga.layers.factors import Shifted
from lora_ga.layers.targets import PREFIX, layer_name
from lora_ga.layers.tied import tied_heads
from lora_ga.version import written_with
from lora_ga.warn import warn

FILE = "lora_ga.safetensors"
NAMED = ("scaling", "plain")  # the parts of its record that have an entry for each layer
FILE_KIND = "the LoRA-GA sidecar of an adapter"
# What the record of a sidecar holds.
TYPES = {"config": dict, "fingerprint": str, "scaling": dict, "plain": dict, "original": dict}


class AlignedLoraConfig(LoraConfig):
    """The LoraConfig of an aligned adapter; saving it also writes the sidecar.

    PEFT has no event for saving. Trainers call `PeftModel.save_pretrained`, which for each adapter writes the adapter
    file and then calls this configuration's `save_pretrained`. Transformers' models with injected adapters do so too,
    but write the adapter file afterwards. Diffusers asks for `to_dict`. Copies made by `dataclasses.replace`, as PEFT
    makes them for combined adapters, have no alignment and are saved like any LoraConfig.
    """

    alignment: Alignment | None = None
    aligned_rank: int | None = None

    @classmethod
    def of(cls, config: LoraConfig, alignment: Alignment, **changes: Any) -> AlignedLoraConfig:
        """A copy of `config` that holds the record `alignment`, with `changes` to its fields."""
        # A call of the class would repeat PEFT's warnings, and lose what PEFT has set beside the fields.
        made: Any = copy.copy(config)
        made.__class__ = cls
        vars(made).update(changes, alignment=alignment)
        made.aligned_rank = made.r
        return made

    def to_dict(self) -> dict[str, Any]:
        """The fields of the rank-2r adapter, as they are saved."""
        fields = LoraConfig.to_dict(self)
        # PEFT changes the rank, and scales α with it, where it adds a second adapter to the file while saving.
        return fields if self.alignment is None or self.r != self.aligned_rank else fields | self.alignment.saved

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` of the rank-2r adapter, and the sidecar.

        Args:
            save_directory: The adapter's folder.
            **kwargs: As PEFT's.
        """
        LoraConfig.save_pretrained(self._of_file(Path(save_directory)), save_directory, **kwargs)
        if self.alignment is not None:
            save_sidecar(self.alignment.model(), self.alignment.adapter_name, Path(save_directory), saving=True)

    def _of_file(self, folder: Path) -> AlignedLoraConfig:
        """Make the adapter file that PEFT has written a plain LoRA of rank 2r, its plain layers included.

        Returns:
            The configuration to write: this one, or that of the file with padded layers.
        """
        weights, alignment = adapter_file(folder), self.alignment
        if alignment is None or not isinstance(alignment.model(), PeftModel) or not weights.is_file():
            return self
        rewrite(weights, alignment.factors)
        changed = self.r != self.aligned_rank  # see `to_dict`
        if changed or not _is_saved(weights, alignment.factors) or not alignment.padded:
            return self
        if not pad(weights, alignment.padded):
            return self
        saved = alignment.saved | alignment.padded_fields
        return AlignedLoraConfig.of(self, dataclasses.replace(alignment, saved=saved))


def save_sidecar(model: nn.Module | None, adapter_name: str, folder: Path, *, saving: bool = False) -> None:
    """Write the sidecar of an aligned adapter, and the section of its model card, into the folder it is saved in.

    If the adapter file in the folder holds another adapter, nothing is written, with a warning. That happens if this
    adapter's configuration was given to PEFT for another adapter or model.

    Args:
        model: The model; None if it no longer exists.
        adapter_name: The adapter.
        folder: The adapter's folder.
        saving: Whether the model is being saved. Of a model with an injected adapter the file then comes afterwards.
    """
    alignment, weights = alignment_of(model, adapter_name), adapter_file(folder)
    factors = {} if alignment is None else alignment.factors
    if saving and not isinstance(model, PeftModel):
        is_other = [adapter_name] != _active_adapters(model)
    elif weights.is_file():
        rewrite(weights, factors)
        is_other = not _is_saved(weights, factors)
    else:
        is_other = False
    if alignment is None or not factors or is_other:
        warn(
            f"{folder}: no {FILE} was written, because the adapter in this folder is not the aligned one. Loaded "
            "again, it trains as plain LoRA."
        )
        return
    tensors: dict[str, Tensor] = {}
    for name, pair in factors.items():
        for letter, factor in zip("AB", pair, strict=True):
            tensors[f"{name}.{letter}0"] = factor.start
            if isinstance(factor, Shifted) and not sharded(factor.trainable):
                tensors[f"{name}.{letter}"] = factor.trainable
    record = {
        "config": alignment.config.to_dict(),
        "fingerprint": alignment.fingerprint,
        "scaling": alignment.scaling,
        "plain": alignment.plain,
        "tied": [layer_name(head) for head in tied_heads(model, adapter_name)] if model else [],
        "original": alignment.original,
        "summary": alignment.summary,
        "versions": written_with(),
    }
    write_tensors(folder / FILE, FILE_KIND, tensors, record)
    if weights.is_file():  # safetensors makes files that their owner alone can read, whatever the umask
        weights.chmod(stat.S_IMODE((folder / FILE).stat().st_mode))
    write_section(folder, alignment.summary)


def _active_adapters(model: nn.Module | None) -> list[str]:
    """The active adapters of a model's first LoRA layer: those that Transformers saves."""
    layers = () if model is None else model.modules()
    return next((list(layer.active_adapters) for layer in layers if isinstance(layer, LoraLayer)), [])


def _is_saved(weights: Path, factors: Factors) -> bool:
    """Whether an adapter file holds these factors, or others with their starts. The first layer's B decides.

    The file may hold an average over training, which begins at the same start, and one process cannot gather sharded
    factors. With `offset="base"` the sidecar holds the trained factors too, so these have to be the same.

    Returns:
        Whether the sidecar of the factors belongs to the file.
    """
    if not factors:
        return False
    name, (_, b) = next(iter(factors.items()))
    with opened(weights) as (_, keys, tensor):
        possible = (f"{start}{name}.lora_{end}" for start in (PREFIX, "") for end in ("B.weight", "embedding_B"))
        found = set(possible) & set(keys)
        saved = tensor(found.pop()) if found else torch.empty(0, device="cpu")
    if isinstance(b, Shifted) and not sharded(b.trainable):
        held = b.joined().detach().to(saved)
        return saved.shape == held.shape and torch.allclose(saved, held, rtol=0, atol=0, equal_nan=True)
    rows, rank, *rest = b.start.shape
    return saved.shape == (rows, 2 * rank, *rest) and torch.equal(b.halves(saved)[0], b.start.to(saved))


def read_sidecar(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read the sidecar of a saved adapter.

    Args:
        path: The adapter's folder, or its name on the hub.

    Returns:
        Tensors and record; None if the adapter has no sidecar.

    Raises:
        FileNotFoundError: There is no such folder, and the hub has no such adapter or cannot be reached.
        ValueError: The sidecar is damaged.
    """
    if Path(path).is_dir():
        file = Path(path) / FILE
        return _read_complete(file) if file.exists() else None
    try:
        return _read_complete(hf_hub_download(str(path), FILE))
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):  # the hub answered: the adapter has no sidecar
            return None
        reason: Exception = error
    except (OSError, HFValidationError) as error:  # no such name, no access, no network
        reason = error
    raise FileNotFoundError(f"{path}: not a local folder, and the hub does not give it ({reason}).") from reason


def _read_complete(file: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a sidecar file, and check that no part is missing.

    Returns:
        Tensors and record.

    Raises:
        ValueError: The file is damaged.
    """
    tensors, record = read_tensors(file, FILE_KIND)
    wrong = [key for key, kind in TYPES.items() if not isinstance(record.get(key), kind)]
    parts = () if wrong else [f"{name}.{part}" for name in record["scaling"] for part in ("A0", "B0")]
    wrong += [key for key in parts if key not in tensors or not tensors[key].is_floating_point()]
    if wrong:
        raise ValueError(f"{file}: damaged, it holds no {wrong[0]}. Put the complete file back, or remove it.")
    for name, scaling in record["scaling"].items():
        finite = all(tensors[f"{name}.{part}"].isfinite().all() for part in ("A0", "B0"))
        if not finite or not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
            raise ValueError(f"{file}: damaged, {name} holds numbers that are not finite. Put the right file back.")
    try:
        LoraGAConfig.from_record(record["config"])
    except ValueError as error:
        raise ValueError(
            f"{file}: {error} Use the version that wrote it{_version(record)}, or remove the file to load the adapter "
            "as plain LoRA."
        ) from error
    # Earlier versions wrote the names of a compiled base.
    record |= {part: {without_compiled(name): value for name, value in record[part].items()} for part in NAMED}
    return {without_compiled(name): value for name, value in tensors.items()}, record


def _version(record: Mapping[str, Any]) -> str:
    """The version that wrote a sidecar, for a sentence; the first versions did not say it."""
    versions = record.get("versions")
    return f" ({versions.get('lora_ga')})" if isinstance(versions, Mapping) else ""
