"""The package: public names, imports between packages, light imports, the examples and commands of the documents.

Also: the data of the demonstration (`examples/corpus.py`), from made-up packages.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import Trainer, TrainingArguments

import demo
import lora_ga
import tables
from cases import mixtral
from lora_ga.cli.main import main
from lora_ga.experiments.optim import PoLoRA
from lora_ga.version import MINIMUM, check_versions, dtype_setting
from toys import adapted, causal, llama, logits

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "lora_ga"


def test_the_table_of_packages_names_what_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = text.partition("| package of `src/lora_ga` |")[2].partition("\n\n")[0].splitlines()[2:]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    named += re.findall(r"`lora_ga\.(\w+)`", text)
    there = {each.stem for each in SOURCE.iterdir() if each.stem.isidentifier()}
    assert set(named) == there - {"__init__", "__main__", "__pycache__", "version", "py"}


def test_there_are_at_most_12_public_names_and_each_has_a_docstring() -> None:
    assert len(lora_ga.__all__) <= 12
    assert set(lora_ga.__all__) == set(lora_ga._HOMES)
    assert lora_ga.__version__ == importlib.metadata.version("lora-ga")
    assert all(getattr(lora_ga, name).__doc__ for name in lora_ga.__all__)


def with_versions(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Let `importlib.metadata.version` return these versions; None stands for a library that has no metadata."""
    real = importlib.metadata.version

    def version(name: str) -> str | None:
        if name in versions and versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name] if name in versions else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_importing_the_package_with_a_library_below_its_minimum_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_versions(monkeypatch, peft="0.17.1", transformers="4.54.1")
    with pytest.raises(ImportError) as raised:
        importlib.reload(lora_ga)
    assert str(raised.value) == (
        f"lora-ga {lora_ga.__version__}: transformers 4.54.1 is installed, but transformers 4.55 or newer is needed; "
        'peft 0.17.1 is installed, but peft 0.18 or newer is needed. Run: pip install --upgrade "transformers>=4.55" '
        '"peft>=0.18"'
    )


@pytest.mark.parametrize("found", ["0.18", "0.18.0.dev0", "0.18.0rc1+local", "1", "main", "", None])
def test_the_minimum_its_pre_releases_and_versions_that_say_nothing_are_accepted(
    found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_versions(monkeypatch, peft=found)
    check_versions()
    with_versions(monkeypatch, torch="2.5.1+cpu")
    with pytest.raises(ImportError, match=r"torch 2.5.1\+cpu is installed, but torch 2.6 or newer is needed"):
        check_versions()


@pytest.mark.parametrize(("found", "name"), [("4.55.4", "torch_dtype"), ("4.56.0", "dtype"), (None, "dtype")])
def test_the_dtype_of_a_model_is_given_by_the_name_that_transformers_knows(
    found: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_versions(monkeypatch, transformers=found)
    assert dtype_setting("auto") == {name: "auto"}


def test_the_minimum_versions_are_those_of_the_package_metadata() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {*declared} == {f"{name}>={minimum}" for name, minimum in MINIMUM.items()} | {"safetensors>=0.5"}


def test_the_package_is_smaller_than_a_megabyte() -> None:
    """As pip downloads it, compressed. It needs no package that PEFT does not need, so this is all that it adds."""
    files = [path for path in SOURCE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert len(files) > 100
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as wheel:
        for path in files:
            wheel.write(path)
    assert len(packed.getvalue()) < 1_000_000


def check_contracts(source: Path) -> subprocess.CompletedProcess[str]:
    """Check the package in a folder by import-linter against the contracts of pyproject.toml."""
    command = [
        str(Path(sys.executable).parent / "lint-imports"),
        "--config",
        str(ROOT / "pyproject.toml"),
        "--no-cache",
    ]
    environment = os.environ | {"PYTHONPATH": str(source)}
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)


def test_the_packages_keep_the_contracts_on_imports() -> None:
    run = check_contracts(SOURCE.parent)
    assert run.returncode == 0, run.stdout
    assert "4 kept, 0 broken" in run.stdout


@pytest.mark.parametrize(
    ("module", "statement", "broken"),
    [
        ("layers/kinds", "import lora_ga.adapter.write", "Packages import downwards BROKEN"),
        ("linalg/low_rank", "import transformers", "The linear algebra needs torch alone BROKEN"),
        ("distributed/sharding", "import peft", "PEFT is imported from layers upwards BROKEN"),
        ("export/compress", "import datasets", "The library needs no package of the extra cli BROKEN"),
        ("extra", "import torch", "lora_ga.extra"),
    ],
)
def test_a_planted_import_breaks_a_contract(module: str, statement: str, broken: str, tmp_path: Path) -> None:
    shutil.copytree(SOURCE, tmp_path / "lora_ga", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "lora_ga" / f"{module}.py").open("a") as file:
        file.write(f"\n{statement}\n")
    run = check_contracts(tmp_path)
    assert run.returncode == 1
    assert broken in run.stdout


def test_only_the_package_distributed_imports_torch_distributed() -> None:
    named = re.compile(r"^\s*(import|from) torch\.(distributed|nn\.parallel)", re.MULTILINE)
    users = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if named.search(path.read_text())}
    assert users == {f"distributed/{name}.py" for name in ("processes", "sharding", "tensor_parallel")}


def packages_loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in run.stdout.split()}


