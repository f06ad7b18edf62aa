"""The store of run records: whole files, never replaced, one run at a time, one version."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lora_ga.experiments.records.store import HEADER, SCHEMA, TEMPORARY, Store


def record(digest: str = "0" * 12, **changes: Any) -> dict[str, Any]:
    return {"digest": digest, "status": "done", "loss": 1.5, **changes}


def test_what_was_added_is_read(tmp_path: Path) -> None:
    with Store(tmp_path / "runs").locked() as store:
        path = store.add("a-000000000000", record())
    assert path.name == "a-000000000000.json"
    assert Store(tmp_path / "runs").records() == {
        "000000000000": record() | {"schema": SCHEMA, "attempt": 1},
    }


def test_a_folder_that_is_not_there_has_no_records_and_is_not_made(tmp_path: Path) -> None:
    assert Store(tmp_path / "runs").records() == {}
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("status", ["done", "diverged"])
def test_a_cell_that_has_run_is_never_replaced(tmp_path: Path, status: str) -> None:
    with Store(tmp_path).locked() as store:
        path = store.add("a-000000000000", record(status=status))
        before = path.read_bytes()
        with pytest.raises(FileExistsError, match="the cell b-000000000000 has run; its record is never replaced"):
            store.add("b-000000000000", record())
    assert path.read_bytes() == before
    assert len(list(tmp_path.glob("*-000000000000*.json"))) == 1


def test_a_failed_cell_gets_a_second_record_and_keeps_the_first(tmp_path: Path) -> None:
    with Store(tmp_path).locked() as store:
        store.add("a-000000000000", record(status="failed"))
        store.add("a-000000000000", record())
        found = store.records()
    assert found["000000000000"]["status"] == "done"
    assert found["000000000000"]["attempt"] == 2
    assert len(list(tmp_path.glob("a-*.json"))) == 2


def test_two_runs_on_one_store_are_refused(tmp_path: Path) -> None:
    with Store(tmp_path).locked(), pytest.raises(ValueError, match=f"another run .process {os.getpid()}. is adding"):
        Store(tmp_path).locked().__enter__()
    with Store(tmp_path).locked() as store:  # free again
        store.add("a-000000000000", record())


def test_adding_needs_the_lock(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"add to a store only inside its locked\(\)"):
        Store(tmp_path).add("a-000000000000", record())


def test_a_store_of_another_version_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / HEADER).write_text(json.dumps({"schema": SCHEMA + 1}))
    for use in (lambda: Store(tmp_path).records(), lambda: Store(tmp_path).locked().__enter__()):
        with pytest.raises(ValueError, match=f"written in format {SCHEMA + 1}, this version reads format {SCHEMA}"):
            use()
    assert [path.name for path in tmp_path.iterdir()] == [HEADER]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"holds thesis\.tex but no store\.json, so it is no store of runs"):
        Store(tmp_path).locked().__enter__()


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    with Store(tmp_path).locked() as store:
        store.add("a-000000000000", record()).write_text('{"digest": ')
    with pytest.raises(ValueError, match=r"a-000000000000\.json: damaged, no JSON"):
        Store(tmp_path).records()


def add_for_ever(folder: Path) -> None:
    with Store(folder).locked() as store:
        for number in range(10**6):
            store.add(f"a-{number:012}", record(f"{number:012}", text="x" * 20000))


def test_killed_at_any_moment_every_record_is_whole_and_the_store_goes_on(tmp_path: Path) -> None:
    added = 0
    for turn in range(5):
        folder = tmp_path / str(turn)
        process = multiprocessing.get_context("fork").Process(target=add_for_ever, args=(folder,))
        process.start()
        while not list(folder.glob("a-*.json")):
            time.sleep(0.001)
        time.sleep(0.003 * turn)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = Store(folder).records()
        assert all(len(each["text"]) == 20000 for each in found.values())
        assert sorted(found) == [f"{number:012}" for number in range(len(found))]
        with Store(folder).locked() as store:  # the lock went with the process, and so does what it left half done
            assert not list(folder.glob(f"{TEMPORARY}*"))
            store.add("z-999999999999", record("9" * 12))
        added += len(found)
    assert added >= 5
