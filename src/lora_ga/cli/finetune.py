"""One fine-tuning run: from the options to a folder with adapter, estimate and record."""

import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from transformers.integrations import get_available_reporting_integrations

import lora_ga
from lora_ga.adapter.alignment import alignment_of
from lora_ga.adapter.model_card import CARD
from lora_ga.adapter.rate import LEAST_STEPS, note_default_rate, steps_of_groups, warn_of_constant
from lora_ga.cli import checkpoints, tasks
from lora_ga.cli.callbacks import (
    MEASURED,
    LabelsInCheckpoints,
    LossAndTimeLogger,
    OptimizerGuard,
    diverged_at,
    logged_seconds,
    write_labels,
)
from lora_ga.cli.columns import columns_of
from lora_ga.cli.data import EstimateBatches, Labels
from lora_ga.cli.models import add_adapter, train_in_float32
from lora_ga.cli.options import LEARNING_RATES, Job
from lora_ga.cli.record import model_card, run_record, usage
from lora_ga.cli.settings import library_config
from lora_ga.experiments.records.runs import RECORD, write_json_atomically
from lora_ga.files import ADAPTER, MODEL_FILES, new_folder, parse_json, read_labels, write_atomically
from lora_ga.gradients.progress import LOGGER, note_fewer_batches, note_short_run
from lora_ga.version import is_before


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        record: The record, as in `run.json`.
        result: The folder with the adapter or the model.
    """

    record: dict[str, Any]
    result: Path


def finetune(job: Job, checkpoint: Path | None = None) -> Outcome:
    """Trains and writes the folder of the run. All checks come before the first file is written.

    Args:
        job: The options.
        checkpoint: The checkpoint of an unfinished run, to resume it.

    Returns:
        The record, and the folder of the result.

    Raises:
        ValueError: The options do not fit the data or the model, or the training loss was not finite.
    """
    began = time.monotonic()
    check_environment(job)
    job = replace(job, data=tasks.named_columns(job.model, job.data))
    columns_of(job.model.task, job.data)  # checks that TRL is installed before it is imported
    folder, method = Path(job.training.output_dir), job.training.method
    settings = training_arguments(job, folder)
    base, data, collate = tasks.prepare_model(
        job.model,
        tasks.prepare_data(job.model, job.data, eval_file=job.training.eval_file, eval_split=job.training.eval_split),
        trains_all=method == "full",
        weights=checkpoint if method == "full" else None,
    )
    if checkpoint is None:  # a resumed run needs the first adapter no more
        check_adapter(job, data.labels)
    model, estimate, seconds = start_model(job, base, data.train, collate, settings.device, checkpoint)
    train_in_float32(model)
    if job.training.learning_rate == "auto":
        rate = settings.learning_rate = search_rate(job, model, data.train, collate, settings.device)
        job = replace(job, training=replace(job.training, learning_rate=rate))  # config.yaml has the number
    if checkpoint is None:
        checkpoints.write_config(folder, job.options())
        if estimate is not None:
            estimate.save(folder / checkpoints.ESTIMATE)
    trainer = make_trainer(job, model, data, collate, settings, seconds)
    # Read before training, which removes old checkpoints.
    earlier = {} if checkpoint is None else logged_seconds(checkpoints.read_trainer_state(checkpoint)["log_history"])
    train(trainer, checkpoint)
    check_finite(trainer.state.log_history, folder)
    took = logged_seconds(trainer.state.log_history)
    if data.evaluation is not None and not is_evaluated(trainer.state):
        trainer.evaluate()
    record = run_record(
        as_trained(job, model),
        dataset=data.source,
        history=trainer.state.log_history,
        steps=trainer.state.global_step,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        device=settings.device,
        seconds={**took, "total": sum(earlier.values()) + time.monotonic() - began},
    )
    return Outcome(record, write_result(model, data, record, folder))


def write_result(model: Any, data: tasks.PreparedData, record: dict[str, Any], folder: Path) -> Path:
    """Writes the trained weights with tokenizer, names of the classes and model card, and then the record.

    Returns:
        The folder of the weights.
    """
    result = folder / (checkpoints.MODEL if record["method"] == "full" else ADAPTER)
    shutil.rmtree(result, ignore_errors=True)  # of a run that ended before its record was written
    with new_folder(result) as made:
        model.save_pretrained(made)
        data.tokenizer.save_pretrained(made)
        if data.labels is not None and record["method"] != "full":
            write_labels(made, data.labels.names)
        card = made / CARD
        old = card.read_text(encoding="utf-8") if card.is_file() else ""
        write_atomically(card, model_card(record, old, usage(record, str(result))).encode())
    write_json_atomically(folder / RECORD, record)
    return result


def make_trainer(
    job: Job, model: Any, data: tasks.PreparedData, collate: Any, settings: Any, estimate_seconds: float
) -> Any:
    """Makes the trainer of the task, from Transformers or TRL, with the callbacks of a run."""
    trainer, _, extra = tasks.trainer_classes(job.model.task, job.data)
    callbacks: list[Any] = [LossAndTimeLogger(estimate_seconds), OptimizerGuard()]
    if data.labels is not None and job.training.method != "full":  # a full model has them in its configuration
        callbacks.append(LabelsInCheckpoints(data.labels.names))
    return trainer(
        model=model,
        args=settings,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        **(
            {"processing_class": data.tokenizer} if extra else {"data_collator": collate}
        ),  # TRL makes the collator itself
        compute_metrics=tasks.accuracy if data.labels else None,
        preprocess_logits_for_metrics=tasks.predicted_class if data.labels else None,
        callbacks=callbacks,
    )


def check_environment(job: Job) -> None:
    """Refuses what would fail late, or go wrong without an error.

    Raises:
        ValueError: A name in --report_to is not known or its package not installed.
    """
    available = get_available_reporting_integrations()
    unknown = [name for name in job.training.report_to if name not in {*available, "none", "all"}]
    if unknown:
        raise ValueError(
            f"--report_to {' '.join(unknown)}: not installed or not known. "
            f"Available here are {', '.join(['none', 'all', *sorted(available)])}."
        )


def training_arguments(job: Job, folder: Path) -> Any:
    """Makes the arguments of the trainer."""
    training, accelerated = job.training, torch.accelerator.is_available()
    evaluates = training.eval_steps is not None
    _, settings_of, extra = tasks.trainer_classes(job.model.task, job.data)
    # Since Transformers 5 a value below 1 is a share of the steps, and the older argument is deprecated.
    extra["warmup_ratio" if is_before("transformers", "5.0") else "warmup_steps"] = training.warmup_ratio
    settings = settings_of(
        output_dir=str(folder / checkpoints.CHECKPOINTS),
        per_device_train_batch_size=job.data.batch_size,
        per_device_eval_batch_size=job.data.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=rate_before_search(job),
        lr_scheduler_type=training.lr_scheduler_type,
        weight_decay=training.weight_decay,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        bf16=job.model.dtype == "bfloat16",
        use_cpu=not accelerated,
        dataloader_pin_memory=accelerated,
        seed=job.model.seed,
        label_names=["labels"],
        prediction_loss_only=job.model.task != "seq-cls",
        eval_strategy="steps" if evaluates else "no",
        eval_steps=training.eval_steps,
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,  # log a loss that is not finite as it is
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=2,
        report_to=training.report_to,
        run_name=training.run_name or training.method,
        disable_tqdm=not sys.stderr.isatty(),
        **extra,
    )
    # With several GPUs Trainer would use DataParallel, which copies only parameters and buffers to the other GPUs.
    settings._n_gpu = min(settings.n_gpu, 1)
    return settings


def start_model(
    job: Job, base: Any, examples: Dataset, collate: Any, device: torch.device, checkpoint: Path | None
) -> tuple[Any, lora_ga.GradientEstimate | None, float]:
    """Makes the model to train, with a new adapter or the adapter of the checkpoint.

    Args:
        job: The options.
        base: The base model.
        examples: The training data, for the estimate.
        collate: Makes a batch of examples.
        device: The device to train on.
        checkpoint: The checkpoint of a resumed run, or None.

    Returns:
        The model on its device, the estimate if one was made or read, and the seconds that took.

    Raises:
        ValueError: The library refuses the estimate or the adapter.
    """
    peft_type = tasks.TASK_CLASSES[job.model.task].peft_type
    if job.training.method == "full":
        return base.to(device), None, 0.0
    trained = checkpoint if job.training.method == "lora-ga" else None  # the trainer loads that of plain LoRA
    if trained is None and job.training.from_adapter is not None:
        trained = checkpoint or checkpoints.adapter_of(Path(job.training.from_adapter), job.training.method)
    if trained is not None:
        return lora_ga.load(base, trained, is_trainable=True).to(device), None, 0.0
    model = add_adapter(base, job.target, job.adapter, peft_type).to(device)
    if job.training.method == "lora":
        return model, None, 0.0
    began, config = time.monotonic(), library_config(job.model, job.adapter, job.estimate)
    steps = optimizer_steps(job, len(examples))
    if job.training.learning_rate != "auto":
        note_short_run(config, steps, rate_before_search(job))
    if job.training.estimate_file is not None:
        batches: Any = lora_ga.GradientEstimate.load(checkpoints.estimate_of(Path(job.training.estimate_file)))
    else:
        config = note_fewer_batches(config, steps * job.training.gradient_accumulation_steps)
        options = replace(job.estimate, estimate_batches=config.max_batches)
        batches = EstimateBatches(examples, collate, options, job.data.batch_size, job.model.seed)
    estimate = lora_ga.initialize(model, batches, config)
    return model, estimate, time.monotonic() - began


def check_adapter(job: Job, labels: Labels | None) -> None:
    """Refuses another task, and data with other classes, than those of the adapter that is to be trained further.

    Raises:
        ValueError: They are others.
    """
    if job.training.from_adapter is None:
        return
    folder = checkpoints.adapter_of(Path(job.training.from_adapter), job.training.method)
    kinds = {task: each.peft_type for task, each in tasks.TASK_CLASSES.items()}
    made_for = parse_json((folder / MODEL_FILES[1]).read_text(encoding="utf-8")).get("task_type")
    if made_for not in (None, kinds[job.model.task]):
        fitting = " or ".join(task for task, kind in kinds.items() if kind == made_for) or "another"
        raise ValueError(
            f"--from_adapter {job.training.from_adapter}: it was trained for --task {fitting}, but --task is "
            f"{job.model.task}. Give its own task, or train a new adapter."
        )
    if labels is None:
        return
    had = read_labels(folder)
    if had and [had[number] for number in sorted(had)] != list(labels.names):
        raise ValueError(
            f"--from_adapter {job.training.from_adapter}: its classes are {', '.join(had.values())}, those of the data "
            f"{', '.join(labels.names)}. Give data with the same classes, or train a new adapter."
        )


def as_trained(job: Job, model: Any) -> Job:
    """The options for the record: an adapter that was trained further has a rank and a scaling of its own."""
    if job.training.from_adapter is None:
        return job
    alignment = alignment_of(model, "default")
    kept = model.peft_config["default"].to_dict() if alignment is None else alignment.original
    scaling = replace(job.adapter, alpha=kept["lora_alpha"], use_rslora=kept["use_rslora"])
    return replace(job, target=replace(job.target, rank=kept["r"]), adapter=scaling)


def rate_before_search(job: Job) -> float:
    """The learning rate of the options; in the place of "auto" the method's default."""
    rate = job.training.learning_rate
    return LEARNING_RATES[job.training.method] if rate is None or rate == "auto" else rate


