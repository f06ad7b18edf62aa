"""Suite files: their fields, and the checks when they are read. This module does not import torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lora_ga.experiments.suites import fields
from lora_ga.experiments.suites.fields import FLAG, MAPPING, NAMES, POINTS, POSITIVE, RATES, TEXT, TEXTS, Kind, whole
from lora_ga.experiments.tasks import KINDS, evaluated_metrics, split_metrics

# In a checkout, and in an installed package.
RECIPES = (Path(__file__).parents[4] / "recipes", Path(__file__).parents[2] / "recipes")
# Setting → its name in records and in digests, which keep the names of the first version.
RECORDED = {
    "batch_size": "rows",
    "gradient_accumulation_steps": "parts",
    "gradient_checkpointing": "recompute",
    "eval_steps": "every",
}


@dataclass(frozen=True)
class Settings:
    """Settings that are the same for all methods, unless a task or a variant changes them.

    Attributes:
        steps: Optimizer steps.
        batch_size: Rows of one forward pass. An optimizer step takes batch_size × gradient_accumulation_steps rows.
        length: Largest number of tokens of a row (for the kind text: the exact number).
        rank: The rank r of every adapter.
        alpha: LoRA's α.
        samples: Rows for initialisations that read data.
        warmup: Share of the steps in which the learning rate rises; afterwards it follows a cosine.
        eval_steps: Steps between two evaluations on the report split.
        train_rows: Largest number of training rows.
        tune_rows: Training rows that are held out to choose the learning rate.
        report_rows: Largest number of rows of the reported split.
        head_rate: The learning rate of a new classification head, for every method.
        gradient_accumulation_steps: Forward passes whose gradients are added up for one optimizer step.
        dtype: Dtype of the base model and of the arithmetic; the trained parameters are kept in float32.
        gradient_checkpointing: Whether the backward pass computes activations again instead of keeping them.
    """

    steps: int = 200
    batch_size: int = 8
    length: int = 128
    rank: int = 8
    alpha: float = 16.0
    samples: int = 64
    warmup: float = 0.03
    eval_steps: int = 20
    train_rows: int = 4000
    tune_rows: int = 64
    report_rows: int = 64
    head_rate: float = 1e-3
    gradient_accumulation_steps: int = 1
    dtype: str = "float32"
    gradient_checkpointing: bool = False

    @property
    def effective_batch_size(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps

    def recorded(self) -> dict[str, Any]:
        """The settings as records name them; their "rows" are those of one optimizer step."""
        values = {RECORDED.get(name, name): value for name, value in dataclasses.asdict(self).items()}
        return values | {"rows": self.effective_batch_size}


@dataclass(frozen=True)
class Task:
    """A model, its data and its metrics.

    Attributes:
        kind: A name of `tasks.KINDS`.
        model: A reference to the model: `data:PATH` in the data folder, `package:PATH` in an installed package,
            `gguf:PACKAGE/FILE` for a GGUF file in an installed package, a local folder, or `hub:NAME`.
        files: The use of a file ("train", for example) → a reference of the same form; a data set of the hub is
            `hub:NAME:SPLIT` or `hub:NAME:CONFIGURATION:SPLIT`. `#11-510` at the end stands for these rows of it.
        columns: The meaning of a column → its name in the file.
        metric: The reported metric.
        also: More metrics of the report that are shown beside it.
        choose: The metric that chooses the learning rate on the tuning split; by default the reported one.
        labels: Number of classes.
        input: Template of the text that the model reads, with {meaning} in place of a column.
        target: Template of the text that the model learns to write.
        words: The word that the model learns to write for each label, instead of a target.
        clean: A name of `tasks.instruct.CLEANERS`, which selects and shortens rows.
        evaluation: How the answers of the trained model are evaluated: `by` names a module of `judging`, and the other
            entries are its options.
        fields: Expected values in the model's configuration, checked before anything runs.
        seconds: Rough time of one cell on one core, for the estimate of `--dry-run`.
        settings: Changes of the suite's settings.
    """

    kind: str
    model: str
    files: Mapping[str, str]
    columns: Mapping[str, str] = field(default_factory=dict)
    metric: str = "loss"
    also: Sequence[str] = ()
    choose: str = ""
    labels: int = 0
    input: str = ""
    target: str = ""
    words: Sequence[str] = ()
    clean: str = ""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 60.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chooser(self) -> str:
        """The metric that chooses the learning rate."""
        return self.choose or self.metric


@dataclass(frozen=True)
class Variant:
    """One line of a table: a method with its options and its learning rates.

    Attributes:
        method: A name of `methods.METHODS`; by default the label's.
        options: Options of the method.
        settings: Changes of the suite's settings.
        rates: The first rates of the grid, as exponents of √10: -6 is 1e-3, -5 is 3.16e-3.
        rate_of: Another variant, whose best rate on the same task is used instead of a grid.
        tasks: The tasks on which the variant runs; by default all.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    rates: Sequence[int] = ()
    rate_of: str | None = None
    tasks: Sequence[str] | None = None


