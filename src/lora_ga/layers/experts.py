"""Fused experts: parameters without a layer of their own, adapted by `target_parameters`.

Shapes: P parts, I inputs, O outputs, r the rank of a part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_ga.layers.linear import Form, Rows


class Experts(Form):
    """A parameter of a module, adapted by `target_parameters`: (experts, ., .), or one (outputs, inputs) matrix."""

    probed = False

    def parts(self, layer: Any) -> int:
        """The number of experts."""
        return layer.num_experts

    def matrices(self, layer: Any, weight: Tensor) -> Tensor:
        """The base weight as (P, O, I)."""
        if weight.dim() == 2:
            return weight[None]
        return weight if layer._did_swap_in_out_features else weight.mT

    def rows(self, layer: Any, x: Tensor, g: Tensor) -> Rows:
        """The parameter's gradient (`g`; `x` is not used), expert by expert, as G = 1ᵀ G; none where it is zero."""
        for part, g_OI in enumerate(self.matrices(layer, g)):
            if bool(g_OI.any()):
                yield part, g_OI, torch.eye(len(g_OI), dtype=g.dtype, device=g.device)

    def stack_b(self, b_POr: Tensor) -> Tensor:
        """PEFT counts the columns of B by rank first, then by expert."""
        return b_POr.movedim(0, 2).flatten(1)

    def unstack_b(self, b: Tensor, parts: int) -> Tensor:
        """PEFT's B as (P, O, r)."""
        return b.unflatten(1, (-1, parts)).movedim(2, 0)


EXPERTS = Experts()
