"""The record of a run is read completely, or refused with a reason."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lora_ga.experiments.comparison.runs import compare_runs
from lora_ga.experiments.pages.document import Document, Section, html_page, markdown_files
from lora_ga.experiments.pages.drawing import render
from lora_ga.experiments.pages.runs import page_html, short_place, training_caption, training_figure
from lora_ga.experiments.records.runs import load_run, write_json_atomically
from lora_ga.experiments.tables.table import Table
from runs import falling_losses, make_run, write_run


def test_a_record_is_read_with_its_curves_and_results_only(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    assert run.curve[:2] == ((1, 3.95), (2, 3.9))
    assert run.evals == {"eval_loss": ((20, 3.0),), "eval_accuracy": ((20, 0.5),)}
    assert run.metrics == {"eval_loss": 2.5, "eval_accuracy": 0.75}
    assert run.seconds == {"train": 60.0, "total": 61.0}


def test_a_loss_that_is_not_finite_is_written_as_null_and_read_as_nan(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", curve=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.inf}])
    assert json.loads((tmp_path / "a/run.json").read_text())["curve"][1]["loss"] is None
    assert math.isnan(run.curve[1][1])


def test_a_missing_folder_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone: this folder does not exist\. Give the --output_dir"):
        load_run(tmp_path / "gone")


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="this is a file"):
        load_run(tmp_path / "run.json")


def test_a_folder_without_a_record_is_refused_as_an_unfinished_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no run\.json in it .*lora-ga train --resume --output_dir /"):
        load_run(tmp_path)


@pytest.mark.parametrize("content", [b'{"schema": 1,', b"\xff\xfe", b""])
def test_a_damaged_record_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json: damaged, it is not JSON"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 7}, "schema 7, but this version of lora-ga reads schema 1"),
        ({"learning_rate": "high"}, '"learning_rate" should be int or float, but there is str'),
        ({"rank": "8"}, '"rank" should be int or null, but there is str'),
        ({"curve": [{"step": 1}]}, 'entry 0 of "curve" should have step and loss as numbers'),
        ({"eval": [{"eval_loss": 1.0}]}, 'entry 0 of "eval" should have step as numbers'),
    ],
)
def test_a_record_with_wrong_fields_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_run(tmp_path / "a", **changes)


@pytest.mark.parametrize("content", ["[]", "{}"])
def test_json_that_is_not_a_record_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match='not the record of a run, it has no "schema"'):
        load_run(tmp_path)


def test_a_failed_write_leaves_the_old_record_and_no_other_file(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a") / "run.json"
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json_atomically(path, {"no": object()})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


class Tags(HTMLParser):
    """Collects tags and attributes, and the text between them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = '<script src="http://evil.example/x.js">alert(1)</script> $x$ & _"'


def hostile_page(tmp_path: Path) -> str:
    text = dict.fromkeys(("name", "task", "model", "dataset", "device", "commit"), HOSTILE)
    config = {HOSTILE: HOSTILE, "x": 1}
    runs = [
        make_run(tmp_path / "a", **text, versions={HOSTILE: HOSTILE}, config=config, metrics={HOSTILE: 1.0}),
        make_run(tmp_path / "b", **text | {"name": "_hidden"}, config=config | {"x": HOSTILE}, seed=1),
    ]
    return page_html(compare_runs(runs))


def test_the_texts_of_a_record_never_become_tags(tmp_path: Path) -> None:
    parser = Tags()
    parser.feed(hostile_page(tmp_path))
    assert "script" not in {tag for tag, _ in parser.tags}
    assert HOSTILE in parser.text


def test_every_text_of_a_document_is_escaped() -> None:
    table = Table([HOSTILE], [[HOSTILE]], bold={(0, 0)}, row_colours=["#000000"])
    document = Document(HOSTILE, HOSTILE, [HOSTILE], [Section(HOSTILE, [HOSTILE, table])])
    page = html_page(document)
    assert "<script" not in page
    assert page.count("&lt;script") == 8  # the title is on the page twice
    parser = Tags()
    parser.feed(page)
    assert parser.text.count(HOSTILE) == 8


def test_the_content_security_policy_allows_inline_styles_only(tmp_path: Path) -> None:
    parser = Tags()
    parser.feed(page_html(compare_runs([make_run(tmp_path / "a")])))
    (policy,) = [attributes["content"] for _, attributes in parser.tags if "http-equiv" in attributes]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_a_table_has_the_same_marks_in_html_and_in_markdown() -> None:
    table = Table(["", "x"], [["a|b", "1"], ["c", "2"]], bold={(1, 1)}, row_colours=["#111111", "#222222"])
    document = Document("", "", [], [Section("", [table, replace(table, left_aligned=True, row_colours=[])])])
    page = html_page(document)
    assert '<td><i style="background:#222222"></i>c</td><td><b>2</b></td>' in page
    assert page.count("<i ") == 2
    assert page.count('<table class="text">') == 1
    text = markdown_files(document, "a.md")["a.md"].decode()
    assert "| --- | ---: |\n| a\\|b | 1 |\n| c | **2** |\n" in text
    assert "| --- | --- |" in text


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    page = page_html(compare_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)]))
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", without_namespaces)
    parser = Tags()
    parser.feed(page)
    assert {"script", "link", "iframe", "img"}.isdisjoint(tag for tag, _ in parser.tags)
    references = [value for _, attributes in parser.tags for key, value in attributes.items() if key.endswith("href")]
    assert all(value and value.startswith("#") for value in references)


def test_ids_are_unique_and_the_page_is_the_same_every_time(tmp_path: Path) -> None:
    comparison = compare_runs([make_run(tmp_path / "a")])
    page = page_html(comparison)
    ids = re.findall(r'\bid="(m?[pc]?[0-9a-f]{10,})"', page)  # the ids that something refers to
    assert len(ids) == len(set(ids)) > 0
    assert page == page_html(comparison)


def test_the_caption_states_how_the_curve_was_made(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", curve=[*falling_losses(1.0), {"step": 41, "loss": 50.0}])]
    assert training_caption(compare_runs(runs, window=8)) == (
        "Training loss, trailing mean over 8 optimiser steps. Faint lines: the values as logged. Dashed line: the "
        "target, the final loss of “lora”; a dot marks the step that reaches it. Losses above 5.925 are cut off."
    )


def test_runs_without_a_curve_still_make_a_page(tmp_path: Path) -> None:
    comparison = compare_runs([make_run(tmp_path / "a", curve=[], eval=[])])
    assert comparison.target.value is None
    assert "no training loss was logged" in page_html(comparison)


def test_dots_of_runs_that_reach_the_target_at_one_step_are_rings_and_paths_are_short(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, name=name, method=name, model="/a/long/path/minilm/model") for name in ("a", "b")]
    comparison = compare_runs(runs)
    (axes,) = training_figure(comparison).axes
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [dot.get_markersize() for dot in dots] == [12, 7]
    page = page_html(comparison)
    assert "minilm/model · " in page
    assert short_place("nyu-mll/glue/mrpc (train)") == "nyu-mll/glue/mrpc (train)"


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    figure = training_figure(compare_runs([make_run(tmp_path / "a")]))
    assert render(figure, "png").startswith(b"\x89PNG")
