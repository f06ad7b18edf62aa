"""A data loader gives training what it would have given without us: its order, and what its collator draws."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import lora_ga
from lora_ga import LoraGACallback, LoraGAConfig
from lora_ga.gradients.reader import known_length
from toys import adapted, causal, llama
from trainers import settings, tokenizer

SEQUENCES = [
    {"input_ids": ids, "labels": ids.clone()} for ids in torch.arange(3, 51).unflatten(0, (16, 3)).repeat(2, 1)
]
GLOBAL = random.Random(0)


def stacked(examples: list[Any], number: float) -> dict[str, Tensor]:
    """A batch whose first token is drawn."""
    batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    batch["input_ids"][:, 0] = 3 + int(60 * number)
    return batch


class Collator:
    """Draws from a generator of its own, which it may make with its first batch."""

    def __init__(self, generator: Any = None) -> None:
        if generator is not None:
            self.generator = generator

    def __call__(self, examples: list[Any]) -> dict[str, Tensor]:
        """A batch."""
        if not hasattr(self, "generator"):
            self.generator = random.Random(7)
        if isinstance(self.generator, torch.Generator):
            return stacked(examples, torch.rand(1, generator=self.generator).item())
        return stacked(examples, self.generator.random())


class Wrapping:
    """Holds another collator, under a name of its own."""

    def __init__(self, inner: Any) -> None:
        self.steps = [inner]

    def __call__(self, examples: list[Any]) -> dict[str, Tensor]:
        """A batch."""
        return self.steps[0](examples)

    def collate(self, examples: list[Any]) -> dict[str, Tensor]:
        """A batch."""
        return self(examples)


def given_generator(examples: list[Any], generator: random.Random) -> dict[str, Tensor]:
    return stacked(examples, generator.random())


def from_a_global(examples: list[Any]) -> dict[str, Tensor]:
    return stacked(examples, GLOBAL.random())


def from_a_new_global() -> Callable[[list[Any]], dict[str, Tensor]]:
    GLOBAL.seed(0)
    return from_a_global


def closing_over(generator: random.Random) -> Callable[[list[Any]], dict[str, Tensor]]:
    return lambda examples: stacked(examples, generator.random())


class Counting:
    """Its draw depends on how many batches it has made."""

    made = 0

    def __call__(self, examples: list[Any]) -> dict[str, Tensor]:
        """A batch."""
        self.made += 1
        return stacked(examples, self.made / 100)


COLLATORS: dict[str, Callable[[], Any]] = {
    "random": lambda: Collator(random.Random(0)),
    "numpy": lambda: Collator(np.random.default_rng(0)),
    "numpy, old": lambda: Collator(np.random.RandomState(0)),
    "torch": lambda: Collator(torch.Generator().manual_seed(0)),
    "made with the first batch": Collator,
    "wrapped": lambda: Wrapping(Collator(random.Random(0))),
    "wrapped, made with the first batch": lambda: Wrapping(Collator()),
    "method": lambda: Wrapping(Collator(random.Random(0))).collate,
    "partial": lambda: partial(given_generator, generator=random.Random(0)),
    "closure": lambda: closing_over(random.Random(0)),
    "global": from_a_new_global,
    "counting": Counting,
}
READERS: dict[str, Callable[[Any, Any], Any]] = {
    "initialize": lora_ga.initialize,
    "estimate_gradients": lora_ga.estimate_gradients,
    "find_rate": lambda model, data: lora_ga.find_rate(model, data, 50),
    "a loss that fails": lambda model, data: lora_ga.estimate_gradients(model, data, loss_fn=failing([])),
}


def failing(calls: list[int]) -> Callable[[Any, Any], Tensor]:
    """A loss that fails on the second batch."""

    def loss(model: Any, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("the second batch")
        return model(**batch).loss

    return loss


def reactive() -> Any:
    """A Llama whose loss reacts to a step."""
    return adapted(llama(initializer_range=0.2))


def shuffled(collate: Any) -> DataLoader[Any]:
    return DataLoader(
        SEQUENCES,  # type: ignore[arg-type]
        batch_size=4,
        shuffle=True,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(5),
    )


@pytest.mark.filterwarnings("ignore:The gradients of the first batches hardly agree:UserWarning")
@pytest.mark.parametrize(
    ("kind", "reader"),
    [*((kind, "estimate_gradients") for kind in COLLATORS), *(("made with the first batch", each) for each in READERS)],
)
def test_a_loader_gives_training_the_batches_that_it_would_have_given(kind: str, reader: str) -> None:
    expected = [batch["input_ids"].tolist() for batch in shuffled(COLLATORS[kind]())]
    loader = shuffled(COLLATORS[kind]())
    if reader == "a loss that fails":
        with pytest.raises(KeyError, match="the second batch"):
            READERS[reader](reactive(), loader)
    else:
        READERS[reader](reactive(), loader)
    assert [batch["input_ids"].tolist() for batch in loader] == expected
    drawn = {batch[0][0] for batch in expected}
    assert len(drawn) > 4  # the collator draws


def test_what_is_no_loader_is_read_as_it_is() -> None:
    given = random.Random(0)
    drawing = closing_over(given)
    stream = (drawing(SEQUENCES[place : place + 4]) for place in range(0, 32, 4))
    lora_ga.estimate_gradients(reactive(), stream, LoraGAConfig(max_batches=2))
    assert given.getstate() != random.Random(0).getstate()
    assert len(list(stream)) < 8
    batches = causal(8)
    lora_ga.estimate_gradients(reactive(), batches)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, causal(8), strict=True))


def test_the_loader_under_the_batches_of_diffusers_is_read_as_it_was() -> None:
    class Noisy:
        def __init__(self, data: Any) -> None:
            self.data = data

        def __iter__(self) -> Any:
            return iter(self.data)

    expected = [batch["input_ids"].tolist() for batch in shuffled(Collator())]
    loader = shuffled(Collator())
    lora_ga.initialize(reactive(), Noisy(loader))
    assert [batch["input_ids"].tolist() for batch in loader] == expected


def test_training_masks_what_it_would_have_masked_without_the_callback(tmp_path: Path) -> None:
    """Transformers' collator with a seed makes its generator with the first batch; the trainer wraps the collator."""

    def seen(callbacks: list[Any]) -> list[Any]:
        batches: list[Any] = []

        class Watching(Trainer):
            def training_step(self, model: nn.Module, inputs: Any, *args: Any, **named: Any) -> Tensor:
                batches.append(inputs["input_ids"].tolist())
                return super().training_step(model, inputs, *args, **named)

        arguments = TrainingArguments(**settings(tmp_path, max_steps=6, save_strategy="no"))
        rows: Any = [{"input_ids": example["input_ids"].tolist()} for example in SEQUENCES]
        collator = DataCollatorForLanguageModeling(words, mlm_probability=0.5, seed=7)
        model = adapted(llama(), ["q_proj", "v_proj"])
        Watching(model, arguments, data_collator=collator, train_dataset=rows, callbacks=callbacks).train()
        return batches

    words = tokenizer()
    words.mask_token = "[UNK]"
    expected = seen([])
    assert len(expected) == 6
    assert seen([LoraGACallback()]) == expected


class Stream(IterableDataset[Any]):
    """Rows without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(SEQUENCES)


class FailingLength(list[Any]):
    """Batches whose length cannot be found out."""

    def __len__(self) -> int:
        raise OSError("the length is not known")


def test_the_length_of_data_is_known_or_not() -> None:
    assert known_length([1, 2]) == 2
    assert known_length(DataLoader(SEQUENCES, batch_size=4)) == 8  # type: ignore[arg-type]
    for data in (DataLoader(Stream()), FailingLength([1]), iter([1]), None):
        assert known_length(data) is None


def test_a_loader_over_a_stream_gives_the_estimate_of_its_batches() -> None:
    loader = DataLoader(Stream(), batch_size=4)
    found = lora_ga.initialize(adapted(llama()), loader, LoraGAConfig(estimator="dense"))
    whole = lora_ga.initialize(adapted(llama()), list(loader), LoraGAConfig(estimator="dense"))
    assert found.batches == whole.batches == 8
    assert all(torch.equal(found[name].U, whole[name].U) for name in whole)
    assert lora_ga.estimate_gradients(adapted(llama()), FailingLength(loader)).batches == 8
