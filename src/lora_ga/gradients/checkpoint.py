"""How far an estimate has come: what it has read, which layers have settled, and the file it goes on from."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ga.files import differences, read_tensors, write_tensors

FILE_KIND = "the running state of a LoRA-GA gradient estimate"
# Batches in a row after which a layer has to look settled: one may look so by chance.
CALM = 2


@dataclasses.dataclass
class Progress:
    """What an estimate has read so far.

    Attributes:
        batches: Micro-batches read.
        weight: Label tokens seen.
        ran: Layers that ran.
        got_gradient: Layers whose output got a gradient.
        calm: Layer → batches in a row that moved its directions by less than the tolerance.
        settled: Layer → batches after which it had settled and was listened to no more.
        settled_weight: Layer → label tokens seen until then.
        digest: Of the batches read, where a checkpoint is kept; "" before the first.
    """

    batches: int = 0
    weight: float = 0.0
    ran: set[str] = dataclasses.field(default_factory=set)
    got_gradient: set[str] = dataclasses.field(default_factory=set)
    calm: dict[str, int] = dataclasses.field(default_factory=dict)
    settled: dict[str, int] = dataclasses.field(default_factory=dict)
    settled_weight: dict[str, float] = dataclasses.field(default_factory=dict)
    digest: str = ""

    def settle(self, changes: Mapping[str, float], tolerance: float) -> list[str]:
        """Note how far the last batch has turned the layers' leading directions.

        A change ε (see `streaming.direction_change`) made by the n-th of n equal batches means that the
        directions are still n·ε from where they are going: the error of a mean over n batches falls as v/n, and the
        step from n − 1 to n is v/n². A layer has settled when n·ε is within the tolerance twice in a row.

        Args:
            changes: Layer → ε, for the layers that the last batch reached.
            tolerance: The largest n·ε.

        Returns:
            The layers that have now settled.
        """
        for name, change in changes.items():
            self.calm[name] = self.calm.get(name, 0) + 1 if self.batches * change <= tolerance else 0
        done = [name for name in changes if self.calm[name] >= CALM]
        for name in done:
            self.settled[name], self.settled_weight[name] = self.batches, self.weight
        return done

    @classmethod
    def sum(cls, parts: Sequence[Progress]) -> Progress:
        """What several processes have read together. A layer seen by one of them is seen.

        Args:
            parts: The progress of each.

        Returns:
            Their sum; a layer that settled in some of them counts in the others to their end.
        """
        total = cls(sum(part.batches for part in parts), sum(part.weight for part in parts))
        total.ran, total.got_gradient = (
            set().union(*sets) for sets in ((part.ran for part in parts), (part.got_gradient for part in parts))
        )
        for name in dict.fromkeys(name for part in parts for name in part.settled):
            total.settled[name] = sum(part.settled.get(name, part.batches) for part in parts)
            total.settled_weight[name] = sum(part.settled_weight.get(name, part.weight) for part in parts)
        return total

    def read(self, batch: Any) -> None:
        """Take a batch into the digest."""
        total = hashlib.sha256(self.digest.encode())
        _take_in(total, batch)
        self.digest = total.hexdigest()


def digest_of(batch: Any) -> str:
    """A digest of a batch's numbers and words; "" of one that has none this library can read."""
    total = hashlib.sha256()
    _take_in(total, batch)
    found = total.hexdigest()
    return "" if found == hashlib.sha256().hexdigest() else found


def _take_in(total: Any, value: Any) -> None:
    """Feed the numbers and words of a nested value to a hash."""
    if isinstance(value, Mapping):
        for key in value:
            total.update(str(key).encode())
            _take_in(total, value[key])
    elif isinstance(value, (tuple, list)):
        for each in value:
            _take_in(total, each)
    elif isinstance(value, Tensor):
        total.update(f"{value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (str, bytes, int, float, bool)):
        total.update(repr(value).encode())


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The file an interrupted estimate goes on from.

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

        Raises:
            OSError: It could not be written, for instance because the disk is full; an earlier state is intact.
        """
        values = {key: sorted(value) if isinstance(value, set) else value for key, value in vars(progress).items()}
        try:
            write_tensors(self.path, FILE_KIND, tensors, {"identity": self.identity, "progress": values})
        except OSError as error:
            raise OSError(
                error.errno,
                f"the checkpoint could not be written after batch {progress.batches} ({error.strerror}); the state "
                "saved before, if there is one, is intact. Make room and call again: it goes on from there",
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
            identity, values = about["identity"], about["progress"]
            progress = Progress(**values | {key: set(values[key]) for key in ("ran", "got_gradient")})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: damaged, its record lacks {error}. Remove it to start anew.") from error
        if found := differences(identity, self.identity):
            raise ValueError(
                f"{self.path} belongs to another estimate: {found}. Give this one a checkpoint of its own, or remove "
                "the file to start anew."
            )
        return progress, tensors
