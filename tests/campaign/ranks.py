"""Processes that are given something else than the others: all of them end, with an error that names a process."""

from __future__ import annotations

import datetime
import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

import lora_ga
from campaign.faults import LIMIT, Result, lost, new_folder
from lora_ga import LoraGAConfig
from lora_ga.gradients import setup
from lora_ga.layers.factors import Factor
from toys import adapted, causal, llama

TIMEOUT = 60  # of the process group, in seconds


def other_seed(draw: random.Random) -> None:
    """Has another seed."""
    Settings.config = LoraGAConfig(seed=draw.randint(1, 99))


def other_settings(draw: random.Random) -> None:
    """Has another setting."""
    Settings.config = LoraGAConfig(oversample=draw.randint(1, 8))


def other_model(draw: random.Random) -> None:
    """Has another model."""
    Settings.model = {"num_hidden_layers": 1}


def other_version(draw: random.Random) -> None:
    """Runs another version of this library."""
    setup.__version__ = "0.0.9"


def no_data(draw: random.Random) -> None:
    """Has data that ends with an error."""
    Settings.broken = draw.randint(0, 2)


class Settings:
    """What a process is given; the faults change it."""

    config = LoraGAConfig()
    model: ClassVar[dict[str, Any]] = {}
    broken = -1


class Batches:
    """Batches of one process."""

    def __init__(self, rank: int, size: int) -> None:
        self.all = causal(4 * size)[rank::size]

    def batch(self, number: int) -> Any:
        """The batch of this number."""
        if number == Settings.broken:
            raise OSError("the disk of this process is gone")
        return self.all[number]

    def __iter__(self) -> Iterator[Any]:
        return (self.batch(number) for number in range(len(self.all)))


NAMES = [other_seed, other_settings, other_model, other_version, no_data]


def case(number: int, draw: random.Random) -> Result:
    """Give one of two to four processes something else."""
    fault, size = NAMES[number % len(NAMES)], 2 + number % 3
    victim, seed = draw.randrange(size), draw.random()

    def program(rank: int) -> dict[str, Any]:
        if rank == victim:
            fault(random.Random(seed))
        model, error = adapted(llama(**Settings.model), ["q_proj"]), ""
        try:
            estimate = lora_ga.estimate_gradients(model, Batches(rank, size), Settings.config)
            lora_ga.apply_estimate(model, estimate, Settings.config)
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        return {"error": error, "touched": any(isinstance(module, Factor) for module in model.modules())}

    with new_folder(Path()) as folder:
        reports, codes = run_together(program, size, folder)
    what = f"{fault.__name__}, process {victim} of {size}"
    for rank, report in enumerate(reports):
        if report is None:
            return lost(f"{what}: process {rank} ended with {codes[rank]} and no report")
        if not report["error"] or report["touched"]:
            return lost(f"{what}: process {rank} {'has a start' if report['touched'] else 'saw no error'}")
        if not any(text in report["error"] for text in ("rocess", "disk of this process")):
            return lost(f"{what}: process {rank} does not name a process: {report['error'][:200]}")
    return Result(1, refused=1)


def run_together(
    program: Callable[[int], dict[str, Any]], size: int, folder: Path
) -> tuple[list[dict[str, Any] | None], list[int]]:
    """Run `program(rank)` in `size` processes of a gloo group, copies of this process.

    Args:
        program: Returns a report, which can be written as JSON.
        size: The number of processes.
        folder: Where they meet, and leave their reports and what they print.

    Returns:
        The report of each process, None without one; and their exit codes.
    """
    codes = _codes([_start(program, rank, size, folder.resolve()) for rank in range(size)])
    files = [folder / f"{rank}.json" for rank in range(size)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files], codes


def _codes(pids: list[int]) -> list[int]:
    """The exit codes of processes; kills those that need too long."""
    codes, end = [], time.monotonic() + LIMIT
    for pid in pids:
        while True:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes.append(os.waitstatus_to_exitcode(status))
                break
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
    return codes


def _start(program: Callable[[int], dict[str, Any]], rank: int, size: int, folder: Path) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            _process(program, rank, size, folder)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def _process(program: Callable[[int], dict[str, Any]], rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    end = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size, timeout=end)
    dist.barrier()  # all are connected
    (folder / f"{rank}.json").write_text(json.dumps(program(rank)))
