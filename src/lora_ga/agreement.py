"""What several processes have to agree on before they begin, and what is said of their shares of the data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lora_ga.store import differences


def check_same(records: Sequence[Mapping[str, Any]]) -> None:
    """Refuse processes that were given different things; all of them raise the same.

    Args:
        records: What each process was given, in their order.

    Raises:
        ValueError: Two differ, with the first differences.
    """
    for rank, record in enumerate(records):
        if found := differences(records[0], record):
            raise ValueError(
                f"Processes 0 and {rank} of {len(records)} differ: {found}. Give all processes the same model, adapter "
                "and settings, or pass process_group= to those that work together."
            )


def check_same_data(digests: Sequence[str]) -> None:
    """Refuse different batches in processes that hold parts of one model; all of them raise the same.

    Args:
        digests: Of each process's batch; "" where there is none, or none that can be read.

    Raises:
        ValueError: Two differ.
    """
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise ValueError(
                f"Processes 0 and {rank} of {len(digests)} were given different batches, but a tensor-parallel plan "
                "splits the model's layers between them, so that each batch passes through all of them at once. Give "
                "all of them the same batches, in the same order."
            )


def warn_same_data(digests: Sequence[str]) -> None:
    """Warn if the first batches of all processes are one and the same.

    Args:
        digests: Of each process's first batch; "" where there is none, or none that can be read.
    """
    seen = [digest for digest in digests if digest]
    if len(seen) > 1 and len(set(seen)) == 1:
        warnings.warn(
            f"All {len(seen)} processes begin with the same batch: each seems to read all of the data, not a share of "
            "its own, so they do one process's work over again. Give each its share (accelerator.prepare, or a "
            "DistributedSampler).",
            UserWarning,
            stacklevel=4,
        )


def warn_idle(batches: Sequence[int]) -> None:
    """Warn of processes without a batch, if others have some.

    Args:
        batches: Batches that each process has read.
    """
    idle = [str(rank) for rank, count in enumerate(batches) if count == 0]
    if idle and len(idle) < len(batches):
        warnings.warn(
            f"{len(idle)} of {len(batches)} processes had no batch (the first is process {idle[0]}); the estimate is "
            f"that of the others' {sum(batches)}.",
            UserWarning,
            stacklevel=3,
        )
