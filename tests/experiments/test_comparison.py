"""The numbers by which runs are compared, and the tables that show them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lora_ga.experiments.comparison.curves import mean_and_error, mean_curve, smooth, steps_to
from lora_ga.experiments.comparison.runs import compare_runs, group_runs
from lora_ga.experiments.pages.drawing import add_legend, legend_entry, line_style, new_figure
from lora_ga.experiments.pages.runs import comparison_document
from lora_ga.experiments.tables.runs import (
    cost_table,
    differences_table,
    runs_table,
    summary_table,
    versions_table,
)
from lora_ga.experiments.tables.table import format_values
from runs import falling_losses, make_run


@pytest.mark.parametrize("every", [1, 3])
def test_the_trailing_mean_equals_that_of_a_slow_loop(every: int) -> None:
    values = np.random.default_rng(0).normal(size=50)
    curve = tuple((step, float(value)) for step, value in zip(range(every, 151, every), values, strict=False))
    slow = [(t, float(np.mean([value for step, value in curve if t - 7 < step <= t]))) for t, _ in curve if t >= 7]
    assert [step for step, _ in smooth(curve, 7)] == [step for step, _ in slow]
    assert [value for _, value in smooth(curve, 7)] == pytest.approx([value for _, value in slow], abs=1e-12)


def test_a_loss_that_is_not_finite_affects_only_the_windows_that_hold_it() -> None:
    smoothed = smooth(((1, 1.0), (2, math.nan), (3, 3.0), (4, 5.0)), 2)
    assert [math.isnan(value) for _, value in smoothed] == [True, True, False]
    assert smoothed[-1] == (4, 4.0)


@pytest.mark.parametrize(
    ("every", "expected"), [(1, "10 optimiser steps"), (4, "10 optimiser steps, logged every 4 steps")]
)
def test_the_smoothing_states_how_often_the_loss_was_logged(tmp_path: Path, every: int, expected: str) -> None:
    run = make_run(tmp_path / "a", curve=falling_losses(1.0)[every - 1 :: every])
    assert compare_runs([run]).smoothing == f"trailing mean over {expected}"


def test_steps_to_is_the_first_step_at_or_below_the_loss() -> None:
    curve = ((1, 3.0), (2, math.nan), (3, 2.0), (4, 2.5), (5, 1.0))
    assert [steps_to(curve, loss) for loss in (3.0, 2.0, 1.5, 0.5)] == [1, 3, 5, None]


def test_a_mean_curve_has_the_steps_that_all_curves_have() -> None:
    assert mean_curve([((1, 1.0), (2, 2.0)), ((2, 4.0), (3, 9.0))]) == ((2, 3.0),)


def test_means_and_standard_errors_equal_those_of_numpy() -> None:
    values = [0.3, 0.1, 0.7, 0.4]
    assert mean_and_error(values) == pytest.approx((np.mean(values), np.std(values, ddof=1) / 2))
    assert math.isnan(mean_and_error([1.0])[1])


def test_numbers_are_rounded_to_the_digits_of_their_error() -> None:
    assert [format_values([]), format_values([0.123456]), format_values([math.nan])] == ["–", "0.1235", "not finite"]
    assert [format_values([100.0, 110.0]), format_values([0.75, 0.752])] == ["105.0 ± 5.0", "0.7510 ± 0.0010"]


def test_runs_that_differ_only_in_their_seed_form_one_group(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{rate}-{seed}", seed=seed, learning_rate=rate, name=f"lora-seed{seed}")
        for rate in (1e-3, 3e-3)
        for seed in (0, 1, 2)
    ]
    groups = group_runs(runs)
    assert [group.label for group in groups] == ["lora (learning_rate=0.001)", "lora (learning_rate=0.003)"]
    assert [len(group.runs) for group in groups] == [3, 3]


def test_two_runs_of_one_seed_are_not_averaged(tmp_path: Path) -> None:
    groups = group_runs([make_run(tmp_path / "first"), make_run(tmp_path / "again")])
    assert [group.label for group in groups] == ["lora (first)", "lora (again)"]


def test_the_target_is_the_final_loss_of_plain_lora_and_the_table_counts_the_steps_to_it(tmp_path: Path) -> None:
    lora = make_run(tmp_path / "lora", curve=falling_losses(1.0))
    fast = make_run(tmp_path / "fast", curve=falling_losses(2.0), method="lora-ga", name="lora-ga")
    comparison = compare_runs([fast, lora], window=1)
    assert comparison.target.value == pytest.approx(2.0)
    table = summary_table(comparison)
    steps = table.headers.index("steps to loss 2")
    assert [row[steps] for row in table.rows] == ["20", "40"]
    assert [row[steps + 1] for row in table.rows] == ["2.00×", "1.00×"]
    assert [row[table.headers.index("eval accuracy")] for row in table.rows] == ["0.75", "0.75"]


def test_without_plain_lora_the_target_is_the_largest_final_loss(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{v}", curve=falling_losses(v), method="full", learning_rate=v) for v in (1.0, 1.5)]
    assert compare_runs(runs, window=1).target == (pytest.approx(2.0), "the largest final loss of all runs", None)


def test_every_seed_of_the_reference_reaches_the_default_target(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{seed}", curve=falling_losses(1 + seed / 10), seed=seed) for seed in range(3)]
    comparison = compare_runs(runs, window=1)
    assert summary_table(comparison).rows[0][:3] == ["lora", "3", "0.001"]
    assert [row[3] for row in runs_table(comparison).rows] == ["40", "37", "34"]


def test_the_table_counts_the_seeds_that_did_not_reach_the_target(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{seed}", curve=falling_losses(1.0 + seed), seed=seed) for seed in range(2)]
    assert "reached by 1 of 2" in summary_table(compare_runs(runs, window=1, target_loss=1.0)).rows[0]
    assert "not reached" in summary_table(compare_runs(runs, window=1, target_loss=-5.0)).rows[0]


def test_a_diverged_run_is_not_the_reference_and_gets_a_notice(tmp_path: Path) -> None:
    broken = [*falling_losses(1.0, 39), {"step": 40, "loss": math.nan}]
    runs = [
        make_run(tmp_path / "broken", curve=broken, learning_rate=9.0),
        make_run(tmp_path / "sound", curve=falling_losses(1.5)),
    ]
    comparison = compare_runs(runs, window=1)
    assert comparison.target.value == pytest.approx(1.0)
    assert any("broken: the training loss was not finite at step 40" in notice for notice in comparison.notices)
    assert "not finite" in summary_table(comparison).rows[0]


def test_runs_on_different_data_get_a_notice_that_they_cannot_be_compared(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", dataset="other", steps=80)]
    notices = compare_runs(runs).notices
    assert notices[0] == "The runs differ in their dataset (texts.jsonl, other): their losses cannot be compared."
    assert "number of steps" in notices[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_loss": math.nan}, "target_loss: nan is not a finite number"),
        ({"window": 0}, "smooth: 0 steps, but the width of the mean must be at least 1"),
    ],
)
def test_a_target_that_is_not_finite_and_a_width_of_zero_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare_runs([make_run(tmp_path / "a")], **settings)


def test_comparing_no_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="0 runs: there is nothing to compare"):
        compare_runs([])


def test_only_options_that_differ_are_listed(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", learning_rate=3e-3, versions={"torch": "3"})]
    comparison = compare_runs(runs)
    assert differences_table(comparison).rows == [["learning_rate", "0.001", "0.003"]]
    assert versions_table(comparison).rows == [["lora_ga", "0.1.0, –"], ["torch", "2.13.0, 3"]]


def test_the_cost_of_the_estimate_is_blank_for_a_run_without_one(tmp_path: Path) -> None:
    seconds = {"estimate": 3.0, "train": 60.0, "total": 63.0}
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", method="lora-ga", seconds=seconds)]
    table = cost_table(compare_runs(runs))
    assert [row[1:] for row in table.rows] == [["–", "60", "61", "12,345", "cpu"], ["3", "60", "63", "12,345", "cpu"]]


def test_a_metric_has_a_picture_if_it_was_measured_more_than_once(tmp_path: Path) -> None:
    once = [{"step": 40, "eval_loss": 2.5}]
    for evaluations, titles in ((once, set()), ([{"step": 20, "eval_loss": 3.0}, *once], {"Evaluation"})):
        run = make_run(tmp_path / str(len(evaluations)), eval=evaluations)
        sections = comparison_document(compare_runs([run])).sections
        assert {section.title for section in sections} & {"Evaluation"} == titles


def test_a_legend_is_no_wider_than_its_figure() -> None:
    figure, _ = new_figure("wide", "optimiser step", "loss", height=3.4)
    labels = ["lora AdamW", "lora-ga AdamW", "lora-ga PoLoRA", "lora-ga TSD", "random PoLoRA", "full AdamW"]
    add_legend(figure, [legend_entry(label, **line_style(place)) for place, label in enumerate(labels)])
    (legend,) = figure.legends
    assert legend.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width <= figure.bbox.width
