"""Made-up records of runs, in the format that `lora-ga train` writes."""

import copy
from pathlib import Path
from typing import Any

from lora_ga.experiments.records.runs import Run, load_run, write_json_atomically

RECORD: dict[str, Any] = {
    "schema": 1,
    **{"name": "lora", "method": "lora", "task": "seq-cls", "model": "mini", "dataset": "texts.jsonl", "seed": 0},
    **{"learning_rate": 1e-3, "rank": 8, "alpha": 16.0, "steps": 40, "trainable_parameters": 12345},
    "config": {
        "method": "lora",
        "learning_rate": 1e-3,
        "seed": 0,
        "output_dir": "somewhere",
        "nested": {"gamma": 16.0},
    },
    "versions": {"lora_ga": "0.1.0", "torch": "2.13.0"},
    **{"device": "cpu", "commit": None},
    "curve": [{"step": step, "loss": 4.0 - step / 20, "learning_rate": 1e-3} for step in range(1, 41)],
    "eval": [{"step": 20, "eval_loss": 3.0, "eval_accuracy": 0.5, "eval_runtime": 9.0}],
    "metrics": {"eval_loss": 2.5, "eval_accuracy": 0.75, "train_loss": 3.0, "eval_runtime": 9.0},
    "seconds": {"train": 60.0, "total": 61.0},
}


def write_run(folder: Path, **changes: Any) -> Path:
    """Writes the record with these changes into a new folder; returns the folder."""
    record = copy.deepcopy(RECORD)
    record["config"] |= {key: changes[key] for key in ("seed", "learning_rate", "method") if key in changes}
    folder.mkdir(parents=True)
    write_json_atomically(folder / "run.json", record | changes)
    return folder


def make_run(folder: Path, **changes: Any) -> Run:
    """Writes the record with these changes and loads it as a run."""
    return load_run(write_run(folder, **changes))


def falling_losses(speed: float, steps: int = 40) -> list[dict[str, float]]:
    """A curve of losses that fall linearly from 4, by `speed` in 20 steps."""
    return [{"step": step, "loss": 4.0 - speed * step / 20} for step in range(1, steps + 1)]
