"""`LoraGACallback`: LoRA-GA inside a Transformers trainer."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SchedulerType

from lora_ga.adapter.alignment import Alignment, alignment_of
from lora_ga.adapter.file import adapter_file
from lora_ga.adapter.initialize import initialize
from lora_ga.adapter.load import restore_starts
from lora_ga.adapter.model_card import write_section
from lora_ga.adapter.rate import (
    LEAST_STEPS,
    find_rate,
    note_default_rate,
    refuse_several_processes,
    warn_of_constant,
)
from lora_ga.adapter.save import save_sidecar
from lora_ga.adapter.structure import give_structure
from lora_ga.config import LoraGAConfig
from lora_ga.distributed.sharding import unwrapped
from lora_ga.gradients.loss import LossFunction
from lora_ga.gradients.progress import LOGGER, note_fewer_batches, note_short_run
from lora_ga.gradients.result import GradientEstimate, scalars
from lora_ga.integrations.trainer_data import TrainerLoss, batches_of_trainer, check_training_data
from lora_ga.integrations.trainer_rate import PeakRate, check_data_of_search, found_rate
from lora_ga.integrations.trainer_state import trainer_kept, use_arguments_of_one_batch
from lora_ga.layers.kinds import keep_unpacked
from lora_ga.layers.targets import peft_model_in


class LoraGACallback(TrainerCallback, ExportableState):
    """Initializes the LoRA adapter of a trainer with LoRA-GA.

    It works in every trainer derived from Transformers' `Trainer`, with the trainer's own loss and data. First the
    adapter gets LoRA-GA's structure, in which it computes as before. When training begins, the callback estimates the
    gradient and writes A₀ and B₀ into the adapter. A resumed run takes A₀ and B₀ from its checkpoint. A second call of
    `train` continues with the adapter as it is. In several processes (DistributedDataParallel, FSDP2, DeepSpeed) each
    process estimates on its share of the batches, and all get the same A₀ and B₀.

    There are three ways to use it:

    - `Trainer(..., callbacks=[LoraGACallback()])` gives the structure when the trainer is made.
    - `LoraGACallback().attach(trainer)` gives the structure at once, to the model of a trainer that is made already.
    - `trainer.add_callback(LoraGACallback(trainer=trainer))` does the same in the form that TRL's callbacks have.

    Transformers passes no trainer to its callbacks. In the first way the callback therefore finds the trainer in the
    call stack (see `_trainer_from_call_stack`). In the two others it uses the trainer that it was given.

    Attributes:
        estimate: The estimate that A₀ and B₀ come from; None before training and after a resume.
    """

    def __init__(
        self,
        config: LoraGAConfig = LoraGAConfig(),  # noqa: B008 (frozen)
        *,
        batches: Iterable[Any] | None = None,
        loss_fn: LossFunction | None = None,
        adapter_name: str = "default",
        trainer: Trainer | None = None,
        learning_rate: Literal["auto"] | None = None,
    ) -> None:
        """Make the callback.

        Args:
            config: The settings; `offset` must be "adapter".
            batches: The batches to estimate on, as the trainer's collator makes them; in several processes, this
                process's share of them. By default those that a second loader from the trainer's
                `get_train_dataloader` gives; a random sampler draws them from `config.seed`. The order of training
                does not change.
            loss_fn: `(model, batch) → loss` or `→ (loss, weight)`. By default the trainer's `compute_loss`; then
                batches without a label are left out.
            adapter_name: The adapter.
            trainer: The trainer to which the callback will be added. Its adapter gets the structure now.
            learning_rate: "auto" looks for the peak learning rate after the start, by `lora_ga.find_rate` on the
                trainer's batches, and sets it in the optimizer, the schedule and the trainer's arguments. The ratios
                between the rates of parameter groups stay. The search runs in one process: several are refused before
                the estimate. In a run of less than 50 steps the optimizer's rate stays. A resumed run has the rate of
                its checkpoint, and a second call of `train` that of the first. None: the optimizer's rate.

        Raises:
            TypeError: The trainer's model has no LoRA layers, or `config` is no `LoraGAConfig`.
            ValueError: The settings have `offset="base"`, `learning_rate` is a number, or the trainer is one that
                `attach` refuses.
        """
        LoraGAConfig.check(config)
        if learning_rate not in (None, "auto"):
            raise ValueError(
                f'learning_rate={learning_rate!r}: it must be "auto" or None. Give a number to the trainer: '
                "TrainingArguments(learning_rate=...)."
            )
        if config.offset == "base":
            raise ValueError(
                'LoraGACallback cannot change the base model under a trainer; LoraGAConfig.offset is "base". Use '
                'offset="adapter", or call lora_ga.initialize before the trainer is made.'
            )
        self.config = config
        self.batches = batches
        self.loss_fn = loss_fn
        self.adapter_name = adapter_name
        self.learning_rate = learning_rate
        self.estimate: GradientEstimate | None = None
        self._trainer: Trainer | None = None
        self._filled: Alignment | None = None  # the adapter that has its start
        self._rated: Alignment | None = None  # the adapter that has its rate
        self._found: dict[str, Any] | None = None  # the rate that was found, for checkpoints
        if trainer is not None:
            self._use(trainer)

    def attach(self, trainer: Trainer) -> None:
        """Use the callback in a trainer that is made already.

        The adapter gets its structure now, since the trainer's `on_init_end` event is over. The callback is added to
        the trainer's callbacks unless it is among them. Call this before `trainer.train`.

        Args:
            trainer: The trainer.

        Raises:
            TypeError: The trainer's model has no LoRA layers.
            ValueError: The adapter cannot be aligned, is aligned or trained already; or the trainer uses FSDP 1, or
                has training data from which no batches can be taken.
        """
        self._use(trainer)
        if not _has_callback(trainer, self):
            trainer.add_callback(self)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Give the adapter its structure before an optimizer or a wrapper uses its parameters.

        Args:
            args: The trainer's arguments.
            state: The trainer's state.
            control: The trainer's control.
            model: The model.
            **kwargs: The event's other arguments.

        Raises:
            RuntimeError: No trainer calls this, or another one than the callback is attached to.
            TypeError: There are no LoRA layers.
            ValueError: As `attach`.
        """
        trainer, _ = self._trainer_and_checkpoint(state)
        self._prepare(trainer, model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Estimate the gradient and write A₀ and B₀ in place; in a resumed run restore them from the checkpoint.

        Args:
            args: The trainer's arguments.
            state: The trainer's state.
            control: The trainer's control.
            model: The model.
            train_dataloader: The loader that training will use. The estimate makes its own.
            optimizer: The trainer's optimizer.
            lr_scheduler: The trainer's schedule.
            **kwargs: The event's other arguments.

        Raises:
            RuntimeError: No trainer calls this, or another one than the callback is attached to.
            ValueError: The adapter cannot be aligned; the checkpoint is not found or has no A₀ and B₀; no learning rate
                can be found or set.
        """
        trainer, checkpoint = self._trainer_and_checkpoint(state)
        checkpoint = checkpoint or _checkpoint_of(args, state)
        keep_unpacked(model)
        peak = PeakRate(trainer, optimizer, lr_scheduler)
        if checkpoint is not None:
            restore_starts(model, checkpoint, self.adapter_name)
            if state.is_world_process_zero:
                LOGGER.info(f"LoRA-GA: A₀ and B₀ restored from {checkpoint}")
            self._filled = self._rated = alignment_of(model, self.adapter_name)
            self._found = found_rate(state, self) if self.learning_rate == "auto" else None
            if self._found is not None:
                peak.restore(self._found, state.max_steps)
            elif self.learning_rate == "auto" and state.max_steps >= LEAST_STEPS and state.is_world_process_zero:
                LOGGER.info(
                    "LoRA-GA: the checkpoint has no learning rate that was found, and a resumed run looks for none. So "
                    f"training goes on with the peak rate {max(peak.of_groups):g}"
                )
        else:
            self._begin(trainer, model, train_dataloader, args, state, control, peak)
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # older checkpoints lack it
        self._extend_model_card(trainer)

    def state(self) -> dict[str, Any]:
        """What Transformers keeps in the `trainer_state.json` of a checkpoint: the rate that was found.

        Returns:
            Arguments and attributes of a callback for a resumed run.
        """
        arguments = {"adapter_name": self.adapter_name, "learning_rate": self.learning_rate}
        return {"args": arguments, "attributes": {"_found": self._found}}

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Write A₀ and B₀ into a checkpoint for which `PeftModel.save_pretrained` was not called.

        That is one of a network that contains the `PeftModel`, and one in the shards of FSDP2 (SHARDED_STATE_DICT).

        Args:
            args: The trainer's arguments.
            state: The trainer's state.
            control: The trainer's control.
            model: The model.
            **kwargs: The event's other arguments.
        """
        network = unwrapped(model)
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        folder = checkpoint if self.adapter_name == "default" else checkpoint / self.adapter_name
        in_shards = checkpoint.is_dir() and not adapter_file(folder).is_file()
        if args.should_save and (in_shards or not isinstance(network, PeftModel)):
            save_sidecar(peft_model_in(network), self.adapter_name, folder)

    def _use(self, trainer: Trainer) -> None:
        """Give the adapter of a trainer its structure, and use this trainer from now on."""
        if trainer is not self._trainer:
            self._prepare(trainer, trainer.model)
            self._trainer = trainer

    def _prepare(self, trainer: Trainer, model: Any) -> None:
        """Check a trainer and its adapter, and give the adapter its structure.

        Raises:
            ValueError: The trainer cannot be used, or the adapter has A₀ and B₀ already.
        """
        _check_sharding(trainer, model)
        if self.batches is None:
            check_training_data(trainer)
        alignment = alignment_of(model, self.adapter_name)
        if alignment is not None and any(all(f.weight.any() for f in pair) for pair in alignment.factors.values()):
            rate = ", with the rate that lora_ga.find_rate(model, batches, steps) gives" if self.learning_rate else ""
            raise ValueError(
                f"Adapter {self.adapter_name!r} is already aligned: it comes from lora_ga.initialize or a checkpoint. "
                f"Train it without LoraGACallback{rate}, or give the trainer a fresh adapter."
            )
        give_structure(model, self.config, self.adapter_name)

    def _trainer_and_checkpoint(self, state: TrainerState) -> tuple[Trainer, Path | None]:
        """The trainer whose event this is, and the checkpoint if the call stack gives it.

        Returns:
            The trainer, and the checkpoint's folder or None.

        Raises:
            RuntimeError: The callback is attached to another trainer.
        """
        if self._trainer is None:
            return _trainer_from_call_stack(self)
        if self._trainer.state is not state:
            raise RuntimeError(
                "LoraGACallback is attached to one trainer, but called by another. Make a new LoraGACallback for each "
                "trainer."
            )
        return self._trainer, None

    def _begin(
        self,
        trainer: Trainer,
        model: Any,
        loader: Any,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        peak: PeakRate,
    ) -> None:
        """Write A₀ and B₀ and find the rate, each unless the adapter has it.

        After an error or an interruption the next call of `train` does what is left.
        """
        alignment = alignment_of(model, self.adapter_name)
        starts = alignment is None or alignment is not self._filled
        rates = self.learning_rate == "auto" and (starts or alignment is not self._rated)
        searches = rates and state.max_steps >= LEAST_STEPS
        optimizer_of_trials = None
        if searches:  # before the estimate, which would be lost
            refuse_several_processes('LoraGACallback(learning_rate="auto")')
            peak.check()
            optimizer_of_trials = peak.optimizer_of_trials(model)
            check_data_of_search(loader, self.batches, args.gradient_accumulation_steps)
            warn_of_constant(SchedulerType(args.lr_scheduler_type).value)
        if starts:
            self._found = None
            config = self._config_for(args, state, None if searches else peak.rate)
            self.estimate = self._initialize(trainer, model, loader, config)
            alignment = self._filled = alignment_of(model, self.adapter_name)
            numbers = scalars(self.estimate, {} if alignment is None else alignment.ranks)
            for tracker in _trackers(trainer, args):
                tracker.on_log(args, state, control, model=model, logs=numbers)
        if searches:
            rate = self._find_rate(trainer, model, loader, args, state, optimizer_of_trials)
            peak.note_given_schedule(rate)
            self._found = peak.set(rate, peak.of_groups_at(rate), state.max_steps)
        elif rates:
            LOGGER.info(note_default_rate(state.max_steps, peak.rate))
        self._rated = alignment

    def _config_for(self, args: TrainingArguments, state: TrainerState, rate: float | None) -> LoraGAConfig:
        """The settings for a run of this length. Notes what the user may want to change, in the first process.

        Args:
            args: The trainer's arguments.
            state: The trainer's state.
            rate: The peak learning rate; None if a search will find one.

        Returns:
            The settings.
        """
        if not state.is_world_process_zero:
            return self.config if self.batches is not None else self.config.resolved(_batches_of(args, state))
        if rate is not None and str(args.optim).rpartition(".")[2].lower().startswith("adamw"):
            note_short_run(self.config, state.max_steps, rate)
        return self.config if self.batches is not None else note_fewer_batches(self.config, _batches_of(args, state))

    def _initialize(self, trainer: Trainer, model: Any, loader: Any, config: LoraGAConfig) -> GradientEstimate:
        """Estimate the gradient with the trainer's loss, data and autocast, and write A₀ and B₀."""
        later = self._later(trainer)
        with self._reading(trainer, loader) as batches:
            loss = TrainerLoss(trainer, model, self.adapter_name, self.loss_fn, later)
            return initialize(model, batches, config, loss_fn=loss, adapter_name=self.adapter_name)

    def _find_rate(
        self,
        trainer: Trainer,
        model: Any,
        loader: Any,
        args: TrainingArguments,
        state: TrainerState,
        optimizer: Callable[[float], Optimizer] | None,
    ) -> float:
        """Look for the learning rate with the trainer's loss, data and autocast."""
        with self._reading(trainer, loader) as batches:
            return find_rate(
                model,
                batches,
                state.max_steps,
                gradient_accumulation_steps=args.gradient_accumulation_steps,
                loss_fn=TrainerLoss(trainer, model, None, self.loss_fn),
                optimizer=optimizer,
            )

    @contextlib.contextmanager
    def _reading(self, trainer: Trainer, loader: Any) -> Iterator[Iterable[Any]]:
        """The batches to measure on, while the trainer is kept as it is, with its autocast.

        Args:
            trainer: The trainer.
            loader: The loader that training will use.

        Yields:
            The batches.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(trainer_kept(trainer, self.config.seed))
            use_arguments_of_one_batch(trainer)
            batches = self.batches
            if batches is None:
                batches = stack.enter_context(batches_of_trainer(trainer, loader))
            stack.enter_context(trainer.accelerator.autocast())
            yield batches

    def _later(self, trainer: Trainer) -> list[str]:
        """The kinds of callbacks, Transformers' own left out, that act at the beginning of training after this one."""
        callbacks = trainer.callback_handler.callbacks
        place = next((place for place, each in enumerate(callbacks) if each is self), len(callbacks))
        return [
            type(each).__name__
            for each in callbacks[place + 1 :]
            if type(each).on_train_begin is not TrainerCallback.on_train_begin
            and not type(each).__module__.startswith("transformers.")
        ]

    def _extend_model_card(self, trainer: Trainer) -> None:
        """Let the trainer's `create_model_card` add the section on LoRA-GA to the card that it writes.

        No event does this: `create_model_card` fires none and writes the whole file anew, and `push_to_hub` calls it
        after its event `on_push_begin` and just before the upload.
        """
        if "create_model_card" in vars(trainer):  # a second call of `train`
            return
        create = trainer.create_model_card

        @functools.wraps(create)
        def create_model_card(*args: Any, **kwargs: Any) -> None:
            create(*args, **kwargs)
            if trainer.is_world_process_zero() and self._filled is not None:
                write_section(Path(trainer.args.output_dir), self._filled.summary)

        trainer.create_model_card = create_model_card


def _batches_of(args: TrainingArguments, state: TrainerState) -> int | None:
    """How many batches training reads in all processes; None if that is not known."""
    return state.max_steps * args.gradient_accumulation_steps * args.world_size if state.max_steps > 0 else None


def _has_callback(trainer: Trainer, callback: TrainerCallback) -> bool:
    """Whether a callback is among those of a trainer, which has none before it has made its handler."""
    handler = getattr(trainer, "callback_handler", None)
    return handler is not None and any(each is callback for each in handler.callbacks)


def _trainer_from_call_stack(callback: TrainerCallback) -> tuple[Trainer, Path | None]:
    """Find the trainer that calls a callback, and the checkpoint that it resumes from.

    This is the fallback for `Trainer(..., callbacks=[LoraGACallback()])`, where there is no trainer yet to attach. The
    callback needs the trainer, whose `compute_loss` it uses, but Transformers passes its callbacks neither the trainer
    nor the checkpoint. So both are read from the calls in progress: the trainer is the innermost local variable `self`
    that is a trainer with this callback; the checkpoint is the local variable `resume_from_checkpoint` in the innermost
    of that trainer's methods which has one. A test checks this for the installed version of Transformers.

    Returns:
        The trainer, and the checkpoint's folder or None.

    Raises:
        RuntimeError: No trainer that has the callback is calling.
    """
    trainer: Trainer | None = None
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if trainer is None and isinstance(caller, Trainer) and _has_callback(caller, callback):
            trainer = caller
        if trainer is not None and caller is trainer and "resume_from_checkpoint" in frame.f_locals:
            checkpoint = frame.f_locals["resume_from_checkpoint"]
            return trainer, None if checkpoint is None else Path(checkpoint)
        frame = frame.f_back
    if trainer is None:
        raise RuntimeError(
            "LoraGACallback was not called by a transformers.Trainer that has it among its callbacks. Give it to a "
            "trainer, name the trainer with attach(trainer), or call lora_ga.initialize."
        )
    return trainer, None


def _checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path | None:
    """Find the checkpoint that training resumes from, without the call stack.

    Transformers restores the number of steps from the checkpoint, but keeps no path. The checkpoint is searched in
    `args.resume_from_checkpoint` and in `args.output_dir`.

    Returns:
        The checkpoint's folder; None if training begins at step 0.

    Raises:
        ValueError: Training resumes, but neither folder is a checkpoint of that step.
    """
    if state.global_step == 0:
        return None
    folders = [Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"]
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, Path(args.resume_from_checkpoint))
    for folder in folders:
        file = folder / TRAINER_STATE_NAME
        if file.is_file() and TrainerState.load_from_json(str(file)).global_step == state.global_step:
            return folder
    raise ValueError(
        f"Training resumes at step {state.global_step}, but LoraGACallback finds no checkpoint of that step to take A₀ "
        f"and B₀ from; it looked in {', '.join(map(str, folders))}. Set TrainingArguments.resume_from_checkpoint to "
        "the folder that train(resume_from_checkpoint=...) is given."
    )


def _check_sharding(trainer: Trainer, model: Any) -> None:
    """Refuse a trainer that shards the model by FSDP 1, and DeepSpeed ZeRO-3 with an injected adapter.

    Raises:
        ValueError: It is one of these.
    """
    deepspeed = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3 and not isinstance(peft_model_in(model), PeftModel):
        raise ValueError(
            "LoraGACallback does not fill injected adapters (model.add_adapter) under DeepSpeed ZeRO-3: Transformers "
            "would save the trained halves of A and B alone. Make the adapter with peft.get_peft_model."
        )
    if trainer.is_fsdp_enabled and not getattr(trainer.accelerator, "is_fsdp2", False):
        raise ValueError(
            "LoraGACallback does not fill adapters in FSDP 1, which flattens parameters into one. Set fsdp_version: 2 "
            "in the Accelerate configuration, or call lora_ga.initialize before the trainer is made."
        )


def _trackers(trainer: Trainer, args: TrainingArguments) -> list[TrainerCallback]:
    """The trainer's callbacks that write to the trackers of `report_to`."""
    # `Trainer.log` would call them too, but also add the numbers to the log history, which every checkpoint contains.
    kinds: tuple[type, ...] = tuple(get_reporting_integration_callbacks(args.report_to))
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kinds)]
