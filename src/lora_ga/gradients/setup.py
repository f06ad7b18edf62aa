"""What an estimate works on, and every check that can be made before the first batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_ga.base import fingerprint
from lora_ga.config import LoraGAConfig
from lora_ga.distributed.agreement import check_same
from lora_ga.distributed.processes import DeferredError, Processes, processes
from lora_ga.distributed.sharding import in_step, unwrapped
from lora_ga.distributed.tensor_parallel import check_together
from lora_ga.gradients.checkpoint import Checkpoint, Progress
from lora_ga.gradients.coverage import refuse_probe, report_missing
from lora_ga.gradients.isolation import (
    compute_device,
    isolated,
    random_state_kept,
)
from lora_ga.gradients.reader import check_data
from lora_ga.gradients.recorder import Recorder
from lora_ga.layers.targets import Target, find_targets, peft_model_in
from lora_ga.linalg.accumulator import Accumulator, Size
from lora_ga.linalg.dense import Dense
from lora_ga.linalg.streaming import Streaming
from lora_ga.version import __version__

ESTIMATORS: Mapping[str, type[Dense] | type[Streaming]] = {"dense": Dense, "streaming": Streaming}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What an estimate works on; it does not change while the estimate runs.

    Attributes:
        network: What computes the loss, without a wrapper: the model, or a network that contains it.
        model: The model.
        fingerprint: Its fingerprint.
        adapter_name: The adapter to align.
        config: The settings.
        targets: All layers of the adapter, by name.
        fitting: Those whose rank fits.
        processes: The processes that make the estimate together.
        in_step: Whether a pass through the network communicates, so that all processes have to make it together.
        tensor_parallel: Whether a tensor-parallel plan splits layers between the processes. Then all processes read the
            same batches. Each records its parts of the layers that are split. The first process alone records the
            other layers, and it alone counts the batches.
        checkpoint: The file for the running state; None without one.
    """

    network: nn.Module
    model: nn.Module
    fingerprint: str
    adapter_name: str
    config: LoraGAConfig
    targets: Mapping[str, Target]
    fitting: Mapping[str, Target]
    processes: Processes
    in_step: bool
    tensor_parallel: bool
    checkpoint: Checkpoint | None

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """The model as the estimate needs it, with gradients on and noise off; on leaving, everything is as it was."""
        eager = torch.compiler.set_stance("force_eager")  # compiled graphs do not call hooks
        with (
            random_state_kept(),
            torch.enable_grad(),
            eager,
            isolated(self.network, self.adapter_name, training_mode=self.config.training_mode),
        ):
            yield

    @property
    def batch_limit(self) -> int | None:
        """How many batches this process reads at most; None for all."""
        most = self.config.max_batches
        assert most != "auto", "resolved by `prepare`"
        return most if self.tensor_parallel else self.processes.share_of(most)

    @property
    def devices(self) -> dict[str, torch.device]:
        """Part of a layer → where its layer computes."""
        return {key: compute_device(target.layer) for target in self.fitting.values() for key in target.keys}

    @property
    def directions(self) -> dict[str, int]:
        """Part of a layer → directions to keep of its gradient."""
        return {key: self.config.directions(target.rank) for target in self.fitting.values() for key in target.keys}


