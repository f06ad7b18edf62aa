"""Experiment trackers and model cards get the numbers of the estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lora_ga
from lora_ga.adapter.model_card import OPENING
from toys import adapted, causal, llama
from trainers import (
    CONFIG,
    TARGETS,
    callback,
    sft,
    transformers_trainer,
)


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
    assert card.startswith("---")
    assert card.count("## LoRA-GA start") == 1