@dataclass(frozen=True)
class Suite:
    """A suite file.

    Attributes:
        name: The name of its file, without the ending.
        title: A short description.
        tasks: Name → task.
        methods: Label → variant.
        settings: The settings of all tasks and variants.
        seeds: Number of runs at the best rate; the first one is from the search for it.
        paper_rate: The learning rate of all methods in the paper's protocol; None: the suite has no such protocol.
        unswept_rates: Learning rates at which every variant runs too, with all seeds, whatever the grid finds.
        quarter_decades: Whether the search ends with the two rates a quarter of a decade beside the best.
    """

    name: str
    title: str
    tasks: Mapping[str, Task]
    methods: Mapping[str, Variant]
    settings: Settings = Settings()
    seeds: int = 3
    paper_rate: float | None = None
    unswept_rates: Sequence[float] = ()
    quarter_decades: bool = False

    def settings_of(self, task: str, label: str) -> Settings:
        """The suite's settings with the changes of the task and the variant; those of the variant win."""
        changes = {**self.tasks[task].settings, **self.methods[label].settings}
        return dataclasses.replace(self.settings, **changes)

    def lines(self) -> list[tuple[str, str]]:
        """Every pair (task, label) of the suite, in the order of the file."""
        return [
            (task, label)
            for task in self.tasks
            for label, variant in self.methods.items()
            if variant.tasks is None or task in variant.tasks
        ]