def search_rate(job: Job, model: Any, examples: Dataset, collate: Any, device: torch.device) -> float:
    """Looks for the learning rate of a run, or takes the default if the run is too short for that, and says so.

    Args:
        job: The options.
        model: The model, ready to train.
        examples: The training data.
        collate: Makes a batch of examples.
        device: The device to train on.

    Returns:
        The rate.

    Raises:
        ValueError: What `find_rate` refuses.
    """
    steps, accumulated = optimizer_steps(job, len(examples)), job.training.gradient_accumulation_steps
    if steps < LEAST_STEPS:
        rate = rate_before_search(job)
        LOGGER.info(note_default_rate(steps, rate))
        note_short_run(library_config(job.adapter), steps, rate)
        return rate
    warn_of_constant(job.training.lr_scheduler_type)
    options = replace(job.estimate, estimate_batches=steps_of_groups(steps) * accumulated, estimate_batch_size=None)
    batches = EstimateBatches(examples, collate, options, job.data.batch_size, job.model.seed)
    with torch.autocast(device.type, torch.bfloat16, enabled=job.model.dtype == "bfloat16"):
        return lora_ga.find_rate(model, batches, steps, gradient_accumulation_steps=accumulated)


def optimizer_steps(job: Job, examples: int) -> int:
    """The optimizer steps of a run, as Transformers' trainer counts them."""
    if job.training.max_steps is not None:
        return job.training.max_steps
    batches = math.ceil(examples / job.data.batch_size)
    return math.ceil(job.training.epochs * max(1, math.ceil(batches / job.training.gradient_accumulation_steps)))


