"""Which columns of the data a task reads. Nothing slow is imported: a wrong name is refused before torch is there."""

import csv
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_ga.cli.options import DataOptions

MOST_BYTES = 10_000_000  # the largest file of JSON lines that is read to find its columns: in a tenth of a second


def uses_trl(task: str, options: DataOptions) -> bool:
    """Whether TRL's trainer trains on the data. Plain text and the other tasks do not need TRL."""
    return task == "causal-lm" and (options.prompt_column is not None or options.messages_column is not None)


def with_found_columns(task: str, options: DataOptions, columns: Sequence[str]) -> DataOptions:
    """The data options, with TRL's names of columns where the user names none and the data has no text column.

    Args:
        task: The task.
        options: The data options.
        columns: The columns of the training data.

    Returns:
        The options: as given, or with `messages_column`, or with `prompt_column` and `target_column`.
    """
    named = options.prompt_column is not None or options.messages_column is not None
    if task == "seq-cls" or named or (task == "causal-lm" and options.text_column in columns):
        return options
    if task == "causal-lm" and "messages" in columns:
        return replace(options, messages_column="messages")
    if {"prompt", "completion"} <= set(columns):
        return replace(options, prompt_column="prompt", target_column="completion")
    return options


def check_trl() -> None:
    """Refuses data that needs TRL if TRL is not installed.

    Raises:
        ValueError: It is not installed.
    """
    if importlib.util.find_spec("trl") is None:
        raise ValueError(
            "--messages_column and --prompt_column in causal-lm need TRL, which is not installed. Run "
            'pip install -e ".[trl]" in a checkout of LoRA-GA (it is not on PyPI yet). Plain text (--text_column) does '
            "not need TRL."
        )


def columns_of(task: str, options: DataOptions) -> dict[str, str]:
    """Finds the columns that the task reads.

    Args:
        task: The name of the task.
        options: The data options.

    Returns:
        Option name → column.

    Raises:
        ValueError: A column is given that the task does not read, or one is missing that it needs.
    """
    names = ["text_column", "text_pair_column", "label_column"]
    if task != "seq-cls":
        for name in ("text_pair_column", "label_column"):
            if getattr(options, name) != getattr(DataOptions, name):  # the default
                raise ValueError(f"--{name} belongs to --task seq-cls, but the task is {task}. Leave it out.")
        names = ["text_column"] if options.prompt_column is None else ["prompt_column", "target_column"]
    elif options.prompt_column is not None:
        raise ValueError("--prompt_column and --target_column do not belong to --task seq-cls. Leave them out.")
    if options.messages_column is not None and task != "causal-lm":
        raise ValueError(f"--messages_column belongs to --task causal-lm, but the task is {task}. Leave it out.")
    if uses_trl(task, options):
        check_trl()
        names = ["messages_column", "prompt_column", "target_column"]
    elif options.assistant_only_loss or options.chat_template is not None:
        name = "assistant_only_loss" if options.assistant_only_loss else "chat_template"
        raise ValueError(
            f"--{name} belongs to conversations in causal-lm, and no column with conversations is named. Name it by "
            f"--messages_column, or leave --{name} out."
        )
    if task == "seq2seq" and options.prompt_column is None:
        raise ValueError("--task seq2seq needs --prompt_column and --target_column, the source and the target text.")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def check_names(columns: Mapping[str, str], found: Sequence[str], source: str) -> None:
    """Refuses columns that do not exist.

    Args:
        columns: Option name → column name.
        found: The columns of the data.
        source: Where the rows come from, for the message.

    Raises:
        ValueError: Columns are missing. The message lists those that exist, and the options that name others.
    """
    missing = [f"{column!r} (--{option})" for option, column in columns.items() if column not in found]
    if not missing:
        return
    others = " Name them by these options." if len(missing) > 1 else " Name the right one by this option."
    if list(columns) == ["text_column"]:
        others = (
            " Name the one with the text by --text_column, conversations by --messages_column, or instructions and "
            "their answers by --prompt_column and --target_column."
        )
    raise ValueError(
        f"{source}: there is no column {' and no column '.join(missing)}; its columns are {', '.join(found)}.{others}"
    )


def check_files(task: str, options: DataOptions, eval_file: str | None = None) -> None:
    """Refuses local data files that lack a column, where that is quick to see.

    Args:
        task: The task.
        options: The data options.
        eval_file: The local evaluation file.

    Raises:
        ValueError: A column is missing, or `columns_of` refuses the options.
    """
    if options.train_file is None or (found := columns_in(Path(options.train_file))) is None:
        return
    wanted = columns_of(task, with_found_columns(task, options, found))
    check_names(wanted, found, options.train_file)
    if eval_file is not None and (found := columns_in(Path(eval_file))) is not None:
        check_names(wanted, found, eval_file)


def columns_in(file: Path) -> list[str] | None:
    """The columns of a data file; None if it is large, damaged, or of a kind that takes long to read."""
    if file.suffix == ".txt":
        return ["text"]
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if file.suffix in {".csv", ".tsv"}:
                rows = csv.reader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")
                return next((row for row in rows if row), None)
            if file.suffix == ".jsonl" and file.stat().st_size <= MOST_BYTES:
                # A row may lack a column that others have.
                return list(dict.fromkeys(name for line in lines if line.strip() for name in dict(json.loads(line))))
    except (ValueError, TypeError, csv.Error):  # reading the whole file says what is wrong with it
        pass
    return None
