"""Draws docs/support.md from the records of the tests of supported models and settings, and of the versions.

python benchmarks/versions.py
pytest tests/test_support.py tests/test_ways_of_running.py tests/test_kinds.py tests/test_trained_adapters.py \
        tests/test_probe.py --support-record benchmarks/results/support.json
python benchmarks/support_page.py --write
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / "results" / "support.json"
VERSIONS = ROOT / "benchmarks" / "results" / "versions.json"
PAGE = ROOT / "docs" / "support.md"
# Package → its name in the table of versions.
LIBRARIES = {
    "torch": "torch",
    "transformers": "Transformers",
    "peft": "PEFT",
    "accelerate": "Accelerate",
    "trl": "TRL",
    "datasets": "datasets",
}
MEANING = {
    "gradient": "the gradient from the hooks equals autograd's (for a quantised model: autograd's in plain layers with "
    "the same weights)",
    "start": "after initialisation the model's output equals the base model's, bit for bit",
    "step": "training lowers the loss",
    "reload": "stock PEFT loads the saved adapter on the original base and computes the trained model's output",
    "resume": "`lora_ga.load` restores the adapter so that training can continue",
    'offset="base"': "with the offset in the base weights, the output equals the base model's up to rounding, and the "
    "saved adapter fits the original base",
    'offset="base" refused': "it is refused, because the weight cannot be changed",
    "merge": "PEFT's `merge_and_unload` gives a model that computes what the adapted one does",
    "merge refused": "`lora-ga export --merge` refuses it: PEFT merges into quantised weights with rounding (PEFT "
    "0.21.2 into frozen quanto layers not at all, without a warning), and not into grouped convolutions",
    "alignment": "the first step reaches at least 0.99 of its limit (median over experts)",
    "works": "behaves as PEFT documents it, with both offsets where both apply",
}
# What a row does not say.
NOTES = (
    "HQQ: the rows are layers made by the package hqq. Transformers 5.24 cannot quantise on the fly: "
    "`from_pretrained(..., quantization_config=HqqConfig(...))` raises NotImplementedError.",
    "torchao: with dynamic activations (Int8DynamicActivationInt8WeightConfig) a layer passes no gradient to "
    "its input. The estimate names such layers in a warning, also where they are not adapted. Training "
    "lacks the same part.",
)
SIGNS = {"passed": "✓", "failed": "**✗**"}


def cell(outcome: str | None) -> str:
    """The text of a cell for an outcome; None if there is no such test."""
    if outcome is None:
        return ""
    return SIGNS.get(outcome, "not run")


def table(rows: dict[str, dict[str, str]]) -> list[str]:
    """A group of tests as a Markdown table."""
    found = {column for cells in rows.values() for column in cells}
    columns = [column for column in MEANING if column in found]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, cells in rows.items():
        lines.append(f"| {row} | " + " | ".join(cell(cells.get(column)) for column in columns) + " |")
    return lines


def counts(outcome: dict[str, Any] | None) -> str:
    """The text of a cell for the counts of several tests; None if they did not run."""
    if outcome is None:
        return "–"
    parts = [f"{outcome['passed']} passed"]
    parts += [f"**{outcome['failed']} failed**"] if outcome["failed"] else []
    parts += [f"{outcome['skipped']} skipped"] if outcome["skipped"] else []
    return ", ".join(parts)


def versions_table(rows: dict[str, Any]) -> list[str]:
    """The outcomes with each set of versions as a Markdown table."""
    lines = ["| | " + " | ".join(LIBRARIES.values()) + " | situations | core tests | its own tests |"]
    lines.append("|---" * (len(LIBRARIES) + 4) + "|")
    for row, outcome in rows.items():
        cells = [outcome["versions"][name] for name in LIBRARIES]
        cells += [counts(outcome.get(part)) for part in ("situations", "core", "framework")]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    reasons = {reason for outcome in rows.values() for reason in outcome.get("core", {}).get("reasons", [])}
    return [*lines, "", *(f"- Skipped in some rows: {reason}." for reason in sorted(reasons))]


def page(record: dict[str, Any], environments: dict[str, Any]) -> str:
    """The whole page in Markdown, from the record of the tests and the rows of the record of versions."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        "# What LoRA-GA runs on",
        "",
        "`benchmarks/support_page.py` draws this page from `benchmarks/results/support.json`, which the tests write.",
        "Every sign is a test that ran, on a CPU, with small models made from their configurations.",
        "",
        "## Versions",
        "",
        "Each row is an environment of its own (`make test-versions`). The rows of frameworks have the framework",
        "itself, with the versions that it pins. The situations are those of `tests/smoke.py`, the core tests some "
        "files of `tests/`;",
        "a framework's own tests are in `tests/test_frameworks.py`. A dash marks tests that have not run with "
        "these versions.",
        "Versions below those of the first row are refused at import.",
        "",
        *versions_table(environments),
        "",
        f"The tables below were made with {versions}.",
        "",
    ]
    lines += [f"- **{column}**: {meaning}." for column, meaning in MEANING.items()]
    lines += [""]
    lines += [f"- {note}" for note in NOTES]
    for group, rows in record["groups"].items():
        lines += ["", f"## {group.capitalize()}", "", *table(rows)]
    skipped = sorted(
        {
            f"{row}, {column}: {outcome.removeprefix('skipped: ')}"
            for rows in record["groups"].values()
            for row, cells in rows.items()
            for column, outcome in cells.items()
            if outcome.startswith("skipped: ")
        }
    )
    if skipped:
        lines += ["", "Not run:", "", *(f"- {reason}." for reason in skipped)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    drawn = page(json.loads(RECORD.read_text()), json.loads(VERSIONS.read_text())["rows"])
    print(drawn)
    if "--write" in sys.argv:
        PAGE.write_text(drawn)
