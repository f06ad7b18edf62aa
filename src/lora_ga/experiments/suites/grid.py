"""Runs the missing cells of a suite in worker processes, and adds each record to the store."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lora_ga.experiments.records.store import Store
from lora_ga.experiments.suites import trained
from lora_ga.experiments.suites.cells import Cell, missing, stacks
from lora_ga.experiments.suites.spec import Suite

Record = dict[str, Any]


def commit() -> str | None:
    """The commit of this code, with "+" if files were changed; None outside a git checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    inside = git("ls-files", "--error-unmatch", "grid.py")
    head = git("rev-parse", "--short", "HEAD") if inside else None
    return None if head is None else head + ("+" if git("status", "--porcelain", "--", "../..") else "")


def run_grid(
    suite: Suite,
    lines: Sequence[tuple[str, str]],
    store: Store,
    place: Any,
    *,
    workers: int = 1,
    stack: int = 1,
    retry: bool = False,
    on_record: Callable[[Record, int], None] = lambda record, left: None,
) -> dict[str, Record]:
    """Runs every missing cell, and the cells that become necessary because of the results.

    Args:
        suite: The suite.
        lines: The pairs (task, label) to complete.
        store: The store, locked.
        place: The device and the sources for the cells.
        workers: Number of processes, each with one thread; with 0 the cells run in this process.
        stack: Number of cells that a process trains at once, where it can (see `stack.py`).
        retry: Run cells that failed before once more. Cells whose trained model is saved, as their evaluation failed,
            are always run once more.
        on_record: Called with each new record and the number of cells that are still missing.

    Returns:
        All records of the store, by digest.
    """
    records = store.records()
    failed = {digest for digest, record in records.items() if record["status"] == "failed"}
    if not retry:  # a saved model only has to be evaluated
        failed = {digest for digest in failed if trained.is_saved(store.unjudged(digest))}
    known = {digest: record for digest, record in records.items() if digest not in failed}
    runs: InProcess | WorkerPool = WorkerPool(place.device) if workers else InProcess()
    running: dict[str, Cell] = {}
    try:
        while True:
            todo = [cell for cell in missing(suite, lines, known) if cell.digest() not in running]
            begun = stacks(todo, stack)[: max(1, workers) - len(runs)]
            for cells in begun:
                running |= {cell.digest(): cell for cell in cells}
                runs.start(cells, place)
            if not running:
                return records | known
            left = len(todo) - sum(map(len, begun))
            for record in runs.finished():
                cell = running.pop(record["digest"])
                store.add(record)
                if record["status"] != "failed":
                    trained.discard(store.unjudged(record["digest"]))
                known[cell.digest()] = record
                on_record(record, left + len(running))
    finally:
        runs.close()


class InProcess:
    """Runs cells in this process, one stack after another; the counterpart of `WorkerPool`."""

    def __init__(self) -> None:
        self.ready: list[Record] = []

    def __len__(self) -> int:
        return 0

    def start(self, cells: Sequence[Cell], place: Any) -> None:
        """Runs the cells."""
        from lora_ga.experiments.suites.run_stack import run_stack

        self.ready += run_stack(cells, place)

    def finished(self) -> list[Record]:
        """The records since the last call."""
        records, self.ready = self.ready, []
        return records

    def close(self) -> None:
        """Does nothing: no process is left."""


class WorkerPool:
    """Runs each stack in a new process, so that its peak memory is measured alone and a crash ends only its cells.

    The processes are forked from a server process that has imported the libraries; for a GPU it has imported torch
    alone. PEFT imports bitsandbytes, which starts CUDA, and a process that is forked after that cannot use CUDA.

    Args:
        device: Where the cells run.
    """

    def __init__(self, device: str) -> None:
        libraries = ["lora_ga.experiments.suites.run_stack", "peft"] if device == "cpu" else ["torch"]
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(libraries)
        self.running: dict[Any, tuple[Any, Sequence[Cell], Any]] = {}

    def __len__(self) -> int:
        """The number of processes."""
        return len(self.running)

    def start(self, cells: Sequence[Cell], place: Any) -> None:
        """Starts a process for the cells."""
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_child, args=(sender, cells, place))
        process.start()
        sender.close()
        self.running[receiver] = (process, cells, place)

    def finished(self) -> list[Record]:
        """The records of the cells that have ended; waits for at least one."""
        received = [_received(receiver, *self.running.pop(receiver)) for receiver in wait(list(self.running))]
        return [record for records in received for record in records]

    def close(self) -> None:
        """Kills the processes that still run."""
        for process, _, _ in self.running.values():
            process.kill()


def _received(receiver: Any, process: Any, cells: Sequence[Cell], place: Any) -> list[Record]:
    """The records that a process has sent; if it has sent none, records of how the process ended."""
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        from lora_ga.experiments.suites.run import about

        code = process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        empty: dict[str, list[Any]] = {"training": [], "report": []}
        failed = {"status": "failed", "reason": f"its process {how}", "curves": empty, "seconds": {}}
        return [about(cell, place) | failed for cell in cells]
    finally:
        receiver.close()
        process.join()


def _child(sender: Connection, cells: Sequence[Cell], place: Any) -> None:
    """Runs the cells of one stack with one thread. The process ends when its parent does."""
    import torch

    from lora_ga.experiments.suites.run_stack import run_stack

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets the signal, too, and ends this process
    parent = multiprocessing.parent_process()
    assert parent is not None, "started by WorkerPool"

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    sender.send(run_stack(cells, place))


def expected_seconds(suite: Suite, cells: Sequence[Cell], records: Mapping[str, Record]) -> float:
    """Estimates the time for cells: the mean of the same task and method, else of the task, else the suite's estimate.

    Args:
        suite: The suite.
        cells: The cells.
        records: The records of the store.

    Returns:
        Seconds with one process.
    """
    total = 0.0
    for cell in cells:
        alike = [
            (record["cell"]["method"] == cell.method, record["seconds"]["total"])
            for record in records.values()
            if record["status"] == "done" and record["suite"] == suite.name and record["task"] == cell.task_name
        ]
        closest = [seconds for same, seconds in alike if same] or [seconds for _, seconds in alike]
        total += sum(closest) / len(closest) if closest else cell.task.seconds
    return total
