"""The code of docs/integrations.md runs and adds as many lines as the text states.

The loop of examples/accelerate_loop.py trains and resumes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import accelerate_loop
import lora_ga
from lora_ga.adapter.save import FILE
from toys import causal, llama, logits, tokens
from trainers import factors, peft_config, rows, settings, tokenised, tokenizer, trl_classes

PAGE = Path(__file__).parent.parent / "docs" / "integrations.md"
SECTIONS = dict(re.findall(r"(?m)^## (.*)\n((?:(?!^## )[^\n]*\n?)*)", PAGE.read_text()))
NUMBERS = {"One": 1, "Two": 2, "Three": 3}


def block(title: str) -> str:
    """Return the code block of a section."""
    (code,) = re.findall(r"```(?:python|yaml|bash)\n(.*?)```", SECTIONS[title], flags=re.DOTALL)
    return code


@pytest.mark.parametrize("title", SECTIONS)
def test_a_framework_takes_at_most_three_lines_and_the_page_states_how_many(title: str) -> None:
    added = [line for line in block(title).splitlines() if line.endswith("# LoRA-GA")]
    assert len(added) <= 3
    stated = re.match(r"\s*(\w+) lines?\b", SECTIONS[title])
    assert stated is not None
    assert NUMBERS[stated[1]] == len(added)


def names(folder: Path, trainer: str) -> dict[str, Any]:
    """Return the names that the page's code blocks use and do not define."""
    given = {"base": llama(), "lora": peft_config(), "tokenizer": tokenizer(), "get_peft_model": get_peft_model}
    if trainer == "Trainer":
        arguments = TrainingArguments(**settings(folder))
        return given | {"Trainer": Trainer, "arguments": arguments, "dataset": tokenised()}
    kind, options = trl_classes(trainer)
    data = rows("prompt", "completion") if trainer == "SFT" else rows("prompt", "chosen", "rejected")
    return given | {f"{trainer}Trainer": kind, "arguments": options(**settings(folder, bf16=False)), "dataset": data}


@pytest.mark.parametrize(
    ("title", "trainer"),
    [
        ("Transformers' Trainer", "Trainer"),
        ("TRL: supervised fine-tuning", "SFT"),
        ("TRL: preferences and rewards", "DPO"),
    ],
)
def test_the_documented_trainers_initialize_and_train_an_adapter(title: str, trainer: str, tmp_path: Path) -> None:
    given = names(tmp_path, trainer)
    exec(block(title), given)
    assert all(bool(factor.start.any()) for factor in factors(given["trainer"].model))
    assert (tmp_path / "checkpoint-8" / FILE).is_file()


def test_the_documented_accelerate_loop_initializes_an_adapter() -> None:
    rows = Dataset.from_dict({"input_ids": tokens(16), "labels": tokens(16)}).with_format("torch")
    loader: DataLoader[Any] = DataLoader(rows, batch_size=4)
    given: dict[str, Any] = {
        "base": llama(),
        "lora": peft_config(),
        "dataloader": loader,
        "get_peft_model": get_peft_model,
    }
    given |= {"accelerator": Accelerator(), "torch": torch}
    exec(block("Accelerate"), given)
    assert all(bool(factor.start.any()) for factor in factors(given["model"]))


# --- the loop of examples/accelerate_loop.py -------------------------------------------------------------------------


class RecordingCollator(list[torch.Tensor]):
    """A collator that keeps the token ids of every batch."""

    def __call__(self, examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = torch.stack([example["input_ids"] for example in examples])
        self.append(ids)
        return {"input_ids": ids, "labels": ids}


def loader(seen: RecordingCollator) -> Any:
    torch.manual_seed(3)
    data = Dataset.from_dict({"input_ids": tokens(48)}).with_format("torch")
    return DataLoader(data, batch_size=4, shuffle=True, collate_fn=seen)


def test_the_loop_starts_at_the_loss_of_the_base_model_and_lowers_it(tmp_path: Path) -> None:
    seen = RecordingCollator()
    losses = accelerate_loop.finetune(llama(), loader(seen), tmp_path)
    assert len(losses) == 12
    first = seen[-12]
    assert losses[0] == llama()(input_ids=first, labels=first).loss.item()
    assert sum(losses[-3:]) < sum(losses[:3])


def test_the_loop_reads_its_batches_in_the_same_order_without_lora_ga(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {name: RecordingCollator() for name in ("with", "without")}
    accelerate_loop.finetune(llama(), loader(seen["with"]), tmp_path / "with")
    monkeypatch.setattr(lora_ga, "initialize", lambda *_: None, raising=False)
    accelerate_loop.finetune(llama(), loader(seen["without"]), tmp_path / "without")
    assert len(seen["without"]) == 12
    assert len(seen["with"]) == 24
    assert all(torch.equal(one, other) for one, other in zip(seen["with"][12:], seen["without"], strict=True))


def test_the_loop_resumes_bit_for_bit_and_stock_peft_loads_its_adapter(tmp_path: Path) -> None:
    whole = accelerate_loop.finetune(llama(), loader(RecordingCollator()), tmp_path / "whole", epochs=2)
    parts = accelerate_loop.finetune(llama(), loader(RecordingCollator()), tmp_path / "parts")
    parts += accelerate_loop.finetune(llama(), loader(RecordingCollator()), tmp_path / "parts")
    assert parts == whole
    for file in ("adapter_model.safetensors", FILE):
        one, other = (load_file(tmp_path / name / "adapter" / file) for name in ("whole", "parts"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    batch = causal(1)[0]
    stock = PeftModel.from_pretrained(llama(), tmp_path / "whole" / "adapter")
    trained = lora_ga.load(llama(), tmp_path / "whole" / "adapter", is_trainable=True).eval()
    torch.testing.assert_close(logits(stock, batch), logits(trained, batch), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(stock, batch), logits(llama(), batch), rtol=0, atol=1e-3)
