"""Tests the built package with old, pinned and new versions of the libraries, each row in an environment of its own.

python benchmarks/versions.py                       the rows of the record: `make test-versions`
python benchmarks/versions.py --frameworks          the frameworks' own tests alone: `make test-frameworks`
python benchmarks/versions.py --only "oldest libraries" --smoke      one row, tests/smoke.py alone: `make test-oldest`

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
    "LLaMA-Factory 0.9.5": ["llamafactory==0.9.5"],
    "Axolotl 0.19.0": ["axolotl==0.19.0"],
    "ms-swift 4.6.0": ["ms-swift==4.6.0"],
    "newest of all": ["peft", "transformers", "accelerate", "datasets", "trl"],
}
# All but the row that CI runs, whose libraries are those of "oldest of all" with a newer torch.
RECORDED = [row for row in ROWS if row != "oldest libraries"]
# Row → the name of its framework in the tests of tests/test_frameworks.py, which must run there.
FRAMEWORKS = {"LLaMA-Factory 0.9.5": "llamafactory", "Axolotl 0.19.0": "axolotl", "ms-swift 4.6.0": "ms_swift"}
# LLaMA-Factory requires these for pictures and sound. The package index has only builds that need CUDA libraries. With
# them the import of Transformers fails beside a torch for CPUs, so they are removed again.
REMOVED = ["torchvision", "torchaudio"]
TOOLS = ["pytest", "hypothesis", "bitsandbytes"]
CORE = ["test_initialize", "test_save_and_load", "test_peft_flow"]
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
    pip = [uv, "pip"] if uv else [str(python), "-m", "pip"]
    adding, removing = (["--python", str(python)],) * 2 if uv else (["--no-compile"], ["--yes"])
    subprocess.run([*pip, "install", "--quiet", *adding, *requirements], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", *removing, *REMOVED], check=True)
    return python


def run_tests(python: Path, report: Path, arguments: list[str]) -> list[tuple[str, str, str]]:
    """Run tests with an interpreter: the module, the outcome and the reason of each; no test if pytest broke off."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    environment.pop("PYTHONPATH", None)
    command = [str(python), "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", f"--junitxml={report}"]
    report.unlink(missing_ok=True)
    subprocess.run([*command, *arguments], cwd=ROOT, env=environment, check=False)
    cases = ElementTree.parse(report).iter("testcase") if report.exists() else []
    found = []
    for case in cases:
        notes = [part for part in case if part.tag in {"failure", "error", "skipped"}]
        outcome, reason = (notes[0].tag, notes[0].attrib["message"]) if notes else ("passed", "")
        found.append((case.attrib["classname"], outcome, reason))
    return found


def counted(cases: list[tuple[str, str, str]]) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, and the reasons of the latter."""
    outcomes = [outcome for _, outcome, _ in cases]
    passed, skipped = outcomes.count("passed"), outcomes.count("skipped")
    reasons = sorted({reason for _, outcome, reason in cases if outcome == "skipped"})
    return {"passed": passed, "failed": len(cases) - passed - skipped, "skipped": skipped, "reasons": reasons}


def versions(python: Path) -> dict[str, str]:
    """The versions of the libraries in an environment."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {PACKAGES}}}))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def tests_of(name: str, options: argparse.Namespace) -> list[str]:
    """The arguments of pytest for a row."""
    files = [] if options.frameworks else ["smoke"] if options.smoke else ["smoke", *CORE]
    if name in FRAMEWORKS and not options.smoke:
        files.append("test_frameworks")
    chosen = f"not test_frameworks or installed_{FRAMEWORKS.get(name)}"
    return [f"tests/{file}.py" for file in files] + ["-k", chosen]


def run_row(name: str, package: str, options: argparse.Namespace) -> dict[str, Any]:
    """Test one row: the versions found, and the outcomes of its situations, core tests and framework's tests."""
    torch = [] if any(requirement.startswith("torch=") for requirement in ROWS[name]) else [options.torch]
    environment = options.folder / "environment"
    try:
        python = install(environment, [package, *torch, *ROWS[name], *TOOLS])
        parts: dict[str, list[tuple[str, str, str]]] = {}
        for case in run_tests(python, options.folder / "report.xml", tests_of(name, options)):
            part = {"tests.smoke": "situations", "tests.test_frameworks": "framework"}.get(case[0], "core")
            parts.setdefault(part, []).append(case)
        return {"versions": versions(python)} | {part: counted(cases) for part, cases in parts.items()}
    finally:
        shutil.rmtree(environment, ignore_errors=True)


def passed(outcome: dict[str, Any]) -> bool:
    """Whether tests ran and none failed, and no situation and no test of a framework was skipped."""
    parts = {part: counts for part, counts in outcome.items() if part != "versions"}
    whole = all(counts["skipped"] == 0 for part, counts in parts.items() if part != "core")
    return bool(parts) and whole and not any(counts["failed"] for counts in parts.values())


def main() -> int:
    """Test the rows, write the record, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=ROWS, help="a row; may be repeated")
    parser.add_argument("--frameworks", action="store_true", help="the tests of frameworks alone, and no record")
    parser.add_argument("--smoke", action="store_true", help="tests/smoke.py alone, and no record")
    parser.add_argument("--torch", default="torch==2.13.0", help="the requirement of torch where a row has none")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "versions", help="for the environments")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    package, known = build(options.folder), json.loads(RECORD.read_text())["rows"] if RECORD.exists() else {}
    found = {}
    for name in options.only or (FRAMEWORKS if options.frameworks else RECORDED):
        found[name] = run_row(name, package, options)
        print(name, json.dumps(found[name]), flush=True)
        if name in RECORDED and not options.smoke and not options.frameworks:
            known[name] = found[name]
            record.finish("versions", {"rows": {row: known[row] for row in RECORDED if row in known}})
    failed = [name for name, outcome in found.items() if not passed(outcome)]
    print(f"{len(found) - len(failed)} passed, {len(failed)} failed" + "".join(f"\n{name} failed" for name in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
