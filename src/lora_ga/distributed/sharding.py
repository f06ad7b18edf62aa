"""Wrapped models and sharded parameters: DistributedDataParallel, FSDP2 and DeepSpeed ZeRO-3.

First the models. Then the parameters: how one is stored (`Storage`), and functions of parameters and tensors that may
or may not be sharded. The last part keeps FSDP2's private state in step with a model that this library has changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lora_ga.base import COMPILED


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel, a DeepSpeed engine or torch.compile; any other as it is.

    FSDP2 does not wrap. The module that torch.compile returns shares all modules and parameters with the one inside.

    Args:
        model: A model.

    Returns:
        The model that was wrapped; its parameters are the same objects.

    Raises:
        TypeError: The model is wrapped by FSDP 1, which flattens parameters.
    """
    if isinstance(model, DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine":
        return unwrapped(model.module)
    if not isinstance(model, nn.Module):  # a pipeline, which is refused where its layers are looked for
        return model
    # Not by getattr: a PeftModel passes on the attributes of the model inside, which may be compiled.
    if COMPILED in (children := dict(model.named_children())):
        return unwrapped(children[COMPILED])
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise TypeError(
            "The model is wrapped by FullyShardedDataParallel (FSDP 1), which flattens parameters into one. Use FSDP2 "
            "(torch.distributed.fsdp.fully_shard; in Accelerate fsdp_version: 2), or call this before wrapping."
        )
    return model


def in_ddp(model: Any) -> bool:
    """Whether DistributedDataParallel wraps a model: it waits for the gradients of the parameters that it has found."""
    return isinstance(model, DistributedDataParallel)


def in_step(model: nn.Module) -> bool:
    """Whether a forward pass through the model communicates, so that all processes have to run it together."""
    kinds = (nn.SyncBatchNorm, FSDPModule) if dist.is_initialized() else (FSDPModule,)
    # FSDP2 may have left gathered parameters in the place of its shards, so its modules count, not the parameters.
    return any(isinstance(each, kinds) for each in model.modules()) or any(map(sharded, model.parameters()))


class Storage:
    """How a parameter is stored. This class: all of it, as a plain tensor in every process.

    A factor's start, and values to be written to its parameter, are plain tensors that every process has whole.
    Subclasses determine which part of such a tensor belongs to the part of the parameter that this process has.

    Attributes:
        spread: Whether the parameter is spread over processes, or may be.
    """

    spread = False

    def __init__(self, parameter: Any) -> None:
        self.parameter = parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole parameter."""
        return tuple(self.parameter.shape)

    def part_of(self, whole: Tensor, device: torch.device | None = None) -> Tensor:
        """The part of a whole tensor that belongs to this process's part of the parameter.

        Args:
            whole: A tensor of the parameter's whole shape, the same in all processes.
            device: Where to; None for the parameter's device.

        Returns:
            The part, in the tensor's dtype.
        """
        return whole.to(device or self.parameter.device)

    @torch.no_grad()
    def write(self, whole: Tensor) -> None:
        """Copy a whole tensor, the same in all processes, into the parameter."""
        self.parameter.copy_(self.part_of(whole))


class DTensorStorage(Storage):
    """A DTensor, as FSDP2 and tensor-parallel plans make it. Taking a part of a whole tensor needs no communication."""

    spread = True

    def part_of(self, whole: Tensor, device: torch.device | None = None) -> Tensor:
        """The whole tensor in the shards of the parameter; a DTensor is only moved."""
        whole = whole.to(device or self.parameter.device)
        if isinstance(whole, DTensor):
            return whole
        return distribute_tensor(whole, self.parameter.device_mesh, self.parameter.placements, src_data_rank=None)


class Zero3Storage(Storage):
    """A parameter of DeepSpeed ZeRO-3, which has values only while a layer that needs it runs, or in `gathered`."""

    spread = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole parameter, which DeepSpeed keeps beside it."""
        return tuple(self.parameter.ds_shape)

    @torch.no_grad()
    def write(self, whole: Tensor) -> None:
        """Copy a whole tensor into the gathered parameter, unless it holds those values already.

        DeepSpeed's optimizer has a copy of the parameter in float32, so nothing is written without need.
        """
        with gathered([self.parameter]):
            if not torch.equal(self.parameter, whole.to(self.parameter)):
                super().write(whole)


def storage_of(parameter: Any) -> Storage:
    """How a parameter is stored at this moment; wrappers may change that later."""
    if in_zero3(parameter):
        return Zero3Storage(parameter)
    return DTensorStorage(parameter) if isinstance(parameter, DTensor) else Storage(parameter)


def sharded(parameter: Any) -> bool:
    """Whether a parameter is spread over processes, or may be."""
    return storage_of(parameter).spread


def in_zero3(parameter: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 manages a parameter, partitioned or gathered at this moment."""
    return hasattr(parameter, "ds_id")


def partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 has partitioned a parameter, so that it has no values until a layer needs it."""
    return hasattr(parameter, "ds_numel") and parameter.numel() != parameter.ds_numel


def whole(tensor: Tensor) -> Tensor:
    """A DTensor gathered, which all processes have to do together; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, parameter: Tensor, device: torch.device | None = None) -> Tensor:
    """A whole tensor, the same in all processes, stored as a parameter is.

    Args:
        tensor: The tensor.
        parameter: The parameter.
        device: Where to; None for the parameter's device.

    Returns:
        The tensor on that device, and in the parameter's shards if the parameter is a DTensor.
    """
    return storage_of(parameter).part_of(tensor, device)


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Gather ZeRO-3's parameters for the length of a block. What process 0 writes into them, all processes get.

    Args:
        parameters: Parameters; those that ZeRO-3 has not partitioned are left alone.

    Yields:
        Nothing.
    """
    taken = [parameter for parameter in parameters if in_zero3(parameter)]
    if not taken:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(taken, modifier_rank=0):
        yield


# The newest torch whose FSDP2 `_fsdp2_states` was tried with. Older versions are checked by their attributes alone.
TRIED_TORCH = (2, 15)


def _fsdp2_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that FSDP2 shards, outer modules first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _fsdp2_states(modules: Sequence[FSDPModule]) -> list[Any]:
    """FSDP2's private state of each module that it shards. There is no public way to it.

    The only function that reads this state. What `register_moved` and `reshard` use of it is checked here.

    Returns:
        The states.

    Raises:
        ValueError: This version of torch is newer than those tried, or keeps another state.
    """
    if not modules:
        return []
    version = tuple(int(number) for number in torch.__version__.split(".")[:2])
    try:
        states = [module._get_fsdp_state() for module in modules]
        missing = [name for state in states for name in ("_is_root", "_lazy_init") if not hasattr(state, name)]
        infos = [info for state in states for info in _infos(state)]
        missing += [name for info in infos for name in ("module", "param_name") if not hasattr(info, name)]
    except AttributeError as error:
        missing = [str(error)]
    if missing or version > TRIED_TORCH:
        tried = ".".join(str(number) for number in TRIED_TORCH)
        found = f"its state lacks {missing[0]}" if missing else f"the newest version tried is {tried}"
        raise ValueError(
            f"FSDP2 of torch {torch.__version__} may keep its state in another way than this library knows ({found}). "
            "Call lora_ga.initialize on the model before fully_shard (or accelerator.prepare), then shard it."
        )
    return states


def _infos(state: Any) -> list[Any]:
    """What FSDP2 remembers of each parameter of a state: its module and its name there.

    A state of older versions of torch has at most one group of parameters, under another name.

    Returns:
        Torch's records of them.
    """
    if hasattr(state, "_fsdp_param_groups"):
        groups = state._fsdp_param_groups
    else:
        groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return [each._module_info for group in groups for each in group.fsdp_params]


def reshard(model: nn.Module) -> None:
    """Put FSDP2's shards back in the place of gathered parameters, which a forward pass may leave in the modules.

    At a model's first forward pass FSDP2 records which parameters train, and the dtype in which it reduces their
    gradients. The estimate's passes freeze all parameters, so this makes FSDP2 record both before them.

    Args:
        model: The model.
    """
    modules = _fsdp2_modules(model)
    for state in _fsdp2_states(modules):
        if state._is_root is None:
            state._lazy_init()
    for module in modules:
        module.reshard()


def register_moved(model: nn.Module, moved: Mapping[nn.Module, tuple[nn.Module, str]]) -> None:
    """Make FSDP2 put gathered parameters and shards into the modules that hold them now.

    FSDP2 remembers for each parameter the module and the name under which it found it.

    Args:
        model: The model.
        moved: The module that held a parameter named "weight" → the module that holds it now, and its name there.
    """
    for state in _fsdp2_states(_fsdp2_modules(model)):
        for info in _infos(state):
            if info.module in moved and info.param_name == "weight":
                info.module, info.param_name = moved[info.module]
