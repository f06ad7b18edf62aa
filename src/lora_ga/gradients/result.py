"""`GradientEstimate`: the low-rank gradients of all layers, its file, the sum of several, and its numbers by layer."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_ga.config import LoraGAConfig
from lora_ga.files import differences, read_tensors, write_tensors
from lora_ga.linalg import low_rank
from lora_ga.linalg.low_rank import LowRank
from lora_ga.version import written_with

FILE_KIND = "a LoRA-GA gradient estimate"
PARTS = ("U", "S", "V", "sketch")
ABOUT = ("fingerprint", "weight", "batches", "missing", "settled", "settled_weight")
# What the record of a file holds, and what the first versions did not write yet.
TYPES: Mapping[str, Any] = {
    **dict.fromkeys(("config", "norms", "missing", "settled", "settled_weight"), dict),
    **{"fingerprint": str, "weight": (int, float), "batches": int, "merged_from": list},
}
LATER: dict[str, Any] = {"settled": {}, "settled_weight": {}, "merged_from": []}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GradientEstimate(Mapping[str, LowRank]):
    """The leading directions of the loss gradient of every adapted weight, as a mapping layer name → `LowRank`.

    Attributes:
        layers: Layer name → factorisation of the gradient of the mean loss over all label tokens read.
        config: The settings of the estimate.
        fingerprint: Of the base model.
        weight: Label tokens read (or the sum of the weights that `loss_fn` returned).
        batches: Micro-batches read.
        missing: Layer without a usable gradient → the reason; empty unless `on_missing="lora"`.
        settled: Layer that converged before the end (see `LoraGAConfig.tolerance`) → batches read until then.
        settled_weight: The same layers → label tokens read until then.
        merged_from: Digests of the estimates that were added up to this one; empty if it is not a sum.
    """

    layers: Mapping[str, LowRank]
    config: LoraGAConfig
    fingerprint: str
    weight: float
    batches: int
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settled: Mapping[str, int] = dataclasses.field(default_factory=dict)
    settled_weight: Mapping[str, float] = dataclasses.field(default_factory=dict)
    merged_from: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> LowRank:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        held = f"; {statistics.median(self.held().values()):.0%} of the squared norm held (median)" if self else ""
        return f"GradientEstimate({len(self)} gradients, {self.batches} batches, {self.weight:,.0f} label tokens{held})"

    def _repr_html_(self) -> str:
        """A table for notebooks, with a row for each gradient."""
        head = "".join(f"<th>{title}</th>" for title in ("layer", "out × in", "‖G‖", "directions", "held"))
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{layer.U.shape[0]} × {layer.V.shape[0]}</td><td>{layer.norm:.3g}</td>"
            f"<td>{layer.S.numel()}</td><td>{layer.held:.1%}</td></tr>"
            for name, layer in self.layers.items()
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        return f'<p>{html.escape(repr(self))}</p><div style="max-height: 30em; overflow: auto">{table}</div>'

    def shapes(self) -> dict[str, tuple[int, int]]:
        """The numbers of outputs and inputs of every layer, layer name → (O, I)."""
        return {name: (len(layer.U), len(layer.V)) for name, layer in self.layers.items()}

    def limit(self, rank: int) -> dict[str, float]:
        """The alignment limit of every layer: the largest cosine between its gradient and a first step of LoRA.

        This is `√(Σ_{i≤2r} σᵢ² / Σ σᵢ²)` with the singular values σᵢ of the gradient (Eckart-Young).

        Args:
            rank: r; the first step spans 2r directions.

        Returns:
            Layer name → number between 0 and 1; NaN where the estimate keeps fewer than 2r directions.
        """
        return {name: layer.limit(rank) for name, layer in self.layers.items()}

    def spectrum(self) -> dict[str, Tensor]:
        """The singular values that the estimate keeps, layer name → (K,), descending."""
        return {name: layer.S for name, layer in self.layers.items()}

    def save(self, path: str | Path) -> None:
        """Write the estimate to one safetensors file, atomically.

        Args:
            path: The file, conventionally `*.safetensors`.
        """
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
            "settled": dict(self.settled),
            "settled_weight": dict(self.settled_weight),
            "merged_from": list(self.merged_from),
            "norms": {name: layer.norm for name, layer in self.layers.items()},
            "versions": written_with(),
        }
        write_tensors(path, FILE_KIND, tensors, about)

    @classmethod
    def check(cls, found: object) -> None:
        """Refuse another object in the place of an estimate, as the name of its file.

        Args:
            found: What was given as `estimate`.

        Raises:
            TypeError: It is no estimate.
        """
        if not isinstance(found, cls):
            raise TypeError(
                f"estimate is a {type(found).__name__}, but it must be a lora_ga.GradientEstimate: what "
                "lora_ga.estimate_gradients returns, or lora_ga.GradientEstimate.load(file)."
            )

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
        about = LATER | about
        if missing := sorted({*TYPES} - {*about}):
            raise ValueError(f"{path}: damaged, {missing[0]!r} is missing. Make the estimate again.")
        for key, kinds in TYPES.items():
            if not isinstance(about[key], kinds):
                raise ValueError(f"{path}: damaged, {key!r} is {about[key]!r}. Make the estimate again.")
        layers = {name: _layer(path, name, tensors, norm) for name, norm in about["norms"].items()}
        try:
            config = LoraGAConfig.from_record(about["config"])
        except ValueError as error:
            raise ValueError(f"{path}: {error} {_written_by(about)} Make the estimate again.") from error
        return cls(layers, config, **{key: about[key] for key in ABOUT}, merged_from=tuple(about["merged_from"]))

    def merge(self, *others: GradientEstimate, weights: Sequence[float] | None = None) -> GradientEstimate:
        """Add up estimates of one model on different batches, weighted by their label tokens or by given numbers.

        A layer (or expert) that is missing from an estimate got no gradient there: it adds zero, and its label tokens
        count all the same. So estimates may be added up in any order and grouping.

        With `weights` the result is Σ wᵢGᵢ of the mean gradients, for continual learning: a new task's gradient less a
        part of an old one's does not undo what the old one taught. J. Pasquali and others, "Low-Rank Adapters
        Initialization via Gradient Surgery for Continual Learning" (Slice), 2026 (arXiv 2605.12752), take away the part
        along the old gradient where the two conflict; its text was not at hand.

        Args:
            *others: Estimates of the same model with the same settings.
            weights: A number for this estimate and for each of the others, which may be negative.

        Returns:
            The estimate over all batches. It differs from that of one run by the directions that no part keeps.

        Raises:
            ValueError: The estimates differ in model, settings or layers, or a part is in two of them; or the weights
                are not one finite number, other than 0, for each.
        """
        every = (self, *others)
        given = None if weights is None else [float(weight) for weight in weights]
        if given is not None and (len(given) != len(every) or not all(w and math.isfinite(w) for w in given)):
            raise ValueError(
                f"weights is {given}; it must hold a finite number other than 0 for each of the {len(every)} estimates."
            )
        for index, other in enumerate(others, start=2):
            self._check_same_kind(other, index)
        _check_pairs(every)
        layers, settled, settled_weight = {}, {}, {}
        for name in dict.fromkeys(name for estimate in every for name in estimate):
            total = sum(estimate.weight_of(name) for estimate in every)
            shares = given or [estimate.weight_of(name) / total for estimate in every]
            parts = [(each[name], share) for each, share in zip(every, shares, strict=True) if name in each]
            omega = low_rank.probes(parts[0][0].V.shape[0], self.config.seed)
            layers[name] = low_rank.merge(parts, parts[0][0].S.numel(), omega)
            if any(name in estimate.settled for estimate in every):
                settled[name] = sum(estimate.settled.get(name, estimate.batches) for estimate in every)
                settled_weight[name] = total
        return GradientEstimate(
            layers,
            self.config,
            self.fingerprint,
            weight=sum(estimate.weight for estimate in every),
            batches=sum(estimate.batches for estimate in every),
            missing={name: reason for name, reason in self.missing.items() if name not in layers},
            settled=settled,
            settled_weight=settled_weight,
            merged_from=tuple(digest for estimate in every for digest in estimate._digests()),
        )

    def weight_of(self, name: str) -> float:
        """Label tokens that a layer's gradient is the mean over: all, or those read until it converged."""
        return self.settled_weight.get(name, self.weight)

    def held(self) -> dict[str, float]:
        """The share of ‖G‖² that the estimate keeps, layer → number between 0 and 1 (see `LowRank.held`)."""
        return {name: layer.held for name, layer in self.layers.items()}

    def _digests(self) -> tuple[str, ...]:
        """Digests of the estimates that were added up to this one; the digest of this one if it is not a sum."""
        if self.merged_from:
            return self.merged_from
        total = hashlib.sha256(f"{self.fingerprint} {self.weight!r} {self.batches}".encode())
        for name in sorted(self):
            total.update(f"{name} {self[name].norm!r} {self[name].S.double().tolist()!r}".encode())
        return (total.hexdigest()[:16],)

    def _other_model(self, other: GradientEstimate) -> str:
        """The first layer that one of two estimates lacks, or has in another shape; empty if there is none."""
        for name in sorted({*self, *self.missing} ^ {*other, *other.missing}):
            return f"only one of them has {name}"
        for name in sorted({*self} & {*other}):
            mine, theirs = (each.shapes()[name] for each in (self, other))
            if mine != theirs:
                return f"{name} is {mine[0]} x {mine[1]} in one, {theirs[0]} x {theirs[1]} in the other"
        return ""

    def _check_same_kind(self, other: GradientEstimate, index: int) -> None:
        """Refuse the `index`-th estimate of a sum if it has another model, other settings or other layers.

        Raises:
            ValueError: It has, with the first differences.
        """
        pair = f"Estimates 1 and {index}"
        if self.fingerprint != other.fingerprint and (found := self._other_model(other)):
            raise ValueError(f"{pair} are of different models: {found}. Only estimates of one model add up.")
        mine, theirs = ({"fingerprint": each.fingerprint, "config": each.config.to_dict()} for each in (self, other))
        if found := differences(mine, theirs):
            raise ValueError(f"{pair} differ: {found}. Only estimates of one model made with one configuration add up.")
        layers = {*self, *self.missing} ^ {*other, *other.missing}
        if layers:
            raise ValueError(f"{pair} differ in their layers: {', '.join(sorted(layers)[:3])}.")


