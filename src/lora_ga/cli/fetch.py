"""`lora-ga fetch`: brings the texts, data sets and small models of the suites into one folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_ga.cli.options import option
from lora_ga.cli.parsing import OptionParser
from lora_ga.experiments.suites.sources import whole_file
from lora_ga.experiments.suites.spec import available, load_suite

USAGE = "lora-ga fetch [SUITE[/TASK] ...] [options]"

DESCRIPTION = """\
Fetch the texts, data sets and small models of the experiments from where their authors publish them, convert them, and
check each by its sha256. Without a name, fetch all that the tables of the README need. What cannot be reached is
listed, with its origin and its licence; bring it yourself, and name its folder by --originals.

example:
  lora-ga fetch stories-shakespeare --output data
  lora-ga fetch glue-minilm/cola glue-minilm/sst2 --output data --originals downloads

A file is written only when it is complete and has its sha256. Files that are there are left as they are.
"""

# What the tables of the README need.
DEFAULT = ("stories-shakespeare", "glue-minilm/cola", "glue-minilm/mrpc", "glue-minilm/sst2")


@dataclass
class FetchOptions:
    """Where to write, and where to read."""

    output: str = option("", "the data folder (default: that of LORA_GA_DATA, or data)")
    originals: str = option("", "folder with files that you have brought; it is searched before the network")
    mirror: str = option("", "address to use in place of https://raw.githubusercontent.com, from which most files come")


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: The arguments after `fetch`.

    Returns:
        0 if every file is there, 1 if some are wanted.

    Raises:
        ValueError: There is no such suite or task, the origin of its data is not recorded, or there is no folder of
            that name for --originals.
    """
    parser = OptionParser((FetchOptions,), prog="lora-ga fetch", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("names", metavar="SUITE[/TASK]", nargs="*", help="a suite, or one task of it")
    # Not a field of the options: a boolean field takes an optional value and would read a name after it as that value.
    parser.add_argument("--no_network", action="store_true", help="only list what is wanted, or use --originals")
    (options,), other = parser.parse(list(argv))
    from lora_ga.experiments.suites import origins
    from lora_ga.experiments.suites.sources import VARIABLE

    named = references(other.names or DEFAULT)
    wanted = origins.of_suites(named)
    folder = Path(options.output or os.environ.get(VARIABLE) or "data")
    originals = Path(options.originals) if options.originals else None
    if originals is not None and not originals.is_dir():
        raise ValueError(f"--originals {originals}: there is no such folder.")
    host = None if other.no_network else (options.mirror.rstrip("/") or origins.HOST)
    missing = 0
    for each in wanted:
        try:
            place = origins.bring(each, folder, originals, host)
            print(f"{each.path}: {place}", flush=True)
        except ValueError as error:
            missing += 1
            print(f"{each.path}: {error}", flush=True)
    origins.write_small_files(folder)
    for package, model in origins.PACKAGED.items():
        if any(each.partition(":")[2].startswith(f"{package}/") for each in named):
            print(f"{model.title} ({model.licence}): {origins.packaged_state(package)}")
    print(f"{len(wanted) - missing} of {len(wanted)} files are in {folder.resolve()}.")
    if missing:
        print("Bring the files that are wanted into one folder, and run the command again with --originals FOLDER.")
    if missing < len(wanted):
        print(f"Use the folder by: export {VARIABLE}={folder.resolve()}")
    return 1 if missing else 0


def references(names: Sequence[str]) -> list[str]:
    """The references to models and files of suites.

    Args:
        names: Suites, or SUITE/TASK.

    Returns:
        As in the suites' files.

    Raises:
        ValueError: There is no such suite or task.
    """
    found: list[str] = []
    for name in names:
        suite, _, task = name.partition("/")
        if suite not in available():
            raise ValueError(f"{suite}: there is no such suite; there are {', '.join(available())}.")
        tasks = load_suite(suite).tasks
        if task and task not in tasks:
            raise ValueError(f"{name}: the suite has no such task; it has {', '.join(tasks)}.")
        for each in [tasks[task]] if task else tasks.values():
            found += [each.model, *map(whole_file, each.files.values())]
    return found
