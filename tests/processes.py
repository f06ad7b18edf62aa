"""Run a function of a test in several processes, and collect the results in the order of the ranks.

As a program it runs a script under Accelerate on the CPU: python processes.py SCRIPT ARGUMENTS. FSDP and DeepSpeed also
run on CPUs, over gloo, but Accelerate uses them on accelerators only. Without --cpu among the arguments Accelerate
treats the CPU as an accelerator.
"""

from __future__ import annotations

import datetime
import gc
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import PartialState
from accelerate.utils import DistributedType

from lora_ga.distributed import processes

Worker = Callable[[int, int, Path], Any]


def _process(rank: int, worker: Worker, size: int, folder: Path, timeout: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        result = worker(rank, size, folder)
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        raise
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


def start_server() -> None:
    """Start the process that others are forked from, unless it runs.

    It imports the libraries, which takes many seconds in a new interpreter, and runs nothing else: a process that is
    forked from it holds no models and no threads of this process.
    """
    mp.get_context("forkserver").set_forkserver_preload(["workers", "lora_ga.experiments.suites.run"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # where it finds `workers`
        forkserver.ensure_running()


def _call(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function. The garbage collector leaves out what the server has imported, as in conftest.py."""
    gc.freeze()
    function(*arguments)


def start(function: Callable[..., None], *arguments: Any) -> Any:
    """Start `function(*arguments)` in a new process, which is forked from the server."""
    start_server()
    process = mp.get_context("forkserver").Process(target=_call, args=(function, *arguments))
    process.start()
    return process


def exit_codes(started: Sequence[Any], timeout: int = 300) -> list[int]:
    """Wait for processes and return their exit codes; kills those that need more than `timeout` seconds each."""
    for process in started:
        process.join(timeout)
    for process in started:
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def run(worker: Worker, size: int, folder: Path, *, timeout: int = 120) -> list[Any]:
    """Run `worker(rank, size, folder)` in `size` processes of a gloo group.

    Returns the result of each process, None for a process that died. Fails if a worker raised an error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = [start(_process, rank, worker, size, folder, timeout) for rank in range(size)]
    exit_codes(started, 4 * timeout)
    failures = [file.read_text() for file in sorted(folder.glob("*.txt"))]
    assert not failures, "\n".join(failures)
    files = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def sums(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Sum tensors of different dtypes, shapes and sizes over all processes, in buckets of 40 bytes."""
    processes.BUCKET = 40
    together = processes.processes()
    held = {"all.sum": torch.full((2, 3), 2.0**rank), f"own {rank}.x": torch.tensor(float(rank), dtype=torch.float64)}

    def absorb(others: dict[str, torch.Tensor]) -> None:
        for name, tensor in others.items():
            held[name] = held[name] + tensor if name in held else tensor

    own = together.merge(["all", "none", *(f"own {each}" for each in range(size))], lambda: held, absorb)
    made = {f"{name}.made": torch.ones(3, dtype=torch.bfloat16) for name in own if name == "all"}
    shared = together.share({name: each for name, each in held.items() if name.rpartition(".")[0] in own} | made)
    return {"shared": shared, "own": own, "gathered": together.gather({"rank": rank}), "shares": together.share_of(5)}


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    if "--cpu" not in sys.argv:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    # torch 2.13.0 aborts a process whose interpreter ends while a thread of gloo releases a tensor (pytorch#179291).
    # With DDP, FSDP and ZeRO-3 these threads outlive the process group. A script that failed has ended already.
    os._exit(0)
