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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_ga.experiments.methods import complete, load_method
from lora_ga.experiments.methods.base import BuildInputs, Method
from lora_ga.experiments.suites import trained
from lora_ga.experiments.suites.cells import Cell
from lora_ga.experiments.suites.sources import Sources
from lora_ga.experiments.suites.training import (
    Curves,
    DivergedError,
    Loop,
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


def now(device: str) -> float:
    """The time in seconds, once the device has done what it was given: a GPU computes after the call has returned."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
    record = recorded(cell, place, curves, lambda: result(cell, place, curves))
    seconds = record["seconds"]  # with a total already if another run trained the model
    record["seconds"] = seconds | {"total": round(seconds.get("total", 0.0) + time.perf_counter() - began, 3)}
    return record


def recorded(cell: Cell, place: Place, curves: Curves, found: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The record of a cell, without its total time.

    Args:
        cell: The cell.
        place: The device and the sources.
        curves: What the training has recorded so far.
        found: Returns what the run found. An error that it raises is put into the record.

    Returns:
        The record.
    """
    record = about(cell, place)
    try:
        with quiet():
            outcome = found()
    except DivergedError as error:
        outcome = {"status": "diverged", "reason": str(error)}
    except Exception as error:  # the other cells go on
        lines = traceback.format_exception(error)
        outcome = {
            "status": "failed",
            "reason": f"{type(error).__name__}: {error}",
            "traceback": "".join(lines)[-4000:],
        }
    training = [loss if math.isfinite(loss) else None for loss in curves.training]
    record |= outcome | {"curves": {"training": training, "report": curves.report}}
    record["peak_memory_mib"] = max(record.get("peak_memory_mib", 0.0), peak_memory(place.device))
    record.setdefault("seconds", {})
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


@dataclass
class Run:
    """A cell whose model is built.

    Attributes:
        cell: The cell.
        prepared: The base model and the data.
        method: The method.
        inputs: What the method built the model from.
        model: The model to train.
        curves: Filled by the training.
        folder: Where the trained model is saved until it has been evaluated; None: it is not saved.
        base: `trained.fingerprints` of the base model before the method changed it, if the model is to be saved.
        seconds: What took how long, for the record.
    """

    cell: Cell
    prepared: PreparedTask
    method: Method
    inputs: BuildInputs
    model: Any
    curves: Curves
    folder: Path | None
    base: dict[int, str]
    seconds: dict[str, float]

    def loop(self, place: Place) -> Loop:
        """The training loop of this run."""
        settings = self.cell.settings
        return Loop(self.prepared, self.method, self.model, self.inputs, settings, place.device, self.curves)

    @property
    def is_trained(self) -> bool:
        """Whether a run before has trained this model already and saved it."""
        return self.folder is not None and trained.is_saved(self.folder)


def build(cell: Cell, place: Place, curves: Curves, prepared: PreparedTask | None = None) -> Run:
    """Loads a cell's task, unless it is given with another seed, and builds the cell's model."""
    began, method = now(place.device), load_method(cell.method)
    prepared = prepare(cell, place.sources) if prepared is None else prepared.for_seed(cell.seed)
    prepared.base.to(place.device)
    inputs = build_inputs(cell, prepared, place.device)
    run = Run(
        cell=cell,
        prepared=prepared,
        method=method,
        inputs=inputs,
        model=None,
        curves=curves,
        folder=None if prepared.evaluate is None else place.unjudged_folder(cell),
        base={},
        seconds={},
    )
    if run.folder is not None and not run.is_trained:
        run.base = trained.fingerprints(prepared.base)
    torch.manual_seed(cell.seed)
    loaded = now(place.device)
    run.model = method.build(inputs)
    run.seconds = {"load": round(loaded - began, 3), "start": round(now(place.device) - loaded, 3)}
    return run


def result(cell: Cell, place: Place, curves: Curves) -> dict[str, Any]:
    """Builds, trains, measures and evaluates; a model that is saved already is not trained again."""
    if place.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(place.device)
    run = build(cell, place, curves)
    if run.is_trained:
        return evaluated(run, place, _restored(run, place))
    started = now(place.device)
    torch.manual_seed(cell.seed)  # the same dropout for all methods, whatever their initialisation has drawn
    train(run.loop(place))
    run.seconds["train"] = round(now(place.device) - started, 3)
    return finish(run, place)


def finish(run: Run, place: Place) -> dict[str, Any]:
    """Measures a trained model, saves it if its evaluation may fail, and evaluates it."""
    measuring = now(place.device)
    found = _measured(run.prepared, run.model, place, run.curves)
    found["seconds"] = run.seconds | {"evaluate": round(now(place.device) - measuring, 3)}
    if run.folder is not None:
        trained.save(run.folder, run.model, run.base, _facts(run.cell, place, run.curves, found))
    return evaluated(run, place, found)


def evaluated(run: Run, place: Place, found: dict[str, Any]) -> dict[str, Any]:
    """Adds what the task's own evaluation finds of the trained model."""
    if run.prepared.evaluate is not None:
        judging = now(place.device)
        run.model.eval()
        with autocast(run.model, place.device):
            found["metrics"]["report"] |= run.prepared.evaluate(run.model)
        found["seconds"]["evaluate"] = round(found["seconds"]["evaluate"] + now(place.device) - judging, 3)
    return found


def _restored(run: Run, place: Place) -> dict[str, Any]:
    """Loads the tensors that were saved after the training, and what the record says of it."""
    assert run.folder is not None, "checked by the caller"
    keep_in_float32(run.model)
    now = about(run.cell, place)
    found = trained.restore(run.folder, run.model) | {"judged": {name: now[name] for name in ORIGIN}}
    run.curves.training, run.curves.report = found["curves"]["training"], found["curves"]["report"]
    return found


def _measured(prepared: PreparedTask, model: Any, place: Place, curves: Curves) -> dict[str, Any]:
    """The part of the record that is known after the training, before the evaluation."""
    report = {name: value for name, value in curves.report[-1].items() if name != "step"}
    return {
        "status": "done",
        "metrics": {"tune": measured(prepared, model, "tune", place.device), "report": report},
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _facts(cell: Cell, place: Place, curves: Curves, found: dict[str, Any]) -> dict[str, Any]:
    """What is saved with a trained model, for the record of a run that only evaluates it."""
    total = {"total": round(sum(found["seconds"].values()), 3)}
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
