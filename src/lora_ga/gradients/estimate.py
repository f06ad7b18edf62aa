"""The gradient estimate: batches → loss → backward → {layer name: LowRank}. The model is only read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from lora_ga.config import LoraGAConfig
from lora_ga.gradients.batch import BatchPass
from lora_ga.gradients.loader import data_kept
from lora_ga.gradients.loop import keep_batches, probe_reads, record_batches, report_unlabelled
from lora_ga.gradients.loss import LossFunction, unlabelled
from lora_ga.gradients.merge import merged_estimate
from lora_ga.gradients.probe import probe_uncalled
from lora_ga.gradients.progress import Report
from lora_ga.gradients.reader import BatchReader
from lora_ga.gradients.recorder import Recorder
from lora_ga.gradients.result import GradientEstimate
from lora_ga.gradients.setup import Setup, prepare


def estimate_gradients(
    model: nn.Module,
    data: Iterable[Any],
    config: LoraGAConfig = LoraGAConfig(),  # noqa: B008 (frozen)
    *,
    loss_fn: LossFunction | None = None,
    adapter_name: str = "default",
    checkpoint: str | Path | None = None,
    every: int = 8,
    process_group: Any = None,
) -> GradientEstimate:
    """Estimate the loss gradient of every weight the adapter adapts, from a few batches.

    The base weights need no gradient: hooks record the inputs x and the output gradients g of each layer, and
    G = Σ gᵀx. Layers that a fused kernel reads and never calls are probed (see `estimator`), with a warning. The model
    is in training mode, less its dropout (see `training_mode`). It, the global random generators, and a `DataLoader`
    with its generators end as they were.

    Under an initialised process group of torch.distributed all its processes have to call this, each with a different
    share of the batches. Their sums are added up, and all processes return the same estimate, bit for bit.

    The logger `lora_ga` says when the estimate begins and how it ended; a terminal shows a bar (see `progress`).

    Args:
        model: A model with a fresh LoRA adapter (of PEFT or `model.add_adapter`), or a network that contains one;
            plain, in DistributedDataParallel, or sharded by FSDP2 or ZeRO-3. The loss is that of the whole network.
        data: Batches: mappings (keyword arguments of the model), tuples, or whatever `loss_fn` takes. They are moved
            to the model's device. Each counts by its label tokens: many small ones give the gradient of one large one.
            Without a `loss_fn`, batches whose labels are all -100 are left out, with one warning.
        config: The settings, less those of the start (direction, scale, γ, `reach`, `offset`).
        loss_fn: `(model, batch) → loss` or `→ (loss, weight)`. The loss is a mean, and the weight is the number of
            terms that it is a mean over. By default `model(**batch).loss`.
        adapter_name: The adapter to align.
        checkpoint: A file for the running state, which stays. If it exists, the estimate continues from it, with the
            same result; `data` gives the same batches again. Each process adds its rank to the file's name.
        every: Batches between two savings of the checkpoint.
        process_group: The processes that make the estimate together; by default all of the default group, if any.

    Returns:
        The estimate, of the gradient of the mean loss.

    Raises:
        TypeError: There are no LoRA layers, the model is wrapped by FSDP 1, or `data` or `config` is of another type.
        RuntimeError: Another process failed, or can no longer be reached.
        ValueError: There are several models with adapters; the adapter cannot be aligned; there are no batches, or none
            with a label; a batch has no loss, or a loss or gradient that is not finite; layers without a gradient (see
            `on_missing`); the checkpoint is damaged, or of another model, configuration, rank or other batches;
            processes differ in model, adapter or settings.
        OSError: The checkpoint cannot be written; the one before is intact.
    """
    setup, recorder = prepare(model, config, adapter_name, process_group, data, checkpoint, every)
    report = Report(setup, data)
    passes = BatchPass(setup.network, loss_fn, report.passed)
    with report, data_kept(data), setup.isolated():
        reader = _reader(setup, recorder, data, loss_fn)
        probed, read = {}, True
        if config.estimator == "probe":
            keep_batches(setup, reader)
        else:
            read = record_batches(setup, recorder, reader, passes)
        report_unlabelled(setup, reader)
        if read:
            probed = probe_uncalled(setup, recorder, probe_reads(passes, reader.kept), batches=len(reader.kept))
        passes.noise.report()
    estimate = merged_estimate(setup, recorder, probed)
    report.done(estimate)
    return estimate


def _reader(setup: Setup, recorder: Recorder, data: Iterable[Any], loss_fn: LossFunction | None) -> BatchReader:
    """Reads this process's share of the batches that have a label, from where the recorder stands."""

    def without_label(batch: Any) -> bool:
        return unlabelled(setup.network, batch, loss_fn)

    return BatchReader(data, setup.batch_limit, setup.checkpoint, recorder.progress, without_label=without_label)
