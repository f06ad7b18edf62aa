"""Instruction tuning: a decoder reads a prompt and learns the tokens of the answer.

Rows longer than the settings' length are left out, as the paper's authors do. The tuning split is held-out training
rows. So is the reported split, unless the task names a file for it ("report"). Both give losses. The task's evaluation
gives the other metrics, from answers of the trained model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from lora_ga.experiments import judging as evaluate
from lora_ga.experiments.judging.harness import lines_of
from lora_ga.experiments.methods.base import Batch
from lora_ga.experiments.suites.cells import Cell
from lora_ga.experiments.suites.sources import Sources, select_columns
from lora_ga.experiments.suites.spec import Task
from lora_ga.experiments.tasks import seq2seq
from lora_ga.experiments.tasks.classes import row_batches
from lora_ga.experiments.tasks.prepared import PreparedTask, check_model, load_model
from lora_ga.experiments.tasks.seq2seq import check_template
from lora_ga.gradients.loss import IGNORED

EVAL_BATCH_SIZE = 8  # rows of a batch of the tuning and the reported split
BLOCK = 1000  # rows that are tokenised together
Row = Mapping[str, Any]
Examples = list[tuple[list[int], int]]  # token ids and the length of the prompt, for each row


def as_it_is(row: Row) -> Row | None:
    """Keeps every row."""
    return row


def grade_school(row: Row) -> Row | None:
    """MetaMathQA: rows made of GSM8K, without the last sentence, which repeats the answer."""
    return {**row, "answer": row["answer"].split("\nThe answer is:")[0]} if "GSM" in row["type"] else None


def first_code_block(row: Row) -> Row | None:
    """Code-Feedback: rows whose answer has code, cut after the first block."""
    found = re.match(r"(?s).*?```.*?(?:```|\Z)", row["answer"])
    return {**row, "answer": found[0].removesuffix("```") + "```"} if found else None


def no_refusals(row: Row) -> Row | None:
    """WizardLM: rows whose answer does not refuse."""
    said = row["answer"].lower()
    return None if "sorry" in said or "as an ai" in said else row


def lines(row: Row) -> Row | None:
    """Lists become lines, and every line ends in the same way."""
    return {name: lines_of(value) for name, value in row.items()}


CLEANERS: dict[str, Callable[[Row], Row | None]] = {
    "": as_it_is,
    "grade_school": grade_school,
    "first_code_block": first_code_block,
    "no_refusals": no_refusals,
    "lines": lines,
}


def check(task: Task, sources: Sources) -> list[str]:
    """Checks the model's configuration, the columns of the rows, and what the evaluation needs.

    Args:
        task: The task.
        sources: Resolves the references to models and files.

    Returns:
        One text for each thing that was found.

    Raises:
        ValueError: Something is missing.
    """
    found = [check_model(task, sources)]
    check_template("input", task.input, task.columns)
    check_template("target", task.target, task.columns)
    if task.clean not in CLEANERS:
        raise ValueError(f"clean is {task.clean!r}; it must be one of {', '.join(filter(None, CLEANERS))}.")
    if "train" not in task.files or set(task.files) - {"train", "report"}:
        raise ValueError(f"files names {', '.join(task.files) or 'nothing'}; it must name train, and may name report.")
    columns = ", ".join(task.columns.values())
    for part, reference in task.files.items():
        if sources.is_out_of_reach(reference):
            found.append(f"{part} {reference} (columns {columns}; not checked)")
        else:
            rows = select_columns(sources.rows(reference), task.columns, reference)
            found.append(f"{part} {reference} ({len(rows)} rows; columns {columns})")
    return found + evaluate.check(task, sources)


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the next token, over the tokens of the answer."""
    return seq2seq.loss(logits[:, :-1], {"labels": batch["labels"][:, 1:]})


def measure(outputs: Iterable[tuple[Tensor, Batch]]) -> dict[str, float]:
    """The loss over the tokens of all answers."""
    shifted = ((logits[:, :-1], {"labels": batch["labels"][:, 1:]}) for logits, batch in outputs)
    return {"loss": seq2seq.measure(shifted)["loss"]}


