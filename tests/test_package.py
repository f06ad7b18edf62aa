"""The house: public names, arrows between modules, light imports, and the README's commands."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_ga

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
    assert all(getattr(lora_ga, name).__doc__ for name in lora_ga.__all__)


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("config", set()),
        ("lowrank", {"torch"}),
        ("capture", {"torch"}),
        ("factors", {"torch"}),
        ("accumulate", {"torch", "lowrank"}),
        ("split", {"torch", "lowrank", "config"}),
        ("store", {"torch"}),
        ("gradient", {"torch", "lowrank", "config", "store", "__version__"}),
        ("loss", {"torch", "store"}),
    ],
)
def test_modules_import_no_more_than_the_design_lets_them(module: str, allowed: set[str]) -> None:
    assert imports(module) <= allowed


def test_data_flows_one_way() -> None:
    order = ["config", "lowrank", "factors", "capture", "store", "loss", "accumulate", "split", "gradient", "targets"]
    order += ["estimate", "sidecar", "adapter", "initialize", "restore", "export"]
    for index, module in enumerate(order):
        assert not imports(module) & set(order[index + 1 :]), module


def test_peft_is_imported_only_where_models_and_adapters_are_touched() -> None:
    users = {path.stem for path in SOURCE.glob("*.py") if "peft" in imports(path.stem)}
    assert users == {"targets", "estimate", "sidecar", "adapter", "initialize", "restore", "export"}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in run.stdout.split()}


def test_importing_the_library_stays_light() -> None:
    assert not loaded_by("import lora_ga") & {"matplotlib", "datasets", "rich", "pandas", "sklearn"}


def test_the_test_of_light_imports_would_notice() -> None:
    assert "matplotlib" in loaded_by("import lora_ga, matplotlib")


def test_no_module_of_the_library_outgrows_its_budget() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 300} == {}


def test_the_readmes_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from toys import causal, llama, train  # noqa: PLC0415 (only this test trains)

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)

    class Trainer:
        """Stands for any trainer."""

        def __init__(self, model: object) -> None:
            self.model = model

        def train(self) -> None:
            train(self.model, causal())  # type: ignore[arg-type]

    names = {"base": llama(), "dataloader": causal(), "Trainer": Trainer}
    exec(blocks[0], names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_readme_names_only_commands_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z]+)", text):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for path in re.findall(r"\]\(([^)#]+)\)", text):
        assert path.startswith("http") or (ROOT / path).exists(), path
