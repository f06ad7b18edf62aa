"""The estimate of LoraGACallback sees the trainer's own batches, batch size and loss, and changes nothing of them."""

from __future__ import annotations

import random
import warnings
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import GradientState
from datasets import Dataset
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

import lora_ga
from lora_ga import LoraGACallback, LoraGAConfig
from lora_ga.gradients import reader
from toys import adapted, causal, llama
from trainers import (
    TARGETS,
    callback,
    factors,
    peft_config,
    ready,
    rows,
    settings,
    sft,
    tokenised,
    tokenizer,
    trl_classes,
)


def made(folder: Path, callbacks: list[Any], kind: type[Trainer] = Trainer, data: Any = None, **changes: Any) -> Any:
    """A trainer of a subclass."""
    named = {key: changes.pop(key) for key in ("compute_loss_func", "data_collator") if key in changes}
    arguments = TrainingArguments(**settings(folder, save_strategy="no", **changes))
    data = tokenised() if data is None else data
    return kind(adapted(llama(), TARGETS), arguments, train_dataset=data, callbacks=callbacks, **named)


def watched(trainer: Any) -> dict[str, list[Any]]:
    """Keeps what `compute_loss` gets, in the estimate (before the first step) and in training."""
    seen: dict[str, list[Any]] = {"estimate": [], "training": []}
    compute, step = trainer.compute_loss, trainer.training_step
    now = ["estimate"]

    def training_step(*args: Any, **named: Any) -> Any:
        now[0] = "training"
        return step(*args, **named)

    def compute_loss(model: Any, inputs: Any, *args: Any, **named: Any) -> Any:
        seen[now[0]].append((dict(inputs), named.get("num_items_in_batch")))
        return compute(model, inputs, *args, **named)

    trainer.training_step, trainer.compute_loss = training_step, compute_loss
    return seen


def ids(seen: list[Any]) -> list[list[list[int]]]:
    return [inputs["input_ids"].tolist() for inputs, _ in seen]


def starts(model: Any) -> list[torch.Tensor]:
    return [factor.start for factor in factors(model)]


def order_of_training(trainer: Any) -> list[list[list[int]]]:
    seen = watched(trainer)
    trainer.train()
    return ids(seen["training"])


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_the_callback_and_initialize_give_one_start_from_the_same_batches(strategy: str, tmp_path: Path) -> None:
    trainer = made(tmp_path, [late := callback()], train_sampling_strategy=strategy, learning_rate=0.0, max_steps=1)
    seen = watched(trainer)
    trainer.train()
    batches = [inputs for inputs, _ in seen["estimate"]]
    assert len(batches) == 3
    model = adapted(llama(), TARGETS)
    estimate = lora_ga.initialize(model, batches, late.config)
    assert late.estimate is not None
    assert estimate.weight == late.estimate.weight
    assert all(torch.equal(one, other) for one, other in zip(starts(model), starts(trainer.model), strict=True))
    for name in estimate:
        assert all(torch.equal(getattr(estimate[name], part), getattr(late.estimate[name], part)) for part in "USV")


def test_in_sft_too_the_callback_and_initialize_give_one_start(tmp_path: Path) -> None:
    trainer = ready(sft)([late := callback()], tmp_path, learning_rate=0.0, max_steps=1)
    seen = watched(trainer)
    trainer.train()
    hand = ready(sft)([], tmp_path)  # SFTTrainer has another formula for its loss than the model
    data = [inputs | {"count": count} for inputs, count in seen["estimate"]]

    def loss(model: Any, batch: Any) -> Any:
        return hand.compute_loss(model, batch, num_items_in_batch=batch.pop("count"))

    lora_ga.initialize(hand.model, data, late.config, loss_fn=loss)
    assert all(torch.equal(one, other) for one, other in zip(starts(hand.model), starts(trainer.model), strict=True))


