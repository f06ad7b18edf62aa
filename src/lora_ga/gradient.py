"""The gradient estimate as an object: a mapping of layers to low-rank factors, with its file and its sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_ga import lowrank
from lora_ga.config import LoraGAConfig
from lora_ga.lowrank import LowRank
from lora_ga.store import read_tensors, write_tensors

FILE_KIND = "a LoRA-GA gradient estimate"
PARTS = ("U", "S", "V", "sketch")


@dataclasses.dataclass(frozen=True, eq=False)
class GradientEstimate(Mapping[str, LowRank]):
    """The leading directions of the loss gradient of every adapted weight, as a mapping layer name → `LowRank`.

    Attributes:
        layers: Layer name → factorisation of the gradient of the mean loss over all label tokens seen.
        config: The settings it was made with.
        fingerprint: Of the base model it was made on.
        weight: Label tokens seen (or the sum of what `loss_fn` said).
        batches: Micro-batches seen.
        missing: Layers without a usable gradient → the reason; empty unless `on_missing="lora"`.
    """

    layers: Mapping[str, LowRank]
    config: LoraGAConfig
    fingerprint: str
    weight: float
    batches: int
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> LowRank:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def limit(self, rank: int) -> dict[str, float]:
        """The alignment limit of every layer: the largest share of its gradient a LoRA of rank `rank` can follow.

        Args:
            rank: r; the first step spans 2r directions.

        Returns:
            Layer name → number between 0 and 1; NaN where fewer than 2r directions are held.
        """
        return {name: layer.limit(rank) for name, layer in self.layers.items()}

    def spectrum(self) -> dict[str, Tensor]:
        """The singular values held, layer name → (K,), descending."""
        return {name: layer.S for name, layer in self.layers.items()}

    def save(self, path: str | Path) -> None:
        """Write the estimate to one safetensors file, atomically.

        Args:
            path: The file, conventionally `*.safetensors`.
        """
        from lora_ga import __version__  # the package imports this module

        tensors = {
            f"{name}.{part}": tensor
            for name, layer in self.layers.items()
            for part in PARTS
            if (tensor := getattr(layer, part)) is not None
        }
        about = {
            "config": self.config.to_dict(),
            "fingerprint": self.fingerprint,
            "weight": self.weight,
            "batches": self.batches,
            "missing": dict(self.missing),
            "norms": {name: layer.norm for name, layer in self.layers.items()},
            "versions": {"lora_ga": __version__, "torch": torch.__version__},
        }
        write_tensors(path, FILE_KIND, tensors, about)

    @classmethod
    def load(cls, path: str | Path) -> GradientEstimate:
        """Read an estimate, on the CPU. Nothing in the file is unpickled.

        Args:
            path: A file written by `save`.

        Returns:
            The estimate.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, or not an estimate.
        """
        tensors, about = read_tensors(path, FILE_KIND)
        try:
            layers = {
                name: LowRank(
                    U=tensors[f"{name}.U"],
                    S=tensors[f"{name}.S"],
                    V=tensors[f"{name}.V"],
                    norm=norm,
                    sketch=tensors.get(f"{name}.sketch"),
                )
                for name, norm in about["norms"].items()
            }
            config = LoraGAConfig.from_dict(about["config"])
            rest = {key: about[key] for key in ("fingerprint", "weight", "batches", "missing")}
        except KeyError as error:
            raise ValueError(f"{path}: damaged, {error} is missing. Write it anew.") from error
        return cls(layers, config, **rest)

    def merge(self, *others: GradientEstimate) -> GradientEstimate:
        """Add up estimates made on different batches of one model, weighted by their label tokens.

        Args:
            *others: Estimates of the same model with the same settings.

        Returns:
            The estimate over all batches. What no part holds is lost, so it is that of one run up to truncation.

        Raises:
            ValueError: The estimates differ in model, settings or layers.
        """
        for index, other in enumerate(others, start=2):
            self._check_adds_up(other, index)
        every = (self, *others)
        total = sum(estimate.weight for estimate in every)
        layers = {}
        for name in dict.fromkeys(name for estimate in every for name in estimate):
            parts = [(estimate[name], estimate.weight / total) for estimate in every if name in estimate]
            kept = parts[0][0].S.numel()
            omega = lowrank.probes(parts[0][0].V.shape[0], self.config.seed, name)
            layers[name] = lowrank.merge(parts, kept, omega)
        missing = {name: reason for name, reason in self.missing.items() if name not in layers}
        batches = sum(estimate.batches for estimate in every)
        return GradientEstimate(layers, self.config, self.fingerprint, total, batches, missing)

    def _check_adds_up(self, other: GradientEstimate, index: int) -> None:
        """Refuse the `index`-th estimate of a sum if it is of another model or made otherwise.

        Raises:
            ValueError: It is, with the first difference.
        """
        for what in ("fingerprint", "config"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                raise ValueError(
                    f"Estimates 1 and {index} differ in their {what}: {mine} and {theirs}. Only estimates of one model "
                    "made with one configuration add up."
                )
        layers = {*self, *self.missing} ^ {*other, *other.missing}
        if layers:
            raise ValueError(f"Estimates 1 and {index} differ in their layers: {', '.join(sorted(layers)[:3])}.")
        for name in filter(other.__contains__, self):
            mine, theirs = self[name].S.numel(), other[name].S.numel()
            if mine != theirs:
                raise ValueError(
                    f"Estimates 1 and {index} hold {mine} and {theirs} directions of {name}; make both with one rank."
                )
