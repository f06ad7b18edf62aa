"""What the benchmarks share: paths of the research data, and writing a record with versions and device."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_ga.experiments.suites.grid import commit

RESULTS = Path(__file__).parent / "results"


def about(also: Sequence[str] = ()) -> dict[str, Any]:
    """The command, commit, versions and device of a run. `also` names further packages whose versions are recorded."""
    names = ("torch", "transformers", "peft", "lora-ga", *also)
    return {
        "command": "python " + " ".join(["benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "python": platform.python_version(),
        "device": f"CPU, {os.cpu_count()} cores",
    }


def finish(name: str, record: dict[str, Any], also: Sequence[str] = ()) -> None:
    """Write the record to results/NAME.json, with what `about(also)` returns, and print it as the last line."""
    RESULTS.mkdir(exist_ok=True)
    whole = about(also) | record
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole))


def data(*parts: str) -> Path:
    """A path in the research data. Exits with a message if it does not exist."""
    root = os.environ.get("LORA_GA_DATA")
    if not root:
        sys.exit("Set LORA_GA_DATA to the folder of the research data (data/, models/) to run this benchmark.")
    path = Path(root).joinpath(*parts)
    if not path.exists():
        sys.exit(f"{path} does not exist. Set LORA_GA_DATA to a folder that contains it.")
    return path
