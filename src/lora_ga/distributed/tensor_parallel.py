"""Tensor-parallel plans: which part of a layer's inputs or outputs a process has.

A plan of Transformers splits a linear layer's weight W over processes that all see the same tokens: by outputs
("colwise": a process has rows of W, all of x, and its part of ∂L/∂y) or by inputs ("rowwise": columns of W, its part of
x, and all of ∂L/∂y). What a process hears is a block of the gradient G. G is the sum of the blocks, each with zeros
around it, so blocks add up as batches do, and nothing of x or ∂L/∂y is gathered.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

# The plans that PEFT's LoRA layers know, and the dimension of the weight (O, I) that each splits.
PLANS = {"colwise": 0, "rowwise": 1}


@dataclasses.dataclass(frozen=True)
class Split:
    """This process's part of a weight.

    Attributes:
        shape: (O, I) of the whole weight.
        dim: 0 if its outputs are split, 1 if its inputs are.
        begin: The first that this process has.
        count: How many it has.
    """

    shape: tuple[int, int]
    dim: int
    begin: int
    count: int

    def embedded(self, x_TI: Tensor, g_TO: Tensor) -> tuple[Tensor, Tensor]:
        """This process's part of x or ∂L/∂y among zeros: (T, I) and (T, O), whose product is its block of G."""
        return (x_TI, self._among_zeros(g_TO)) if self.dim == 0 else (self._among_zeros(x_TI), g_TO)

    def _among_zeros(self, part: Tensor) -> Tensor:
        whole = part.new_zeros(len(part), self.shape[self.dim])
        whole[:, self.begin : self.begin + self.count] = part
        return whole

    def cut(self, whole: Tensor) -> Tensor:
        """This process's part of a factor: of B (O, r) where outputs are split, of A (r, I) where inputs are."""
        return whole.narrow(self.dim, self.begin, self.count)


def _planned(parameter: Any, *, fsdp: bool) -> bool:
    """Whether a plan has split a parameter; FSDP2's are DTensors too."""
    if not isinstance(parameter, DTensor):
        return False
    return "tp" in (parameter.device_mesh.mesh_dim_names or ()) or not fsdp


def in_fsdp(model: nn.Module) -> bool:
    """Whether FSDP2 shards a model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def plan_size(model: nn.Module) -> int:
    """Over how many processes a tensor-parallel plan splits a model.

    Args:
        model: The model.

    Returns:
        Their number; 1 where there is no plan.

    Raises:
        ValueError: FSDP2 shards the model too.
    """
    fsdp = in_fsdp(model)
    for name, parameter in model.named_parameters():
        if not _planned(parameter, fsdp=fsdp):
            continue
        mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
        if fsdp or mesh.ndim > 1:
            raise ValueError(
                f"{name} is split by a tensor-parallel plan and sharded by FSDP2 ({mesh}), which is not supported "
                "together. Load the model with one of the two."
            )
        return int(mesh.size())
    return 1


def check_together(model: nn.Module, size: int) -> bool:
    """Whether a tensor-parallel plan splits a model; then exactly its processes have to work together.

    Args:
        model: The model.
        size: The number of processes that do.

    Returns:
        Whether there is a plan.

    Raises:
        ValueError: Others work together, or FSDP2 shards the model too.
    """
    planned = plan_size(model)
    if planned not in (1, size):
        raise ValueError(
            f"A tensor-parallel plan splits the model over {planned} processes, but {size} work together here. Call "
            "this in the plan's processes and in no others (process_group=), each with the same batches; tensor "
            "parallel beside data parallel is not supported."
        )
    return planned > 1


def unfit(name: str, base: nn.Module, *, fsdp: bool) -> str | None:
    """Why a plan keeps a layer from being adapted; None if it does not.

    Args:
        name: The layer's.
        base: Its base layer.
        fsdp: Whether FSDP2 shards the model.

    Returns:
        The reason.
    """
    plan = getattr(base, "_hf_tp_plan", None)
    split = any(_planned(parameter, fsdp=fsdp) for parameter in base.parameters())
    known = plan in PLANS and type(base) is nn.Linear if split else plan in (None, "replicate")
    if known:
        return None
    return (
        f"{name} is a {type(base).__name__} that a tensor-parallel plan splits as {plan!r}; known are nn.Linear layers "
        f"split as {' or '.join(PLANS)} by Transformers (distributed_config= of from_pretrained). Leave it out with "
        f"LoraConfig(exclude_modules=[{name.rpartition('.')[2]!r}])"
    )


def split_of(base: Any) -> Split | None:
    """This process's part of a linear layer's weight; None where no plan splits it.

    Args:
        base: The base layer.

    Returns:
        The part.
    """
    plan, weight = getattr(base, "_hf_tp_plan", None), getattr(base, "weight", None)
    if plan not in PLANS or not isinstance(weight, DTensor):
        return None
    mesh, dim = weight.device_mesh, PLANS[plan]
    outputs, inputs = weight.shape
    share = math.ceil(weight.shape[dim] / mesh.size())  # as torch.chunk: the last parts may be smaller
    return Split((outputs, inputs), dim, mesh.get_local_rank() * share, weight.to_local().shape[dim])
