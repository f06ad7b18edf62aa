"""Classification as text: an encoder-decoder reads a text and writes the word of the label, as the paper trains T5.

A row is correct if greedy decoding would write exactly this word. That is so if the likeliest token at every position
is the word's, given the word's earlier tokens. One forward pass shows this, and no decoding is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from lora_ga.experiments.methods.base import Batch
from lora_ga.experiments.suites.cells import Cell
from lora_ga.experiments.suites.sources import Sources, select_columns
from lora_ga.experiments.suites.spec import Task
from lora_ga.experiments.tasks.classes import EVAL_BATCH_SIZE, check_labelled, row_batches
from lora_ga.experiments.tasks.prepared import PreparedTask, check_model, load_model
from lora_ga.gradients.loss import IGNORED

Row = Mapping[str, Any]


def check(task: Task, sources: Sources) -> list[str]:
    """Checks the model's configuration, and the columns and the label of every row.

    Args:
        task: The task.
        sources: Resolves the references to models and files.

    Returns:
        One text for each thing that was found.

    Raises:
        ValueError: Something is missing, or a label has no word.
    """
    found = [check_model(task, sources)]
    meanings = set(task.columns) - {"label"}
    if "label" not in task.columns or not task.words:
        raise ValueError("columns must give label, and words must list what is written for each label.")
    check_template("input", task.input, meanings)
    return [*found, *check_labelled(task, sources, len(task.words), f"words has {len(task.words)} entries")]


def check_template(name: str, template: str, meanings: Iterable[str]) -> None:
    """Checks the placeholders of a template.

    Raises:
        ValueError: A placeholder is not one of the columns, or there is no placeholder.
    """
    known = sorted(meanings)
    try:
        filled = template.format(**dict.fromkeys(known, ""))
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{name} names {error} in braces; columns gives {', '.join(known)}.") from error
    if filled == template:
        raise ValueError(f"{name} is {template!r}; it must hold one of {', '.join(known)} in braces.")


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the word's tokens."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=IGNORED)


def measure(outputs: Iterable[tuple[Tensor, Batch]]) -> dict[str, float]:
    """The loss over all tokens, and the share of rows whose word greedy decoding would write."""
    total, terms, right, rows = 0.0, 0, 0, 0
    for logits, batch in outputs:
        labels = batch["labels"]
        counted = labels != IGNORED
        total += loss(logits, batch).item() * int(counted.sum())
        terms += int(counted.sum())
        right += int(((logits.argmax(-1) == labels) | ~counted).all(-1).sum())
        rows += len(labels)
    return {"loss": total / terms, "accuracy": right / rows}


class Seq2SeqCollator:
    """Tokenises rows and pads batches."""

    def __init__(self, folder: str, task: Task, length: int) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.task = task
        self.length = length

    def text(self, row: Row) -> str:
        """The text that the encoder reads."""
        return self.task.input.format(**row)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Tokenises rows and pads them to the longest of them."""
        read = self.tokenizer(
            [self.text(row) for row in rows],
            truncation=True,
            max_length=self.length,
            padding=True,
            return_tensors="pt",
        )
        written = self.tokenizer([self.task.words[row["label"]] for row in rows], padding=True, return_tensors="pt")
        labels = written["input_ids"].masked_fill(written["attention_mask"] == 0, IGNORED)
        return {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"], "labels": labels}


def prepare(cell: Cell, sources: Sources) -> PreparedTask:
    """Loads the model and the rows, and splits the tuning rows off."""
    task, settings = cell.task, cell.settings
    folder = sources.model(task.model)
    collator = Seq2SeqCollator(folder, task, settings.length)
    rows = select_columns(sources.rows(task.files["train"]), task.columns, task.files["train"])
    shuffled = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()]
    tune, train = shuffled[: settings.tune_rows], shuffled[settings.tune_rows :][: settings.train_rows]
    report = select_columns(sources.rows(task.files["validation"]), task.columns, task.files["validation"])
    kept = torch.randperm(len(report), generator=torch.Generator().manual_seed(0))[: settings.report_rows].tolist()
    lengths = [len(collator.text(row)) for row in train]

    def measured(some: Sequence[Row]) -> list[Batch]:
        ordered = sorted(some, key=lambda row: len(collator.text(row)))  # less padding
        return [collator.batch(ordered[i : i + EVAL_BATCH_SIZE]) for i in range(0, len(ordered), EVAL_BATCH_SIZE)]

    splits = {"tune": measured(tune), "report": measured([report[i] for i in kept])}

    def seeded(seed: int) -> PreparedTask:
        size = settings.effective_batch_size
        train_batches, start_batches = row_batches(train, lengths, collator.batch, settings, size, seed)
        return PreparedTask(
            base=load_model("AutoModelForSeq2SeqLM", folder, settings),
            task_type="SEQ_2_SEQ_LM",
            train_batches=train_batches,
            start_batches=start_batches,
            splits=splits,
            loss=loss,
            measure=measure,
            for_seed=seeded,
        )

    return seeded(cell.seed)
