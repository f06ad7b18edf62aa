"""One cell, from its description to its record."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
import resource
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any

import torch

from lora_ga.experiments.methods import complete, load_method
from lora_ga.experiments.methods.base import Work
from lora_ga.experiments.suites.cell import Cell
from lora_ga.experiments.suites.sources import Sources
from lora_ga.experiments.suites.training import Curves, DivergedError, arithmetic, measured, on, train
from lora_ga.experiments.tasks import prepare
from lora_ga.experiments.tasks.problem import Problem

PACKAGES = ("lora-ga", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Place:
    """Where cells are run.

    Attributes:
        sources: Where models and files are.
        device: A torch device.
        commit: Of the code, for the record.
    """

    sources: Sources
    device: str = "cpu"
    commit: str | None = None


def device_name(device: str) -> str:
    """The device in words."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    return f"{device}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def peak_memory(device: str) -> float:
    """The most memory in use until now, in MiB: on the GPU, or of this process."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Runs a cell. Never raises for what goes wrong inside: the record says it.

    Args:
        cell: The cell.
        place: Where.

    Returns:
        The record; its status is "done", "diverged" or "failed".
    """
    began, curves = time.perf_counter(), Curves()
    record = about(cell, place)
    try:
        found = result(cell, place, curves, began)
    except DivergedError as error:
        found = {"status": "diverged", "reason": str(error)}
    except Exception as error:  # the grid goes on, and the record tells
        lines = traceback.format_exception(error)
        found = {"status": "failed", "reason": f"{type(error).__name__}: {error}", "traceback": "".join(lines)[-4000:]}
    training = [loss if math.isfinite(loss) else None for loss in curves.training]
    record |= found | {"curves": {"training": training, "report": curves.report}}
    record["peak_memory_mib"] = peak_memory(place.device)
    record["seconds"] = record.get("seconds", {}) | {"total": round(time.perf_counter() - began, 3)}
    return record


def work_of(cell: Cell, problem: Problem, device: str = "cpu") -> Work:
    """What a cell's method makes its model of."""
    settings = cell.settings
    return Work(
        base=problem.base,
        batches=[on(device, batch) for batch in problem.aside],
        targets=problem.targets(),
        task_type=problem.task_type,
        rank=settings.rank,
        alpha=settings.alpha,
        steps=settings.steps,
        rate=cell.learning_rate,
        seed=cell.seed,
        options=complete(cell.method, cell.options),
    )


def result(cell: Cell, place: Place, curves: Curves, began: float) -> dict[str, Any]:
    """Builds, trains and measures."""
    method, settings = load_method(cell.method), cell.settings
    if place.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(place.device)
    problem = prepare(cell, place.sources)
    problem.base.to(place.device)
    work = work_of(cell, problem, place.device)
    torch.manual_seed(cell.seed)
    loaded = time.perf_counter()
    model = method.build(work)
    started = time.perf_counter()
    torch.manual_seed(cell.seed)  # the same dropout for all methods, whatever a start has drawn
    train(problem, method, model, work, settings, place.device, curves)
    trained = time.perf_counter()
    metrics = {"tune": measured(problem, model, "tune", place.device), "report": dict(curves.report[-1])}
    del metrics["report"]["step"]
    if problem.evaluate is not None:
        model.eval()
        with arithmetic(model, place.device):
            metrics["report"] |= problem.evaluate(model)
    judged = time.perf_counter()
    return {
        "status": "done",
        "metrics": metrics,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": {
            "load": round(loaded - began, 3),
            "start": round(started - loaded, 3),
            "train": round(trained - started, 3),
            "evaluate": round(judged - trained, 3),
        },
    }


def about(cell: Cell, place: Place) -> dict[str, Any]:
    """What is known of a run before it begins."""
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
