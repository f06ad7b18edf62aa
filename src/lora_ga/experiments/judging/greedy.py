"""The tests of `harness` without lm-evaluation-harness: greedy answers in batches, for machines that do not have it.

Only tests whose answers are read, as GSM8K's. Those that run programs are left to `harness`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from lora_ga.experiments.judging.harness import TESTS, check_rows, check_test, prompt_of, rows_of
from lora_ga.experiments.suites.sources import Sources
from lora_ga.experiments.suites.spec import Task


def check(task: Task, sources: Sources) -> list[str]:
    """Checks the test and its rows.

    Args:
        task: The task.
        sources: Resolves the reference to the rows.

    Returns:
        One text for each thing that was found.

    Raises:
        ValueError: Something is missing, or the test runs programs.
    """
    check_test(task)
    if TESTS[task.evaluation["test"]][3]:
        raise ValueError(f"evaluation: {task.evaluation['test']} runs programs; it needs by: harness.")
    return check_rows(task, sources)


def preflight(task: Task, sources: Sources) -> None:
    """Checks again in the process that runs the cell."""
    check(task, sources)


def run(model: Any, tokenizer: Any, task: Task, sources: Sources, seed: int) -> dict[str, float]:
    """Generates answers and computes the metric.

    Args:
        model: The trained model.
        tokenizer: Its tokenizer.
        task: The task.
        sources: Resolves the reference to the rows.
        seed: Not used: decoding is greedy.

    Returns:
        The share of right answers, under the test's name.
    """
    test, rows = task.evaluation["test"], rows_of(task, sources)
    tokens, batch = task.evaluation.get("tokens", 512), task.evaluation.get("batch", 8)
    answers = greedy_answers(model, tokenizer, [prompt_of(task, row) for row in rows], tokens, batch)
    right = [TESTS[test][2](row, [answer])[test] for row, answer in zip(rows, answers, strict=True)]
    return {test: round(statistics.fmean(right), 6)}


def greedy_answers(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int, batch: int) -> list[str]:
    """The answers to prompts, of which those of similar length share a batch.

    Args:
        model: A decoder, in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        tokens: The largest number of new tokens.
        batch: The number of prompts of a batch.

    Returns:
        The answers, in the order of the prompts.
    """
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    filler = next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)
    answers = [""] * len(ids)
    for start in range(0, len(order), batch):
        turn = order[start : start + batch]
        longest = len(ids[turn[-1]])
        # On the left, so that every answer begins at the same place.
        read_BT = torch.tensor([[filler] * (longest - len(ids[number])) + ids[number] for number in turn])
        mask_BT = torch.tensor([[0] * (longest - len(ids[number])) + [1] * len(ids[number]) for number in turn])
        with torch.no_grad():
            written = model.generate(
                input_ids=read_BT.to(model.device),
                attention_mask=mask_BT.to(model.device),
                do_sample=False,
                max_new_tokens=tokens,
                pad_token_id=filler,
            )
        for number, row in zip(turn, written[:, longest:], strict=True):
            answers[number] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return answers
