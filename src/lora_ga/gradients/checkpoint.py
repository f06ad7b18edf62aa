"""The progress of an estimate: what it has read, which layers have converged, and the file that keeps both."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ga.config import BEFORE
from lora_ga.files import differences, read_tensors, write_tensors
from lora_ga.version import written_with

FILE_KIND = "the running state of a LoRA-GA gradient estimate"
# A layer has converged after so many batches in a row with a small change: one alone may be small by chance.
SMALL_CHANGES = 2
# Fields of `Progress` → their names in the file, where they differ.
FILE_KEYS = {"small_changes": "calm"}
# What to do about a checkpoint that cannot be written: numbers of errors, and the advice.
AGAIN = "and call again: the estimate continues from there"
ADVICE = (
    ((errno.ENOSPC, errno.EDQUOT), f"Make room {AGAIN}"),
    ((errno.EEXIST, errno.ENOTDIR), "A folder of this path is a file. Give checkpoint= another path"),
    ((errno.EACCES, errno.EPERM, errno.EROFS), f"Let this program write there {AGAIN}"),
)
OTHER_ADVICE = f"Remove the cause {AGAIN}"


@dataclasses.dataclass
class Progress:
    """What an estimate has read so far.

    Attributes:
        batches: Micro-batches read.
        weight: Label tokens read.
        ran: Layers that ran.
        got_gradient: Layers whose output got a gradient.
        small_changes: Layer → batches in a row that changed its directions by less than the tolerance.
        settled: Layer that has converged → batches read until then. Later ones are not recorded.
        settled_weight: Layer that has converged → label tokens read until then.
        digest: Of the batches read, where a checkpoint is kept; "" before the first.
    """

    batches: int = 0
    weight: float = 0.0
    ran: set[str] = dataclasses.field(default_factory=set)
    got_gradient: set[str] = dataclasses.field(default_factory=set)
    small_changes: dict[str, int] = dataclasses.field(default_factory=dict)
    settled: dict[str, int] = dataclasses.field(default_factory=dict)
    settled_weight: dict[str, float] = dataclasses.field(default_factory=dict)
    digest: str = ""

    def update_converged(self, changes: Mapping[str, float], tolerance: float) -> list[str]:
        """Find the layers that have converged, from how far the last batch has turned their leading directions.

        A change ε (the mean squared sine, see `low_rank.turned`) made by the n-th of n equal batches means that the
        directions are still n·ε from their limit: the error of a mean over n batches falls as v/n, and the step from
        n − 1 to n is v/n². A layer has converged when n·ε is within the tolerance twice in a row.

        Args:
            changes: Layer → ε, for the layers that the last batch reached.
            tolerance: The largest n·ε.

        Returns:
            The layers that have now converged.
        """
        for name, change in changes.items():
            small = self.batches * change <= tolerance
            self.small_changes[name] = self.small_changes.get(name, 0) + 1 if small else 0
        converged = [name for name in changes if self.small_changes[name] >= SMALL_CHANGES]
        for name in converged:
            self.settled[name], self.settled_weight[name] = self.batches, self.weight
        return converged

    @classmethod
    def sum(cls, parts: Sequence[Progress]) -> Progress:
        """The progress of several processes together. A layer that ran in one of them ran.

        Args:
            parts: The progress of each.

        Returns:
            Their sum. A layer that converged in some of them counts all batches of the others.
        """
        total = cls(sum(part.batches for part in parts), sum(part.weight for part in parts))
        total.ran, total.got_gradient = (
            set().union(*sets) for sets in ((part.ran for part in parts), (part.got_gradient for part in parts))
        )
        for name in dict.fromkeys(name for part in parts for name in part.settled):
            total.settled[name] = sum(part.settled.get(name, part.batches) for part in parts)
            total.settled_weight[name] = sum(part.settled_weight.get(name, part.weight) for part in parts)
        return total

    def update_digest(self, batch: Any) -> None:
        """Add a batch to the digest."""
        total = hashlib.sha256(self.digest.encode())
        _hash(total, batch)
        self.digest = total.hexdigest()


def digest_of(batch: Any) -> str:
    """A digest of a batch's numbers and strings; "" if it has none that this library can read."""
    total = hashlib.sha256()
    _hash(total, batch)
    found = total.hexdigest()
    return "" if found == hashlib.sha256().hexdigest() else found


def _hash(total: Any, value: Any) -> None:
    """Update a hash with the numbers and strings of a nested value."""
    if isinstance(value, Mapping):
        for key in value:
            total.update(str(key).encode())
            _hash(total, value[key])
    elif isinstance(value, (tuple, list)):
        for each in value:
            _hash(total, each)
    elif isinstance(value, Tensor):
        total.update(f"{value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (str, bytes, int, float, bool)):
        total.update(repr(value).encode())


def _version(about: Mapping[str, Any]) -> str:
    """The version of LoRA-GA that wrote a file; the first ones did not say it."""
    versions = about.get("versions")
    return str(versions.get("lora_ga")) if isinstance(versions, Mapping) else "0.1.0, or one before it"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The file from which an interrupted estimate continues.

    Attributes:
        path: The file.
        every: Batches between two savings.
        identity: What has to be the same for the file to fit: the model's fingerprint, the settings, the ranks.
    """

    path: Path
    every: int
    identity: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ValueError(f"every={self.every!r}: it must be an integer of at least 1 (batches between savings).")

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Write the state, atomically.

        Args:
            progress: The progress.
            tensors: What the accumulator holds.

        Raises:
            OSError: It could not be written, for instance because the disk is full; an earlier state is intact.
        """
        values = {
            FILE_KEYS.get(field, field): sorted(value) if isinstance(value, set) else value
            for field, value in vars(progress).items()
        }
        record = {"identity": self.identity, "progress": values, "versions": written_with()}
        try:
            write_tensors(self.path, FILE_KIND, tensors, record)
        except OSError as error:
            advice = next((text for numbers, text in ADVICE if error.errno in numbers), OTHER_ADVICE)
            raise OSError(
                error.errno,
                f"the checkpoint could not be written after batch {progress.batches} ({error.strerror or error}); the "
                f"state saved before, if there is one, is intact. {advice}",
                str(self.path),
            ) from error

    def load(self) -> tuple[Progress, dict[str, Tensor]]:
        """Read the state; a fresh one if there is no file.

        Returns:
            The progress, and what the accumulator held.

        Raises:
            ValueError: The file is damaged, or of another model, configuration or rank.
        """
        if not self.path.exists():
            return Progress(), {}
        tensors, about = read_tensors(self.path, FILE_KIND)
        try:
            identity = dict(about["identity"])
            if "config" in identity:
                identity["config"] = {**BEFORE, **identity["config"]}
            fields = {key: field for field, key in FILE_KEYS.items()}
            values = {fields.get(key, key): value for key, value in about["progress"].items()}
            progress = Progress(**values | {key: set(values[key]) for key in ("ran", "got_gradient")})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: damaged, its record lacks {error}. Remove it to start again.") from error
        if found := differences(identity, self.identity):
            raise ValueError(
                f"{self.path} belongs to another estimate: {found}. Give each estimate its own checkpoint, or remove "
                f"the file to start again. The file was written by version {_version(about)}."
            )
        return progress, tensors
