"""A task of any kind, ready for the training loop: the base model, batches and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor, nn

from lora_ga.experiments.methods.base import Batch
from lora_ga.experiments.suites.sources import Sources
from lora_ga.experiments.suites.spec import Settings, Task
from lora_ga.version import dtype_setting

HEADS = frozenset({"classifier", "score"})  # new heads, by the names that PEFT trains and saves
FIELDS = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")


@dataclass(frozen=True)
class PreparedTask:
    """A base model and its data.

    Attributes:
        base: The pretrained model; a new head is initialised from the seed.
        task_type: PEFT's name for the kind of task.
        train_batches: The training batches, in an order drawn from the seed; an endless iterator.
        start_batches: Batches for initialisations that read data, drawn with a separate random generator.
        splits: "tune" and "report" → batches.
        loss: The task's loss of logits and a batch, without terms that a method adds.
        measure: Pairs of logits and batch of a whole split → its metrics.
        for_seed: Another seed → the same task with it, without reading the data again.
        evaluate: The trained model → more metrics to report; None if the metrics of the splits are all.
    """

    base: Any
    task_type: str
    train_batches: Iterator[Batch]
    start_batches: Sequence[Batch]
    splits: Mapping[str, Sequence[Batch]]
    loss: Callable[[Tensor, Batch], Tensor]
    measure: Callable[[Iterable[tuple[Tensor, Batch]]], dict[str, float]]
    for_seed: Callable[[int], PreparedTask]
    evaluate: Callable[[Any], dict[str, float]] | None = None

    def targets(self) -> list[str]:
        """The last name of every linear layer except heads: PEFT's "all-linear", for methods that do not accept it."""
        last = {name.rpartition(".")[2] for name, m in self.base.named_modules() if isinstance(m, nn.Linear)}
        return sorted(last - HEADS - {"lm_head"})


def check_model(task: Task, sources: Sources) -> str:
    """Reads the model's configuration and compares it with what the task expects.

    Args:
        task: The task.
        sources: Resolves the references to models and files.

    Returns:
        A text with the model and its fields.

    Raises:
        ValueError: There is no such model, the hub cannot be reached, or a field has another value.
    """
    fields = ", ".join(f"{name} {value}" for name, value in task.fields.items())
    if sources.is_out_of_reach(task.model):
        return f"model {task.model} (wanted: {fields}; not checked)"
    place = sources.model(task.model)
    try:
        config = transformers.AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        way = sources.hint(task.model) if task.model.startswith("hub:") else "Give a folder with a model in it."
        raise ValueError(f"{task.model}: its config.json could not be loaded ({error}). {way}") from error
    for name, value in task.fields.items():
        if getattr(config, name, None) != value:
            raise ValueError(
                f"{task.model}: {name} is {getattr(config, name, None)!r}, but the suite expects {value!r}. Give "
                "that model, or correct the suite file."
            )
    shown = ", ".join(f"{name} {getattr(config, name)}" for name in FIELDS if getattr(config, name, None) is not None)
    return f"model {task.model} ({config.model_type}: {shown})"


def load_model(loader: str, folder: Any, settings: Settings = Settings(), **more: Any) -> Any:  # noqa: B008 (frozen)
    """Loads a pretrained model, without Transformers' warning that the head is new."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = getattr(transformers, loader).from_pretrained(folder, **dtype_setting(settings.dtype), **more)
    finally:
        transformers.logging.set_verbosity(before)
    if settings.gradient_checkpointing:
        # The name before Transformers 5.23, and since.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model
