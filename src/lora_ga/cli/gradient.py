"""The batches from which the commands estimate the gradient."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import Progress
from torch.utils.data import DataLoader

from lora_ga.cli.options import EstimateOptions


class EstimateBatches:
    """A seeded choice of training examples in batches, with a progress bar on a terminal.

    A separate generator draws the choice, so that an estimate does not change the random numbers of training.
    """

    def __init__(
        self,
        examples: Dataset,
        collate: Callable[[list[Any]], Any],
        options: EstimateOptions,
        batch_size: int,
        seed: int,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        """Chooses the examples.

        Args:
            examples: The training data.
            collate: Makes a batch of examples.
            options: The number of batches and their size.
            batch_size: The size of a batch where the options do not give one.
            seed: Seed of the choice.
            shard: (i, n): only every n-th batch, from batch i on.

        Raises:
            ValueError: The shard has no batch.
        """
        size, (index, count) = options.estimate_batch_size or batch_size, shard
        shuffled = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
        most = None if options.estimate_batches is None else size * options.estimate_batches
        batches = shuffled[:most].split(size)
        if index >= len(batches):
            raise ValueError(
                f"--shard {index}/{count}: the data gives {len(batches)} batches, so this shard has none. Use fewer "
                "shards, more --estimate_batches or a smaller --estimate_batch_size."
            )
        chosen = examples.select(torch.cat(batches[index::count]).tolist())
        # Without a generator a loader draws a number from the global generator.
        self._loader: DataLoader[Any] = DataLoader(
            chosen,
            batch_size=size,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(seed),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
            bar = progress.add_task("Estimating the gradient", total=len(self))
            for batch in self._loader:
                progress.advance(bar)  # before the yield, since the reader does not ask again after the last batch
                yield batch
