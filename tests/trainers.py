"""Trainers of Transformers and TRL on small models, made as users make them, with the given callbacks."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast, Trainer, TrainingArguments

from cases import EXPERTS, mixtral, seeded
from lora_ga import LoraGACallback, LoraGAConfig
from lora_ga.layers.factors import Delta
from toys import INPUTS, adapted, llama

TARGETS = ["q_proj", "v_proj", "up_proj"]
CONFIG = LoraGAConfig(max_batches=3)
WORDS = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "</s>", *string.ascii_lowercase])}


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each letter."""
    words = Tokenizer(WordLevel(WORDS, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"unk_token": "[UNK]", "eos_token": "</s>", "pad_token": "[PAD]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=INPUTS, **special)


def text(seed: object, length: int) -> str:
    """Random letters that depend on the seed."""
    return " ".join(random.Random(str(seed)).choices(string.ascii_lowercase, k=length))


def rows(*columns: str, count: int = 24) -> Dataset:
    """A data set of texts with the given columns. The column "label" has booleans."""

    def value(column: str, row: int) -> Any:
        return row % 2 == 0 if column == "label" else text((column, row), 5) + " " * (column == "prompt")

    return Dataset.from_list([{column: value(column, row) for column in columns} for row in range(count)])


def tokenised(count: int = 24) -> Dataset:
    """A data set of token ids that are their own labels."""
    ids = torch.randint(3, len(WORDS), (count, 10), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": list(row)} for row in ids])


def peft_config(**changes: Any) -> LoraConfig:
    """An adapter of rank 4."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": TARGETS}
    return LoraConfig(**(settings | {"task_type": "CAUSAL_LM"} | changes))


def scorer(seed: int = 0) -> nn.Module:
    """A reward model: a Llama with one output."""
    torch.manual_seed(seed)
    config = llama().config
    config.num_labels, config.pad_token_id = 1, 0
    return LlamaForSequenceClassification(config).eval()


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Training arguments for eight steps, with checkpoints after the fourth and the eighth."""
    given = {"output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 8, "save_steps": 4}
    given |= {"logging_steps": 1, "learning_rate": 2e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return given | changes


def transformers_trainer(callbacks: list[Any], folder: Path, *, model: Any = None, **changes: Any) -> Trainer:
    """Transformers' `Trainer`."""
    model = adapted(llama(), TARGETS) if model is None else model
    arguments = TrainingArguments(**settings(folder, **changes))
    return Trainer(model, arguments, train_dataset=tokenised(), callbacks=callbacks)


def trl_classes(name: str) -> tuple[Any, Any]:
    """Return the class of one of TRL's trainers and the class of its arguments."""
    package = pytest.importorskip("trl", reason="install the extra 'trl' to run this test")
    if name not in ("SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO", "Distillation"):  # one of the experimental trainers
        package = pytest.importorskip(f"trl.experimental.{'online_dpo' if name == 'OnlineDPO' else name.lower()}")
    return getattr(package, f"{name}Trainer"), getattr(package, f"{name}Config")


def trl_trainer(
    name: str,
    data: Dataset,
    callbacks: list[Any],
    folder: Path,
    *,
    model: Any = None,
    ready: bool = False,
    **changes: Any,
) -> Trainer:
    """One of TRL's trainers, with a `peft_config` or, if `ready`, a PEFT model."""
    trainer, arguments = trl_classes(name)
    adapter = {} if ready else {"peft_config": peft_config(task_type="SEQ_CLS" if name == "Reward" else "CAUSAL_LM")}
    model = (scorer() if name == "Reward" else llama()) if model is None else model
    return trainer(
        model=adapted(model, TARGETS, task_type="CAUSAL_LM") if ready else model,
        args=arguments(**settings(folder, bf16=False, **changes)),
        train_dataset=data,
        processing_class=tokenizer(),
        callbacks=callbacks,
        **adapter,
    )


def with_experts(callbacks: list[Any], folder: Path, **changes: Any) -> Trainer:
    """Transformers' `Trainer`, on fused experts."""
    model = adapted(seeded(mixtral)(), ["q_proj"], target_parameters=EXPERTS["target_parameters"])
    return transformers_trainer(callbacks, folder, model=model, **changes)


def with_embeddings(callbacks: list[Any], folder: Path, **changes: Any) -> Trainer:
    """Transformers' `Trainer`, on an embedding and linear layers."""
    model = adapted(llama(), ["embed_tokens", "q_proj"])
    return transformers_trainer(callbacks, folder, model=model, **changes)


def sft(callbacks: list[Any], folder: Path, **changes: Any) -> Trainer:
    """TRL's SFTTrainer on prompts and completions."""
    return trl_trainer("SFT", rows("prompt", "completion"), callbacks, folder, **changes)


def preferences(name: str) -> Callable[..., Trainer]:
    """Return a function that makes one of TRL's trainers on a chosen and a rejected answer."""

    def make(callbacks: list[Any], folder: Path, **changes: Any) -> Trainer:
        return trl_trainer(name, rows("prompt", "chosen", "rejected"), callbacks, folder, **changes)

    return make


def kto(callbacks: list[Any], folder: Path, **changes: Any) -> Trainer:
    """TRL's KTOTrainer on answers labelled good or bad."""
    return trl_trainer("KTO", rows("prompt", "completion", "label"), callbacks, folder, **changes)


def ready(make: Callable[..., Trainer]) -> Callable[..., Trainer]:
    """Return a function that makes the same trainer with a PEFT model instead of a `peft_config`."""

    def made(callbacks: list[Any], folder: Path, **changes: Any) -> Trainer:
        return make(callbacks, folder, ready=True, **changes)

    return made


# Name → a function that makes the trainer from callbacks, folder and arguments; and one that makes its base model.
TRAINERS: Mapping[str, tuple[Callable[..., Trainer], Callable[[], nn.Module]]] = {
    "Trainer": (transformers_trainer, llama),
    "Trainer, fused experts": (with_experts, seeded(mixtral)),
    "Trainer, embeddings": (with_embeddings, llama),
    "SFTTrainer": (sft, llama),
    "SFTTrainer, ready model": (ready(sft), llama),
    "DPOTrainer": (preferences("DPO"), llama),
    "DPOTrainer, ref adapter": (ready(preferences("DPO")), llama),
    "KTOTrainer": (kto, llama),
    "ORPOTrainer": (preferences("ORPO"), llama),
    "RewardTrainer": (preferences("Reward"), scorer),
}


def callback(**changes: Any) -> LoraGACallback:
    """A callback that estimates on three batches."""
    return LoraGACallback(**({"config": CONFIG} | changes))


def factors(model: Any) -> list[Delta]:
    """The factors of an aligned model: A and B of the first layer, then of the second, and so on."""
    return [module for module in model.modules() if isinstance(module, Delta)]
