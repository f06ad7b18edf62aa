"""How many runs of a suite does a device train in a minute: each in a process of its own, and several in a stack?

    python benchmarks/bench_grid.py                                   # six minutes on two cores
    python benchmarks/bench_grid.py --device cuda --task sst2 --runs 32 --workers 16 --stack 16
                                                                      # on a GPU; writes results/grid_cuda.json

The runs are LoRA and LoRA-GA on one task of the published suites, with several rates and seeds. They go through the
processes of `lora-ga reproduce`: once through `--workers` of them that train one run each, and once through `--stacks`
of them that train `--stack` runs each. Both begin with the libraries loaded, and their losses are compared.

What a small model gains on a GPU is bounded by the operations that the host starts. They are counted on any device, of
one training step of MiniLM: for each run, alone and in a stack of 16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

import record
from lora_ga.experiments.suites.cells import Cell, cell_of, stacks
from lora_ga.experiments.suites.grid import WorkerPool, commit
from lora_ga.experiments.suites.run import Place
from lora_ga.experiments.suites.run_stack import run_stack
from lora_ga.experiments.suites.sources import Sources
from lora_ga.experiments.suites.spec import load_suite

SUITES = {"stories260k": "stories-shakespeare", "babyllama105": "stories-shakespeare"}  # of other tasks: glue-minilm
COUNTED = "sst2"
METHODS, RATES = ("lora", "lora-ga reach=0.35"), (0.001, 0.000316)
Records = dict[str, dict[str, Any]]


def cells_of(task: str, runs: int) -> list[Cell]:
    """The first `runs` cells: for each seed every method at every rate."""
    suite = load_suite(SUITES.get(task, "glue-minilm"))
    return [
        cell_of(suite, task, label, rate, seed)
        for seed in range(-(-runs // (len(METHODS) * len(RATES))))
        for label in METHODS
        for rate in RATES
    ][:runs]


def timed(pieces: Sequence[Sequence[Cell]], workers: int, place: Place) -> tuple[float, Records]:
    """Runs every piece in a process of its own, `workers` at a time; returns the seconds and the records."""
    pool, left, found = WorkerPool(place.device), list(pieces), {}
    began = time.perf_counter()
    while left or len(pool):
        while left and len(pool) < workers:
            pool.start(left.pop(0), place)
        found |= {each["digest"]: each for each in pool.finished()}
    seconds = time.perf_counter() - began
    failed = [each["reason"] for each in found.values() if each["status"] != "done"]
    if failed:
        raise RuntimeError(f"{len(failed)} runs did not end well: {failed[0]}")
    return seconds, found


class Counter(TorchDispatchMode):
    """Counts the operations that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(runs: int, place: Place) -> float:
    """The operations of one training step of a stack of runs, divided by their number; with 1 the run is alone."""
    counts = []
    for steps in (2, 4):  # all else is the same
        cells = [replace(cell, settings=replace(cell.settings, steps=steps)) for cell in cells_of(COUNTED, runs)]
        with Counter() as counter:
            run_stack(cells, place)
        counts.append(counter.count)
    return (counts[1] - counts[0]) / 2 / runs


def main() -> None:
    """Measures both ways, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda")
    parser.add_argument("--task", default="stories260k", help="a task of stories-shakespeare or glue-minilm")
    parser.add_argument("--runs", type=int, default=8, help="the number of runs")
    parser.add_argument("--workers", type=int, default=2, help="processes that train one run each")
    parser.add_argument("--stack", type=int, default=4, help="runs of a stack")
    parser.add_argument("--stacks", type=int, default=2, help="processes that train one stack each")
    options = parser.parse_args()
    place, cells = Place(Sources.from_environment(), options.device, commit()), cells_of(options.task, options.runs)
    counted = {number: operations(number, Place(place.sources)) for number in (1, 16)}
    timed([[cells[0]]], 1, place)  # the first process also starts the server and reads the files
    alone, single = timed(stacks(cells, 1), options.workers, place)
    together, stacked = timed(stacks(cells, options.stack), options.stacks, place)
    apart = [
        abs(single[key]["metrics"]["tune"]["loss"] - each["metrics"]["tune"]["loss"]) for key, each in stacked.items()
    ]
    found = {
        **{name: getattr(options, name) for name in ("task", "runs", "workers", "stack", "stacks")},
        "runs a minute, one in a process": 60 * len(cells) / alone,
        "runs a minute, in stacks": 60 * len(cells) / together,
        "in stacks over one in a process": alone / together,
        "operations of a step for a run, alone": counted[1],
        "operations of a step for a run, in a stack of 16": counted[16],
        "largest difference of the tuning loss": max(apart),
    }
    where = {"device": next(iter(stacked.values()))["device"]} if options.device != "cpu" else {}
    record.finish("grid" if options.device == "cpu" else "grid_cuda", found | where)


if __name__ == "__main__":
    main()
