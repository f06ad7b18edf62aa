"""LoraGACallback: what it estimates, that it leaves the trainer as it was, what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
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
from lora_ga import LoraGACallback, LoraGAConfig
from lora_ga.adapter.save import FILE
from lora_ga.adapter.write import give_structure
from lora_ga.integrations.trainer import _check_trainer
from toys import adapted, causal, gpt2, llama, logits
from trainers import (
    TARGETS,
    callback,
    factors,
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


# --- what it does ----------------------------------------------------------------------------------------------------


def test_the_start_is_that_of_initialize_on_the_same_batches(tmp_path: Path) -> None:
    model = adapted(llama(), TARGETS)
    estimate = lora_ga.initialize(model, causal())
    late = callback(batches=causal())
    trainer = transformers_trainer([late], tmp_path, learning_rate=0.0, max_steps=1)
    trainer.train()
    assert_same_start(trainer.model, model)
    assert late.estimate is not None
    assert late.estimate.batches == estimate.batches == 3
    assert late.estimate.weight == estimate.weight


def test_a_loss_function_replaces_the_trainers(tmp_path: Path) -> None:
    def halved(model: Any, batch: Any) -> tuple[torch.Tensor, float]:
        return model(**batch).loss, 1.0

    late = callback(batches=causal(), loss_fn=halved)
    transformers_trainer([late], tmp_path, max_steps=1).train()
    assert late.estimate is not None
    assert late.estimate.weight == 3.0


def test_the_optimizer_holds_the_parameters_that_are_filled(tmp_path: Path) -> None:
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


def test_a_second_call_of_train_goes_on(tmp_path: Path) -> None:
    late = callback()
    trainer = transformers_trainer([late], tmp_path)
    trainer.train()
    first, starts = late.estimate, [factor.start.clone() for factor in factors(trainer.model)]
    moved = [factor.trainable.clone() for factor in factors(trainer.model)]
    trainer.train()
    assert late.estimate is first
    assert all(torch.equal(factor.start, start) for factor, start in zip(factors(trainer.model), starts, strict=True))
    assert not any(torch.equal(f.trainable, held) for f, held in zip(factors(trainer.model), moved, strict=True))


def test_a_callback_added_after_the_trainer_was_made_gives_the_same_start(tmp_path: Path) -> None:
    early, late = transformers_trainer([callback()], tmp_path / "a"), transformers_trainer([], tmp_path / "b")
    late.add_callback(callback())
    early.train()
    late.train()
    assert_same_start(early.model, late.model)
    one, other = (load_file(tmp_path / name / "checkpoint-8" / "adapter_model.safetensors") for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_model_made_anew_by_model_init_is_started(tmp_path: Path) -> None:
    late = callback()
    trainer = Trainer(
        model_init=lambda: adapted(llama(), TARGETS),
        args=TrainingArguments(**settings(tmp_path)),
        train_dataset=tokenised(),
        callbacks=[late],
    )
    trainer.train()
    first = late.estimate
    trainer.train()
    assert late.estimate is not first
    assert all(bool(factor.start.any()) for factor in factors(trainer.model))


def test_layers_without_a_gradient_stay_plain_lora_in_the_structure(tmp_path: Path) -> None:
    model = adapted(llama(), TARGETS)
    drawn = model.base_model.model.model.layers[1].mlp.up_proj.lora_A["default"].weight.clone()

    def without_the_last_layer(model: Any, batch: Any) -> torch.Tensor:
        return model(**batch, output_hidden_states=True).hidden_states[1].square().mean()

    late = LoraGACallback(LoraGAConfig(on_missing="lora"), batches=causal(), loss_fn=without_the_last_layer)
    trainer = Trainer(
        model, TrainingArguments(**settings(tmp_path, learning_rate=0.0)), train_dataset=tokenised(), callbacks=[late]
    )
    with pytest.warns(UserWarning, match=r"3 of 6 layers cannot be aligned(.|\n)*They start as plain LoRA"):
        trainer.train()
    layers = model.base_model.model.model.layers
    assert torch.equal(layers[1].mlp.up_proj.lora_A["default"].start, drawn)
    assert not bool(layers[1].mlp.up_proj.lora_B["default"].start.any())
    assert bool(layers[0].mlp.up_proj.lora_B["default"].start.any())
    again = lora_ga.load(llama(), tmp_path / "checkpoint-8", is_trainable=True)
    assert_same_start(again, model)


class LogCounts(TrainerCallback):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Copy."""
        self.seen.append(dict(logs))


def test_evaluations_do_not_average_the_estimates_losses_in(tmp_path: Path) -> None:
    logs = []
    for name, callbacks in (("with", [callback()]), ("without", [])):
        counts = LogCounts()
        data = rows("prompt", "completion", count=8)
        trainer = sft([*callbacks, counts], tmp_path / name, eval_on_start=True, eval_strategy="no", max_steps=1)
        trainer.eval_dataset = trainer._prepare_dataset(data, tokenizer(), trainer.args, False, None, "eval")
        trainer.train()
        logs.append(
            {key: value for key, value in counts.seen[0].items() if "runtime" not in key and "per_s" not in key}
        )
    assert logs[0] == logs[1]
    assert "eval_entropy" in logs[0]