def _written_by(about: Mapping[str, Any]) -> str:
    """A sentence with the version that wrote a file."""
    versions = about.get("versions")
    return f"The file was written by version {versions.get('lora_ga')}." if isinstance(versions, dict) else ""


def _layer(path: str | Path, name: str, tensors: Mapping[str, Tensor], norm: Any) -> LowRank:
    """One layer of a file, checked: a file that was written by hand may hold anything.

    Returns:
        The layer.

    Raises:
        ValueError: A part is missing, or has another shape, another kind of dtype, or numbers that are not finite.
    """
    parts = {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors}
    if lost := [part for part in ("U", "S", "V") if part not in parts]:
        raise ValueError(f"{path}: damaged, '{name}.{lost[0]}' is missing. Make the estimate again.")
    shapes = [tuple(parts[part].shape) for part in ("U", "S", "V")]
    kept = parts["S"].numel()
    fits = [len(shape) for shape in shapes] == [2, 1, 2] and shapes[0][1] == shapes[2][1] == kept
    if fits and "sketch" in parts:
        fits = parts["sketch"].dim() == 2 and len(parts["sketch"]) == len(parts["U"])
    if not fits:
        raise ValueError(f"{path}: damaged, U, S and V of {name} are {shapes}. Make the estimate again.")
    numbers = isinstance(norm, (int, float)) and math.isfinite(norm) and norm >= 0
    if not numbers or not all(part.is_floating_point() and part.isfinite().all() for part in parts.values()):
        raise ValueError(f"{path}: damaged, {name} holds numbers that are not finite. Make the estimate again.")
    return LowRank(norm=norm, **parts)


