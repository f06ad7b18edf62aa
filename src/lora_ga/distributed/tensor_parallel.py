"""Tensor-parallel plans: which share of a layer's inputs or outputs a process has.

A plan of Transformers splits a linear layer's weight W over processes that all see the same tokens. "colwise" splits
the outputs: a process has rows of W, all of x, and its share of ∂L/∂y. "rowwise" splits the inputs: a process has
columns of W, its share of x, and all of ∂L/∂y. The hooks of a process therefore see one block of the gradient G. G is
the sum of the blocks, each padded with zeros, so blocks add up as batches do, and x and ∂L/∂y need not be gathered.

Shapes: T tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lora_ga.distributed.sharding import Storage
from lora_ga.linalg.accumulator import Inputs, UnitRows

# The plans that PEFT's LoRA layers support, and the dimension of the weight (O, I) that each splits.
PLANS = {"colwise": 0, "rowwise": 1}
STYLES = "transformers.distributed.tensor_parallel"  # Transformers' module of what a plan does; since version 5.16


@dataclasses.dataclass(frozen=True)
class Split:
    """This process's share of a weight.

    Attributes:
        shape: (O, I) of the whole weight.
        dim: 0 if the outputs are split, 1 if the inputs are.
        begin: The first output or input that this process has.
        count: How many of them it has.
    """

    shape: tuple[int, int]
    dim: int
    begin: int
    count: int

    def padded(self, x_TI: Inputs, g_TO: Tensor) -> tuple[Inputs, Tensor]:
        """Pad this process's share of x or ∂L/∂y with zeros, so that gᵀx is its padded block of G.

        Args:
            x_TI: This process's inputs; of a layer split by inputs its share of them.
            g_TO: The gradients at its outputs; of a layer split by outputs its share of them.

        Returns:
            x (T, I) and ∂L/∂y (T, O) with I and O of the whole weight.
        """
        if self.dim == 0:
            return x_TI, self._padded(g_TO)
        if isinstance(x_TI, UnitRows):
            return UnitRows(x_TI.places + self.begin, self.shape[1]), g_TO
        return self._padded(x_TI), g_TO

    def _padded(self, part: Tensor) -> Tensor:
        whole = part.new_zeros(len(part), self.shape[self.dim])
        whole[:, self.begin : self.begin + self.count] = part
        return whole

    def cut(self, whole: Tensor) -> Tensor:
        """This process's share of a factor: of B (O, r) where outputs are split, of A (r, I) where inputs are."""
        return whole.narrow(self.dim, self.begin, self.count)


class PlannedStorage(Storage):
    """A parameter during a forward pass under a plan, which replaces the DTensor by this process's share, a tensor."""

    spread = True

    def __init__(self, parameter: Any, split: Split) -> None:
        super().__init__(parameter)
        self.split = split

    def part_of(self, whole: Tensor, device: torch.device | None = None) -> Tensor:
        """This process's share of a whole factor."""
        return self.split.cut(super().part_of(whole, device))


def _planned(parameter: Any, *, fsdp: bool) -> bool:
    """Whether a plan has split a parameter. Those of FSDP2 are DTensors too, so that a mesh's names decide."""
    if not isinstance(parameter, DTensor):
        return False
    return "tp" in (parameter.device_mesh.mesh_dim_names or ()) or not fsdp


def in_fsdp(model: nn.Module) -> bool:
    """Whether FSDP2 shards a model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def plan_size(model: nn.Module) -> int:
    """The number of processes over which a tensor-parallel plan splits a model.

    Args:
        model: The model.

    Returns:
        The number; 1 if there is no plan.

    Raises:
        ValueError: FSDP2 shards the model too.
    """
    distributed = [(name, each) for name, each in model.named_parameters() if isinstance(each, DTensor)]
    fsdp = bool(distributed) and in_fsdp(model)
    for name, parameter in distributed:
        if not _planned(parameter, fsdp=fsdp):
            continue
        mesh: Any = parameter.device_mesh
        if fsdp or mesh.ndim > 1:
            raise ValueError(
                f"{name} is split by a tensor-parallel plan and sharded by FSDP2 ({mesh}), which is not supported "
                "together. Load the model with one of the two."
            )
        return int(mesh.size())
    return 1


def check_together(model: nn.Module, size: int) -> bool:
    """Check that the processes that make an estimate are those over which a tensor-parallel plan splits the model.

    Args:
        model: The model.
        size: The number of processes that make the estimate.

    Returns:
        Whether there is a plan.

    Raises:
        ValueError: The plan has another number of processes, or FSDP2 shards the model too.
    """
    planned = plan_size(model)
    if planned not in (1, size):
        raise ValueError(
            f"A tensor-parallel plan splits the model over {planned} processes, but {size} work together here. Call "
            "this in the plan's processes and in no others (process_group=), each with the same batches; tensor "
            "parallel together with data parallel is not supported."
        )
    return planned > 1


def unfit(name: str, base: nn.Module, *, fsdp: bool) -> str | None:
    """Why a layer cannot be aligned because of a tensor-parallel plan; None if it can.

    Args:
        name: The layer's name.
        base: Its base layer.
        fsdp: Whether FSDP2 shards the model.

    Returns:
        The reason.
    """
    plan = getattr(base, "_hf_tp_plan", None)
    split = any(_planned(parameter, fsdp=fsdp) for parameter in base.parameters())
    known = plan in PLANS and type(base) is nn.Linear if split else plan in (None, "replicate")
    if known and (not split or importlib.util.find_spec(STYLES) is not None):
        return None
    return (
        f"{name} is a {type(base).__name__} that a tensor-parallel plan splits as {plan!r}; known are nn.Linear layers "
        f"split as {' or '.join(PLANS)} by Transformers 5.16 or newer (distributed_config= of from_pretrained). Leave "
        f"it out with LoraConfig(exclude_modules=[{name.rpartition('.')[2]!r}])"
    )


def split_of(base: Any) -> Split | None:
    """This process's share of a linear layer's weight; None if no plan splits it.

    Args:
        base: The base layer.

    Returns:
        The share.
    """
    plan, weight = getattr(base, "_hf_tp_plan", None), getattr(base, "weight", None)
    if plan not in PLANS or not isinstance(weight, DTensor):
        return None
    mesh, dim = weight.device_mesh, PLANS[plan]
    outputs, inputs = weight.shape
    share = math.ceil(weight.shape[dim] / mesh.size())  # as torch.chunk: the last parts may be smaller
    return Split((outputs, inputs), dim, mesh.get_local_rank() * share, weight.to_local().shape[dim])


def apply_plan(factor: nn.Module, base: Any) -> None:
    """Make a factor communicate in its forward pass as the plan of its base layer demands.

    Args:
        factor: A factor whose parameter is a DTensor.
        base: The base layer, which a plan splits.
    """
    styles = importlib.import_module(STYLES).ALL_PARALLEL_STYLES
    styles[base._hf_tp_plan].install_forward(factor, base._hf_device_mesh)
