"""The settings of a LoRA-GA start: one frozen object for the library, the command line and the saved records."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

# What each setting may be. The tables that give these names their meaning are `split.DIRECTIONS`, `split.SCALES`,
# `accumulate.ESTIMATORS` (and `probe`) and `factors.FACTORS`; a test holds the two sides together.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "direction": ("ArB2r", "A2rBr", "ArBr", "random"),
    "scale": ("stable", "gd", "unit", "weight"),
    "offset": ("adapter", "base"),
    "estimator": ("streaming", "dense", "probe"),
    "on_missing": ("error", "lora"),
}


@dataclasses.dataclass(frozen=True)
class LoraGAConfig:
    """How the gradient is estimated and how A and B are taken from it.

    The mathematics is that of "LoRA-GA: Low-Rank Adaptation with Gradient Approximation" (Wang, Yu, Li, NeurIPS 2024,
    arXiv 2407.05000). `direction`, `scale` and `stable_gamma` mean what they mean in `peft.LoraGAConfig`.

    Attributes:
        direction: Which of the first 2r singular directions go to A and which to B. "ArB2r" (the paper's choice):
            A the right ones 1..r, B the left ones r+1..2r; "A2rBr": the reverse; "ArBr": alternating; "random":
            disjoint random halves. All four reach the same first step; they differ from the second on.
        scale: Size of A and B. "stable" (the paper's Theorem 3.2): both times d_out^(1/4)/√γ; "gd": both divided by
            the LoRA scaling s; "unit": unit vectors; "weight": both times the mean of √(σᵢ(W)/s), i ≤ r.
        stable_gamma: γ of "stable". Larger is a smaller start and, under Adam, a smaller effective step.
            The paper's is 16. None chooses it for each layer, γ = (s/`reach`)²·√d_out: then s·f, with f the size of A
            and B, is `reach` whatever the layer's width, the rank and α.
        reach: s·f where γ is chosen. Under Adam a step of rate λ moves the product along each direction by about
            s·f·λ; plain LoRA's s·f is 1.15 (α = 2r: s = 2, rows of A of norm 1/√3). Where the default comes from:
            docs/evidence.md.
        offset: How the non-zero product B₀A₀ is taken back. "adapter": in the adapter, which trains dA and dB from
            zero; the base is not touched. "base": the paper's way, `W ← W − s·B₀A₀` in the base weight, in place.
        estimator: "streaming" keeps 2r + `oversample` directions of each gradient; "dense" keeps each whole gradient
            (d_out × d_in numbers a layer) and is exact: an oracle, and fine for small models. "probe" is for linear
            layers that are never called, since fused kernels read their weights: two passes over the batches, which are
            kept for it, with an adapter of zero product, whose own gradients show the leading 2r + `oversample`
            directions. The other two turn to it by themselves for the layers that ran without being called.
        oversample: Directions kept beyond 2r: what the truncation after each batch loses falls with them. What 0, 8
            and 16 reach on three real models is in `benchmarks/results/alignment.json`. Each of several processes keeps
            twice as many until all are merged.
        power_steps: Power iterations for each block of tokens. 0 is one step of subspace iteration a block, from the
            directions held. 1 doubles what the estimate adds to the pass; what it gains is in the same record.
        max_batches: At most so many batches are read; None reads all. The paper uses 8 to 128 samples. Of several
            processes n each reads at most ⌈max_batches/n⌉.
        tolerance: Ends the estimate early, layer by layer; None reads all batches. A layer has settled when, twice in
            a row, the number of batches times the mean squared sine by which the last one has turned its leading 2r
            directions (weighted by σ²) is within the tolerance: then about that share of their energy is still to
            move. 0.01 is a good value where batches are costly. Only for the streaming estimator. Of experts and groups
            each settles by itself; a layer of them is listened to until all have, so one that gets no token keeps it.
        on_missing: What to do with a layer that cannot be aligned (no gradient, or a rank above half its smaller
            side): "error", or "lora": it starts as plain LoRA, with a warning that names it.
        seed: Addresses every random draw together with the layer's name; the global generators are never used.
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float | None = None
    reach: float = 0.35
    offset: str = "adapter"
    estimator: str = "streaming"
    oversample: int = 16
    power_steps: int = 0
    max_batches: int | None = 32
    tolerance: float | None = None
    on_missing: str = "error"
    seed: int = 0

    def __post_init__(self) -> None:
        for field, allowed in CHOICES.items():
            found = getattr(self, field)
            if found not in allowed:
                raise ValueError(f"LoraGAConfig.{field} is {found!r}; it must be one of {', '.join(allowed)}.")
        for field, least in (("oversample", 0), ("power_steps", 0), ("seed", 0), ("max_batches", 1)):
            found = getattr(self, field)
            if field == "max_batches" and found is None:
                continue
            if not isinstance(found, int) or isinstance(found, bool) or found < least:
                raise ValueError(f"LoraGAConfig.{field} is {found!r}; it must be an integer of at least {least}.")
        for field in ("stable_gamma", "reach"):
            size = getattr(self, field)
            if size is None and field == "stable_gamma":
                continue
            if not isinstance(size, (int, float)) or isinstance(size, bool) or not math.isfinite(size) or size <= 0:
                raise ValueError(f"LoraGAConfig.{field} is {size!r}; it must be a finite number above 0.")
        self._check_tolerance()

    def _check_tolerance(self) -> None:
        tolerance = self.tolerance
        if tolerance is None:
            return
        if not isinstance(tolerance, (int, float)) or isinstance(tolerance, bool) or not 0 < tolerance < 1:
            raise ValueError(f"LoraGAConfig.tolerance is {tolerance!r}; it must be None or between 0 and 1.")
        if self.estimator != "streaming":
            raise ValueError(
                f'LoraGAConfig.tolerance is {tolerance} with estimator="{self.estimator}", which follows no '
                'directions; it needs estimator="streaming".'
            )

    def directions(self, rank: int) -> int:
        """How many singular directions of a gradient an estimate keeps: the 2r that a start uses, and `oversample`.

        Args:
            rank: The adapter's rank r.

        Returns:
            2r + `oversample`.
        """
        return 2 * rank + self.oversample

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for records and files."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraGAConfig:
        """Read what `to_dict` wrote.

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
