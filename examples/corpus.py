"""A text classification task that needs no download: classify docstrings by the installed package they come from.

    python examples/corpus.py --output corpus

The .py files of the packages are parsed, never imported or run. The names and aliases of the packages are removed from
the texts. Training and test rows come from different files, because the docstrings of one file repeat each other.
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

# Class -> its names in a text. All names are removed from all texts: the name of another package would be a hint too.
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
    """Returns a pattern for the names as whole words, with a dot that follows (`np.` in `np.dot`)."""
    names = "|".join(re.escape(name) for group in packages.values() for name in group)
    return re.compile(rf"(?<![a-z0-9])(?:{names})(?![a-z0-9])\.?", re.IGNORECASE)


NAMES = names_pattern(PACKAGES)
# Folders that are skipped: tests have short docstrings, and vendored code belongs to another package.
SKIPPED = {"tests", "test", "testing", "externals", "_external", "_vendor", "vendor", "array_api_compat", "_numpy"}
SHORTEST, LONGEST = 80, 400  # characters
PER_FILE = 5  # the most docstrings taken from one file, so that no large file dominates its class
TEST_SHARE = 5  # training rows for each test row


class Row(TypedDict):
    """A text and the index of its class in the list of class names."""

    text: str
    label: int


def docstring_rows(limit_per_class: int, seed: int) -> tuple[list[Row], list[Row], list[str]]:
    """Makes the task. The same versions of the packages give the same rows.

    Args:
        limit_per_class: The number of training rows for each class. There are a fifth as many test rows. If a package
            has fewer, every class is cut to that size.
        seed: The seed for the choice of files and the order of the rows.

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
            # Files go to the test rows until there are enough of these, and then to the training rows.
            place, wanted = (0, wanted_test) if len(texts[0]) < wanted_test else (1, limit_per_class)
            texts[place].extend(fresh_texts(file, seen)[: wanted - len(texts[place])])
            if len(texts[1]) == limit_per_class:
                break
        test.append(texts[0])
        train.append(texts[1])
    return balanced(train, seed), balanced(test, seed), list(PACKAGES)


def source_files(package: str) -> list[Path]:
    """Finds the files of a package without importing it.

    Args:
        package: The name of the package, a key of `PACKAGES`.

    Returns:
        Its .py files, in an order that does not depend on the file system.

    Raises:
        RuntimeError: The package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise RuntimeError(
            f"{package}: not installed, but its docstrings are a class. Run `pip install -e '.[demo]'` in the checkout."
        )
    root = Path(spec.origin).parent
    files = [file for file in root.rglob("*.py") if SKIPPED.isdisjoint(file.relative_to(root).parts)]
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def fresh_texts(file: Path, seen: set[str]) -> list[str]:
    """Reads up to `PER_FILE` docstrings.

    Args:
        file: A .py file. A file that does not parse has no docstrings.
        seen: The beginnings of all texts so far. Those of this file are added.

    Returns:
        The cleaned texts whose beginnings are not in `seen`.
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
        file: A .py file.

    Yields:
        The docstrings of its functions, classes and methods.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences in the strings of these files
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
    """Returns the same number of rows for every class, that of the smallest, in random order."""
    size = min(map(len, classes))
    rows = [Row(text=text, label=label) for label, texts in enumerate(classes) for text in texts[:size]]
    random.Random(seed).shuffle(rows)
    return rows


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Writes one JSON object a line, atomically."""
    write_atomically(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode())


def main() -> None:
    """Writes train.jsonl and test.jsonl, and prints the number of rows and an example of each class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--limit_per_class", type=int, default=300, help="training rows for each class (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the choice of files (default: 0)")
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
