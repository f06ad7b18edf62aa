"""`lora-ga report`: shows the records of a suite as tables and pictures, on an HTML page and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_ga.cli.options import option
from lora_ga.cli.parsing import OptionParser
from lora_ga.experiments.suites.spec import available, load_suite

USAGE = "lora-ga report SUITE [options]"

DESCRIPTION = """\
Draw a suite's results from its records: mean and standard error of every method on every task at its best learning
rate, steps to LoRA's loss, cost, loss curves, results at each rate. The report of an incomplete suite shows the
finished part and lists what is missing. Equal records give equal files.

example:
  lora-ga report stories-shakespeare --store runs/stories-shakespeare --output runs/report

Written: index.html, one page that loads nothing from the network, and README.md with its pictures.
"""


@dataclass
class ReportOptions:
    """The records and the output folder."""

    store: str = option("", "folder of the records (default: runs/SUITE)")
    output: str = option("", "folder to write to (default: runs/SUITE-report)")


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: The arguments after `report`.

    Returns:
        0. Files are written only after everything was read and drawn.

    Raises:
        ValueError: There is no such suite or store, or the store has no cell of the suite.
        FileExistsError: There is a report already, and --overwrite is not given.
    """
    parser = OptionParser((ReportOptions,), prog="lora-ga report", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("suite", metavar="SUITE", nargs="?", help="the name of a suite, or a .yaml file")
    # Not a field of the options: a boolean field takes an optional value and would read a suite after it as that value.
    parser.add_argument("--overwrite", action="store_true", help="replace an existing report")
    (options,), other = parser.parse(argv)
    if other.suite is None:
        raise ValueError(f"which suite? There are {', '.join(available())}; or give a .yaml file.")
    suite = load_suite(other.suite)
    store, folder = Path(options.store or f"runs/{suite.name}"), Path(options.output or f"runs/{suite.name}-report")
    check_store(store, other.suite)
    from lora_ga.cli.terminal import as_rich, check_output, terminal, write_output
    from lora_ga.experiments.pages import suites as report
    from lora_ga.experiments.records.store import Store
    from lora_ga.experiments.tables.table import Table

    check_output(folder / report.HTML_NAME, ".html", overwrite=other.overwrite)
    check_output(folder / report.README_NAME, ".md", overwrite=other.overwrite)
    records = Store(store).records()
    if not records:
        raise ValueError(f"{store}: an empty store. {how_to_fill(other.suite, store)}")
    document = report.suite_document(suite, records)
    files = report.report_files(document)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_output(folder / name, content)
    for notice in document.notices:
        print(f"Note: {notice}")
    table = next(block for section in document.sections for block in section.blocks if isinstance(block, Table))
    terminal().print(as_rich(table))
    print("Mean ± standard error over the seeds, and in parentheses the best learning rate.")
    print(f"Written: {(folder / report.HTML_NAME).resolve()} and {report.README_NAME}")
    return 0


def check_store(store: Path, suite: str) -> None:
    """Refuses a folder that `lora-ga reproduce` has not filled, and says how a store is made.

    Raises:
        ValueError: There is no folder, it is a run of `lora-ga train`, or it is no store.
    """
    if not store.is_dir():
        raise ValueError(f"{store}: there is no such store. {how_to_fill(suite, store)}")
    if (store / "run.json").is_file():
        raise ValueError(f"{store}: a run of `lora-ga train`, not a store. `lora-ga compare {store}` shows it.")
    if not any(store.glob("*.json*")):
        raise ValueError(f"{store}: this folder is no store of runs. {how_to_fill(suite, store)}")


def how_to_fill(suite: str, store: Path) -> str:
    """How to fill a store, for messages."""
    return f"Fill it by `lora-ga reproduce {suite} --store {store}`, or name another store by --store."
