"""A fixed sample of small changes (mutants) of the code: which of them the tests notice.

    python tests/mutants.py --count 300 --record FILE

Each mutant is one change in a copy of src/: another operator, comparison or constant, a condition that is turned round,
a result that is lost. The tests of its package run on it until the first failure. A mutant that no test notices either
changes nothing that matters, or shows a test that is missing. The sample depends on the seed and the code alone.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Package → the test files that run on its mutants, quickest first.
TESTS = {
    "linalg": ["test_linalg", "test_estimate"],
    "layers": ["test_factors", "test_probe", "test_kinds", "test_structure", "test_estimate"],
    "gradients": [
        "test_estimate",
        "test_loss",
        "test_checkpoint",
        "test_hooks",
        "test_untouched",
        "test_probe",
        "test_files",
    ],
    "adapter": ["test_initialize", "test_directions", "test_save_and_load", "test_structure", "test_edge_cases"],
}
OPERATORS: dict[type[ast.AST], str] = {
    **{ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "/", ast.Mod: "*"},
    **{ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not"},
    **{ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in", ast.And: "or", ast.Or: "and"},
}


def changes(tree: ast.AST, text: str) -> Iterator[tuple[ast.AST, str]]:
    """Every change of a file: a node, and the text that replaces it."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp)):
            yield node.test, f"(not ({ast.get_source_segment(text, node.test)}))"
        elif isinstance(node, ast.Return) and node.value is not None:
            yield node.value, "None"
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node, "None"
        elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int)):
            yield node, str(not node.value if isinstance(node.value, bool) else node.value + 1)
        elif new := _operation(node, text):
            yield node, new


def _operation(node: ast.AST, text: str) -> str:
    """The operation with another operator; "" if the node is none."""

    def source(part: ast.AST) -> str:
        return f"({ast.get_source_segment(text, part)})"

    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return f"{source(node.left)} {OPERATORS[type(node.op)]} {source(node.right)}"
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return f"{source(node.left)} {OPERATORS[type(node.ops[0])]} {source(node.comparators[0])}"
    if isinstance(node, ast.BoolOp):
        return f" {OPERATORS[type(node.op)]} ".join(map(source, node.values))
    return source(node.operand) if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) else ""


def mutants() -> list[dict[str, Any]]:
    """All mutants of the packages, in the order of their places."""
    found = []
    for package in TESTS:
        for path in sorted((ROOT / "src" / "lora_ga" / package).glob("*.py")):
            text = path.read_text()
            starts = [0]
            for line in text.encode().splitlines(keepends=True):
                starts.append(starts[-1] + len(line))
            for node, new in changes(ast.parse(text), text):
                place: Any = node
                begin, end = (
                    starts[line - 1] + column
                    for line, column in ((place.lineno, place.col_offset), (place.end_lineno, place.end_col_offset))
                )
                file = path.relative_to(ROOT / "src").as_posix()
                old = text.encode()[begin:end].decode()
                found.append({"file": file, "line": place.lineno, "at": [begin, end], "old": old, "new": new})
    return found


def outcome(mutant: dict[str, Any], limit: float) -> str:
    """Run the tests on a mutant: "killed", "survived" or "killed by the time limit"."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(ROOT / "src", Path(folder) / "src"))
        content = (copy / mutant["file"]).read_bytes()
        begin, end = mutant["at"]
        (copy / mutant["file"]).write_bytes(content[:begin] + mutant["new"].encode() + content[end:])
        pid = os.fork()
        if pid == 0:
            _test(copy, mutant["file"].split("/")[1], Path(folder) / "tmp")
        began = time.monotonic()
        while not (found := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() - began > limit:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return "killed by the time limit"
            time.sleep(0.05)
    return "survived" if os.waitstatus_to_exitcode(found[1]) == 0 else "killed"


def _test(source: Path, package: str, folder: Path) -> None:
    """Run the tests of a package on a copy of the code, and end this process with their exit code."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    os.chdir(ROOT)
    sys.path[:0] = [str(source), *(str(ROOT / name) for name in ("tests", "examples", "benchmarks"))]
    import pytest

    files = [f"tests/{name}.py" for name in TESTS[package]]
    os._exit(
        pytest.main(["-x", "-q", "--quick", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={folder}", *files])
    )


def main() -> None:
    """Try the sample."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant of the sample to try")
    parser.add_argument("--limit", type=float, default=600, help="seconds for the tests of one mutant")
    parser.add_argument("--record", type=Path, help="a JSON file for the results, written after each mutant")
    parser.add_argument("--list", action="store_true", help="print the sample")
    options = parser.parse_args()
    sample = random.Random(options.seed).sample(mutants(), 300)[options.first : options.first + options.count]
    if options.list:
        print(*(f"{each['file']}:{each['line']}: {each['old']} → {each['new']}" for each in sample), sep="\n")
        return
    import peft  # noqa: F401 (imported once, before the processes are forked)
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    results = []
    for number, mutant in enumerate(sample, options.first):
        found = outcome(mutant, options.limit)
        results.append({"number": number, **mutant, "outcome": found})
        print(
            f"{number}: {found}: {mutant['file']}:{mutant['line']}: {mutant['old']!r} → {mutant['new']!r}", flush=True
        )
        if options.record:
            options.record.write_text(json.dumps({"seed": options.seed, "mutants": results}, indent=1) + "\n")
    survived = sum(each["outcome"] == "survived" for each in results)
    print(f"{len(results) - survived} of {len(results)} noticed")


if __name__ == "__main__":
    main()