class Uneven(torch.utils.data.Dataset[Any]):
    """Rows of two lengths, which cannot be in one batch."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = torch.arange(index, index + (8 if index < 16 else 12)) % 64
        return {"input_ids": row, "labels": row}


class OwnBatchSampler(Trainer):
    """Makes batches of rows of one length."""

    def get_train_dataloader(self) -> Any:
        """Read rows of one length together."""
        groups = [list(range(begin, begin + 4)) for begin in range(0, 32, 4)]
        return self.accelerator.prepare(
            DataLoader(self.train_dataset, batch_sampler=groups, collate_fn=self.data_collator)
        )


class Whole(torch.utils.data.Dataset[Any]):
    """Each item is a batch."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": (row := torch.arange(24).view(2, 12) + index), "labels": row}


class OwnLoader(Trainer):
    """Reads a data set of whole batches."""

    def get_train_dataloader(self) -> Any:
        """Read whole batches."""
        return DataLoader(self.train_dataset, batch_size=None)


class Endless(IterableDataset[Any]):
    """A stream without an end, which begins anew each time. It counts how often."""

    begun = 0

    def __iter__(self) -> Any:
        self.begun += 1
        index = 0
        while True:
            yield Uneven()[index % 16]
            index += 1


@pytest.mark.parametrize(
    ("kind", "data"),
    [(OwnBatchSampler, Uneven), (OwnLoader, Whole), (Trainer, Endless)],
    ids=lambda each: each.__name__,
)
def test_the_estimate_reads_what_the_trainers_own_loader_gives(kind: Any, data: Any, tmp_path: Path) -> None:
    trainer = made(tmp_path, [callback()], kind, data(), remove_unused_columns=False)
    seen = watched(trainer)
    trainer.train()
    # These loaders draw nothing at random, so the estimate reads the first batches of training.
    assert ids(seen["estimate"]) == ids(seen["training"])[:3]
    assert ids(seen["training"]) == order_of_training(made(tmp_path, [], kind, data(), remove_unused_columns=False))


class Rare(Trainer):
    """Draws the last four rows alone."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.WeightedRandomSampler([0.0] * 20 + [1.0] * 4, 24)


def test_the_estimate_draws_as_training_draws(tmp_path: Path) -> None:
    trainer = made(tmp_path, [callback()], Rare)
    seen = watched(trainer)
    trainer.train()
    rare = tokenised()["input_ids"][20:]
    assert all(row in rare for batch in ids(seen["estimate"]) for row in batch)
    assert ids(seen["training"]) == order_of_training(made(tmp_path, [], Rare))


def test_the_seed_chooses_the_batches_and_the_default_choice_is_a_shuffle(tmp_path: Path) -> None:
    chosen = []
    for seed in (0, 0, 1):
        trainer = made(tmp_path, [callback(config=LoraGAConfig(max_batches=3, seed=seed))], max_steps=1)
        seen = watched(trainer)
        trainer.train()
        chosen.append(ids(seen["estimate"]))
    assert chosen[0] == chosen[1] != chosen[2]
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:12].view(3, 4)
    assert chosen[0] == torch.tensor(tokenised()["input_ids"])[shuffled].tolist()


# --- what training finds afterwards -----------------------------------------------------------------------------------


class Shuffling(Sampler[int]):
    """Has generators and a list that it shuffles in place."""

    def __init__(self) -> None:
        self.torch, self.python, self.numpy = torch.Generator(), random.Random(0), np.random.default_rng(0)
        self.old, self.order, self.passes = np.random.RandomState(0), list(range(24)), 0

    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Any:
        self.passes += 1
        self.python.shuffle(self.order)
        for draw in torch.randperm(24, generator=self.torch).tolist():
            yield (self.order[draw] + self.passes + int(self.numpy.integers(24)) + int(self.old.randint(24))) % 24


class OneSampler(Trainer):
    """Uses one sampler in all its loaders."""

    def _get_train_sampler(self, *_: Any) -> Any:
        self.mine = getattr(self, "mine", None) or Shuffling()
        return self.mine


class OneLoader(OneSampler):
    """Returns one loader each time."""

    def get_train_dataloader(self) -> Any:
        """The loader."""
        self.loader = getattr(self, "loader", None) or super().get_train_dataloader()
        return self.loader


class GlobalDraws(Trainer):
    """Its sampler, collator and loss draw from the global generators."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return [random.randrange(24) for _ in range(12)] + np.random.permutation(24)[:12].tolist()

    def compute_loss(self, *args: Any, **named: Any) -> Any:
        """Draw."""
        torch.rand(1), random.random(), np.random.rand()
        return super().compute_loss(*args, **named)


