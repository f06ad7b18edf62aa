"""A fixed sample of small changes (mutants) of the code: which of them the tests notice.

    python tests/mutants.py --measure          which lines each test runs and its seconds, into build/mutants.json
    python tests/mutants.py --record FILE      tries the sample (`make mutants` does both)
    python tests/mutants.py --only 3f9a2c61 --show    tries one mutant, and shows what its tests print

Each mutant is one change in a copy of src/: another operator, comparison or constant, a condition that is turned round,
a result that is lost. The tests that run its lines try it, the quickest first, until one fails. A mutant that no test
notices either changes nothing that matters, or shows a test that is missing. A mutant is drawn by the hash of the seed,
its function and its change. So a change of the code leaves most of the sample as it was, and `--resume` tries only
what is new. Each mutant has a process of its own, forked from one that has imported the other libraries.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import fcntl
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "build" / "mutants.json"
PACKAGES = ("linalg", "layers", "gradients", "adapter")
# They test other things, or start programs.
LEFT_OUT = {"campaign", "cuda", "foreign_code", "frameworks", "launch", "package", "site", "support"}
SAMPLE = 300  # mutants
QUICKEST = 4.0  # seconds of tests that run before all others
KILLED, SURVIVED, TIMED_OUT = "killed", "survived", "killed by the time limit"
OPEN = "Open."  # the reason why a mutant survived is not known
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
        elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
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


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.AST]]:
    """The functions and classes of a file with their qualified names, the outer ones first."""
    for node in ast.iter_child_nodes(tree):
        name = inside
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = f"{inside}.{node.name}".removeprefix(".")
            yield name, node
        yield from functions(node, name)


def mutants(seed: int) -> list[dict[str, Any]]:
    """All mutants of the packages, in the order in which they are drawn."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / "src" / "lora_ga" / package).glob("*.py")):
            text = path.read_text()
            tree = ast.parse(text)
            within: dict[ast.AST, tuple[str, str]] = {}  # the innermost function of each node, with its code
            for name, function in functions(tree):
                code = digest(ast.unparse(function))
                within |= dict.fromkeys(ast.walk(function), (name, code))
            starts = [0]
            for line in text.encode().splitlines(keepends=True):
                starts.append(starts[-1] + len(line))
            seen: Counter[str] = Counter()
            file = path.relative_to(ROOT / "src").as_posix()
            for node, new in changes(tree, text):
                place: Any = node
                begin, end = (
                    starts[line - 1] + column
                    for line, column in ((place.lineno, place.col_offset), (place.end_lineno, place.end_col_offset))
                )
                old = text.encode()[begin:end].decode()
                name, code = within.get(node, ("", ""))
                key = f"{seed}\x1f{file}\x1f{name}\x1f{old}\x1f{new}"
                seen[key] += 1
                mutant = {"id": digest(f"{key}\x1f{seen[key]}"), "file": file, "function": name, "code": code}
                found.append(mutant | {"line": place.lineno, "at": [begin, end], "old": old, "new": new})
    return sorted(found, key=lambda mutant: mutant["id"])


