"""The launch recipes, run by the commands of recipes/launch/train.py: two processes, one run of each configuration."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import processes

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes" / "launch"
ENGINES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
Result = tuple[dict[str, Any], Path]


def arguments(engine: str, folder: Path) -> list[str]:
    """The arguments of `accelerate launch` for a recipe. processes.py makes them work on a CPU."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    argv = ["--main_process_port", str(port), "--config_file", f"{RECIPES / engine}.yaml"]
    argv += [str(ROOT / "tests" / "processes.py"), str(RECIPES / "train.py"), "--output_dir", str(folder)]
    argv += ["--cpu"] if engine == "ddp" else []
    # ZeRO-3 rounds otherwise than DDP. The streaming estimator amplifies rounding to 1e-3 in directions, and the losses
    # then differ by 1e-3. The dense estimator does not, so this compares the engines.
    return [*argv, "--estimator=dense"]


def run_script(environment: dict[str, str], argv: list[str], output: Path) -> None:
    """Run a script in this process, which has not run anything, and write what it prints and the reason of its exit."""
    os.environ |= environment | ONE_THREAD
    sys.argv = argv
    torch.set_num_threads(1)
    try:
        with output.open("w") as file, contextlib.redirect_stdout(file):
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as ended:
        output.write_text(str(ended.code))
        raise


def run_as_torchrun(launched: Any) -> None:
    """Start the processes of `torch.distributed.run`, but fork them: in new ones, importing takes most of the time."""
    common = os.environ | {"WORLD_SIZE": launched.nproc_per_node, "LOCAL_WORLD_SIZE": launched.nproc_per_node}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": launched.master_port}
    argv = [launched.training_script, *launched.training_script_args]
    folder = Path(argv[argv.index("--output_dir") + 1])
    started = []
    for rank in range(int(launched.nproc_per_node)):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(processes.start(run_script, environment, argv, folder / f"{rank}.txt"))
    assert processes.exit_codes(started) == [0, 0]


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Result]:
    """A function that runs the recipe of an engine once, and returns its last line of output (JSON) and its folder.

    Accelerate reads the arguments and the configuration file and makes the environment of the processes.
    """

    @functools.cache
    def run(engine: str) -> Result:
        folder = tmp_path_factory.mktemp(engine)
        given = launch_command_parser().parse_args(arguments(engine, folder))
        with mock.patch("torch.distributed.run.run", run_as_torchrun):
            launch_command(given)
        return json.loads((folder / "0.txt").read_text().splitlines()[-1]), folder

    return run


def launched(engine: str, folder: Path) -> Result:
    """Run the recipe of an engine by its command."""
    argv = [sys.executable, "-m", "accelerate.commands.launch", *arguments(engine, folder)]
    shown = subprocess.run(
        argv, capture_output=True, text=True, env=os.environ | ONE_THREAD, timeout=300, check=False, cwd=ROOT
    )
    assert shown.returncode == 0, shown.stderr[-6000:]
    return json.loads(shown.stdout.splitlines()[-1]), folder


def assert_trained(result: Result, engine: str, losses: list[float]) -> None:
    printed, folder = result
    assert printed["engine"] == ENGINES[engine]
    assert len(printed["losses"]) == 20
    assert printed["losses"][-1] < printed["losses"][0] - 0.2
    assert printed["losses"] == pytest.approx(losses, abs=1e-4)
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 28
    assert all(name.endswith(".weight") and 8 in tensor.shape for name, tensor in saved.items())  # twice the rank
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    ids = torch.arange(32)[None]
    before = base(input_ids=ids, labels=ids).logits
    after = PeftModel.from_pretrained(base, folder / "adapter")(input_ids=ids, labels=ids).logits
    assert (after - before).abs().max() > 0.1


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_recipe_trains_in_its_engine_and_saves_a_plain_adapter(
    forked: Callable[[str], Result], engine: str
) -> None:
    assert_trained(forked(engine), engine, forked("ddp")[0]["losses"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_command_of_the_recipe_does_the_same(forked: Callable[[str], Result], engine: str, tmp_path: Path) -> None:
    if engine == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("`make test-zero3` runs this test: it needs DeepSpeed, which compiles a kernel at its first use")
    assert_trained(launched(engine, tmp_path), engine, forked("ddp")[0]["losses"])


def test_processes_that_accelerate_does_not_connect_are_refused(tmp_path: Path) -> None:
    argv = [str(RECIPES / "train.py"), "--output_dir", str(tmp_path / "run")]
    process = processes.start(run_script, {"WORLD_SIZE": "2"}, argv, tmp_path / "shown.txt")
    assert processes.exit_codes([process]) == [1]
    shown = (tmp_path / "shown.txt").read_text()
    assert "2 processes were launched, but Accelerate found no accelerator and would run each alone" in shown
    assert not (tmp_path / "run").exists()


def test_the_script_documents_a_command_for_every_configuration() -> None:
    text = (RECIPES / "train.py").read_text()
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    assert names == set(ENGINES)
    for name in names:
        assert f"accelerate launch --config_file recipes/launch/{name}.yaml recipes/launch/train.py" in text
