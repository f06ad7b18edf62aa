"""The batches that one process reads: its share, less those without a label and those that a checkpoint has read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import send_to_device

from lora_ga.distributed.processes import Processes
from lora_ga.gradients.checkpoint import Checkpoint, Progress

NO_BATCH: Any = object()
SKIPPED: Any = object()  # in place of a batch that was read, and is not to be used
# After so many batches without a label, and none with one, reading stops. Otherwise endless data would be read forever.
MOST_UNLABELLED = 10_000
ALL_IGNORED = (
    "Every label is -100, the label that the loss leaves out. Check how the labels are made: a prompt that takes the "
    "whole row, rows cut off before the answer, or a template that masks everything."
)


def check_data(data: Any) -> None:
    """Refuse what is given in the place of batches.

    Args:
        data: The data.

    Raises:
        TypeError: It is a name, one batch alone, or cannot be read one batch after the other.
    """
    if isinstance(data, str | Path):
        raise TypeError(
            f"data is a name, {str(data)!r}, but it must be batches. An estimate in a file is given to lora_ga."
            "initialize as lora_ga.GradientEstimate.load(file)."
        )
    if isinstance(data, Mapping) or (not hasattr(data, "__iter__") and not hasattr(data, "__getitem__")):
        raise TypeError(
            f"data is a {type(data).__name__}, but it must be an iterable of batches, so one batch alone is given as "
            "[batch]."
        )


def known_length(data: Any) -> int | None:
    """The length of data, if it is known.

    A `DataLoader` over a stream has a `__len__` that raises, and a length of the user's may fail. Then it is not known:
    the length serves messages and early checks alone.

    Args:
        data: Batches or rows.

    Returns:
        Their number; None if it is not known.
    """
    try:
        return len(data)
    except Exception:
        return None


class BatchReader:
    """Reads the batches of this process, one at a time.

    Attributes:
        kept: The batches that a probe may need again.
        last: The last batch read or lent; `NO_BATCH` before the first.
        labelled: How many batches with a label were read, also those that a checkpoint has already read.
        unlabelled: How many batches were left out because they have no label.
    """

    def __init__(
        self,
        data: Iterable[Any],
        limit: int | None,
        checkpoint: Checkpoint | None,
        progress: Progress,
        without_label: Callable[[Any], bool] = lambda batch: False,
    ) -> None:
        """Read batches of `data`, starting where `progress` stands.

        Args:
            data: The batches.
            limit: How many batches to use at most; None for all.
            checkpoint: The file for the running state.
            progress: Where the estimate stands.
            without_label: Whether a batch has no label, so that it is skipped. It does not count for the limit.
        """
        self.kept: list[Any] = []
        self.last: Any = NO_BATCH
        self.labelled = self.unlabelled = 0
        self._limit, self._checkpoint, self._progress = limit, checkpoint, progress
        self._without_label, self._at_end = without_label, False
        self._share = self._read(data)

    @property
    def open(self) -> bool:
        """Whether there may be another batch to use: the data has not ended, and the limit is not reached."""
        return not self._at_end and not self._full

    @property
    def _full(self) -> bool:
        return self._limit is not None and self.labelled >= self._limit

    def batches(self, keep: Callable[[], bool], finished: bool) -> Iterator[Any]:
        """The batches to pass through the model.

        Args:
            keep: Whether a layer has not run yet and a probe may need the batches again; asked before every batch.
            finished: Whether nothing is left to record, so that a checkpoint is not compared with the batches.

        Every batch of the data is one of these, so that processes which read in the same rounds stay in step: reading
        may communicate.

        Yields:
            A batch; `SKIPPED` for one that has no label, that the checkpoint has read, or that is beyond the limit.
            Whoever asks for a batch beyond the limit does so only to stay in step with other processes.

        Raises:
            ValueError: A checkpoint was made from other batches, or from more.
        """
        share = self._kept(keep)
        for batch in share if self._checkpoint is None or finished else self._unread(share):
            if batch is not SKIPPED:
                self.last = batch
            yield batch

    def keep_next(self) -> None:
        """Keep the next batch for a probe, unless it is skipped."""
        batch = next(self._share, SKIPPED)
        if batch is not SKIPPED:
            self.kept.append(batch)

    def lend(self, processes: Processes, have: list[bool]) -> None:
        """Give processes that have read no batch one of another process, so that they can take part in its pass.

        Args:
            processes: All processes.
            have: Which of them have a batch, in their order.
        """
        if all(have):
            return
        lender = have.index(True)
        batch = send_to_device(self.last, "cpu") if processes.rank == lender else None
        lent = processes.gather(batch)[lender]
        if self.last is NO_BATCH:
            self.last = lent

    def _read(self, data: Iterable[Any]) -> Iterator[Any]:
        """The batches of the data.

        Yields:
            A batch, or `SKIPPED`.

        Raises:
            ValueError: Very many batches have no label, and none has one.
        """
        for batch in data:
            if self._full:
                yield SKIPPED
            elif self._without_label(batch):
                self.unlabelled += 1
                if self.unlabelled == MOST_UNLABELLED and not self.labelled:
                    raise ValueError(f"Of the first {MOST_UNLABELLED} batches none has a label. {ALL_IGNORED}")
                yield SKIPPED
            else:
                self.labelled += 1
                yield batch
        self._at_end = True

    def _kept(self, keep: Callable[[], bool]) -> Iterator[Any]:
        for batch in self._share:
            if batch is SKIPPED:
                pass
            elif keep():
                self.kept.append(copy.copy(batch))  # a loss may take the labels out of the batch
            else:
                self.kept.clear()
            yield batch

    def _unread(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches that the checkpoint has not read. Those that it has read are compared by their digest.

        Yields:
            A batch, or `SKIPPED`.

        Raises:
            ValueError: They differ, or there are fewer.
        """
        assert self._checkpoint is not None
        already, again, count = self._progress.batches, Progress(), 0
        for batch in batches:
            if batch is SKIPPED:
                yield SKIPPED
                continue
            count += 1
            if count > already:
                self._progress.update_digest(batch)
                yield batch
                continue
            again.update_digest(batch)
            if count == already and again.digest != self._progress.digest:
                break
            yield SKIPPED
        else:
            if count >= already:
                return
        raise ValueError(
            f"{self._checkpoint.path} was made from other batches: it has read {already}, and those given now differ "
            "from them or are fewer. Give the data of the interrupted run in the same order, or remove the file to "
            "start again."
        )
