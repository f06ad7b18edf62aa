"""Output of the commands: warnings, tables on the screen, and files that are not overwritten by accident."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lora_ga.experiments.tables.table import BLANK, Table
from lora_ga.files import write_atomically


def check_output(path: Path, suffix: str, *, overwrite: bool) -> None:
    """Refuses an output file that cannot or must not be written, before the work is done.

    Args:
        path: The file to write.
        suffix: The required suffix.
        overwrite: Whether it may exist.

    Raises:
        ValueError: It has another suffix, is a folder, or a file is in the place of its folder.
        FileExistsError: It exists and must not be replaced.
    """
    if path.suffix.lower() != suffix:
        raise ValueError(
            f"{path}: ends in {path.suffix or 'nothing'}, but what is written is {suffix}. Change the name."
        )
    if path.is_dir():
        raise ValueError(f"{path}: this is a folder. Name a file in it.")
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"{path}: cannot be made, {parent} is a file. Choose another place.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists already. Choose another name, or add --overwrite.")


def warn(message: str) -> None:
    """Prints a warning on stderr; the command goes on."""
    print(f"warning: {message}", file=sys.stderr)


def note(message: str) -> None:
    """Prints a note on stderr: what the command has chosen by itself."""
    print(f"note: {message}", file=sys.stderr)


def loading(what: str) -> None:
    """Prints a line on stderr before a wait: importing torch and Transformers takes seconds, reading a model more."""
    print(f"lora-ga: loading {what} ...", file=sys.stderr, flush=True)


def terminal() -> Console:
    """Returns a console on stdout. Output that is not to a terminal is 160 columns wide, so that tables fit."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def as_rich(table: Table) -> RichTable:
    """Returns the table for the terminal, without columns that are blank. Its texts are not read as markup."""
    rich = RichTable()
    shown = [
        column
        for column in range(len(table.headers))
        if column == 0 or not table.rows or any(row[column] not in {BLANK, ""} for row in table.rows)
    ]
    for column in shown:
        rich.add_column(Text(table.headers[column]), justify="right" if column else "left", overflow="fold")
    for number, row in enumerate(table.rows):
        rich.add_row(*(Text(row[column], "bold" if (number, column) in table.bold else "") for column in shown))
    return rich


def write_output(path: Path, content: bytes) -> None:
    """Writes a file atomically.

    Raises:
        ValueError: The operating system refuses; the message gives its reason.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}). Choose another place.") from error
