"""The callback in every trainer: the outputs at the start, the loss, checkpoints, resuming, trackers, model cards."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

import lora_ga
from lora_ga.adapter.model_card import CLOSING, OPENING, section_of
from lora_ga.adapter.save import FILE
from toys import FUSED_EXPERTS, adapted, causal, llama, logits, tokens
from trainers import (
    CONFIG,
    TARGETS,
    TRAINERS,
    callback,
    sft,
    transformers_trainer,
)

BATCH = {"input_ids": tokens(4, 8, seed=9) % 29}


class FirstLogits(TrainerCallback):
    """Keeps the logits of the model at the beginning of training."""

    begin: Tensor

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Compute the logits."""
        model.eval()
        self.begin = logits(model, BATCH)
        model.train()


class Run(NamedTuple):
    """A finished training run."""

    make: Callable[..., Trainer]
    base: Callable[[], nn.Module]
    trainer: Trainer
    folder: Path
    begin: Tensor
    order: list[Tensor]


def train(
    make: Callable[..., Trainer], folder: Path, callbacks: list[Any], **resume: Any
) -> tuple[Trainer, list[Tensor]]:
    """Train, and return the trainer and the token ids of every batch, in the order of training."""
    trainer = make(callbacks, folder)
    step = trainer.training_step
    order: list[Tensor] = []

    def training_step(model: Any, inputs: Any, *rest: Any, **named: Any) -> Tensor:
        order.extend(value.clone() for key, value in inputs.items() if key.endswith("input_ids"))
        return step(model, inputs, *rest, **named)

    trainer.training_step = training_step
    trainer.train(**resume)
    return trainer, order


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=FUSED_EXPERTS) if "experts" in name else name for name in TRAINERS],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    make, base = TRAINERS[request.param]
    folder, first = tmp_path_factory.mktemp("run"), FirstLogits()
    trainer, order = train(make, folder, [callback(), first])
    return Run(make, base, trainer, folder, first.begin, order)


def test_training_starts_with_the_outputs_of_the_base_model(run: Run) -> None:
    assert torch.equal(run.begin, logits(run.base(), BATCH))
    aligned = run.trainer.model.peft_config["default"].alignment
    assert all(bool(b.start.any()) and bool(b.trainable.any()) for _, b in aligned.factors.values())


def test_the_loss_falls(run: Run) -> None:
    found = losses(run.trainer)
    assert sum(found[-2:]) < sum(found[:2])


def test_checkpoints_load_with_stock_peft_on_the_original_base(run: Run) -> None:
    for step in (4, 8):
        assert (run.folder / f"checkpoint-{step}" / FILE).is_file()
    stock = PeftModel.from_pretrained(run.base(), run.folder / "checkpoint-8")
    assert stock.peft_config["default"].r == 8
    expected = logits(run.trainer.model.eval(), BATCH)
    torch.testing.assert_close(logits(stock, BATCH), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, run.begin, rtol=0, atol=1e-4)


def test_the_order_of_the_data_and_the_first_loss_are_the_same_without_the_callback(run: Run, tmp_path: Path) -> None:
    trainer, plain = train(partial(run.make, save_strategy="no"), tmp_path, [])
    assert losses(trainer)[0] == losses(run.trainer)[0]
    if type(trainer).__name__ == "DPOTrainer":
        assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-7)
    assert len(plain) == len(run.order) > 0
    assert all(torch.equal(one, other) for one, other in zip(plain, run.order, strict=True))


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(run: Run, tmp_path: Path) -> None:
    """The resumed run reads a checkpoint from another folder than it writes to."""
    again, order = train(run.make, tmp_path, [callback()], resume_from_checkpoint=str(run.folder / "checkpoint-4"))
    assert losses(again)[4:] == losses(run.trainer)[4:]
    assert all(torch.equal(one, other) for one, other in zip(order, run.order[len(run.order) // 2 :], strict=True))
    for file in ("adapter_model.safetensors", FILE):
        one, other = load_file(run.folder / "checkpoint-8" / file), load_file(tmp_path / "checkpoint-8" / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), file


# --- trackers and model cards ----------------------------------------------------------------------------------------


def test_the_numbers_reach_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="install tensorboard to run this test")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lora_ga_callback = callback()
    trainer = transformers_trainer([lora_ga_callback], tmp_path, report_to=["tensorboard"])
    trainer.train()
    assert lora_ga_callback.estimate is not None
    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent)).Reload()
    for name in lora_ga_callback.estimate:
        (norm,) = events.Scalars(f"train/lora_ga/gradient_norm/{name}")
        assert norm.step == 0
        assert norm.value == pytest.approx(lora_ga_callback.estimate[name].norm)
        (limit,) = events.Scalars(f"train/lora_ga/alignment_limit/{name}")
        assert limit.value == pytest.approx(lora_ga_callback.estimate[name].limit(4))
    assert not any("lora_ga" in key for entry in trainer.state.log_history for key in entry)


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_the_numbers_reach_other_trackers(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip(tracker, reason=f"install {tracker} to run this test")
    for variable, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", tmp_path), ("TRACKIO_DIR", tmp_path)):
        monkeypatch.setenv(variable, str(value))
    sent: list[dict[str, Any]] = []
    home = package.Run if tracker == "wandb" else package
    log = home.log

    def log_and_keep(*given: Any, **named: Any) -> Any:
        sent.append(given[-1])
        return log(*given, **named)

    monkeypatch.setattr(home, "log", log_and_keep)
    lora_ga_callback = callback()
    transformers_trainer([lora_ga_callback], tmp_path, report_to=[tracker], max_steps=1).train()
    assert lora_ga_callback.estimate is not None
    values = next(values for values in sent if any("lora_ga" in key for key in values))
    assert sum("gradient_norm" in key for key in values) == len(lora_ga_callback.estimate)


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_model_cards_state_how_the_adapter_was_started(kind: str, tmp_path: Path) -> None:
    make = {"Trainer": transformers_trainer, "SFTTrainer": sft}[kind]
    trainer = make([callback()], tmp_path)
    trainer.train()
    for _ in range(2):
        trainer.create_model_card()
        card = (tmp_path / "README.md").read_text()
        assert card.count(OPENING) == 1
        assert "| `model.layers.1.mlp.up_proj` | 4 | " in card
    assert "over 3 batches" in (tmp_path / "checkpoint-8" / "README.md").read_text()
    again = make([callback()], tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert (tmp_path / "checkpoint-8" / "README.md").read_text().count("over 3 batches") == 1
    again.create_model_card()
    assert "over 3 batches" in (tmp_path / "README.md").read_text()


def test_pefts_model_card_describes_a_saved_start_once(tmp_path: Path) -> None:
    model = adapted(llama(), TARGETS)
    lora_ga.initialize(model, causal(), CONFIG)
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    section = section_of(card)
    assert section.startswith(OPENING)
    assert section.endswith(CLOSING)
    assert card.startswith("---")
    assert card.count("## LoRA-GA start") == 1
    assert card.index("## LoRA-GA start") < card.index("[More Information Needed]")  # before PEFT's empty form
