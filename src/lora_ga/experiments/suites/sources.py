"""References to models and files: `data:PATH`, `package:PATH`, `gguf:PACKAGE/FILE`, `hub:NAME`, or a local path.

`#11-510` at the end of a reference to a file of rows stands for the rows 11 to 510, counted from 1.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ga.experiments.suites import gguf
from lora_ga.experiments.suites.origins import install_line

VARIABLE = "LORA_GA_DATA"
HUB = "hub"
PART = re.compile(r"(.+)#(\d+)-(\d+)")


@dataclass(frozen=True)
class Sources:
    """Resolves references.

    Attributes:
        data: The data folder, if there is one.
        hub: A folder with local copies of models and data sets of the hub, each under its name, if there is one.
        use_hub: Whether to load from the hub what is not in that folder. `--dry-run` does not.
    """

    data: str | None = None
    hub: str | None = None
    use_hub: bool = True

    @classmethod
    def from_environment(cls) -> Sources:
        """Takes the data folder from the environment."""
        return cls(os.environ.get(VARIABLE) or None)

    def find(self, reference: str) -> Path:
        """The local path of a reference.

        Args:
            reference: As in a suite file.

        Returns:
            A path that exists.

        Raises:
            ValueError: There is no such file; the message explains how to provide it.
        """
        scheme, _, rest = reference.partition(":")
        if scheme == "data":
            if self.data is None:
                raise ValueError(
                    f"{reference}: wanted from the data folder, but none is named. Set {VARIABLE} to a folder that "
                    f"has {rest} in it. `lora-ga fetch` makes one."
                )
            path, hint = Path(self.data) / rest, f"Set {VARIABLE} to a folder that has {rest} in it."
        elif scheme in {"package", "gguf"}:
            name, _, inside = rest.partition("/")
            if not (name.isidentifier() and inside):
                raise ValueError(f"{reference}: names no file in a package; write {scheme}:PACKAGE/FILE.")
            spec, install = importlib.util.find_spec(name), install_line(name)
            if spec is None or spec.origin is None:
                raise ValueError(f"{reference}: the package is not installed: {install}")
            path, hint = Path(spec.origin).parent / inside, f"Install {name} again: {install}"
        else:
            path = Path(reference)
            hint = "Name it by data:PATH, package:PATH, gguf:PACKAGE/FILE, hub:NAME, or a local path."
        if not path.exists():
            raise ValueError(f"{reference}: wanted at {path}, but it is not there. {hint}")
        return path

    def is_out_of_reach(self, reference: str) -> bool:
        """Whether a reference is on the hub, without a local copy, while the hub must not be used."""
        return reference.startswith(f"{HUB}:") and not self.use_hub and self._copy(_name(reference)) is None

    def model(self, reference: str) -> str:
        """The argument of `from_pretrained` for a model: a local folder, or a name on the hub."""
        if reference.startswith("gguf:"):
            return str(gguf.folder_of(self.find(reference), reference))
        if not reference.startswith(f"{HUB}:"):
            return str(self.find(reference))
        name = _name(reference)
        return str(self._copy(name) or name)

    def rows(self, reference: str) -> list[dict[str, Any]]:
        """The rows of a jsonl file (also .gz), or of a data set of the hub.

        Args:
            reference: As in a suite file; on the hub, `hub:NAME:SPLIT` or `hub:NAME:CONFIGURATION:SPLIT`.

        Returns:
            The rows.

        Raises:
            ValueError: It is not there, cannot be read, has too few rows, or the hub cannot be reached.
        """
        if part := PART.fullmatch(reference):
            rows, first, last = self.rows(part[1]), int(part[2]), int(part[3])
            if not 1 <= first <= last <= len(rows):
                raise ValueError(
                    f"{reference}: wants the rows {first} to {last}, but there are the rows 1 to {len(rows)}. Correct "
                    "the numbers, or give the file that they are of."
                )
            return rows[first - 1 : last]
        if reference.startswith(f"{HUB}:"):
            return self._hub_rows(reference)
        path = self.find(reference)
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        try:
            return [json.loads(line) for line in content.splitlines() if line]
        except ValueError as error:
            raise ValueError(f"{path}: could not be read as one JSON object a line ({error}).") from error

    def _copy(self, name: str) -> Path | None:
        """The local copy of a model or data set of the hub."""
        path = None if self.hub is None else Path(self.hub) / name
        return path if path is not None and path.is_dir() else None

    def _hub_rows(self, reference: str) -> list[dict[str, Any]]:
        from datasets import load_dataset
        from datasets.exceptions import DatasetNotFoundError

        name, (*configuration, split) = _name(reference), reference.split(":")[2:]
        place = self._copy(name)
        try:
            return list(load_dataset(str(place or name), *configuration, split=split))
        except (DatasetNotFoundError, OSError, ValueError) as error:
            where = f"in {place}" if place else "on the hub"
            raise ValueError(f"{reference}: could not be loaded {where} ({error}). {self.hint(reference)}") from error

    def hint(self, reference: str) -> str:
        """How to provide a local copy of a model or data set of the hub."""
        name, kind = _name(reference), "" if reference.count(":") == 1 else " --repo-type dataset"
        folder = self.hub or "DIR"
        return (
            f"Without access to the hub, bring a copy (`hf download {name}{kind} --local-dir {folder}/{name}`) "
            f"and give --hub {folder}."
        )


def whole_file(reference: str) -> str:
    """The reference without the rows that it may name."""
    part = PART.fullmatch(reference)
    return part[1] if part else reference


def _name(reference: str) -> str:
    return reference.split(":")[1]


def select_columns(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str], where: str) -> list[dict[str, Any]]:
    """Selects columns, and renames them to their meanings.

    Args:
        rows: The rows of a file.
        columns: Meaning → column.
        where: The reference of the file, for the message.

    Returns:
        The rows, with these columns alone.

    Raises:
        ValueError: A row has no such column.
    """
    found = []
    for number, row in enumerate(rows):
        for meaning, column in columns.items():
            if row.get(column) is None:
                raise ValueError(
                    f"{where}: row {number} has no column {column!r} (for {meaning}); it has {', '.join(row)}."
                )
        found.append({meaning: row[column] for meaning, column in columns.items()})
    return found
