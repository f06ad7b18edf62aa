"""Sorting texts, or pairs of them, into classes, with a new head.

The tuning split is taken from the training rows; the reported one is the set's own validation. Which rows those are
does not depend on the seed: seeds change the order, the head and the adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from lora_ga.experiments.methods.base import Batch
from lora_ga.experiments.suites.cell import Cell
from lora_ga.experiments.suites.sources import Sources, select_columns
from lora_ga.experiments.suites.spec import Task
from lora_ga.experiments.tasks.prepared import PreparedTask, check_model, load_model

AT_ONCE = 64  # rows of a batch that is only measured
SORTED_AT_ONCE = 8  # batches whose rows are put into order of length together
MEANINGS = ("text", "text_pair", "label")
Row = Mapping[str, Any]


def check(task: Task, sources: Sources) -> list[str]:
    """Reads the model's configuration and every row's columns and label.

    Args:
        task: The task.
        sources: Where things are.

    Returns:
        What was found.

    Raises:
        ValueError: Something is not there, or a label is not one of the classes.
    """
    found = [check_model(task, sources)]
    unknown = sorted(set(task.columns) - set(MEANINGS))
    if unknown or not {"text", "label"} <= set(task.columns):
        raise ValueError(f"columns gives {', '.join(task.columns)}; it must give text and label, and may text_pair.")
    return [*found, *check_labelled(task, sources, task.labels, f"labels is {task.labels}")]


def check_labelled(task: Task, sources: Sources, classes: int, said: str) -> list[str]:
    """Reads the rows to train on and those that are reported.

    Args:
        task: The task.
        sources: Where things are.
        classes: The number of classes.
        said: What of the task says that number, for the message.

    Returns:
        What was found.

    Raises:
        ValueError: Something is not there, or a label is not one of the classes.
    """
    found, columns = [], ", ".join(task.columns.values())
    for part in ("train", "validation"):
        if part not in task.files:
            raise ValueError(f"files names {', '.join(task.files) or 'nothing'}; it must name train and validation.")
        if sources.is_out_of_reach(task.files[part]):
            found.append(f"{part} {task.files[part]} (columns {columns}; not looked at)")
            continue
        rows = select_columns(sources.rows(task.files[part]), task.columns, task.files[part])
        strange = {row["label"] for row in rows} - set(range(classes))
        if strange:
            raise ValueError(f"{task.files[part]}: holds the label {strange.pop()!r}, but {said}.")
        found.append(f"{part} {task.files[part]} ({len(rows)} rows; columns {columns})")
    return found


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the class."""
    return functional.cross_entropy(logits.float(), batch["labels"])


def measure(outputs: Iterable[tuple[Tensor, Batch]]) -> dict[str, float]:
    """Loss and accuracy; of two classes also F1 of class 1 and Matthews' correlation (0 where only one is said)."""
    pairs = list(outputs)
    logits = torch.cat([each.float() for each, _ in pairs])
    labels = torch.cat([batch["labels"] for _, batch in pairs])
    said = logits.argmax(-1)
    values = {
        "loss": functional.cross_entropy(logits, labels).item(),
        "accuracy": (said == labels).double().mean().item(),
    }
    if logits.shape[-1] == 2:
        hit, wrong = int(((said == 1) & (labels == 1)).sum()), int(((said == 1) & (labels == 0)).sum())
        missed, passed = int(((said == 0) & (labels == 1)).sum()), int(((said == 0) & (labels == 0)).sum())
        spread = (hit + wrong) * (hit + missed) * (passed + wrong) * (passed + missed)
        values["f1"] = 2 * hit / (2 * hit + wrong + missed) if hit else 0.0
        values["matthews"] = (hit * passed - wrong * missed) / spread**0.5 if spread else 0.0
    return values


class ClassificationCollator:
    """Rows to padded batches."""

    def __init__(self, folder: str, taken: Sequence[str], length: int) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.taken = taken
        self.length = length

    def encode(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Token ids, cut, and labels; one example a row."""
        texts = [[row[name] for row in rows] for name in ("text", "text_pair") if name in rows[0]]
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.length)
        taken = [name for name in encoded if name in self.taken]
        return [
            {name: encoded[name][number] for name in taken} | {"labels": row["label"]}
            for number, row in enumerate(rows)
        ]

    def batch(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """One batch, padded to its longest row."""
        return dict(self.tokenizer.pad(list(examples), return_tensors="pt"))


def epoch_batches(lengths: Sequence[int], rows: int, order: torch.Generator) -> list[list[int]]:
    """One epoch in random order, in whole batches of rows of similar length: padding would cost more than the text.

    Args:
        lengths: Of every row.
        rows: Of a batch.
        order: Drawn from.

    Returns:
        The rows of each batch. What is left over by whole batches waits for the next epoch.
    """
    drawn = torch.randperm(len(lengths), generator=order).tolist()
    batches = []
    for start in range(0, len(drawn), rows * SORTED_AT_ONCE):
        some = sorted(drawn[start : start + rows * SORTED_AT_ONCE], key=lengths.__getitem__)
        batches += [some[i : i + rows] for i in range(0, len(some), rows)]
    whole = [batch for batch in batches if len(batch) == rows] or batches
    return [whole[i] for i in torch.randperm(len(whole), generator=order).tolist()]


def prepare(cell: Cell, sources: Sources) -> PreparedTask:
    """Loads model and rows, and cuts the tuning split off."""
    task, settings = cell.task, cell.settings
    torch.manual_seed(cell.seed)  # the new head
    folder = sources.model(task.model)
    base = load_model("AutoModelForSequenceClassification", folder, settings, num_labels=task.labels)
    taken = ["input_ids", "attention_mask", *(["token_type_ids"] if base.config.model_type == "bert" else [])]
    collator = ClassificationCollator(folder, taken, settings.length)
    rows = select_columns(sources.rows(task.files["train"]), task.columns, task.files["train"])
    shuffled = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()]
    tune, train = shuffled[: settings.tune_rows], shuffled[settings.tune_rows :][: settings.train_rows]
    report = select_columns(sources.rows(task.files["validation"]), task.columns, task.files["validation"])
    kept = torch.randperm(len(report), generator=torch.Generator().manual_seed(0))[: settings.report_rows].tolist()
    examples = collator.encode(train)
    order, apart = torch.Generator().manual_seed(cell.seed), torch.Generator().manual_seed(1000 + cell.seed)

    def train_batches() -> Iterator[Batch]:
        while True:
            for turn in epoch_batches(
                [len(example["input_ids"]) for example in examples], settings.effective_batch_size, order
            ):
                yield collator.batch([examples[i] for i in turn])

    def measured(some: Sequence[Row]) -> list[Batch]:
        encoded = sorted(collator.encode(some), key=lambda example: len(example["input_ids"]))  # less padding
        return [collator.batch(encoded[i : i + AT_ONCE]) for i in range(0, len(encoded), AT_ONCE)]

    chosen = torch.randperm(len(examples), generator=apart)[: settings.samples]
    return PreparedTask(
        base=base,
        task_type="SEQ_CLS",
        train_batches=train_batches(),
        start_batches=[
            collator.batch([examples[i] for i in part.tolist()]) for part in chosen.split(settings.effective_batch_size)
        ],
        splits={"tune": measured(tune), "report": measured([report[i] for i in kept])},
        loss=loss,
        measure=measure,
    )
