"""Prepares a store for publication: python -m lora_ga.experiments.records.compact FOLDER.

The folder has one file for each suite afterwards; see `Store.compact`. Old stores, with one JSON file for each record,
are converted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lora_ga.experiments.records.store import Store


def main(argv: Sequence[str] | None = None) -> None:
    """Compacts the store in a folder, and prints its files.

    Args:
        argv: The arguments; by default those of the command line.

    Raises:
        ValueError: The folder does not exist or is not a store.
    """
    parser = argparse.ArgumentParser(prog="python -m lora_ga.experiments.records.compact", description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder of the store")
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder. Give the folder of a store.")
    with Store(folder).locked() as store:
        for path in store.compact():
            print(f"{path} ({path.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
