"""LoraGACallback: its estimate, the trainer it uses, its effects on the trainer, the errors it raises."""

from __future__ import annotations

import inspect
import logging
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import lora_ga
import lora_ga.integrations.trainer
import processes
from cases import LAYERS
from lora_ga import LoraGACallback, LoraGAConfig
from lora_ga.adapter.save import FILE
from lora_ga.adapter.structure import give_structure
from lora_ga.integrations.trainer_rate import PeakRate
from lora_ga.version import is_before
from toys import adapted, causal, gpt2, injected, llama, logits, reactive_llama
from trainers import (
    TARGETS,
    callback,
    factors,
    preferences,
    ready,
    rows,
    settings,
    sft,
    tokenised,
    tokenizer,
    transformers_trainer,
)


def assert_same_start(one: Any, other: Any) -> None:
    pairs = list(zip(factors(one), factors(other), strict=True))
    assert len(pairs) > 0
    assert all(torch.equal(a.start, b.start) for a, b in pairs)


def assert_same_trained(one: Trainer, other: Trainer) -> None:
    assert_same_start(one.model, other.model)
    first, second = (
        load_file(Path(trainer.args.output_dir) / "checkpoint-8" / "adapter_model.safetensors")
        for trainer in (one, other)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- effects ---------------------------------------------------------------------------------------------------------


def test_the_callback_gives_the_start_of_initialize_on_the_same_batches(tmp_path: Path) -> None:
    model = adapted(llama(), TARGETS)
    estimate = lora_ga.initialize(model, causal())
    lora_callback = callback(batches=causal())
    trainer = transformers_trainer([lora_callback], tmp_path, learning_rate=0.0, max_steps=1)
    trainer.train()
    if is_before("transformers", "5.0"):  # its Trainer divides a sum of losses, where the model takes their mean
        for one, other in zip(factors(trainer.model), factors(model), strict=True):
            torch.testing.assert_close(one.start, other.start, rtol=0, atol=1e-5)
    else:
        assert_same_start(trainer.model, model)
    assert lora_callback.estimate is not None
    assert lora_callback.estimate.batches == estimate.batches == 3
    assert lora_callback.estimate.weight == estimate.weight


@pytest.mark.parametrize(
    ("steps", "accumulated", "given", "read"),
    [(4, 1, None, 8), (110, 2, None, 22), (400, 1, None, 32), (4, 1, 3, 3)],
    ids=["short", "longer", "long", "given"],
)
def test_a_short_run_gets_an_estimate_on_fewer_batches_and_a_note(
    steps: int, accumulated: int, given: int | None, read: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = LoraGAConfig() if given is None else LoraGAConfig(max_batches=given)
    arguments: Any = SimpleNamespace(gradient_accumulation_steps=accumulated, world_size=1, optim="adamw_torch")
    state: Any = SimpleNamespace(max_steps=steps, is_world_process_zero=True)
    with caplog.at_level(logging.INFO, logger="lora_ga"):
        assert LoraGACallback(config)._config_for(arguments, state, 1e-3).max_batches == read
    note = f"training reads {steps * accumulated} batches. So the estimate reads at most {read} batches, not 32"
    assert (note in caplog.text) == (read in {8, 22})
    assert (f"{steps} steps at a learning rate of 0.001 move a weight" in caplog.text) == (steps == 4)
    caplog.clear()
    own = LoraGACallback(batches=causal())._config_for(arguments, state, None)
    assert "learning rate" not in caplog.text  # a search will find one
    assert own.resolved().max_batches == 32  # batches of one's own are all meant


def test_loss_fn_replaces_the_loss_of_the_trainer(tmp_path: Path) -> None:
    def halved(model: Any, batch: Any) -> tuple[torch.Tensor, float]:
        return model(**batch).loss, 1.0

    lora_callback = callback(batches=causal(), loss_fn=halved)
    transformers_trainer([lora_callback], tmp_path, max_steps=1).train()
    assert lora_callback.estimate is not None
    assert lora_callback.estimate.weight == 3.0


def test_the_optimizer_holds_the_parameters_that_the_callback_fills(tmp_path: Path) -> None:
    trainer = transformers_trainer([callback()], tmp_path)
    before = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert all(not bool(b.weight.any()) for b in factors(trainer.model)[1::2])
    optimizer = trainer.create_optimizer()
    trainer.train()
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in before}
    assert held == {id(factor.trainable) for factor in factors(trainer.model)}
    assert all(bool(factor.trainable.any()) for factor in factors(trainer.model))


def test_the_structure_alone_trains_as_plain_lora() -> None:
    batch, losses = causal(1)[0], []
    for prepared in (False, True):
        model = adapted(gpt2().double(), ["c_attn"])
        if prepared:
            give_structure(model, LoraGAConfig(), "default")
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)  # no weight decay
        for _ in range(6):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_a_second_call_of_train_continues_without_a_new_estimate(tmp_path: Path) -> None:
    lora_callback = callback()
    trainer = transformers_trainer([lora_callback], tmp_path)
    trainer.train()
    first, starts = lora_callback.estimate, [factor.start.clone() for factor in factors(trainer.model)]
    moved = [factor.trainable.clone() for factor in factors(trainer.model)]
    trainer.train()
    assert lora_callback.estimate is first
    assert all(torch.equal(factor.start, start) for factor, start in zip(factors(trainer.model), starts, strict=True))
    assert not any(torch.equal(f.trainable, held) for f, held in zip(factors(trainer.model), moved, strict=True))