def available() -> dict[str, Path]:
    """The suites that come with this package, name → file."""
    folder = next((folder for folder in RECIPES if folder.is_dir()), RECIPES[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def check_size(value: Any, most: int = 100_000) -> Any:
    """Refuse a nested value of very many parts: a YAML file of a few lines can name one part a billion times.

    Args:
        value: What was read from a file.
        most: The largest number of parts, each counted as often as it is named.

    Returns:
        The value.

    Raises:
        ValueError: It has more parts.
    """
    left, count = [value], 0
    while left:
        each = left.pop()
        count += 1
        if count > most:
            raise ValueError(f"more than {most} values, counting each alias (*name) as what it stands for")
        if isinstance(each, dict):
            left += [*each, *each.values()]
        elif isinstance(each, (list, tuple, set)):
            left += each
    return value


def load_suite(name: str) -> Suite:
    """Reads a suite.

    Args:
        name: The name of a suite of the package, or the path of a YAML file.

    Returns:
        The suite, checked.

    Raises:
        ValueError: There is no such suite, or its file has an unknown key or a wrong value.
    """
    known = available()
    path = Path(name) if name.endswith((".yaml", ".yml")) else known.get(name)
    if path is None or not path.is_file():
        run = (
            f" This folder is a run; `lora-ga compare {name}` shows it." if (Path(name) / "run.json").is_file() else ""
        )
        raise ValueError(
            f"{name}: there is no such suite.{run} The suites are {', '.join(known)}; or give a .yaml file."
        )
    try:
        values = check_size(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: could not be read as YAML ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no mapping; a suite has the keys {', '.join(names(Suite))}.")
    try:
        return _suite(path.stem, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def names(kind: Any) -> list[str]:
    """The fields of a dataclass."""
    return [item.name for item in dataclasses.fields(kind)]


# What the fields of a suite file may hold.
VALUES: dict[Any, Mapping[str, Kind]] = {
    Settings: fields.SETTINGS,
    Task: {
        "kind": fields.one_of(KINDS),
        **dict.fromkeys(("model", "metric", "choose", "input", "target", "clean"), TEXT),
        **dict.fromkeys(("files", "columns"), NAMES),
        **dict.fromkeys(("also", "words"), TEXTS),
        **dict.fromkeys(("evaluation", "fields", "settings"), MAPPING),
        "labels": whole(0),
        "seconds": POSITIVE,
    },
    Variant: {
        **dict.fromkeys(("method", "rate_of"), TEXT),
        **dict.fromkeys(("options", "settings"), MAPPING),
        "rates": POINTS,
        "tasks": TEXTS,
    },
    Suite: {
        "title": TEXT,
        **dict.fromkeys(("tasks", "methods"), MAPPING),
        "seeds": whole(1),
        "paper_rate": POSITIVE,
        "unswept_rates": RATES,
        "quarter_decades": FLAG,
    },
}


def _suite(name: str, values: dict[str, Any]) -> Suite:
    _refuse_unknown(values, names(Suite), "the suite")
    given = fields.check_values({"title": "", **_given(values)}, VALUES[Suite], "the suite")
    given["name"] = name
    given["settings"] = Settings(**_settings(given.get("settings", {}), "settings"))
    given["tasks"] = {key: _task(value, f"tasks.{key}") for key, value in given.get("tasks", {}).items()}
    given["methods"] = {
        key: _variant(key, {} if value is None else value, f"methods.{key}")
        for key, value in given.get("methods", {}).items()
    }
    if not given["tasks"] or not given["methods"]:
        raise ValueError("a suite needs at least one task under 'tasks' and one variant under 'methods'.")
    suite = Suite(**given)
    for label, variant in suite.methods.items():
        _check_variant(suite, label, variant)
    return suite


def _task(values: Any, where: str) -> Task:
    given = _read(Task, values, where)
    lacking = [name for name in ("kind", "model", "files") if name not in given]
    if lacking:
        raise ValueError(f"{where}: has no {', '.join(lacking)}. A task must have kind, model and files.")
    given["settings"] = _settings(given.get("settings", {}), f"{where}.settings")
    given["evaluation"] = fields.check_values(given.get("evaluation", {}), fields.EVALUATION, f"{where}.evaluation")
    task = Task(**given)
    _check_metrics(task, where)
    return task


def _check_metrics(task: Task, where: str) -> None:
    """Refuses metrics that the task does not have. Only those of the splits can choose a learning rate."""
    of_splits = split_metrics(task)
    reported = (*of_splits, *evaluated_metrics(task))
    for name, metric in (("metric", task.metric), *(("also", each) for each in task.also)):
        if metric not in reported:
            raise ValueError(
                f"{where}: {name} names {metric!r}; the metrics of this task of the kind {task.kind} are "
                f"{', '.join(reported)}."
            )
    if task.chooser not in of_splits:
        said = f"choose is {task.choose!r}" if task.choose else f"choose is not given, so it is {task.metric!r}"
        raise ValueError(
            f"{where}: {said}; on the tuning split a task of the kind {task.kind} has {', '.join(of_splits)}. Set "
            "choose to one of them."
        )


def _variant(label: str, values: Any, where: str) -> Variant:
    given = {"method": label, **_read(Variant, values, where)}
    given["settings"] = _settings(given.get("settings", {}), f"{where}.settings")
    return Variant(**given)


def _settings(values: Any, where: str) -> dict[str, Any]:
    _refuse_old_names(values, where)
    return _read(Settings, values, where)


def _check_variant(suite: Suite, label: str, variant: Variant) -> None:
    for task in variant.tasks or ():
        _refuse_unknown({task: None}, list(suite.tasks), f"methods.{label}.tasks")
    if variant.rate_of is None and not variant.rates:
        raise ValueError(
            f"methods.{label}: rates is {list(variant.rates)}; it must list whole exponents of √10 (-6 is 1e-3), or "
            "rate_of must name another variant."
        )
    if variant.rate_of is not None:
        _refuse_unknown({variant.rate_of: None}, list(suite.methods), f"methods.{label}.rate_of")
        if suite.methods[variant.rate_of].rate_of is not None:
            raise ValueError(f"methods.{label}: rate_of names {variant.rate_of}, which has no rates either.")


def _read(kind: Any, values: Any, where: str) -> dict[str, Any]:
    """Checks a mapping; the error for an unknown key lists the known ones.

    Returns:
        Name → value of the fields of the dataclass `kind` that are given.

    Raises:
        ValueError: A key or a value is not allowed.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds {values!r}, but it must map {', '.join(names(kind))} to values.")
    _refuse_unknown(values, names(kind), where)
    return fields.check_values(_given(values), VALUES[kind], where)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys with a value: a key with nothing after it stands for the default."""
    return {key: value for key, value in values.items() if value is not None}


def _refuse_old_names(values: Any, where: str) -> None:
    for new, old in RECORDED.items():
        if isinstance(values, dict) and old in values:
            raise ValueError(
                f"{where}: {old} has a new name, {new}. In place of rows and parts give batch_size, the rows of one "
                "forward pass (rows ÷ parts), and gradient_accumulation_steps (parts)."
            )


def _refuse_unknown(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(unknown)}. The known are {', '.join(known)}.")
