"""The record of a run is read completely, or refused with a reason."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lora_ga.experiments.records.runs import load_run, write_json_atomically
from runs import make_run, write_run


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
    with pytest.raises(FileNotFoundError, match=r"unfinished run, there is no run\.json in it"):
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
