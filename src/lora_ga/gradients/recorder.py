"""The recorder: hooks on layers feed an accumulator, until the directions of a layer have converged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_ga.gradients.checkpoint import Progress
from lora_ga.gradients.hooks import Coverage, record_layers, record_parameters
from lora_ga.gradients.isolation import without_autocast
from lora_ga.layers.targets import Target
from lora_ga.linalg.accumulator import Accumulator, Inputs


class Recorder:
    """Records the gradients of layers during backward passes.

    Convergence is judged per part (expert or group); a layer keeps its hooks until all its parts have converged.

    Attributes:
        accumulator: The sums of the gradients.
        progress: The batches read, the layers that ran, and those that have converged.
        scale: The factor of the gradients of the backward pass under way; 0 for a pass that is not recorded.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        accumulator: Accumulator,
        progress: Progress,
        *,
        tolerance: float | None,
    ) -> None:
        """Record the layers `targets`.

        Args:
            targets: Layer name → the layer.
            accumulator: Where the gradients are added up.
            progress: Where the recorder starts; updated after every batch.
            tolerance: When a layer has converged (see `LoraGAConfig.tolerance`); None to record all batches.
        """
        self.targets, self.accumulator, self.progress = targets, accumulator, progress
        self.tolerance = tolerance
        self.scale = 1.0
        self._coverage = Coverage()

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Put hooks on the layers that have not converged; remove them on leaving."""
        waiting = {name: target for name, target in self.targets.items() if not self._converged(target)}
        rows = {name: target.rows for name, target in waiting.items()}
        layers: dict[str, nn.Module] = {
            name: target.layer for name, target in waiting.items() if not target.layout.gradient_from_parameter
        }
        for target in waiting.values():
            layers |= target.heads
            rows |= dict.fromkeys(target.heads, target.head_rows)
        owners = {
            name: (target.layer.get_base_layer(), target.layout.parameter_name(target.layer))
            for name, target in waiting.items()
            if target.layout.gradient_from_parameter
        }
        with (
            record_layers(layers, self._add, rows) as self._coverage,
            record_parameters(owners, self._add, rows, self._coverage),
        ):
            yield

    def finish_batch(self, weight: float, loss: Tensor | None = None) -> None:
        """Finish a batch whose backward pass is done.

        Args:
            weight: The batch's weight in the mean of all.
            loss: Its loss; None if it is not known.

        Raises:
            FloatingPointError: A gradient or the loss was not finite.
        """
        with torch.no_grad(), without_autocast():
            self.accumulator.flush(loss)
            changes = {} if self.tolerance is None else self.accumulator.changes()
        self.progress.batches += 1
        self.progress.weight += weight
        self.progress.ran |= self._owners(self._coverage.ran)
        self.progress.got_gradient |= self._owners(self._coverage.got_gradient)
        if self.tolerance is not None:
            self._remove_converged(changes, self.tolerance)

    @property
    def starts(self) -> list[Tensor]:
        """The leaves to which a backward pass has to go so that the layers are recorded."""
        return [self._coverage.start]

    @property
    def all_converged(self) -> bool:
        """Whether every layer has converged, so that nothing is left to record."""
        return self.tolerance is not None and all(self._converged(target) for target in self.targets.values())

    def _add(self, name: str, x_TI: Inputs, g_TO: Tensor) -> None:
        """Add the rows of a layer's part, unless the part has converged or the pass is not recorded."""
        if self.scale and name not in self.progress.settled:
            # The second context takes the functions of the accumulator out of `NoiseOff`, which would slow them down.
            with torch.autocast(g_TO.device.type, enabled=False), torch._C.DisableTorchFunction():
                self.accumulator.add(name, x_TI, g_TO, self.scale)

    def _remove_converged(self, changes: Mapping[str, float], tolerance: float) -> None:
        """Remove the hooks of the layers that the last batch, with these changes, has made converge."""
        converged = set(self.progress.update_converged(changes, tolerance))
        for name, target in self.targets.items():
            if converged.intersection(target.keys) and self._converged(target):
                for layer in (name, *target.heads):
                    self._coverage.remove_hooks[layer]()

    def _owners(self, names: set[str]) -> set[str]:
        """The layers of `targets` that these layers are: a tied head belongs to its embedding."""
        owners = {head: name for name, target in self.targets.items() for head in target.heads}
        return {owners.get(name, name) for name in names}

    def _converged(self, target: Target) -> bool:
        """Whether all parts of a layer have converged."""
        return all(key in self.progress.settled for key in target.keys)
