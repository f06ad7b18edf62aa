"""The numbers in the tables of the README and of docs/: what they count, and that the records behind them agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

import against_lora
import rate_tables
import rates
from against_lora import lead, steps_row
from lora_ga.experiments.comparison.suites import Result
from lora_ga.experiments.tables.table import BLANK
from published import load


def result(losses: Sequence[float], rate: float = 0.01) -> Result:
    runs = {
        seed: {"metrics": {"report": {"loss": loss}}, "curves": {"training": [4.0] * 10 + [loss] * 10}}
        for seed, loss in enumerate(losses)
    }
    return Result("task", "line", rate, True, runs, [], 0, {})


def test_the_table_of_steps_counts_standard_errors_of_the_difference_and_above_zero_is_better() -> None:
    plain, better = (
        result((2.9, 3.1)),
        result((2.3, 2.7), 0.003),
    )  # standard errors of 0.1 and 0.2; differences 0.6, 0.4
    assert steps_row(plain, plain) == ["3.000 ± 0.100 (0.01)", BLANK, "1.00"]
    assert steps_row(better, plain)[:2] == ["2.500 ± 0.200 (0.003)", "+2.2 (+5.0)"]
    assert steps_row(plain, better)[1:] == ["-2.2 (-5.0)", "never"]


def test_a_lead_pairs_the_runs_of_one_seed_whatever_their_order() -> None:
    plain, better = result((1.0, 2.0, 3.0)), result((0.9, 1.7, 2.8))
    shuffled = Result("task", "line", 0.01, True, {seed: better.runs[seed] for seed in (2, 0, 1)}, [], 0, {})
    found = lead(shuffled, plain, "loss")
    assert found.seeds == pytest.approx((0.1, 0.3, 0.2))
    assert found.paired == pytest.approx(0.2 / (0.1 / math.sqrt(3)))
    assert found.alone == pytest.approx(0.2 / math.sqrt((1.0 + 0.91) / 3))  # the variances of the losses


def test_equal_differences_have_no_paired_error_and_no_difference_is_zero() -> None:
    plain = result((2.9, 3.1))
    assert lead(result((2.4, 2.6)), plain, "loss").in_errors() == "+3.5 (+inf)"
    assert lead(result((2.9, 3.1)), plain, "loss").in_errors() == "+0.0 (+0.0)"


def test_the_best_rate_of_smollm2_is_chosen_on_the_tuning_split() -> None:
    def run(tune: float, report: float) -> dict[str, Any]:
        return {"metrics": {"tune": {"loss": tune}, "report": {"loss": report}}}

    runs = {
        "0.001": {"lora": run(0.8, 0.9)},
        "0.003": {"lora": run(0.9, 0.7), "pissa": run(0.1, 0.1)},
        "0.01": {"lora": {"status": "diverged"}},
        "found": {"lora": run(0.1, 0.1)},
    }
    tried = rate_tables.smollm2_tried(runs, "lora")
    assert list(tried) == ["0.001", "0.003", "0.01"]
    assert rate_tables.smollm2_best(tried) == "0.001"


def test_the_record_of_found_rates_agrees_with_the_sweeps_of_the_store() -> None:
    # After new runs in the store: `python benchmarks/rates.py`, which measures nothing that the record holds.
    swept, record = rates.lines(), load("rates")
    for runs in swept.values():
        assert all(abs(2 * math.log10(rate) - round(2 * math.log10(rate))) < 0.01 for rate in runs)
    assert record["leaders"] == {share: pytest.approx(row) for share, row in rates.leaders(swept).items()}
    for name, row in record["found"].items():
        judged = rates.judged(row, swept[rates.line_of(name)])
        for key in ("rate", "nearest", "between", "swept best", "cost"):
            assert row[key] == pytest.approx(judged[key]), name
        assert row.get("regret") == pytest.approx(judged.get("regret")), name


def test_lora_ga_is_compared_with_lora_at_the_rates_of_one_search() -> None:
    rows = {line.split(" | ")[0].strip("| "): line for line in against_lora.against_lora_table().splitlines()[2:]}
    assert len(rows) == 7
    assert "the same runs" in rows["babyllama105, loss"]
    assert "the same runs" not in rows["qnli, accuracy"]
