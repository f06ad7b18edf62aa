"""`lora-ga` calls its sub-commands and reports their errors."""

import importlib
import subprocess
import sys

import pytest

from lora_ga.cli import main as command
from lora_ga.cli.main import COMMANDS, main


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
        "lora-ga: error: 'trian' is not a command; the commands are train, estimate, merge, inspect, export, convert, "
        "compare, reproduce, report.\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_main_and_a_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(importlib.import_module(f"lora_ga.cli.{name}").main)
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"\n  lora-ga {name} " in capsys.readouterr().out


def test_user_errors_are_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--task", "seq-cls"]) == 2
    assert capsys.readouterr().err == (
        "lora-ga train: error: --model is missing. Give it on the command line or in the --config file.\n"
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