def test_a_callback_added_after_the_trainer_was_made_gives_the_same_start(tmp_path: Path) -> None:
    early, late = transformers_trainer([callback()], tmp_path / "a"), transformers_trainer([], tmp_path / "b")
    late.add_callback(callback())
    early.train()
    late.train()
    assert_same_trained(early, late)


def test_a_new_model_of_model_init_gets_a_new_estimate(tmp_path: Path) -> None:
    lora_callback = callback()
    trainer = Trainer(
        model_init=lambda: adapted(llama(), TARGETS),
        args=TrainingArguments(**settings(tmp_path)),
        train_dataset=tokenised(),
        callbacks=[lora_callback],
    )
    trainer.train()
    first = lora_callback.estimate
    trainer.train()
    assert lora_callback.estimate is not first
    assert all(bool(factor.start.any()) for factor in factors(trainer.model))


def test_layers_without_a_gradient_remain_plain_lora(tmp_path: Path) -> None:
    model = adapted(llama(), TARGETS)
    drawn = model.base_model.model.model.layers[1].mlp.up_proj.lora_A["default"].weight.clone()

    def without_the_last_layer(model: Any, batch: Any) -> torch.Tensor:
        return model(**batch, output_hidden_states=True).hidden_states[1].square().mean()

    lora_callback = LoraGACallback(LoraGAConfig(on_missing="lora"), batches=causal(), loss_fn=without_the_last_layer)
    trainer = Trainer(
        model,
        TrainingArguments(**settings(tmp_path, learning_rate=0.0)),
        train_dataset=tokenised(),
        callbacks=[lora_callback],
    )
    with pytest.warns(UserWarning, match=r"3 of 6 layers cannot be aligned(.|\n)*They start as plain LoRA") as caught:
        trainer.train()
    places = {each.filename for each in caught if "cannot be aligned" in str(each.message)}
    assert places == {__file__}  # the line of train(), not one of the trainer
    layers = model.base_model.model.model.layers
    assert torch.equal(layers[1].mlp.up_proj.lora_A["default"].start, drawn)
    assert not bool(layers[1].mlp.up_proj.lora_B["default"].start.any())
    assert bool(layers[0].mlp.up_proj.lora_B["default"].start.any())
    again = lora_ga.load(llama(), tmp_path / "checkpoint-8", is_trainable=True)
    assert_same_start(again, model)


# --- how the callback finds the trainer ------------------------------------------------------------------------------


def passed(make: Any, folder: Path, **changes: Any) -> Trainer:
    """The callback is passed to the trainer, and finds the trainer in the call stack."""
    return make([callback()], folder, **changes)


def attached(make: Any, folder: Path, **changes: Any) -> Trainer:
    """The callback is attached to the trainer."""
    trainer = make([], folder, **changes)
    callback().attach(trainer)
    return trainer


def added(make: Any, folder: Path, **changes: Any) -> Trainer:
    """The callback is made with the trainer and added to it."""
    trainer = make([], folder, **changes)
    trainer.add_callback(callback(trainer=trainer))
    return trainer


