"""Runs one cell and returns its record."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import logging
import math
import platform
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_ga.experiments.methods import complete, load_method
from lora_ga.experiments.methods.base import BuildInputs
from lora_ga.experiments.suites import trained
from lora_ga.experiments.suites.cells import Cell
from lora_ga.experiments.suites.sources import Sources
from lora_ga.experiments.suites.training import (
    Curves,
    DivergedError,
    autocast,
    keep_in_float32,
    measured,
    to_device,
    train,
)
from lora_ga.experiments.tasks import prepare
from lora_ga.experiments.tasks.prepared import PreparedTask
from lora_ga.gradients.progress import LOGGER

PACKAGES = ("lora-ga", "torch", "transformers", "peft")
ORIGIN = ("commit", "versions", "python", "device", "date")  # what a record says about the run that made it


@dataclass(frozen=True)
class Place:
    """Where cells are run.

    Attributes:
        sources: Resolves the references to models and files.
        device: A torch device.
        commit: The commit of the code, for the record.
        unjudged: Folder for trained models that have not been evaluated yet; None: they are not saved.
    """

    sources: Sources
    device: str = "cpu"
    commit: str | None = None
    unjudged: str | None = None

    def unjudged_folder(self, cell: Cell) -> Path | None:
        """Where the trained model of a cell is saved until it has been evaluated."""
        return None if self.unjudged is None else Path(self.unjudged) / cell.digest()


def device_name(device: str) -> str:
    """The name of the device, for the record."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    return f"{device}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def peak_memory(device: str) -> float:
    """The peak memory in MiB: of the GPU, or of this process."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the library's messages in the block: a suite says one line for each cell."""
    level = LOGGER.level
    LOGGER.setLevel(logging.WARNING)
    try:
        yield
    finally:
        LOGGER.setLevel(level)


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Runs a cell. An error inside does not raise; it is put into the record.

    Args:
        cell: The cell.
        place: The device and the sources.

    Returns:
        The record; its status is "done", "diverged" or "failed".
    """
    began, curves = time.perf_counter(), Curves()
    record = about(cell, place)
    try:
        with _quiet():
            found = result(cell, place, curves, began)
    except DivergedError as error:
        found = {"status": "diverged", "reason": str(error)}
    except Exception as error:  # the other cells go on
        lines = traceback.format_exception(error)
        found = {"status": "failed", "reason": f"{type(error).__name__}: {error}", "traceback": "".join(lines)[-4000:]}
    training = [loss if math.isfinite(loss) else None for loss in curves.training]
    record |= found | {"curves": {"training": training, "report": curves.report}}
    record["peak_memory_mib"] = max(record.get("peak_memory_mib", 0.0), peak_memory(place.device))
    seconds = record.get("seconds", {})  # with a total already if another run trained the model
    record["seconds"] = seconds | {"total": round(seconds.get("total", 0.0) + time.perf_counter() - began, 3)}
    return record


def build_inputs(cell: Cell, prepared: PreparedTask, device: str = "cpu") -> BuildInputs:
    """What the method of a cell needs to build its model."""
    settings = cell.settings
    return BuildInputs(
        base=prepared.base,
        batches=[to_device(device, batch) for batch in prepared.start_batches],
        targets=prepared.targets(),
        task_type=prepared.task_type,
        rank=settings.rank,
        alpha=settings.alpha,
        steps=settings.steps,
        rate=cell.learning_rate,
        seed=cell.seed,
        options=complete(cell.method, cell.options),
    )


def result(cell: Cell, place: Place, curves: Curves, began: float) -> dict[str, Any]:
    """Builds, trains, measures and evaluates; a model that is saved already is not trained again."""
    method, now = load_method(cell.method), about(cell, place)
    if place.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(place.device)
    prepared = prepare(cell, place.sources)
    prepared.base.to(place.device)
    inputs = build_inputs(cell, prepared, place.device)
    folder = None if prepared.evaluate is None else place.unjudged_folder(cell)
    saved = folder if folder is not None and trained.is_saved(folder) else None
    base = trained.fingerprints(prepared.base) if folder is not None and saved is None else {}
    torch.manual_seed(cell.seed)
    loaded = time.perf_counter()
    model = method.build(inputs)
    started = time.perf_counter()
    if saved is not None:
        keep_in_float32(model)
        found = trained.restore(saved, model) | {"judged": {name: now[name] for name in ORIGIN}}
        curves.training, curves.report = found["curves"]["training"], found["curves"]["report"]
    else:
        torch.manual_seed(cell.seed)  # the same dropout for all methods, whatever their initialisation has drawn
        train(prepared, method, model, inputs, cell.settings, place.device, curves)
        finished = time.perf_counter()
        found = _measured(prepared, model, place, curves)
        found["seconds"] = {
            "load": round(loaded - began, 3),
            "start": round(started - loaded, 3),
            "train": round(finished - started, 3),
            "evaluate": round(time.perf_counter() - finished, 3),
        }
        if folder is not None:
            trained.save(folder, model, base, _facts(cell, place, curves, found, began))
    if prepared.evaluate is not None:
        judging = time.perf_counter()
        model.eval()
        with autocast(model, place.device):
            found["metrics"]["report"] |= prepared.evaluate(model)
        found["seconds"]["evaluate"] = round(found["seconds"]["evaluate"] + time.perf_counter() - judging, 3)
    return found


def _measured(prepared: PreparedTask, model: Any, place: Place, curves: Curves) -> dict[str, Any]:
    """The part of the record that is known after the training, before the evaluation."""
    report = {name: value for name, value in curves.report[-1].items() if name != "step"}
    return {
        "status": "done",
        "metrics": {"tune": measured(prepared, model, "tune", place.device), "report": report},
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _facts(cell: Cell, place: Place, curves: Curves, found: dict[str, Any], began: float) -> dict[str, Any]:
    """What is saved with a trained model, for the record of a run that only evaluates it."""
    total = {"total": round(time.perf_counter() - began, 3)}
    return {
        **{name: value for name, value in about(cell, place).items() if name in ORIGIN},
        **found,
        "seconds": found["seconds"] | total,
        "curves": dataclasses.asdict(curves),
        "peak_memory_mib": peak_memory(place.device),
    }


def about(cell: Cell, place: Place) -> dict[str, Any]:
    """The part of the record that is known before the run."""
    return {
        "digest": cell.digest(),
        "suite": cell.suite,
        "task": cell.task_name,
        "label": cell.label,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "cell": cell.identity(),
        "settings": cell.settings.recorded(),
        "options": complete(cell.method, cell.options),
        "commit": place.commit,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": device_name(place.device),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
