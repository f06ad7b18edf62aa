"""Options: --support-record FILE writes the record that the support matrix (docs/support.md) is drawn from.

--quick leaves out the tests marked slow.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Generator
from importlib import metadata
from pathlib import Path
from typing import Any

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
SLOW = "slow; `make test-all` runs it"


class SupportRecord:
    """Collects the outcomes of the tests that are cells of the support matrix, and writes them at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.groups: dict[str, dict[str, dict[str, str]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cell: Any = dict(report.user_properties).get("support")
        if cell is None or (report.when != "call" and report.passed):
            return
        group, row, column = cell
        found: str = report.outcome
        if isinstance(report.longrepr, tuple):
            found = f"skipped: {report.longrepr[2].removeprefix('Skipped: ')}"
        cells = self.groups.setdefault(group, {}).setdefault(row, {})
        cells[column] = min(cells.get(column, found), found, key=_weight)

    def pytest_sessionfinish(self) -> None:
        versions = {}
        for name in PACKAGES:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        self.path.write_text(json.dumps({"versions": versions, "groups": self.groups}, indent=1) + "\n")


def _weight(outcome: str) -> int:
    """The order of outcomes, if several tests belong to one cell: failed, passed, not run. The first one counts."""
    return ["failed", "passed"].index(outcome) if outcome in {"failed", "passed"} else 2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-record", type=Path, help="write the record of the support matrix to this file")
    parser.addoption("--quick", action="store_true", help="leave out the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "support(group, row, column): a cell of the support matrix")
    path = config.getoption("--support-record")
    if path is not None and not hasattr(config, "workerinput"):  # pytest-xdist sends all reports to one process
        config.pluginmanager.register(SupportRecord(path))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if (marker := item.get_closest_marker("support")) is not None:
            item.user_properties.append(("support", marker.args))
        if config.getoption("--quick") and item.get_closest_marker("slow") is not None:
            item.add_marker(pytest.mark.skip(reason=SLOW))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let the garbage collector leave out the half million objects of the imported libraries.

    Transformers and Accelerate call it several times in each training, and it looks at all objects each time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    left_out = [report for report in terminalreporter.stats.get("skipped", []) if SLOW in str(report.longrepr)]
    if left_out:
        terminalreporter.write_line(f"{len(left_out)} slow tests were left out; `make test-all` runs them too.")
