"""The record of a finished run of `lora-ga train`: `run.json` in the run's folder, checked when it is read."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ga.files import parse_json, write_atomically

SCHEMA = 1
RECORD = "run.json"
Curve = tuple[tuple[int, float], ...]  # (optimizer step, value), in ascending order of steps

# Values that do not describe the model: times, counts, and train_loss, which is a mean over the whole run.
NOT_A_RESULT = re.compile(r"_runtime$|_per_second$|_flos$|^epoch$|_time$|^train_|^step$")


@dataclass(frozen=True)
class Run:
    """The content of a `run.json`. A loss or metric that was not finite is NaN.

    Attributes:
        folder: The folder of the run, its `--output_dir`.
        name: Name of the run.
        method: Name of the method.
        task: Name of the task.
        model: The base model.
        dataset: The training data.
        seed: The seed.
        learning_rate: The learning rate.
        rank: Rank of the adapter; None without an adapter.
        alpha: LoRA's α; None without an adapter.
        steps: Optimiser steps.
        trainable_parameters: Number of trained parameters.
        config: All options of the run.
        versions: Package → version.
        device: The device on which it ran.
        commit: Commit of the code; None if unknown.
        curve: The training loss as logged.
        evals: Metric → its values at the evaluations during training.
        metrics: Metric → its value after training.
        seconds: Seconds of "estimate", "train" and "total", as far as the run has them.
    """

    folder: Path
    name: str
    method: str
    task: str
    model: str
    dataset: str
    seed: int
    learning_rate: float
    rank: int | None
    alpha: float | None
    steps: int
    trainable_parameters: int
    config: dict[str, Any]
    versions: dict[str, str]
    device: str
    commit: str | None
    curve: Curve
    evals: dict[str, Curve]
    metrics: dict[str, float]
    seconds: dict[str, float]


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "method", "task", "model", "dataset", "device"), (str,)),
    **dict.fromkeys(("seed", "steps", "trainable_parameters"), (int,)),
    "learning_rate": (int, float),
    "rank": (int, type(None)),
    "alpha": (int, float, type(None)),
    "commit": (str, type(None)),
    **dict.fromkeys(("config", "versions", "metrics", "seconds"), (dict,)),
    **dict.fromkeys(("curve", "eval"), (list,)),
}

_POINTS: dict[str, dict[str, tuple[type, ...]]] = {
    "curve": {"step": (int,), "loss": (int, float, type(None))},
    "eval": {"step": (int,)},
}


def write_json_atomically(path: Path, obj: object) -> None:
    """Writes JSON; a number that is not finite becomes null. If JSON cannot hold the object, the file is untouched."""
    text = json.dumps(_finite(obj), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def _finite(obj: object) -> object:
    """The same object, with None for every float that JSON cannot represent."""
    if isinstance(obj, dict):
        return {key: _finite(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_finite(value) for value in obj]
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj


def load_run(folder: Path) -> Run:
    """Reads the record of a finished run.

    Args:
        folder: The `--output_dir` of the run.

    Returns:
        The record; every field has its declared type.

    Raises:
        FileNotFoundError: The folder does not exist, or has no record because the run has not finished.
        ValueError: The folder is a file; the record is not JSON or has another schema; or a field is missing or wrong.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: this folder does not exist. Give the --output_dir of a finished run.")
    if not folder.is_dir():
        raise ValueError(f"{folder}: this is a file. Give the folder of a finished run, the one that holds {RECORD}.")
    path = folder / RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: unfinished run, or none: there is no {RECORD} in it (it is written when training ends). "
            f"Wait until the run ends, resume it (`lora-ga train --resume --output_dir {folder}`), or leave it out."
        )
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also UnicodeDecodeError
        raise ValueError(f"{path}: damaged, it is not JSON ({error}). Train again, or leave out this run.") from error
    _check(path, record)
    evals: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for point in sorted(record["eval"], key=lambda point: point["step"]):
        for metric, value in _results(point).items():
            evals[metric].append((point["step"], value))
    fields = {key: record[key] for key in _KINDS if key not in {"curve", "eval", "metrics", "seconds"}}
    return Run(
        folder=folder,
        curve=tuple((p["step"], _number(p["loss"])) for p in sorted(record["curve"], key=lambda p: p["step"])),
        evals={metric: tuple(points) for metric, points in sorted(evals.items(), key=_loss_first)},
        metrics=_results(record["metrics"]),
        seconds={part: float(value) for part, value in record["seconds"].items() if isinstance(value, int | float)},
        **fields,
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _loss_first(item: tuple[str, object]) -> tuple[bool, str]:
    return item[0] != "eval_loss", item[0]


def _results(values: dict[str, Any]) -> dict[str, float]:
    """The values that describe the model. Null, which stands for a value that was not finite, becomes NaN."""
    return {
        key: _number(value)
        for key, value in values.items()
        if isinstance(value, int | float | None) and not NOT_A_RESULT.search(key)
    }


def _check(path: Path, record: object) -> None:
    """Checks that a record has what a `Run` needs.

    Args:
        path: Where the record was read.
        record: The parsed JSON; a missing "commit" or "eval" is filled in.

    Raises:
        ValueError: A field is missing or has the wrong type.
    """
    if not isinstance(record, dict) or "schema" not in record:
        raise ValueError(f'{path}: not the record of a run, it has no "schema". Give a folder made by `lora-ga train`.')
    if record["schema"] != SCHEMA:
        raise ValueError(
            f"{path}: schema {record['schema']!r}, but this version of lora-ga reads schema {SCHEMA}. "
            "Read it with the version that wrote it, or train again."
        )
    record.setdefault("commit", None)
    record.setdefault("eval", [])
    for key, kinds in _KINDS.items():
        found = type(record[key]).__name__ if key in record else "nothing"
        if key not in record or not isinstance(record[key], kinds):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f'{path}: "{key}" should be {wanted}, but there is {found}. The record is damaged.')
    for key, needed in _POINTS.items():
        for number, point in enumerate(record[key]):
            if not isinstance(point, dict) or not all(
                isinstance(point.get(name, ""), kinds) for name, kinds in needed.items()
            ):
                raise ValueError(
                    f'{path}: entry {number} of "{key}" should have {" and ".join(needed)} as numbers, but it is '
                    f"{point!r}. The record is damaged."
                )
