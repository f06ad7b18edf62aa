"""The three tasks: which model class, which columns, which encoding, which batches and which trainer each needs."""

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
from lora_ga.cli.data import Encoding, Labels, RowEncoder, check_columns, encode_rows, load_file, load_hub, read_labels
from lora_ga.cli.models import length_limit, load_base, load_tokenizer
from lora_ga.cli.options import DataOptions, ModelOptions
from lora_ga.cli.terminal import warn


@dataclass(frozen=True)
class TaskClasses:
    """What one task needs.

    Attributes:
        model_class: Transformers' class with `from_pretrained`.
        peft_type: PEFT's name of the task; it decides what of a new head is trained and saved.
        trainer: Transformers' trainer class; its arguments class is `<trainer>` with `ingArguments` for `er`.
        collator: Transformers' class that makes a padded batch of examples.
    """

    model_class: str
    peft_type: str
    trainer: str
    collator: str


TASK_CLASSES = {
    "seq-cls": TaskClasses("AutoModelForSequenceClassification", "SEQ_CLS", "Trainer", "DataCollatorWithPadding"),
    # This collator pads labels too, and decoder-only models take what it makes.
    "causal-lm": TaskClasses("AutoModelForCausalLM", "CAUSAL_LM", "Trainer", "DataCollatorForSeq2Seq"),
    "seq2seq": TaskClasses("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "Seq2SeqTrainer", "DataCollatorForSeq2Seq"),
}


@dataclass(frozen=True)
class PreparedData:
    """The data of a job, ready to train on.

    Attributes:
        tokenizer: Of the model, with a padding token.
        labels: The classes, for seq-cls only.
        train: Training examples.
        evaluation: Evaluation examples, where asked for.
        source: Where the training examples come from, for records.
    """

    tokenizer: Any
    labels: Labels | None
    train: Dataset
    evaluation: Dataset | None
    source: str


def columns_of(task: str, options: DataOptions) -> dict[str, str]:
    """Chooses the columns that the task reads.

    Returns:
        Option name → column.

    Raises:
        ValueError: columns are given that the task does not read, or not given although it cannot do without.
    """
    names = ["text_column", "text_pair_column", "label_column"]
    if task != "seq-cls":
        if options.text_pair_column is not None:
            raise ValueError(f"--text_pair_column belongs to --task seq-cls, but the task is {task}. Leave it out.")
        names = ["text_column"] if options.prompt_column is None else ["prompt_column", "target_column"]
    elif options.prompt_column is not None:
        raise ValueError("--prompt_column and --target_column do not belong to --task seq-cls. Leave them out.")
    if options.messages_column is not None and task != "causal-lm":
        raise ValueError(f"--messages_column belongs to --task causal-lm, but the task is {task}. Leave it out.")
    if conversations.uses_trl(task, options):
        conversations.check_trl()
        names = ["messages_column", "prompt_column", "target_column"]
    elif options.assistant_only_loss:
        raise ValueError(
            "--assistant_only_loss belongs to conversations in causal-lm (--messages_column). Leave it out."
        )
    if task == "seq2seq" and options.prompt_column is None:
        raise ValueError("--task seq2seq needs --prompt_column and --target_column, the source and the target text.")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def encoding(task: str) -> Encoding:
    """How the task makes an example of a row; not for what TRL handles."""
    return {"seq-cls": RowEncoder.classes, "seq2seq": RowEncoder.pairs, "causal-lm": RowEncoder.plain_text}[task]


def prepare_data(
    model: ModelOptions,
    data: DataOptions,
    *,
    eval_file: str | None = None,
    eval_split: str | None = None,
) -> PreparedData:
    """Loads, checks and tokenises training and evaluation data.

    Args:
        model: Gives the tokenizer, the task and the most tokens that can be read.
        data: The training data and its columns.
        eval_file: Local evaluation file.
        eval_split: Evaluation split of the same hub data set.

    Returns:
        The examples.

    Raises:
        ValueError: something about the request does not fit; nothing has been written then.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    wanted = columns_of(model.task, data)
    sources = {"train": _load_rows(data, data.train_file, data.train_split)}
    if eval_file is not None or eval_split is not None:
        sources["evaluation"] = _load_rows(data, eval_file, eval_split)
    conversational = conversations.uses_trl(model.task, data)
    for source, rows in sources.values():
        (conversations.check_columns if conversational else check_columns)(rows, wanted, source)
    source, rows = sources["train"]
    labels = read_labels(rows, data.label_column, source) if model.task == "seq-cls" else None
    tokenizer = load_tokenizer(model.model)
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
        weights: A folder to take the weights from in place of the model's own.

    Returns:
        The model on the CPU, the data without what the tokenizer gives and the model does not take (such as
        token_type_ids), and what makes a batch of examples.

    Raises:
        ValueError: the model cannot be loaded.
    """
    task = TASK_CLASSES[model.task]
    origin = model if weights is None else replace(model, model=str(weights))
    base = load_base(origin, task.model_class, data.tokenizer, data.labels, trains_all=trains_all)
    taken = inspect.signature(base.forward).parameters

    def readable(examples: Dataset | None) -> Dataset | None:
        return None if examples is None else examples.select_columns([c for c in examples.column_names if c in taken])

    settings = {"model": base} if model.task == "seq2seq" else {}  # it makes the decoder's inputs of the labels
    collate = getattr(transformers, task.collator)(data.tokenizer, **settings)
    return base, replace(data, train=readable(data.train), evaluation=readable(data.evaluation)), collate


def trainer_classes(task: str, data: DataOptions) -> tuple[Any, Any, dict[str, Any]]:
    """The trainer's class, that of its arguments, and what these say beside the options."""
    if conversations.uses_trl(task, data):
        import trl

        # The data is tokenised and cut, and checkpointing switched on where it is wanted.
        own = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "gradient_checkpointing": False}
        return trl.SFTTrainer, trl.SFTConfig, own
    name = TASK_CLASSES[task].trainer
    return getattr(transformers, name), getattr(transformers, name.replace("Trainer", "TrainingArguments")), {}


def _load_rows(data: DataOptions, file: str | None, split: str | None) -> tuple[str, Dataset]:
    """Where rows come from, in words, and the rows."""
    if file is not None:
        return file, load_file(Path(file))
    assert data.dataset is not None, "checked by DataOptions"
    assert split is not None, "checked by Job"
    name = "/".join(part for part in (data.dataset, data.dataset_config) if part)
    return f"{name} ({split})", load_hub(data.dataset, data.dataset_config, split)


def predicted_class(logits: Any, labels: Any) -> torch.Tensor:
    """Keeps the class of each row and drops what else encoder-decoder models return; (rows,)."""
    first = logits[0] if isinstance(logits, tuple) else logits
    return first.argmax(-1)


def accuracy(prediction: Any) -> Mapping[str, float]:
    """Share of rows whose class is right."""
    return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}