class InstructCollator:
    """Tokenises rows and pads batches."""

    def __init__(self, tokenizer: Any, task: Task, length: int) -> None:
        self.tokenizer = tokenizer
        self.task = task
        self.length = length

    def examples(self, rows: Sequence[Row], most: int) -> Examples:
        """Token ids and the length of the prompt, for the first rows that pass the cleaner and are short enough."""
        found: Examples = []
        for start in range(0, len(rows), BLOCK):
            cleaned = (CLEANERS[self.task.clean](row) for row in rows[start : start + BLOCK])
            some = [row for row in cleaned if row is not None]
            if some:
                prompts = self.tokenizer([self.task.input.format(**row) for row in some])["input_ids"]
                texts = [self.task.target.format(**row) for row in some]
                answers = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
                end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
                pairs = ((prompt + answer + end, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True))
                found += [pair for pair in pairs if len(pair[0]) <= self.length]
            if len(found) >= most:
                break
        return found[:most]

    def batch(self, examples: Sequence[tuple[list[int], int]]) -> Batch:
        """Pads examples on the right to the longest of them."""
        longest = max(len(ids) for ids, _ in examples)
        shape = (len(examples), longest)
        ids_BT = torch.full(shape, self.tokenizer.pad_token_id or 0)  # B rows, T tokens
        mask_BT, labels_BT = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
        for row, (ids, prompt) in enumerate(examples):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            mask_BT[row, : len(ids)] = 1
            labels_BT[row, prompt : len(ids)] = torch.tensor(ids[prompt:])
        return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}


def split_examples(cell: Cell, sources: Sources, collator: InstructCollator) -> tuple[Examples, Examples, Examples]:
    """The examples to choose the learning rate, to report and to train: the same for every method and seed.

    Args:
        cell: The cell.
        sources: Resolves the references to files.
        collator: Tokenises the rows.

    Returns:
        The tuning, the reported and the training examples.

    Raises:
        ValueError: Too few rows are left.
    """
    task, settings = cell.task, cell.settings
    own_file = "report" in task.files
    apart_rows = settings.tune_rows + (0 if own_file else settings.report_rows)
    examples = collator.examples(_shuffled(task, sources, "train"), apart_rows + settings.train_rows)
    if len(examples) < apart_rows + settings.effective_batch_size:
        raise ValueError(
            f"{task.files['train']}: {len(examples)} rows are left, but {apart_rows} are held out and a batch has "
            f"{settings.effective_batch_size}. Give more rows, or a larger length."
        )
    report = examples[settings.tune_rows : apart_rows]
    if own_file:
        report = collator.examples(_shuffled(task, sources, "report"), settings.report_rows)
        if not report:
            raise ValueError(f"{task.files['report']}: no row is left. Give more rows, or a larger length.")
    return examples[: settings.tune_rows], report, examples[apart_rows:]


def _shuffled(task: Task, sources: Sources, part: str) -> list[dict[str, Any]]:
    """The rows of a file of the task, in one random order."""
    rows = select_columns(sources.rows(task.files[part]), task.columns, task.files[part])
    return [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()]


def prepare(cell: Cell, sources: Sources) -> PreparedTask:
    """Loads the model and the rows, and splits the tuning and the reported rows off."""
    task, settings = cell.task, cell.settings
    folder = sources.model(task.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    collator = InstructCollator(tokenizer, task, settings.length)
    tune, report, train = split_examples(cell, sources, collator)

    def measured(some: Sequence[tuple[list[int], int]]) -> list[Batch]:
        return [collator.batch(some[i : i + EVAL_BATCH_SIZE]) for i in range(0, len(some), EVAL_BATCH_SIZE)]

    lengths = [len(ids) for ids, _ in train]
    splits = {"tune": measured(tune), "report": measured(report)}

    def seeded(seed: int) -> PreparedTask:
        train_batches, start_batches = row_batches(train, lengths, collator.batch, settings, settings.batch_size, seed)
        return PreparedTask(
            base=load_model("AutoModelForCausalLM", folder, settings),
            task_type="CAUSAL_LM",
            train_batches=train_batches,
            start_batches=start_batches,
            splits=splits,
            loss=loss,
            measure=measure,
            for_seed=seeded,
            evaluate=evaluate.evaluation(task, sources, tokenizer, seed),
        )

    return seeded(cell.seed)
