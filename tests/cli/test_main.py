"""`lora-ga` calls its sub-commands, reports their errors, and names the extra `cli` if it is missing."""

import errno
import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError

from lora_ga.cli import main as command
from lora_ga.cli.main import COMMANDS, EXTRA, SEVERAL, main


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"]])
def test_help_names_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert "LORA_GA_DEBUG=1" in shown


def test_without_a_command_the_help_is_shown_and_the_exit_code_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: lora-ga COMMAND" in capsys.readouterr().out


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lora-ga 0.")


def test_an_unknown_command_is_refused_and_the_known_ones_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == (
        "lora-ga: error: 'trian' is not a command; the commands are train, estimate, rate, merge, inspect, export, "
        "convert, compare, reproduce, fetch, report.\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_main_and_a_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(importlib.import_module(f"lora_ga.cli.{name}").main)
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"\n  lora-ga {name} " in capsys.readouterr().out


@pytest.mark.parametrize("name", SEVERAL)
def test_several_processes_are_refused_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each would write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([name]) == 2
    start = f"lora-ga {name}: error: runs in one process, but WORLD_SIZE is 2. Start it without torchrun or accelerate"
    assert capsys.readouterr().err.startswith(start)
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0


def test_a_rate_is_computed_in_several_processes_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = ["--learning_rate", "2e-5", "--known_for", "full", "--stable_gamma", "16", "--width", "4096"]
    assert main(["rate", *argv]) == 0
    assert "Begin LoRA-GA at" in capsys.readouterr().out


def test_user_errors_are_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--task", "seq-cls"]) == 2
    assert capsys.readouterr().err == (
        "lora-ga train: error: --model is missing. Give it on the command line or in the --config file: model to start "
        "from: a name on the Hugging Face hub or a local folder.\n"
    )
    for words, what in {  # these have no --config
        ("convert", "first", "last"): "--output is missing. Give it: new or empty folder for the converted adapter",
        ("export", "adapter", "--merge"): "--output is missing. Give it: new or empty folder for the result",
        ("rate",): "--learning_rate is missing. Give it: the rate that is known",
    }.items():
        assert main([*words]) == 2
        assert capsys.readouterr().err == f"lora-ga {words[0]}: error: {what}.\n"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from Python 3.11 on")
def test_notes_of_an_error_are_shown_below_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(argv: list[str]) -> int:
        error = ValueError("This model takes no such text.")
        error.add_note("This happened in batch 2.")
        raise error

    monkeypatch.setattr(command.importlib, "import_module", lambda name: SimpleNamespace(main=refused))
    assert main(["train"]) == 2
    assert capsys.readouterr().err == (
        "lora-ga train: error: This model takes no such text.\nThis happened in batch 2.\n"
    )


def test_debug_mode_raises_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_GA_DEBUG", "1")
    with pytest.raises(ValueError, match="--model is missing"):
        main(["train"])


def test_bugs_are_not_reported_as_user_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @staticmethod
        def main(argv: list[str]) -> int:
            raise KeyError("a bug")

    monkeypatch.setattr(command.importlib, "import_module", lambda name: Broken)
    with pytest.raises(KeyError, match="a bug"):
        main(["train"])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 43840 vs 43732"),
    ],
)
def test_a_full_disk_is_one_message_whichever_library_found_it(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(argv: list[str]) -> int:
        raise error

    monkeypatch.setitem(sys.modules, "lora_ga.cli.train", SimpleNamespace(main=fill))
    assert main(["train"]) == 2
    assert f"lora-ga train: error: the disk is full ({error}). Files that were finished" in capsys.readouterr().err


def test_an_error_of_a_full_disk_that_says_what_to_do_is_shown_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(argv: list[str]) -> int:
        raise OSError(errno.ENOSPC, "the checkpoint could not be written", "state")

    monkeypatch.setitem(sys.modules, "lora_ga.cli.estimate", SimpleNamespace(main=fill))
    assert main(["estimate"]) == 2
    assert capsys.readouterr().err == (
        "lora-ga estimate: error: [Errno 28] the checkpoint could not be written: 'state'\n"
    )


def test_an_interrupted_command_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted:
        @staticmethod
        def main(argv: list[str]) -> int:
            raise KeyboardInterrupt

    monkeypatch.setattr(command.importlib, "import_module", lambda name: Interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "\nlora-ga train: interrupted\n"


def test_a_warning_is_shown_without_the_place_in_the_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Warned:
        @staticmethod
        def main(argv: list[str]) -> int:
            print(warnings.formatwarning("few rows", UserWarning, "code.py", 7))
            return 0

    monkeypatch.setattr(command.importlib, "import_module", lambda name: Warned)
    formatted = warnings.formatwarning
    assert main(["train"]) == 0
    assert capsys.readouterr().out == "warning: few rows\n\n"
    assert warnings.formatwarning is formatted


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from lora_ga.cli.main import main; main(['--help']);"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "[]"


def test_python_m_lora_ga_runs_the_command() -> None:
    shown = subprocess.run([sys.executable, "-m", "lora_ga", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("lora-ga ")


# --- without the extra cli -------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
# The library's dependencies require these packages of the extra too. Only the command line can be tested without them.
ALWAYS_THERE = {"yaml", "filelock", "jinja2"}

# Hides modules as if they were not installed: wraps every import finder so that it does not find them.
BLOCK = """
import sys

class Without:
    def __init__(self, finder, blocked):
        self.finder, self.blocked = finder, blocked

    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in self.blocked else self.finder.find_spec(name, *rest)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder, {blocked!r}) for finder in sys.meta_path]
for blocked in {blocked!r}:
    assert blocked not in sys.modules
    try:
        __import__(blocked)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{{blocked}} is not blocked")
"""


def run_without(blocked: set[str], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process that cannot import some modules."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path])}
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=sorted(blocked)) + code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


COMMAND = "from lora_ga.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    """The names of the required packages, without versions."""
    return {requirement.partition(">=")[0].partition("==")[0] for requirement in requirements}


def test_the_library_needs_five_packages(project: dict[str, Any]) -> None:
    assert names(project["dependencies"]) == {"torch", "transformers", "peft", "accelerate", "safetensors"}


def test_the_command_line_checks_for_every_package_of_the_extra_cli(project: dict[str, Any]) -> None:
    assert names(project["optional-dependencies"]["cli"]) == set(EXTRA.values())


@pytest.mark.parametrize("extra", ["trl", "eval", "demo", "dev"])
def test_the_other_extras_install_the_command_line_too(extra: str, project: dict[str, Any]) -> None:
    assert any(name.startswith("lora-ga[cli") for name in project["optional-dependencies"][extra])


@pytest.mark.parametrize("command", COMMANDS)
def test_without_the_extra_a_command_names_it_in_one_line(command: str) -> None:
    run = run_without(set(EXTRA), COMMAND, command, "--help")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == (
        f"lora-ga {command}: error: needs datasets, rich, matplotlib, pyyaml, filelock, jinja2, which are not "
        'installed. Run pip install -e ".[cli]" in a checkout of LoRA-GA (it is not on PyPI yet).\n'
    )


@pytest.mark.parametrize("module", EXTRA)
def test_one_missing_package_is_enough_to_name_the_extra(module: str) -> None:
    run = run_without({module}, COMMAND, "merge", "a.safetensors")
    assert run.returncode == 2
    assert f"lora-ga merge: error: needs {EXTRA[module]}, which is not installed." in run.stderr


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_need_no_extra(argument: str) -> None:
    run = run_without(set(EXTRA), COMMAND, argument)
    assert (run.returncode, run.stderr) == (0, "")
    assert "lora-ga" in run.stdout


LIBRARY = """
import lora_ga
from peft import LoraConfig, PeftModel, get_peft_model
from toys import adapted, causal, llama

folder = sys.argv[1]
model = adapted(llama())
estimate = lora_ga.initialize(model, causal())
estimate.save(folder + "/estimate.safetensors")
model.save_pretrained(folder + "/adapter")
lora_ga.load(llama(), folder + "/adapter", is_trainable=True)
PeftModel.from_pretrained(llama(), folder + "/adapter")
lora_ga.compress_adapter(folder + "/adapter", folder + "/small", 2)

model = adapted(llama())
lora_ga.estimate_gradients(model, causal())
lora_ga.apply_estimate(model, lora_ga.GradientEstimate.load(folder + "/estimate.safetensors"))
"""

TRAINER = """
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

class Stream(IterableDataset):
    def __init__(self):
        self.rows = iter(rows)
    def __iter__(self):
        yield from self.rows

rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (32, 8))]
settings = TrainingArguments(folder, max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True)
callback = lora_ga.LoraGACallback()
Trainer(adapted(llama()), settings, train_dataset=rows, callbacks=[callback]).train()
assert callback.estimate is not None
try:
    Trainer(adapted(llama()), settings, train_dataset=Stream(), callbacks=[lora_ga.LoraGACallback()])
except ValueError as error:
    assert "The training data is a Stream" in str(error)
else:
    raise AssertionError("the stream was not refused")
"""


def test_the_library_and_its_callback_work_without_the_extra(tmp_path: Path) -> None:
    run = run_without(set(EXTRA) - ALWAYS_THERE, LIBRARY + TRAINER, str(tmp_path))
    assert run.returncode == 0, run.stderr


MODEL = ["--model", "m", "--task", "seq-cls"]


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["inspect", "runs/tikets"], "runs/tickets"),
        (["export", "runz/tickets", "--merge", "--output", "out"], "runs/tickets"),
        (["estimate", *MODEL, "--train_file", "row.csv", "--output", "out.safetensors"], "rows.csv"),
        (["inspect", "runs/other"], None),
    ],
)
def test_a_mistyped_path_is_answered_by_the_one_that_is_like_it(
    argv: list[object],
    meant: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error_of: Callable[[list[object]], str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/tickets", "m"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "rows.csv").touch()
    message = error_of(argv)
    assert f" Did you mean {meant}? " in message if meant else "Did you mean" not in message


# --- what is refused before torch is imported ------------------------------------------------------------------------

WRONG = [
    *([name, "--hlep"] for name in COMMANDS),
    ["train", "--lr", "1e-3"],
    ["train", "--model", "./none", "--task", "seq-cls", "--train_file", "rows.csv", "--output_dir", "out"],
    ["estimate", "--model", "m", "--task", "seq-cls", "--train_file", "rows.csv", "--output", "out.safetensors"],
    ["train", "--model", "m", "--task", "seq-cls", "--train_file", "there.csv", "--output_dir", "out"],
    ["compare", "runs/none"],
    ["inspect", "runs/none"],
    ["train", "--model", "me/m", "--task", "seq-cls", "--train_file", "there.csv", "--output_dir", "out"],
    ["report", "no-suite"],
    ["export", "runs/none", "--output", "out", "--merge"],
]


def test_wrong_options_and_missing_files_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "there.csv").write_text("review,kind\na,b\n")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    code = (
        f"import sys; from lora_ga.cli.main import main; print([main(argv) for argv in {WRONG!r}]);"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert run.stdout.splitlines() == [str([2] * len(WRONG)), "[]"]
    messages = run.stderr.splitlines()
    assert len(messages) == len(WRONG)
    assert "--lr: there is no such option. Here --lr is --learning_rate." in messages[len(COMMANDS)]
    assert "--model ./none: there is no folder ./none." in messages[len(COMMANDS) + 1]
    assert "there is no column 'text' (--text_column) and no column 'label'" in messages[len(COMMANDS) + 3]