SETUPS = [passed, attached, added]


@pytest.fixture
def no_call_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every reading of the call stack fail."""

    def fail(_: Any) -> None:
        raise AssertionError("the call stack was read")

    monkeypatch.setattr(lora_ga.integrations.trainer, "_trainer_from_call_stack", fail)


@pytest.mark.parametrize("setup", SETUPS)
def test_the_structure_exists_before_the_optimizer(setup: Any, tmp_path: Path) -> None:
    trainer = setup(transformers_trainer, tmp_path)
    assert len(factors(trainer.model)) == 2 * 2 * len(TARGETS)
    assert sum(type(each) is LoraGACallback for each in trainer.callback_handler.callbacks) == 1


@pytest.mark.usefixtures("no_call_stack")
@pytest.mark.parametrize("setup", [attached, added])
def test_an_attached_callback_does_not_read_the_call_stack(
    setup: Any, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = setup(transformers_trainer, tmp_path / "named")
    trainer.train()
    with pytest.raises(AssertionError, match="the call stack was read"):
        passed(transformers_trainer, tmp_path)
    monkeypatch.undo()
    found = passed(transformers_trainer, tmp_path / "found")
    found.train()
    assert_same_trained(trainer, found)


@pytest.mark.usefixtures("no_call_stack")
@pytest.mark.parametrize("setup", [attached, added])
def test_an_attached_callback_resumes_bit_for_bit(setup: Any, tmp_path: Path) -> None:
    whole, parts = (setup(transformers_trainer, tmp_path / name) for name in ("whole", "parts"))
    for trainer in (whole, parts):
        trainer.train()
    shutil.rmtree(tmp_path / "parts" / "checkpoint-8")
    again = setup(transformers_trainer, tmp_path / "parts")  # resumes from its output folder
    again.train(resume_from_checkpoint=True)
    assert_same_trained(whole, again)
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    moved = setup(transformers_trainer, tmp_path / "moved", resume_from_checkpoint=checkpoint)
    moved.train(resume_from_checkpoint=checkpoint)
    assert_same_trained(whole, moved)


def test_an_attached_callback_that_finds_no_checkpoint_raises_an_error(tmp_path: Path) -> None:
    attached(transformers_trainer, tmp_path / "a").train()
    checkpoints = [str(tmp_path / "a" / f"checkpoint-{step}") for step in (4, 8)]
    # The checkpoint in the arguments is of another step than the one that is resumed.
    again = attached(transformers_trainer, tmp_path / "b", resume_from_checkpoint=checkpoints[1])
    with pytest.raises(ValueError, match=r"resumes at step 4.*looked in .*checkpoint-8, .*b/checkpoint-4\. Set Trai"):
        again.train(resume_from_checkpoint=checkpoints[0])


def test_attach_has_no_effect_on_a_trainer_that_has_the_callback(tmp_path: Path) -> None:
    lora_callback = callback()
    trainer = transformers_trainer([lora_callback], tmp_path)
    parameters = [factor.trainable for factor in factors(trainer.model)]
    for _ in range(2):
        lora_callback.attach(trainer)
    now = [factor.trainable for factor in factors(trainer.model)]
    assert all(one is other for one, other in zip(parameters, now, strict=True))
    assert sum(each is lora_callback for each in trainer.callback_handler.callbacks) == 1
    trainer.train()
    lora_callback.attach(trainer)


def test_a_callback_attached_to_one_trainer_is_refused_by_another(tmp_path: Path) -> None:
    lora_callback = callback()
    lora_callback.attach(transformers_trainer([], tmp_path))
    with pytest.raises(RuntimeError, match="attached to one trainer, but called by another. Make a new LoraGACallback"):
        transformers_trainer([lora_callback], tmp_path)


def test_attach_refuses_what_on_init_end_refuses(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="The LlamaForCausalLM has no LoRA layers"):
        callback().attach(transformers_trainer([], tmp_path, model=llama()))
    trainer = transformers_trainer([], tmp_path)
    trainer.train_dataset = Dataset.from_list([])
    with pytest.raises(ValueError, match="The training data of the Trainer is empty"):
        callback(trainer=trainer)
    callback(batches=causal(), trainer=trainer)


def test_attach_works_after_trl_has_copied_the_adapter_to_a_reference(tmp_path: Path) -> None:
    trainer = attached(ready(preferences("DPO")), tmp_path, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert all(bool(factor.start.any()) for factor in factors(trainer.model))


class CallStack(TrainerCallback):
    """Keeps, for each event, the trainer's methods on the call stack and their local variables, innermost first."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[str, dict[str, Any]]]] = {}

    def _keep(self, event: str) -> None:
        frames = (info.frame for info in inspect.stack())
        self.calls[event] = [
            (frame.f_code.co_name, dict(frame.f_locals))
            for frame in frames
            if isinstance(frame.f_locals.get("self"), Trainer)
        ]

    def on_init_end(self, *_: Any, **named: Any) -> None:
        """Keep the call stack of this event."""
        self._keep("on_init_end")

    def on_train_begin(self, *_: Any, **named: Any) -> None:
        """Keep the call stack of this event."""
        self._keep("on_train_begin")