class States(TrainerCallback):
    """Keeps the states of the global generators after the estimate."""

    def on_train_begin(self, *_: Any, **named: Any) -> None:
        """Keep."""
        self.states = [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]
        self.seed = torch.initial_seed()


@pytest.mark.parametrize("kind", [Trainer, OneSampler, OneLoader, GlobalDraws])
def test_neither_the_order_of_training_nor_a_random_state_moves(kind: Any, tmp_path: Path) -> None:
    runs = []
    for callbacks in ([callback()], []):
        states = States()
        torch.manual_seed(5)
        trainer = made(tmp_path, [*callbacks, states], kind)
        runs.append((order_of_training(trainer), states.states, states.seed))
    assert runs[0] == runs[1]


def test_accelerate_forgets_the_loader_of_the_estimate(tmp_path: Path) -> None:
    found = []

    class References(TrainerCallback):
        def on_train_begin(self, *_: Any, **named: Any) -> None:
            """Keep the loaders that are being read."""
            found.append(GradientState().dataloader_references)

    made(tmp_path, [References(), callback(), References()], max_steps=1).train()
    assert found[0] == found[1]


class Logging(Trainer):
    """Logs in its loss, in every way there is, and counts."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.calls, self.parts, self.nested = 0, [], {"train": defaultdict(list)}  # type: ignore[var-annotated]
        self.window, self.total, self.after_calls = deque(maxlen=2), torch.zeros(()), []  # type: ignore[var-annotated]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **named: Any) -> Any:
        """Log."""
        loss = super().compute_loss(model, inputs, *args, **named)
        self.calls += 1
        self.parts.append(1)
        self.nested["train"]["loss"].append(1)
        self.window.append(1)
        self.total += 1
        self.state.num_input_tokens_seen += 1
        self.log({"part": 1.0})
        super().log({"another part": 1.0})
        return loss


class Logs(TrainerCallback):
    """Counts the logs that reach the callbacks."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **named: Any) -> None:
        """Count."""
        self.seen.append(sorted(logs))


def test_the_passes_of_the_estimate_log_nothing_and_count_nothing(tmp_path: Path) -> None:
    runs = []
    for callbacks in ([callback()], []):
        logs = Logs()
        trainer = made(tmp_path, [*callbacks, logs], Logging, max_steps=2)
        trainer.train()
        found = trainer.calls, trainer.parts, dict(trainer.nested["train"]), list(trainer.window), trainer.total.item()
        history = [sorted(entry) for entry in trainer.state.log_history]
        runs.append((found, history, logs.seen, trainer.state.num_input_tokens_seen))
    assert runs[0] == runs[1]
    assert runs[0][0][0] == 2


def test_an_error_in_the_estimate_leaves_the_trainer_as_it_was(tmp_path: Path) -> None:
    class Failing(Logging):
        def compute_loss(self, *args: Any, **named: Any) -> Any:
            """Log, then fail."""
            super().compute_loss(*args, **named)
            raise OSError("the disk is gone")

    trainer = made(tmp_path, [callback()], Failing)
    before, args = (trainer.parts, trainer.callback_handler), trainer.args
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.train()
    assert "log" not in vars(trainer)
    assert (trainer.parts, trainer.callback_handler) == before == ([], trainer.callback_handler)
    assert trainer.args is args
    assert trainer.calls == 0
    assert trainer.state.log_history == []


# --- batch size -------------------------------------------------------------------------------------------------------


