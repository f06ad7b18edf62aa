"""Fused experts: parameters that are not the weight of a layer, adapted by `target_parameters`.

Shapes: P parts, I inputs, O outputs, r the rank of a part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_ga.layers.linear import Rows, WeightLayout
from lora_ga.linalg.accumulator import UnitRows


class ExpertsLayout(WeightLayout):
    """A parameter adapted by `target_parameters`: (experts, ., .) or one (outputs, inputs) matrix. A part is an expert.

    The module that owns the parameter routes tokens, so its input and output do not show the parameter's gradient.
    """

    gradient_from_parameter = True
    probed = False

    def parts(self, layer: Any) -> int:
        """The number of experts."""
        return layer.num_experts

    def parameter_name(self, layer: Any) -> str:
        """The name that `target_parameters` gave."""
        return layer.parameter_name

    def pattern_name(self, layer: Any, name: str) -> str:
        """The parameter's path. The layers of a module's parameters are nested, each the `base_layer` of the next."""
        return f"{name.replace('.base_layer', '')}.{layer.parameter_name}"

    def matrices(self, layer: Any, weight: Tensor) -> Tensor:
        """The base weight as (P, O, I)."""
        if weight.dim() == 2:
            return weight[None]
        # PEFT 0.18 has no such attribute: it always takes the last but one dimension for the inputs.
        return weight if getattr(layer, "_did_swap_in_out_features", False) else weight.mT

    def rows(self, layer: Any, x: Tensor, g: Tensor) -> Rows:
        """The parameter's gradient G of each expert, as G = (Gᵀ)ᵀ 1: unit vectors as inputs, Gᵀ as output gradients.

        An expert without a token has a gradient of zeros. Leaving it out would mean to wait for the device.

        Args:
            layer: PEFT's layer.
            x: Not used.
            g: The gradient of the loss at the parameter.

        Yields:
            The number of an expert, the unit vectors (I, I) and its gradient, transposed (I, O).
        """
        gradients = self.matrices(layer, g)
        every = UnitRows(torch.arange(gradients.shape[-1], device=g.device), gradients.shape[-1])
        for part, g_OI in enumerate(gradients):
            yield part, every, g_OI.mT

    def stack_b(self, b_POr: Tensor) -> Tensor:
        """PEFT orders the columns of B by rank first, then by expert."""
        return b_POr.movedim(0, 2).flatten(1)

    def unstack_b(self, b: Tensor, parts: int) -> Tensor:
        """PEFT's B as (P, O, r)."""
        return b.unflatten(1, (-1, parts)).movedim(2, 0)

    def why_not_aligned(self, layer: Any, adapter_name: str) -> str | None:
        """PEFT parametrises the weight once for each active adapter; the outer ones hide the gradient of the inner."""
        others = [other for other in layer.active_adapters if other != adapter_name and other in layer.r]
        if not others:
            return None
        return (
            f"is a parameter adapted by other active adapters too ({', '.join(others)}), which hide its gradient; call "
            f"model.set_adapter({adapter_name!r}) first"
        )


EXPERTS = ExpertsLayout()
