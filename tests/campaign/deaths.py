"""A process dies at a place of its program: every other one ends with an error that names a process, files are whole.

The others end long before the time-out of their group. A model that no start was written into is as before.
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lora_ga
import lora_ga.adapter.load
import lora_ga.adapter.rate
import lora_ga.adapter.save
import lora_ga.adapter.write
import trainers
import workers
from campaign.faults import Result, forked, last_line, lost, new_folder
from campaign.ranks import run_together
from lora_ga import LoraGAConfig
from lora_ga.distributed.processes import Processes
from lora_ga.files import read_tensors
from lora_ga.gradients.checkpoint import FILE_KIND, Checkpoint
from lora_ga.gradients.probe import Probes
from lora_ga.gradients.recorder import Recorder
from lora_ga.gradients.recording import recording
from lora_ga.layers.factors import Factor
from lora_ga.linalg.streaming import Streaming
from toys import adapted, causal, fused_llama, llama, logits

EXITED = 3
BATCHES = causal(2)
# What the others must say: a process by its number, or that one is gone (in the words of torch, in training).
NAMES_A_PROCESS = re.compile(r"Process(es)? \d|onnection (closed|reset) by peer|Broken pipe")


class Place(NamedTuple):
    """Where a process dies.

    Attributes:
        program: What all processes run.
        owner: The class or module whose function is the place.
        name: The function.
        most: The call at which the process dies is drawn from the first calls, up to this one.
        victim: The process; None for any.
    """

    program: Callable[[Run], None]
    owner: Any
    name: str
    most: int = 1
    victim: int | None = None


class Run:
    """A program of one process, and what it reports.

    Attributes:
        rank: The process.
        size: The number of processes.
        folder: The folder of all of them.
        model: The adapted model; None before there is one.
        started: Whether the model has its start.
        outputs: The model's outputs each time it was saved.
    """

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        self.rank, self.size, self.folder = rank, size, folder
        self.model: Any = None
        self.started = False
        self.outputs: list[Any] = []

    def report(self, program: Callable[[Run], None]) -> dict[str, Any]:
        """Run a program, and report its error and the state of the model."""
        error = ""
        try:
            program(self)
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        touched = self.model is not None and any(isinstance(each, Factor) for each in self.model.modules())
        return {"error": error, "touched": touched and not self.started, "outputs": self.outputs}

    def batches(self) -> Iterator[Any]:
        """Four batches of this process."""
        return (self.batch(number) for number in range(4))

    def batch(self, number: int) -> Any:
        """A batch of this process."""
        return causal(1, rows=2)[0] | {"labels": causal(self.size * 4)[number * self.size + self.rank]["labels"][:2]}

    def save(self) -> None:
        """Save the adapter, as the first process of a training run does."""
        self.outputs.append(_outputs(self.model).tolist())
        if self.rank == 0:
            self.model.save_pretrained(self.folder / "adapter")
        dist.barrier()


def life(run: Run) -> None:
    """Estimate with a checkpoint, start, train, save twice into one folder, load, and train on."""
    run.model, config = adapted(llama(num_hidden_layers=1), ["q_proj", "up_proj"]), LoraGAConfig()
    file = run.folder / "state.safetensors"
    estimate = lora_ga.estimate_gradients(run.model, run.batches(), config, checkpoint=file, every=2)
    lora_ga.apply_estimate(run.model, estimate, config)
    run.started = True
    network = DistributedDataParallel(run.model)
    run.save()
    _train(network)
    run.save()
    again = lora_ga.load(llama(num_hidden_layers=1), run.folder / "adapter", is_trainable=True)
    _train(DistributedDataParallel(again))


def _outputs(model: nn.Module) -> Tensor:
    """The outputs for one token."""
    return logits(model, BATCHES[0])[0, -1]


def _train(network: nn.Module) -> None:
    """Two steps."""
    optimizer = torch.optim.SGD([each for each in network.parameters() if each.requires_grad], 0.5)
    for batch in BATCHES:
        network(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def in_shards(run: Run) -> None:
    """Estimate and start with a model that FSDP2 has sharded."""
    run.model = workers.sharded(adapted(llama(), ["q_proj", "up_proj"]), run.size)
    lora_ga.initialize(run.model, run.batches())


def in_probe(run: Run) -> None:
    """Start with a model whose kernel reads layers that are never called."""
    run.model = fused_llama()
    lora_ga.initialize(run.model, run.batches(), LoraGAConfig(estimator="probe"))


def in_block(run: Run) -> None:
    """Record passes that the caller makes."""
    run.model = adapted(llama(num_hidden_layers=1), ["q_proj"])
    with recording(run.model) as recorded:
        run.model(**run.batch(0)).loss.backward()
    lora_ga.apply_estimate(run.model, recorded.estimate())


def in_trainer(run: Run) -> None:
    """Train with the callback."""
    run.model = adapted(llama(num_hidden_layers=1), ["q_proj", "up_proj"])
    run.started = True  # the callback gives the structure before it estimates
    callback = lora_ga.LoraGACallback(LoraGAConfig(max_batches=4))
    folder = run.folder / "run"
    trainers.transformers_trainer([callback], folder, model=run.model, max_steps=2, ddp_backend="gloo").train()


def in_search(run: Run) -> None:
    """Ask for a learning rate, which is refused with several processes, and start without it."""
    run.model = adapted(llama(num_hidden_layers=1), ["q_proj"])
    with pytest.raises(ValueError, match="there are several"):
        lora_ga.find_rate(run.model, run.batches(), 60)
    lora_ga.initialize(run.model, run.batches())


PLACES = {
    "between two batches": Place(life, Run, "batch", 4),
    "in a forward pass": Place(life, nn.Linear, "forward", 8),
    "in a backward pass": Place(life, torch.Tensor, "backward", 4),
    "after a batch": Place(life, Recorder, "finish_batch", 4),
    "before a checkpoint": Place(life, Checkpoint, "save", 2),
    "while a checkpoint is written": Place(life, Path, "replace", 2),
    "in an exchange of small values": Place(life, Processes, "gather", 5),
    "before it sends factors": Place(life, Processes, "_send", 2),
    "before it receives factors": Place(life, Processes, "_receive", 2),
    "while it adds up factors": Place(life, Streaming, "absorb"),
    "while it computes the factors": Place(life, Streaming, "factors"),
    "in the plan of the start": Place(life, lora_ga.adapter.write, "make_plan"),
    "while the start is written": Place(life, Factor, "begin_at", 4),
    "in a step of training": Place(life, torch.optim.SGD, "step", 2),
    "before an adapter is saved": Place(life, PeftModel, "save_pretrained", 2, victim=0),
    "while the sidecar is written": Place(life, lora_ga.adapter.save, "write_tensors", 2, victim=0),
    "in loading": Place(life, lora_ga.adapter.load, "_restore_structure"),
    "in a forward pass with shards": Place(in_shards, nn.Linear, "forward", 20),
    "in a backward pass with shards": Place(in_shards, torch.Tensor, "backward", 3),
    "in a probe": Place(in_probe, Probes, "check_finite", 4),
    "in a block that records": Place(in_block, Recorder, "finish_batch"),
    "in the start of a trainer": Place(in_trainer, Recorder, "finish_batch", 2),
    "in the steps of a trainer": Place(in_trainer, trainers.Trainer, "training_step", 2),
    "in the refusal of a search": Place(in_search, lora_ga.adapter.rate, "processes"),
}


def killed() -> NoReturn:
    """SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def left() -> NoReturn:
    """The process ends by sys.exit."""
    sys.exit(EXITED)


