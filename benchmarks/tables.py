"""The tables of the README and of the pages in docs/, drawn from the records in results/.

python benchmarks/tables.py          prints them
python benchmarks/tables.py --write  puts each between its markers in its page
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import scale_tables
from lora_ga.experiments.comparison.suites import Result, plain_lora, results
from lora_ga.experiments.records.store import Store
from lora_ga.experiments.suites.protocol import score
from lora_ga.experiments.suites.spec import load_suite
from lora_ga.experiments.tables.suites import method_table, overview_table
from lora_ga.experiments.tables.table import format_values, markdown_lines

ROOT = Path(__file__).parent.parent
MARKERS = re.compile(r"(<!-- drawn from records -->\n).*?(\n<!-- end -->)", flags=re.DOTALL)


def load(name: str) -> dict[str, Any]:
    """A record."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def alignment(models: dict[str, Any], start: str) -> list[str]:
    """Median and lowest alignment ratio of a start, a cell a model."""
    return [f"{model[start]['median']:.3f} ({model[start]['lowest']:.3f})" for model in models.values()]


def first_step() -> str:
    """Markdown: the alignment ratio of the first step on three models."""
    models = load("alignment")["models"]
    lines = ["| | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    for label, start in (
        ("LoRA-GA", "ours, streaming"),
        ("PEFT's own `lora_ga`", "peft lora_ga"),
        ("plain LoRA", "lora"),
    ):
        lines.append(f"| {label} | " + " | ".join(alignment(models, start)) + " |")
    return "\n".join(lines)


# Suite and task → what the README calls its column.
SHOWN = {
    ("stories-shakespeare", "babyllama105"): "babyllama105, loss",
    ("stories-shakespeare", "stories260k"): "stories260k, loss",
    ("glue-minilm", "sst2"): "SST-2, accuracy",
    ("glue-minilm", "mrpc"): "MRPC, accuracy",
    ("glue-minilm", "cola"): "CoLA, correlation",
}
ROWS = {
    "LoRA-GA": "lora-ga reach=0.35",
    "LoRA-GA, the paper's γ = 16": "lora-ga γ=16",
    "PEFT's own `lora_ga`": "peft lora_ga",
    "plain LoRA": "lora",
    "rsLoRA": "rslora",
    "full fine-tuning": "full",
}


def outcome() -> str:
    """Markdown: what came out of training, every method at its own best rate."""
    found = {(name, each.task, each.label): each for name, _ in SHOWN for each in found_in(name)}
    lines = ["| | " + " | ".join(SHOWN.values()) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for label, method in ROWS.items():
        cells = []
        for name, task in SHOWN:
            result, metric = found[name, task, method], load_suite(name).tasks[task].metric
            cells.append(f"{format_values(result.values(metric))} ({result.rate:g})" if result.runs else "–")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost() -> str:
    """Markdown: what the estimate of a Llama of 150M parameters costs beside its neighbours."""
    found = load("estimation")
    ratios, wide = found["times"]["median ratios"], found["width 2048"]["median ratios"]
    memory, held, flat = found["memory"]["over lora steps"], found["estimate"], found["estimate, random bytes"]
    rows = [
        ("time ÷ frozen forward and backward pass", f"{ratios['frozen pass']:.2f}", "≤ 1.15"),
        ("the same, least possible by counts of multiplications", f"{found['floor']:.2f}", "–"),
        ("the same at width 2048, 4 layers", f"{wide['frozen pass']:.2f}", "–"),
        ("time ÷ PEFT's `preprocess_loraga` and `get_peft_model`", f"{ratios['peft lora_ga']:.2f}", "≤ 0.85"),
        ("peak memory ÷ that of plain LoRA steps", f"{memory['ours']:.2f}", "≤ 1.02"),
        ("the same of PEFT's `lora_ga`", f"{memory['peft lora_ga']:.2f}", "–"),
        ("state ÷ one float32 gradient of all targets", f"{held['state over gradient']:.3f}", "≤ 0.06"),
        ("alignment ratio, median (lowest)", f"{held['median']:.4f} ({held['lowest']:.4f})", "≥ 0.995"),
        ("the same, 2 layers on random bytes", f"{flat['median']:.4f} ({flat['lowest']:.4f})", "–"),
    ]
    lines = ["| | measured | goal |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {figure} | {goal} |" for what, figure, goal in rows)])


def update() -> str:
    """Markdown: the parts of one layer's update, and its growth."""
    found = load("update")
    costs = found["ms"]
    lines = [f"| one layer, width {found['width']}, ms | " + " | ".join(f"{tokens} tokens" for tokens in costs) + " |"]
    lines += ["|---|" + "---|" * len(costs)]
    for what in next(iter(costs.values())):
        lines.append(f"| {what} | " + " | ".join(f"{each[what]:.2f}" for each in costs.values()) + " |")
    lines += ["", "| growth with | time | state |", "|---|---|---|"]
    exponents = {name: each["exponents"] for name, each in found["growth"].items()}
    lines += [f"| {name} | exponent {time:.2f} | exponent {state:.2f} |" for name, (time, state) in exponents.items()]
    return "\n".join(lines)


