"""The launch recipes, run by the commands of recipes/launch/train.py: two processes, one run of each configuration."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes" / "launch"
ENGINES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
Launch = Callable[[str], tuple[dict[str, Any], Path]]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """A function that runs the recipe of an engine once, and returns its last line of output (JSON) and its folder."""
    done: dict[str, tuple[dict[str, Any], Path]] = {}

    def run(engine: str) -> tuple[dict[str, Any], Path]:
        if engine not in done:
            folder = tmp_path_factory.mktemp(engine)
            argv = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
            argv += ["--config_file", f"{RECIPES / engine}.yaml"]
            argv += [] if engine == "ddp" else [str(ROOT / "tests" / "on_cpu.py")]
            argv += [str(RECIPES / "train.py"), "--output_dir", str(folder), *(["--cpu"] if engine == "ddp" else [])]
            more = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
            shown = subprocess.run(
                argv, capture_output=True, text=True, env=os.environ | more, timeout=300, check=False, cwd=ROOT
            )
            assert shown.returncode == 0, shown.stderr[-6000:]
            done[engine] = (json.loads(shown.stdout.splitlines()[-1]), folder)
        return done[engine]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_recipe_trains_in_its_engine_and_saves_a_plain_adapter(launch: Launch, engine: str) -> None:
    if engine == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("`make test-zero3` runs this test: it needs DeepSpeed, which compiles a kernel at its first use")
    printed, folder = launch(engine)
    expected, _ = launch("ddp")
    assert printed["engine"] == ENGINES[engine]
    assert len(printed["losses"]) == 20
    assert printed["losses"][-1] < printed["losses"][0] - 0.2
    assert printed["losses"] == pytest.approx(expected["losses"], abs=1e-4)
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 28
    assert all(name.endswith(".weight") and 8 in tensor.shape for name, tensor in saved.items())  # twice the rank
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    ids = torch.arange(32)[None]
    before = base(input_ids=ids, labels=ids).logits
    after = PeftModel.from_pretrained(base, folder / "adapter")(input_ids=ids, labels=ids).logits
    assert (after - before).abs().max() > 0.1


def test_processes_that_accelerate_does_not_connect_are_refused(tmp_path: Path) -> None:
    argv = [sys.executable, str(RECIPES / "train.py"), "--output_dir", str(tmp_path)]
    alone = os.environ | {"WORLD_SIZE": "2"}
    shown = subprocess.run(argv, capture_output=True, text=True, env=alone, check=False)
    assert shown.returncode == 1
    assert "2 processes were launched, but Accelerate found no accelerator and would run each alone" in shown.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_script_documents_a_command_for_every_configuration() -> None:
    text = (RECIPES / "train.py").read_text()
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    assert names == set(ENGINES)
    for name in names:
        assert f"accelerate launch --config_file recipes/launch/{name}.yaml recipes/launch/train.py" in text
