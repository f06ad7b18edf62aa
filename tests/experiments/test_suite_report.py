"""The report of a suite: its tables, notices and figures, on records with known values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_ga.cli.main import main
from lora_ga.experiments.comparison.suites import PAPER, Result, StepsToLoss, find_series, results, steps_to_loss
from lora_ga.experiments.pages.suite_figures import figure_groups, series_points, task_figure
from lora_ga.experiments.pages.suites import HTML_NAME, README_NAME, readme_files, report_files, suite_document
from lora_ga.experiments.records.store import Store
from lora_ga.experiments.suites.cells import Cell, best_rate, missing
from lora_ga.experiments.suites.run import Place, about
from lora_ga.experiments.suites.sources import Sources
from lora_ga.experiments.suites.spec import Suite, Variant, load_suite
from lora_ga.experiments.tables.suites import steps_cells

STEPS = 40
BEST = {"full": 0.001, "lora": 0.00316}


def record_of(cell: Cell, *, decay: float = 0.05, level: float = 1.0) -> dict[str, Any]:
    """A record whose loss decays at the rate `decay`; results are best at the method's best learning rate."""
    distance = abs(math.log10(cell.learning_rate / BEST.get(cell.method, 0.001)))
    losses = [level + math.exp(-decay * step) + 0.001 * cell.seed for step in range(STEPS)]
    tune = {"loss": 1 + distance, "accuracy": 0.9 - 0.1 * distance}
    shown = {"loss": 2 + distance + 0.1 * cell.seed, "accuracy": 0.8 - 0.1 * distance - 0.02 * cell.seed}
    evaluations = [{"step": step, **shown} for step in (0, 20, 40)]
    return about(cell, Place(Sources(), commit="abc1234")) | {
        "status": "done",
        "metrics": {"tune": tune, "report": shown},
        "trained_parameters": 1234,
        "peak_memory_mib": 500.0 + cell.seed,
        "seconds": {"load": 1.0, "start": 2.0, "train": 8.0, "total": 11.0},
        "curves": {"training": losses, "report": evaluations},
        "date": "2026-01-02T03:04:05+00:00",
    }


Make = Callable[[Cell], dict[str, Any]]


def complete(suite: Suite, make: Make = record_of) -> dict[str, dict[str, Any]]:
    """The records of every cell that the suite needs."""
    records: dict[str, dict[str, Any]] = {}
    while cells := missing(suite, suite.lines(), records):
        records |= {cell.digest(): make(cell) for cell in cells}
    return records


@pytest.fixture
def suite(toy: Path) -> Suite:
    """Two methods, and three variants that differ in one number."""
    whole = load_suite(str(toy))
    gammas = {
        f"γ={value}": Variant("lora_ga", options={"stable_gamma": value}, rates=[-7, -6, -5]) for value in (4, 16, 64)
    }
    methods = {"full": Variant("full", rates=[-7, -6, -5]), "lora": Variant("lora", rates=[-6, -5, -4]), **gammas}
    return replace(whole, methods=methods)


def text_of(suite: Suite, records: dict[str, dict[str, Any]]) -> str:
    return readme_files(suite_document(suite, records))[README_NAME].decode()


def test_times_on_another_device_are_left_out(suite: Suite, undrawn: None) -> None:
    def slower(cell: Cell) -> dict[str, Any]:
        record = record_of(cell)
        if cell.method != "full" or cell.seed == 0:
            return record
        return record | {"device": "a slower one", "seconds": dict.fromkeys(record["seconds"], 99.0)}

    text = text_of(suite, complete(suite, slower))
    assert "each in one process, on cpu" in text
    assert "; runs on other devices are left out" in text
    assert re.search(r"\| full \| 2(\.0+)? \| 8(\.0+)? \| 11(\.0+)? \|", text)
    assert "| 99" not in text
    assert "left out" not in text_of(suite, complete(suite))
    begun = dict(list(complete(suite).items())[:1])
    assert "each in one process. Peak memory" in text_of(suite, begun)


