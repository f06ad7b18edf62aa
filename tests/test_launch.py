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
from lora_ga.adapter.save import FILE, FILE_KIND
from lora_ga.files import read_tensors, write_tensors

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes" / "launch"
ENGINES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
Result = tuple[dict[str, Any], Path]


def command(settings: Path, script: Path, folder: Path) -> list[str]:
    """The arguments of `accelerate launch` for a script. processes.py makes them work on a CPU."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    argv = ["--main_process_port", str(port), "--config_file", str(settings)]
    return [*argv, str(ROOT / "tests" / "processes.py"), str(script), "--output_dir", str(folder)]


def arguments(engine: str, folder: Path) -> list[str]:
    """The arguments of `accelerate launch` for a recipe."""
    argv = command(RECIPES / f"{engine}.yaml", RECIPES / "train.py", folder)
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
        return launched_here(arguments(engine, folder), folder), folder

    return run


def launched_here(argv: list[str], folder: Path) -> dict[str, Any]:
    """Launch a script in forked processes, and return its last line of output."""
    given = launch_command_parser().parse_args(argv)
    with mock.patch("torch.distributed.run.run", run_as_torchrun):
        launch_command(given)
    return last_line((folder / "0.txt").read_text())


def launched(argv: list[str], folder: Path) -> dict[str, Any]:
    """Launch a script by its command, and return its last line of output."""
    argv = [sys.executable, "-m", "accelerate.commands.launch", *argv]
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(sys.path)}
    shown = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=300, check=False, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr[-6000:]
    return last_line(shown.stdout)


def last_line(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


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
    skip_without_deepspeed(engine)
    result = launched(arguments(engine, tmp_path), tmp_path), tmp_path
    assert_trained(result, engine, forked("ddp")[0]["losses"])


def skip_without_deepspeed(engine: str) -> None:
    if engine == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("`make test-zero3` runs this test: it needs DeepSpeed, which compiles a kernel at its first use")


@pytest.mark.parametrize(
    ("engine", "kind"), [("ddp", ""), ("fsdp2", "FULL_STATE_DICT"), ("fsdp2", "SHARDED_STATE_DICT"), ("zero3", "")]
)
def test_a_resumed_run_continues_bit_for_bit_in_a_new_launch(engine: str, kind: str, tmp_path: Path) -> None:
    skip_without_deepspeed(engine)
    settings, script = tmp_path / "settings.yaml", ROOT / "tests" / "resuming.py"
    settings.write_text((RECIPES / f"{engine}.yaml").read_text().replace("FULL_STATE_DICT", kind))
    launch = launched if engine == "zero3" else launched_here
    argv = [*command(settings, script, tmp_path), *["--cpu"] * (engine == "ddp")]
    whole = launch(argv, tmp_path)
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / FILE).is_file()
    assert (checkpoint / "adapter_model.safetensors").is_file() == (kind != "SHARDED_STATE_DICT")
    resumed = launch([*argv, "--resume"], tmp_path)
    assert whole["estimated"]
    assert not resumed["estimated"]
    assert len(whole["losses"]) == 4
    assert resumed["losses"] == whole["losses"]
    assert resumed["digests"]["4"] == whole["digests"]["4"]
    assert resumed["end"] == whole["end"] == whole["digests"]["2"]  # of the best checkpoint
    assert whole["end"] != whole["digests"]["4"]
    tensors, record = read_tensors(checkpoint / FILE, FILE_KIND)
    name = min(tensors)
    write_tensors(checkpoint / FILE, FILE_KIND, tensors | {name: tensors[name] + 1}, record)
    assert launch([*argv, "--resume"], tmp_path) == {
        "refused": f"{checkpoint}: {FILE} does not belong to the adapter that was loaded: A of {name[:-3]} has another "
        "start. Put the right one back."
    }


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
