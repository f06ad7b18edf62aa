"""Text classification: texts, or pairs of texts, and a new classification head.

The tuning split is a part of the training rows; the reported split is the data set's validation split. The seed does
not change which rows belong to a split. It changes the order of the rows, the head and the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from lora_ga.experiments.methods.base import Batch
from lora_ga.experiments.suites.cells import Cell
from lora_ga.experiments.suites.sources import Sources, select_columns
from lora_ga.experiments.suites.spec import Settings, Task
from lora_ga.experiments.tasks.prepared import PreparedTask, check_model, load_model

EVAL_BATCH_SIZE = 64  # rows of a batch of the tuning and the reported split
SORTED_TOGETHER = 8  # batches whose rows are sorted by length together
MEANINGS = ("text", "text_pair", "label")
Row = Mapping[str, Any]


def check(task: Task, sources: Sources) -> list[str]:
    """Checks the model's configuration, and the columns and the label of every row.

    Args:
        task: The task.
        sources: Resolves the references to models and files.

    Returns:
        One text for each thing that was found.

    Raises:
        ValueError: Something is missing, or a label is not one of the classes.
    """
    found = [check_model(task, sources)]
    unknown = sorted(set(task.columns) - set(MEANINGS))
    if unknown or not {"text", "label"} <= set(task.columns):
        raise ValueError(f"columns gives {', '.join(task.columns)}; it must give text and label, and may text_pair.")
    return [*found, *check_labelled(task, sources, task.labels, f"labels is {task.labels}")]


def check_labelled(task: Task, sources: Sources, classes: int, said: str) -> list[str]:
    """Checks the rows of the training file and of the validation file.

    Args:
        task: The task.
        sources: Resolves the references to models and files.
        classes: The number of classes.
        said: The setting of the task that gives this number, for the message.

    Returns:
        One text for each thing that was found.

    Raises:
        ValueError: Something is missing, or a label is not one of the classes.
    """
    found, columns = [], ", ".join(task.columns.values())
    for part in ("train", "validation"):
        if part not in task.files:
            raise ValueError(f"files names {', '.join(task.files) or 'nothing'}; it must name train and validation.")
        if sources.is_out_of_reach(task.files[part]):
            found.append(f"{part} {task.files[part]} (columns {columns}; not checked)")
            continue
        rows = select_columns(sources.rows(task.files[part]), task.columns, task.files[part])
        strange = {row["label"] for row in rows} - set(range(classes))
        if strange:
            raise ValueError(f"{task.files[part]}: holds the label {strange.pop()!r}, but {said}.")
        found.append(f"{part} {task.files[part]} ({len(rows)} rows; columns {columns})")
    return found


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the classes."""
    return functional.cross_entropy(logits.float(), batch["labels"])


def measure(outputs: Iterable[tuple[Tensor, Batch]]) -> dict[str, float]:
    """Loss and accuracy; for two classes also F1 of class 1 and Matthews' correlation (0 if only one is predicted)."""
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
    """Tokenises rows and pads batches."""

    def __init__(self, folder: str, taken: Sequence[str], length: int) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.taken = taken
        self.length = length

    def encode(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Tokenises rows, truncates them, and adds their labels; one example a row."""
        texts = [[row[name] for row in rows] for name in ("text", "text_pair") if name in rows[0]]
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.length)
        taken = [name for name in encoded if name in self.taken]
        return [
            {name: encoded[name][number] for name in taken} | {"labels": row["label"]}
            for number, row in enumerate(rows)
        ]

    def batch(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """Pads examples to the longest of them."""
        return dict(self.tokenizer.pad(list(examples), return_tensors="pt"))


def epoch_batches(lengths: Sequence[int], rows: int, order: torch.Generator) -> list[list[int]]:
    """One epoch in random order; rows of similar length share a batch, so that there is little padding.

    Args:
        lengths: The length of every row.
        rows: The number of rows of a batch.
        order: The random generator.

    Returns:
        The row numbers of each batch. Rows that do not fill a batch are left out of this epoch.
    """
    drawn = torch.randperm(len(lengths), generator=order).tolist()
    batches = []
    for start in range(0, len(drawn), rows * SORTED_TOGETHER):
        some = sorted(drawn[start : start + rows * SORTED_TOGETHER], key=lengths.__getitem__)
        batches += [some[i : i + rows] for i in range(0, len(some), rows)]
    whole = [batch for batch in batches if len(batch) == rows] or batches
    return [whole[i] for i in torch.randperm(len(whole), generator=order).tolist()]


def row_batches(
    rows: Sequence[Any],
    lengths: Sequence[int],
    batch_of: Callable[[Sequence[Any]], Batch],
    settings: Settings,
    start_batch_size: int,
    seed: int,
) -> tuple[Iterator[Batch], list[Batch]]:
    """The training batches of a run, and those for initialisations that read data.

    Args:
        rows: The training rows.
        lengths: The length of every row.
        batch_of: Makes a batch of some rows.
        settings: The settings of the run.
        start_batch_size: The number of rows of a batch for initialisations.
        seed: Seed of the order. The rows for initialisations are drawn with a separate generator.

    Returns:
        The endless training batches, and the list of the others.
    """
    order, apart = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 + seed)

    def train_batches() -> Iterator[Batch]:
        while True:
            for turn in epoch_batches(lengths, settings.effective_batch_size, order):
                yield batch_of([rows[i] for i in turn])

    chosen = torch.randperm(len(rows), generator=apart)[: settings.samples]
    parts = chosen.split(start_batch_size)
    return train_batches(), [batch_of([rows[i] for i in part.tolist()]) for part in parts]


def prepare(cell: Cell, sources: Sources) -> PreparedTask:
    """Loads the model and the rows, and splits the tuning rows off."""
    task, settings = cell.task, cell.settings
    folder = sources.model(task.model)
    model_type = transformers.AutoConfig.from_pretrained(folder).model_type
    taken = ["input_ids", "attention_mask", *(["token_type_ids"] if model_type == "bert" else [])]
    collator = ClassificationCollator(folder, taken, settings.length)
    rows = select_columns(sources.rows(task.files["train"]), task.columns, task.files["train"])
    shuffled = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()]
    tune, train = shuffled[: settings.tune_rows], shuffled[settings.tune_rows :][: settings.train_rows]
    report = select_columns(sources.rows(task.files["validation"]), task.columns, task.files["validation"])
    kept = torch.randperm(len(report), generator=torch.Generator().manual_seed(0))[: settings.report_rows].tolist()
    examples = collator.encode(train)

    def measured(some: Sequence[Row]) -> list[Batch]:
        encoded = sorted(collator.encode(some), key=lambda example: len(example["input_ids"]))  # less padding
        return [collator.batch(encoded[i : i + EVAL_BATCH_SIZE]) for i in range(0, len(encoded), EVAL_BATCH_SIZE)]

    lengths = [len(example["input_ids"]) for example in examples]
    splits = {"tune": measured(tune), "report": measured([report[i] for i in kept])}

    def seeded(seed: int) -> PreparedTask:
        size = settings.effective_batch_size
        train_batches, start_batches = row_batches(examples, lengths, collator.batch, settings, size, seed)
        torch.manual_seed(seed)  # the new head
        return PreparedTask(
            base=load_model("AutoModelForSequenceClassification", folder, settings, num_labels=task.labels),
            task_type="SEQ_CLS",
            train_batches=train_batches,
            start_batches=start_batches,
            splits=splits,
            loss=loss,
            measure=measure,
            for_seed=seeded,
        )

    return seeded(cell.seed)