def digest(text: str) -> str:
    """A short hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def processor_seconds() -> float:
    """The processor time of this process and of those that it has waited for."""
    return sum(os.times()[:4])


class Reach:
    """A plugin of pytest: the processor seconds of each test, and the lines of the packages that it runs.

    What a fixture of a module or of the session runs counts for every test that uses it. Processes that are forked from
    this one write into the same log.
    """

    def __init__(self, source: Path, log: Path) -> None:
        self.source = f"{source}/"
        self.ours = tuple(f"{source}/lora_ga/{package}/" for package in PACKAGES)
        self.log = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self.seen: set[tuple[str, int]] = set()
        self.blocks: list[dict[str, Any]] = []  # the running test, and the fixtures that are being made for it
        self.tests: dict[str, dict[str, Any]] = {}
        self.fixtures: dict[str, dict[str, Any]] = {}
        self.not_passed: set[str] = set()

    def on_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self.on_line if frame.f_code.co_filename.startswith(self.ours) else None

    def on_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if (place := (frame.f_code.co_filename, frame.f_lineno)) not in self.seen:
            self.seen.add(place)
            os.write(self.log, f"{place[0].removeprefix(self.source)}:{place[1]}\n".encode())
        return self.on_line

    @contextlib.contextmanager
    def block(self) -> Iterator[dict[str, Any]]:
        """Record a block of code, without the blocks inside."""
        self.take_log()
        found: dict[str, Any] = {"lines": set(), "inside": 0.0}
        self.blocks.append(found)
        outer, self.seen = self.seen, set()
        began = processor_seconds()
        try:
            yield found
        finally:
            seconds = processor_seconds() - began
            self.take_log()
            self.blocks.pop()
            self.seen = outer
            found["seconds"] = seconds - found.pop("inside")
            if self.blocks:
                self.blocks[-1]["inside"] += seconds

    def take_log(self) -> None:
        """Give the lines in the log to the innermost block."""
        lines = os.pread(self.log, os.fstat(self.log).st_size, 0).decode().split()
        os.ftruncate(self.log, 0)
        if self.blocks:
            self.blocks[-1]["lines"].update(lines)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        with self.block() as found:
            threading.settrace(self.on_call)
            sys.settrace(self.on_call)
            result = yield
            sys.settrace(None)
        self.tests[item.nodeid] = found | {"fixtures": set(getattr(item, "fixturenames", []))}
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        if fixturedef.scope == "function":
            return (yield)
        with self.block() as found:
            result = yield
        known = self.fixtures.setdefault(f"{fixturedef.baseid}::{fixturedef.argname}", {"lines": set(), "seconds": 0.0})
        known["lines"] |= found["lines"]
        known["seconds"] = max(known["seconds"], found["seconds"])
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.not_passed.add(report.nodeid)

    def result(self) -> dict[str, Any]:
        """Test → seconds, and file → lines, for the tests that pass."""
        tests = {}
        for name, found in self.tests.items():
            if name in self.not_passed:
                continue
            used = [
                each
                for key, each in self.fixtures.items()
                if key.rpartition("::")[2] in found["fixtures"] and name.startswith(key.rpartition("::")[0])
            ]
            lines: dict[str, list[int]] = {}
            for place in sorted(found["lines"].union(*(each["lines"] for each in used))):
                file, _, line = place.rpartition(":")
                lines.setdefault(file, []).append(int(line))
            tests[name] = {"seconds": found["seconds"] + sum(each["seconds"] for each in used), "lines": lines}
        return tests


class Selected:
    """A plugin of pytest that runs some tests alone, file by file, and notes the first one that fails."""

    def __init__(self, names: Collection[str], note: Path) -> None:
        self.places = {name: number for number, name in enumerate(names)}
        self.files = list(dict.fromkeys(name.partition("::")[0] for name in names))
        self.note = note

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self.places]
        items.sort(key=lambda item: (self.files.index(item.nodeid.partition("::")[0]), self.places[item.nodeid]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.note.write_text(report.nodeid)


def forked(plugin: Any, files: Collection[str], source: Path, folder: Path, limit: float, *, show: bool) -> int | None:
    """Run the tests of some files on the code in `source`, in a new process.

    Args:
        plugin: A `Reach` or a `Selected`.
        files: The files.
        source: A folder like `src`.
        folder: For temporary files.
        limit: Processor seconds of one process. By the clock, which a busy machine slows down, 20 times as much.
        show: Whether the tests print.

    Returns:
        The exit code; None beyond the limit.
    """
    pid = os.fork()
    if pid == 0:
        os.setpgrp()
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit)))
        try:
            _in_child(plugin, files, source, folder, show=show)
        finally:
            os._exit(1)
    began = time.monotonic()
    while not (found := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() - began < 20 * limit:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):  # also what the tests have started and not ended
        os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(found[1] if found[0] else os.waitpid(pid, 0)[1])
    return None if code in {-signal.SIGKILL, -signal.SIGXCPU} else code


def _in_child(plugin: Any, files: Collection[str], source: Path, folder: Path, *, show: bool) -> None:
    """Run the tests, and end this process with their exit code."""
    if not show:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
    os.chdir(ROOT)
    os.environ |= {"PYTHONPATH": str(source), "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis")}
    sys.path[:0] = [str(source), *(str(ROOT / name) for name in ("tests", "examples", "benchmarks"))]
    import processes

    # The processes of a test are forked from here, so they run the mutant, too.
    torch.multiprocessing.get_context = lambda method: multiprocessing.get_context("fork")  # type: ignore[assignment]
    processes.start_server = lambda: None
    os.register_at_fork(after_in_child=warnings.resetwarnings)  # pytest makes errors of them; a new process does not
    if isinstance(plugin, Reach):
        for package in PACKAGES:
            for path in sorted((source / "lora_ga" / package).glob("*.py")):
                importlib.import_module(f"lora_ga.{package}.{path.stem}")
    options = ["-q", "--quick", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={folder / 'tmp'}"]
    code = pytest.main([*options, *(["-x"] if isinstance(plugin, Selected) else []), *files], plugins=[plugin])
    if isinstance(plugin, Reach):
        before = json.loads(MEASURED.read_text()) if MEASURED.exists() else {"modules": [], "tests": {}}
        found = [name for name, each in sys.modules.items() if "site-packages" in str(getattr(each, "__file__", ""))]
        kept = {name: each for name, each in before["tests"].items() if name.partition("::")[0] not in files}
        modules = list(dict.fromkeys(before["modules"] + found))
        MEASURED.parent.mkdir(exist_ok=True)
        MEASURED.write_text(json.dumps({"modules": modules, "tests": kept | plugin.result()}))
    sys.stdout.flush()
    os._exit(code)


def measure(files: Collection[str]) -> None:
    """Run the tests of some files, or all, and write what they reach."""
    files = files or [
        f"tests/{p.name}" for p in sorted((ROOT / "tests").glob("test_*.py")) if p.stem[5:] not in LEFT_OUT
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        forked(Reach(ROOT / "src", folder / "log"), files, ROOT / "src", folder, 7200, show=True)


def tests_of(mutant: Mapping[str, Any], tests: Mapping[str, Any]) -> list[str]:
    """The tests that run the statement of a mutant, the quickest first; if only imports run it, those of its file."""
    first, last = mutant["line"], mutant["line"] + mutant["old"].count("\n")
    for node in ast.walk(ast.parse((ROOT / "src" / mutant["file"]).read_text())):
        end = getattr(node, "end_lineno", 0)
        if isinstance(node, ast.stmt) and not hasattr(node, "body") and node.lineno <= first and last <= end:
            first, last = node.lineno, end
            break
    inside = {name: each["lines"][mutant["file"]] for name, each in tests.items() if mutant["file"] in each["lines"]}
    found = [name for name, lines in inside.items() if any(first <= line <= last for line in lines)]
    return sorted(found or inside, key=lambda name: tests[name]["seconds"])


def outcome(mutant: Mapping[str, Any], tests: Mapping[str, Any], most: float, *, show: bool) -> dict[str, Any]:
    """Try a mutant: what became of it, the test that noticed it, and how many tests could have.

    Args:
        mutant: The change.
        tests: Test → its seconds and lines.
        most: Seconds of tests that run at most.
        show: Whether the tests print.
    """
    names = tests_of(mutant, tests)
    seconds = 0.0
    parts: list[list[str]] = [[], []]
    for name in names:
        seconds += tests[name]["seconds"]
        if seconds <= most or not parts[0]:
            parts[seconds > QUICKEST and bool(parts[0])].append(name)
    found = {"tests": len(names), "tried": len(parts[0] + parts[1])}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = Path(shutil.copytree(ROOT / "src", folder / "src"))
        content = (source / mutant["file"]).read_bytes()
        begin, end = mutant["at"]
        (source / mutant["file"]).write_bytes(content[:begin] + mutant["new"].encode() + content[end:])
        for part in filter(None, parts):
            plugin = Selected(part, folder / "failed")
            limit = 30 + 5 * sum(tests[name]["seconds"] for name in part)
            code = forked(plugin, plugin.files, source, folder, limit, show=show)
            if code is None:
                return {"outcome": TIMED_OUT, **found}
            if code:
                by = plugin.note.read_text() if plugin.note.exists() else "the import of the tests"
                return {"outcome": KILLED, "by": by, **found}
    return {"outcome": SURVIVED, **found}


def control(results: Collection[Mapping[str, Any]]) -> int:
    """Run the tests that have noticed a mutant on the unchanged code, each alone. Returns how many; fails if one does.

    A test that passes only after others would seem to notice every mutant.
    """
    names = sorted({each["by"] for each in results if "::" in each.get("by", "")})
    failed = []
    for test in names:
        with tempfile.TemporaryDirectory() as name:
            plugin = Selected([test], Path(name) / "failed")
            if forked(plugin, plugin.files, ROOT / "src", Path(name), 600, show=False) != 0:
                failed.append(test)
    if failed:
        raise RuntimeError(f"These tests fail without a mutant, each run alone: {', '.join(failed)}")
    return len(names)


def main() -> None:
    """Measure the tests, or try the sample."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--measure", nargs="*", metavar="FILE", help="measure the tests of these files (default: all)")
    parser.add_argument("--list", action="store_true", help="print the sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", metavar="ID", help="the mutants of the sample to try (default: all)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="try those that the record lacks, that survived without a reason, or whose function differs",
    )
    parser.add_argument("--processes", type=int, default=2, help="how many mutants to try at the same time")
    parser.add_argument("--most", type=float, default=90, help="seconds of tests to try on one mutant")
    parser.add_argument("--record", type=Path, default=MEASURED.with_name("results.json"), help="file for the results")
    parser.add_argument("--show", action="store_true", help="let the tests print")
    options = parser.parse_args()
    sample = {each["id"]: each for each in mutants(options.seed)[:SAMPLE]}
    if options.list:
        print(*(described(each) for each in sample.values()), sep="\n")
        return
    if options.measure is not None:
        measure(options.measure)
        return
    before = read(options.record)
    known = {key: each | sample[key] for key, each in before.items() if same(each, sample.get(key, {}))}
    closed = {key for key, each in known.items() if options.resume and each.get("reason") != OPEN}
    chosen = options.only or [key for key in sample if key not in closed]
    measured = json.loads(MEASURED.read_text())
    for name in measured["modules"]:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.freeze()  # so that the processes share this memory
    torch.set_num_threads(1)
    options.record.unlink(missing_ok=True)
    write(options.record, options.seed, known)
    workers = []
    for first in range(min(options.processes, len(chosen))):
        if not (pid := os.fork()):
            for key in chosen[first :: options.processes]:
                began = time.monotonic()
                found = outcome(sample[key], measured["tests"], options.most, show=options.show)
                print(f"{described(sample[key])}: {found} ({time.monotonic() - began:.0f} s)", flush=True)
                if found["outcome"] == SURVIVED:
                    found["reason"] = known.get(key, {}).get("reason", OPEN)
                write(options.record, options.seed, {key: sample[key] | found})
            os._exit(0)
        workers.append(pid)
    codes = [os.waitpid(pid, 0)[1] for pid in workers]
    if any(codes):
        raise RuntimeError("A process that tried mutants has failed; see above. `--resume` goes on.")
    results = read(options.record).values()
    count = 0 if options.only else control(results)
    survived = sum(each["outcome"] == SURVIVED for each in results)
    print(f"{len(results) - survived} of {len(results)} noticed. The {count} tests that did pass without a mutant.")


