"""Processes that die, or that are given something else than the others: every other process ends, with an error."""

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
from unittest import mock

import torch
import torch.distributed as dist

import lora_ga
from campaign.faults import LIMIT, Result, die, lost, new_folder
from lora_ga import LoraGAConfig
from lora_ga.distributed.processes import Processes
from lora_ga.gradients import setup
from lora_ga.gradients.checkpoint import Checkpoint
from lora_ga.layers.factors import Factor
from toys import adapted, causal, llama

TIMEOUT = 60  # of the process group, in seconds


def _at(owner: Any, name: str, number: int) -> None:
    """Make this process die at the n-th call of a method."""
    original, count = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            die()
        return original(*args, **kwargs)

    mock.patch.object(owner, name, counted).start()


def in_data(draw: random.Random) -> None:
    """Dies while its batches are made."""
    _at(Batches, "batch", draw.randint(1, 3))


def in_forward(draw: random.Random) -> None:
    """Dies in the forward pass of a layer."""
    _at(torch.nn.Linear, "forward", draw.randint(1, 60))


def in_backward(draw: random.Random) -> None:
    """Dies in the backward pass."""
    _at(torch.Tensor, "backward", draw.randint(1, 3))


def in_gather(draw: random.Random) -> None:
    """Dies when small values are exchanged."""
    _at(Processes, "gather", draw.randint(1, 3))


def in_merge(draw: random.Random) -> None:
    """Dies when factors are sent."""
    _at(Processes, "_send", draw.randint(1, 2))


def in_saving(draw: random.Random) -> None:
    """Dies while it saves the state of the estimate."""
    _at(Checkpoint, "save", draw.randint(1, 2))


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


DEADLY = [in_data, in_forward, in_backward, in_gather, in_merge, in_saving]
OTHER = [other_seed, other_settings, other_model, other_version, no_data]
NAMES = [each for pair in zip(DEADLY, [*OTHER, no_data], strict=True) for each in pair]


def case(number: int, draw: random.Random) -> Result:
    """Hurt one of two to four processes."""
    fault, size = NAMES[number % len(NAMES)], 2 + number % 3
    victim, seed = draw.randrange(size), draw.random()
    with new_folder(Path()) as folder:
        pids = [_start(rank, size, folder, fault if rank == victim else None, seed) for rank in range(size)]
        codes = _codes(pids)
        found = [json.loads(path.read_text()) if (path := folder / f"{r}.json").exists() else None for r in range(size)]
    what = f"{fault.__name__}, process {victim} of {size}"
    for rank, report in enumerate(found):
        if rank == victim and fault in DEADLY:
            continue
        if report is None:
            return lost(f"{what}: process {rank} ended with {codes[rank]} and no report")
        if not report["error"] or report["touched"]:
            return lost(f"{what}: process {rank} {'has a start' if report['touched'] else 'saw no error'}")
        if not any(text in report["error"] for text in ("rocess", "disk of this process")):
            return lost(f"{what}: process {rank} does not name a process: {report['error'][:200]}")
    if fault in DEADLY and codes[victim] != -signal.SIGKILL:
        return lost(f"{what}: it did not die ({codes[victim]}): {found[victim]}")
    return Result(1, refused=1)


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


def _start(rank: int, size: int, folder: Path, fault: Callable[..., None] | None, seed: float) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            _process(rank, size, folder, fault, seed)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    return pid


def _process(rank: int, size: int, folder: Path, fault: Callable[..., None] | None, seed: float) -> None:
    torch.set_num_threads(1)
    end = datetime.timedelta(seconds=TIMEOUT)
    meeting = f"file://{folder.resolve()}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=end)
    dist.barrier()  # all are connected
    if fault is not None:
        fault(random.Random(seed))
    model, error = adapted(llama(**Settings.model)), ""
    try:
        estimate = lora_ga.estimate_gradients(
            model, Batches(rank, size), Settings.config, checkpoint=folder / "state.safetensors", every=2
        )
        lora_ga.apply_estimate(model, estimate, Settings.config)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    touched = any(isinstance(module, Factor) for module in model.modules())
    (folder / f"{rank}.json").write_text(json.dumps({"error": error, "touched": touched}))
