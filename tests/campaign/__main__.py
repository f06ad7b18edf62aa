"""Runs the campaign: python -m campaign [--seed N] [--part PART] [--only CASE] [--short] [--record FILE].

Every case depends on the seed, the part and its number alone. A case that goes wrong prints the
command that repeats it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("lora-ga", "torch", "transformers", "peft", "safetensors")
# Part → faults to try, in the whole campaign and in the short one.
PARTS = {
    "kills": (200, 8),
    "disks": (40, 6),
    "bytes": (12000, 400),
    "deaths": (48, 1),
    "ranks": (10, 1),
    "numbers": (120, 12),
}


def run_part(name: str, wanted: int, seed: int, only: int | None) -> dict[str, Any]:
    """Run the cases of a part until enough faults were tried.

    Returns:
        How many were tried, survived, refused and lost, and what was lost.
    """
    part = importlib.import_module(f"campaign.{name}")
    total, lost = {"cases": 0, "tried": 0, "survived": 0, "refused": 0}, []
    began, shown = time.monotonic(), 0.0
    while total["tried"] < wanted:
        number = total["cases"] if only is None else only
        found = part.case(number, random.Random(f"{seed} {name} {number}"))
        for key in ("tried", "survived", "refused"):
            total[key] += getattr(found, key)
        total["cases"] += 1
        if found.lost:
            lost.append(f"case {number}: {found.lost}")
            print(f"\n{name}: {found.lost}")
            print(f"  repeat it: make campaign ARGUMENTS='--seed {seed} --part {name} --only {number}'", flush=True)
        if only is not None:
            break
        if time.monotonic() - shown > 1:
            shown = time.monotonic()
            print(f"\r{name}: {total['tried']} of {wanted} faults, {len(lost)} lost ", end="", flush=True)
    seconds = round(time.monotonic() - began, 1)
    numbers = f"{total['tried']} faults, {total['survived']} survived, {total['refused']} refused, {len(lost)} lost"
    print(f"\r{name}: {numbers} ({seconds:.0f} s)", flush=True)
    return {**total, "lost": lost, "seconds": seconds}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign.

    Returns:
        0 if nothing was lost, otherwise 1.
    """
    parser = argparse.ArgumentParser(prog="python -m campaign", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given several times")
    parser.add_argument("--only", type=int, help="only this case of the part")
    parser.add_argument("--short", action="store_true", help="a few cases of each part")
    parser.add_argument("--count", type=int, help="faults to try in each part")
    parser.add_argument("--record", type=Path, help="a JSON file to which the numbers are added")
    options = parser.parse_args(argv)
    print(f"seed {options.seed}")
    import torch

    from campaign.commands import make_world
    from campaign.faults import forked, last_line

    torch.set_num_threads(1)
    record, home = options.record and options.record.resolve(), Path.cwd()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            if forked(make_world, Path("log")):
                raise RuntimeError(f"the world could not be made: {last_line(Path('log'))}")
            for name in options.part or PARTS:
                wanted = options.count or PARTS[name][options.short]
                found[name] = run_part(name, wanted, options.seed, options.only)
        finally:
            os.chdir(home)
    if record:
        versions = {name: metadata.version(name) for name in PACKAGES} | {"python": sys.version.split()[0]}
        earlier = json.loads(record.read_text())["runs"] if record.exists() else []
        runs = [*earlier, {"seed": options.seed, "versions": versions, "parts": found}]
        record.write_text(json.dumps({"command": "make campaign", "runs": runs}, indent=1) + "\n")
    return int(any(part["lost"] for part in found.values()))


if __name__ == "__main__":
    sys.exit(main())
