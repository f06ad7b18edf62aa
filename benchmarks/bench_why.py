"""Why does a start help or not? What full fine-tuning, LoRA and LoRA-GA do in their first steps under AdamW.

LORA_GA_DATA=... python benchmarks/bench_why.py

babyllama105 on tinyshakespeare as in the suite `stories-shakespeare`. Each method has its best rate of that suite, and
all train on the same batches. The record has medians over the layers and means over the seeds. docs/evidence.md shows
it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import lora_ga
from lora_ga import LoraGAConfig
from lora_ga.experiments.methods import load_method
from lora_ga.experiments.suites.cells import Cell, cell_of
from lora_ga.experiments.suites.run import build_inputs
from lora_ga.experiments.suites.sources import Sources
from lora_ga.experiments.suites.spec import load_suite
from lora_ga.experiments.suites.training import Curves, train
from lora_ga.experiments.tasks import prepare
from lora_ga.layers.factors import Factor
from record import data, finish

SEEDS, MEASURED_AFTER = 3, (2, 5, 10, 25, 50, 200)
# Method → its best learning rate in the suite.
RATES = {"full": 3.16e-4, "lora": 3.16e-3, "lora-ga γ=16": 3.16e-4, "lora-ga γ=4096": 3.16e-3}
Matrices = dict[str, Tensor]


def gradients(cell: Cell) -> Matrices:
    """The exact gradient of every adapted weight, on the rows that the suite uses for initialisation."""
    prepared = prepare(cell, Sources.from_environment())
    config = LoraGAConfig(estimator="dense", oversample=10**4, max_batches=None)
    model = get_peft_model(prepared.base, LoraConfig(r=8, target_modules=prepared.targets()))
    estimate = lora_ga.estimate_gradients(model, prepared.start_batches, config)
    return {name: (each.U * each.S) @ each.V.mT for name, each in estimate.items()}


def layers(model: Any) -> dict[str, Any]:
    """The LoRA layers of a model, by their path in the base. Full fine-tuning has none."""
    base = model.get_base_model() if hasattr(model, "peft_config") else None
    return {name: each for name, each in base.named_modules() if hasattr(each, "lora_A")} if base else {}


def rows_of_a(layer: Any) -> Tensor:
    """The matrix A of a layer, (r, I). In an aligned layer it is A₀ + dA."""
    factor = layer.lora_A["default"]
    return (factor.start + factor.delta() if isinstance(factor, Factor) else factor.weight).detach().clone()


def changes(model: Any, weights: Matrices) -> Matrices:
    """The change ΔW of every layer."""
    found = layers(model)
    if found:
        return {name: layer.get_delta_weight("default").detach() for name, layer in found.items()}
    return {name: model.get_submodule(name).weight.detach() - weight for name, weight in weights.items()}


def cosine(one: Tensor, other: Tensor) -> float:
    """The cosine between two matrices."""
    return float((one * other).sum() / (one.norm() * other.norm()).clamp_min(1e-30))


def within(a_rI: Tensor, first_rI: Tensor) -> float:
    """The share of ‖A‖² that lies in the span of the initial rows of A."""
    return float((a_rI @ torch.linalg.qr(first_rI.mT).Q).norm() ** 2 / a_rI.norm() ** 2)


def trained(cell: Cell, gradient: Matrices, full: Mapping[int, Matrices] | None) -> tuple[dict[int, Matrices], Any]:
    """Train a cell, and measure it after the steps in `MEASURED_AFTER`.

    Returns:
        Step → ΔW of every layer, and step → measurements, medians over the layers.
    """
    prepared, settings = prepare(cell, Sources.from_environment()), cell.settings
    weights = {name: prepared.base.get_submodule(name).weight.detach().clone() for name in gradient}
    inputs = build_inputs(cell, prepared)
    method = load_method(cell.method)
    torch.manual_seed(cell.seed)
    model = method.build(inputs)
    first, seen, figures = {name: rows_of_a(layer) for name, layer in layers(model).items()}, {}, {}

    def measure(model: Any, step: int) -> None:
        if step not in MEASURED_AFTER:
            return
        seen[step] = changes(model, weights)
        others = full[step] if full else seen[step]
        figures[step] = {
            "cosine with -G": _median(cosine(each, -gradient[name]) for name, each in seen[step].items()),
            "cosine with full": _median(cosine(each, others[name]) for name, each in seen[step].items()),
            "size": _median(float(each.norm() / weights[name].norm()) for name, each in seen[step].items()),
        }
        if first:
            now = {name: rows_of_a(layer) for name, layer in layers(model).items()}
            figures[step]["A where it began"] = _median(within(a, first[name]) for name, a in now.items())
            figures[step]["A moved"] = _median(
                float((a - first[name]).norm() / first[name].norm()) for name, a in now.items()
            )

    torch.manual_seed(cell.seed)
    train(prepared, dataclasses.replace(method, after_step=measure), model, inputs, settings, "cpu", Curves())
    return seen, figures


def _median(values: Any) -> float:
    return statistics.median(list(values))


def mean(parts: list[Any]) -> Any:
    """The mean over the seeds of nested mappings of numbers."""
    if isinstance(parts[0], dict):
        return {key: mean([part[key] for part in parts]) for key in parts[0]}
    return statistics.fmean(parts)


def main() -> None:
    """Run every method and write the record."""
    data("models", "babyllama105")
    torch.set_num_threads(1)
    suite = load_suite("stories-shakespeare")
    found: dict[str, list[Any]] = {label: [] for label in RATES}
    for seed in range(SEEDS):
        cells = {label: cell_of(suite, "babyllama105", label, rate, seed) for label, rate in RATES.items()}
        gradient, full = gradients(cells["full"]), None
        for label, cell in cells.items():
            seen, figures = trained(cell, gradient, full)
            full = full or seen
            found[label].append(figures)
            print(seed, label, {step: round(row["cosine with full"], 3) for step, row in figures.items()}, flush=True)
    finish("why", {"seeds": SEEDS, "rates": RATES, "methods": {label: mean(each) for label, each in found.items()}})


if __name__ == "__main__":
    main()
