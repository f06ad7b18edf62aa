"""The records of a suite's runs: a folder to which whole files are added, and nothing is ever changed."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1
HEADER, LOCK, TEMPORARY = "store.json", ".lock", ".adding-"


class Store:
    """A folder of run records.

    A record appears under its name whole or not at all, whenever the process is killed; a second one for the same cell
    is refused, unless the first says "failed". Reading needs no lock; adding does.
    """

    def __init__(self, folder: str | Path) -> None:
        """Args: folder: It need not exist."""
        self.folder = Path(folder)
        self._held = False

    def records(self) -> dict[str, dict[str, Any]]:
        """Every cell's digest → its record, the last attempt of it.

        Returns:
            None for a folder that does not exist: an empty mapping.

        Raises:
            ValueError: The folder is something else, was written by another version, or holds a damaged file.
        """
        self._check()
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("*.json")):
            if path.name == HEADER:
                continue
            record = _read(path)
            before = found.get(record["digest"])
            if before is None or before["attempt"] < record["attempt"]:
                found[record["digest"]] = record
        return found

    @contextlib.contextmanager
    def locked(self) -> Iterator[Store]:
        """Makes the folder if need be, and keeps other runs out of it; the system lifts the lock of a killed process.

        Yields:
            The store, to add to.

        Raises:
            ValueError: Another process holds it, or the folder is no store of this version.
        """
        import fcntl  # not on Windows, where the rest of the package works

        self._check()
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                raise ValueError(
                    f"{self.folder}: another run (process {lock.read().strip() or 'unknown'}) is adding to this store. "
                    "Wait for it, or give another folder by --store."
                ) from error
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            for stale in self.folder.glob(f"{TEMPORARY}*"):
                stale.unlink()
            if not (self.folder / HEADER).exists():
                self._link(HEADER, {"schema": SCHEMA, "kind": "lora-ga runs"})
            self._held = True
            try:
                yield self
            finally:
                self._held = False

    def add(self, stem: str, record: Mapping[str, Any]) -> Path:
        """Adds a record.

        Args:
            stem: Name of the file, without its ending; it ends in the digest.
            record: JSON values with "digest"; gets "schema" and "attempt".

        Returns:
            The file.

        Raises:
            RuntimeError: The store is not locked by this process.
            FileExistsError: The cell has a record that does not say "failed".
        """
        if not self._held:
            raise RuntimeError(f"{self.folder}: add to a store only inside its locked().")
        before = [_read(path) for path in self.folder.glob(f"*-{record['digest']}*.json")]
        if any(other["status"] != "failed" for other in before):
            raise FileExistsError(f"{self.folder}: the cell {stem} has run; its record is never replaced.")
        attempt = 1 + max((other["attempt"] for other in before), default=0)
        name = f"{stem}.json" if attempt == 1 else f"{stem}-{attempt}.json"
        return self._link(name, {"schema": SCHEMA, **record, "attempt": attempt})

    def _link(self, name: str, content: Mapping[str, Any]) -> Path:
        """Writes a new file: all of it is on the disk before its name exists, and the name is never taken over."""
        text = json.dumps(content, indent=None, sort_keys=False, ensure_ascii=False, allow_nan=False)
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=TEMPORARY)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            (self.folder / name).hardlink_to(temporary)
        finally:
            Path(temporary).unlink()
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return self.folder / name

    def _check(self) -> None:
        """Refuses a folder that is no store of this version."""
        if not self.folder.exists():
            return
        header = self.folder / HEADER
        if not header.is_file():
            strange = [path.name for path in self.folder.iterdir() if not path.name.startswith((LOCK, TEMPORARY))]
            if strange:
                raise ValueError(
                    f"{self.folder}: holds {strange[0]} but no {HEADER}, so it is no store of runs. "
                    "Give an empty folder, or one that does not exist, by --store."
                )
            return
        schema = json.loads(header.read_text(encoding="utf-8")).get("schema")
        if schema != SCHEMA:
            raise ValueError(
                f"{self.folder}: written in format {schema}, this version reads format {SCHEMA}. "
                "Use the version of lora-ga that wrote it, or another folder by --store."
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged, no JSON ({error}). Remove it to run its cell again.") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else None
        raise ValueError(f"{path}: written in format {found}, this version reads format {SCHEMA}.")
    return record
