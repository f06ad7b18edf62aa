"""`lora-ga reproduce`: runs the cells of a suite of experiments that have not run yet."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lora_ga.cli.options import at_least, option
from lora_ga.cli.parsing import OptionParser
from lora_ga.experiments.suites.spec import Suite, available, load_suite

USAGE = "lora-ga reproduce SUITE [options]"

DESCRIPTION = """\
Run a suite of experiments: every method on every task at its best learning rate, with several seeds. Each run leaves
one record in the store and is not run again, so an interrupted suite resumes when the command is repeated. A grid of
rates grows until the best rate, chosen on a split of the training data, is not at its edge.

example:
  lora-ga reproduce --list
  lora-ga reproduce stories-shakespeare --dry_run
  lora-ga reproduce stories-shakespeare --only "babyllama105/lora*" --workers 2
"""


# Not fields of the options: a boolean field takes an optional value and would read a suite after it as that value.
FLAGS = {
    "list": "list the suites",
    "dry_run": "show the grid and its cost and check data and models, without running anything",
    "resume": "run only missing cells; this is always so, and the option makes it explicit",
    "retry": "run failed cells again",
}


@dataclass
class ReproduceOptions:
    """The cells to run, and where."""

    store: str = option("", "folder of the records (default: runs/SUITE)")
    hub: str = option("", "folder with copies of hub models and data sets, DIR/NAME: for machines without a network")
    only: list[str] = field(
        default_factory=list,
        metadata={"help": "lines to run: method, task or the two joined by /, with * for anything (default: all)"},
    )
    workers: int = option(1, "processes, each with one thread")
    stack: int = option(1, "runs of one task that a process trains at once over one base model; for a GPU")
    device: str = option("cpu", "where to compute: cpu, cuda, cuda:1")

    def __post_init__(self) -> None:
        at_least(self, workers=1, stack=1)


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: The arguments after `reproduce`.

    Returns:
        0 if all cells have run; 1 if a cell failed.

    Raises:
        ValueError: A suite, line, folder or device does not exist, or the store cannot be used.
    """
    parser = OptionParser((ReproduceOptions,), prog="lora-ga reproduce", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("suite", metavar="SUITE", nargs="?", help="the name of a suite, or a .yaml file")
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", action="store_true", help=text)
    (options,), other = parser.parse(argv)
    if other.list:
        return show_suites()
    if other.suite is None:
        raise ValueError(f"which suite? There are {', '.join(available())}; or give a .yaml file.")
    suite = load_suite(other.suite)
    lines = chosen(suite, options.only)
    from lora_ga.experiments.records.store import Store
    from lora_ga.experiments.suites.sources import Sources

    if options.hub and not Path(options.hub).is_dir():
        raise ValueError(f"--hub {options.hub}: there is no such folder.")
    check_device(options.device)
    sources = replace(Sources.from_environment(), hub=options.hub or None, use_hub=not other.dry_run)
    store = Store(options.store or Path("runs") / suite.name)
    notes = checked(suite, lines, sources)
    if other.dry_run:
        return show_plan(suite, lines, store, notes, options)
    from lora_ga.experiments.suites.grid import commit, run_grid
    from lora_ga.experiments.suites.run import Place

    place = Place(sources, options.device, commit(), str(store.unjudged()))
    ran: set[str] = set()

    def note(record: dict[str, Any], left: int) -> None:
        ran.add(record["digest"])
        tell(record, left)

    with store.locked():
        records = run_grid(
            suite, lines, store, place, workers=options.workers, stack=options.stack, retry=other.retry, on_record=note
        )
    return show_results(suite, lines, records, ran)


def check_device(name: str) -> None:
    """Refuses a device that torch cannot compute on here. Otherwise each cell would fail on it.

    Args:
        name: A torch device, as --device gives it.

    Raises:
        ValueError: There is no such device; the message lists those that there are.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:  # torch knows no such name
        found = False
    else:
        found = (device.index or 0) < device_count(device.type)
    if found:
        return
    known = [f"{kind}:{number}" for kind in ("cuda", "xpu", "mps") for number in range(device_count(kind))]
    if known:
        there = f"It finds {', '.join(['cpu', *known])}. Give one of these."
    else:
        there = "It finds only cpu. Leave --device out, or run on a machine with a GPU and a torch built for it."
    raise ValueError(f"--device {name}: torch {torch.__version__} finds no such device on this machine. {there}")


def device_count(kind: str) -> int:
    """The number of devices of a kind, as "cpu" or "cuda", that torch can compute on here."""
    import torch

    module: Any = getattr(torch, kind, None)  # torch.cpu, torch.cuda and others; "meta" has none and computes nothing
    if not hasattr(module, "device_count") or not getattr(module, "is_available", lambda: True)():
        return 0
    return int(module.device_count())


def chosen(suite: Suite, patterns: Sequence[str]) -> list[tuple[str, str]]:
    """The lines that match a pattern.

    Args:
        suite: The suite.
        patterns: Each a task, a method's label, task/label or label/task, with * and ?.

    Returns:
        (task, label), in the suite's order.

    Raises:
        ValueError: A pattern matches no line.
    """
    lines = suite.lines()
    kept = set()
    for pattern in patterns:
        named = {
            (task, label)
            for task, label in lines
            if any(fnmatchcase(name, pattern) for name in (task, label, f"{task}/{label}", f"{label}/{task}"))
        }
        if not named:
            raise ValueError(
                f"--only {pattern}: names no line of {suite.name}. Its tasks are {', '.join(suite.tasks)}; its methods "
                f"are {', '.join(suite.methods)}; a line is task/method."
            )
        kept |= named
    return [line for line in lines if line in kept] if patterns else lines


def checked(suite: Suite, lines: Sequence[tuple[str, str]], sources: Any) -> dict[str, list[str]]:
    """Checks every model, file, method and option before anything runs; returns task → findings."""
    from lora_ga.experiments.methods import complete
    from lora_ga.experiments.tasks import check

    for label in dict.fromkeys(label for _, label in lines):
        variant = suite.methods[label]
        try:
            complete(variant.method, variant.options)
        except ValueError as error:
            raise ValueError(f"{suite.name}: methods.{label}: {error}") from error
    found = {}
    for task in dict.fromkeys(task for task, _ in lines):
        try:
            found[task] = check(suite.tasks[task], sources)
        except ValueError as error:
            raise ValueError(f"{suite.name}: tasks.{task}: {error}") from error
    return found


def show_suites() -> int:
    """Prints the names and titles of the suites."""
    for name in available():
        print(f"{name:<22} {load_suite(name).title}")
    return 0


def show_plan(
    suite: Suite,
    lines: Sequence[tuple[str, str]],
    store: Any,
    notes: dict[str, list[str]],
    options: ReproduceOptions,
) -> int:
    """Prints the grid and its estimated cost."""
    from lora_ga.cli.terminal import as_rich, terminal
    from lora_ga.experiments.suites.cells import best_rate, missing, wanted
    from lora_ga.experiments.suites.grid import expected_seconds
    from lora_ga.experiments.tables.table import Table

    records = store.records()
    for task, found in notes.items():
        print(f"{task}: {'; '.join(found)}; metric {suite.tasks[task].metric}")
    rows = []
    later: list[tuple[tuple[str, str], int]] = []
    for task, label in lines:
        cells = wanted(suite, task, label, records)
        known = best_rate(suite, task, label, records) is not None
        seeds = 0 if known else suite.seeds - (suite.methods[label].rate_of is None)
        later.append(((task, label), seeds))
        rates = sorted({f"{cell.learning_rate:g}" for cell in cells if cell.label == label}, key=float)
        done = sum(cell.digest() in records for cell in cells)
        rows.append([f"{task}/{label}", ", ".join(rates) or f"of {suite.methods[label].rate_of}", str(done)])
        rows[-1].append(str(len(cells) - done + seeds))
    terminal().print(as_rich(Table(["line", "learning rates", "cells done", "cells left"], rows)))
    todo = missing(suite, lines, records)
    by_line = {line: cell for line in lines for cell in wanted(suite, *line, records)}
    extra = [by_line[line] for line, count in later for _ in range(count) if line in by_line]
    seconds, workers = expected_seconds(suite, [*todo, *extra], records), options.workers
    print(
        f"{len(todo) + len(extra)} cells left, more if a grid of rates grows; "
        f"about {seconds / 3600:.1f} core-hours, "
        f"{seconds / workers / 3600:.1f} hours with {workers} worker{'s' * (workers > 1)}. Store: {store.folder}"
    )
    if options.stack > 1:
        print("The hours are those of runs that train alone. What --stack saves is not known before, and not counted.")
    return 0


def tell(record: dict[str, Any], left: int) -> None:
    """Prints one line about a finished run."""
    what = f"{record['task']}/{record['label']} lr {record['learning_rate']:g} seed {record['seed']}"
    if record["status"] != "done":
        found = f"{record['status']}: {record['reason']}"
    else:
        found = "  ".join(
            f"{split} " + " ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            for split, metrics in record["metrics"].items()
        )
    print(f"{what}: {found}  ({record['seconds'].get('total', 0):.0f} s; {left} known to be left)", flush=True)


def show_results(suite: Suite, lines: Sequence[tuple[str, str]], records: dict[str, Any], ran: Collection[str]) -> int:
    """Prints the best rate of each line and its mean over the seeds, and how many failed cells were not run again.

    Args:
        suite: The suite.
        lines: The lines to show.
        records: All records of the store, by digest.
        ran: The digests of the cells that this command has run.

    Returns:
        0; 1 if a cell failed, now or before.
    """
    from lora_ga.cli.terminal import as_rich, terminal
    from lora_ga.experiments.comparison.suites import results
    from lora_ga.experiments.suites.cells import wanted
    from lora_ga.experiments.tables.suites import reported_cell
    from lora_ga.experiments.tables.table import BLANK, Table

    by_line = {(each.task, each.label): each for each in results(suite, records)}
    rows, failed, waiting = [], set(), []
    for task, label in lines:
        metric, found = suite.tasks[task].metric, by_line[task, label]
        cells = {cell.digest() for cell in wanted(suite, task, label, records)}
        failed |= {digest for digest in cells if records[digest]["status"] == "failed"}
        if found.rate is None:
            shown = BLANK
            waiting += [] if found.none_trains else [f"{task}/{label}"]
        else:
            shown = f"{found.rate:g}" + ("" if found.bracketed else " (at the edge)")
        ended = f"{len(found.runs)} of {suite.seeds}"
        rows.append([f"{task}/{label}", shown, f"{metric} {reported_cell(found, metric)}", ended])
    terminal().print(as_rich(Table(["line", "best rate", "reported", "runs that ended well"], rows)))
    if waiting:
        print(f"The search for a rate waits for cells that failed: {', '.join(waiting)}. --retry runs them again.")
    if count := len(failed - set(ran)):
        one = count == 1
        print(
            f"{count} cell{'s' * (not one)} failed before and {'was' if one else 'were'} not run again; "
            f"--retry runs {'it' if one else 'them'}."
        )
    return 1 if failed else 0