def early() -> str:
    """Markdown: what the early stop loses and saves."""
    lines = [
        "| tolerance | alignment ratio, median | lowest | batches a layer, mean | saved |",
        "|---|---|---|---|---|",
    ]
    for tolerance, row in load("estimation")["early stop"].items():
        cells = [
            tolerance,
            f"{row['median']:.4f}",
            f"{row['lowest']:.4f}",
            f"{row['batches']:.0f}",
            f"{row['saved']:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def quantised() -> str:
    """Markdown: the start on 4-bit bases."""
    lines = [
        "| nf4 | alignment ratio, the 4-bit model's gradient | the full-precision model's | largest change of logits |",
        "|---|---|---|---|",
    ]
    for name, model in load("quantised")["models"].items():
        whose = (model["against the 4-bit model"], model["against the full-precision model"])
        ratios = [f"{each['median']:.3f} ({each['lowest']:.3f})" for each in whose]
        lines.append(f"| {name} | {' | '.join(ratios)} | {model['largest change of a logit']:g} |")
    return "\n".join(lines)


def qlora() -> str:
    """Markdown: a run on a 4-bit base, LoRA and LoRA-GA."""
    found = load("qlora")
    lines = ["| | settings tried | γ | best rate | Matthews correlation, by seed | loss |", "|---|---|---|---|---|---|"]
    for method, best in found["best"].items():
        tried = sum(cell["method"] == method and cell["seed"] == 0 for cell in found["cells"])
        gamma = "–" if best["gamma"] is None else f"{best['gamma']:g}"
        scores = ", ".join(f"{each['matthews']:.3f}" for each in best["validation"])
        losses = ", ".join(f"{each['loss']:.3f}" for each in best["validation"])
        lines.append(f"| {method} | {tried} | {gamma} | {best['rate']:g} | {scores} | {losses} |")
    return "\n".join(lines)


def why() -> str:
    """Markdown: what methods do in their first steps."""
    found = load("why")["methods"]
    steps = list(found["full"])
    figures = {
        "cosine with full": "cosine of ΔW with full fine-tuning's",
        "cosine with -G": "cosine of ΔW with −G",
        "size": "‖ΔW‖ ÷ ‖W‖",
        "A where it began": "share of ‖A‖² in the rows' span at the start",
        "A moved": "‖A − A₀‖ ÷ ‖A₀‖",
    }
    lines = ["| after steps | " + " | ".join(steps) + " |", "|---" * (len(steps) + 1) + "|"]
    for figure, title in figures.items():
        for method, rows in found.items():
            if figure in rows[steps[0]] and (figure, method) != ("cosine with full", "full"):
                lines.append(
                    f"| {title}: {method} | " + " | ".join(f"{rows[step][figure]:.2g}" for step in steps) + " |"
                )
    return "\n".join(lines)


def overview(name: str) -> str:
    """Markdown: a suite's methods on its tasks, each at its own best rate."""
    suite, found = load_suite(name), found_in(name)
    tasks = [task for task in suite.tasks if any(each.runs for each in found if each.task == task)]
    return "\n".join(markdown_lines(overview_table(suite, tasks, found)))


def variants(name: str, task: str) -> str:
    """Markdown: what has run of a suite's variants on one task, beside LoRA."""
    suite = load_suite(name)
    found = [each for each in found_in(name) if each.task == task and not each.missing]
    plain = next(each for each in found if each.label == plain_lora(suite))
    return "\n".join(markdown_lines(method_table(suite, found, plain)))


def choosers(name: str) -> str:
    """Markdown: what seed 0 came to at the rate that the tuning rows' loss chooses, and at their metric's choice."""
    suite, found = load_suite(name), found_in(name)
    tasks = [task for task in suite.tasks if any(each.runs for each in found if each.task == task)]
    looks = [(task, chooser) for task in tasks for chooser in ("loss", suite.tasks[task].metric)]
    by_line = {(each.task, each.label): each for each in found if not each.missing}
    lines = ["| | " + " | ".join(f"{task}, rate by {chooser}" for task, chooser in looks) + " |"]
    lines.append("|---" * (len(looks) + 1) + "|")
    for label in suite.methods:
        cells = [chosen(by_line.get((task, label)), suite.tasks[task].metric, by) for task, by in looks]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chosen(result: Result | None, metric: str, chooser: str) -> str:
    """The reported metric of seed 0 at the rate that `chooser` prefers on the tuning rows, and the rate."""
    tried = {} if result is None else {rate: (score(run, chooser), run) for rate, run in result.search.items()}
    good = {rate: (own, run["metrics"]["report"][metric]) for rate, (own, run) in tried.items() if own is not None}
    if not good:
        return "–"
    best = max(good, key=lambda rate: good[rate][0])
    return f"{good[best][1]:.3f} ({best:g})"


def found_in(name: str) -> list[Result]:
    """A suite's results from the published records."""
    return results(load_suite(name), Store(ROOT / "recipes" / "results" / "store").records())


# Page → its tables, in their order there.
PAGES: Mapping[str, tuple[Callable[[], str], ...]] = {
    "README.md": (first_step, outcome),
    "docs/guide.md": (quantised, qlora),
    "docs/cost.md": (cost, update, early),
    "docs/evidence.md": (
        functools.partial(overview, "stories-shakespeare"),
        functools.partial(variants, "stories-shakespeare", "babyllama105"),
        functools.partial(overview, "glue-minilm"),
        functools.partial(choosers, "glue-minilm"),
        functools.partial(variants, "glue-minilm", "mrpc"),
        functools.partial(variants, "ablation", "babyllama105"),
        why,
    ),
    "docs/scale.md": tuple(
        functools.partial(each, load) for each in (scale_tables.exchanged, scale_tables.found, scale_tables.larger)
    ),
}


def written(page: str, text: str) -> str:
    """The text of a page with its tables between their markers."""
    drawn = iter([each() for each in PAGES[page]])
    return MARKERS.sub(lambda match: match[1] + next(drawn) + match[2], text)


if __name__ == "__main__":
    for page, tables in PAGES.items():
        print(page, *(each() for each in tables), sep="\n\n")
        if "--write" in sys.argv:
            file = ROOT / page
            file.write_text(written(page, file.read_text()))
