"""The README's table, drawn from the records in results/.

python benchmarks/tables.py          prints it
python benchmarks/tables.py --write  puts it between its markers in README.md
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MARKERS = re.compile(r"(<!-- drawn from records -->\n).*?(\n<!-- end -->)", flags=re.DOTALL)


def load(name: str) -> dict[str, Any]:
    """A record."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def alignment(models: dict[str, Any], start: str) -> list[str]:
    """Median and lowest alignment ratio of a start, a cell a model."""
    return [f"{model[start]['median']:.3f} ({model[start]['lowest']:.3f})" for model in models.values()]


def convergence(row: dict[str, Any]) -> list[str]:
    """Final loss, rate, and how many times fewer steps than LoRA, of a method."""
    ratios = [ratio for ratio in row["lora_steps_over_own"] if ratio is not None]
    missed = len(row["lora_steps_over_own"]) - len(ratios)
    faster = "never gets there" if not ratios else f"{statistics.fmean(ratios):.2f}"
    faster += f" ({missed} of {len(row['lora_steps_over_own'])} seeds never)" if ratios and missed else ""
    final = f"{row['final_loss']:.3f} ± {row['final_loss_stderr']:.3f}"
    return [f"{row['learning_rate']:g}", final, faster]


def table() -> str:
    """Markdown: the first step on three models, and convergence on one of them."""
    models, methods = load("alignment")["models"], load("convergence")["table"]
    rows = [
        ("LoRA-GA, γ = 1024", "ours, streaming", "lora-ga γ=1024"),
        ("LoRA-GA, γ = 16 (the paper's)", "ours, streaming", "lora-ga γ=16"),
        ("PEFT's own `lora_ga`", "peft lora_ga", "peft lora_ga"),
        ("plain LoRA", "lora", "lora"),
        ("full fine-tuning", None, "full"),
    ]
    heads = [*models, "best rate", "final loss", "LoRA's steps ÷ own, to LoRA's final loss"]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for label, start, method in rows:
        cells = ["–"] * len(models) if start is None else alignment(models, start)
        lines.append(f"| {label} | " + " | ".join([*cells, *convergence(methods[method])]) + " |")
    return "\n".join(lines)


def written(text: str) -> str:
    """A text with the table between its markers."""
    return MARKERS.sub(lambda match: match[1] + table() + match[2], text)


if __name__ == "__main__":
    print(table())
    if "--write" in sys.argv:
        readme = ROOT / "README.md"
        readme.write_text(written(readme.read_text()))
