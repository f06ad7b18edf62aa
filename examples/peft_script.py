"""PEFT's LoRA-GA flow with one import changed: `from lora_ga.compat import ...` in place of `from peft import ...`.

    python examples/peft_script.py --model MODEL --train_file notes.txt --output_dir out

The rest is a script for PEFT 0.21: a configuration with `init_lora_weights="lora_ga"`, a `train_step` that runs
backward passes on the base model, `preprocess_loraga`, `get_peft_model`, and any trainer. With the changed import the
formula is the paper's, the base model does not change, no weight needs a gradient, and the saved adapter is for the
original base.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from lora_ga.compat import LoraConfig, LoraGAConfig, get_peft_model, preprocess_loraga

Batch = dict[str, Tensor]


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal language model: hub name or local folder")
    parser.add_argument("--train_file", required=True, type=Path, help="a plain text file to train on")
    parser.add_argument("--output_dir", required=True, help="folder for the trained adapter")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens per example")
    parser.add_argument("--estimate_batches", type=int, default=8, help="batches of the estimate, of 4 examples each")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    return parser.parse_args(argv)


def examples_of(tokenizer: Any, text: str, length: int) -> list[Batch]:
    """Cut the text into consecutive pieces of `length` tokens; the rest is dropped."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    pieces = ids[: len(ids) // length * length].reshape(-1, length)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def estimate_batches(examples: Sequence[Batch], count: int, size: int = 4) -> list[Batch]:
    """The first `count` batches of `size` examples."""
    groups = [examples[start : start + size] for start in range(0, len(examples), size)][:count]
    return [{key: torch.stack([example[key] for example in group]) for key in group[0]} for group in groups]


def adapt(model: nn.Module, batches: Sequence[Batch], rank: int) -> Any:
    """Add the adapter, as a script for PEFT does."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=16,
        use_rslora=True,
        target_modules="all-linear",
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16),
    )
    device = next(model.parameters()).device

    def train_step() -> None:
        for batch in batches:
            model(**{key: value.to(device) for key, value in batch.items()}).loss.backward()

    preprocess_loraga(model, config, train_step)
    return get_peft_model(model, config)


def main(argv: Sequence[str] | None = None) -> None:
    """Estimate, train, save."""
    chosen = options(argv)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    examples = examples_of(tokenizer, chosen.train_file.read_text(encoding="utf-8"), chosen.length)
    model = AutoModelForCausalLM.from_pretrained(chosen.model)
    adapted = adapt(model, estimate_batches(examples, chosen.estimate_batches), chosen.rank)
    adapted.print_trainable_parameters()
    settings = TrainingArguments(
        output_dir=chosen.output_dir,
        max_steps=chosen.max_steps,
        per_device_train_batch_size=4,
        learning_rate=chosen.learning_rate,
        save_strategy="no",
        report_to="none",
    )
    Trainer(model=adapted, args=settings, train_dataset=examples).train()
    adapted.save_pretrained(chosen.output_dir)
    print(f"{chosen.output_dir}: adapter for the original {chosen.model}. Load it with PeftModel.from_pretrained.")


if __name__ == "__main__":
    main()
