"""The batches that one process reads: its share, less those that a checkpoint has already read."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from accelerate.utils import send_to_device

from lora_ga.distributed.processes import Processes
from lora_ga.gradients.checkpoint import Checkpoint, Progress

NO_BATCH: Any = object()


class BatchReader:
    """Reads the batches of this process, one at a time.

    Attributes:
        kept: The batches that a probe may need again.
        last: The last batch read or lent; `NO_BATCH` before the first.
    """

    def __init__(
        self, data: Iterable[Any], limit: int | None, checkpoint: Checkpoint | None, progress: Progress
    ) -> None:
        """Read at most `limit` batches of `data`, starting where `progress` stands."""
        self.kept: list[Any] = []
        self.last: Any = NO_BATCH
        self._checkpoint, self._progress = checkpoint, progress
        self._share: Iterator[Any] = itertools.islice(data, limit)

    def batches(self, keep: Callable[[], bool], finished: bool) -> Iterator[Any]:
        """The batches to pass through the model.

        Args:
            keep: Whether a layer has not run yet and a probe may need the batches again; asked before every batch.
            finished: Whether nothing is left to record, so that a checkpoint is not compared with the batches.

        Yields:
            A batch.

        Raises:
            ValueError: A checkpoint was made from other batches, or from more.
        """
        share = self._kept(keep)
        for batch in share if self._checkpoint is None else self._unread(share, finished):
            self.last = batch
            yield batch

    def keep_all(self) -> None:
        """Keep all batches for a probe."""
        self.kept.extend(self._share)

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

    def _kept(self, keep: Callable[[], bool]) -> Iterator[Any]:
        for batch in self._share:
            if keep():
                self.kept.append(copy.copy(batch))  # a loss may take the labels out of the batch
            else:
                self.kept.clear()
            yield batch

    def _unread(self, batches: Iterable[Any], finished: bool) -> Iterator[Any]:
        """The batches that the checkpoint has not read. Those that it has read are compared by their digest.

        Yields:
            A batch.

        Raises:
            ValueError: They differ, or there are fewer.
        """
        assert self._checkpoint is not None
        already, again, count = self._progress.batches, Progress(), 0
        if already and finished:
            return
        for count, batch in enumerate(batches, start=1):
            if count > already:
                self._progress.update_digest(batch)
                yield batch
                continue
            again.update_digest(batch)
            if count == already and again.digest != self._progress.digest:
                break
        else:
            if count >= already:
                return
        raise ValueError(
            f"{self._checkpoint.path} was made from other batches: it has read {already}, and those given now differ "
            "from them or are fewer. Give the data of the interrupted run in the same order, or remove the file to "
            "start again."
        )