@pytest.mark.parametrize(
    ("resume", "expected"), [(None, None), (False, None), ("checkpoint-4", "checkpoint-4"), (True, "checkpoint-8")]
)
def test_the_installed_transformers_calls_its_events_as_the_fallback_expects(
    resume: Any, expected: str | None, tmp_path: Path
) -> None:
    """`_trainer_from_call_stack` reads `self` and `resume_from_checkpoint`, which Transformers does not document."""
    transformers_trainer([callback()], tmp_path).train()
    stack = CallStack()
    trainer = transformers_trainer([stack, callback()], tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / resume) if isinstance(resume, str) else resume)
    (name, found), *_ = stack.calls["on_init_end"]
    assert name == "__init__"
    assert found["self"] is trainer
    began = stack.calls["on_train_begin"]
    assert [name for name, _ in began][-1] == "train"
    assert all(found["self"] is trainer for _, found in began)
    checkpoints = [found["resume_from_checkpoint"] for _, found in began if "resume_from_checkpoint" in found]
    assert checkpoints[0] == (None if expected is None else str(tmp_path / expected))


def test_the_fallback_reads_the_checkpoint_from_the_call_of_train(tmp_path: Path) -> None:
    """Only the argument of `train` names the checkpoint here."""
    whole = passed(transformers_trainer, tmp_path / "whole")
    whole.train()
    again = passed(transformers_trainer, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same_trained(whole, again)


# --- logs and checkpoints --------------------------------------------------------------------------------------------


class KeepLogs(TrainerCallback):
    """Keeps the logs."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep a copy of the logs."""
        self.seen.append(dict(logs))


def test_the_trainer_does_not_log_the_losses_of_the_estimate(tmp_path: Path) -> None:
    logs = []
    for name, callbacks in (("with", [callback()]), ("without", [])):
        kept = KeepLogs()
        data = rows("prompt", "completion", count=8)
        trainer = sft([*callbacks, kept], tmp_path / name, eval_on_start=True, eval_strategy="no", max_steps=1)
        trainer.eval_dataset = trainer._prepare_dataset(data, tokenizer(), trainer.args, False, None, "eval")
        trainer.train()
        logs.append({key: value for key, value in kept.seen[0].items() if "runtime" not in key and "per_s" not in key})
    assert logs[0] == logs[1]
    assert "eval_mean_token_accuracy" in logs[0]


def test_the_best_checkpoint_is_loaded_at_the_end_and_others_are_removed(tmp_path: Path) -> None:
    model = adapted(llama(), TARGETS)
    arguments = settings(tmp_path, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True, save_total_limit=1)
    arguments |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # so that the best is not the last
    data = tokenised()
    trainer = Trainer(
        model, TrainingArguments(**arguments), train_dataset=data, eval_dataset=data, callbacks=[callback()]
    )
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    stock = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-4")
    batch = causal(1)[0]
    torch.testing.assert_close(logits(trainer.model.eval(), batch), logits(stock, batch), rtol=0, atol=1e-5)
    trainer.save_model(str(tmp_path / "best"))
    for file in ("adapter_model.safetensors", FILE):
        one, other = load_file(tmp_path / "best" / file), load_file(tmp_path / "checkpoint-4" / file)
        assert all(torch.equal(one[name], other[name]) for name in one)


# --- data ------------------------------------------------------------------------------------------------------------


def test_streams_of_the_datasets_library_restart_for_training(tmp_path: Path) -> None:
    orders: list[list[list[int]]] = []
    for name, callbacks in (("with", [callback()]), ("without", [])):
        stream = tokenised().to_iterable_dataset().shuffle(seed=3, buffer_size=8)
        trainer = Trainer(
            adapted(llama(), TARGETS),
            TrainingArguments(**settings(tmp_path / name)),
            train_dataset=stream,
            callbacks=list(callbacks),
        )
        step = trainer.training_step
        order: list[list[int]] = []

        def training_step(model: Any, inputs: Any, *rest: Any, order: Any = order, step: Any = step) -> Any:
            order.extend(inputs["input_ids"].tolist())
            return step(model, inputs, *rest)

        trainer.training_step = training_step
        trainer.train()
        orders.append(order)
    assert orders[0] == orders[1]
    assert len(orders[0]) == 32


class Once(IterableDataset[Any]):
    """A stream that continues where the last reader stopped."""

    def __init__(self) -> None:
        self.rows = iter(tokenised())

    def __iter__(self) -> Any:
        yield from self.rows


def make_trainer(tmp_path: Path, model: Any, data: Any = None, **changes: Any) -> Trainer:
    """A trainer with a new callback."""
    return Trainer(
        model,
        TrainingArguments(**settings(tmp_path, **changes)),
        train_dataset=tokenised() if data is None else data,
        callbacks=[callback()],
    )


def test_iterables_that_may_not_restart_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a Once, an iterable that may not restart.*LoraGACallback\(batches="):
        make_trainer(tmp_path, adapted(llama(), TARGETS), Once())


def test_empty_training_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The training data of the Trainer is empty"):
        make_trainer(tmp_path, adapted(llama(), TARGETS), Dataset.from_list([]))
    stream = datasets.IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(ValueError, match="The data holds no batch"):
        make_trainer(tmp_path, adapted(llama(), TARGETS), stream).train()


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_model_without_lora_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"The LlamaForCausalLM has no LoRA layers.*get_peft_model"):
        make_trainer(tmp_path, llama())


def test_an_adapter_that_is_aligned_already_is_refused(tmp_path: Path) -> None:
    model = adapted(llama(), TARGETS)
    lora_ga.initialize(model, causal())
    with pytest.raises(ValueError, match=r"'default' is already aligned: .* Train it without LoraGACallback, or give"):
        make_trainer(tmp_path, model)
    with pytest.raises(ValueError, match=r"LoraGACallback, with the rate that lora_ga\.find_rate\(model, batches, st"):
        LoraGACallback(learning_rate="auto").attach(Trainer(model, TrainingArguments(**settings(tmp_path))))


def test_an_adapter_that_has_trained_without_the_callback_is_refused(tmp_path: Path) -> None:
    trainer = transformers_trainer([], tmp_path)
    trainer.train()
    trainer.add_callback(callback())
    with pytest.raises(ValueError, match="'default' is not fresh"):
        trainer.train()


def test_offset_base_is_refused() -> None:
    with pytest.raises(ValueError, match='LoraGAConfig.offset is "base". Use offset="adapter", or call lora_ga'):
        LoraGACallback(LoraGAConfig(offset="base"))


def test_a_caller_that_is_not_a_trainer_is_refused() -> None:
    with pytest.raises(RuntimeError, match="was not called by a transformers.Trainer that has it among its callbacks"):
        callback().on_init_end(None, None, None, model=adapted(llama(), TARGETS))


def test_fsdp_1_is_refused(tmp_path: Path) -> None:
    trainer = transformers_trainer([], tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="does not fill adapters in FSDP 1, .*Set fsdp_version: 2 in the Accelerate"):
        callback().attach(trainer)


def test_an_injected_adapter_under_zero_3_is_refused(tmp_path: Path) -> None:
    """Under ZeRO-3 a state dict holds the trained halves, which PeftModel's files get joined afterwards."""
    zero_3: Any = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3)))
    trainer = transformers_trainer([], tmp_path, model=injected(llama(), TARGETS))
    trainer.accelerator = zero_3
    with pytest.raises(ValueError, match="does not fill injected adapters .model.add_adapter. under DeepSpeed ZeRO-3"):
        callback().attach(trainer)
    usual = transformers_trainer([], tmp_path)
    usual.accelerator = zero_3
    callback(batches=causal()).attach(usual)


