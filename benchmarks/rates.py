"""The learning rate that `find_rate` finds, against the sweeps in the store of runs.

    python benchmarks/rates.py stories260k babyllama105 sst2   the tasks on which the rule was set
    python benchmarks/rates.py cola mrpc mnli                  those on which it was judged
    python benchmarks/rates.py qnli                            judged first, and then used to set one constant
    python benchmarks/rates.py "mrpc/rslora"                   one method alone
    python benchmarks/rates.py                                 judges what is in the record anew

For each method the command searches a rate and makes one full run at it, with the code and the seed of the sweep. What
the record holds is not measured again, so an interrupted command continues when it is repeated. `--again` searches
anew and makes a new run if another rate is found. The regret is the tuning loss of the run, less the lowest of the
sweep. It is below 0 where the run is better than all rates of the sweep, which are half a decade apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import record
from lora_ga import find_rate
from lora_ga.adapter.rate import Group, Search
from lora_ga.cli.rate import RateOptions, rate_of_lora_ga
from lora_ga.experiments.methods import load_method
from lora_ga.experiments.records.store import Store
from lora_ga.experiments.suites.cells import Cell, cell_of, rate_at
from lora_ga.experiments.suites.grid import commit
from lora_ga.experiments.suites.run import Place, build_inputs, run_cell
from lora_ga.experiments.suites.sources import Sources
from lora_ga.experiments.suites.spec import load_suite
from lora_ga.experiments.suites.training import keep_in_float32, parameter_groups
from lora_ga.experiments.tasks import prepare

SUITES = {"stories260k": "stories-shakespeare", "babyllama105": "stories-shakespeare"}  # of other tasks: glue-minilm
SET_ON = ("stories260k", "babyllama105", "sst2")
METHODS: Sequence[str] = ("lora", "lora-ga reach=0.35", "rslora")
USUAL = 2e-4  # what people run LoRA at
# Label of a LoRA-GA variant in the suites → the options of `lora-ga rate`; task → width of its model (MiniLM: 384).
VARIANTS: Mapping[str, dict[str, Any]] = {
    "lora-ga reach=0.35": {},
    **{f"lora-ga γ={gamma}": {"stable_gamma": float(gamma)} for gamma in (16, 256, 1024, 4096)},
}
WIDTHS = {"stories260k": 64, "babyllama105": 128}
STORE = Path(__file__).parent.parent / "recipes" / "results" / "store"
Runs = Mapping[float, Mapping[str, Any]]


def lines() -> dict[tuple[str, str], Runs]:
    """(Task, method) → learning rate → record, of the runs of seed 0 that finished, for at least three rates.

    All rates are half a decade apart. The points between are left out: only some lines have them.
    """
    found: dict[tuple[str, str], dict[float, Mapping[str, Any]]] = {}
    for run in Store(STORE).records().values():
        on_grid = run["learning_rate"] == rate_at(round(2 * math.log10(run["learning_rate"])))
        if run["seed"] == 0 and run["status"] == "done" and on_grid and run["suite"] != "steps":  # other optimizers
            label = run["label"] if run["suite"] != "ablation" else f"{run['label']} (ablation)"
            found.setdefault((run["task"], label), {})[run["learning_rate"]] = run
    return {line: runs for line, runs in sorted(found.items()) if len(runs) >= 3}


def loss(run: Mapping[str, Any]) -> float:
    """The loss of a run on the tuning split; infinite if it diverged, and so has no metrics."""
    return float(run["metrics"]["tune"]["loss"]) if "metrics" in run else math.inf


def line_of(name: str) -> tuple[str, str]:
    """Task and method of a name in the record."""
    task, _, method = name.partition("/")
    return task, method


def spreads(names: Iterable[str], swept: Mapping[tuple[str, str], Runs]) -> dict[str, float]:
    """Line → the standard deviation of the tuning loss over the seeds, at the best rate of the sweep."""
    losses: dict[tuple[str, str], list[float]] = {}
    best = {line: min(runs, key=lambda rate: loss(runs[rate])) for line, runs in swept.items()}
    for run in Store(STORE).records().values():
        line = (run["task"], run["label"])
        if run["suite"] != "ablation" and run["status"] == "done" and best.get(line) == run["learning_rate"]:
            losses.setdefault(line, []).append(loss(run))
    found = {name: losses[line_of(name)] for name in names}
    return {name: statistics.stdev(each) for name, each in found.items() if len(each) > 1}


def regret(runs: Runs, rate: float) -> float:
    """The loss at the swept rate nearest to `rate`, less the lowest of all swept rates."""
    nearest = min(runs, key=lambda each: abs(math.log(each / rate)))
    return loss(runs[nearest]) - min(map(loss, runs.values()))


def loss_between(runs: Runs, rate: float) -> float:
    """The loss at a rate by a line through the losses of the swept rates on both sides, over the logarithm of the rate.

    The loss is convex there, or nearly so, and the line above it. Beyond the sweep the loss is that of its last rate.
    """
    rates = sorted(runs)
    logs = [math.log(each) for each in rates]
    return float(np.interp(math.log(rate), logs, [loss(runs[each]) for each in rates]))


def leader(runs: Runs, share: float) -> float:
    """The rate whose training loss is the lowest after a share of the steps, over the last half of them."""

    def early(run: Mapping[str, Any]) -> float:
        steps = round(share * run["settings"]["steps"])
        part = run["curves"]["training"][steps // 2 : steps]
        return statistics.fmean(part) if len(run["curves"]["training"]) >= steps else math.inf

    return min(runs, key=lambda rate: early(runs[rate]))


def leaders(swept: Mapping[tuple[str, str], Runs]) -> dict[str, dict[str, float]]:
    """Share of the steps → how good the leader at that share is at the end, over all lines, and what it costs."""
    table = {}
    for share in (0.03, 0.05, 0.1, 0.2):
        regrets = [regret(runs, leader(runs, share)) for runs in swept.values()]
        table[f"{share:g}"] = {
            "lines": len(regrets),
            "right": sum(each == 0 for each in regrets),
            "mean": statistics.fmean(regrets),
            "largest": max(regrets),
            "cost": statistics.fmean(len(runs) * share for runs in swept.values()),
        }
    return table


def found_loss(row: Mapping[str, Any], runs: Runs) -> float:
    """The loss of the run at the rate that was found, or, where it was not made, of a line between swept rates."""
    return loss(row["run"]) if "run" in row else loss_between(runs, row["rate"])


def unswept(found: Mapping[str, Any], swept: Mapping[tuple[str, str], Runs]) -> dict[str, dict[str, float]]:
    """Task → the loss of LoRA-GA at the rate that was found, and of LoRA at 2e-4.

    A line between swept rates stands for runs that were not made. Where the sweep of LoRA begins above 2e-4, the loss
    is that of its lowest rate, which favours LoRA.
    """
    return {
        task: {
            "lora-ga": found_loss(found[f"{task}/{METHODS[1]}"], swept[task, METHODS[1]]),
            "lora": loss_between(swept[task, "lora"], USUAL),
            "lora, best": min(map(loss, swept[task, "lora"].values())),
        }
        for task in dict.fromkeys(name.partition("/")[0] for name in found)
        if f"{task}/{METHODS[1]}" in found
    }


def calculated(swept: Mapping[tuple[str, str], Runs]) -> dict[str, dict[str, float]]:
    """Line → the rate that `lora-ga rate` gives from LoRA's swept best, and the line's own swept best."""
    rates = {}
    for (task, label), runs in swept.items():
        changes = VARIANTS.get(label)
        if changes is not None:
            lora = min(swept[task, "lora"], key=lambda rate: loss(swept[task, "lora"][rate]))
            width = WIDTHS.get(task, 384) if changes else None  # it counts only with gamma
            options = RateOptions(learning_rate=lora, width=width, **changes)
            best = min(runs, key=lambda rate: loss(runs[rate]))
            rates[f"{task}/{label}"] = {"calculated": rate_of_lora_ga(options), "swept best": best}
    return rates


def search(cell: Cell) -> dict[str, Any]:
    """Searches the rate for the run of a cell, with its data, method and length, and the head's own rate.

    Args:
        cell: The cell; its rate is not used.

    Returns:
        What was measured.
    """
    prepared, method = prepare(cell, Sources.from_environment()), load_method(cell.method)
    inputs = build_inputs(cell, prepared)
    torch.manual_seed(cell.seed)
    model = method.build(inputs)
    keep_in_float32(model)

    def optimizer(rate: float) -> torch.optim.Optimizer:
        changed = dataclasses.replace(inputs, rate=rate)
        return method.optimizer(parameter_groups(method, model, changed, cell.settings.head_rate), changed)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rate.json"
        find_rate(model, prepared.train_batches, cell.settings.steps, optimizer=optimizer, checkpoint=file)
        measured = json.loads(file.read_text())
    groups = [{name: group[name] for name in ("agreement", "stable", "passes")} for group in measured["groups"]]
    return {"groups": groups, "steps": cell.settings.steps}


def full_run(cell: Cell) -> dict[str, Any]:
    """Runs a cell as a suite does.

    Returns:
        The parts of its record that the regret rests on.

    Raises:
        RuntimeError: The run failed.
    """
    run = run_cell(cell, Place(Sources.from_environment(), commit=commit()))
    if run["status"] == "failed":
        raise RuntimeError(f"{cell.title()}: {run['reason']}")
    kept = ("learning_rate", "status", "metrics", "seconds", "device", "commit", "versions", "date")
    return {key: run[key] for key in kept if key in run}


def rate_of(measured: Mapping[str, Any]) -> float:
    """The rate that the rule gives for what a search has measured."""
    groups = [Group("", **group) for group in measured["groups"]]
    for group in groups:
        group.stable = {float(rate): bool(stable) for rate, stable in group.stable.items()}
    return Search(groups, len(groups)).rate(measured["steps"])


def cost_of(measured: Mapping[str, Any]) -> float:
    """The steps of a search, over those of the run that it was made for."""
    return float(sum(group["passes"] for group in measured["groups"]) / measured["steps"])


def judged(measured: Mapping[str, Any], runs: Runs) -> dict[str, Any]:
    """The rate that the rule gives for what was measured, its cost, and its regrets against a sweep.

    Returns:
        With the measurements; a run at another rate is left out.
    """
    rate = rate_of(measured)
    best = min(runs, key=lambda each: loss(runs[each]))
    row = {key: measured[key] for key in ("groups", "steps")} | {
        "rate": rate,
        "cost": cost_of(measured),
        "nearest": regret(runs, rate),
        "between": loss_between(runs, rate) - loss(runs[best]),
        "swept best": best,
    }
    run = measured.get("run")
    if run is not None and run["learning_rate"] == rate:
        row |= {"run": run, "regret": loss(run) - loss(runs[best])}
    return row


def chosen(names: Sequence[str], swept: Mapping[tuple[str, str], Runs]) -> list[tuple[str, str]]:
    """The lines (task, method) that the names of the command stand for, in their order.

    Raises:
        ValueError: A name stands for none.
    """
    known = sorted((line for line in swept if line[1] in METHODS), key=lambda line: METHODS.index(line[1]))
    lines_of = {name: [line for line in known if name in (line[0], "/".join(line))] for name in names}
    if strange := [name for name, found in lines_of.items() if not found]:
        raise ValueError(
            f"{', '.join(strange)}: names no sweep of the store. There are {', '.join(map('/'.join, known))}."
        )
    return [line for found in lines_of.values() for line in found]


def write(found: Mapping[str, Any], swept: Mapping[tuple[str, str], Runs]) -> None:
    """Writes the record."""
    others = {"spread": spreads(found, swept), "unswept": unswept(found, swept), "calculated": calculated(swept)}
    record.finish("rates", {"leaders": leaders(swept), "found": found, **others})


def main() -> None:
    """Searches and runs for each method on the tasks that are named; writes the record after each step.

    Raises:
        ValueError: A name is neither that of a task with sweeps nor that of a line.
    """
    parser = argparse.ArgumentParser(description="Measures find_rate against the sweeps of the store.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a task, or task/method")
    parser.add_argument("--again", action="store_true", help="search anew what is in the record")
    options = parser.parse_args()
    logging.getLogger("lora_ga").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    file, swept = record.RESULTS / "rates.json", lines()
    found: dict[str, Any] = json.loads(file.read_text())["found"] if file.exists() else {}
    found = {name: judged(row, swept[line_of(name)]) for name, row in found.items()}
    for task, method in chosen(options.names, swept):
        suite, name = load_suite(SUITES.get(task, "glue-minilm")), f"{task}/{method}"
        if options.again or name not in found:
            measured = found.get(name, {}) | search(cell_of(suite, task, method, 1.0, 0))
            found[name] = judged(measured, swept[task, method])
            write(found, swept)
        if "run" not in found[name]:
            run = full_run(cell_of(suite, task, method, found[name]["rate"], 0))
            found[name] = judged(found[name] | {"run": run}, swept[task, method])
            write(found, swept)
    write(found, swept)


if __name__ == "__main__":
    main()