def test_the_best_checkpoint_is_loaded_at_the_end_and_others_are_removed(tmp_path: Path) -> None:
    model = adapted(llama(), TARGETS)
    arguments = settings(tmp_path, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True, save_total_limit=1)
    arguments |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # the worst: not the last
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


def test_streams_of_the_datasets_library_begin_anew(tmp_path: Path) -> None:
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
    """Cannot begin anew."""

    def __iter__(self) -> Any:
        yield from ()


def made(tmp_path: Path, model: Any, data: Any = None, **changes: Any) -> Trainer:
    return Trainer(
        model,
        TrainingArguments(**settings(tmp_path, **changes)),
        train_dataset=tokenised() if data is None else data,
        callbacks=[callback()],
    )


def test_iterables_that_may_not_begin_anew(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a Once, an iterable that may not begin anew.*LoraGACallback\(batches="):
        made(tmp_path, adapted(llama(), TARGETS), Once())


def test_empty_training_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The training data of the Trainer is empty"):
        made(tmp_path, adapted(llama(), TARGETS), Dataset.from_list([]))
    stream = datasets.IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(ValueError, match="The data holds no batch"):
        made(tmp_path, adapted(llama(), TARGETS), stream).train()


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_a_model_without_lora_layers(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"The model is a LlamaForCausalLM, not a PeftModel.*get_peft_model"):
        made(tmp_path, llama())


def test_an_adapter_that_is_aligned_already(tmp_path: Path) -> None:
    model = adapted(llama(), TARGETS)
    lora_ga.initialize(model, causal())
    with pytest.raises(ValueError, match="'default' is already aligned: it comes from lora_ga.initialize or a che"):
        made(tmp_path, model)


def test_a_trainer_that_has_trained_without_it(tmp_path: Path) -> None:
    trainer = transformers_trainer([], tmp_path)
    trainer.train()
    trainer.add_callback(callback())
    with pytest.raises(ValueError, match="'default' is not fresh"):
        trainer.train()


def test_the_base_offset() -> None:
    with pytest.raises(ValueError, match='LoraGAConfig.offset is "base". Use offset="adapter", or call lora_ga'):
        LoraGACallback(LoraGAConfig(offset="base"))


def test_a_caller_that_is_no_trainer() -> None:
    with pytest.raises(RuntimeError, match="called by something else than a transformers.Trainer that has it among"):
        callback().on_init_end(None, None, None, model=adapted(llama(), TARGETS))


def test_flattened_parameters(tmp_path: Path) -> None:
    trainer = transformers_trainer([], tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="does not fill adapters in FSDP 1, .*Set fsdp_version: 2 in the Accelerate"):
        _check_trainer(trainer, uses_its_data=True)


def test_a_checkpoint_of_plain_lora(tmp_path: Path) -> None:
    transformers_trainer([callback()], tmp_path).train()
    (tmp_path / "checkpoint-4" / FILE).unlink()
    with pytest.raises(
        ValueError, match=rf"checkpoint-4: there is no {FILE}, so this is not a checkpoint of a LoRA-GA"
    ):
        transformers_trainer([callback()], tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_checkpoint_with_the_sidecar_of_another_run(tmp_path: Path) -> None:
    for name, batches in (("a", causal()), ("b", causal(5)[3:])):
        transformers_trainer([callback(batches=batches)], tmp_path / name).train()
    (tmp_path / "b" / "checkpoint-4" / FILE).replace(tmp_path / "a" / "checkpoint-4" / FILE)
    with pytest.raises(
        ValueError, match="does not belong to the adapter that was loaded: [AB] of model.*another start"
    ):
        transformers_trainer([callback()], tmp_path).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))


# --- several processes -----------------------------------------------------------------------------------------------

WORKER = """
import sys
from pathlib import Path
import torch
from trainers import callback, factors, transformers_trainer
from lora_ga import LoraGAConfig
started = callback(config=LoraGAConfig(max_batches=4, estimator="dense"))
trainer = transformers_trainer([started], Path(sys.argv[1]), max_steps=2, ddp_backend="gloo")
trainer.train()
assert started.estimate.batches == 4
tensors = [tensor for factor in factors(trainer.model) for tensor in (factor.start, factor.trainable.data)]
torch.save([type(trainer.model_wrapped).__name__, tensors], Path(sys.argv[1]) / f"{trainer.args.process_index}.pt")
"""


@pytest.mark.slow
def test_processes_estimate_on_shares_and_start_as_one(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(worker),
        str(tmp_path),
    ]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(run, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": paths}, timeout=300)
    (kind, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert kind == "DistributedDataParallel"
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    config = LoraGAConfig(max_batches=4, estimator="dense")
    alone = transformers_trainer([callback(config=config)], tmp_path / "alone", max_steps=1)
    alone.train()
    for start, factor in zip(first[::2], factors(alone.model), strict=True):
        torch.testing.assert_close(start, factor.start, rtol=0, atol=1e-4)
