"""The store of a suite's records: one file of compressed JSON lines for each suite, to which records are appended."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_ga.experiments.records import gzip_lines
from lora_ga.experiments.records.fields import fault_of
from lora_ga.files import parse_json, write_atomically

SCHEMA = 1  # of a record
FORMAT, OLD_FORMAT = 2, 1  # of the folder: one file for each suite; one JSON file for each record
HEADER, LOCK, HOLDER, ENDING = "store.json", ".lock", ".lock.pid", ".jsonl.gz"
UNJUDGED = "unjudged"  # folder of trained models that have not been judged yet
Record = dict[str, Any]


class Store:
    """A folder of run records.

    `SUITE.jsonl.gz` holds the records of the cells that the suite SUITE ran first. A file that would get more text than
    readers take (`gzip_lines.MOST`) is left as it is, and `SUITE.2.jsonl.gz` goes on. A cell that two suites share has
    one digest and one record, in the file of the suite that ran it; reading therefore reads all files.

    A process that is killed loses at most the record that it was about to append. A second record of a cell is refused
    unless the first one has the status "failed". Reading needs no lock; adding does.
    """

    def __init__(self, folder: str | Path) -> None:
        """Args: folder: It need not exist."""
        self.folder = Path(folder)
        self._last: dict[str, Record] | None = None  # digest → record, while this process holds the lock
        self._sizes: dict[Path, int] = {}  # file → bytes of its text, while this process holds the lock

    def records(self) -> dict[str, Record]:
        """Every cell's digest → its record: the one that did not fail, or else its last attempt.

        Returns:
            An empty mapping if the folder does not exist.

        Raises:
            ValueError: The folder is not a store, has another version, or contains a damaged file.
        """
        return {record["digest"]: record for record in sorted(self.attempts(), key=_rank)}

    def attempts(self) -> list[Record]:
        """All records, those of failed attempts too, file by file.

        Returns:
            An empty list if the folder does not exist.

        Raises:
            ValueError: The folder is not a store, has another version, or contains a damaged file.
        """
        self._check()
        found = [
            _checked(f"{path}: line {number}", record)
            for path in self.files()
            for number, record in enumerate(gzip_lines.read(path), 1)
        ]
        return found + [_checked(str(path), _single(path)) for path in self.single_files()]

    def unjudged(self, digest: str = "") -> Path:
        """The folder of trained models that have not been evaluated yet, or that of one cell."""
        return self.folder / UNJUDGED / digest

    def files(self) -> list[Path]:
        """The files of the suites."""
        return sorted(self.folder.glob(f"*{ENDING}"))

    def single_files(self) -> list[Path]:
        """The records of an old store, which has one JSON file for each."""
        return sorted(path for path in self.folder.glob("*.json") if path.name != HEADER)

    @contextlib.contextmanager
    def locked(self) -> Iterator[Store]:
        """Creates the folder if needed and locks it against other processes; a killed process loses its lock.

        Yields:
            The store, to add to.

        Raises:
            ValueError: Another process has locked it, or the folder is not a store of this version.
        """
        self._check()
        self.folder.mkdir(parents=True, exist_ok=True)
        lock, holder = FileLock(self.folder / LOCK, timeout=0), self.folder / HOLDER
        try:
            lock.acquire()
        except Timeout as error:
            process = holder.read_text().strip() if holder.is_file() else ""
            raise ValueError(
                f"{self.folder}: another run (process {process or 'unknown'}) is adding to this store. "
                "Wait for it, or give another folder by --store."
            ) from error
        try:
            holder.write_text(str(os.getpid()))
            self._sizes = {path: gzip_lines.repair(path) for path in self.files()}
            self._last = self.records()
            if self._check() != FORMAT:
                write_atomically(
                    self.folder / HEADER, f"{json.dumps({'schema': FORMAT, 'kind': 'lora-ga runs'})}\n".encode()
                )
            yield self
        finally:
            self._last = None
            holder.unlink(missing_ok=True)
            lock.release()

    def add(self, record: Mapping[str, Any]) -> Path:
        """Appends a record to the file of its suite.

        Args:
            record: JSON values with "digest", "suite" and "status"; gets "schema" and "attempt".

        Returns:
            The file.

        Raises:
            RuntimeError: This process has not locked the store.
            ValueError: The record lacks what its readers need, or is larger than a file may be. Nothing is written.
            FileExistsError: The cell has a record whose status is not "failed".
        """
        if self._last is None:
            raise RuntimeError(f"{self.folder}: add to a store only inside its locked().")
        digest, before = record["digest"], self._last.get(record["digest"])
        if before is not None and before["status"] != "failed":
            raise FileExistsError(f"{self.folder}: the cell {digest} has run; its record is never replaced.")
        attempt = 1 if before is None else before["attempt"] + 1
        whole = {"schema": SCHEMA, **record, "attempt": attempt}
        if fault := fault_of(whole):
            raise ValueError(f"{self.folder}: the record of the cell {digest} cannot be added: {fault}.")
        path, size = self._place_for(whole, self._sizes)
        gzip_lines.append(path, whole)
        self._sizes[path] = size
        self._last[digest] = whole
        return path

    def compact(self) -> list[Path]:
        """Rewrites the store for publication: every suite's file is sorted and compressed as a whole.

        All attempts are kept, and no record changes. The single JSON files of an old store move into the files of their
        suites. If the process is killed, nothing is lost: old files are removed after all new ones are written.
        Equal records give equal files.

        Returns:
            The files.

        Raises:
            RuntimeError: This process has not locked the store.
        """
        if self._last is None:
            raise RuntimeError(f"{self.folder}: compact a store only inside its locked().")
        old = [*self.files(), *self.single_files()]
        once = {json.dumps(record, sort_keys=True): record for record in self.attempts()}
        files: dict[Path, list[Record]] = defaultdict(list)
        sizes: dict[Path, int] = {}
        for record in sorted(once.values(), key=lambda record: (record["suite"], _place(record))):
            path, sizes[path] = self._place_for(record, sizes)
            files[path].append(record)
        # A record may move from a file that is written now into one that is written later: until then it is in a copy.
        copies = [self._copied(path) for path in old if path in files]
        for path, records in files.items():
            write_atomically(path, gzip_lines.encode(records))
        for path in (*old, *copies):
            if path not in files:
                path.unlink()
        self._sizes = sizes
        return sorted(files)

    def _copied(self, path: Path) -> Path:
        """Copies a file to a name that no file has; copies of an interrupted run may be there already."""
        stem = path.name.removesuffix(ENDING)
        names = (path.with_name(f"{stem}.old{number}{ENDING}") for number in itertools.count(1))
        copy = next(name for name in names if not name.exists())
        write_atomically(copy, path.read_bytes())
        return copy

    def _place_for(self, record: Record, sizes: Mapping[Path, int]) -> tuple[Path, int]:
        """The first file of a suite that has room for a record, and the bytes of its text with the record in it.

        Args:
            record: The record.
            sizes: File → bytes of its text.

        Returns:
            The file and the bytes.

        Raises:
            ValueError: The record is larger than a file may be.
        """
        size = len(gzip_lines.line(record))
        if size > gzip_lines.MOST:
            raise ValueError(
                f"{self.folder}: the record of the cell {record['digest']} has {size:,} bytes of text; a file of a "
                f"store holds at most {gzip_lines.MOST:,}. Train with fewer steps, or evaluate less often (eval_steps)."
            )
        suite = record["suite"]
        paths = (self._file(suite if number == 1 else f"{suite}.{number}") for number in itertools.count(1))
        path = next(path for path in paths if sizes.get(path, 0) + size <= gzip_lines.MOST)
        return path, sizes.get(path, 0) + size

    def _file(self, suite: str) -> Path:
        if not suite or Path(suite).name != suite:
            raise ValueError(f"{self.folder}: {suite!r} cannot be the name of a suite, as it is no name of a file.")
        return self.folder / f"{suite}{ENDING}"

    def _check(self) -> int | None:
        """Finds out the format of the folder.

        Returns:
            The format; None if the folder is empty or does not exist.

        Raises:
            ValueError: The folder is not a store, or has another version.
        """
        if not self.folder.exists():
            return None
        names = {path.name for path in self.folder.iterdir()}  # read once: another process may be adding
        if HEADER not in names:
            strange = sorted(name for name in names if not name.startswith((LOCK, f".{HEADER}")))
            if strange:
                raise ValueError(
                    f"{self.folder}: holds {strange[0]} but no {HEADER}, so it is no store of runs. "
                    "Give an empty folder, or one that does not exist, by --store."
                )
            return None
        try:
            header = parse_json((self.folder / HEADER).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{self.folder / HEADER}: damaged, it is not JSON ({error}). Restore it from a copy; it holds "
                f'{{"schema": {FORMAT}}} for a store of files that end in {ENDING}.'
            ) from error
        found = header.get("schema") if isinstance(header, dict) else None
        if isinstance(found, bool) or found not in (OLD_FORMAT, FORMAT):
            raise ValueError(
                f"{self.folder}: written in format {found}, this version reads format {OLD_FORMAT} or {FORMAT}. "
                "Use the version of lora-ga that wrote it, or another folder by --store."
            )
        return int(found)


def _rank(record: Record) -> tuple[bool, int]:
    """Larger for the record that counts among several of one cell."""
    return record["status"] != "failed", record["attempt"]


def _place(record: Record) -> tuple[Any, ...]:
    """The place of a record in a compacted file."""
    keys = ("task", "label", "learning_rate", "seed")
    return (*(str(record.get(key)) for key in keys), record["digest"], record["attempt"])


def _single(path: Path) -> Record:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged, it is not JSON ({error}). Remove it to run its cell again.") from error


def _checked(place: str, record: Any) -> Record:
    found = record.get("schema") if isinstance(record, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{place}: written in format {found}, this version reads format {SCHEMA}.")
    if fault := fault_of(record):
        raise ValueError(
            f"{place}: a damaged record: {fault}. Restore the file from a copy; or take the record out, to run its "
            "cell again."
        )
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """Prepares the store in a folder for publication, converts an old one, and prints its files; see `Store.compact`.

    Args:
        argv: The arguments; by default those of the command line.

    Raises:
        ValueError: The folder does not exist or is not a store.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lora_ga.experiments.records.store",
        description="Prepares the store in a folder for publication: one compact file for each suite.",
    )
    parser.add_argument("folder", type=Path, help="the folder of the store")
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder. Give the folder of a store.")
    with Store(folder).locked() as store:
        for path in store.compact():
            sys.stdout.write(f"{path} ({path.stat().st_size} bytes)\n")


if __name__ == "__main__":
    main()