def test_a_checkpoint_without_its_sidecar_is_refused_and_both_ways_out_train(tmp_path: Path) -> None:
    transformers_trainer([callback()], tmp_path).train()
    last = tmp_path / "checkpoint-8"
    (last / FILE).unlink()
    with pytest.raises(ValueError, match=rf"checkpoint-8: there is no {FILE}, so this is not .*or resume from an ear"):
        transformers_trainer([callback()], tmp_path, max_steps=10).train(resume_from_checkpoint=str(last))
    again = transformers_trainer([callback()], tmp_path / "earlier")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 8
    (last / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match="trains on as plain LoRA"):
        model = lora_ga.load(llama(), last, is_trainable=True)
    before = logits(model, causal(1)[0])
    transformers_trainer([], tmp_path / "new", model=model, max_steps=2).train()
    assert not torch.equal(logits(model.eval(), causal(1)[0]), before)


def test_a_checkpoint_with_the_sidecar_of_another_run_is_refused(tmp_path: Path) -> None:
    for name, batches in (("a", causal()), ("b", causal(5)[3:])):
        transformers_trainer([callback(batches=batches)], tmp_path / name).train()
    (tmp_path / "b" / "checkpoint-4" / FILE).replace(tmp_path / "a" / "checkpoint-4" / FILE)
    with pytest.raises(
        ValueError, match="does not belong to the adapter that was loaded: [AB] of model.*another start"
    ):
        transformers_trainer([callback()], tmp_path).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))


