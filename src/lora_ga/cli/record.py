"""The record of a finished run."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from lora_ga.cli.options import Job
from lora_ga.experiments.records.runs import NOT_A_RESULT, SCHEMA

PACKAGES = {"lora_ga": "lora-ga", "torch": "torch", "transformers": "transformers", "peft": "peft"}


def curve(history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The logged training losses. Each value is the mean over the steps since the entry before."""
    keys = ("step", "loss", "learning_rate")
    return [{key: entry[key] for key in keys} for entry in history if "loss" in entry]


def evaluations(history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The evaluations in order of steps, without timings. The last evaluation of a step counts."""
    by_step = {
        entry["step"]: {
            "step": entry["step"],
            **{key: value for key, value in entry.items() if key.startswith("eval_") and not NOT_A_RESULT.search(key)},
        }
        for entry in history
        if "eval_loss" in entry
    }
    return [by_step[step] for step in sorted(by_step)]


def mean_loss(points: Sequence[Mapping[str, float]]) -> float:
    """The mean training loss over all steps."""
    total, before = 0.0, 0.0
    for point in points:
        total += point["loss"] * (point["step"] - before)
        before = point["step"]
    return total / before


def device_name(device: torch.device) -> str:
    """The name of the device in records."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def run_record(
    job: Job,
    *,
    dataset: str,
    history: Sequence[Mapping[str, Any]],
    steps: int,
    trainable_parameters: int,
    device: torch.device,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Makes the record of a run, with everything that `lora-ga compare` needs.

    Args:
        job: The options.
        dataset: Where the training data came from.
        history: The trainer's log, with the part before an interruption.
        steps: Number of optimizer steps.
        trainable_parameters: Number of trained values.
        device: The device of the run.
        seconds: Durations of "estimate", "train" and "total".

    Returns:
        The record, as JSON values.
    """
    adapted = job.training.method != "full"
    points, evals = curve(history), evaluations(history)
    last = {key: value for key, value in evals[-1].items() if key != "step"} if evals else {}
    return {
        "schema": SCHEMA,
        "name": job.training.run_name or job.training.method,
        "method": job.training.method,
        "task": job.model.task,
        "model": job.model.model,
        "dataset": dataset,
        "seed": job.model.seed,
        "learning_rate": job.training.learning_rate,
        "rank": job.target.rank if adapted else None,
        "alpha": job.adapter.alpha if adapted else None,
        "steps": steps,
        "trainable_parameters": trainable_parameters,
        "config": job.options(),
        "versions": {name: version(package) for name, package in PACKAGES.items()},
        "device": device_name(device),
        "commit": None,
        "curve": points,
        "eval": evals,
        "metrics": {**last, "train_loss": mean_loss(points)},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
