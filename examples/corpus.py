"""A text classification task from what every installation has: docstrings, to be sorted by the package they come from.

    python examples/corpus.py --output corpus

Installed .py files are read and parsed, never imported or run. The packages' own names and aliases are taken out of the
texts. Training and test rows come from different files, since docstrings of one file repeat each other.
"""

import argparse
import ast
import importlib.util
import json
import random
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypedDict

from lora_ga.files import write_atomically

# Class -> its names in running text. All of them are taken out of all texts: what a text is not would be a hint too.
PACKAGES = {
    "matplotlib": ("matplotlib", "pyplot", "pylab", "plt", "mpl", "toolkits"),
    "networkx": ("networkx", "nx"),
    "numpy": ("numpy", "np"),
    "pandas": ("pandas", "pd"),
    "scipy": ("scipy", "sp"),
    "sklearn": ("sklearn", "scikit-learn", "scikit", "sk"),
    "sympy": ("sympy", "sym"),
    "torch": ("torch", "pytorch"),
}


def names_pattern(packages: Mapping[str, Iterable[str]]) -> re.Pattern[str]:
    """Returns what matches the names as whole words, with the dot behind them (`np.` in `np.dot`)."""
    names = "|".join(re.escape(name) for group in packages.values() for name in group)
    return re.compile(rf"(?<![a-z0-9])(?:{names})(?![a-z0-9])\.?", re.IGNORECASE)


NAMES = names_pattern(PACKAGES)
# Tests say little in their docstrings, and vendored code is another package's.
SKIPPED = {"tests", "test", "testing", "externals", "_external", "_vendor", "vendor", "array_api_compat", "_numpy"}
SHORTEST, LONGEST = 80, 400  # characters
PER_FILE = 5  # docstrings taken from one file, so that no single large file is a class
TEST_SHARE = 5  # one test row for so many training rows


class Row(TypedDict):
    """A text and the place of its class in the list of class names."""

    text: str
    label: int


def docstring_rows(limit_per_class: int, seed: int) -> tuple[list[Row], list[Row], list[str]]:
    """Makes the task; the same rows wherever the same versions of the packages are installed.

    Args:
        limit_per_class: training rows for each class; there are a fifth as many test rows. Where a package has fewer,
            every class is cut to the same size.
        seed: of the choice of files and of the order of the rows.

    Returns:
        Training rows, test rows, class names.
    """
    wanted_test = max(1, limit_per_class // TEST_SHARE)
    seen: set[str] = set()
    train, test = [], []
    for package in PACKAGES:
        files = source_files(package)
        random.Random(f"{seed} {package}").shuffle(files)
        texts: tuple[list[str], list[str]] = [], []
        for file in files:
            # Whole files go to the test rows until these are enough, the rest to the training rows.
            place, wanted = (0, wanted_test) if len(texts[0]) < wanted_test else (1, limit_per_class)
            texts[place].extend(fresh_texts(file, seen)[: wanted - len(texts[place])])
            if len(texts[1]) == limit_per_class:
                break
        test.append(texts[0])
        train.append(texts[1])
    return balanced(train, seed), balanced(test, seed), list(PACKAGES)


def source_files(package: str) -> list[Path]:
    """Finds the package without importing it.

    Args:
        package: its name, a key of `PACKAGES`.

    Returns:
        Its .py files, in an order that does not depend on the file system.

    Raises:
        RuntimeError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise RuntimeError(
            f"{package}: not installed, but its docstrings are a class. Run `pip install 'lora-ga[demo]'`."
        )
    root = Path(spec.origin).parent
    files = [file for file in root.rglob("*.py") if SKIPPED.isdisjoint(file.relative_to(root).parts)]
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def fresh_texts(file: Path, seen: set[str]) -> list[str]:
    """Reads up to `PER_FILE` docstrings.

    Args:
        file: a .py file; one that does not parse has none.
        seen: the beginnings of all texts so far, to which those of this file are added.

    Returns:
        The cleaned texts whose beginnings are new.
    """
    texts = []
    for docstring in docstrings(file):
        text = cleaned(docstring)
        beginning = re.sub(r"\W+", " ", text[:SHORTEST]).lower()
        if len(text) >= SHORTEST and beginning not in seen:
            seen.add(beginning)
            texts.append(text)
        if len(texts) == PER_FILE:
            break
    return texts


def docstrings(file: Path) -> Iterator[str]:
    """Parses a file.

    Args:
        file: a .py file.

    Yields:
        The docstrings of its functions, classes and methods, in their order.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escape sequences in other people's strings
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield ast.get_docstring(node) or ""


def cleaned(docstring: str) -> str:
    """Returns the first `LONGEST` characters of the prose, without package names."""
    return " ".join(NAMES.sub("", docstring).split())[:LONGEST]


def balanced(classes: list[list[str]], seed: int) -> list[Row]:
    """Returns as many rows of every class as the smallest has, in random order."""
    size = min(map(len, classes))
    rows = [Row(text=text, label=label) for label, texts in enumerate(classes) for text in texts[:size]]
    random.Random(seed).shuffle(rows)
    return rows


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Writes one JSON object a line; the file is there whole or not at all."""
    write_atomically(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode())


def main() -> None:
    """Writes train.jsonl and test.jsonl, and prints counts and examples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--limit_per_class", type=int, default=300, help="training rows for each class (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of files (default: 0)")
    arguments = parser.parse_args()
    train, test, classes = docstring_rows(arguments.limit_per_class, arguments.seed)
    for name, rows in (("train", train), ("test", test)):
        path = arguments.output / f"{name}.jsonl"
        write_jsonl(path, rows)
        print(f"{path}: {len(rows)} rows, {len(rows) // len(classes)} for each of {len(classes)} classes")
    for label, name in enumerate(classes):
        example = next(row["text"] for row in train if row["label"] == label)
        print(f"{label} {name}: {textwrap.shorten(example, 90)}")


if __name__ == "__main__":
    main()
