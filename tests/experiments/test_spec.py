"""Suite files: those that come with the package, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_ga.cli.main import main
from lora_ga.experiments.methods import METHODS, complete
from lora_ga.experiments.suites.spec import RECIPES, available, load_suite
from lora_ga.experiments.tasks import KINDS


@pytest.mark.parametrize("name", available())
def test_every_suite_names_only_methods_options_and_kinds_that_exist(name: str) -> None:
    suite = load_suite(name)
    assert suite.title
    assert {task.kind for task in suite.tasks.values()} <= set(KINDS)
    for variant in suite.methods.values():
        assert variant.method in METHODS
        assert set(variant.options) <= set(complete(variant.method, variant.options))


def test_there_are_suites() -> None:
    assert {"stories-shakespeare", "glue-minilm", "ablation"} <= set(available())


def test_every_suite_is_packaged_and_nothing_else_of_its_folder() -> None:
    project = (RECIPES[0].parent / "pyproject.toml").read_text(encoding="utf-8")
    packaged = re.findall(r'"recipes/(.*)" = "lora_ga/recipes/(.*)"', project)
    assert packaged == [(path.name, path.name) for path in sorted(RECIPES[0].glob("*.yaml"))]
    assert project.count('"recipes') == len(packaged)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {}}, "the suite: unknown task. The known are name, title, tasks"),
        ({"settings": {"step": 3}}, "settings: unknown step. The known are steps, batch_size"),
        ({"settings": {"rows": 8}}, "settings: rows has a new name, batch_size. In place of rows and parts give"),
        ({"settings": {"parts": 2}}, "settings: parts has a new name, gradient_accumulation_steps"),
        ({"settings": {"recompute": True}}, "settings: recompute has a new name, gradient_checkpointing"),
        (
            {"methods": {"a": {"method": "lora", "rates": [-6], "settings": {"every": 5}}}},
            "methods.a.settings: every has",
        ),
        ({"settings": {"steps": 0}}, "settings: steps is 0; it must be int and at least 1"),
        ({"methods": {"lora": {}}}, "methods.lora: rates is .*; it must list whole exponents"),
        ({"methods": {"lora": {"rates": [-6], "tasks": ["maths"]}}}, "methods.lora.tasks: unknown maths"),
        ({"methods": {"lora": {"rate_of": "pissa"}}}, "methods.lora.rate_of: unknown pissa"),
        ({"tasks": {}}, "a suite needs at least one task"),
    ],
)
def test_what_is_not_known_is_refused_with_the_known(
    toy: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(toy.read_text()) | changes))
    with pytest.raises(ValueError, match=f"changed.yaml: {message}"):
        load_suite(str(path))


def test_a_method_refuses_options_it_does_not_have() -> None:
    with pytest.raises(ValueError, match="lora_ga: has no option gamma. Its options are direction, scale"):
        complete("lora_ga", {"gamma": 3})
    with pytest.raises(ValueError, match="lorra: there is no such method. The methods are full, lora"):
        complete("lorra", {})


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            {"lorra": {"rates": [-6]}},
            "methods.lorra: lorra: there is no such method. The methods are full, lora",
        ),
        (
            {"γ": {"method": "lora_ga", "rates": [-6], "options": {"gamma": 3}}},
            "methods.γ: lora_ga: has no option gamma. Its options are direction",
        ),
    ],
)
def test_a_suite_with_an_unknown_method_or_option_is_refused_before_anything_runs(
    toy: Path, tmp_path: Path, methods: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_GA_DEBUG", "1")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(toy.read_text()) | {"methods": methods}, allow_unicode=True))
    with pytest.raises(ValueError, match=message):
        main(["reproduce", str(path), "--store", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["reproduce", "report"])
def test_an_unknown_suite_is_refused_with_the_known(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_GA_DEBUG", "1")
    with pytest.raises(ValueError, match="glue: there is no such suite. The suites are ablation, glue-minilm, glue-t5"):
        main([command, "glue"])
    with pytest.raises(ValueError, match="which suite. There are ablation"):
        main([command])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'float16'; it must be float32 or bfloat16"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing is 1"),
    ],
)
def test_settings_that_are_no_numbers_are_checked_too(
    toy: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(toy.read_text()) | {"settings": settings}))
    with pytest.raises(ValueError, match=message):
        load_suite(str(path))