def _check_pairs(estimates: Sequence[GradientEstimate]) -> None:
    """Refuse estimates of a sum that hold unlike numbers of directions, or a part that would count twice.

    Every pair is compared: the first estimate may lack a layer that two others have.

    Args:
        estimates: The estimates, in the order in which the caller gave them.

    Raises:
        ValueError: Two of them do; the message gives their numbers, from 1.
    """
    digests = [set(estimate._digests()) for estimate in estimates]
    for first, second in itertools.combinations(range(len(estimates)), 2):
        pair = f"Estimates {first + 1} and {second + 1}"
        one, other = estimates[first], estimates[second]
        for name in one:
            if name in other and (mine := one[name].S.numel()) != (theirs := other[name].S.numel()):
                raise ValueError(f"{pair} hold {mine} and {theirs} directions of {name}; make both with one rank.")
        if digests[first] == digests[second]:
            raise ValueError(f"{pair} are one and the same, which would count twice. Leave one out.")
        if digests[first] & digests[second]:
            raise ValueError(
                f"{pair} contain the same estimate, which would count twice: at least one of them is a sum. Add up the "
                "single estimates, each of them once."
            )


def measures(estimate: GradientEstimate, ranks: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """The numbers of every layer, for model cards and experiment trackers.

    Args:
        estimate: The estimate.
        ranks: Layer name → r, of the layers that start from the estimate.

    Returns:
        Layer name → "gradient_norm" (‖G‖, Frobenius), "alignment_limit" (at the layer's rank) and "settled_after"
        (batches until the layer converged). Numbers that are not known are left out.
    """
    found = {}
    for name, rank in ranks.items():
        layer = estimate[name]
        values = {"gradient_norm": float(layer.norm), "alignment_limit": float(layer.limit(rank))}
        if name in estimate.settled:
            values["settled_after"] = float(estimate.settled[name])
        found[name] = {key: value for key, value in values.items() if math.isfinite(value)}
    return found


def scalars(estimate: GradientEstimate, ranks: Mapping[str, int]) -> dict[str, float]:
    """The numbers of the estimate and of every layer by flat names, `lora_ga/<measure>/<layer>`, for trackers."""
    flat = {"lora_ga/batches": float(estimate.batches), "lora_ga/label_tokens": float(estimate.weight)}
    for name, values in measures(estimate, ranks).items():
        flat |= {f"lora_ga/{measure}/{name}": value for measure, value in values.items()}
    return flat
