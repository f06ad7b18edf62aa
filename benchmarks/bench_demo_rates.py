"""Which learning rate is best for each method of the demonstration? A sweep on held-out training rows.

    python benchmarks/bench_demo_rates.py

The packaged MiniLM classifies docstrings (see examples/demo.py), with one seed. A fifth of the training rows is held
out for the choice; the test rows of the demonstration are not used. About 15 minutes on two cores.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from transformers import logging

import record

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import demo
from corpus import docstring_rows, write_jsonl

GRID: dict[str, list[dict[str, float]]] = {
    "lora-ga": [
        *({"stable_gamma": 16, "learning_rate": rate} for rate in (1e-4, 3e-4, 1e-3)),
        *({"stable_gamma": 256, "learning_rate": rate} for rate in (3e-4, 1e-3, 3e-3)),
    ],
    "lora": [{"learning_rate": rate} for rate in (3e-4, 1e-3, 2e-3, 3e-3)],
}


def main() -> None:
    """Train each cell once, print the table and write the record."""
    logging.set_verbosity_error()
    rows, _, _ = docstring_rows(limit_per_class=240, seed=0)
    cells = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        write_jsonl(data / "train.jsonl", rows[: len(rows) * 4 // 5])
        write_jsonl(data / "test.jsonl", rows[len(rows) * 4 // 5 :])
        for method, settings in GRID.items():
            for index, changes in enumerate(settings):
                run = Path(scratch) / f"{method}-{index}"
                demo.train(method, demo.minilm(), data, run, **changes, estimate_batches=32, save_steps=10**6)
                written = json.loads((run / "run.json").read_text())
                cells.append({"method": method, **changes, "metrics": written["metrics"]})
    print(f"{'method':8} {'rate':>7} {'gamma':>6} {'loss':>7} {'accuracy':>9}")
    for cell in cells:
        loss, accuracy = cell["metrics"]["eval_loss"], cell["metrics"]["eval_accuracy"]
        gamma = cell.get("stable_gamma", "–")
        print(f"{cell['method']:8} {cell['learning_rate']:7} {gamma:>6} {loss:7.4f} {accuracy:9.4f}")
    record.finish("demo_rates", {"held_out": "a fifth of the training rows", "cells": cells})


if __name__ == "__main__":
    main()
