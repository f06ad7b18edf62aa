"""The gradient estimate: batches → loss → backward → {layer name: LowRank}. Reads the model, changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from lora_ga.config import LoraGAConfig
from lora_ga.distributed.agreement import check_same
from lora_ga.distributed.processes import DeferredError, Processes, processes
from lora_ga.distributed.sharding import in_step, unwrapped
from lora_ga.distributed.tensor_parallel import check_together
from lora_ga.files import fingerprint
from lora_ga.gradients.batch import Pass
from lora_ga.gradients.checkpoint import Checkpoint, Progress
from lora_ga.gradients.coverage import missing, refuse_unprobed, settle_missing, silent_parts, warn_thin
from lora_ga.gradients.isolation import frozen, place_of, random_state_kept
from lora_ga.gradients.loop import Run
from lora_ga.gradients.loss import LossFunction
from lora_ga.gradients.result import GradientEstimate
from lora_ga.layers.targets import Target, find_targets
from lora_ga.linalg.accumulator import Accumulator, Size
from lora_ga.linalg.dense import Dense
from lora_ga.linalg.streaming import Streaming

ESTIMATORS: Mapping[str, type[Dense] | type[Streaming]] = {"dense": Dense, "streaming": Streaming}


def estimate_gradients(
    model: PeftModel,
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

    The base weights are asked for no gradient: it is read from what passes by, each layer's inputs x and output
    gradients g, as G = Σ gᵀx. Layers that are never called, because a fused kernel reads their weights, are heard
    through a probe (see `estimator`), in two more passes over the batches, with a warning. The model is left exactly as
    it was (mode, `requires_grad`, `.grad`, hooks), and so are the global random generators, also after an error.

    Under an initialised process group of torch.distributed all its processes have to call this, each with its own share
    of the batches. What they find is merged, and all of them return the same estimate, bit for bit.

    Args:
        model: A `PeftModel` with a fresh LoRA adapter, plain, in DistributedDataParallel, or sharded by FSDP2 or
            DeepSpeed ZeRO-3.
        data: Batches: mappings (keyword arguments of the model), tuples, or whatever `loss_fn` takes. They are moved
            to the model's device. A micro-batch counts by its label tokens, so that many small batches give the
            gradient of the one large one.
        config: The settings; `estimator`, `oversample`, `power_steps`, `max_batches`, `tolerance`, `on_missing`,
            `seed` count here.
        loss_fn: `(model, batch) → loss` or `→ (loss, weight)`, the loss being a mean and the weight the number of
            terms it is a mean over. By default `model(**batch).loss`.
        adapter_name: The adapter that is to be aligned.
        checkpoint: A file for the running state. If it exists, the estimate goes on from it, and ends as the unbroken
            one would have; `data` has to give the same batches again. It stays there when the estimate is done. Each
            of several processes has a file of its own, with its rank in the name.
        every: Batches between two savings of the checkpoint.
        process_group: The processes that make the estimate together; None for all of the default group, if there is
            one. A group of this process alone keeps the others out of it.

    Returns:
        The estimate, of the gradient of the mean loss.

    Raises:
        TypeError: The model is not a `PeftModel`, or wrapped by FSDP 1.
        RuntimeError: Another process failed, or can no longer be reached.
        ValueError: The adapter cannot be aligned; there are no batches; a batch has no label, no loss, or a loss or
            gradient that is not finite; layers without a gradient (see `on_missing`); the checkpoint is damaged, or
            of another model, configuration, rank or other batches; processes differ in model, adapter or settings.
        OSError: The checkpoint cannot be written; the one before is intact.
    """
    together, held, prepared = processes(process_group), DeferredError(), None
    with held:
        prepared = _prepared(unwrapped(model), config, loss_fn, adapter_name, checkpoint, every, together)
    check_same(together.exchange(held, None if prepared is None else prepared[2]))
    assert prepared is not None
    targets, run, _ = prepared
    eager = torch.compiler.set_stance("force_eager")  # compiled graphs do not know of hooks
    with random_state_kept(), torch.enable_grad(), eager, frozen(run.model, adapter_name):
        run.listen(data, adapter_name)
    return _finished(run, targets)


