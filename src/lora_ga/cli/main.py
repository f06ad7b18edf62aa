"""`lora-ga COMMAND ...`: runs the sub-command and prints user errors as one line, with exit code 2."""

import errno
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version

# Name -> help text. The module of that name in this package has `main(argv) -> int`. It is imported when it is called,
# so that `lora-ga --help` does not wait for torch.
COMMANDS = {
    "train": "fine-tune a model with LoRA-GA, plain LoRA or full fine-tuning",
    "estimate": "estimate the gradient of every adapted layer and write it to a file",
    "rate": "compute LoRA-GA's learning rate from one that is known for LoRA or for full fine-tuning",
    "merge": "add up estimates made on different data or machines",
    "inspect": "show what an estimate file holds, layer by layer",
    "export": "turn a trained adapter into a smaller one, a merged model, or one for vLLM and other programs",
    "convert": "turn an adapter trained on a changed base (older LoRA-GA) into one for the original base",
    "compare": "compare finished runs on one HTML page",
    "reproduce": "run a suite of experiments: every method at its best learning rate",
    "fetch": "fetch the texts, data sets and small models of the suites",
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

# Commands that people start in several processes, all of which would write the same files: what they can do instead.
SEVERAL = {
    "train": ", or call lora_ga.initialize in your training script",
    "estimate": ", or divide the batches by --shard and give each process an --output of its own, with WORLD_SIZE=1",
    "reproduce": ", and give it --workers",
}
# How safetensors and torch.save say that a disk is full.
FULL = ("No space left on device", "PytorchStreamWriter failed writing", "inline_container.cc")

_HELP = """\
usage: lora-ga COMMAND [options]

Start a LoRA adapter in the direction of full fine-tuning (LoRA-GA), train it, and save it as plain LoRA.

commands:
{commands}

  lora-ga COMMAND --help   explains a command, with an example
  lora-ga --version        prints the version

For a traceback instead of a one-line error, set LORA_GA_DEBUG=1."""


def main(argv: list[str] | None = None) -> int:
    """Runs the sub-command in `argv`.

    Args:
        argv: The arguments; None reads those of the process.

    Returns:
        The exit code: 0 for success, 2 for a user error (one message on stderr), 130 for an interruption.
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
    """Runs one sub-command. ValueError and OSError are user errors; any other exception is a bug."""
    missing = [package for module, package in EXTRA.items() if importlib.util.find_spec(module) is None]
    if missing:
        return _refuse(
            f"lora-ga {command}",
            f"needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. "
            'Run pip install -e ".[cli]" in a checkout of LoRA-GA (it is not on PyPI yet).',
        )
    count = os.environ.get("WORLD_SIZE", "1")
    if count not in {"", "0", "1"} and command in SEVERAL and not {"-h", "--help"}.intersection(argv):
        return _refuse(
            f"lora-ga {command}",
            f"runs in one process, but WORLD_SIZE is {count}. Start it without torchrun or accelerate"
            f"{SEVERAL[command]}. Where it is one process all the same, set WORLD_SIZE=1.",
        )
    debug = os.environ.get("LORA_GA_DEBUG", "") not in {"", "0"}
    # PEFT 0.21 and TRL 1.16 use names that Transformers 5.23 and 5.24 have renamed.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    formatted, shown = warnings.formatwarning, _shown(command)
    if not debug:
        # Without the place in the code, which is none of the user's.
        warnings.formatwarning = lambda message, category, *rest, **named: f"warning: {shown(str(message))}\n"
    try:
        return importlib.import_module(f"lora_ga.cli.{command}").main(argv)
    except (ValueError, OSError) as error:
        if debug:
            raise
        said = _full_disk(error) or shown("\n".join([str(error), *getattr(error, "__notes__", [])]))
        return _refuse(f"lora-ga {command}", said)
    except KeyboardInterrupt as error:
        if debug:
            raise
        print(f"\nlora-ga {command}: interrupted{'.' * bool(error.args)}", *error.args, file=sys.stderr)
        return 130
    except Exception as error:
        if debug or (text := _full_disk(error)) is None:
            raise
        return _refuse(f"lora-ga {command}", text)
    finally:
        warnings.formatwarning = formatted


def _full_disk(error: Exception) -> str | None:
    """The message where a disk is full; None for another error. Each library says it in a type of its own."""
    if isinstance(error, OSError):  # one with another text is ours, and says what to do
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) and error.strerror == os.strerror(error.errno)
    else:
        full = any(text in str(error) for text in FULL)
    if not full:
        return None
    return (
        f"the disk is full ({str(error).splitlines()[0]}). Files that were finished are whole. Make room, or give "
        "another folder, and call again; `lora-ga train --resume` goes on from the last checkpoint."
    )


def _shown(command: str) -> Callable[[str], str]:
    """How a command shows a message of the library."""
    if command not in {"train", "estimate"}:  # these have the library's settings as options
        return str
    from lora_ga.cli.settings import in_options

    return in_options


def _refuse(prog: str, message: str) -> int:
    print(f"{prog}: error: {message}", file=sys.stderr)
    return 2