def same(found: Mapping[str, Any], mutant: Mapping[str, Any]) -> bool:
    """Whether a result in a record is that of this mutant, in a function that is the same today."""
    return all(found[part] == mutant.get(part) for part in ("id", "code"))


def described(mutant: Mapping[str, Any]) -> str:
    """A line for a mutant."""
    return f"{mutant['id']} {mutant['file']}:{mutant['line']}: {mutant['old']!r} → {mutant['new']!r}"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The results in a record, if there is one: the id of a mutant → its result."""
    return {each["id"]: each for each in json.loads(path.read_text())["mutants"]} if path.exists() else {}


def write(path: Path, seed: int, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Add results to the record, one mutant a line. Two processes may write at the same time."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    about = {
        "command": "make mutants",
        "seed": seed,
        "date": datetime.date.today().isoformat(),
        "commit": git.stdout.strip(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
    }
    for each in (path, MEASURED):
        each.parent.mkdir(exist_ok=True)
    with MEASURED.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [f"  {json.dumps(each, ensure_ascii=False)}" for _, each in sorted((read(path) | dict(results)).items())]
        head = json.dumps(about, indent=1).removesuffix("\n}")
        path.write_text(head + ',\n "mutants": [\n' + ",\n".join(rows) + "\n ]\n}\n")


if __name__ == "__main__":
    main()