def _prepared(
    model: PeftModel,
    config: LoraGAConfig,
    loss_fn: LossFunction | None,
    adapter_name: str,
    checkpoint: str | Path | None,
    every: int,
    together: Processes,
) -> tuple[dict[str, Target], Run, dict[str, Any]]:
    """Check what can be checked before the first batch.

    Returns:
        All layers of the adapter, the run, and what has to be the same in all processes.

    Raises:
        ValueError: The adapter cannot be aligned, or gradients are off.
    """
    planned = check_together(model, together.size)
    if planned and config.tolerance is not None:
        raise ValueError(
            f"LoraGAConfig.tolerance is {config.tolerance}, but a tensor-parallel plan splits the model's layers, "
            "whose parts would settle after different batches. Use tolerance=None."
        )
    targets = find_targets(model, adapter_name)
    too_small = {name: target.too_small for name, target in targets.items() if target.too_small}
    if config.on_missing == "error":
        settle_missing(too_small, targets, "error")
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode() is on, in which there are no gradients; call this outside of it.")
    made_there = next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None)
    if made_there is not None:
        raise ValueError(
            f"{made_there} was made under torch.inference_mode(), so no gradient passes it; load the model outside."
        )
    fitting = {name: target for name, target in targets.items() if name not in too_small}
    if config.estimator == "probe":
        refuse_unprobed(fitting, checkpoint, sharded=in_step(model))
    ranks = {name: target.rank for name, target in fitting.items()}
    identity = {"fingerprint": fingerprint(model), "config": config.to_dict(), "ranks": ranks}
    # A process that reads a part of the batches sees the weaker directions less clearly: it keeps more of them until all
    # parts are added up.
    extra = config.oversample if together.size > 1 else 0
    sizes = {
        key: Size(kept=config.directions(target.rank) + extra, used=2 * target.rank)
        for target in fitting.values()
        for key in target.keys
    }
    # With the probe nothing is accumulated from layers that are called.
    accumulator: Accumulator = ESTIMATORS["streaming" if config.estimator == "probe" else config.estimator](
        sizes, config.power_steps, config.seed, watched=config.tolerance is not None
    )
    progress, file = Progress(), None
    if checkpoint is not None:
        file = Checkpoint(together.own_file(Path(checkpoint)), every, identity | together.identity)
        progress, tensors = file.load()
        devices = {key: place_of(target.layer) for target in fitting.values() for key in target.keys}
        accumulator.restore(tensors, devices)
    run = Run(model, fitting, config, Pass(model, loss_fn), accumulator, progress, file, together, planned)
    return targets, run, identity | {"checkpoint": checkpoint is not None}


def _finished(run: Run, targets: Mapping[str, Target]) -> GradientEstimate:
    """The estimate that a run has come to.

    Returns:
        The estimate of all processes.

    Raises:
        ValueError: There was no batch, or layers cannot be aligned.
    """
    progress, factors = run.merged()
    config = run.config
    if progress.batches == 0:
        raise ValueError("The data holds no batch; the gradient needs at least one. An iterator may be used up.")
    reasons = missing(targets, progress, factors)
    settle_missing(reasons, targets, config.on_missing)
    aligned = {name: target for name, target in targets.items() if name not in reasons}
    silent = silent_parts(aligned, factors)
    by_key = {key: target for target in aligned.values() for key in target.keys}
    layers = {
        key: factor.scaled(1 / progress.settled_weight.get(key, progress.weight))
        for key, factor in factors.items()
        if factor is not None and key in by_key and key not in silent
    }
    warn_thin(layers, by_key)
    return GradientEstimate(
        layers,
        config,
        fingerprint(run.model),
        progress.weight,
        progress.batches,
        reasons | silent,
        settled=progress.settled,
        settled_weight=progress.settled_weight,
    )