def test_times_of_a_stack_are_not_mixed_with_those_of_runs_alone(suite: Suite, undrawn: None) -> None:
    def stacked(cell: Cell) -> dict[str, Any]:
        record = record_of(cell)
        if cell.method == "full":
            return record
        return record | {"stack": 8, "seconds": dict.fromkeys(record["seconds"], 99.0)}

    text = text_of(suite, complete(suite, stacked))
    assert "8 runs at once, which have equal shares of their times and one peak memory" in text
    assert "one peak memory; runs on other devices are left out" in text
    assert "| lora | 99 ± 0 |" in text
    assert "| full | – |" in text
    assert "at once" not in text_of(suite, complete(suite))


def test_a_line_shows_mean_and_standard_error_of_the_reported_split_at_the_best_rate(
    suite: Suite, undrawn: None
) -> None:
    text = text_of(suite, complete(suite))
    # Seeds 0 and 1 have 2.0 and 2.1: mean 2.05, standard error 0.05. On the tuning split it is 1.
    assert re.search(r"\| lora \| 0.00316 \| (\*\*)?2\.050 ± 0\.050(\*\*)? \| 2 of 2 \| 1 ± 0 \|", text)
    assert re.search(r"\| full \| \S*?2\.050 ± 0\.050 \(0.001\)\S* \| \S*?0\.790 ± 0\.010 \(0.001\)", text)
    assert "| lora | 2 ± 0 | 8 ± 0 | 11 ± 0 | 25.0% | 501 | 1,234 |" in text
    assert "Not complete" not in text


def test_steps_are_counted_to_loras_final_loss_on_the_same_seed(suite: Suite) -> None:
    def twice_as_fast(cell: Cell) -> dict[str, Any]:
        return record_of(cell, decay=0.1 if cell.method == "full" else 0.05)

    by_label = {each.label: each for each in results(suite, complete(suite, twice_as_fast)) if each.task == "text"}
    found = steps_to_loss(by_label["full"], by_label["lora"])
    assert found is not None
    assert list(found.reference) == [STEPS, STEPS]
    # The mean of exp(-0.1 t) over the 10 steps up to 24 is as low as that of exp(-0.05 t) over those up to 40.
    assert list(found.steps) == [24, 24]
    assert found.ratio == pytest.approx(0.6)
    assert steps_to_loss(by_label["lora"], by_label["lora"]).ratio == 1.0  # type: ignore[union-attr]


def test_a_seed_that_never_reaches_the_loss_is_reported_and_leaves_the_ratio_blank(suite: Suite, undrawn: None) -> None:
    def late(cell: Cell) -> dict[str, Any]:
        return record_of(cell, level=1.1 if cell.method == "full" and cell.seed == 1 else 1.0)

    by_label = {each.label: each for each in results(suite, complete(suite, late)) if each.task == "text"}
    found = steps_to_loss(by_label["full"], by_label["lora"])
    assert found is not None
    assert found.ratio is None
    assert steps_cells(found) == ["never in 1 of 2 seeds", "–"]
    never = complete(suite, lambda cell: record_of(cell, level=1.1 if cell.method == "full" else 1.0))
    assert "| never | never |" in text_of(suite, never)


def with_diverged_seeds(*diverged: tuple[str, int]) -> Make:
    """Records of which some (method, seed) diverged at the method's best rate; the method full is better than LoRA."""

    def make(cell: Cell) -> dict[str, Any]:
        record = record_of(cell, decay=0.1 if cell.method == "full" else 0.05)
        if cell.method == "full":
            record["metrics"]["report"] = {"loss": 1.5, "accuracy": 0.95}
        if (cell.method, cell.seed) in diverged and cell.learning_rate == BEST[cell.method]:
            record |= {"status": "diverged", "reason": "the training loss is nan at step 3"}
            del record["metrics"]
        return record

    return make