def train(trainer: Any, checkpoint: Path | None) -> None:
    """Trains to the last step. From a checkpoint of the last step it only loads the weights and the log."""
    if checkpoint is None or not checkpoints.is_last_checkpoint(checkpoint):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return
    trainer.state = transformers.TrainerState.load_from_json(str(checkpoint / checkpoints.STATE))
    if isinstance(trainer.model, PeftModel):
        trainer.model.load_adapter(str(checkpoint), "default", is_trainable=True)


def check_finite(history: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Refuses the result of a run whose loss or gradient was not finite.

    Raises:
        ValueError: It was not; the message names the last checkpoint, which was written before.
    """
    entry = diverged_at(history)
    if entry is None:
        return
    good = checkpoints.complete_checkpoints(folder)
    kept = f"The last good checkpoint is {good[max(good)]}. " if good else "There is no checkpoint (--save_steps). "
    found = next(f"{name} is {entry[key]}" for key, name in MEASURED.items() if not math.isfinite(entry.get(key, 0.0)))
    raise ValueError(
        f"the {found} at step {entry['step']}, so training has stopped and no result was written. {kept}Start again in "
        "another folder with a smaller --learning_rate."
    )


def is_evaluated(state: Any) -> bool:
    """Whether the model was evaluated after the last step."""
    return any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)
