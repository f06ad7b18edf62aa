"""What the processes of one estimate have to agree on: errors where they differ, warnings where their data looks wrong.

Every function takes what `Processes.gather` or `exchange` returned, so all processes raise or warn alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_ga.files import differences
from lora_ga.warn import warn


def check_same(records: Sequence[Mapping[str, Any]]) -> None:
    """Refuse processes that were given different models, adapters or settings.

    Args:
        records: What each process was given, by rank.

    Raises:
        ValueError: Two records differ; the message names the first differences.
    """
    for rank, record in enumerate(records):
        if found := differences(records[0], record):
            raise ValueError(
                f"Processes 0 and {rank} of {len(records)} differ: {found}. Give all processes the same model, adapter "
                "and settings, or pass process_group= to those that work together."
            )


def check_same_data(digests: Sequence[str]) -> None:
    """Refuse different batches in processes that hold parts of one model.

    Args:
        digests: The digest of each process's batch; "" if it has none, or its batch cannot be read.

    Raises:
        ValueError: Two digests differ.
    """
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise ValueError(
                f"Processes 0 and {rank} of {len(digests)} were given different batches, but a tensor-parallel plan "
                "splits the model's layers between them, so that each batch passes through all of them at once. Give "
                "all of them the same batches, in the same order."
            )


def warn_same_data(digests: Sequence[str]) -> None:
    """Warn if the first batches of all processes are the same.

    Args:
        digests: The digest of each process's first batch; "" if it has none, or its batch cannot be read.
    """
    known = [digest for digest in digests if digest]
    if len(known) > 1 and len(set(known)) == 1:
        warn(
            f"All {len(known)} processes begin with the same batch: each seems to read all of the data instead of a "
            "share, so they repeat the work of one process. Give each its share (accelerator.prepare, or a "
            "DistributedSampler)."
        )


def warn_idle(batches: Sequence[int]) -> None:
    """Warn if some processes had no batch while others had some.

    Args:
        batches: The number of batches that each process has read.
    """
    idle = [str(rank) for rank, count in enumerate(batches) if count == 0]
    if idle and len(idle) < len(batches):
        warn(
            f"{len(idle)} of {len(batches)} processes had no batch (the first is process {idle[0]}); the estimate is "
            f"made from the {sum(batches)} batches of the others."
        )
