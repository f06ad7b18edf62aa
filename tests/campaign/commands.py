"""The commands that are hurt: what they read, how a user goes on after a fault, and what they must leave behind."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

import golden_set
from campaign.faults import forked, last_line
from lora_ga.cli.main import main
from lora_ga.experiments.records.runs import load_run
from lora_ga.experiments.records.store import Store
from lora_ga.experiments.suites.grid import run_grid
from lora_ga.experiments.suites.run import Place
from lora_ga.experiments.suites.sources import Sources
from lora_ga.experiments.suites.spec import load_suite
from lora_ga.files import read_tensors
from lora_ga.gradients.checkpoint import FILE_KIND as STATE_KIND
from lora_ga.gradients.result import FILE_KIND

WORLD = Path("world")  # relative to the folder of the campaign, which is the current one
SUITE = {**golden_set.SUITE, "seeds": 1, "methods": {"lora": {"rates": [-5, -4]}}}
TRAIN = golden_set.TRAIN | {"model": WORLD / "base", "train_file": WORLD / "data.jsonl", "save_steps": 1}
# What a record of a cell says about its machine and its time.
PASSING = {"seconds", "date", "peak_memory_mib", "commit", "versions", "python", "device"}


def said(argv: list[Any]) -> tuple[int, str]:
    """The exit code of `lora-ga`, and what it wrote to stderr, which is also printed."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main([str(each) for each in argv])
    sys.stderr.write(errors.getvalue())
    return code, errors.getvalue()


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        run: Calls it in a folder, or goes on after a fault as its messages say; returns an exit code.
        state: The folder → what is there, to compare with an unbroken run; an error if a file is not whole.
    """

    run: Callable[[Path], int]
    state: Callable[[Path], dict[str, Any]]


def make_world() -> int:
    """Write what the commands read: a base model, data, two estimates, adapters."""
    WORLD.mkdir()
    os.chdir(WORLD)
    torch.set_num_threads(1)
    numbers: dict[str, torch.Tensor] = {}
    golden_set.write_base(numbers)
    golden_set.write_estimates(numbers)
    model = golden_set.adapted(golden_set.ADAPTERS["delta"][0])
    golden_set.lora_ga.initialize(model, golden_set.batches(4))
    golden_set.train(model, 2, 10).save_pretrained("adapter")
    shutil.copy("base/tokenizer.json", "adapter")
    shutil.copy("base/tokenizer_config.json", "adapter")
    plain = golden_set.adapted({"target_modules": ["q_proj"]})
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    plain.save_pretrained("init")
    shutil.copytree("init", "final")
    tensors = load_file("init/adapter_model.safetensors")
    save_file(
        {key: tensor + 0.01 for key, tensor in tensors.items()}, "final/adapter_model.safetensors", {"format": "pt"}
    )
    shutil.copy("base/tokenizer.json", "final")
    shutil.copy("base/tokenizer_config.json", "final")
    os.chdir("..")
    tasks = {"text": {"kind": "text", "model": f"{WORLD}/base", "files": {"text": f"{WORLD}/text.txt"}}}
    (WORLD / "suite.yaml").write_text(yaml.safe_dump({**SUITE, "tasks": tasks}))
    return 0


def estimate(folder: Path) -> int:
    """Estimate, with a checkpoint after every batch."""
    options = {key: TRAIN[key] for key in ("model", "task", "train_file", "rank", "batch_size")}
    argv = [f"--{key}={value}" for key, value in options.items()]
    argv += ["--estimate_batches=6", "--checkpoint", str(folder / "state.safetensors"), "--checkpoint_every=1"]
    code, text = said(["estimate", *argv, "--output", folder / "e.safetensors"])
    return 0 if "this file exists" in text else code


def train(folder: Path) -> int:
    """Train, or resume as the messages say."""
    out = folder / "run"
    argv = ["train", *(f"--{key}={value}" for key, value in TRAIN.items()), "--method=lora-ga", "--output_dir", out]
    if not out.exists() or not any(out.iterdir()):
        return main([str(each) for each in argv])
    code, text = said([*argv, "--resume"])
    if "Remove " in text or "no run in" in text:
        shutil.rmtree(out)
        return main([str(each) for each in argv])
    return code


def reproduce(folder: Path) -> int:
    """Run the missing cells of a suite, as `lora-ga reproduce` does, but in this process."""
    suite, store = load_suite(str(WORLD / "suite.yaml")), Store(folder / "store")
    try:
        with store.locked():
            place = Place(Sources.from_environment())
            run_grid(suite, suite.lines(), store, place, workers=0, retry=False, on_record=lambda *_: None)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def writes_folder(*argv: Any) -> Callable[[Path], int]:
    """A command that writes the folder `out`."""
    return functools.partial(_write_folder, argv)


def _write_folder(argv: tuple[Any, ...], folder: Path) -> int:
    code, text = said([*argv, "--output", folder / "out"])
    return 0 if "not empty" in text else code  # it is there already


def add_up(folder: Path) -> int:
    """Add up two estimates."""
    parts = [WORLD / f"estimate-{number}.safetensors" for number in (0, 1)]
    code, text = said(["merge", *parts, "-o", folder / "sum.safetensors"])
    return 0 if "this file exists" in text else code


def tensors_of(name: str, kind: str) -> Callable[[Path], dict[str, Any]]:
    """The content of a file of this library; {} if it is not there."""
    return functools.partial(_tensors_of, name, kind)


def _tensors_of(name: str, kind: str, folder: Path) -> dict[str, Any]:
    if (folder / "state.safetensors").exists():
        read_tensors(folder / "state.safetensors", STATE_KIND)
    if not (folder / name).exists():
        return {}
    tensors, record = read_tensors(folder / name, kind)
    return {key: tensor.tolist() for key, tensor in tensors.items()} | {"record": record}


def state_of_run(folder: Path) -> dict[str, Any]:
    """The result of a finished run; {} before."""
    if not (folder / "run" / "run.json").exists():
        return {}
    run = load_run(folder / "run")
    weights = (folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    return {"curve": run.curve, "metrics": run.metrics, "weights": weights.hex()}


def state_of_store(folder: Path) -> dict[str, Any]:
    """The records; a cell that has run twice is an error."""
    attempts = Store(folder / "store").attempts()
    found = {each["digest"]: {key: value for key, value in each.items() if key not in PASSING} for each in attempts}
    if len(found) != len(attempts):
        raise ValueError("a cell has run twice")
    if failed := [each["reason"] for each in found.values() if each["status"] == "failed"]:
        raise ValueError(f"a cell has failed: {failed[0]}")
    return found


def state_of_folder(folder: Path) -> dict[str, Any]:
    """All files of the folder `out`; {} before."""
    return {str(path): path.read_bytes().hex() for path in sorted((folder / "out").rglob("*")) if path.is_file()}


COMMANDS = {
    "estimate": Command(estimate, tensors_of("e.safetensors", FILE_KIND)),
    "train": Command(train, state_of_run),
    "reproduce": Command(reproduce, state_of_store),
    "export --merge": Command(
        writes_folder("export", WORLD / "adapter", "--merge", "--model", WORLD / "base"), state_of_folder
    ),
    "export --rank": Command(writes_folder("export", WORLD / "adapter", "--rank=1"), state_of_folder),
    "merge": Command(add_up, tensors_of("sum.safetensors", FILE_KIND)),
    "convert": Command(writes_folder("convert", WORLD / "init", WORLD / "final"), state_of_folder),
}


def relative(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A state whose names do not depend on the folder."""
    return json.loads(json.dumps(state).replace(str(folder), "FOLDER"))


def whole(command: Command, folder: Path, reference: dict[str, Any]) -> str:
    """What is wrong with the state after a fault: it must be that of before, or that of the end; "" if it is right.

    A store may hold some of its records.
    """
    try:
        found = relative(command.state(folder), folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    parts = found.items() <= reference.items() if command.state is state_of_store else found in ({}, reference)
    return "" if parts else "neither the old state nor the new one: " + _difference(found, reference)


def _difference(found: dict[str, Any], reference: dict[str, Any]) -> str:
    """The first keys in which two states differ."""
    keys = [key for key in {**found, **reference} if found.get(key) != reference.get(key)]
    return f"{len(keys)} differences, as {', '.join(keys[:3])}"


def go_on(command: Command, folder: Path, reference: dict[str, Any], log: Path) -> str:
    """Call the command until it ends well, twice at most; what is wrong with the end, "" if nothing is."""
    code = forked(lambda: command.run(folder), log)
    if code:
        return f"going on ended with {code}: {last_line(log)}"
    try:
        found = relative(command.state(folder), folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if found == reference else "another end: " + _difference(found, reference)
