"""Runs the cells of one task at once, and returns a record of each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lora_ga.experiments.suites.cells import Cell
from lora_ga.experiments.suites.run import Place, Run, build, finish, now, quiet, recorded, run_cell
from lora_ga.experiments.suites.stack import AloneError, Stack, check_member, share_memory
from lora_ga.experiments.suites.training import Curves, DivergedError, Loop, autocast, keep_in_float32
from lora_ga.experiments.tasks import prepare


def run_stack(cells: Sequence[Cell], place: Place) -> list[dict[str, Any]]:
    """Runs cells as one stack. Those that cannot be part of it run alone, one after another.

    Args:
        cells: Cells of equal `stack_key`.
        place: The device and the sources.

    Returns:
        Their records, in the same order. Those of a stack say in "stack" how many cells it had. Their training time is
        an equal share of the stack's, and their peak memory is that of the whole stack.
    """
    if len(cells) == 1:
        return [run_cell(cells[0], place)]
    if place.device.startswith("cuda"):
        torch.cuda.init()  # the next line does not, and fails without it
        torch.cuda.reset_peak_memory_stats(place.device)
    records = _records(cells, place)
    gc.collect()  # frees the models before another is built
    return [run_cell(cell, place) if record is None else record for cell, record in zip(cells, records, strict=True)]


def _records(cells: Sequence[Cell], place: Place) -> list[dict[str, Any] | None]:
    """The records of the cells; None for those that must run alone."""
    curves = [Curves() for _ in cells]
    with quiet():
        members, base = _members(cells, place, curves)
        runs = {number: member for number, member in enumerate(members) if isinstance(member, Run)}
        errors = {number: member for number, member in enumerate(members) if isinstance(member, Exception)}
        errors |= _trained(runs, base, place)
    records: list[dict[str, Any] | None] = []
    for number, (cell, curve) in enumerate(zip(cells, curves, strict=True)):
        if isinstance(errors.get(number), AloneError):
            records.append(None)
            continue

        def outcome(number: int = number) -> dict[str, Any]:
            if number in errors:
                raise errors[number]
            return finish(runs[number], place)

        record = recorded(cell, place, curve, outcome)
        if number in runs:
            record["seconds"] = runs[number].seconds | record["seconds"]
            record["stack"] = len(runs)
        record["seconds"]["total"] = round(sum(record["seconds"].values()), 3)
        records.append(record)
    return records


def _members(cells: Sequence[Cell], place: Place, curves: Sequence[Curves]) -> tuple[list[Run | Exception], Any]:
    """Builds the cells' models, which share the base model's frozen weights; the data are read once for all.

    Returns:
        For each cell its run, or why it has none: it failed, or must run alone. And the base model.
    """
    members: list[Run | Exception] = []
    try:
        prepared = prepare(cells[0], place.sources)
        prepared.base.to(place.device)
    except Exception as error:  # a record says so
        return [error] * len(cells), None
    for cell, curve in zip(cells, curves, strict=True):
        try:
            run = build(cell, place, curve, prepared)
            check_member(run.model, run.method, cell.settings.rank)
            share_memory(prepared.base, run.model)
            members.append(AloneError("it is trained already") if run.is_trained else run)
        except Exception as error:  # the other cells go on
            members.append(error)
    return members, prepared.base


def _trained(runs: Mapping[int, Run], base: Any, place: Place) -> dict[int, Exception]:
    """Trains the cells at once; returns number → error of those that diverged, or of all if the stack failed."""
    if len(runs) < 2:
        return {number: AloneError("no other cell is left") for number in runs}
    began = now(place.device)
    try:
        errors = train_stack(runs, base, place)
    except Exception as error:  # the other stacks go on
        return dict.fromkeys(runs, error)
    share = round((now(place.device) - began) / len(runs), 3)
    for run in runs.values():
        run.seconds["train"] = share
    return errors


def train_stack(runs: Mapping[int, Run], base: Any, place: Place) -> dict[int, Exception]:
    """Trains the models of several runs at once.

    Args:
        runs: Number → run, of equal settings.
        base: The base model, on the device.
        place: The device and the sources.

    Returns:
        Number → why it diverged. Such a run takes no further steps.

    Raises:
        AloneError: A stack cannot follow what a method has done to its model.
    """
    first = next(iter(runs.values()))
    settings, task_loss = first.cell.settings, first.prepared.loss
    for run in runs.values():
        keep_in_float32(run.model)
    stack = Stack(base, [run.model for run in runs.values()])
    loops = [run.loop(place) for run in runs.values()]
    diverged: dict[int, Exception] = {}  # position in the stack → why

    def for_each(action: Callable[[int, Loop], None]) -> None:
        for position, loop in enumerate(loops):
            if position not in diverged:
                try:
                    action(position, loop)
                except DivergedError as error:
                    diverged[position] = error

    for_each(lambda _, loop: loop.begin())
    torch.manual_seed(first.cell.seed)
    base.train()
    for step in range(1, settings.steps + 1):
        batches = [loop.batch() for loop in loops]
        with autocast(base, place.device):
            logits = stack.logits(batches)
        losses = torch.stack([task_loss(own, batch) for own, batch in zip(logits, batches, strict=True)])
        values = losses.tolist()
        for_each(lambda position, loop: loop.note(values[position]))  # noqa: B023 (called at once)
        if len(diverged) == len(loops):
            break
        losses.sum().backward()  # the gradient of a cell comes from its own loss alone
        for_each(lambda _, loop: loop.update(step))  # noqa: B023 (called at once)
        stack.zero_grad()
        for_each(lambda _, loop: loop.evaluate_if_due(step))  # noqa: B023 (called at once)
    return {number: diverged[position] for position, number in enumerate(runs) if position in diverged}
