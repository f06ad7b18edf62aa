"""`LoraGACallback(learning_rate="auto")`: optimizers, schedules, failed searches, resumed runs, batches."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch.optim import AdamW
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

import lora_ga
import lora_ga.adapter.rate
import lora_ga.integrations.trainer
from lora_ga import LoraGACallback
from lora_ga.distributed.processes import Processes
from toys import adapted, causal, reactive_llama
from trainers import CONFIG, TARGETS, callback, factors, settings, tokenised, transformers_trainer

FOUND = 0.03


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let a search find `FOUND` at once, also for a few steps; the arguments by name of every search."""
    seen: list[dict[str, Any]] = []

    def find_rate(model: Any, data: Any, steps: int, **named: Any) -> float:
        seen.append({"model": model, **named})
        return FOUND

    monkeypatch.setattr(lora_ga.integrations.trainer, "find_rate", find_rate)
    monkeypatch.setattr(lora_ga.integrations.trainer, "LEAST_STEPS", 4)
    return seen


def auto(folder: Path, model: Any = None, optimizer: Any = None, schedule: Any = None, **changes: Any) -> Trainer:
    """A trainer that looks for its rate."""
    given = {"save_strategy": "no", "learning_rate": 1e-3}
    return Trainer(
        adapted(reactive_llama(), TARGETS) if model is None else model,
        TrainingArguments(**settings(folder, **(given | changes))),
        train_dataset=tokenised(64),
        callbacks=[callback(learning_rate="auto")],
        optimizers=(optimizer, schedule),
    )


def callback_of(trainer: Trainer) -> LoraGACallback:
    """The LoraGACallback of a trainer."""
    return next(each for each in trainer.callback_handler.callbacks if isinstance(each, LoraGACallback))


def logged(trainer: Trainer) -> list[float]:
    """The learning rate that was logged at each step."""
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def peaks(trainer: Any) -> list[float]:
    """The peak of each group of the trainer's optimizer."""
    return [group["initial_lr"] for group in trainer.optimizer.param_groups]


