"""docs/support.md is drawn from its record, and a cell shows the worst outcome of its tests."""

from __future__ import annotations

import json

import pytest

import support_page
from cases import CASES
from conftest import _weight
from test_ways_of_running import WAYS


def test_the_page_is_drawn_from_the_record() -> None:
    assert support_page.PAGE.read_text() == support_page.page(json.loads(support_page.RECORD.read_text()))


def test_the_record_has_every_row_and_nothing_failed() -> None:
    groups = json.loads(support_page.RECORD.read_text())["groups"]
    for group, rows in CASES.items():
        assert set(groups[group]) == set(rows)
        for row in rows:
            assert {"start", "step", "reload"} <= set(groups[group][row]), row
    assert set(WAYS) <= set(groups["ways of running"])
    outcomes = [outcome for rows in groups.values() for cells in rows.values() for outcome in cells.values()]
    assert "failed" not in outcomes


def test_a_failure_and_a_missing_package_are_shown() -> None:
    rows = {"one": {"start": "failed", "step": "skipped: x is not installed"}, "two": {"start": "passed"}}
    shown = support_page.page({"versions": {"torch": "2"}, "groups": {"layers": rows}})
    assert "| one | **✗** | not run |" in shown
    assert "| two | ✓ |  |" in shown
    assert "- one, step: x is not installed." in shown


@pytest.mark.parametrize(
    ("outcomes", "worst"),
    [
        (["passed", "failed", "skipped: x"], "failed"),
        (["skipped: x", "passed"], "passed"),
        (["skipped: x"], "skipped: x"),
    ],
)
def test_a_cell_with_several_tests_shows_the_worst_outcome_of_those_that_ran(outcomes: list[str], worst: str) -> None:
    assert min(outcomes, key=_weight) == worst
