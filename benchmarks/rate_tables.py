"""The tables of learning rates that no sweep chose: SmolLM2's first runs, and what `find_rate` finds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lora_ga.experiments.tables.table import BLANK
from published import load, rate_text

# Tasks on which the rule of find_rate was set, on which one of its constants was, and on which it was judged.
RATES = {
    "mean, tasks used to set the constants": ("stories260k", "babyllama105", "sst2"),
    "mean, QNLI, used to set the least agreement": ("qnli",),
    "mean, tasks used only to judge": ("cola", "mrpc", "mnli"),
}
USUAL = "0.0002"
FOUND = "found"
# Name in the README → label. The last part of LoRA-GA's is only for the time: its start is the same work.
SMOLLM2 = {
    "LoRA-GA": "lora-ga reach=0.35",
    "LoRA-GA, γ = 16": "lora-ga γ=16",
    "PiSSA": "pissa",
    "rsLoRA": "rslora",
    "plain LoRA": "lora",
}
Run = Mapping[str, Any]


def smollm2_table() -> str:
    """The loss of SmolLM2 on held-out answers after short runs at several rates, in Markdown; the lowest in bold."""
    runs = load("smollm2")["runs"]["0"]
    rates = sorted(set(runs) - {FOUND}, key=float)
    lines = ["| loss | " + " | ".join(f"at {rate}" for rate in rates) + " |", "|---" * (1 + len(rates)) + "|"]
    for method in max(runs.values(), key=len):  # some rates were tried for a few methods
        losses = [smollm2_loss(runs[rate].get(method)) for rate in rates]
        lowest = min((loss for loss in losses if loss != BLANK), key=float)
        lines.append(f"| {method} | {' | '.join(f'**{each}**' if each == lowest else each for each in losses)} |")
    return "\n".join(lines)


def smollm2_found_table() -> str:
    """The runs of SmolLM2 at the rate that `find_rate` finds, beside the best of the rates tried and 2e-4."""
    head = (
        "",
        "rate found",
        "rates tried",
        "loss at the rate found",
        "at the best of those tried",
        "at 0.0002",
        "regret, tuning split",
        "steps of the search",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for seed, runs in load("smollm2")["runs"].items():
        for method, run in runs[FOUND].items():
            tried, search = smollm2_tried(runs, method), run["search"]
            best = tried[smollm2_best(tried)]
            cells = [f"{method}, seed {seed}", f"{search['rate']:g}", str(len(tried)), *map(smollm2_loss, (run, best))]
            cells += [smollm2_loss(tried[USUAL]), f"{tuning_loss(run) - tuning_loss(best):+.4f}"]
            lines.append(f"| {' | '.join(cells)} | {sum(group['passes'] for group in search['groups'])} |")
    return "\n".join(lines)


def smollm2_summary() -> str:
    """SmolLM2's loss at 2e-4, at the best of the rates tried and at the rate of `find_rate`, and the start's time."""
    every = load("smollm2")["runs"]
    runs, columns = every["0"], []
    for method in SMOLLM2.values():
        tried, found = smollm2_tried(runs, method), runs[FOUND].get(method)
        best = smollm2_best(tried)
        cells = [(smollm2_loss(tried[USUAL]), ""), (smollm2_loss(tried[best]), rate_text(float(best)))]
        columns.append([*cells, (smollm2_loss(found), "" if found is None else rate_text(found["search"]["rate"]))])
    lowest = [min((cell[0] for cell in column if cell[0] != BLANK), key=float) for column in zip(*columns, strict=True)]
    heads = ("at 2e-4", "at the best rate of a sweep", "at the rate of `find_rate`", "time of the start ÷ 40 steps")
    lines = [f"| loss ↓ | {' | '.join(heads)} |", "|---" * 5 + "|"]
    for (name, method), row in zip(SMOLLM2.items(), columns, strict=True):
        shown = [f"**{loss}**" if loss == best else loss for (loss, _), best in zip(row, lowest, strict=True)]
        rates = [f" ({rate})" if rate else "" for _, rate in row]
        row_cells = [*map("".join, zip(shown, rates, strict=True)), smollm2_start(every, method)]
        lines.append(f"| {name} | {' | '.join(row_cells)} |")
    return "\n".join(lines)


def smollm2_tried(runs: Mapping[str, Any], method: str) -> dict[str, Run]:
    """Rate → the run of a method, for the rates of its sweep."""
    return {rate: runs[rate][method] for rate in runs if rate != FOUND and method in runs[rate]}


def smollm2_best(tried: Mapping[str, Run]) -> str:
    """The rate with the lowest loss on the tuning split. The reported split chooses nothing."""
    return min(tried, key=lambda rate: tuning_loss(tried[rate]))


def tuning_loss(run: Run) -> float:
    """The loss of a run on the tuning split; infinite if it diverged, and so has no metrics."""
    return float(run["metrics"]["tune"]["loss"]) if "metrics" in run else math.inf


def smollm2_loss(run: Run | None) -> str:
    """The loss of a run of SmolLM2 on the rows that are reported; BLANK without one."""
    return BLANK if run is None or "metrics" not in run else f"{run['metrics']['report']['loss']:.3f}"


def smollm2_start(every: Mapping[str, Any], method: str) -> str:
    """The time of the start over that of the training, over all runs and both scalings: the median, and the range."""
    labels = (method, f"{method} α/r")  # the scaling changes nothing in the work of the start
    found = [row[label] for runs in every.values() for row in runs.values() for label in labels if label in row]
    shares = [run["seconds"]["start"] / run["seconds"]["train"] for run in found]
    low, middle, high = (f"{each:.2f}" for each in (min(shares), statistics.median(shares), max(shares)))
    return middle if low == high else f"{middle} ({low} to {high})"


def found_rates_table() -> str:
    """The rates that `find_rate` finds, and one full run at each, against the sweeps, in Markdown."""
    heads = (
        "task | method | found | best of the sweep | regret, run at the found rate | regret, nearest rate | "
        "regret, between rates | spread over seeds | cost ÷ run"
    )
    keys, found = ("regret", "nearest", "between"), load("rates")
    lines = [f"| {heads} |", "|---" * 9 + "|"]
    for name, row in found["found"].items():
        task, _, method = name.partition("/")
        cells = [f"{row[key]:.4f}" if key in row else "not run" for key in keys]
        cells += [f"{found['spread'][name]:.4f}" if name in found["spread"] else BLANK, f"{row['cost']:.3f}"]
        lines.append(f"| {task} | {method} | {row['rate']:.2g} | {row['swept best']:g} | {' | '.join(cells)} |")
    for title, tasks in RATES.items():
        rows = {name: row for name, row in found["found"].items() if name.partition("/")[0] in tasks}
        cells = [mean_and_most([row[key] for row in rows.values() if key in row], len(rows)) for key in keys]
        pooled = math.sqrt(statistics.fmean(found["spread"][name] ** 2 for name in rows if name in found["spread"]))
        most = max(row["cost"] for row in rows.values())
        lines.append(f"| **{title}** | all | | | {' | '.join(cells)} | {pooled:.4f} | {most:.3f} |")
    return "\n".join(lines)


def mean_and_most(regrets: Sequence[float], of: int) -> str:
    """The mean of regrets and the largest, and how many there are if some of all are missing."""
    if not regrets:
        return BLANK
    count = "" if len(regrets) == of else f" ({len(regrets)} of {of})"
    return f"{statistics.fmean(regrets):.4f}, at most {max(regrets):.4f}{count}"


def unswept_table() -> str:
    """LoRA-GA at the rate that was found, beside LoRA at the rate that people use, in Markdown."""
    lines = ["| loss | LoRA-GA, found rate | LoRA at 2e-4 | LoRA, best of its sweep |", "|---|---|---|---|"]
    for task, row in load("rates")["unswept"].items():
        lines.append(f"| {task} | {row['lora-ga']:.3f} | {row['lora']:.3f} | {row['lora, best']:.3f} |")
    return "\n".join(lines)


def leaders_table() -> str:
    """How good the rate is at the end that leads after a share of the steps, over the sweeps of the store."""
    heads = "after | lines | it is the best at the end | regret, mean | regret, most | steps of all rates ÷ run"
    lines = [f"| {heads} |", "|---" * 6 + "|"]
    for share, row in load("rates")["leaders"].items():
        cells = [f"{float(share):.0%} of the steps", str(row["lines"]), str(row["right"])]
        cells += [f"{row['mean']:.3f}", f"{row['largest']:.3f}", f"{row['cost']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
