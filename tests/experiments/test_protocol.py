"""Which cells a suite needs: rate grids that grow, what diverged, seeds, and one rate for all."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_ga.experiments.records.store import Store
from lora_ga.experiments.suites.cells import (
    MOST_RATES,
    Cell,
    Score,
    best_rate,
    cell_of,
    missing,
    rate_at,
    sweep,
    sweep_of,
)
from lora_ga.experiments.suites.spec import RECIPES, Suite, load_suite


def searched(first: list[int], score: Callable[[int], Score | None]) -> tuple[list[int], int | None]:
    """Runs what a search asks for until it asks for nothing; the points in their order, and the best."""
    ran: list[int] = []

    def look(point: int) -> tuple[bool, Score | None]:
        return point in ran, score(point) if point in ran else None

    while (state := sweep(first, look)).needed:
        ran += state.needed
    return ran, state.best


def test_a_grid_with_its_best_inside_does_not_grow() -> None:
    assert searched([-6, -5, -4], lambda p: (-abs(p + 5.0),)) == ([-6, -5, -4], -5)


@pytest.mark.parametrize(("peak", "more"), [(-9, [-7, -8, -9, -10]), (-2, [-3, -2, -1])])
def test_a_grid_grows_until_its_best_is_inside(peak: int, more: list[int]) -> None:
    assert searched([-6, -5, -4], lambda p: (-abs(p - peak),)) == ([-6, -5, -4, *more], peak)


def test_a_grid_does_not_grow_for_ever() -> None:
    ran, best = searched([-6, -5, -4], lambda p: (float(p),))
    assert len(ran) == MOST_RATES
    assert best == max(ran)


def test_what_diverged_is_never_best_and_bounds_the_grid() -> None:
    assert searched([-6, -5, -4], lambda p: None if p > -6 else (float(p),)) == ([-6, -5, -4, -7], -6)


def test_where_all_diverge_smaller_rates_are_tried() -> None:
    assert searched([-6, -5], lambda p: None if p > -8 else (float(p),)) == ([-6, -5, -7, -8, -9], -8)


def done(cell: Cell, loss: float, accuracy: float = 0.5) -> dict[str, Any]:
    tune = {"loss": loss, "accuracy": accuracy}
    # The reported split says the opposite: nothing may be chosen by it.
    return {"status": "done", "metrics": {"tune": tune, "report": {"loss": -loss, "accuracy": -accuracy}}}


@pytest.fixture
def suite(toy: Path) -> Suite:
    return load_suite(str(toy))


def run_all(suite: Suite, lines: list[tuple[str, str]], result: Callable[[Cell], dict[str, Any]]) -> dict[str, Any]:
    records: dict[str, Any] = {}
    while cells := missing(suite, lines, records):
        for cell in cells:
            assert cell.digest() not in records
            records[cell.digest()] = result(cell)
    return records


def test_the_best_rate_is_picked_on_the_tuning_split_with_seed_0_and_gets_all_seeds(suite: Suite) -> None:
    asked: list[tuple[float, int]] = []

    def result(cell: Cell) -> dict[str, Any]:
        asked.append((cell.learning_rate, cell.seed))
        return done(cell, abs(cell.learning_rate - 0.00316))

    records = run_all(suite, [("text", "lora")], result)
    assert asked == [(0.00316, 0), (0.01, 0), (0.001, 0), (0.00316, 1)]
    assert best_rate(suite, "text", "lora", records) == 0.00316
    assert sweep_of(suite, "text", "lora", records).inside


def test_larger_is_better_where_the_metric_says_so_and_the_loss_decides_a_plateau(suite: Suite) -> None:
    def result(cell: Cell) -> dict[str, Any]:
        return done(cell, loss=abs(cell.learning_rate - 0.00316), accuracy=0.7 if cell.learning_rate < 0.02 else 0.1)

    records = run_all(suite, [("classes", "lora")], result)
    assert best_rate(suite, "classes", "lora", records) == 0.00316


def test_a_line_with_another_ones_rate_waits_for_it_and_brings_it_along(suite: Suite) -> None:
    line = [("text", "random directions")]
    assert {cell.label for cell in missing(suite, line, {})} == {"lora_ga"}
    records = run_all(suite, line, lambda cell: done(cell, abs(cell.learning_rate - 0.001)))
    found = [cell_of(suite, "text", "random directions", 0.001, seed).digest() in records for seed in range(3)]
    assert found == [True, True, False]


def test_the_papers_protocol_gives_every_method_one_rate_and_all_seeds(suite: Suite) -> None:
    paper = replace(suite, paper_rate=2e-5)
    records = run_all(paper, [("text", "full")], lambda cell: done(cell, abs(cell.learning_rate - 0.001)))
    assert all(cell_of(paper, "text", "full", 2e-5, seed).digest() in records for seed in range(2))


def test_a_cells_digest_is_that_of_published_records(suite: Suite) -> None:
    task = replace(suite.tasks["text"], model="data:models/x", files={"text": "data:x.txt"})
    fixed = replace(suite, tasks={"text": task})
    assert cell_of(fixed, "text", "lora", rate_at(-5), 1).digest() == "a77fc4ee76c9"


def test_a_digest_names_the_settings_as_the_first_records_do() -> None:
    cell = cell_of(load_suite("llama2-chat"), "chat", "lora", 1e-3, 1)
    assert cell.settings.batch_size * cell.settings.gradient_accumulation_steps == cell.settings.effective_batch_size
    assert cell.identity()["settings"] == {
        **{"steps": 1625, "rows": 32, "parts": 8, "length": 1024, "samples": 128, "every": 1000000, "recompute": True},
        **{"train_rows": 52000, "tune_rows": 1000, "report_rows": 1000, "dtype": "bfloat16"},
    }
    assert cell.digest() == "0fd4764340fa"  # computed by the version whose suites had these names


def test_every_published_record_is_found_by_todays_suites() -> None:
    records = Store(RECIPES[0] / "results/store").records()
    suites = {name: load_suite(name) for name in {record["suite"] for record in records.values()}}
    assert len(records) == 485
    for digest, record in records.items():
        suite = suites[record["suite"]]
        cell = cell_of(suite, record["task"], record["label"], record["learning_rate"], record["seed"])
        assert (cell.digest(), cell.identity()) == (digest, record["cell"])


def test_a_digest_says_what_decides_the_result_and_no_names(suite: Suite) -> None:
    cell = cell_of(suite, "text", "lora_ga", 0.001, 0)
    alike = replace(cell, suite="other", task_name="t", label="l", task=replace(cell.task, seconds=7.0))
    assert alike.digest() == cell.digest()
    others = [
        replace(cell, seed=1),
        replace(cell, learning_rate=0.01),
        replace(cell, method="lora"),
        replace(cell, options={"stable_gamma": 4.0}),
        replace(cell, settings=replace(cell.settings, steps=5)),
        replace(cell, task=replace(cell.task, model="m")),
    ]
    assert len({each.digest() for each in (cell, *others)}) == 7