def trained_by(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# --- the optimizer ---------------------------------------------------------------------------------------------------


def test_an_optimizer_with_a_rate_of_its_own_gets_the_rate_that_was_found(tmp_path: Path, searches: Any) -> None:
    model = adapted(reactive_llama(), TARGETS)
    trainer = auto(tmp_path, model, AdamW(trained_by(model), lr=5e-3))
    trainer.train()
    assert searches[0]["optimizer"] is None  # one rate for all, as in the optimizer of a search
    assert peaks(trainer) == [FOUND]
    assert trainer.args.learning_rate == logged(trainer)[0] == FOUND
    trainer.train()  # a second call goes on with it
    assert len(searches) == 1
    assert peaks(trainer) == [FOUND]


def test_the_optimizer_class_of_a_trainer_may_have_a_rate_of_its_own(tmp_path: Path, searches: Any) -> None:
    trainer = auto(tmp_path)
    trainer.optimizer_cls_and_kwargs = (AdamW, {"lr": 5e-3})
    trainer.train()
    assert len(searches) == 1
    assert set(peaks(trainer)) == {FOUND}


def test_groups_keep_their_ratios_and_a_search_has_them_too(tmp_path: Path, searches: Any) -> None:
    model = adapted(reactive_llama(), TARGETS)
    plus = create_loraplus_optimizer(model, AdamW, lr=1e-4, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, eps=1e-6)
    trainer = auto(tmp_path, model, plus)
    trainer.train()
    assert peaks(trainer) == pytest.approx([FOUND, FOUND / 100, 16 * FOUND, 16 * FOUND])  # PEFT gives embeddings 1e-6
    assert trainer.args.learning_rate == logged(trainer)[0] == FOUND
    tried = searches[0]["optimizer"](0.1)
    filled = [group for group in plus.param_groups if group["params"]]
    assert type(tried) is AdamW
    assert tried is not plus
    assert [group["lr"] for group in tried.param_groups] == pytest.approx([0.1, 1.6])
    for one, other in zip(tried.param_groups, filled, strict=True):
        assert all(a is b for a, b in zip(one["params"], other["params"], strict=True))
        assert (one["weight_decay"], one["eps"]) == (other["weight_decay"], 1e-6)
    assert [group["weight_decay"] for group in tried.param_groups] == [0.1, 0.1]


def test_groups_of_which_none_has_the_default_rate_are_scaled_from_the_highest(tmp_path: Path, searches: Any) -> None:
    model = adapted(reactive_llama(), TARGETS)
    pairs = trained_by(model)
    trainer = auto(tmp_path, model, AdamW([{"params": pairs[::2], "lr": 2e-4}, {"params": pairs[1::2], "lr": 1e-4}]))
    trainer.train()
    assert peaks(trainer) == pytest.approx([FOUND, FOUND / 2])
    assert [group["lr"] for group in searches[0]["optimizer"](1.0).param_groups] == pytest.approx([1.0, 0.5])


def test_a_search_does_not_move_what_the_optimizer_does_not_hold(tmp_path: Path, searches: Any) -> None:
    model = adapted(reactive_llama(), TARGETS)
    held = trained_by(model)[1::2]
    auto(tmp_path, model, AdamW(held, lr=1e-3)).train()
    (group,) = searches[0]["optimizer"](0.1).param_groups
    assert all(one is other for one, other in zip(group["params"], held, strict=True))


def test_the_rate_of_groups_is_that_of_a_search_with_their_optimizer(tmp_path: Path) -> None:
    def plus(model: Any, rate: float) -> Any:
        return create_loraplus_optimizer(model, AdamW, lr=rate, loraplus_lr_ratio=16)

    batches = causal(8)
    alone, model = (adapted(reactive_llama(), TARGETS) for _ in range(2))
    for each in (alone, model):
        each.get_output_embeddings().weight.data *= 30  # so that a step can raise the loss
    lora_ga.initialize(alone, batches, CONFIG)
    expected, one_rate = (
        lora_ga.find_rate(alone, batches, 50, optimizer=optimizer)
        for optimizer in (lambda rate: plus(alone, rate), None)
    )
    trainer = auto(tmp_path, model, plus(model, 1e-4), max_steps=50)
    callback_of(trainer).batches = batches
    trainer.train()
    assert trainer.args.learning_rate == expected
    assert expected != one_rate


class PickyAdam(AdamW):
    """An optimizer that is not made from its groups and settings alone."""

    def __init__(self, groups: Any, model: Any, lr: float = 1e-3) -> None:
        super().__init__(groups, lr=lr)


def test_an_optimizer_that_cannot_be_made_again_is_refused_before_the_estimate_and_the_advice_works(
    tmp_path: Path, searches: Any
) -> None:
    def groups(model: Any, rate: float) -> list[dict[str, Any]]:
        pairs = trained_by(model)
        return [{"params": pairs[::2], "lr": rate}, {"params": pairs[1::2], "lr": 4 * rate}]

    model = adapted(reactive_llama(), TARGETS)
    trainer = auto(tmp_path, model, PickyAdam(groups(model, 1e-3), model))
    with pytest.raises(ValueError, match=r"cannot make a second PickyAdam .*Call lora_ga.find_rate\(..., optimizer=l"):
        trainer.train()
    assert not any(bool(factor.start.any()) for factor in factors(model)[1::2])
    assert searches == []
    model = adapted(reactive_llama(), TARGETS)
    lora_ga.initialize(model, causal(), CONFIG)
    rate = lora_ga.find_rate(model, causal(8), 60, optimizer=lambda rate: PickyAdam(groups(model, rate), model))
    arguments = TrainingArguments(**settings(tmp_path, save_strategy="no"))
    optimizer = PickyAdam(groups(model, rate), model)
    trainer = Trainer(model, arguments, train_dataset=tokenised(), optimizers=(optimizer, None))
    trainer.train()
    assert logged(trainer)[0] == rate


def test_a_short_run_keeps_the_rate_of_its_own_optimizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(reactive_llama(), TARGETS)
    trainer = auto(tmp_path, model, AdamW(trained_by(model), lr=5e-3), max_steps=2)
    trainer.train()
    assert peaks(trainer) == [5e-3]
    assert "so training uses 0.005" in caplog.text
    assert "2 steps at a learning rate of 0.005 move" in caplog.text


# --- a search that fails ---------------------------------------------------------------------------------------------


class Watched(TrainerCallback):
    """Keeps the state of the random numbers before the search, and ends training after four steps."""

    def __init__(self) -> None:
        self.random: list[torch.Tensor] = []

    def on_train_begin(self, *_: Any, **named: Any) -> None:
        """Keep the state."""
        self.random.append(torch.get_rng_state())

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        """End training."""
        control.should_training_stop = state.global_step == 4


class FailsOnce:
    """A loss that fails in its nth pass, and in no other; what trains, after the three passes of the estimate."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.passes, self.at, self.error = 0, at, error
        self.start: list[torch.Tensor] = []

    def __call__(self, model: Any, batch: Any) -> torch.Tensor:
        self.passes += 1
        if self.passes == 4:
            self.start = [parameter.detach().clone() for parameter in trained_by(model)]
        if self.passes == self.at:
            raise self.error
        loss: torch.Tensor = model(**batch).loss
        return loss


@pytest.mark.parametrize(
    ("at", "error"),
    [(2, KeyboardInterrupt()), (5, RuntimeError("broken")), (15, KeyboardInterrupt())],
    ids=["in the estimate", "before the trials", "in a trial"],
)
def test_after_a_search_that_failed_train_begins_anew(at: int, error: BaseException, tmp_path: Path) -> None:
    """The estimate has 3 passes, the search first 8 and then up to 8 in each trial."""
    runs, estimates = [], []
    for name, fails in (("whole", FailsOnce(0, error)), ("again", FailsOnce(at, error))):
        trainer, watched = auto(tmp_path / name, max_steps=50), Watched()
        lora_callback = callback_of(trainer)
        lora_callback.loss_fn, lora_callback.batches = fails, causal(8)
        trainer.callback_handler.callbacks.insert(0, watched)
        if name == "again":
            with pytest.raises(type(error)):
                trainer.train()
            assert torch.equal(torch.get_rng_state(), watched.random[0])
            assert all(parameter.grad is None for parameter in trainer.model.parameters())
            pairs = list(zip(fails.start, trained_by(trainer.model), strict=True)) if at > 3 else []
            assert all(torch.equal(one, other) for one, other in pairs)
            assert len(fails.start) == (0 if at < 4 else 12)
            assert len(trainer.optimizer.state) == 0
            assert set(peaks(trainer)) == {1e-3}
            estimates.append(lora_callback.estimate)
        torch.manual_seed(1)
        trainer.train()
        estimates.append(lora_callback.estimate)
        runs.append(trainer)
    assert estimates[1] is None if at == 2 else estimates[1] is estimates[2]  # only the search is made again
    assert runs[0].args.learning_rate == runs[1].args.learning_rate != 1e-3
    losses = [[entry.get("loss") for entry in trainer.state.log_history] for trainer in runs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5


def test_a_search_without_memory_is_made_again_with_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def find_rate(model: Any, data: Any, steps: int, **named: Any) -> float:
        sizes.append(len(next(iter(data))["input_ids"]))
        if len(sizes) == 1:
            raise RuntimeError("CUDA out of memory.")
        return FOUND

    monkeypatch.setattr(lora_ga.integrations.trainer, "find_rate", find_rate)
    trainer = auto(tmp_path, max_steps=50, auto_find_batch_size=True, per_device_train_batch_size=8)
    trainer.train()
    assert len(sizes) == 2
    assert sizes[1] < sizes[0] == 8
    assert trainer.args.learning_rate == logged(trainer)[0] == FOUND


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"save_only_model": True}, {"restore_callback_states_from_checkpoint": True}])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_resumed_run_has_the_rate_of_its_checkpoint(
    changes: Any, grouped: bool, tmp_path: Path, searches: Any
) -> None:
    def run(folder: Path) -> Trainer:
        model = adapted(reactive_llama(), TARGETS)
        plus = create_loraplus_optimizer(model, AdamW, lr=1e-4, loraplus_lr_ratio=4) if grouped else None
        return auto(folder, model, plus, save_strategy="steps", **changes)

    whole = run(tmp_path)
    whole.train()
    resumed = run(tmp_path / "resumed")  # where the next checkpoint has the rate as well
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    again = run(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-8"))
    assert len(searches) == 1
    for trainer in (resumed, again):
        assert peaks(trainer) == pytest.approx(peaks(whole))
        assert trainer.args.learning_rate == FOUND
    assert len(peaks(whole)) == (4 if grouped else 2)
    if "save_only_model" not in changes:
        assert logged(resumed)[-4:] == pytest.approx(logged(whole)[-4:])


def test_a_checkpoint_without_a_found_rate_is_resumed_and_says_so(
    tmp_path: Path, searches: Any, caplog: pytest.LogCaptureFixture
) -> None:
    auto(tmp_path, save_strategy="steps").train()
    file = tmp_path / "checkpoint-4" / "trainer_state.json"
    state = json.loads(file.read_text())
    del state["stateful_callbacks"]["LoraGACallback"]  # as in a run of an earlier version
    file.write_text(json.dumps(state))
    resumed = auto(tmp_path, save_strategy="steps", save_steps=2)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="lora_ga"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "the checkpoint has no learning rate that was found" in caplog.text
    assert f"goes on with the peak rate {FOUND:g}" in caplog.text  # of the state of its optimizer
    assert logged(resumed)[-1] == pytest.approx(FOUND / 8)


def test_a_resumed_run_with_another_optimizer_is_refused_and_the_advice_works(tmp_path: Path, searches: Any) -> None:
    auto(tmp_path, save_strategy="steps", save_only_model=True).train()
    checkpoint = str(tmp_path / "checkpoint-4")
    model = adapted(reactive_llama(), TARGETS)
    with pytest.raises(ValueError, match=r"rates for 2 groups of parameters, but the optimizer has 1.*0.03 was found"):
        auto(tmp_path, model, AdamW(trained_by(model))).train(resume_from_checkpoint=checkpoint)
    model = adapted(reactive_llama(), TARGETS)
    trainer = auto(tmp_path, model, AdamW(trained_by(model), lr=FOUND))
    callback_of(trainer).learning_rate = None
    trainer.train(resume_from_checkpoint=checkpoint)
    assert peaks(trainer) == [FOUND]


# --- the schedule ----------------------------------------------------------------------------------------------------

LAST = 1e-4


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("cosine_with_min_lr", {"min_lr": LAST}),
        ("cosine_warmup_with_min_lr", {"min_lr": LAST}),
        ("polynomial", {"lr_end": LAST}),
    ],
)
def test_a_last_rate_that_is_given_as_a_number_stays(kind: str, given: Any, tmp_path: Path, searches: Any) -> None:
    changes = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": given, "warmup_steps": 4}
    found = auto(tmp_path, save_strategy="steps", **changes)
    found.train()
    usual = transformers_trainer([], tmp_path, learning_rate=FOUND, save_strategy="no", **changes)
    usual.train()
    assert logged(found) == pytest.approx(logged(usual))
    assert found.lr_scheduler.get_last_lr() == pytest.approx(usual.lr_scheduler.get_last_lr())
    if kind != "cosine_warmup_with_min_lr":  # which ends above it
        assert found.lr_scheduler.get_last_lr()[0] == pytest.approx(LAST)
    resumed = auto(tmp_path, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert logged(resumed) == pytest.approx(logged(usual))


def test_a_schedule_that_the_trainer_was_given_keeps_its_shape_and_says_so(
    tmp_path: Path, searches: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(reactive_llama(), TARGETS)
    optimizer = AdamW(trained_by(model), lr=1e-3)
    schedule = get_scheduler("polynomial", optimizer, 0, 8, scheduler_specific_kwargs={"lr_end": 1e-4})
    trainer = auto(tmp_path, model, optimizer, schedule)
    trainer.train()
    assert trainer.lr_scheduler is schedule
    assert "was given its schedule, which now begins at 0.03 instead of 0.001. All its rates are mul" in caplog.text
    assert (logged(trainer)[0], schedule.get_last_lr()[0]) == pytest.approx((FOUND, FOUND / 10))


def test_a_schedule_that_cannot_begin_at_the_rate_says_what_to_do(tmp_path: Path, searches: Any) -> None:
    changes = {"lr_scheduler_type": "polynomial", "learning_rate": 0.1}
    trainer = auto(tmp_path, lr_scheduler_kwargs={"lr_end": 0.05}, **changes)
    with pytest.raises(ValueError, match=r"found the learning rate 0.03, but the schedule cannot.*Change TrainingArg"):
        trainer.train()
    assert set(peaks(trainer)) == {trainer.args.learning_rate} == {0.1}
    trainer.args.lr_scheduler_kwargs = {"lr_end": 0.005}
    trainer.train()
    assert (logged(trainer)[0], trainer.lr_scheduler.get_last_lr()[0]) == pytest.approx((FOUND, 0.005))


@pytest.mark.parametrize("warmup", [0, 5])
def test_the_first_rate_that_is_logged_is_that_of_the_first_step(warmup: int, tmp_path: Path, searches: Any) -> None:
    trainer = auto(tmp_path, warmup_steps=warmup)
    trainer.train()
    assert logged(trainer)[:2] == pytest.approx([0.0, FOUND / 5] if warmup else [FOUND, FOUND * 7 / 8])


def test_no_note_on_the_rate_that_a_search_will_replace(
    tmp_path: Path, searches: Any, caplog: pytest.LogCaptureFixture
) -> None:
    auto(tmp_path, learning_rate=5e-5).train()
    assert len(searches) == 1
    assert "raise the learning rate" not in caplog.text


# --- the batches -----------------------------------------------------------------------------------------------------


class Once(IterableDataset[Any]):
    """A stream that continues where the last reader stopped."""

    def __init__(self) -> None:
        self.rows = iter(causal(8))

    def __iter__(self) -> Iterator[Any]:
        yield from self.rows


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: (batch for batch in causal(8)), "generator"),
        (Once, "Once"),
        (lambda: DataLoader(Once(), batch_size=None), "DataLoader"),
    ],
)
def test_batches_that_can_be_read_once_are_refused_before_the_estimate_and_the_advice_works(
    make: Callable[[], Any], kind: str, tmp_path: Path, searches: Any
) -> None:
    trainer, batches = auto(tmp_path), make()
    lora_callback = callback_of(trainer)
    lora_callback.batches = batches
    with pytest.raises(ValueError, match=rf"the batches are a {kind}, which may not restart.*Give a list of batches"):
        trainer.train()
    assert lora_callback.estimate is None
    lora_callback.batches = list(batches)  # no batch was read
    assert len(lora_callback.batches) == 8
    trainer.train()
    assert trainer.args.learning_rate == FOUND


def test_a_short_run_reads_batches_once(tmp_path: Path) -> None:
    lora_callback = LoraGACallback(CONFIG, batches=iter(causal(3)), learning_rate="auto")
    transformers_trainer([lora_callback], tmp_path, max_steps=1).train()
    assert lora_callback.estimate is not None
    assert lora_callback.estimate.batches == 3


def test_several_processes_are_refused_before_the_estimate(
    tmp_path: Path, searches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_ga.adapter.rate, "processes", lambda: Processes(0, 2))
    trainer: Any = auto(tmp_path)
    trainer.get_train_dataloader = counted = mock.Mock(wraps=trainer.get_train_dataloader)
    with pytest.raises(
        ValueError, match=r'LoraGACallback\(learning_rate="auto"\) runs in one process, but there are several'
    ):
        trainer.train()
    assert callback_of(trainer).estimate is None
    assert counted.call_count == 1  # the loader of training; none of the estimate
    callback_of(trainer).learning_rate = None  # the advice: a rate of one's own
    trainer.train()
    assert trainer.args.learning_rate == 1e-3
    assert not searches


class Stream(IterableDataset[Any]):
    """Rows without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(tokenised(64).with_format("torch"))


def test_batches_of_a_stream_without_a_length_are_searched(tmp_path: Path, searches: Any) -> None:
    trainer = auto(tmp_path)
    callback_of(trainer).batches = DataLoader(Stream(), batch_size=4)
    trainer.train()
    assert trainer.args.learning_rate == FOUND
    assert len(searches) == 1
