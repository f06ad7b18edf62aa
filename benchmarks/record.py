"""What every benchmark here shares: where its record goes and what it says about the machine."""

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
    """The command, commit, versions (of the packages in `also` too) and device of a run."""
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
    """Keep the record in results/, with the versions of the packages in `also`, and print it as the last line."""
    RESULTS.mkdir(exist_ok=True)
    whole = about(also) | record
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole))


def data(*parts: str) -> Path:
    """A path in the research data, or the end of the program with the reason."""
    root = os.environ.get("LORA_GA_DATA")
    if not root:
        sys.exit("Set LORA_GA_DATA to the folder of the research data (data/, models/) to run this benchmark.")
    path = Path(root).joinpath(*parts)
    if not path.exists():
        sys.exit(f"{path} is not there.")
    return path