def test_out_of_memory_in_the_estimate_makes_the_trainer_try_smaller_batches(tmp_path: Path) -> None:
    class Small(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **named: Any) -> Any:
            """Have memory for two rows."""
            if len(inputs["input_ids"]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return super().compute_loss(model, inputs, *args, **named)

    trainer = made(tmp_path, [late := callback()], Small, auto_find_batch_size=True, max_steps=2)
    seen = watched(trainer)
    trainer.train()
    assert [len(batch) for batch in ids(seen["estimate"])] == [4, 3, 2, 2, 2]
    assert [len(batch) for batch in ids(seen["training"])] == [2, 2]
    assert late.estimate is not None
    assert late.estimate.batches == 3
    assert all(bool(start.any()) for start in starts(trainer.model))


# --- the count of labels ----------------------------------------------------------------------------------------------


def summed(outputs: Any, labels: Any, num_items_in_batch: Any) -> Any:
    """A loss that needs the count."""
    whole = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return whole / num_items_in_batch


def test_compute_loss_gets_the_number_of_labels_of_its_batch(tmp_path: Path) -> None:
    exact = LoraGAConfig(max_batches=3, estimator="dense")
    late = callback(config=exact)
    trainer = made(tmp_path, [late], compute_loss_func=summed, gradient_accumulation_steps=2, max_steps=1)
    seen = watched(trainer)
    trainer.train()
    assert [int(count) for _, count in seen["estimate"]] == [4 * 9] * 3
    assert [int(count) for _, count in seen["training"]] == [2 * 4 * 9] * 2  # of both micro-batches of the step
    hand = lora_ga.estimate_gradients(adapted(llama(), TARGETS), [inputs for inputs, _ in seen["estimate"]], exact)
    assert late.estimate is not None
    assert all(late.estimate[name].norm == pytest.approx(hand[name].norm, rel=1e-6) for name in hand)


class TwoGPUs(TrainerCallback):
    """Lets the arguments name two GPUs while the events of the beginning are fired."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on_train_begin(self, args: Any, *_: Any, **named: Any) -> None:
        """Set the number."""
        args._n_gpu = self.count


def test_with_data_parallel_the_count_is_one_number(tmp_path: Path) -> None:
    trainer = made(tmp_path, [TwoGPUs(2), callback(), TwoGPUs(0)], compute_loss_func=summed, max_steps=1)
    seen = watched(trainer)
    trainer.train()
    assert [int(count) for _, count in seen["estimate"]] == [4 * 9] * 3


# --- batches without a label ------------------------------------------------------------------------------------------


def partly_unlabelled(count: int = 24) -> Dataset:
    """Every third row has no label."""
    data = tokenised(count).to_list()
    for row in data[1::3]:
        row["labels"] = [-100] * len(row["labels"])
    return Dataset.from_list(data)


def test_batches_without_a_label_are_skipped_and_counted_in_one_warning(tmp_path: Path) -> None:
    late = LoraGACallback(LoraGAConfig(max_batches=10))
    trainer = made(tmp_path, [late], data=partly_unlabelled(), per_device_train_batch_size=1, max_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [text for each in caught if "no label" in (text := str(each.message))]
    assert len(said) == 1
    left_out, read = int(said[0].split()[0]), int(said[0].split()[2])
    assert left_out > 0
    assert read == 10 + left_out  # those that are left out do not count for `max_batches`
    assert late.estimate is not None
    assert late.estimate.batches == 10
    assert late.estimate.weight == 10 * 9


def test_only_where_no_label_is_left_training_is_refused(tmp_path: Path) -> None:
    data = Dataset.from_list(partly_unlabelled().to_list()[1::3])
    with pytest.raises(ValueError, match=r"None of the 2 batches has a label\. Every label is -100, the label that"):
        made(tmp_path, [callback()], data=data).train()


def masked(batch: Any) -> Any:
    return batch | {"labels": torch.full_like(batch["labels"], -100)}


@pytest.mark.parametrize("estimator", ["streaming", "dense", "probe"])
def test_initialize_leaves_out_batches_without_a_label(estimator: str) -> None:
    config, data = LoraGAConfig(estimator=estimator, max_batches=3), causal(3)
    mixed = iter([masked(data[0]), data[0], data[1], masked(data[2]), data[2], *causal(5)[3:]])
    with pytest.warns(UserWarning, match="2 of 5 batches have no label"):
        found = lora_ga.estimate_gradients(adapted(llama()), mixed, config)
    expected = lora_ga.estimate_gradients(adapted(llama()), data, config)
    assert found.weight == expected.weight
    assert found.batches == expected.batches == 3
    assert all(torch.equal(found[name].U, expected[name].U) for name in expected)
    assert len(list(mixed)) == 2  # nothing beyond the limit is read


def test_an_interrupted_estimate_leaves_out_the_same_batches(tmp_path: Path) -> None:
    data = causal(4)
    mixed = [data[0], masked(data[0]), data[1], masked(data[1]), data[2], data[3]]
    expected = lora_ga.estimate_gradients(adapted(llama()), data)
    for stop in (1, 2, 3, 4):
        file = tmp_path / f"{stop}.safetensors"

        def broken(stop: int = stop) -> Any:
            yield from mixed[:stop]
            raise OSError

        with pytest.raises(OSError):  # noqa: PT011
            lora_ga.estimate_gradients(adapted(llama()), broken(), checkpoint=file, every=1)
        for _ in range(2):  # the second time from the end
            found = lora_ga.estimate_gradients(adapted(llama()), mixed, checkpoint=file, every=1)
            assert found.weight == expected.weight
            assert all(torch.equal(found[name].U, expected[name].U) for name in expected)


def test_a_loss_of_the_users_gets_every_batch() -> None:
    def of_activations(model: Any, batch: Any) -> Any:
        return model(input_ids=batch["input_ids"]).logits.square().mean()

    estimate = lora_ga.estimate_gradients(adapted(llama()), map(masked, causal(2)), loss_fn=of_activations)
    assert estimate.batches == 2


def test_endless_data_without_any_label_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MOST_UNLABELLED", 5)
    batch = masked(causal(1)[0])
    with pytest.raises(ValueError, match="Of the first 5 batches none has a label. Every label is -100"):
        lora_ga.estimate_gradients(adapted(llama()), iter(lambda: batch, None))


# --- streams that may not restart -------------------------------------------------------------------------------------


class Held(IterableDataset[Any]):
    """Continues where the last reader stopped."""

    def __init__(self) -> None:
        self.inner = Endless()
        self.rows = iter(self.inner)

    def __iter__(self) -> Any:
        yield from self.rows


class Nested(Endless):
    """Holds a stream that continues where the last reader stopped."""

    def __init__(self) -> None:
        self.held = Held()


@pytest.mark.parametrize("data", [Held, Nested])
def test_streams_that_hold_an_iterator_are_refused(data: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"a {data.__name__}, an iterable that may not restart since it is or holds"):
        made(tmp_path, [callback()], data=data())


def test_a_loader_that_is_one_iterator_is_refused(tmp_path: Path) -> None:
    class Iterator(Trainer):
        def get_train_dataloader(self) -> Any:
            """One iterator each time."""
            self.mine = getattr(self, "mine", None) or iter([{"input_ids": torch.ones(1, 3)}] * 50)
            return self.mine

    with pytest.raises(ValueError, match="a list_iterator, an iterable that may not restart"):
        made(tmp_path, [callback()], Iterator).train()


# --- groups of answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_grpo_compares_as_many_answers_as_in_training(streamed: bool, tmp_path: Path) -> None:
    groups, compared = [], []

    def letters(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        groups.append([prompts.count(prompt) for prompt in prompts])
        compared.append(grpo.num_generations_eval)
        return [float(len(set(completion))) for completion in completions]

    trainer, arguments = trl_classes("GRPO")
    given = settings(tmp_path, max_steps=2, save_strategy="no", gradient_accumulation_steps=2, bf16=False)
    late, data = callback(), rows("prompt")
    grpo = trainer(
        llama(),
        letters,
        args=arguments(**given, num_generations=4, num_generations_eval=2, max_completion_length=6),
        train_dataset=data.to_iterable_dataset() if streamed else data,
        processing_class=tokenizer(),
        peft_config=peft_config(),
        callbacks=[late],
    )
    grpo.train()
    assert compared == [4, 4, 4, 2, 2]  # what the estimate compares in evaluation mode, and what training leaves alone
    assert late.estimate is not None
    # The loader gives the prompts of both micro-batches of a step at once, and gives them twice.
    assert groups == [[4] * 8] * (late.estimate.batches + 2)
    assert late.estimate.batches == 3
