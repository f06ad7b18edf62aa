"""Tests the built package with old and new versions of the libraries, each row in an environment of its own.

python benchmarks/versions.py                       all rows, with a record: `make test-versions`
python benchmarks/versions.py --only "oldest libraries" --smoke      one row, tests/smoke.py alone: what CI runs
python benchmarks/versions.py --frameworks          the frameworks with their pins: `make test-frameworks`

A row's requirements and the package are installed by one command, which fails if they contradict each other. It uses
`uv` if that is installed, else pip. An environment takes up to 4 GB, that with torch 2.6 takes 7 GB (for x86-64 Linux
the package index has only its CUDA build). Each is removed at the end of its row.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import record
from lora_ga.version import MINIMUM

ROOT = Path(__file__).parent.parent
RECORD = record.RESULTS / "versions.json"
OLDEST = [f"{name}=={version}" for name, version in MINIMUM.items() if name != "torch"]
OLDEST += ["safetensors==0.5.0", "datasets==4.0.0", "trl==0.18.2"]
# Row → requirements. Without a torch among them the row gets the one that `--torch` names.
ROWS = {
    "oldest of all": [*OLDEST, f"torch=={MINIMUM['torch']}"],
    "oldest libraries": OLDEST,
    "pins of LLaMA-Factory 0.9.5": [
        "peft<=0.18.1,>=0.18.0",
        "transformers<=5.6.0,>=4.55.0",
        "accelerate<=1.11.0,>=1.3.0",
        "datasets<=4.0.0,>=2.16.0",
        "trl<=0.24.0,>=0.18.0",
    ],
    "pins of Axolotl 0.19.0": [
        "peft==0.20.0",
        "transformers==5.16.1",
        "accelerate==1.13.0",
        "datasets==4.8.4",
        "trl==1.9.0",
        "huggingface_hub==1.17.0",
    ],
    "pins of ms-swift 4.6.0": ["peft<0.21,>=0.11", "transformers<5.20.0", "datasets<4.8.5,>=4.0", "trl<1.0"],
    "newest of all": ["peft", "transformers", "accelerate", "datasets", "trl"],
}
# Framework → its requirement. The tests of tests/test_frameworks.py with the framework's name must run, not be skipped.
FRAMEWORKS = {"llamafactory": "llamafactory==0.9.5", "axolotl": "axolotl==0.19.0", "ms_swift": "ms-swift==4.6.0"}
TOOLS = ["pytest", "hypothesis", "bitsandbytes"]
CORE = ["test_initialize", "test_save_and_load", "test_callback", "test_peft_flow"]
PACKAGES = ["torch", "transformers", "peft", "accelerate", "trl", "datasets"]


def build(folder: Path) -> str:
    """Build the wheel, and return its requirement, with the extra `cli`."""
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("lora_ga-*.whl")
    return f"{wheel}[cli]"


def install(folder: Path, requirements: list[str]) -> Path:
    """Make an environment with the requirements, and return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    python, uv = folder / "bin" / "python", shutil.which("uv")
    command = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install", "--no-compile"]
    subprocess.run([*command, "--quiet", *requirements], check=True)
    return python


def run_tests(python: Path, report: Path, arguments: list[str]) -> dict[str, Any]:
    """Run tests with an interpreter.

    Returns:
        How many passed, failed and were skipped, and the reasons of the latter.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    environment.pop("PYTHONPATH", None)
    command = [python, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", f"--junitxml={report}"]
    report.unlink(missing_ok=True)
    subprocess.run([*command, *arguments], cwd=ROOT, env=environment, check=False)
    if not report.exists():
        return {"passed": 0, "failed": 1, "skipped": 0, "reasons": ["pytest wrote no report"]}
    (suite,) = ElementTree.parse(report).getroot()
    counts = {name: int(suite.attrib[name]) for name in ("tests", "skipped", "failures", "errors")}
    failed = counts["failures"] + counts["errors"]
    return {
        "passed": counts["tests"] - counts["skipped"] - failed,
        "failed": failed,
        "skipped": counts["skipped"],
        "reasons": sorted({reason.attrib["message"] for reason in suite.iter("skipped")}),
    }


def versions(python: Path) -> dict[str, str]:
    """The versions of the libraries in an environment."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {PACKAGES}}}))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_row(name: str, package: str, options: argparse.Namespace) -> dict[str, Any]:
    """Test one row: the versions found, and the outcomes of the smoke and the core tests."""
    wanted = ROWS[name] if name in ROWS else [FRAMEWORKS[name]]
    torch = [] if any(requirement.startswith("torch=") for requirement in wanted) else [options.torch]
    environment = options.folder / "environment"
    try:
        python = install(environment, [package, *torch, *wanted, *TOOLS])
        outcome: dict[str, Any] = {"versions": versions(python)}
        report = options.folder / "report.xml"
        if name in FRAMEWORKS:
            outcome["framework"] = run_tests(python, report, ["tests/test_frameworks.py", "-k", f"installed_{name}"])
            return outcome
        outcome["situations"] = run_tests(python, report, ["tests/smoke.py"])
        if not options.smoke:
            outcome["core"] = run_tests(python, report, [f"tests/{file}.py" for file in CORE])
        return outcome
    finally:
        shutil.rmtree(environment, ignore_errors=True)


def passed(outcome: dict[str, Any]) -> bool:
    """Whether nothing failed, and all situations and all tests of a framework ran."""
    whole = [outcome[part] for part in ("situations", "framework") if part in outcome]
    ran = all(counts["passed"] > 0 and counts["skipped"] == 0 for counts in whole)
    return ran and not any(counts["failed"] for part, counts in outcome.items() if part != "versions")


def main() -> int:
    """Test the rows, write the record of complete rows, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[*ROWS, *FRAMEWORKS], help="a row; may be repeated")
    parser.add_argument("--frameworks", action="store_true", help="the frameworks in place of the rows")
    parser.add_argument("--smoke", action="store_true", help="tests/smoke.py alone, and no record")
    parser.add_argument("--torch", default="torch==2.13.0", help="the requirement of torch where a row has none")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "versions", help="for the environments")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    package, known = build(options.folder), json.loads(RECORD.read_text())["rows"] if RECORD.exists() else {}
    found = {}
    for name in options.only or (FRAMEWORKS if options.frameworks else ROWS):
        found[name] = test_row(name, package, options)
        print(name, json.dumps(found[name]), flush=True)
        if name in ROWS and not options.smoke:
            known[name] = found[name]
            record.finish("versions", {"rows": {row: known[row] for row in ROWS if row in known}})
    failed = [name for name, outcome in found.items() if not passed(outcome)]
    print(f"{len(found) - len(failed)} passed, {len(failed)} failed" + "".join(f"\n{name} failed" for name in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
