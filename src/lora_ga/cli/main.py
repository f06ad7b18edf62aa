"""`lora-ga COMMAND ...`: finds the sub-command and turns what a user did wrong into one line and exit code 2."""

import importlib
import importlib.util
import os
import sys
import warnings
from importlib.metadata import version

# name -> what it does. The module of the same name in this package has `main(argv) -> int`; it is imported when it is
# asked for, so that `lora-ga --help` does not wait for torch.
COMMANDS = {
    "train": "fine-tune a model with LoRA-GA, plain LoRA or full fine-tuning",
    "estimate": "estimate the gradient of every adapted layer and write it to a file",
    "merge": "add up estimates made on different data or machines",
    "inspect": "show what an estimate file holds, layer by layer",
    "export": "make a smaller adapter or a full merged model of a trained adapter",
    "convert": "turn an old LoRA-GA run, trained on a changed base, into an adapter for the original base",
    "compare": "put finished runs side by side on one HTML page",
    "reproduce": "run a suite of experiments: every method at its own best learning rate",
    "report": "draw a suite's results from its records: tables, pictures, one HTML page",
}

# Module -> package: what the extra `cli` of pyproject.toml installs. A library-only installation lacks some of them.
EXTRA = {
    "datasets": "datasets",
    "rich": "rich",
    "matplotlib": "matplotlib",
    "yaml": "pyyaml",
    "filelock": "filelock",
    "jinja2": "jinja2",
}

_HELP = """\
usage: lora-ga COMMAND [options]

Start a LoRA adapter where full fine-tuning would go (LoRA-GA), train it, and hand it on as plain LoRA.

commands:
{commands}

  lora-ga COMMAND --help   explains a command, with an example
  lora-ga --version        prints the version

For a traceback instead of a one-line error, set LORA_GA_DEBUG=1."""


def main(argv: list[str] | None = None) -> int:
    """Runs the sub-command in `argv` (default: the process's own arguments).

    Returns:
        The exit code: 0 done, 2 something in the request is wrong (one message on stderr), 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in {"-h", "--help", "help"}:
        print(_HELP.format(commands="\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())))
        return 0 if argv else 2
    if argv[0] in {"-V", "--version"}:
        print(f"lora-ga {version('lora-ga')}")
        return 0
    if argv[0] not in COMMANDS:
        return _refuse("lora-ga", f"{argv[0]!r} is not a command; the commands are {', '.join(COMMANDS)}.")
    return _call(argv[0], argv[1:])


def _call(command: str, argv: list[str]) -> int:
    """Runs one sub-command. Its ValueError and OSError are the user's to mend, all else is a bug."""
    missing = [package for module, package in EXTRA.items() if importlib.util.find_spec(module) is None]
    if missing:
        return _refuse(
            f"lora-ga {command}",
            f"needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. "
            'Run pip install "lora-ga[cli]", or in a checkout pip install -e ".[cli]".',
        )
    debug = os.environ.get("LORA_GA_DEBUG", "") not in {"", "0"}
    # PEFT reads an attribute that Transformers 5.23 has renamed.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    try:
        return importlib.import_module(f"lora_ga.cli.{command}").main(argv)
    except (ValueError, OSError) as error:
        if debug:
            raise
        return _refuse(f"lora-ga {command}", str(error))
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"\nlora-ga {command}: interrupted", file=sys.stderr)
        return 130


def _refuse(prog: str, message: str) -> int:
    print(f"{prog}: error: {message}", file=sys.stderr)
    return 2