def test_a_line_with_a_diverged_seed_says_so_in_place_of_a_mean_and_is_never_the_best(
    suite: Suite, undrawn: None
) -> None:
    three = replace(suite, seeds=3)
    best = text_of(three, complete(three, with_diverged_seeds()))
    assert "| full | **1.5 ± 0 (0.001)** |" in best
    assert "| full | 0.001 | **1.5 ± 0** | 3 of 3 | 1 ± 0 |" in best
    text = text_of(three, complete(three, with_diverged_seeds(("full", 1), ("full", 2))))
    # Seeds 0, 1 and 2 of the others have 2.0, 2.1 and 2.2.
    assert "| full | 2 of 3 diverged (0.001) |" in text
    assert "| lora | **2.100 ± 0.058 (0.00316)** |" in text
    assert "| full | 0.001 | 2 of 3 diverged | 1 of 3 | – | – | never in 2 of 3 seeds | – |" in text
    assert "| lora | 0.00316 | **2.100 ± 0.058** | 3 of 3 | 1 ± 0 |" in text


def test_a_line_of_which_every_seed_diverged_says_so_at_a_rate_that_nobody_has_swept(
    suite: Suite, undrawn: None
) -> None:
    unswept = replace(suite, tasks={"text": suite.tasks["text"]}, unswept_rates=[BEST["lora"]])
    text = text_of(unswept, complete(unswept, with_diverged_seeds(("lora", 0), ("lora", 1))))
    section = text[text.index("## text, loss, without a sweep") :]
    assert "| lora | 2 of 2 diverged |" in section
    assert re.search(r"\| full \| \*\*1\.5\S*", section)


def test_a_diverged_seed_of_a_method_never_reaches_loras_loss_and_one_of_lora_leaves_no_loss_to_reach(
    suite: Suite,
) -> None:
    def found(*diverged: tuple[str, int]) -> StepsToLoss | None:
        records = complete(suite, with_diverged_seeds(*diverged))
        by_label = {each.label: each for each in results(suite, records) if each.task == "text"}
        return steps_to_loss(by_label["full"], by_label["lora"])

    assert found() == StepsToLoss([24, 24], [STEPS, STEPS])
    assert found(("full", 1)) == StepsToLoss([24, None], [STEPS, STEPS])
    assert steps_cells(found(("full", 1))) == ["never in 1 of 2 seeds", "–"]
    assert found(("lora", 1)) is None


def test_a_failed_cell_leaves_the_search_open_and_says_how_to_run_it_again(suite: Suite, undrawn: None) -> None:
    def broken(cell: Cell, status: str) -> dict[str, Any]:
        return record_of(cell) | ({"status": status, "reason": "no memory"} if cell.method == "lora" else {})

    once = replace(suite, seeds=1, tasks={"text": suite.tasks["text"]})
    records: dict[str, dict[str, Any]] = {}
    while cells := missing(once, once.lines(), records):
        records |= {cell.digest(): broken(cell, "failed") for cell in cells}
    text = text_of(once, records)
    assert "text/lora lr 0.01 seed 0 failed: no memory (`lora-ga reproduce --retry` runs it again)." in text
    assert "| lora | – | – | 0 of 1 |" in text
    assert best_rate(once, "text", "lora", records) is None
    assert sorted(each["learning_rate"] for each in records.values() if each["label"] == "lora") == [
        0.001,
        0.00316,
        0.01,
    ]
    text = text_of(once, complete(once, lambda cell: broken(cell, "diverged")))
    assert "| lora | none trains | – | 0 of 1 |" in text
    assert "--retry" not in text


def test_a_series_has_no_point_where_a_seed_diverged(suite: Suite) -> None:
    def make(cell: Cell) -> dict[str, Any]:
        record = record_of(cell)
        if cell.options == {"stable_gamma": 4.0} and cell.seed == 1:
            record |= {"status": "diverged", "reason": "the training loss is nan at step 3"}
        return record

    by_label = {each.label: each for each in results(suite, complete(suite, make)) if each.task == "text"}
    points = series_points(find_series(suite)[0], by_label, "loss")
    assert [value for value, *_ in points] == [16, 64]


