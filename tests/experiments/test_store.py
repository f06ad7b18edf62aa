"""The store of run records: one append-only file per suite, one writer at a time, one format."""

import gzip
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import processes
from lora_ga.experiments.records import gzip_lines
from lora_ga.experiments.records.store import ENDING, FORMAT, HEADER, SCHEMA, Store
from lora_ga.experiments.records.store import main as store_command
from lora_ga.files import write_atomically

DIGEST = "0" * 12


def record(digest: str = DIGEST, suite: str = "toy", **changes: Any) -> dict[str, Any]:
    """A record with all that readers need."""
    status = changes.get("status", "done")
    whole = {
        "digest": digest,
        "suite": suite,
        "task": "text",
        "label": "lora",
        "learning_rate": 0.001,
        "seed": 0,
        "cell": {"method": "lora"},
        "commit": None,
        "versions": {"torch": "2.13.0"},
        "device": "cpu, 1 thread",
        "date": "2026-01-02T03:04:05+00:00",
        "status": "done",
        "seconds": {},
        "curves": {"training": [2.0, None], "report": [{"step": 2, "loss": 1.5}]},
    }
    if status != "done":
        return whole | {"reason": "the training loss is nan at step 2"} | changes
    measured = {"metrics": {split: {"loss": 1.5} for split in ("tune", "report")}, "trained_parameters": 10}
    seconds = dict.fromkeys(("load", "start", "train", "total"), 1.0)
    return whole | measured | {"seconds": seconds, "peak_memory_mib": 500.0} | changes


