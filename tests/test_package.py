"""The house: public names, arrows between modules, light imports, and the README's commands."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import lora_ga
import tables
from toys import adapted, causal, llama, logits, train

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "lora_ga"
HOSTS = {"peft", "transformers", "accelerate", "datasets", "huggingface_hub", "matplotlib", "rich", "torch", "numpy"}


def imports(module: str) -> set[str]:
    """What a module of ours imports: names of our modules, and of the large libraries."""
    found = set()
    for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "lora_ga" else [f"lora_ga.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "lora_ga" and len(parts) > 1:
                found.add(parts[1])
            elif parts[0] in HOSTS:
                found.add(parts[0])
    return found


def test_the_public_list_is_short_and_every_name_is_there() -> None:
    assert len(lora_ga.__all__) <= 12
    assert set(lora_ga.__all__) == set(lora_ga._HOMES)
    assert lora_ga.__version__ == importlib.metadata.version("lora-ga")
    assert all(getattr(lora_ga, name).__doc__ for name in lora_ga.__all__)


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("config", set()),
        ("messages", {"torch"}),
        ("distributed", {"torch", "messages"}),
        ("sharding", {"torch", "deepspeed"}),
        ("agreement", {"store"}),
        ("lowrank", {"torch"}),
        ("capture", {"torch"}),
        ("forms", {"torch"}),
        ("weights", {"torch", "capture"}),
        ("embedding", {"torch", "factors"}),
        ("factors", {"torch", "sharding"}),
        ("tensor_parallel", {"torch", "factors", "transformers"}),
        ("subspace", {"torch", "lowrank"}),
        ("accumulate", {"torch", "lowrank", "subspace"}),
        ("split", {"torch", "lowrank", "config"}),
        ("store", {"torch"}),
        ("gradient", {"torch", "lowrank", "config", "store", "__version__"}),
        ("loss", {"torch", "store"}),
        ("tracking", {"gradient", "store"}),
        ("progress", {"torch", "store"}),
    ],
)
def test_modules_import_no_more_than_the_design_lets_them(module: str, allowed: set[str]) -> None:
    assert imports(module) <= allowed


def test_data_flows_one_way() -> None:
    order = [
        "config",
        "messages",
        "distributed",
        "sharding",
        "lowrank",
        "factors",
        "tensor_parallel",
        "capture",
        "store",
        "agreement",
        "loss",
        "subspace",
        "accumulate",
        "split",
        "gradient",
        "tracking",
        "progress",
        "forms",
        "embedding",
        "kinds",
        "targets",
        "frozen",
        "weights",
        "missing",
        "passes",
        "probe",
    ]
    order += [
        "reading",
        "estimate",
        "sidecar",
        "placing",
        "structure",
        "plan",
        "adapter",
        "start",
        "restore",
        "export",
        "callback",
    ]
    order += ["serving", "convert", "compat", "entrypoint"]
    for index, module in enumerate(order):
        assert not imports(module) & set(order[index + 1 :]), module


def test_peft_is_imported_only_where_models_and_adapters_are_touched() -> None:
    users = {path.stem for path in SOURCE.glob("*.py") if "peft" in imports(path.stem)}
    assert users == {
        *(
            "kinds",
            "targets",
            "frozen",
            "reading",
            "estimate",
            "sidecar",
            "plan",
            "placing",
            "structure",
            "adapter",
            "start",
            "restore",
        ),
        *("export", "serving", "convert", "compat", "entrypoint"),
    }


def test_processes_and_shards_are_the_matter_of_three_modules() -> None:
    named = re.compile(r"^\s*(import|from) torch\.(distributed|nn\.parallel)", re.MULTILINE)
    users = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if named.search(path.read_text())}
    assert users == {"distributed.py", "sharding.py", "tensor_parallel.py"}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in run.stdout.split()}


HEAVY = {"torch", "transformers", "peft", "matplotlib", "datasets", "rich", "pandas"}


def test_importing_the_package_or_asking_for_help_loads_nothing_heavy() -> None:
    assert not loaded_by("import lora_ga") & HEAVY
    assert not loaded_by("from lora_ga.cli.main import main; main(['--help'])") & HEAVY


def test_using_the_library_loads_neither_plots_nor_data_sets() -> None:
    assert not loaded_by("import lora_ga; lora_ga.initialize") & {"matplotlib", "datasets", "rich"}


def test_the_test_of_light_imports_would_notice() -> None:
    assert "matplotlib" in loaded_by("import lora_ga, matplotlib")


def test_an_unknown_name_is_refused_with_the_known() -> None:
    with pytest.raises(AttributeError, match="no attribute 'initialise'; it has GradientEstimate, .*initialize"):
        _ = lora_ga.initialise
    assert set(dir(lora_ga)) == {*lora_ga.__all__, "__version__"}


def test_no_module_of_the_library_outgrows_its_budget() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 300} == {}


def blocks(document: str) -> list[str]:
    """The Python blocks of a document."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)
    assert found
    return found


class Trainer:
    """Stands for any trainer."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def train(self) -> None:
        train(self.model, causal())


def test_the_readmes_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    exec(blocks("README.md")[0], {"base": llama(), "dataloader": causal(), "Trainer": Trainer})
    stock = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert not torch.equal(logits(stock, causal(1)[0]), logits(llama(), causal(1)[0]))


def test_the_guides_examples_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    model = adapted(llama())
    names = {"lora_ga": lora_ga, "PeftModel": PeftModel, "model": model, "base": llama(), "dataloader": causal()}
    names["config"] = lora_ga.LoraGAConfig()
    start, loading = blocks("docs/guide.md")
    exec(start, names)
    assert (tmp_path / "estimate.safetensors").exists()
    model.save_pretrained("adapter")
    for line in loading.splitlines():
        exec(line, names | {"base": llama()})


def test_the_block_of_pefts_flow_runs() -> None:
    names: dict[str, Any] = {"base": llama(), "dataloader": causal()}
    (block,) = [block for block in blocks("docs/integrations.md") if "lora_ga.compat" in block]
    exec(block, names)
    assert names["model"].peft_config["default"].r == 8
    assert torch.equal(logits(names["model"], causal(1)[0]), logits(llama(), causal(1)[0]))


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_are_drawn_from_the_records(page: str) -> None:
    text = (ROOT / page).read_text()
    assert all(each() in text for each in tables.PAGES[page])
    assert tables.written(page, text) == text


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/guide.md",
        "docs/integrations.md",
        "docs/serving.md",
        "docs/cost.md",
        "docs/scale.md",
        "docs/evidence.md",
        "docs/experiments.md",
        "CHANGELOG.md",
    ],
)
def test_documents_name_only_commands_files_and_options_that_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?m)`make ([a-z]+)|^make ([a-z]+)", text):
        assert re.search(rf"^{''.join(target)}:", makefile, flags=re.MULTILINE), target
    for path in re.findall(r"\]\(([^)#]+)\)", text):
        assert path.startswith("https://") or ((ROOT / document).parent / path).exists(), path
    for command, line in re.findall(r"(?m)^lora-ga ([a-z]+)(.*)$", text):
        shown = subprocess.run(
            [sys.executable, "-m", "lora_ga", command, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for option in re.findall(r"--[a-z_]+", line):
            assert option in shown, (command, option)
