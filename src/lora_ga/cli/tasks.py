"""The three tasks: the model class, the columns, the encoding, the collator and the trainer of each."""

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset

from lora_ga.cli import conversations
from lora_ga.cli.columns import check_names, columns_of, uses_trl, with_found_columns
from lora_ga.cli.data import (
    Encoding,
    Labels,
    RowEncoder,
    check_columns,
    encode_rows,
    load_file,
    load_hub,
    read_labels,
    usable_rows,
)
from lora_ga.cli.models import check_task, length_limit, load_base, load_tokenizer
from lora_ga.cli.options import DataOptions, ModelOptions
from lora_ga.cli.terminal import note, warn


@dataclass(frozen=True)
class TaskClasses:
    """The classes that one task uses.

    Attributes:
        model_class: Transformers' class with `from_pretrained`.
        peft_type: PEFT's name of the task. PEFT trains and saves a new head according to it.
        trainer: Transformers' trainer class. The class of its arguments ends in `TrainingArguments` instead.
        collator: Transformers' class that makes a padded batch of examples.
    """

    model_class: str
    peft_type: str
    trainer: str
    collator: str


TASK_CLASSES = {
    "seq-cls": TaskClasses("AutoModelForSequenceClassification", "SEQ_CLS", "Trainer", "DataCollatorWithPadding"),
    # This collator also pads labels. Decoder-only models accept its batches.
    "causal-lm": TaskClasses("AutoModelForCausalLM", "CAUSAL_LM", "Trainer", "DataCollatorForSeq2Seq"),
    "seq2seq": TaskClasses("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "Seq2SeqTrainer", "DataCollatorForSeq2Seq"),
}


@dataclass(frozen=True)
class PreparedData:
    """The data of a job, ready to train on.

    Attributes:
        tokenizer: The model's tokenizer, with a padding token.
        labels: The classes, for seq-cls only.
        train: Training examples.
        evaluation: Evaluation examples, or None.
        source: Where the training examples come from, for records.
    """

    tokenizer: Any
    labels: Labels | None
    train: Dataset
    evaluation: Dataset | None
    source: str


def encoding(task: str) -> Encoding:
    """The function that makes examples of rows, for the data that TRL does not handle."""
    return {"seq-cls": RowEncoder.classes, "seq2seq": RowEncoder.pairs, "causal-lm": RowEncoder.plain_text}[task]


def named_columns(model: ModelOptions, data: DataOptions) -> DataOptions:
    """The data options, with the columns of conversations or prompts that the training data shows by their names."""
    columns = _load_rows(data, data.train_file, data.train_split)[1].column_names
    found = with_found_columns(model.task, data, columns)
    if found != data:
        names = "messages_column" if found.messages_column else "prompt_column prompt and --target_column completion"
        value = " messages" if found.messages_column else ""
        lacks = f"the data has no column {data.text_column!r}: " if model.task == "causal-lm" else ""
        note(f"{lacks}taking --{names}{value}")
    return found


def prepare_data(
    model: ModelOptions,
    data: DataOptions,
    *,
    eval_file: str | None = None,
    eval_split: str | None = None,
) -> PreparedData:
    """Loads, checks and tokenises training and evaluation data.

    Args:
        model: The model options: the tokenizer, the task and the limit of tokens depend on them.
        data: The training data and its columns.
        eval_file: Local evaluation file.
        eval_split: Evaluation split of the same hub data set.

    Returns:
        The examples.

    Raises:
        ValueError: The options do not fit the data or the model.
    """
    wanted = columns_of(model.task, data)
    check_task(model.model, model.task)
    sources = {"train": _load_rows(data, data.train_file, data.train_split)}
    if eval_file is not None or eval_split is not None:
        sources["evaluation"] = _load_rows(data, eval_file, eval_split)
    conversational = uses_trl(model.task, data)
    for part, (source, rows) in sources.items():
        check_names(wanted, rows.column_names, source)
        kept = usable_rows(rows, wanted, source, data.on_bad_row)
        (conversations.check_columns if conversational else check_columns)(kept, wanted, source)
        sources[part] = source, kept
    source, rows = sources["train"]
    labels = read_labels(rows, data.label_column, source) if model.task == "seq-cls" else None
    tokenizer = load_tokenizer(model.model)
    if data.chat_template is not None:
        tokenizer.chat_template = Path(data.chat_template).read_text(encoding="utf-8")
    encoder = RowEncoder(tokenizer, data, length_limit(model.model, tokenizer, data.max_length), labels)
    examples = {}
    for part, (name, part_rows) in sources.items():
        if conversational:
            examples[part] = conversations.encode(part_rows, wanted, tokenizer, data, encoder.max_length, name)
        else:
            examples[part] = encode_rows(part_rows, encoding(model.task), encoder, name)
        lost = len(part_rows) - len(examples[part])
        if lost > 0:
            warn(
                f"{name}: {lost} of {len(part_rows)} rows have no token to learn within {encoder.max_length} tokens "
                "and are left out. Raise --max_length to keep them."
            )
    return PreparedData(tokenizer, labels, examples["train"], examples.get("evaluation"), source)


def prepare_model(
    model: ModelOptions, data: PreparedData, *, trains_all: bool = False, weights: Path | None = None
) -> tuple[Any, PreparedData, Any]:
    """Loads the base model and fits the data to it.

    Args:
        model: The options.
        data: The data.
        trains_all: Every weight will be trained.
        weights: A folder with weights to load instead of the model's.

    Returns:
        The model, as `load_base` gives it; the data without columns that the model does not read, such as
        token_type_ids; and the function that makes a batch of examples.

    Raises:
        ValueError: The model cannot be loaded.
    """
    task = TASK_CLASSES[model.task]
    origin = model if weights is None else replace(model, model=str(weights))
    base = load_base(origin, task.model_class, data.tokenizer, data.labels, trains_all=trains_all)
    taken = inspect.signature(base.forward).parameters

    def readable(examples: Dataset | None) -> Dataset | None:
        return None if examples is None else examples.select_columns([c for c in examples.column_names if c in taken])

    settings = {"model": base} if model.task == "seq2seq" else {}  # makes the decoder inputs of the labels
    collate = getattr(transformers, task.collator)(data.tokenizer, **settings)
    return base, replace(data, train=readable(data.train), evaluation=readable(data.evaluation)), collate


def trainer_classes(task: str, data: DataOptions) -> tuple[Any, Any, dict[str, Any]]:
    """The trainer's class, the class of its arguments, and arguments that no option sets."""
    if uses_trl(task, data):
        import trl

        # The data is already tokenised and cut, and gradient checkpointing already enabled if it is wanted.
        fields = {field.name for field in dataclasses.fields(trl.SFTConfig)}
        # Transformers 5.24 renamed the setting.
        checkpointing = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in fields)
        extra = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, checkpointing: False}
        return trl.SFTTrainer, trl.SFTConfig, extra
    name = TASK_CLASSES[task].trainer
    return getattr(transformers, name), getattr(transformers, name.replace("Trainer", "TrainingArguments")), {}


def _load_rows(data: DataOptions, file: str | None, split: str | None) -> tuple[str, Dataset]:
    """Loads rows, and describes where they come from. Without a terminal the library `datasets` shows no bars."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if file is not None:
        return file, load_file(Path(file))
    assert data.dataset is not None, "checked by DataOptions"
    assert split is not None, "checked by Job"
    name = "/".join(part for part in (data.dataset, data.dataset_config) if part)
    return f"{name} ({split})", load_hub(data.dataset, data.dataset_config, split)


def predicted_class(logits: Any, labels: Any) -> torch.Tensor:
    """The predicted class of each row, (rows,). Encoder-decoder models return a tuple that begins with the logits."""
    first = logits[0] if isinstance(logits, tuple) else logits
    return first.argmax(-1)


def accuracy(prediction: Any) -> Mapping[str, float]:
    """The fraction of rows whose class is right."""
    return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}