def old_store(folder: Path, *records: dict[str, Any]) -> Path:
    """Writes a store in the old format: one JSON file per record."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HEADER).write_text(json.dumps({"schema": 1, "kind": "lora-ga runs"}))
    for each in records:
        whole = {"schema": SCHEMA, "attempt": 1, **each}
        (folder / f"a-{whole['digest']}-{whole['attempt']}.json").write_text(json.dumps(whole))
    return folder


def test_added_records_are_read_back(tmp_path: Path) -> None:
    with Store(tmp_path / "runs").locked() as store:
        path = store.add(record())
        store.add(record("1" * 12))
        store.add(record("2" * 12, suite="other"))
    assert path.name == f"toy{ENDING}"
    assert sorted(each.name for each in (tmp_path / "runs").glob("*")) == [
        ".lock", f"other{ENDING}", HEADER, f"toy{ENDING}",
    ]  # fmt: skip
    found = Store(tmp_path / "runs").records()
    assert found[DIGEST] == record() | {"schema": SCHEMA, "attempt": 1}
    assert sorted(found) == ["0" * 12, "1" * 12, "2" * 12]


def test_the_file_of_a_suite_is_gzipped_json_lines(tmp_path: Path) -> None:
    with Store(tmp_path).locked() as store:
        path = store.add(record())
        store.add(record("1" * 12))
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    assert [json.loads(line)["digest"] for line in lines] == ["0" * 12, "1" * 12]


def test_stores_are_merged_by_appending_their_files(tmp_path: Path) -> None:
    for number in "12":
        with Store(tmp_path / number).locked() as store:
            store.add(record(number * 12))
    one, other = (tmp_path / number / f"toy{ENDING}" for number in "12")
    one.write_bytes(one.read_bytes() + other.read_bytes())
    assert sorted(Store(tmp_path / "1").records()) == ["1" * 12, "2" * 12]


def test_a_missing_folder_has_no_records_and_is_not_created(tmp_path: Path) -> None:
    assert Store(tmp_path / "runs").records() == {}
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("status", ["done", "diverged"])
def test_the_record_of_a_cell_that_has_run_is_never_replaced(tmp_path: Path, status: str) -> None:
    with Store(tmp_path).locked() as store:
        path = store.add(record(status=status))
        before = path.read_bytes()
        with pytest.raises(FileExistsError, match="the cell 000000000000 has run; its record is never replaced"):
            store.add(record(suite="other"))
    with Store(tmp_path).locked() as store, pytest.raises(FileExistsError, match="the cell 000000000000 has run"):
        store.add(record())
    assert path.read_bytes() == before
    assert Store(tmp_path).files() == [path]


def test_a_failed_cell_gets_a_second_record_and_keeps_the_first(tmp_path: Path) -> None:
    with Store(tmp_path).locked() as store:
        store.add(record(status="failed"))
        store.add(record())
        found = store.records()
    assert found[DIGEST]["status"] == "done"
    assert found[DIGEST]["attempt"] == 2
    assert [each["status"] for each in Store(tmp_path).attempts()] == ["failed", "done"]


def test_a_second_run_on_a_locked_store_is_refused(tmp_path: Path) -> None:
    with Store(tmp_path).locked(), pytest.raises(ValueError, match=f"another run .process {os.getpid()}. is adding"):
        Store(tmp_path).locked().__enter__()
    # The lock is free again.
    with Store(tmp_path).locked() as store:
        store.add(record())


def lock(folder: Path, answer: Path) -> None:
    """Locks a store, and writes the error if it is refused."""
    try:
        Store(folder).locked().__enter__()
    except ValueError as error:
        answer.write_text(str(error))
    else:
        answer.write_text("locked")


def test_another_process_is_refused_too_and_does_not_release_the_lock(tmp_path: Path) -> None:
    def answer_of_another_process() -> str:
        assert processes.exit_codes([processes.start(lock, tmp_path / "store", tmp_path / "answer")]) == [0]
        return (tmp_path / "answer").read_text()

    with Store(tmp_path / "store").locked() as store:
        for _ in range(2):
            message = f"another run (process {os.getpid()}) is adding to this store. Wait for it, or give"
            assert message in answer_of_another_process()
        store.add(record())
    assert answer_of_another_process() == "locked"


def test_adding_and_compacting_need_the_lock(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"add to a store only inside its locked\(\)"):
        Store(tmp_path).add(record())
    with pytest.raises(RuntimeError, match=r"compact a store only inside its locked\(\)"):
        Store(tmp_path).compact()


def test_a_store_of_another_version_is_refused_and_not_changed(tmp_path: Path) -> None:
    (tmp_path / HEADER).write_text(json.dumps({"schema": FORMAT + 1}))
    for use in (lambda: Store(tmp_path).records(), lambda: Store(tmp_path).locked().__enter__()):
        with pytest.raises(
            ValueError, match=f"written in format {FORMAT + 1}, this version reads format 1 or {FORMAT}"
        ):
            use()
    assert [path.name for path in tmp_path.iterdir()] == [HEADER]


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    with Store(tmp_path).locked() as store:
        path = store.add(record())
    gzip_lines.append(path, record("1" * 12) | {"schema": SCHEMA + 1, "attempt": 1})
    with pytest.raises(
        ValueError, match=rf"toy\.jsonl\.gz: line 2: written in format {SCHEMA + 1}, this version reads"
    ):
        Store(tmp_path).records()


@pytest.mark.parametrize(
    ("status", "path", "value", "fault"),
    [
        ("done", "versions", None, "it has no versions"),
        ("done", "commit", None, "it has no commit"),
        ("done", "peak_memory_mib", None, "it has no peak_memory_mib"),
        ("done", "curves", None, "it has no curves"),
        ("done", "metrics", None, "it has no metrics"),
        ("done", "metrics.report", None, "it has no metrics.report"),
        ("done", "seconds.train", None, "it has no seconds.train"),
        ("failed", "reason", None, "it has no reason"),
        ("diverged", "date", None, "it has no date"),
        ("done", "status", "ended", "its status is 'ended', and must be done, diverged, failed"),
        ("done", "metrics.report.loss", "1.5", "its metrics.report is {'loss': '1.5'}, and must be a mapping of names"),
        ("done", "curves.training", [1.0, "2"], r"its curves.training is \[1.0, '2'\], and must be a list of numbers"),
        ("done", "curves.report", [{"loss": 1.0}], "its curves.report is .*, and must be a list of evaluations"),
        ("diverged", "seed", True, "its seed is True, and must be a whole number"),
        ("done", "attempt", "1", "its attempt is '1', and must be a whole number"),
    ],
)
def test_a_record_that_lacks_what_readers_need_is_refused_with_its_line_and_field_and_never_written(
    tmp_path: Path, status: str, path: str, value: Any, fault: str
) -> None:
    broken: dict[str, Any] = record("1" * 12, status=status)
    *outer, last = path.split(".")
    inner = broken
    for key in outer:
        inner = inner[key]
    inner.pop(last, None)
    if value is not None:
        inner[last] = value
    with Store(tmp_path).locked() as store:
        file = store.add(record())
        whole = file.read_bytes()
        if path != "attempt":  # which the store itself gives
            with pytest.raises(ValueError, match=f"the record of the cell 1{{12}} cannot be added: {fault}"):
                store.add(broken)
        assert file.read_bytes() == whole
    gzip_lines.append(file, {"schema": SCHEMA, "attempt": 1, **broken})
    with pytest.raises(ValueError, match=f"toy.jsonl.gz: line 2: a damaged record: {fault}.*Restore the file from a c"):
        Store(tmp_path).records()


def test_a_folder_that_is_not_a_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"holds thesis\.tex but no store\.json, so it is no store of runs"):
        Store(tmp_path).locked().__enter__()


@pytest.mark.parametrize("suite", ["../toy", "a/b", ""])
def test_a_suite_whose_name_cannot_be_a_file_name_is_refused(tmp_path: Path, suite: str) -> None:
    with Store(tmp_path / "runs").locked() as store, pytest.raises(ValueError, match="cannot be the name of a suite"):
        store.add(record(suite=suite))


@pytest.mark.parametrize("left", [1, 12, -1])
def test_an_incomplete_last_record_is_ignored_and_removed_before_the_next_one_is_added(
    tmp_path: Path, left: int
) -> None:
    with Store(tmp_path).locked() as store:
        path = store.add(record())
        first = path.read_bytes()
        store.add(record("1" * 12))
    path.write_bytes(first + path.read_bytes()[len(first) :][:left])
    assert list(Store(tmp_path).records()) == [DIGEST]
    # Reading does not change the file.
    assert len(path.read_bytes()) > len(first)
    with Store(tmp_path).locked() as store:
        assert path.read_bytes() == first
        store.add(record("2" * 12))
    assert list(Store(tmp_path).records()) == [DIGEST, "2" * 12]


def test_zeros_that_a_power_failure_leaves_at_the_end_are_removed(tmp_path: Path) -> None:
    with Store(tmp_path).locked() as store:
        path = store.add(record())
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 100)
    assert list(Store(tmp_path).records()) == [DIGEST]
    with Store(tmp_path).locked():
        assert path.read_bytes() == whole


def test_a_failed_write_leaves_the_file_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError("no space left on device")

    with Store(tmp_path).locked() as store:
        path = store.add(record())
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr("lora_ga.experiments.records.gzip_lines.os.fsync", full)
            with pytest.raises(OSError, match="no space left"):
                store.add(record("1" * 12))
        assert path.read_bytes() == before
        store.add(record("1" * 12))
    assert len(Store(tmp_path).records()) == 2


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    with Store(tmp_path).locked() as store:
        path = store.add(record())
        first = len(path.read_bytes())
        store.add(record("1" * 12))
        store.add(record("2" * 12))
    whole = bytearray(path.read_bytes())
    whole[first + 20] ^= 255
    path.write_bytes(whole)
    message = rf"toy\.jsonl\.gz: damaged after byte {first} .*Restore the file from a copy"
    for use in (Store(tmp_path).records, Store(tmp_path).locked().__enter__):
        with pytest.raises(ValueError, match=message):
            use()
    assert path.read_bytes() == whole
    path.write_bytes(gzip.compress(b"[1]\n"))
    with pytest.raises(ValueError, match=r"toy\.jsonl\.gz: line 1 is not a JSON object"):
        Store(tmp_path).records()
    path.write_bytes(gzip.compress(b"{}\n{\n"))
    with pytest.raises(ValueError, match=r"toy\.jsonl\.gz: line 2 is damaged, it is not JSON"):
        Store(tmp_path).records()


def test_an_old_store_is_readable_and_takes_new_records(tmp_path: Path) -> None:
    folder = old_store(tmp_path / "runs", record(), record("1" * 12, status="failed"))
    assert sorted(Store(folder).records()) == ["0" * 12, "1" * 12]
    with Store(folder).locked() as store:
        with pytest.raises(FileExistsError, match="the cell 000000000000 has run"):
            store.add(record())
        store.add(record("1" * 12))
    found = Store(folder).records()["1" * 12]
    assert (found["status"], found["attempt"]) == ("done", 2)
    # A version that reads only single files must refuse the store, and not run everything again.
    assert json.loads((folder / HEADER).read_text())["schema"] == FORMAT


def test_a_damaged_record_of_an_old_store_is_refused_by_name(tmp_path: Path) -> None:
    folder = old_store(tmp_path / "runs", record())
    (folder / "a-000000000000-1.json").write_text('{"digest": ')
    with pytest.raises(ValueError, match=r"a-000000000000-1\.json: damaged, it is not JSON"):
        Store(folder).records()


def test_compacting_keeps_every_attempt_once_in_one_file_per_suite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"text": "x" * 500}
    old = [record(), record("1" * 12, suite="other"), record("2" * 12, status="failed")]
    folder = old_store(tmp_path / "runs", *old)
    with Store(folder).locked() as store:
        for number in range(10, 40):
            store.add(record(f"{number:012}", **texts))
        store.add(record("2" * 12))
    # A second file with the same records, as a user who merges two stores may leave it.
    (folder / f"copy{ENDING}").write_bytes((folder / f"toy{ENDING}").read_bytes())
    before, size = Store(folder).records(), (folder / f"toy{ENDING}").stat().st_size
    store_command([str(folder)])
    assert f"toy{ENDING}" in capsys.readouterr().out
    assert sorted(path.name for path in folder.glob("[!.]*")) == [f"other{ENDING}", HEADER, f"toy{ENDING}"]
    assert Store(folder).records() == before
    assert len(Store(folder).attempts()) == len(before) + 1
    assert (folder / f"toy{ENDING}").stat().st_size < size / 3
    content = (folder / f"toy{ENDING}").read_bytes()
    store_command([str(folder)])
    # Equal records give equal files.
    assert (folder / f"toy{ENDING}").read_bytes() == content
    with Store(folder).locked() as store:
        store.add(record("9" * 12))
    assert len(Store(folder).records()) == len(before) + 1


def test_a_full_file_is_followed_by_a_second_one_and_every_record_can_be_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"toy{ENDING}", f"toy.2{ENDING}", f"toy.3{ENDING}"]
    line = len(gzip_lines.line({"schema": SCHEMA, **record(), "attempt": 1}))
    monkeypatch.setattr(gzip_lines, "MOST", 2 * line)
    for number in range(5):  # each time by a process that has to find the room
        with Store(tmp_path).locked() as store:
            assert store.add(record(f"{number:012}")).name == names[number // 2]
    assert sorted(Store(tmp_path).records()) == [f"{number:012}" for number in range(5)]
    with Store(tmp_path).locked() as store:
        store.add(record("9" * 12, suite="other"))
        with pytest.raises(
            ValueError, match=f"of the cell 7{{12}} has .* bytes of text; a file .* at most {2 * line:,}"
        ):
            store.add(record("7" * 12, note="x" * 2 * line))
        assert [path.name for path in store.compact()] == [f"other{ENDING}", *sorted(names)]
        assert store.add(record("6" * 12)).name == names[2]
    assert len(Store(tmp_path).records()) == 7


def test_interrupted_compacting_keeps_records_that_move_from_one_file_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gzip_lines, "MOST", 2 * len(gzip_lines.line({"schema": SCHEMA, **record(), "attempt": 1})))
    with Store(tmp_path).locked() as store:
        for number in (4, 3, 2, 1):  # in the order of their digests each goes into the other file
            store.add(record(f"{number:012}"))
    before = Store(tmp_path).records()

    def killed(path: Path, content: bytes) -> None:
        write_atomically(path, content)
        if path.name == f"toy{ENDING}":
            raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch, Store(tmp_path).locked() as store:
            patch.setattr("lora_ga.experiments.records.store.write_atomically", killed)
            with pytest.raises(KeyboardInterrupt):
                store.compact()
        assert Store(tmp_path).records() == before
    store_command([str(tmp_path)])
    assert Store(tmp_path).records() == before
    assert len(Store(tmp_path).attempts()) == 4


def test_a_file_with_more_text_than_is_read_is_refused_and_the_advice_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in "12":
        with Store(tmp_path / number).locked() as store:
            store.add(record(number * 12))
    one, other = (tmp_path / number / f"toy{ENDING}" for number in "12")
    whole = one.read_bytes()
    one.write_bytes(whole + other.read_bytes())
    monkeypatch.setattr(gzip_lines, "MOST", 1000)
    with pytest.raises(
        ValueError, match=r"toy\.jsonl\.gz: holds more than 1,000 bytes of text.* under two names that e"
    ):
        Store(tmp_path / "1").records()
    one.write_bytes(whole)
    (tmp_path / "1" / f"from-the-other{ENDING}").write_bytes(other.read_bytes())
    assert sorted(Store(tmp_path / "1").records()) == ["1" * 12, "2" * 12]


def test_interrupted_compacting_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = old_store(tmp_path / "runs", record(), record("1" * 12, suite="other"))

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    before = Store(folder).records()
    with monkeypatch.context() as patch, Store(folder).locked() as store:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            store.compact()
        patch.undo()
    assert Store(folder).records() == before
    store_command([str(folder)])
    assert Store(folder).records() == before
    assert Store(folder).single_files() == []


def test_compacting_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder. Give the folder of a store"):
        store_command([str(tmp_path / "nothing")])


def add_forever(folder: Path) -> None:
    with Store(folder).locked() as store:
        for number in range(10**6):
            # Random text compresses badly, so that a write takes long.
            noise = os.urandom(20000).hex()
            store.add(record(f"{number:012}", text=noise))


def test_a_store_whose_writer_was_killed_holds_whole_records_and_takes_new_ones(tmp_path: Path) -> None:
    added = 0
    for turn in range(5):
        folder = tmp_path / str(turn)
        process = multiprocessing.get_context("fork").Process(target=add_forever, args=(folder,))
        process.start()
        while not Store(folder).records():
            time.sleep(0.001)
        time.sleep(0.003 * turn)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = Store(folder).records()
        assert all(len(each["text"]) == 40000 for each in found.values())
        assert sorted(found) == [f"{number:012}" for number in range(len(found))]
        # The lock was freed with the process, and taking it removes an incomplete record.
        with Store(folder).locked() as store:
            store.add(record("9" * 12))
        assert len(Store(folder).records()) == len(found) + 1
        added += len(found)
    assert added >= 5
