"""LoRA-GA inside a Transformers trainer: the structure before the optimizer exists, the start in place, late."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from lora_ga.adapter.initialize import initialize
from lora_ga.adapter.load import restore_starts
from lora_ga.adapter.model_card import write_section
from lora_ga.adapter.save import Alignment
from lora_ga.adapter.write import give_structure
from lora_ga.config import LoraGAConfig
from lora_ga.gradients.isolation import put_aside
from lora_ga.gradients.loss import LossFunction
from lora_ga.gradients.result import GradientEstimate, scalars

# Where TRL's trainers collect what they log next: losses of the estimate are not to be averaged into it.
COLLECTED = ("_metrics", "_stored_metrics", "_logs", "_pending_metrics", "_pending_extra_logs")


class LoraGACallback(TrainerCallback):
    """Starts the adapter of a trainer where full fine-tuning would go.

    Works in every trainer built on Transformers', with its own loss and data: when the trainer is made the adapter gets
    its structure, computing as before; when training begins the gradient is estimated and the adapter filled in place.
    A resumed run takes its start from the checkpoint, and a second call of `train` goes on from where the first ended.
    In several processes (DistributedDataParallel, FSDP2, DeepSpeed) each estimates on its share of the batches, and all
    have one start.

    Attributes:
        estimate: What the adapter was started from; None before training and after a resume.
    """

    def __init__(
        self,
        config: LoraGAConfig = LoraGAConfig(),  # noqa: B008 (frozen)
        *,
        batches: Iterable[Any] | None = None,
        loss_fn: LossFunction | None = None,
        adapter_name: str = "default",
    ) -> None:
        """What to start from.

        Args:
            config: The settings; `offset` must be "adapter".
            batches: What to estimate on, as the trainer's collator would make it. By default a shuffled choice of the
                training data, in batches of `per_device_train_batch_size`; the order of training does not move. In
                several processes: this process's own share of them.
            loss_fn: `(model, batch) → loss` or `→ (loss, weight)`. By default the trainer's own `compute_loss`.
            adapter_name: The adapter.

        Raises:
            ValueError: The settings ask for `offset="base"`.
        """
        if config.offset == "base":
            raise ValueError(
                'LoraGACallback cannot change the base model under a trainer; LoraGAConfig.offset is "base". Use '
                'offset="adapter", or call lora_ga.initialize before the trainer is made.'
            )
        self.config = config
        self.batches = batches
        self.loss_fn = loss_fn
        self.adapter_name = adapter_name
        self.estimate: GradientEstimate | None = None
        self._filled: Alignment | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Give the adapter its structure, before an optimizer or a wrapper sees its parameters.

        Args:
            args: The trainer's arguments.
            state: Its state.
            control: Its control.
            model: The model.
            **kwargs: The rest of the event.

        Raises:
            TypeError: The model is not a `PeftModel`.
            ValueError: The adapter cannot be aligned, is aligned or trained already, or the trainer cannot be used.
        """
        trainer, _ = _caller(self)
        _check_trainer(trainer, self.batches is None)
        alignment: Alignment | None = getattr(_config(model, self.adapter_name), "alignment", None)
        if alignment is not None and any(all(f.weight.any() for f in pair) for pair in alignment.factors.values()):
            raise ValueError(
                f"Adapter {self.adapter_name!r} is already aligned: it comes from lora_ga.initialize or a checkpoint. "
                "Train it without LoraGACallback, or give the trainer a fresh adapter."
            )
        give_structure(model, self.config, self.adapter_name)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Estimate and fill the adapter in place; on a resume restore its start from the checkpoint.

        Args:
            args: The trainer's arguments.
            state: Its state.
            control: Its control.
            model: The model.
            train_dataloader: The loader of the training data, whose data set and collator are used.
            **kwargs: The rest of the event.
        """
        trainer, checkpoint = _caller(self)
        alignment: Alignment | None = getattr(_config(model, self.adapter_name), "alignment", None)
        if checkpoint is not None:
            restore_starts(model, Path(checkpoint), self.adapter_name)
        elif alignment is None or alignment is not self._filled:
            batches = _batches(trainer, train_dataloader, self.config) if self.batches is None else self.batches
            with trainer.accelerator.autocast():
                self.estimate = initialize(
                    model, batches, self.config, loss_fn=self._loss(trainer, model), adapter_name=self.adapter_name
                )
            self._report(trainer, model.peft_config[self.adapter_name].alignment)
        self._filled = model.peft_config[self.adapter_name].alignment
        if "create_model_card" not in vars(trainer):
            trainer.create_model_card = self._with_section(trainer)

    def _loss(self, trainer: Trainer, model: Any) -> LossFunction:
        """The loss of a batch, as the trainer computes it, with nothing left behind in the trainer."""
        probe = copy.copy(trainer)
        for name in COLLECTED:
            if hasattr(trainer, name):
                setattr(probe, name, copy.deepcopy(getattr(trainer, name)))

        def loss(adapted: nn.Module, batch: Any) -> Tensor | tuple[Tensor, float]:
            inputs = probe._prepare_inputs(batch)
            with probe.compute_loss_context_manager():
                found = probe.compute_loss(model, inputs) if self.loss_fn is None else self.loss_fn(adapted, inputs)
            put_aside(model, self.adapter_name)
            return found

        return loss

    def _with_section(self, trainer: Trainer) -> Callable[..., None]:
        """The trainer's `create_model_card`, ending with the section on the start."""
        write = trainer.create_model_card

        @functools.wraps(write)
        def create_model_card(*args: Any, **kwargs: Any) -> None:
            write(*args, **kwargs)
            if trainer.is_world_process_zero() and self._filled is not None:
                write_section(Path(trainer.args.output_dir), self._filled.summary)

        return create_model_card

    def _report(self, trainer: Trainer, alignment: Alignment) -> None:
        """Send the estimate's numbers to the trackers that `report_to` names."""
        assert self.estimate is not None, "called after the estimate"
        trackers = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
        for tracker in trainer.callback_handler.callbacks:
            if isinstance(tracker, trackers):
                logs = scalars(self.estimate, alignment.ranks)
                tracker.on_log(trainer.args, trainer.state, trainer.control, model=trainer.model, logs=logs)