# --- several processes -----------------------------------------------------------------------------------------------

DENSE = LoraGAConfig(max_batches=4, estimator="dense")


def trained(rank: int, size: int, folder: Path) -> tuple[str, int, list[torch.Tensor]]:
    """Train two steps; returns the kind of the wrapped model, the batches of the estimate, and the factors."""
    started = callback(config=DENSE)
    trainer = transformers_trainer([started], folder / "run", max_steps=2, ddp_backend="gloo")
    trainer.train()
    tensors = [tensor for factor in factors(trainer.model) for tensor in (factor.start, factor.trainable.detach())]
    assert started.estimate is not None
    return type(trainer.model_wrapped).__name__, started.estimate.batches, tensors


def test_processes_estimate_on_their_shares_and_get_the_same_start(tmp_path: Path) -> None:
    (kind, batches, first), (_, _, second) = processes.run(trained, 2, tmp_path)
    assert (kind, batches) == ("DistributedDataParallel", 4)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    alone = transformers_trainer([callback(config=DENSE)], tmp_path / "alone", max_steps=1)
    alone.train()
    for start, factor in zip(first[::2], factors(alone.model), strict=True):
        torch.testing.assert_close(start, factor.start, rtol=0, atol=1e-4)


# --- the learning rate -----------------------------------------------------------------------------------------------


def reactive(callbacks: list[Any], folder: Path, **changes: Any) -> Trainer:
    """A trainer of a model whose loss reacts to a step."""
    return transformers_trainer(callbacks, folder, model=adapted(reactive_llama(), TARGETS), **changes)


def test_auto_trains_no_step_where_no_rate_raises_the_loss(tmp_path: Path) -> None:
    trainer = transformers_trainer([callback(learning_rate="auto")], tmp_path, max_steps=60)
    with pytest.raises(ValueError, match=r"No learning rate up to 0.316 raises.*Set the learning rate yourself"):
        trainer.train()  # so small a model barely reacts to a step
    assert trainer.state.global_step == 0
    assert not any(bool(factor.trainable.any()) for factor in factors(trainer.model))
    given = transformers_trainer([], tmp_path, model=trainer.model, max_steps=2, learning_rate=2e-4)
    given.train()  # with the start that it has
    assert given.state.global_step == 2


