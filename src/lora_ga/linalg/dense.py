"""The dense estimator: sums whole gradients, exactly.

Shapes: T tokens, I inputs, O outputs, P probes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lora_ga.linalg.accumulator import Inputs, Size, UnitRows, all_finite, refuse_infinite, sum_dtype
from lora_ga.linalg.low_rank import LowRank, probes, truncated_svd, wide
from lora_ga.linalg.tensor_cores import float32_products


class Dense:
    """Sums whole gradients, (O, I) numbers for each layer. The oracle of the tests, and fine for small models.

    The parameters `power_steps` and `watched` are those of `Streaming`, and have no effect.
    """

    def __init__(self, sizes: Mapping[str, Size], power_steps: int, seed: int, *, watched: bool = False) -> None:
        del power_steps, watched
        self.sizes, self.seed = sizes, seed
        self.sums: dict[str, Tensor] = {}

    @float32_products("ieee")
    def add(self, name: str, x_TI: Inputs, g_TO: Tensor, weight: float) -> None:
        """Add a block of tokens to a layer's sum."""
        dtype = sum_dtype(g_TO.dtype)
        if isinstance(x_TI, UnitRows):
            if name not in self.sums:
                self.sums[name] = g_TO.new_zeros(g_TO.shape[1], x_TI.width, dtype=dtype)
            total_OI = self.sums[name].to(g_TO.device)
            self.sums[name] = total_OI.index_add_(1, x_TI.places, g_TO.to(dtype).mT, alpha=weight)
            return
        added_OI = (g_TO.to(dtype).mT @ x_TI.to(dtype)).mul_(weight)
        self.sums[name] = self.sums[name].to(g_TO.device).add_(added_OI) if name in self.sums else added_OI

    def flush(self, loss: Tensor | None = None) -> None:
        """Check that all sums are finite.

        Args:
            loss: The batch's loss.

        Raises:
            FloatingPointError: A sum, or the loss, is not finite.
        """
        # One number a layer. It may overflow where the sums do not, so it decides nothing.
        if not all_finite([*(each.sum() for each in self.sums.values()), *([] if loss is None else [loss])]):
            refuse_infinite(self.sums)
            refuse_infinite({} if loss is None else {"the loss": loss})

    def changes(self) -> dict[str, float]:
        """Nothing: the dense estimator follows no directions."""
        return {}

    @float32_products("ieee")
    def factors(self, names: Iterable[str]) -> dict[str, LowRank]:
        """The exact leading singular triplets, and the exact norms."""
        return {name: self._factors(name) for name in names if name in self.sums}

    def _factors(self, name: str) -> LowRank:
        g_OI = self.sums[name]
        sketch_OP = g_OI @ probes(g_OI.shape[1], self.seed).to(g_OI)
        norm = torch.linalg.matrix_norm(wide(g_OI)).item()
        return LowRank(*truncated_svd(g_OI, self.sizes[name].kept), norm=norm, sketch=sketch_OP)

    def state(self) -> dict[str, Tensor]:
        """The sums."""
        return {f"{name}.G": total for name, total in self.sums.items()}

    def restore(self, tensors: Mapping[str, Tensor], devices: Mapping[str, torch.device]) -> None:
        """Go on from a state that `state` returned."""
        self.sums = {(name := key.removesuffix(".G")): tensor.to(devices[name]) for key, tensor in tensors.items()}

    def absorb(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the sums of another process."""
        for key, tensor in tensors.items():
            name = key.removesuffix(".G")
            self.sums[name] = self.sums[name].add_(tensor.to(self.sums[name])) if name in self.sums else tensor