def prepare(
    model: Any,
    config: LoraGAConfig,
    adapter_name: str,
    process_group: Any,
    data: Iterable[Any] = (),
    checkpoint: str | Path | None = None,
    every: int = 8,
) -> tuple[Setup, Recorder]:
    """Check what can be checked before the first batch, in all processes together.

    Args:
        model: The model or a network that contains it, plain or wrapped.
        config: The settings.
        adapter_name: The adapter to align.
        process_group: The processes that make the estimate together; None for the default group.
        data: The batches; none where the caller makes the passes.
        checkpoint: A file for the running state.
        every: Batches between two savings of the checkpoint.

    Returns:
        What the estimate works on, and the recorder, which starts where the checkpoint stands.

    Raises:
        TypeError: `config` is no `LoraGAConfig`, or `data` no iterable of batches.
        ValueError: The adapter cannot be aligned, gradients are off, or the checkpoint does not fit or is damaged.
    """
    together, held = processes(process_group), DeferredError()
    found: tuple[Setup, Recorder] | None = None
    identity: dict[str, Any] = {}
    with held:
        check_data(data)
        LoraGAConfig.check(config)
        config = config.resolved()
        setup = _setup(unwrapped(model), config, adapter_name, together)
        ranks = {name: target.rank for name, target in setup.fitting.items()}
        identity = {"fingerprint": setup.fingerprint, "config": config.to_dict(), "ranks": ranks}
        if config.estimator == "probe":
            refuse_probe(setup.fitting, checkpoint, sharded=setup.in_step)
        accumulator, progress = _accumulator(setup), Progress()
        if checkpoint is not None:
            file = Checkpoint(together.own_file(Path(checkpoint)), every, identity | together.identity)
            setup = dataclasses.replace(setup, checkpoint=file)
            progress, tensors = file.load()
            try:
                accumulator.restore(tensors, setup.devices)
            except (KeyError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"{file.path}: damaged, it lacks a part ({error}). Remove it to start again."
                ) from error
        found = setup, _recorder(setup, accumulator, progress)
    same = identity | {"checkpoint": checkpoint is not None, "version of lora_ga": __version__}
    check_same(together.exchange(held, same))
    assert found is not None
    return found


def _setup(network: nn.Module, config: LoraGAConfig, adapter_name: str, together: Processes) -> Setup:
    """The setup, without its checkpoint.

    Returns:
        The setup.

    Raises:
        ValueError: The adapter cannot be aligned, or gradients are off.
    """
    model = peft_model_in(network)
    tensor_parallel = check_together(network, together.size)
    if tensor_parallel and config.tolerance is not None:
        raise ValueError(
            f"LoraGAConfig.tolerance is {config.tolerance}, but a tensor-parallel plan splits the model's layers, "
            "whose parts would converge after different batches. Use tolerance=None."
        )
    targets = find_targets(network, adapter_name)
    unfit = {name: target.unfit for name, target in targets.items() if target.unfit}
    if config.on_missing == "error" or len(unfit) == len(targets):
        report_missing(unfit, targets, config.on_missing)
    refuse_inference_mode(network)
    fitting = {name: target for name, target in targets.items() if name not in unfit}
    return Setup(
        network,
        model,
        fingerprint(model),
        adapter_name,
        config,
        targets,
        fitting,
        together,
        in_step(network),
        tensor_parallel,
        None,
    )


def refuse_inference_mode(network: nn.Module) -> None:
    """Refuse `torch.inference_mode()`, now or when the model was made.

    Raises:
        ValueError: It is on, or a parameter was made under it.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode() is on, in which there are no gradients; call this outside of it.")
    name = next((name for name, parameter in network.named_parameters() if parameter.is_inference()), None)
    if name is not None:
        raise ValueError(
            f"{name} was made under torch.inference_mode(), so no gradient passes it; load the model outside."
        )


def _accumulator(setup: Setup) -> Accumulator:
    config = setup.config
    # Each of several processes sees weak directions less clearly. It keeps more of them until all parts are added up.
    extra = config.oversample if setup.processes.size > 1 else 0
    sizes = {
        key: Size(kept=config.directions(target.rank) + extra, used=2 * target.rank)
        for target in setup.fitting.values()
        for key in target.keys
    }
    # With estimator="probe" nothing is recorded by hooks, and the accumulator stays empty.
    kind = ESTIMATORS["streaming" if config.estimator == "probe" else config.estimator]
    return kind(sizes, config.power_steps, config.seed, watched=config.tolerance is not None)


def _recorder(setup: Setup, accumulator: Accumulator, progress: Progress) -> Recorder:
    first = not setup.tensor_parallel or setup.processes.rank == 0
    recorded = {name: target for name, target in setup.fitting.items() if first or target.split is not None}
    tolerance = setup.config.tolerance
    # The directions of a mean over P equal shares are P times closer to their limit than those of one share: with P
    # processes the tolerance of each is P times as large.
    return Recorder(
        recorded,
        accumulator,
        progress,
        tolerance=None if tolerance is None else tolerance * setup.processes.size,
    )