def test_the_report_of_an_incomplete_grid_states_what_is_missing(suite: Suite, undrawn: None) -> None:
    whole = complete(suite)
    part = {
        digest: record
        for digest, record in whole.items()
        if record["task"] == "text"
        and record["label"] == "lora"
        and (record["seed"], record["learning_rate"]) != (1, 0.00316)
    }
    document = suite_document(suite, part)
    assert re.search(
        r"Not complete: at least \d+ cells have not run: .*text/full \(4\), text/lora \(1\)", document.notices[0]
    )
    assert document.notices[1] == "Not started: classes."
    assert "more lines" not in document.notices[0]
    text = readme_files(document)[README_NAME].decode()
    assert "| lora | 0.00316 | **2** | 1 of 2 |" in text
    assert "| full |" not in text
    assert "## classes" not in text


def test_diverged_cells_are_named_with_the_reason(suite: Suite) -> None:
    def broken(cell: Cell) -> dict[str, Any]:
        record = record_of(cell)
        if cell.method == "lora" and cell.learning_rate > 0.005:
            record |= {"status": "diverged", "reason": "the training loss is nan at step 3"}
        return record

    notices = suite_document(suite, complete(suite, broken)).notices
    assert "text/lora lr 0.01 seed 0 diverged: the training loss is nan at step 3." in notices


def test_a_best_rate_at_the_edge_of_the_grid_is_reported(suite: Suite, undrawn: None) -> None:
    def ever_better(cell: Cell) -> dict[str, Any]:
        record = record_of(cell)
        record["metrics"]["tune"] = {"loss": -cell.learning_rate, "accuracy": cell.learning_rate}
        return record

    only = replace(suite, methods={"lora": suite.methods["lora"]})
    document = suite_document(only, complete(only, ever_better))
    assert "The best learning rate is at the edge of the rates tried: text/lora, classes/lora." in document.notices
    assert "(edge)" in readme_files(document)[README_NAME].decode()


def test_both_protocols_are_shown_if_the_suite_has_both(suite: Suite, undrawn: None) -> None:
    paper = replace(suite, paper_rate=2e-5)
    records = complete(paper)
    text = text_of(paper, records)
    assert "## Every method at its best learning rate" in text
    assert "## The paper's protocol: one learning rate for all methods" in text
    by_line: dict[str, Result] = {each.label: each for each in results(paper, records, PAPER) if each.task == "text"}
    assert {each.rate for each in by_line.values()} == {2e-5}
    assert by_line["full"].values("loss") == pytest.approx([2 + math.log10(50), 2.1 + math.log10(50)])


def test_rates_that_nobody_has_swept_get_all_seeds_and_a_table_beside_the_tuned_one(
    suite: Suite, undrawn: None
) -> None:
    text_task = replace(suite.tasks["text"], also=["accuracy"])
    unswept = replace(suite, tasks={"text": text_task}, unswept_rates=[2e-4, 2e-5])
    text = text_of(unswept, complete(unswept))
    assert "## text, loss, without a sweep" in text
    assert "|  | loss at 0.0002 | loss at 2e-05 |" in text
    # Two seeds: 2 + log10(0.001 / rate) and 0.1 more.
    assert re.search(r"\| full \| \S*2\.749 ± 0\.050\S* \| \S*3\.749 ± 0\.050\S* \|", text)
    # A metric that is shown beside the reported one.
    assert "| best rate | loss, reported | accuracy, reported | seeds |" in text
    assert "| 0.001 | **2.050 ± 0.050** | 0.790 ± 0.010 | 2 of 2 |" in text


def test_three_variants_that_differ_in_one_number_form_a_series(suite: Suite, undrawn: None) -> None:
    twice = {"lora": suite.methods["lora"], "rank 4": Variant("lora", settings={"rank": 4}, rates=[-6])}
    assert find_series(replace(suite, methods=twice)) == []
    (found,) = find_series(suite)
    assert (found.name, list(found.labels.values())) == ("stable_gamma", ["γ=4", "γ=16", "γ=64"])
    assert "tuned-text-series.png" in readme_files(suite_document(suite, complete(suite)))


def test_equal_records_give_equal_files_in_any_order(suite: Suite) -> None:
    suite = replace(suite, tasks={"text": suite.tasks["text"]})
    records = complete(suite)
    backwards = dict(reversed(list(records.items())))
    # A record of another suite in the same store.
    foreign = {"f" * 12: {"status": "done"}}
    assert report_files(suite_document(suite, records)) == report_files(suite_document(suite, backwards | foreign))


