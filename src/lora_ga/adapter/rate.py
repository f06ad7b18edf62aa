"""`find_rate`: a learning rate for an adapter from a few short trials, in the place of a sweep.

The rule. Adam moves every parameter by about the learning rate λ, in the direction of the sign of its gradient.

- The edge: the smallest λ at which the first steps raise the loss. Above it no run of any length is stable.
- The agreement a: the mean product of the signs of a parameter's gradients on two batches. √a is the share of a step
  that the data agree on; the rest is noise of the batch. A step of size λ lowers the loss by about λ·√a·|g|₁ − λ²h/2.
  The edge is 2|g|₁/h without noise, so the best λ is in proportion to edge·√a (for SGD: S. McCandlish and others, "An
  empirical model of large-batch training", 2018, section 2.2; for signs: L. Balles and P. Hennig, "Dissecting Adam",
  2018).
  In the first steps a hard task shows little agreement at any rate, and more once something is learned. So an agreement
  below 0.05 counts as 0.05.
- The length: the best constant rate of N noisy steps is in proportion to 1/√N (A. Defazio and others, "Optimal linear
  decay learning rate schedules and further refinements", 2023).
- The groups: edge and agreement of eight batches are noisy. A longer run can afford to measure both on several groups
  of eight batches; the rate is the geometric mean over the groups.

benchmarks/rates.py compares the rule with sweeps; docs/evidence.md has the result.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lora_ga.adapter.trials import OPTIMIZER, TOLERATED, Trials, as_before
from lora_ga.distributed.processes import processes
from lora_ga.distributed.sharding import unwrapped
from lora_ga.files import damaged, parse_json, write_atomically
from lora_ga.gradients.loss import LossFunction, unlabelled
from lora_ga.gradients.progress import LOGGER
from lora_ga.gradients.reader import ALL_IGNORED, MOST_UNLABELLED, check_data
from lora_ga.gradients.setup import refuse_inference_mode
from lora_ga.layers.targets import peft_model_in
from lora_ga.warn import warn

TRIAL, FEWEST = 8, 4  # steps of a trial, and the fewest with which it says anything
CONSTANT = ("constant", "constant_with_warmup")  # schedules for which the rule is not made
FIRST, LOWEST, HIGHEST = -4, -12, -1  # exponents of √10: the first rate tried is 1e-2, the others 1e-6 to 0.316
# The rate of a run of `REFERENCE` steps is FACTOR · edge · √a. Set on nine lines of runs (two Llamas and SST-2, each
# with LoRA, rsLoRA and LoRA-GA): 0.5 to 0.8 are nearly as good. The minimum of a parabola is at half of its edge.
FACTOR, REFERENCE = 0.6, 200
# A smaller agreement counts as this. Set on QNLI, where 0.003 to 0.008 gave rates of a tenth to a quarter of the best.
LEAST_AGREEMENT = 0.05
UNSURE = 0.02  # below this a warning says that the rate is a guess
LEAST_STEPS = 50  # a group costs 20 to 40 steps; before a shorter run it does not pay
STEPS_OF_GROUP, MOST_GROUPS = 200, 5  # one group for so many steps of the run, and at most so many groups
SHARE = 0.15  # of the run's steps: the last, finest trial of a group is left out if the search would cost more with it
SCHEMA = 3


@dataclasses.dataclass
class Group:
    """What has been measured on the batches of one group.

    Attributes:
        identity: Digest of the model, the adapter and the batches; see `Trials.identity`.
        losses: The loss of each trial step's batch at the start.
        agreement: a; None before it is known.
        stable: Rate → whether the trial at it was stable.
        passes: Training steps that were computed.
    """

    identity: str
    losses: list[float] = dataclasses.field(default_factory=list)
    agreement: float | None = None
    stable: dict[float, bool] = dataclasses.field(default_factory=dict)
    passes: int = 0

    @property
    def noise(self) -> float:
        """The standard error of the mean loss at the start, as a share of it."""
        return statistics.stdev(self.losses) / math.sqrt(len(self.losses)) / statistics.fmean(self.losses)

    @property
    def is_open(self) -> bool:
        """Whether no rate that was tried is unstable."""
        return all(self.stable.values())

    @property
    def edge(self) -> float:
        """Between the highest stable rate and the lowest one that is not; the highest tried if all are stable."""
        good = max(rate for rate, stable in self.stable.items() if stable)
        return math.sqrt(good * min((rate for rate, stable in self.stable.items() if not stable), default=good))

    @property
    def product(self) -> float:
        """edge·√a."""
        assert self.agreement is not None
        return self.edge * math.sqrt(min(1.0, max(self.agreement, LEAST_AGREEMENT)))


@dataclasses.dataclass
class Search:
    """What has been measured.

    Attributes:
        groups: The groups of this search, and after them any more that the file has, from the search for a longer run.
        count: The number of groups of this search.
        file: Where to write them; None: nowhere.
    """

    groups: list[Group]
    count: int
    file: Path | None = None

    @classmethod
    def begin(cls, identities: Sequence[str], file: Path | None) -> Search:
        """A new search, or one that goes on from what a file holds.

        Args:
            identities: The identities of its groups.
            file: The file, which need not exist; None without one.

        Returns:
            The search.

        Raises:
            ValueError: The file is damaged or a folder, or of another model or adapter, or of other batches.
        """
        known: list[Group] = []
        if file is not None and file.is_dir():
            raise ValueError(f"checkpoint={str(file)!r}: a folder. Give the path of a file, which need not exist.")
        if file is not None and file.exists():
            with damaged(file, advice="Remove it to search again."):
                found = parse_json(file.read_text(encoding="utf-8"))
                if found["schema"] != SCHEMA:
                    raise ValueError("it has another version")
                known = [Group(**values) for values in found["groups"]]
                for group in known:
                    group.stable = {float(rate): bool(stable) for rate, stable in group.stable.items()}
        if any(group.identity != identity for group, identity in zip(known, identities, strict=False)):
            raise ValueError(
                f"{file}: belongs to the search for another model, adapter or start, or on other batches. Give each "
                "search a file of its own, or remove this one to search again."
            )
        return cls(known + [Group(identity) for identity in identities[len(known) :]], len(identities), file)

    def save(self) -> None:
        """Write what has been measured, if there is a file."""
        if self.file is not None:
            begun = [vars(group) for group in self.groups if group.agreement is not None]
            write_atomically(self.file, json.dumps({"schema": SCHEMA, "groups": begun}).encode())

    @property
    def used(self) -> list[Group]:
        """The groups of this search."""
        return self.groups[: self.count]

    def rate(self, steps: int) -> float:
        """The rate for a run, by the rule at the top of this file, to two digits."""
        product = statistics.geometric_mean(group.product for group in self.used)
        return float(f"{FACTOR * product * min(1.0, math.sqrt(REFERENCE / steps)):.2g}")

    def summary(self) -> str:
        """What was measured, for a message."""
        edges = ", ".join(f"{'>' * group.is_open}{group.edge:.2g}" for group in self.used)
        agreements = ", ".join(f"{group.agreement:.2g}" for group in self.used)
        return (
            f"found in {sum(group.passes for group in self.used)} steps (the loss rises from a learning rate of "
            f"{edges} on; agreement of the gradients of different batches: {agreements}, where 1 is full agreement)"
        )


def steps_of_groups(steps: int) -> int:
    """The number of optimizer steps whose batches the search for a run reads: those of all its groups."""
    return TRIAL * min(MOST_GROUPS, max(1, steps // STEPS_OF_GROUP))


def find_rate(
    model: nn.Module,
    data: Iterable[Any],
    steps: int,
    *,
    gradient_accumulation_steps: int = 1,
    loss_fn: LossFunction | None = None,
    optimizer: Callable[[float], Optimizer] | None = None,
    checkpoint: str | Path | None = None,
) -> float:
    """Find a peak learning rate for training an adapter with AdamW, from short trials.

    Eight batches show how far their gradients agree, and trials of at most eight steps on them show from which rate on
    the loss rises. This costs 20 to 40 training steps. It is done once for each 200 steps of the run, on other batches,
    at least once and at most five times, and the result is the geometric mean. So the search costs about an eighth of a
    run of 200 to 1,000 steps, and about half of one of 50. The module's docstring has the rule, and
    docs/evidence.md its regret against a sweep. It holds for a warm-up and a decay of the rate to zero.

    A warning says if the gradients hardly agree. Then the rate is a guess, and often too low. Another one says if the
    losses of the batches differ so much that a single batch may decide.

    Everything is as before afterwards, also after an error or an interruption: weights, `.grad`, buffers, modes, the
    global random generators and those of a `DataLoader` and its collator. Only an iterator has been read.

    Args:
        model: A model with a trainable LoRA adapter, ready to train (after `lora_ga.initialize`, if it is to start with
            LoRA-GA), or a network that contains one.
        data: Batches of the training data, as `lora_ga.initialize` takes them, of the size that training will use. The
            first 8·`gradient_accumulation_steps` with a label are read for each group; fewer groups if there are fewer
            batches.
        steps: Optimizer steps of the run.
        gradient_accumulation_steps: Batches in one optimizer step.
        loss_fn: `(model, batch) → loss` or `→ (loss, weight)`; by default `model(**batch).loss`.
        optimizer: Rate → a new optimizer of the Adam family, for parameter groups of your own. By default AdamW
            without weight decay, with this rate for everything that trains.
        checkpoint: A JSON file for what has been measured. If it exists, the search goes on from it. It recognises the
            model, the adapter with its start, and the batches, but neither `loss_fn` nor `optimizer`: give each of them
            a file of its own.

    Returns:
        The rate, to two digits.

    Raises:
        TypeError: There are no LoRA layers; the data is no iterable of batches; `optimizer` is no function from a rate
            to an optimizer.
        ValueError: There are fewer than 50 steps, fewer than four steps' batches, no label, or nothing that trains; a
            loss at the start is not finite or not above 0; it rises or is not finite at every rate, or rises at
            none; the optimizer is not of the Adam family, or does not depend on the rate; there are several processes;
            `torch.inference_mode()` is on; the checkpoint is damaged, a folder, or of another search.
    """
    network = unwrapped(model)
    _check(network, data, steps, gradient_accumulation_steps)
    if optimizer is not None and (not callable(optimizer) or isinstance(optimizer, type)):
        raise TypeError(f"optimizer={optimizer!r} is no function. {OPTIMIZER}")
    with as_before(network, data):
        batches = _batches_of_steps(network, data, steps_of_groups(steps), gradient_accumulation_steps, loss_fn)
        parts = [batches[at : at + TRIAL] for at in range(0, len(batches), TRIAL)]
        trials = [Trials(network, part, loss_fn, optimizer) for part in parts if len(part) >= FEWEST]
        search = Search.begin([each.identity() for each in trials], None if checkpoint is None else Path(checkpoint))
        first = FIRST
        for group, each in zip(search.used, trials, strict=True):
            if group.agreement is None:
                group.losses, group.agreement = each.at_start()
                group.passes += len(each.batches)
                search.save()
            first = _find_edge(group, each, first, search.save)
            passes = len(each.batches) + sum(part.passes for part in search.used)
            if first < HIGHEST and passes <= SHARE * steps:
                _try_rate(group, each, first + 0.5, search.save)
    rate = search.rate(steps)
    _judge(search, rate)
    LOGGER.info(f"LoRA-GA: learning rate {rate:g} for {steps} steps, {search.summary()}")
    return rate


def _judge(search: Search, rate: float) -> None:
    """Warn of a rate that is a guess.

    Args:
        search: What was measured.
        rate: The rate.

    Raises:
        ValueError: The loss rises at no rate, so nothing limits the rate.
    """
    highest = 10 ** (HIGHEST / 2)
    if all(group.is_open for group in search.used):
        raise ValueError(
            f"No learning rate up to {highest:.3g} raises the loss in the first steps, so the trials do not show which "
            "rate is too high. That is so with a bounded loss, as DFT's or KTO's, which rises little or falls when the "
            "model breaks, and where the adapter has little part in the loss. Set the learning rate yourself: 2e-4 is "
            "usual."
        )
    agreement = statistics.median(group.agreement or 0.0 for group in search.used)
    noise = statistics.median(group.noise for group in search.used)
    if any(group.is_open for group in search.used):
        warn(
            f"On some batches no learning rate up to {highest:.3g} raises the loss in the first steps, so the rate "
            f"{rate:g} is a guess. Check that the adapter takes part in the loss, or set the rate yourself."
        )
    elif noise > TOLERATED:
        warn(
            f"The losses of the first batches differ much: the standard error of their mean is {noise:.2g} of it, and "
            f"above {TOLERATED:g} a single batch can decide which rate counts as too high. So the learning rate "
            f"{rate:g} is a guess, and with other batches it may be ten times larger or smaller. Set the rate yourself "
            "(2e-4 is usual), or use larger batches, whose losses differ less."
        )
    elif agreement < UNSURE:
        warn(
            f"The gradients of the first batches hardly agree (agreement {agreement:.2g}, and {UNSURE:g} or more is "
            f"usual), so the learning rate {rate:g} is a guess, and often too low. If the loss does not fall, try "
            f"{2 * rate:.2g} and {4 * rate:.2g}. Or use larger batches, whose gradients agree more."
        )


def note_default_rate(steps: int, rate: float) -> str:
    """What is said where a run is too short for a search, so that it trains at the default rate."""
    return (
        f"LoRA-GA: {steps} steps are too few to look for a learning rate (at least {LEAST_STEPS}; a search costs 20 to "
        f"40), so training uses {rate:g}"
    )


def _find_edge(group: Group, trials: Trials, first: int, save: Callable[[], None]) -> int:
    """Try rates half a decade apart until a stable and an unstable one are neighbours.

    Args:
        group: What has been measured on the batches of the trials.
        trials: The trials.
        first: The exponent of √10 of the rate to try first.
        save: Writes what has been measured; called after each trial.

    Returns:
        The exponent of √10 of the highest stable rate of those half a decade apart.

    Raises:
        ValueError: No rate is stable.
    """
    exponent = first
    if _try_rate(group, trials, exponent, save):
        while exponent < HIGHEST and _try_rate(group, trials, exponent + 1, save):
            exponent += 1
    else:
        while not _try_rate(group, trials, exponent := exponent - 1, save):
            if exponent == LOWEST:
                raise ValueError(
                    "At every learning rate from 1e-6 to 1e-2 the loss rises or is not finite after the first steps. "
                    "Check the data and the loss, or compute in float32 or bfloat16."
                )
    return exponent


def _try_rate(group: Group, trials: Trials, exponent: float, save: Callable[[], None]) -> bool:
    """Whether the trial at √10^exponent is stable; it is not made again if its result is known."""
    rate = float(f"{10 ** (exponent / 2):.3g}")
    if rate not in group.stable:
        group.stable[rate], passes = trials.stable(rate, group.losses)
        group.passes += passes
        save()
    return group.stable[rate]


def _check(network: nn.Module, data: Any, steps: int, accumulation: int) -> None:
    """Refuse what can be refused before a batch is read.

    Raises:
        TypeError: See `find_rate`.
        ValueError: See `find_rate`.
    """
    refuse_several_processes("find_rate")
    for name, value in (("steps", steps), ("gradient_accumulation_steps", accumulation)):
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: it must be an integer of at least 1.")
    check_data(data)
    if steps < LEAST_STEPS:
        raise ValueError(
            f"steps={steps}: a search costs 20 to 40 steps and needs a run of at least {LEAST_STEPS}. Train longer, or "
            "set the learning rate yourself: 2e-4 is usual."
        )
    refuse_inference_mode(network)
    peft_model_in(network)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(
            "No parameter of the model trains. Load the adapter with is_trainable=True, or make it active by "
            "model.set_adapter."
        )


def refuse_several_processes(caller: str) -> None:
    """Refuse a search in several processes.

    Args:
        caller: What was asked to search.

    Raises:
        ValueError: There are several.
    """
    if processes().size > 1:
        raise ValueError(
            f"{caller} runs in one process, but there are several. Search in one process, on batches as large as those "
            "of all processes together, and give the rate to all."
        )


def check_batches(count: int, accumulation: int) -> None:
    """Refuse data with too few batches for a search.

    Args:
        count: Batches of the data.
        accumulation: Batches in one optimizer step.

    Raises:
        ValueError: They are fewer than those of `FEWEST` steps.
    """
    if count // accumulation < FEWEST:
        of_each = f" of {accumulation} batches each" if accumulation > 1 else ""
        raise ValueError(
            f"The data gives {count} batches with a label, but a search needs those of at least {FEWEST} steps{of_each}"
            f", better {TRIAL}. Give more data or smaller batches, or set the learning rate yourself."
        )


def warn_of_constant(schedule: str) -> None:
    """Warn if a schedule of the learning rate does not decay, as the rule assumes.

    Args:
        schedule: Its name in Transformers.
    """
    if schedule in CONSTANT:
        warn(
            f"The search for a learning rate is made for a schedule that decays to zero, and lr_scheduler_type is "
            f"{schedule}. The rate may be too high: use linear or cosine, or try half of it too."
        )


def _batches_of_steps(
    network: nn.Module, data: Iterable[Any], most: int, accumulation: int, loss_fn: LossFunction | None
) -> list[list[Any]]:
    """The batches of up to `most` steps. Those without a label are left out.

    Returns:
        For each step its batches.

    Raises:
        ValueError: There are fewer than those of `FEWEST` steps.
    """
    found: list[Any] = []
    left_out = 0
    for batch in data:
        if unlabelled(network, batch, loss_fn):
            left_out += 1
        else:
            found.append(batch)
        if len(found) == most * accumulation or (left_out == MOST_UNLABELLED and not found):
            break
    if left_out and not found:
        raise ValueError(f"None of the {left_out} batches has a label. {ALL_IGNORED}")
    check_batches(len(found), accumulation)
    steps = range(len(found) // accumulation)
    return [found[place * accumulation : (place + 1) * accumulation] for place in steps]