def _config(model: Any, adapter_name: str) -> Any:
    """The configuration of an adapter; None if the model does not have it."""
    return getattr(model, "peft_config", {}).get(adapter_name)


def _caller(callback: LoraGACallback) -> tuple[Trainer, str | None]:
    """The trainer whose event this is, and the checkpoint it resumes from, if it does.

    Transformers hands callbacks neither, and the loss is the trainer's: both are read from the calls in progress.

    Returns:
        The trainer, and a folder or None.

    Raises:
        RuntimeError: No trainer that has the callback is calling.
    """
    frame = inspect.currentframe()
    while frame is not None:
        trainer = frame.f_locals.get("self")
        handler = getattr(trainer, "callback_handler", None) if isinstance(trainer, Trainer) else None
        if handler is not None and any(one is callback for one in handler.callbacks):
            return trainer, frame.f_locals.get("resume_from_checkpoint")
        frame = frame.f_back
    raise RuntimeError(
        "LoraGACallback was called by something else than a transformers.Trainer that has it among its callbacks. Give "
        "it to a trainer, or call lora_ga.initialize."
    )


def _check_trainer(trainer: Trainer, uses_its_data: bool) -> None:
    """Refuse a trainer whose model or data the callback cannot handle.

    Raises:
        ValueError: It is one.
    """
    if trainer.is_fsdp_enabled and not getattr(trainer.accelerator, "is_fsdp2", False):
        raise ValueError(
            "LoraGACallback does not fill adapters in FSDP 1, which flattens parameters into one. Set fsdp_version: 2 "
            "in the Accelerate configuration, or call lora_ga.initialize before the trainer is made."
        )
    data = trainer.train_dataset
    if not uses_its_data or data is None:
        return
    name = type(trainer).__name__
    if hasattr(data, "__len__") and len(data) == 0:
        raise ValueError(f"The training data of the {name} is empty; the gradient needs at least one example.")
    if isinstance(data, TorchIterableDataset) and not _streams(data):
        raise ValueError(
            f"The training data is a {type(data).__name__}, an iterable that may not begin anew, so taking from it "
            "could move the training. Pass LoraGACallback(batches=...)."
        )
    if isinstance(data, TorchIterableDataset) and hasattr(trainer, "num_generations_eval"):
        raise ValueError(
            f"A {name} groups its generations by prompt, which cannot be done here with streamed data. Pass "
            "LoraGACallback(batches=...), each batch with every prompt num_generations_eval times."
        )


def _streams(data: Any) -> bool:
    """Whether iterable data begins anew with every iteration, as a data set of the datasets library does."""
    import datasets

    return isinstance(data, datasets.IterableDataset)


def _batches(trainer: Trainer, loader: Any, config: LoraGAConfig) -> Iterable[Any]:
    """This process's share of the training data, by a loader of its own; shuffled where data has a length.

    Args:
        trainer: Gives the batch size, and which process this is.
        loader: The trainer's own loader, which has the data set without unused columns, and the collator.
        config: The seed of the choice, and how many batches are wanted at most.

    Returns:
        Every so-many-th batch of the choice, which is the same in all processes.
    """
    args, data = trainer.args, loader.dataset
    rank, size, count = args.process_index, args.world_size, args.per_device_train_batch_size
    generator = torch.Generator().manual_seed(config.seed)
    if isinstance(data, TorchIterableDataset):
        stream = DataLoader(data, batch_size=count, collate_fn=loader.collate_fn, generator=generator)
        return itertools.islice(stream, rank, None, size)
    sampler: Any = RandomSampler(data, generator=generator)
    group = getattr(trainer, "num_generations_eval", None)
    if group is not None:  # GRPO and its kin compare several answers to one prompt, which their sampler repeats
        count, sampler = group * max(1, args.generation_batch_size // group), trainer._get_eval_sampler(data)
    most = None if config.max_batches is None else config.max_batches + size
    chosen = list(itertools.islice(BatchSampler(sampler, count, drop_last=False), rank, most, size))
    return DataLoader(data, batch_sampler=chosen, collate_fn=loader.collate_fn, generator=generator)
