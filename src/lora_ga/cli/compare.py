"""`lora-ga compare`: shows finished runs as tables in the terminal and on one HTML page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from lora_ga.cli.parsing import config_parser, parse_with_config
from lora_ga.cli.terminal import as_rich, check_output, terminal, write_output
from lora_ga.experiments.comparison.runs import Comparison, compare_runs
from lora_ga.experiments.records.runs import load_run
from lora_ga.experiments.tables.runs import cost_table, summary_table
from lora_ga.experiments.tables.table import Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

EXAMPLE = """\
Compare finished runs: steps to a common training loss, final metrics, cost, loss curves.

  lora-ga compare runs/lora-ga runs/lora
  lora-ga compare runs/lora-ga-* runs/lora-* --output seeds.html --png seeds.png

A RUN is the --output_dir of a finished `lora-ga train`. Runs that differ only by their seed become one row, mean ±
standard error. The page is one file and loads nothing from the network."""


@dataclass
class CompareOptions:
    """The options of `lora-ga compare` other than the runs."""

    runs: list[str] = field(default_factory=list, metadata={"help": "more run folders (what a --config file may hold)"})
    output: str = field(default="compare.html", metadata={"help": "the page to write"})
    png: str | None = field(default=None, metadata={"help": "also write the picture of the training losses here"})
    target_loss: float | None = field(
        default=None,
        metadata={
            "help": "training loss to reach; the first step with it is shown for each run (default: the final loss of "
            "plain LoRA, or the largest final loss if there is no such run)"
        },
    )
    smooth: int | None = field(
        default=None,
        metadata={
            "help": "training losses are trailing means over this many steps (default: a twentieth of the longest run, "
            "but at least 10)"
        },
    )


def main(argv: list[str]) -> int:
    """Runs the command.

    Args:
        argv: The arguments after `compare`.

    Returns:
        0. Files are written only after everything was read and drawn.

    Raises:
        ValueError: An option or a folder is wrong, or a record is damaged.
    """
    parser = config_parser([CompareOptions], prog="lora-ga compare", description=EXAMPLE)
    parser.add_argument("folders", nargs="*", metavar="RUN", help="folder of a finished run")
    # Not a field of the options: a boolean field takes an optional value and would read a folder after it as the value.
    parser.add_argument("--overwrite", action="store_true", help="replace the page and the picture if they exist")
    parser.refuse_unknown(argv)
    namespace, stray = parser.parse_known_args(argv)
    if stray:
        raise ValueError(f"{' '.join(stray)}: not understood. Give all the run folders together, and then the options.")
    (options,) = parse_with_config(parser, argv)
    folders = [Path(folder) for folder in namespace.folders + options.runs]
    if not folders:
        raise ValueError("0 runs given, at least 1 is needed. `lora-ga compare --help` shows an example.")
    _refuse_twice(folders)
    runs = [load_run(folder) for folder in folders]
    page, png = Path(options.output), Path(options.png) if options.png else None
    check_output(page, ".html", overwrite=namespace.overwrite)
    if png:
        check_output(png, ".png", overwrite=namespace.overwrite)
    from lora_ga.experiments.pages.drawing import render  # slow to import, so after the checks above
    from lora_ga.experiments.pages.runs import page_html, summary_caption, training_figure

    comparison = compare_runs(runs, target_loss=options.target_loss, window=options.smooth)
    html = page_html(comparison).encode()
    if png:
        write_output(png, render(training_figure(comparison), "png"))
    write_output(page, html)
    _show(comparison, summary_caption(comparison), page, png)
    return 0


def _refuse_twice(folders: list[Path]) -> None:
    """Refuses a folder that is given twice, also in two spellings.

    Raises:
        ValueError: A folder is given twice.
    """
    seen: dict[Path, Path] = {}
    for folder in folders:
        first = seen.setdefault(folder.resolve(), folder)
        if first is not folder:
            raise ValueError(f"{folder}: given twice (first as {first}). Name each run once.")


def _show(comparison: Comparison, caption: str, page: Path, png: Path | None) -> None:
    console = terminal()
    for notice in comparison.notices:
        console.print(Text(f"Note: {notice}", style="yellow"))
    for table in (summary_table(comparison), cost_table(comparison)):
        console.print(_upright(table) if len(table.rows) <= 4 else as_rich(table))
    console.print(Text(caption, style="dim"))
    for file in (page, png) if png else (page,):
        console.print(Text(f"Written: {file.resolve()}"), soft_wrap=True)


def _upright(table: Table) -> RichTable:
    """Returns the table with a column for each run. With few runs it fits a terminal."""
    columns = list(zip(table.headers, *table.rows, strict=True))
    return as_rich(Table(list(columns[0]), [list(column) for column in columns[1:]]))