HEAVY = {"torch", "transformers", "peft", "matplotlib", "datasets", "rich", "pandas"}


def test_importing_the_package_or_asking_for_help_loads_no_heavy_package() -> None:
    assert not packages_loaded_by("import lora_ga") & HEAVY
    assert not packages_loaded_by("from lora_ga.cli.main import main; main(['--help'])") & HEAVY


def test_using_the_library_loads_no_package_for_plots_data_sets_or_terminals() -> None:
    assert not packages_loaded_by("import lora_ga; lora_ga.initialize") & {"matplotlib", "datasets", "rich"}


def test_the_check_of_light_imports_notices_a_heavy_package() -> None:
    assert "matplotlib" in packages_loaded_by("import lora_ga, matplotlib")


def test_an_unknown_public_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="no attribute 'initialise'; it has GradientEstimate, .*initialize"):
        _ = lora_ga.initialise
    assert set(dir(lora_ga)) == {*lora_ga.__all__, "__version__"}


def blocks(document: str) -> list[str]:
    """Return the Python blocks of a document."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)
    assert found
    return found


def test_the_guides_examples_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    model = adapted(llama())
    names: dict[str, Any] = {
        "lora_ga": lora_ga,
        "PeftModel": PeftModel,
        "model": model,
        "base": llama(),
        "dataloader": causal(),
    }
    names["config"] = lora_ga.LoraGAConfig()
    start, loading, experts = blocks("docs/guide.md")
    exec(start, names)
    assert (tmp_path / "estimate.safetensors").exists()
    model.save_pretrained("adapter")
    for line in loading.splitlines():
        exec(line, names | {"base": llama()})
    names["LoraConfig"] = LoraConfig
    exec(experts, names)
    mixture = get_peft_model(mixtral(), names["lora"])
    assert {layer.scaling["default"] for layer in mixture.modules() if isinstance(layer, LoraLayer)} == {16 / 8**0.5}
    assert lora_ga.initialize(mixture, causal()).missing == {}


def test_the_example_of_an_optimizer_of_the_product_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": adapted(llama())}
    (stepping,) = blocks("docs/experiments.md")
    arguments = TrainingArguments("run", max_steps=2, report_to=[], use_cpu=True)
    rows = [{key: value[0] for key, value in batch.items()} for batch in causal()]
    names["Trainer"] = functools.partial(Trainer, args=arguments, train_dataset=rows)
    exec(stepping, names)
    names["trainer"].train()
    assert isinstance(names["trainer"].optimizer.optimizer, PoLoRA)


def test_the_documented_example_of_lora_ga_compat_runs() -> None:
    names: dict[str, Any] = {"base": llama(), "dataloader": causal()}
    (block,) = [block for block in blocks("docs/integrations.md") if "lora_ga.compat" in block]
    exec(block, names)
    assert names["model"].peft_config["default"].r == 8
    assert torch.equal(logits(names["model"], causal(1)[0]), logits(llama(), causal(1)[0]))


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_are_drawn_from_the_records(page: str) -> None:
    text = (ROOT / page).read_text()
    assert len(tables.MARKERS.findall(text)) == len(tables.PAGES[page])
    assert tables.written(page, text) == text


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site and the usual views of a repository make them."""
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?s)```.*?```", "", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@functools.cache
def help_of(command: str) -> str:
    """What `lora-ga COMMAND --help` prints."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        main([command, "--help"])
    return shown.getvalue()


DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "findings/README.md"]
DOCUMENTS += sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_only_commands_files_and_options_that_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?m)`make ([a-z0-9-]+)|^make ([a-z0-9-]+)", text):
        assert re.search(rf"^{''.join(target)}:", makefile, flags=re.MULTILINE), target
    for path, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        target = (ROOT / document).parent / path if path else ROOT / document
        assert path.startswith("https://") or target.exists(), path
        assert not anchor or path.startswith("https://") or anchor in anchors(target), (path, anchor)
    for command, line in re.findall(r"(?m)^lora-ga ([a-z]+)(.*)$", text):
        shown = help_of(command)
        for option in re.findall(r"--[a-z_]+", line):
            assert option in shown, (command, option)


def test_every_printed_installation_of_an_extra_works_in_a_checkout_and_messages_say_that_it_needs_one() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/*.yaml"), *ROOT.glob("examples/*.py")]
    sources = [*SOURCE.rglob("*.py")]
    printed = 0
    for file in [*pages, *sources]:
        text = " ".join(re.sub(r"['\"]\n\s*['\"]|\n#?", " ", file.read_text()).split())
        assert not re.search(r"pip install (-\S+ )*['\"]?lora-ga", text), file  # the index has no such package
        for found in re.finditer(r"pip install -e ['\"]\.\[\w+\]['\"]", text if file in sources else ""):
            printed += 1
            after = text[found.end() : found.end() + 80].replace("' \"", "")
            assert after.startswith(" in a checkout of LoRA-GA (it is not on PyPI yet)"), (file, after)
    assert printed >= 4


def test_the_release_is_started_by_a_person_and_only_its_upload_may_identify_itself() -> None:
    workflow = yaml.load((ROOT / ".github" / "workflows" / "release.yml").read_text(), Loader=yaml.BaseLoader)
    assert set(workflow["on"]) == {"workflow_dispatch"}
    assert workflow["permissions"] == {"contents": "read"}
    assert {name: job.get("permissions") for name, job in workflow["jobs"].items()} == {
        "build": None,
        "publish": {"id-token": "write"},
    }
    commands = [step["run"] for step in workflow["jobs"]["build"]["steps"] if "run" in step]
    targets = re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text())
    assert [command.removeprefix("make ") in targets for command in commands if command.startswith("make ")] == [
        True
    ] * 3


# Security: see docs/security.md

SUSPICIOUS = re.compile(
    r"pickle|\b(?<!\.)eval\(|\bexec\(|shell=True|os\.system|yaml\.(load|unsafe_load)\(|torch\.load|__import__"
)
# File of the package, a part of the line → why it may be there.
ALLOWED = {
    ("adapter/optimizer_state.py", 'torch.load(folder / "optimizer.pt", weights_only=True'): "tensors alone",
    ("adapter/file.py", "torch.load(weights, weights_only=True"): "tensors alone: code is refused",
    ("gradients/result.py", "Nothing in the file is unpickled"): "a docstring",
    ("adapter/structure.py", "copied and pickled with the model"): "a docstring: of Python's own pickling of a model",
    ("adapter/alignment.py", "copy.deepcopy, pickle"): "a docstring: of Python's own pickling of a model",
    ("distributed/processes.py", "small and can be pickled"): "torch.distributed sends them; the processes are trusted",
}


def packed() -> Iterator[tuple[str, str]]:
    """The text files of the package. `LORA_GA_WHEEL` names a built wheel to read instead of the source."""
    if wheel := os.environ.get("LORA_GA_WHEEL"):
        with zipfile.ZipFile(wheel) as file:
            for name in file.namelist():
                if name.startswith("lora_ga/") and not name.endswith("/"):
                    yield name.removeprefix("lora_ga/"), file.read(name).decode()
        return
    for path in sorted(SOURCE.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            yield path.relative_to(SOURCE).as_posix(), path.read_text()


def test_the_package_unpickles_and_executes_nothing() -> None:
    found = {(name, line.strip()) for name, text in packed() for line in text.splitlines() if SUSPICIOUS.search(line)}
    unknown = [each for each in found if not any(each[0] == name and part in each[1] for name, part in ALLOWED)]
    assert unknown == []
    unused = [(name, part) for name, part in ALLOWED if not any(n == name and part in line for n, line in found)]
    assert unused == []


@pytest.mark.parametrize(
    "line", ["import pickle", "eval(text)", "exec(code)", "run(command, shell=True)", "yaml.load(file)", "os.system(x)"]
)
def test_the_search_notices_what_it_looks_for(line: str) -> None:
    assert SUSPICIOUS.search(line)
    assert not SUSPICIOUS.search("model.eval()")


# --- the demonstration, and its data ---------------------------------------------------------------------------------


def test_the_demonstration_says_what_is_gained_at_a_usual_rate_and_at_the_best_rates() -> None:
    cells = json.loads(demo.RATES.read_text())["cells"]
    assert demo.what_is_gained({"lora-ga": 0.6, "lora": 0.5}, cells, rows=384) == (
        "LoRA-GA against LoRA at the rate 0.0003, which is usual for LoRA: accuracy 0.600 against 0.500, LoRA-GA is "
        "ahead by 0.100. An earlier sweep with a larger start (γ = 256), on held-out training rows: at the same rate "
        "accuracy 0.698 against 0.529, LoRA-GA is ahead by 0.169; at the best rates (0.001 and 0.002) accuracy 0.706 "
        "against 0.727, no difference beyond chance. One seed each."
    )
    assert (
        demo.compared({"lora-ga": 0.55, "lora": 0.5}, rows=384)
        == "accuracy 0.550 against 0.500, no difference beyond chance"
    )
    assert (
        demo.compared({"lora-ga": 0.4, "lora": 0.5}, rows=384)
        == "accuracy 0.400 against 0.500, LoRA-GA is behind by 0.100"
    )


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
