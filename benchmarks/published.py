"""The published records, and how their numbers are written in the tables of the README and of docs/."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_ga.experiments.comparison.curves import mean_and_error
from lora_ga.experiments.comparison.suites import Result, results
from lora_ga.experiments.records.store import Store
from lora_ga.experiments.suites.spec import load_suite
from lora_ga.experiments.tables.table import BLANK

ROOT = Path(__file__).parent.parent


def load(name: str) -> dict[str, Any]:
    """Reads a record of benchmarks/results."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


@functools.cache
def published_results(name: str) -> list[Result]:
    """The results of a suite from the published records."""
    return results(load_suite(name), Store(ROOT / "recipes" / "results" / "store").records())


def complete_results(name: str) -> dict[tuple[str, str], Result]:
    """(Task, label) → result of a suite, of the lines of which every run is there."""
    return {(each.task, each.label): each for each in published_results(name) if not each.missing and each.runs}


def better(cells: Sequence[str], best: Callable[[Iterable[float]], float]) -> list[str]:
    """Makes the best of some numbers bold. Numbers that read the same are all bold."""
    value = best(float(cell.split()[0]) for cell in cells if cell != BLANK)
    return [f"**{cell}**" if cell != BLANK and float(cell.split()[0]) == value else cell for cell in cells]


def short_mean(values: Sequence[float]) -> str:
    """Mean ± standard error over the seeds, with three decimals, or a blank."""
    if not values:
        return BLANK
    mean, error = mean_and_error(values)
    return f"{mean:.3f} ± {error:.3f}"


def rate_text(rate: float) -> str:
    """A learning rate, as 3.2e-4."""
    return f"{rate:.1e}".replace("e-0", "e-")