def test_the_page_holds_every_figure_and_fetches_nothing(suite: Suite) -> None:
    made = report_files(suite_document(suite, complete(suite)))
    page = made[HTML_NAME].decode()
    assert page.count("<svg") == len([name for name in made if name.endswith(".png")]) >= 4
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#)", page)
    assert "**" not in page
    assert "<td><b>2.050 ± 0.050</b></td>" in page
    text = made[README_NAME].decode()
    assert set(re.findall(r"\]\((.*?)\)", text)) == {name for name in made if name.endswith(".png")}


def test_the_command_writes_a_report_and_replaces_one_only_with_overwrite(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_GA_DEBUG", "1")
    suite, store, folder = load_suite(str(toy)), tmp_path / "runs", tmp_path / "page"
    command = ["report", str(toy), "--store", str(store), "--output", str(folder)]
    advice = re.escape(f"Fill it by `lora-ga reproduce {toy} --store {store}`, or name another store by --store.")
    with pytest.raises(ValueError, match=f"runs: there is no such store. {advice}"):
        main(command)
    store.mkdir()
    with pytest.raises(ValueError, match=f"runs: this folder is no store of runs. {advice}"):
        main(command)
    (store / "run.json").touch()
    with pytest.raises(ValueError, match="runs: a run of `lora-ga train`, not a store. `lora-ga compare .*runs` shows"):
        main(command)
    (store / "run.json").unlink()
    with Store(store).locked():
        pass
    with pytest.raises(ValueError, match=f"runs: an empty store. {advice}"):
        main(command)
    assert not folder.exists()
    with Store(store).locked() as opened:
        for cell in missing(suite, [("text", "lora")], {}):
            opened.add(record_of(cell))
    assert main(command) == 0
    assert {HTML_NAME, README_NAME} <= {path.name for path in folder.iterdir()}
    shown = capsys.readouterr().out
    assert "Not complete" in shown
    assert "**" not in shown
    assert "in parentheses the best learning rate" in shown
    columns = [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in shown.splitlines() if "│" in line]
    assert len(columns) > 0
    assert all(any(cell not in {"", "–"} for cell in column) for column in zip(*columns, strict=True))
    with pytest.raises(FileExistsError, match=f"{HTML_NAME}: exists already"):
        main(command)
    assert main([*command, "--overwrite"]) == 0


def test_the_report_refuses_a_store_of_another_version(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_GA_DEBUG", "1")
    (tmp_path / "store.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="written in format 0, this version reads format 1"):
        main(["report", str(toy), "--store", str(tmp_path), "--output", str(tmp_path / "page")])


def test_figures_cut_off_exploding_losses_but_no_accuracies(suite: Suite) -> None:
    def wild(cell: Cell) -> dict[str, Any]:
        record = record_of(cell)
        for point, value in zip(record["curves"]["report"], (0.2, 0.5, 0.9), strict=True):
            point |= {"accuracy": value, "loss": 1.0 if cell.method != "full" else 20 * value}
        if cell.method == "full" and cell.learning_rate != 0.001:
            record["metrics"] = {split: {"loss": 50.0, "accuracy": 0.1} for split in ("tune", "report")}
        return record

    found = results(suite, complete(suite, wild))
    (group,) = figure_groups([each for each in found if each.task == "text"])

    def tops(metric: str) -> list[float]:
        figure = task_figure("a", metric, metric, group)
        assert figure is not None
        titles = [axes.get_ylabel() for axes in figure.axes]
        shown = [f"{metric}, reported split", f"{metric}, tuning split", f"{metric}, reported split"]
        assert titles == ["training loss", *shown]
        return [axes.get_ylim()[1] for axes in figure.axes][1:]

    # The evaluations end at twice the smallest first loss, which is 1.
    # The two panels of rates end at twice the smallest reported loss, which is 2.
    assert tops("loss") == [2.0, pytest.approx(4.0), pytest.approx(4.0)]
    assert tops("accuracy")[0] > 0.9
    assert min(tops("accuracy")[1:]) > 0.8