def test_the_rate_that_is_found_is_trained_with_and_nothing_else_changes(tmp_path: Path) -> None:
    changes = {"max_steps": 60, "logging_steps": 1, "save_steps": 30, "lr_scheduler_type": "cosine"}
    auto = reactive([callback(learning_rate="auto")], tmp_path / "auto", **changes)
    auto.train()
    found = auto.args.learning_rate
    assert found != 2e-2
    given = reactive([callback()], tmp_path / "given", **changes | {"learning_rate": found})
    given.train()
    ignored = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    one, other = (
        [{key: value for key, value in entry.items() if key not in ignored} for entry in each.state.log_history]
        for each in (auto, given)
    )
    assert one == [{key: pytest.approx(value, rel=1e-6) for key, value in entry.items()} for entry in other]
    shutil.rmtree(tmp_path / "auto" / "checkpoint-60")
    resumed = reactive([callback(learning_rate="auto")], tmp_path / "auto", **changes)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.args.learning_rate == found
    assert resumed.state.log_history[-2]["loss"] == pytest.approx(other[-2]["loss"], rel=1e-6)
    auto.train()  # a second call goes on with the rate of the first
    assert auto.args.learning_rate == found


def test_a_short_run_keeps_its_rate_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = transformers_trainer([callback(learning_rate="auto")], tmp_path, max_steps=2)
    trainer.train()
    assert trainer.args.learning_rate == 2e-2
    assert "2 steps are too few to look for a learning rate (at least 50" in caplog.text


def test_auto_refuses_the_optimizers_and_schedules_that_it_is_not_made_for(tmp_path: Path) -> None:
    trainer = transformers_trainer([callback(learning_rate="auto")], tmp_path, max_steps=60, optim="sgd")
    with pytest.raises(ValueError, match="is for AdamW and its relatives, but the optimizer is SGD"):
        trainer.train()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="cannot change the rate of a ReduceLROnPlateau"):
        PeakRate(trainer, optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)).check()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.0)
    with pytest.raises(ValueError, match=r"the learning_rate of the optimizer is 0.0. Give the trainer.*above 0"):
        PeakRate(trainer, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)).check()


def test_auto_refuses_too_little_data_before_the_estimate_and_its_advice_works(tmp_path: Path) -> None:
    changes = {"max_steps": 50, "gradient_accumulation_steps": 100}
    trainer = reactive([callback(learning_rate="auto")], tmp_path, **changes)
    with pytest.raises(ValueError, match=r"those of at least 4 steps of 100 batches each.*or smaller batches"):
        trainer.train()
    again = transformers_trainer([callback(learning_rate="auto")], tmp_path, max_steps=50, model=trainer.model)
    again.train()
    assert again.args.learning_rate != 2e-2


def test_auto_warns_of_a_schedule_that_does_not_decay(tmp_path: Path) -> None:
    changes = {"max_steps": 50, "lr_scheduler_type": "constant_with_warmup"}
    trainer = reactive([callback(learning_rate="auto")], tmp_path, **changes)
    with pytest.warns(UserWarning, match="lr_scheduler_type is constant_with_warmup. The rate may be too high"):
        trainer.train()


def test_a_rate_is_auto_or_given_to_the_trainer() -> None:
    with pytest.raises(ValueError, match=r'learning_rate=0.001: it must be "auto" or None. Give a number to the'):
        LoraGACallback(learning_rate=1e-3)  # type: ignore[arg-type]


def test_an_evaluation_in_the_middle_does_not_pack_4_bit_layers(tmp_path: Path) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes packs them in evaluation, and packed layers pass no gradient on."""
    case = LAYERS["bitsandbytes nf4"]
    case.check_installed()
    trained = []
    for changes in ({}, {"eval_strategy": "steps", "eval_steps": 2}):
        base = case.make()
        layers = [module for module in base.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
        for layer in layers:
            layer.support_avx512bf16_for_cpu = True
        model, arguments = adapted(base, TARGETS), TrainingArguments(**settings(tmp_path, **changes))
        data: dict[str, Any] = {"train_dataset": tokenised(), "eval_dataset": tokenised()}
        Trainer(model, arguments, **data, callbacks=[LoraGACallback(LoraGAConfig(max_batches=2))]).train()
        assert layers
        assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
        trained.append(factors(model))
    assert all(torch.equal(one.trainable, other.trainable) for one, other in zip(*trained, strict=True))
