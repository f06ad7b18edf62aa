"""Language modelling on one long text: random pieces for training, evenly spaced pieces for evaluation.

The text is split in three: training (90%), tuning (5%), reporting (5%).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from lora_ga.experiments.methods.base import Batch
from lora_ga.experiments.suites.cells import Cell
from lora_ga.experiments.suites.sources import Sources
from lora_ga.experiments.suites.spec import Task
from lora_ga.experiments.tasks.prepared import PreparedTask, check_model, load_model

SHARES = (0.9, 0.95)
EVAL_BATCH_SIZE = 16  # rows of a batch of the tuning and the reported split


def check(task: Task, sources: Sources) -> list[str]:
    """Checks the model's configuration and the size of the text.

    Args:
        task: The task.
        sources: Resolves the references to models and files.

    Returns:
        One text for each thing that was found.

    Raises:
        ValueError: Something is missing.
    """
    if "text" not in task.files:
        raise ValueError("files must name 'text', a plain text file.")
    size = sources.find(task.files["text"]).stat().st_size
    return [check_model(task, sources), f"text {task.files['text']} ({size} bytes)"]


def pieces(text: Tensor, starts: Tensor, length: int) -> Batch:
    """One batch of rows that begin at `starts`."""
    ids = torch.stack([text[start : start + length] for start in starts.tolist()])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def drawn(text: Tensor, rows: int, length: int, order: torch.Generator) -> Batch:
    """One batch of random rows."""
    return pieces(text, torch.randint(0, len(text) - length, (rows,), generator=order), length)


def even(text: Tensor, rows: int, length: int) -> list[Batch]:
    """Batches of evenly spaced rows."""
    starts = torch.linspace(0, len(text) - length, rows).long()
    return [pieces(text, part, length) for part in starts.split(EVAL_BATCH_SIZE)]


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the next token."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


def measure(outputs: Iterable[tuple[Tensor, Batch]]) -> dict[str, float]:
    """The loss, a mean over batches of equal size."""
    return {"loss": statistics.fmean(loss(logits, batch).item() for logits, batch in outputs)}


def prepare(cell: Cell, sources: Sources) -> PreparedTask:
    """Loads the model and the text."""
    folder, settings = sources.model(cell.task.model), cell.settings
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = sources.find(cell.task.files["text"]).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    train, tune, report = ids.tensor_split([int(len(ids) * share) for share in SHARES])
    sizes = [len(part) for part in torch.arange(settings.samples).split(settings.effective_batch_size)]
    splits = {
        "tune": even(tune, settings.tune_rows, settings.length),
        "report": even(report, settings.report_rows, settings.length),
    }

    def seeded(seed: int) -> PreparedTask:
        order, apart = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 + seed)

        def train_batches() -> Iterator[Batch]:
            while True:
                yield drawn(train, settings.effective_batch_size, settings.length, order)

        return PreparedTask(
            base=load_model("AutoModelForCausalLM", folder, settings),
            task_type="CAUSAL_LM",
            train_batches=train_batches(),
            start_batches=[drawn(train, size, settings.length, apart) for size in sizes],
            splits=splits,
            loss=loss,
            measure=measure,
            for_seed=seeded,
        )

    return seeded(cell.seed)
