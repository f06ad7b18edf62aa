"""Suite files, and the cells that a suite needs: rate grids that grow, seeds, and one rate for all methods."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_ga.cli.main import main
from lora_ga.experiments.methods import METHODS, complete
from lora_ga.experiments.records.store import Store
from lora_ga.experiments.suites.cells import (
    MOST_RATES,
    Cell,
    Look,
    Score,
    best_rate,
    cell_of,
    missing,
    rate_at,
    score,
    sweep,
    sweep_of,
)
from lora_ga.experiments.suites.spec import RECIPES, VALUES, Suite, available, load_suite, names
from lora_ga.experiments.tasks import KINDS


@pytest.mark.parametrize("name", available())
def test_every_suite_names_only_existing_methods_options_and_kinds_of_task(name: str) -> None:
    suite = load_suite(name)
    assert suite.title
    assert {task.kind for task in suite.tasks.values()} <= set(KINDS)
    for variant in suite.methods.values():
        assert variant.method in METHODS
        assert set(variant.options) <= set(complete(variant.method, variant.options))


def test_the_package_has_suites() -> None:
    assert {"stories-shakespeare", "glue-minilm", "ablation"} <= set(available())


def test_the_package_contains_every_suite_file_and_nothing_else_of_recipes() -> None:
    project = (RECIPES[0].parent / "pyproject.toml").read_text(encoding="utf-8")
    packaged = re.findall(r'"recipes/(.*)" = "lora_ga/recipes/(.*)"', project)
    assert packaged == [(path.name, path.name) for path in sorted(RECIPES[0].glob("*.yaml"))]
    assert project.count('"recipes') == len(packaged)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {}}, "the suite: unknown task. The known are name, title, tasks"),
        ({"settings": {"step": 3}}, "settings: unknown step. The known are steps, batch_size"),
        ({"settings": {"rows": 8}}, "settings: rows has a new name, batch_size. In place of rows and parts give"),
        ({"settings": {"parts": 2}}, "settings: parts has a new name, gradient_accumulation_steps"),
        ({"settings": {"recompute": True}}, "settings: recompute has a new name, gradient_checkpointing"),
        (
            {"methods": {"a": {"method": "lora", "rates": [-6], "settings": {"every": 5}}}},
            "methods.a.settings: every has",
        ),
        ({"settings": {"steps": 0}}, "settings: steps is 0; it must be a whole number of at least 1"),
        ({"settings": {"steps": True}}, "settings: steps is True; it must be a whole number of at least 1"),
        ({"settings": {"eval_steps": "1e6"}}, "settings: eval_steps is '1e6'; it must be a whole number of at least 1"),
        ({"settings": {"rank": 2.0}}, "settings: rank is 2.0; it must be a whole number of at least 1"),
        ({"settings": {"alpha": 0}}, "settings: alpha is 0; it must be a number above 0"),
        ({"settings": {"alpha": "16"}}, "settings: alpha is '16'; it must be a number above 0"),
        ({"settings": {"warmup": 1.5}}, "settings: warmup is 1.5; it must be a number from 0 to 1"),
        ({"settings": [3]}, r"settings holds \[3\], but it must map steps, batch_size"),
        ({"seeds": 0}, "the suite: seeds is 0; it must be a whole number of at least 1"),
        ({"seeds": 1.5}, "the suite: seeds is 1.5; it must be a whole number of at least 1"),
        ({"seeds": "3"}, "the suite: seeds is '3'; it must be a whole number of at least 1"),
        ({"paper_rate": -1}, "the suite: paper_rate is -1; it must be a number above 0"),
        ({"paper_rate": float("inf")}, "the suite: paper_rate is inf; it must be a number above 0"),
        ({"paper_rate": "small"}, "the suite: paper_rate is 'small'; it must be a number above 0"),
        ({"quarter_decades": 1}, "the suite: quarter_decades is 1; it must be true or false"),
        ({"title": 2024}, "the suite: title is 2024; it must be a text"),
        ({"tasks": {1: {}}}, "the suite: tasks is {1: {}}; it must be a mapping whose names are texts"),
        ({"tasks": {"a": {"kind": "text"}}}, "tasks.a: has no model, files. A task must have kind, model and files"),
        ({"methods": {"lora": {}}}, "methods.lora: rates is .*; it must list whole exponents"),
        ({"methods": {"lora": [-6]}}, r"methods.lora holds \[-6\], but it must map method, options"),
        (
            {"methods": {"lora": {"rates": [-6, 0.5]}}},
            r"methods.lora: rates is \[-6, 0.5\]; it must be a list of whole",
        ),
        ({"methods": {"lora": {"rates": -6}}}, "methods.lora: rates is -6; it must be a list of whole exponents"),
        ({"methods": {"lora": {"rates": [-700]}}}, "methods.lora: rates is .*; it must be a list of whole exponents"),
        ({"methods": {"lora": {"rates": [-6], "options": [1]}}}, "methods.lora: options is .*; it must be a mapping"),
        ({"methods": {"lora": {"rates": [-6], "tasks": "text"}}}, "methods.lora: tasks is 'text'; it must be a list"),
        (
            {"methods": {"lora": {"rates": [-6], "settings": {"length": -1}}}},
            "methods.lora.settings: length is -1; it must be a whole number of at least 1",
        ),
        ({"methods": {"lora": {"rates": [-6], "tasks": ["maths"]}}}, "methods.lora.tasks: unknown maths"),
        ({"methods": {"lora": {"rate_of": "pissa"}}}, "methods.lora.rate_of: unknown pissa"),
        ({"tasks": {}}, "a suite needs at least one task"),
        (
            {"unswept_rates": [0.0002, -1]},
            r"the suite: unswept_rates is \[0.0002, -1\]; it must be a list of learning rates above 0",
        ),
        ({"unswept_rates": 0.1}, "the suite: unswept_rates is 0.1; it must be a list of learning rates above 0"),
    ],
)
def test_unknown_keys_and_wrong_values_are_refused(
    toy: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(toy.read_text()) | changes))
    with pytest.raises(ValueError, match=f"changed.yaml: {message}"):
        load_suite(str(path))


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("text", {"metric": "acuracy"}, "metric names 'acuracy'; the metrics of this task of the kind text are loss"),
        ("classes", {"also": ["f2"]}, "also names 'f2'; the metrics .* kind classes are loss, accuracy, f1, matthews"),
        ("classes", {"labels": 3, "metric": "matthews"}, "metric names 'matthews'; .* classes are loss, accuracy"),
        ("classes", {"choose": "los"}, "choose is 'los'; on the tuning split a task of the kind classes has loss, acc"),
        ("text", {"kind": "texts"}, "kind is 'texts'; it must be one of text, classes, seq2seq, instruct"),
        ("text", {"files": {"text": 3}}, "files is {'text': 3}; it must be a mapping of texts to texts"),
        ("classes", {"columns": ["text"]}, r"columns is \['text'\]; it must be a mapping of texts to texts"),
        ("classes", {"labels": -2}, "labels is -2; it must be a whole number of at least 0"),
        ("text", {"seconds": 0}, "seconds is 0; it must be a number above 0"),
        ("text", {"evaluation": {"by": "greedy", "batch": 0}}, "batch is 0; it must be a whole number of at least 1"),
        ("text", {"settings": {"steps": 1.5}}, "steps is 1.5; it must be a whole number of at least 1"),
        (
            "text",
            {"kind": "instruct", "metric": "gsm8k", "evaluation": {"by": "greedy", "test": "gsm8k"}},
            "choose is not given, so it is 'gsm8k'; on the tuning split a task of the kind instruct has loss. Set",
        ),
    ],
)
def test_wrong_values_of_a_task_are_refused_before_anything_runs(
    toy: Path,
    tmp_path: Path,
    task: str,
    changes: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values, path = yaml.safe_load(toy.read_text()), tmp_path / "mine.yaml"
    values["tasks"][task] |= changes
    path.write_text(yaml.safe_dump(values))
    assert main(["reproduce", str(path), "--store", str(tmp_path / "runs")]) == 2
    place = f"tasks.{task}" + next((f".{key}" for key in ("settings", "evaluation") if {key} == set(changes)), "")
    assert re.search(f"mine.yaml: {place}: {message}", capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


def test_a_rate_may_be_written_with_an_exponent_alone_and_a_key_without_a_value_has_its_default(
    toy: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    lines = "paper_rate: 1e-4\nunswept_rates: [2E-5, 0.1]\nsettings: {head_rate: 5e-3, alpha: 16}\nseeds:\n"
    path.write_text(toy.read_text().replace("seeds: 2\n", "").replace("settings:", "unused:", 1) + lines)
    values = yaml.safe_load(path.read_text())
    del values["unused"]
    assert (values["paper_rate"], values["seeds"]) == ("1e-4", None)
    path.write_text(yaml.safe_dump(values))
    suite = load_suite(str(path))
    assert (suite.paper_rate, list(suite.unswept_rates), suite.seeds) == (1e-4, [2e-5, 0.1], 3)
    assert (suite.settings.head_rate, suite.settings.alpha, suite.settings.steps) == (5e-3, 16, 200)
    assert complete("lora_ga", {"stable_gamma": "4e3", "oversample": 8.0})["stable_gamma"] == 4000.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stable_gamma": "abc"}, "option stable_gamma is 'abc'; it must be a number of at least 0"),
        ({"stable_gamma": -4}, "option stable_gamma is -4; it must be a number of at least 0"),
        ({"stable_gamma": [1]}, r"option stable_gamma is \[1\]; it must be a number of at least 0"),
        ({"oversample": 1.5}, "option oversample is 1.5; it must be a whole number of at least 0"),
        ({"oversample": True}, "option oversample is True; it must be a whole number of at least 0"),
        ({"use_rslora": "false"}, "option use_rslora is 'false'; it must be true or false"),
        ({"estimator": 3}, "option estimator is 3; it must be a text"),
    ],
)
def test_a_method_refuses_options_of_another_kind(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"lora_ga: {message}"):
        complete("lora_ga", options)


def test_every_field_of_a_suite_file_has_a_check() -> None:
    apart = {"name", "settings"}  # of a suite: its file's name, and a group with checks of its own
    assert {kind: set(VALUES[kind]) for kind in VALUES} == {
        kind: set(names(kind)) - (apart if kind is Suite else set()) for kind in VALUES
    }


def test_a_method_refuses_options_it_does_not_have() -> None:
    with pytest.raises(ValueError, match="lora_ga: has no option gamma. Its options are direction, scale"):
        complete("lora_ga", {"gamma": 3})
    with pytest.raises(ValueError, match="lorra: there is no such method. The methods are full, lora"):
        complete("lorra", {})


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            {"lorra": {"rates": [-6]}},
            "methods.lorra: lorra: there is no such method. The methods are full, lora",
        ),
        (
            {"γ": {"method": "lora_ga", "rates": [-6], "options": {"gamma": 3}}},
            "methods.γ: lora_ga: has no option gamma. Its options are direction",
        ),
    ],
)
def test_a_suite_with_an_unknown_method_or_option_is_refused_before_anything_runs(
    toy: Path, tmp_path: Path, methods: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_GA_DEBUG", "1")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(toy.read_text()) | {"methods": methods}, allow_unicode=True))
    with pytest.raises(ValueError, match=message):
        main(["reproduce", str(path), "--store", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["reproduce", "report"])
def test_an_unknown_suite_is_refused_and_the_known_ones_are_listed(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_GA_DEBUG", "1")
    with pytest.raises(ValueError, match="glue: there is no such suite. The suites are ablation, glue-minilm, glue-t5"):
        main([command, "glue"])
    with pytest.raises(ValueError, match="which suite. There are ablation"):
        main([command])
    (tmp_path / "run.json").touch()
    with pytest.raises(ValueError, match=f"no such suite. This folder is a run; `lora-ga compare {tmp_path}` shows it"):
        main([command, str(tmp_path)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'float16'; it must be one of float32, bfloat16"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing is 1; it must be true or false"),
    ],
)
def test_settings_that_are_not_numbers_are_checked_too(
    toy: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(toy.read_text()) | {"settings": settings}))
    with pytest.raises(ValueError, match=message):
        load_suite(str(path))


def run_sweep(
    first: list[int],
    score: Callable[[float], Score | None],
    quarter_decades: bool = False,
    diverged: Callable[[float], bool] = lambda point: False,
    guess: Callable[[float], float] = lambda point: math.inf,
) -> tuple[list[float], float | None]:
    """Runs the points that a sweep needs until it needs no more; returns them in their order, and the best."""
    ran: list[float] = []

    def result_at(point: float) -> Look:
        return Look(True, score(point), diverged(point), guess(point)) if point in ran else Look(ran=False)

    while (state := sweep(first, result_at, quarter_decades)).needed:
        ran += state.needed
    return ran, state.best


def test_a_grid_with_its_best_inside_does_not_grow() -> None:
    assert run_sweep([-6, -5, -4], lambda p: (-abs(p + 5.0),)) == ([-6, -5, -4], -5)


@pytest.mark.parametrize(("peak", "more"), [(-9, [-7, -8, -9, -10]), (-2, [-3, -2, -1])])
def test_a_grid_grows_until_its_best_is_inside(peak: int, more: list[int]) -> None:
    assert run_sweep([-6, -5, -4], lambda p: (-abs(p - peak),)) == ([-6, -5, -4, *more], peak)


def test_a_search_in_quarter_decades_ends_with_the_neighbours_of_the_best() -> None:
    found = run_sweep([-7, -6], lambda p: (-abs(p + 4.6),), quarter_decades=True)
    assert found == ([-7, -6, -5, -4, -5.5, -4.5], -4.5)
    assert rate_at(-4.5) == 0.00562


def test_a_grid_has_a_largest_size() -> None:
    ran, best = run_sweep([-6, -5, -4], lambda p: (float(p),))
    assert len(ran) == MOST_RATES
    assert best == max(ran)


def test_a_diverged_rate_is_never_best_and_bounds_the_grid() -> None:
    assert run_sweep([-6, -5, -4], lambda p: None if p > -6 else (float(p),)) == ([-6, -5, -4, -7], -6)


def test_if_all_rates_diverge_smaller_ones_are_tried() -> None:
    found = run_sweep([-6, -5], lambda p: None if p > -8 else (float(p),), diverged=lambda p: p > -8)
    assert found == ([-6, -5, -7, -8, -9], -8)


def test_if_all_rates_learn_nothing_smaller_and_larger_ones_are_tried_in_turn() -> None:
    assert run_sweep([-3, -2], lambda p: (-abs(p),) if p > -1 else None) == ([-3, -2, -4, -1, -5, 0, 1], 0)
    found = run_sweep([-3, -2], lambda p: (-abs(p + 6),) if p < -5 else None, diverged=lambda p: p > -2)
    assert found == ([-3, -2, -4, -1, -5, -6, -7], -6)


def test_a_run_no_better_than_a_guess_has_no_score() -> None:
    """The runs at -3 and -2 guess. So does the one at -1, though not the same for each row; those below -5 learn."""
    losses = {-3: 0.68, -2: 0.68, -1: 0.69, 0: 0.68, -4: 0.68, -5: 0.5, -6: 0.4, -7: 0.6}
    guessing = (-4, -3, -2, 0)
    found = run_sweep(
        [-3, -2, -1],
        lambda p: None if p in guessing else (-losses[int(p)],),
        guess=lambda p: losses[int(p)] if p in guessing else math.inf,
    )
    assert found == ([-3, -2, -1, -4, 0, -5, -6, -7], -6)


FIRST_LOSS = 100.0


def done(cell: Cell, loss: float, accuracy: float = 0.5) -> dict[str, Any]:
    tune = {"loss": loss, "accuracy": accuracy}
    # The reported split ranks the runs the other way round, because no choice may depend on it.
    metrics = {"tune": tune, "report": {"loss": -loss, "accuracy": -accuracy}}
    return {"status": "done", "metrics": metrics, "curves": {"training": [FIRST_LOSS, loss]}}


@pytest.fixture
def suite(toy: Path) -> Suite:
    return load_suite(str(toy))


def run_all(suite: Suite, lines: list[tuple[str, str]], result: Callable[[Cell], dict[str, Any]]) -> dict[str, Any]:
    """The records of all cells that the lines need, each made by `result`."""
    records: dict[str, Any] = {}
    while cells := missing(suite, lines, records):
        for cell in cells:
            assert cell.digest() not in records
            records[cell.digest()] = result(cell)
    return records


def test_the_search_does_not_end_among_rates_at_which_the_loss_has_risen(suite: Suite) -> None:
    # The first rates are all too high: 0.00316 has worse neighbours on both sides, and is no better than no training.
    risen = {0.001: 2.0, 0.00316: 1.2, 0.01: 1.5}

    def result(cell: Cell) -> dict[str, Any]:
        return done(cell, FIRST_LOSS * risen.get(cell.learning_rate, 0.5 + abs(cell.learning_rate - 0.000316)))

    records = run_all(suite, [("text", "lora")], result)
    assert best_rate(suite, "text", "lora", records) == 0.000316


@pytest.mark.parametrize(
    ("metric", "rise", "counts"), [("loss", 1.09, True), ("loss", 1.11, False), ("accuracy", 2.0, True)]
)
def test_a_run_whose_loss_has_risen_by_a_tenth_has_no_score_if_the_loss_chooses(
    suite: Suite, metric: str, rise: float, counts: bool
) -> None:
    record = done(cell_of(suite, "text", "lora", 0.001, 0), rise * FIRST_LOSS)
    assert (score(record, metric) is not None) == counts


@pytest.mark.parametrize(
    ("measured", "counts"),
    [
        ({"loss": 0.6832, "accuracy": 0.572, "matthews": 0.0}, False),  # the shares alone have a loss of 0.68275
        ({"loss": 0.6826, "accuracy": 0.572, "matthews": 0.0}, True),
        ({"loss": 0.6832, "accuracy": 0.572, "matthews": 0.01}, True),
        ({"loss": 0.6832, "accuracy": 0.572}, True),  # more than two classes: no Matthews' correlation
        ({"loss": 0.01, "accuracy": 1.0, "matthews": 0.0}, True),  # all rows of one class
    ],
)
def test_a_classifier_that_has_learned_the_shares_of_its_classes_alone_has_no_score_if_the_loss_chooses(
    suite: Suite, measured: dict[str, float], counts: bool
) -> None:
    record = done(cell_of(suite, "text", "lora", 0.001, 0), FIRST_LOSS)
    record["metrics"]["tune"] = measured
    assert (score(record, "loss") is not None) == counts
    assert score(record, "accuracy") is not None


def test_the_best_rate_is_picked_on_the_tuning_split_with_seed_0_and_gets_all_seeds(suite: Suite) -> None:
    asked: list[tuple[float, int]] = []

    def result(cell: Cell) -> dict[str, Any]:
        asked.append((cell.learning_rate, cell.seed))
        return done(cell, abs(cell.learning_rate - 0.00316))

    records = run_all(suite, [("text", "lora")], result)
    assert asked == [(0.00316, 0), (0.01, 0), (0.001, 0), (0.00316, 1)]
    assert best_rate(suite, "text", "lora", records) == 0.00316
    assert sweep_of(suite, "text", "lora", records).inside


def test_a_larger_accuracy_is_better_and_the_loss_decides_between_equals(suite: Suite) -> None:
    def result(cell: Cell) -> dict[str, Any]:
        return done(cell, loss=abs(cell.learning_rate - 0.00316), accuracy=0.7 if cell.learning_rate < 0.02 else 0.1)

    records = run_all(suite, [("classes", "lora")], result)
    assert best_rate(suite, "classes", "lora", records) == 0.00316


def test_a_line_that_takes_the_rate_of_another_line_runs_that_line_first(suite: Suite) -> None:
    line = [("text", "random directions")]
    assert {cell.label for cell in missing(suite, line, {})} == {"lora_ga"}
    records = run_all(suite, line, lambda cell: done(cell, abs(cell.learning_rate - 0.001)))
    found = [cell_of(suite, "text", "random directions", 0.001, seed).digest() in records for seed in range(3)]
    assert found == [True, True, False]


def test_the_papers_protocol_gives_every_method_one_rate_and_all_seeds(suite: Suite) -> None:
    paper = replace(suite, paper_rate=2e-5)
    records = run_all(paper, [("text", "full")], lambda cell: done(cell, abs(cell.learning_rate - 0.001)))
    assert all(cell_of(paper, "text", "full", 2e-5, seed).digest() in records for seed in range(2))


def test_a_cell_has_the_digest_of_the_published_records(suite: Suite) -> None:
    task = replace(suite.tasks["text"], model="data:models/x", files={"text": "data:x.txt"})
    fixed = replace(suite, tasks={"text": task})
    assert cell_of(fixed, "text", "lora", rate_at(-5), 1).digest() == "a77fc4ee76c9"


def test_a_digest_uses_the_setting_names_of_the_first_records() -> None:
    cell = cell_of(load_suite("llama2-chat"), "chat", "lora", 1e-3, 1)
    assert cell.settings.batch_size * cell.settings.gradient_accumulation_steps == cell.settings.effective_batch_size
    assert cell.identity()["settings"] == {
        **{"steps": 1625, "rows": 32, "parts": 8, "length": 1024, "samples": 128, "every": 1000000, "recompute": True},
        **{"train_rows": 52000, "tune_rows": 1000, "report_rows": 1000, "dtype": "bfloat16"},
    }
    # Computed by the version whose suites had these names.
    assert cell.digest() == "0fd4764340fa"


def test_todays_suites_find_every_published_record() -> None:
    records = Store(RECIPES[0] / "results/store").records()
    suites = {name: load_suite(name) for name in {record["suite"] for record in records.values()}}
    assert len(records) == 1191
    for digest, record in records.items():
        suite = suites[record["suite"]]
        cell = cell_of(suite, record["task"], record["label"], record["learning_rate"], record["seed"])
        assert (cell.digest(), cell.identity()) == (digest, record["cell"])


def test_a_digest_depends_on_what_affects_the_result_and_not_on_names(suite: Suite) -> None:
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
