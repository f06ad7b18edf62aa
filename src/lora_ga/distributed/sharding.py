"""Wrapped models and sharded parameters: DistributedDataParallel, FSDP2 and DeepSpeed ZeRO-3.

`whole` gathers a parameter's shards; `placed_like` cuts a tensor that all processes hold in the same way, without
communication.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: Any) -> Any:
    """The model inside of DistributedDataParallel or a DeepSpeed engine; another as it is (FSDP2 wraps nothing).

    Args:
        model: A model.

    Returns:
        The model that was wrapped: its parameters are the same objects.

    Raises:
        TypeError: The model is wrapped by the first FSDP, which flattens parameters.
    """
    if isinstance(model, DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine":
        return model.module
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise TypeError(
            "The model is wrapped by FullyShardedDataParallel (FSDP 1), which flattens parameters into one. Use FSDP2 "
            "(torch.distributed.fsdp.fully_shard; in Accelerate fsdp_version: 2), or call this before wrapping."
        )
    return model


def partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 has taken a parameter's numbers away, until a layer that needs it runs."""
    return hasattr(parameter, "ds_numel") and parameter.numel() != parameter.ds_numel


def sharded(parameter: Any) -> bool:
    """Whether a parameter's numbers are spread over processes, or may be."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The shape of a whole parameter, however it is sharded."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def in_step(model: nn.Module) -> bool:
    """Whether a pass through the model communicates, so that all processes have to make it together."""
    return any(sharded(each) for each in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, in all processes at once; another as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, parameter: Tensor, device: torch.device | None = None) -> Tensor:
    """A plain tensor, the same in all processes, on a device (that of the parameter) and in a parameter's shards."""
    device = device or parameter.device
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor.to(device)
    return distribute_tensor(tensor.to(device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def _states(model: nn.Module) -> list[Any]:
    """FSDP2's books of the modules it has sharded, outer ones first. It offers no public way to them.

    Returns:
        The books.

    Raises:
        ValueError: This version of torch keeps them otherwise.
    """
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    for state in states:
        if not (hasattr(state, "_lazy_init") and hasattr(state, "_is_root") and hasattr(state, "_fsdp_param_groups")):
            raise ValueError(
                f"torch {torch.__version__} keeps FSDP2's books otherwise than this library knows. Call "
                "lora_ga.initialize before fully_shard."
            )
    return states


def reshard(model: nn.Module) -> None:
    """Put FSDP2's shards back in the place of gathered parameters, which a pass may leave there.

    FSDP2 notes at the first pass which parameters train, and in which dtype to reduce their gradients. If that pass is
    to be the estimate's, in which none does, it has to take its notes before.

    Args:
        model: The model.
    """
    for state in _states(model):
        if state._is_root is None:
            state._lazy_init()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """ZeRO-3's parameters whole for a while; what process 0 writes into them, all keep. Others are left alone.

    Args:
        parameters: Parameters.

    Yields:
        Nothing.
    """
    taken = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not taken:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(taken, modifier_rank=0):
        yield


def adopt(model: nn.Module, moved: Mapping[nn.Module, tuple[nn.Module, str]]) -> None:
    """Tell FSDP2 that parameters have moved to other modules: it puts gathered and sharded ones there in turn.

    Args:
        model: The model.
        moved: The module that held a parameter named "weight" → the one that holds it now, and its name there.
    """
    for state in _states(model):
        for place in (each._module_info for group in state._fsdp_param_groups for each in group.fsdp_params):
            if place.module in moved and place.param_name == "weight":
                place.module, place.param_name = moved[place.module]