def failed() -> NoReturn:
    """An error, after which the program ends."""
    raise OSError("the disk of this process is gone")


WAYS = (killed, left, failed)


def case(number: int, draw: random.Random) -> Result:
    """Let one of two to four processes die at a place. Every round over the places takes another way at each place."""
    place_name = list(PLACES)[number % len(PLACES)]
    place, way, size = PLACES[place_name], WAYS[(number + number // len(PLACES)) % len(WAYS)], 2 + number % 3
    victim = draw.randrange(size) if place.victim is None else place.victim
    call = draw.randint(1, place.most)
    what = f"{way.__name__} {place_name} ({place.name} {call}), process {victim} of {size}"
    with new_folder(Path()) as folder:

        def program(rank: int) -> dict[str, Any]:
            if rank == victim:
                _at(place, call, way, folder / "died")
            return Run(rank, size, folder.resolve()).report(place.program)

        reports, codes = run_together(program, size, folder)
        if not (folder / "died").exists():
            return lost(f"{what}: it did not die ({codes[victim]}): {reports[victim]}")
        wrong = _wrong([each for rank, each in enumerate(reports) if rank != victim])
        outputs = [each for report in reports if report for each in report["outputs"]]
        if not wrong and forked(lambda: _check_files(folder, outputs), folder / "log"):
            wrong = f"the files: {last_line(folder / 'log')}"
    if way is not failed and codes[victim] != (-signal.SIGKILL if way is killed else EXITED):
        wrong = f"it ended with {codes[victim]}"
    return lost(f"{what}: {wrong}") if wrong else Result(1, refused=1)


def _at(place: Place, number: int, way: Callable[[], NoReturn], note: Path) -> None:
    """Make this process die at the n-th call of a function."""
    original, count, note = getattr(place.owner, place.name), 0, note.resolve()

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            note.touch()
            way()
        return original(*args, **kwargs)

    mock.patch.object(place.owner, place.name, counted).start()


def _wrong(others: list[dict[str, Any] | None]) -> str:
    """What is wrong with the reports of the other processes; "" if nothing is."""
    for report in others:
        if report is None:
            return "another process has no report"
        if not report["error"]:
            return "another process saw no error"
        if not NAMES_A_PROCESS.search(report["error"]) or "imed out" in report["error"]:
            return f"another process does not name it: {report['error'][:300]}"
        if report["touched"]:
            return "another process has an adapter without a start"
    return ""


def _check_files(folder: Path, outputs: list[Any]) -> int:
    """Read what was written: checkpoints, and the adapter, whose outputs are those of one time it was saved.

    Returns:
        0; otherwise there is an error.
    """
    for file in folder.glob("state*.safetensors"):
        read_tensors(file, FILE_KIND)
    if (folder / "adapter").exists():
        found = _outputs(lora_ga.load(llama(num_hidden_layers=1), folder / "adapter"))
        if not any(torch.allclose(found, torch.tensor(each), atol=1e-5) for each in outputs):
            raise ValueError("the adapter is neither the old one nor the new one")
    return 0
