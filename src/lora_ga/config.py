"""The settings of LoRA-GA: one frozen object for the library, the command line and the saved records."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

# The values that each setting may have. The tables behind them are `adapter.directions.DIRECTIONS` and `SCALES`,
# `gradients.setup.ESTIMATORS` (and `gradients.probe`) and `layers.factors.FACTORS`. A test keeps both sides equal.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "direction": ("ArB2r", "A2rBr", "ArBr", "random"),
    "scale": ("stable", "gd", "unit", "weight"),
    "offset": ("adapter", "base"),
    "estimator": ("streaming", "dense", "probe"),
    "on_missing": ("error", "lora"),
}
# Setting that files of earlier versions lack → its value there, if that is not the default.
BEFORE: Mapping[str, Any] = {"training_mode": False}

# What max_batches="auto" means: at most `BATCHES`; in a short run a tenth of what training reads, so that the estimate
# takes less time than the training (a batch of the estimate costs about two of training), but not below the paper's 8.
BATCHES, FEWEST_BATCHES = 32, 8


@dataclasses.dataclass(frozen=True)
class LoraGAConfig:
    """How gradients are estimated, and how the start of A and B is made from them.

    The mathematics is that of "LoRA-GA: Low-Rank Adaptation with Gradient Approximation" (Wang, Yu, Li, NeurIPS 2024,
    arXiv 2407.05000). `direction`, `scale` and `stable_gamma` mean what they mean in `peft.LoraGAConfig`. Below, r is
    the adapter's rank, s its scaling (α/r, or α/√r with rsLoRA), and d_out and d_in are the sizes of a layer.

    Attributes:
        direction: Which of the first 2r singular directions of a gradient go to A and which to B. "ArB2r" (the paper's
            choice): A takes the right directions 1..r, B the left directions r+1..2r. "A2rBr": the reverse. "ArBr":
            alternating. "random": disjoint random halves. All four have the same first step; later steps differ.
        scale: The size of A and B. "stable" (Theorem 3.2 of the paper): both times d_out^(1/4)/√γ. "gd": both divided
            by s. "unit": unit vectors. "weight": both times the mean of √(σᵢ(W)/s), i ≤ r.
        stable_gamma: γ of the "stable" scale. A larger γ gives a smaller start and, under Adam, a smaller effective
            step. The paper uses 16. None computes γ for each layer, as γ = (s/`reach`)²·√d_out. Then s·f, where f is
            the size of A and B, equals `reach`, whatever the layer's width, the rank and α.
        reach: The value of s·f if `stable_gamma` is None; to give both is an error. Under Adam, a step at learning rate
            λ moves the product along each direction by about s·f·λ. For plain LoRA s·f is 1.15 (α = 2r: s = 2, rows of
            A of norm 1/√3). docs/evidence.md shows where the default comes from.
        offset: How the product B₀A₀ of the start, which is not zero, is subtracted again. "adapter": within the
            adapter, which trains dA and dB from zero; the base model does not change. "base": as in the paper, by
            `W ← W − s·B₀A₀` in the base weight, in place.
        estimator: "streaming" keeps 2r + `oversample` directions of each gradient. "dense" keeps each whole gradient
            (d_out × d_in numbers a layer); it is exact, and fine for small models. "probe" is for linear layers whose
            weights are read by fused kernels, so that the layers are never called. It keeps the batches in memory and
            runs them twice, with an adapter whose product is zero; the gradients of that adapter show the leading
            2r + `oversample` directions. The other two add a probe for layers that ran without being
            called.
        oversample: How many directions to keep beyond 2r. More directions reduce what is lost when the estimate is
            truncated after each batch. `benchmarks/results/alignment.json` records what 0, 8 and 16 reach on three
            models. With several processes, each keeps 2r + 2·`oversample` directions until all are merged.
        power_steps: The number of power iterations for each block of tokens. 0 is one step of subspace iteration for
            each block, from the directions found so far. 1 doubles the time that the estimate adds to the passes. The
            gain is in the same record as for `oversample`.
        max_batches: The largest number of batches to read; None reads all. The paper uses 8 to 128 samples. With n
            processes, each reads at most ⌈max_batches/n⌉ batches. "auto" is 32. Where `LoraGACallback` or `lora-ga
            train` knows that training reads fewer than 320 batches, it is a tenth of them, but at least 8.
        tolerance: Ends the estimate early, layer by layer; None reads all batches. The change of a batch is the mean
            squared sine between a layer's leading 2r directions before and after it, weighted by σ². A layer has
            converged when the number of batches times this change is within the tolerance for two batches in a row;
            about that share of the directions' energy would still move. 0.01 is a good value where batches are costly.
            Only for the streaming estimator. Convergence is judged per expert (or group); the layer's hooks stay until
            all have converged, so a layer with an expert that gets no token keeps them to the end. With P processes
            the tolerance of each is P times as large.
        on_missing: What to do with a layer that cannot be aligned, because it gets no gradient or its rank is above
            half its smaller side. "error" raises. "lora" starts it as plain LoRA, with a warning that names it.
        training_mode: Whether gradients are those of the model in the mode in which it trains. Its random noise is off
            in either case: dropout of every kind, stochastic depth, layer dropout, SpecAugment, NEFTune, router jitter.
            Normalisation layers use the statistics of the batch, and their running statistics do not change. A base
            model in evaluation mode, as `from_pretrained` leaves it, is put in training mode by its `train` method, as
            trainers do. In a base model in training mode each module keeps its mode, as in a loop of your own. False:
            the gradients are those of the model in evaluation mode.
        seed: The seed of all random numbers, together with the layer's name. The global generators are never used.
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float | None = None
    reach: float = 0.35
    offset: str = "adapter"
    estimator: str = "streaming"
    oversample: int = 16
    power_steps: int = 0
    max_batches: int | Literal["auto"] | None = "auto"
    tolerance: float | None = None
    on_missing: str = "error"
    training_mode: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for field, allowed in CHOICES.items():
            found = getattr(self, field)
            if found not in allowed:
                raise ValueError(f"LoraGAConfig.{field} is {found!r}; it must be one of {', '.join(allowed)}.")
        for field, least in (("oversample", 0), ("power_steps", 0), ("seed", 0), ("max_batches", 1)):
            found = getattr(self, field)
            if field == "max_batches" and found in (None, "auto"):
                continue
            if not isinstance(found, int) or isinstance(found, bool) or found < least:
                raise ValueError(f"LoraGAConfig.{field} is {found!r}; it must be an integer of at least {least}.")
        self._check_size()
        if not isinstance(self.training_mode, bool):
            raise ValueError(f"LoraGAConfig.training_mode is {self.training_mode!r}; it must be True or False.")
        self._check_tolerance()

    def _check_size(self) -> None:
        for field in ("stable_gamma", "reach"):
            size = getattr(self, field)
            if size is None and field == "stable_gamma":
                continue
            if not isinstance(size, (int, float)) or isinstance(size, bool) or not math.isfinite(size) or size <= 0:
                raise ValueError(f"LoraGAConfig.{field} is {size!r}; it must be a finite number above 0.")
        if self.stable_gamma is not None and self.reach != LoraGAConfig.reach:
            raise ValueError(
                f"LoraGAConfig has stable_gamma={self.stable_gamma} and reach={self.reach}. They are two ways to "
                "choose the size of the start. Leave one of them out."
            )

    def _check_tolerance(self) -> None:
        tolerance = self.tolerance
        if tolerance is None:
            return
        if not isinstance(tolerance, (int, float)) or isinstance(tolerance, bool) or not 0 < tolerance < 1:
            raise ValueError(f"LoraGAConfig.tolerance is {tolerance!r}; it must be None or between 0 and 1.")
        if self.estimator != "streaming":
            raise ValueError(
                f'LoraGAConfig.tolerance is {tolerance} with estimator="{self.estimator}", which does '
                'not follow directions; it needs estimator="streaming".'
            )

    def directions(self, rank: int) -> int:
        """How many singular directions of a layer's gradient an estimate keeps.

        Args:
            rank: The adapter's rank r.

        Returns:
            2r, which a start uses, plus `oversample`.
        """
        return 2 * rank + self.oversample

    def resolved(self, training_batches: int | None = None) -> LoraGAConfig:
        """The settings with a number in the place of `max_batches="auto"`.

        Args:
            training_batches: How many batches training will read in all processes; None if that is not known.

        Returns:
            The settings.
        """
        if self.max_batches != "auto":
            return self
        most = BATCHES if training_batches is None else max(FEWEST_BATCHES, training_batches // 10)
        return dataclasses.replace(self, max_batches=min(BATCHES, most))

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for records and files."""
        return dataclasses.asdict(self)

    @classmethod
    def check(cls, found: object, name: str = "config") -> None:
        """Refuse another object in the place of these settings, as `peft.LoraGAConfig` or a dictionary.

        Args:
            found: What was given.
            name: The argument that it was given as.

        Raises:
            TypeError: It is no `LoraGAConfig` of this library.
        """
        if isinstance(found, cls):
            return
        kind = type(found)
        home = "" if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}."
        advice = "lora_ga.LoraGAConfig(**config)" if isinstance(found, Mapping) else "lora_ga.LoraGAConfig(...)"
        raise TypeError(
            f"{name} is a {home}{kind.__qualname__}, but it must be a lora_ga.LoraGAConfig. Use {name}={advice}."
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraGAConfig:
        """Settings from plain values; those that are not given have their defaults.

        Args:
            values: Setting names and plain values.

        Returns:
            The configuration, checked.

        Raises:
            ValueError: A name is not a setting, or a value is not allowed.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"LoraGAConfig has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
        return cls(**values)

    @classmethod
    def from_record(cls, values: Mapping[str, Any]) -> LoraGAConfig:
        """Read what `to_dict` wrote, in this version or an earlier one.

        Args:
            values: Setting names and plain values. Settings that the file lacks did not exist when it was written.

        Returns:
            The configuration, checked.

        Raises:
            ValueError: A name is not a setting, or a value is not allowed.
        """
        read = {**BEFORE, **values}
        if read.get("stable_gamma") is not None:  # earlier versions let `reach` stand beside it, without an effect
            read.pop("reach", None)
        return cls.from_dict(read)
