"""Every published suite runs from end to end at toy size: its plan, its cells, its records, its report."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from experiments.hub import toy_suite
from lora_ga.cli.main import main
from lora_ga.experiments.pages.document import Document, Picture
from lora_ga.experiments.pages.drawing import render
from lora_ga.experiments.pages.suites import README_NAME, readme_files, suite_document
from lora_ga.experiments.records.store import Store
from lora_ga.experiments.suites.grid import run_grid
from lora_ga.experiments.suites.run import Place
from lora_ga.experiments.suites.sources import Sources
from lora_ga.experiments.suites.spec import RECIPES, Suite, available, load_suite
from lora_ga.experiments.tasks import check, evaluated_metrics, split_metrics
from lora_ga.gradients.progress import LOGGER

# Suite → the variants that run here, and the metric they report. Other tests run all methods on all kinds of task.
RUN = {
    "ablation": (["lora", "γ=16", "samples 4", "γ=4096"], "loss"),
    "glue-minilm": (["lora", "lora-ga γ=16"], "accuracy"),
    "glue-t5": (["lora", "lora-ga γ=16"], "accuracy"),
    "llama2-chat": (["lora", "lora-ga γ=16"], "mt_bench"),
    "llama2-code": (["lora", "lora-ga γ=16"], "humaneval"),
    "llama2-math": (["full", "lora", "lora-ga γ=16"], "gsm8k"),
    "reach": (["reach=0.5", "reach=1"], "loss"),
    "smollm2": (["lora", "lora-ga reach=0.35"], "gsm8k"),
    "steps": (["lora AdamW", "lora-ga PoLoRA", "GoRA's B AdamW"], "loss"),
    "stories-shakespeare": (["lora", "lora-ga γ=16"], "loss"),
}


# This suite runs with three rates and two seeds. The others run each variant on each task once per protocol.
TUNED = "stories-shakespeare"


def one_cell_each(suite: Suite) -> Suite:
    """The suite with one rate for each variant, one more that is not swept if it has such rates, and one seed."""
    methods = {label: replace(variant, rates=list(variant.rates)[:1]) for label, variant in suite.methods.items()}
    return replace(suite, methods=methods, seeds=1, unswept_rates=suite.unswept_rates[:1])


def test_every_published_suite_is_run_here() -> None:
    assert set(RUN) == set(available())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == TUNED else [pytest.mark.slow]) for name in RUN]
)
def test_a_published_suite_runs_from_end_to_end(
    name: str, sources: Sources, tmp_path: Path, judge_server: Any, harness: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, metric = RUN[name]
    suite = load_suite(str(toy_suite(name, tmp_path, labels)))
    most_rates = 3
    if name != TUNED:
        most_rates, suite = 1, one_cell_each(suite)
    monkeypatch.setattr("lora_ga.experiments.suites.cells.MOST_RATES", most_rates)  # so no grid grows
    level = LOGGER.level
    with Store(tmp_path / "runs").locked() as store:
        records = run_grid(suite, suite.lines(), store, Place(sources), workers=0)
    assert LOGGER.level == level
    assert {record["status"] for record in records.values()} == {"done"}, [
        record.get("traceback") for record in records.values()
    ]
    for record in records.values():
        task = suite.tasks[record["task"]]
        assert set(record["metrics"]["tune"]) == set(split_metrics(task))
        assert set(record["metrics"]["report"]) == {*split_metrics(task), *evaluated_metrics(task)}
    assert metric in next(record["metrics"]["report"] for record in records.values() if record["task"] in suite.tasks)
    document = suite_document(suite, Store(tmp_path / "runs").records())
    assert not [notice for notice in document.notices if "have not run" in notice]
    text = readme_files(document)[README_NAME].decode()
    assert all(f"| {label} |" in text for label in labels)
    assert ("The paper's protocol" in text) == (suite.paper_rate is not None)
    assert ("without a sweep" in text) == bool(suite.unswept_rates)


PAGES = pytest.mark.parametrize(
    "page", sorted(RECIPES[0].glob("results/*/README.md")), ids=lambda page: page.parent.name
)


def published_document(page: Path) -> Document:
    return suite_document(load_suite(page.parent.name), Store(page.parents[1] / "store").records())


def assert_same_size(picture: bytes, published: Path) -> None:
    """Another version of matplotlib may draw other pixels, but the size stays."""
    with Image.open(io.BytesIO(picture)) as one, Image.open(published) as other:
        assert (one.size, one.mode) == (other.size, other.mode)


@PAGES
def test_a_published_page_is_drawn_from_the_published_records(page: Path, undrawn: None) -> None:
    document = published_document(page)
    files = readme_files(document)
    assert files.pop(README_NAME).decode() == page.read_text()
    assert set(files) == {path.name for path in page.parent.glob("*.png")}
    picture = next(block for section in document.sections for block in section.blocks if isinstance(block, Picture))
    assert_same_size(render(picture.figure, "png"), page.parent / f"{picture.figure.get_label()}.png")


@pytest.mark.slow
@PAGES
def test_all_published_pictures_are_drawn_from_the_published_records(page: Path) -> None:
    files = readme_files(published_document(page))
    assert len(files) > 2
    for name, picture in files.items():
        if name != README_NAME:
            assert_same_size(picture, page.parent / name)


@pytest.mark.parametrize("name", RUN)
def test_the_plan_of_a_published_suite_needs_no_network(
    name: str, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_GA_DATA", str(sources.data))
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    path = toy_suite(name, tmp_path, RUN[name][0])
    assert main(["reproduce", str(path), "--dry-run", "--store", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    suite = load_suite(str(path))
    for task, about in suite.tasks.items():
        line = next(line for line in shown.splitlines() if line.startswith(f"{task}: "))
        assert about.model in line
        assert all(column in line for column in about.columns.values())
        assert ("not checked" in line) == about.model.startswith("hub:")
    assert "core-hours" in shown
    assert not (tmp_path / "runs").exists()
    assert main(["reproduce", str(path), "--dry-run", "--hub", str(sources.hub)]) == 0
    assert "not checked" not in capsys.readouterr().out


def test_the_plan_counts_the_cells_of_both_protocols_with_all_their_seeds(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_GA_DATA", str(sources.data))
    path = toy_suite("llama2-math", tmp_path, ["lora", "full"], seeds=3)
    assert main(["reproduce", str(path), "--dry-run", "--store", str(tmp_path / "runs")]) == 0
    # Each of the two methods has three rates, three seeds at the paper's rate, and two more seeds at the best rate.
    assert "16 cells left" in capsys.readouterr().out


def test_a_local_copy_that_is_another_model_is_refused(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_GA_DEBUG", "1")
    monkeypatch.setenv("LORA_GA_DATA", str(sources.data))
    with pytest.raises(
        ValueError, match="google-t5/t5-base: d_model is 16, but the suite expects 768. Give that model"
    ):
        main(["reproduce", "glue-t5", "--dry-run", "--hub", str(sources.hub)])


def test_a_hub_that_cannot_be_reached_is_reported_with_how_to_give_a_local_copy(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_GA_DEBUG", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = toy_suite("glue-t5", tmp_path, ["lora"])
    message = (
        "hub:google-t5/t5-base: its config.json could not be loaded .*"
        r"`hf download google-t5/t5-base --local-dir DIR/google-t5/t5-base`\) and give --hub DIR"
    )
    with pytest.raises(ValueError, match=f"(?s)tasks.mnli: {message}"):
        main(["reproduce", str(path), "--store", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()
    message = (
        "(?s)hub:nyu-mll/nothing:sst2:train: could not be loaded on the hub .*"
        "hf download nyu-mll/nothing --repo-type dataset --local-dir"
    )
    with pytest.raises(ValueError, match=message):
        Sources(hub=sources.hub).rows("hub:nyu-mll/nothing:sst2:train")
    with pytest.raises(ValueError, match="--hub nowhere: there is no such folder"):
        main(["reproduce", str(path), "--hub", "nowhere"])


def test_rows_for_classification_may_come_from_the_hub_and_a_plan_does_not_load_them(
    sources: Sources, tmp_path: Path
) -> None:
    task = load_suite(str(toy_suite("glue-minilm", tmp_path, ["lora"]))).tasks["sst2"]
    files = {"train": "hub:nyu-mll/glue:sst2:train", "validation": "hub:nyu-mll/glue:sst2:validation"}
    task = replace(task, files=files, columns={"text": "sentence", "label": "label"})
    found = check(task, replace(sources, hub=None, use_hub=False))
    assert [each.endswith("(columns sentence, label; not checked)") for each in found] == [False, True, True]
    assert "64 rows; columns sentence, label" in check(task, sources)[1]
