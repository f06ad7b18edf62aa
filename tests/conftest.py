"""Write the record that the support matrix (docs/support.md) is drawn from: pytest --support-record FILE."""

from __future__ import annotations

import json
from collections.abc import Generator
from importlib import metadata
from pathlib import Path

import pytest

PACKAGES = [
    "lora-ga",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "torchao",
    "hqq",
    "optimum-quanto",
    "gptqmodel",
]
OUTCOMES = pytest.StashKey[dict[str, dict[str, dict[str, str]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-record", type=Path, help="write the record of the support matrix to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "support(group, row, column): a cell of the support matrix")
    config.stash[OUTCOMES] = {}


def _weight(outcome: str) -> int:
    """The order of outcomes, if several tests belong to one cell: failed, passed, not run. The first one counts."""
    return ["failed", "passed"].index(outcome) if outcome in {"failed", "passed"} else 2


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.CallInfo, None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    marker = item.get_closest_marker("support")
    if marker is None or (report.when != "call" and report.passed):
        return
    group, row, column = marker.args
    found = (
        report.outcome if report.outcome != "skipped" else f"skipped: {report.longrepr[2].removeprefix('Skipped: ')}"
    )
    cells = item.config.stash[OUTCOMES].setdefault(group, {}).setdefault(row, {})
    cells[column] = min(cells.get(column, found), found, key=_weight)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--support-record")
    if path is None:
        return
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    record = {"versions": versions, "groups": session.config.stash[OUTCOMES]}
    path.write_text(json.dumps(record, indent=1) + "\n")
