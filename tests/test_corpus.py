"""The data of the demonstration (`examples/corpus.py`), from made-up packages."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    """The module, loaded from its file, because `examples/` is not a package."""
    spec = importlib.util.spec_from_file_location("corpus", Path(__file__).parents[1] / "examples" / "corpus.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_package(root: Path, name: str, files: int) -> None:
    """Write a package that fails on import. Each module has two long docstrings; one is the same in all modules."""
    (root / name / "tests").mkdir(parents=True)
    (root / name / "__init__.py").write_text("raise RuntimeError('imported')")
    (root / name / "tests" / "test_it.py").write_text(f'def f():\n    """{"Never read. " * 20}"""\n')
    (root / name / "old.py").write_text("print 'not Python 3'")
    for number in range(files):
        docstring = f"Uses {name} and np.dot for thing {number} of {files} of {name.title()}. " + "Long enough. " * 40
        (root / name / f"m{number}.py").write_text(
            f'class C:\n    def f(self):\n        """{docstring}"""\n\n'
            f'def short():\n    """Short."""\n\nasync def g():\n    """{"The same in every file. " * 10}"""\n'
        )


def test_rows_are_balanced_and_unique_and_do_not_name_their_packages(
    corpus: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {"firstpackage": ("firstpackage",), "secondpackage": ("secondpackage",)}
    write_package(tmp_path, "firstpackage", 30)
    write_package(tmp_path, "secondpackage", 12)
    monkeypatch.setattr(corpus, "PACKAGES", names)
    monkeypatch.setattr(corpus, "NAMES", corpus.names_pattern(names | {"numpy": ("np",)}))
    train, test, classes = corpus.docstring_rows(20, seed=0)
    assert classes == list(names)
    assert [sum(row["label"] == label for row in test) for label in (0, 1)] == [4, 4]
    counts = [sum(row["label"] == label for row in train) for label in (0, 1)]
    assert counts[0] == counts[1] >= 8
    texts = [row["text"] for row in train + test]
    assert len(texts) == len(set(texts))
    assert all(80 <= len(text) <= 400 for text in texts)
    assert not [text for text in texts if "package" in text.lower() or "np" in text or "Never read" in text]
    assert corpus.docstring_rows(20, seed=0) == (train, test, classes)
    assert corpus.docstring_rows(20, seed=1) != (train, test, classes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("See `numpy.dot` and np.sum.", "See `dot` and sum."),
        ("PyTorch's tensors, sp_matrix, scikit-learn", "'s tensors, _matrix,"),
        ("input, spy, gnp, explicit, sketch", "input, spy, gnp, explicit, sketch"),
    ],
)
def test_names_are_removed_as_whole_words_only(corpus: ModuleType, text: str, expected: str) -> None:
    assert corpus.cleaned(text) == expected


def test_a_package_that_is_not_installed_raises_an_error_that_names_it(corpus: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="no_such_package: not installed, but its docstrings are a class"):
        corpus.source_files("no_such_package")


def test_every_written_line_is_json_that_reads_back(corpus: ModuleType, tmp_path: Path) -> None:
    rows = [{"text": "line\nbreak, “quotes”, \u2028", "label": 1}, {"text": "b", "label": 0}]
    corpus.write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert [json.loads(line) for line in lines] == rows
