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
    """A seeded choice of training examples, in batches, with a progress bar on a terminal.

    The choice is drawn from a generator of its own: the order of training, and all else that is random there, is the
    same with an estimate and without.
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
        """Choose.

        Args:
            examples: The training data.
            collate: Makes a batch of examples.
            options: How many batches, of what size.
            batch_size: Their size where the options do not say.
            seed: Of the choice.
            shard: (i, n): of all batches only each n-th, from the i-th on.

        Raises:
            ValueError: There is no such batch.
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
        # A loader draws a number from the global generator for its workers unless it is given one.
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
                progress.advance(bar)  # not after the yield: nobody asks for more than the last
                yield batch
