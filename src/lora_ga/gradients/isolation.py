"""A model as the estimate needs it, and afterwards exactly as it was."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_ga.distributed.sharding import reshard
from lora_ga.layers.kinds import packs, unpack


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the global generators (torch on all devices, numpy, random) as they were found."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def _checkpointed(layer: GradientCheckpointingLayer, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward with its activations checkpointed, which Transformers does in training mode only."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        # A cache would be filled a second time when the activations are computed again.
        for key in ("past_key_values", "past_key_value", "layer_past"):
            if kwargs.get(key) is not None:
                kwargs[key] = None
        return layer._gradient_checkpointing_func(functools.partial(forward, **kwargs), *args)

    return wrapped


@contextlib.contextmanager
def frozen(model: PeftModel, adapter_name: str) -> Iterator[None]:
    """The model as the estimate needs it, and on leaving exactly as it was.

    No parameter asks for a gradient (so no `.grad` is touched); the adapter `adapter_name` is out of the pass while
    other active ones stay in it; all modules are in evaluation mode, so that there is no dropout, and those that would
    checkpoint activations in training do so here too; no key-value cache is filled.

    Args:
        model: The model.
        adapter_name: The adapter to leave out.

    Yields:
        Nothing.
    """
    reshard(model)  # else these would be gathered copies, and the shards keep what they are set to here
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules = [(module, module.training) for module in model.modules()]
    active = [(module, module._active_adapter) for module in model.modules() if isinstance(module, LoraLayer)]
    config: Any = getattr(model.get_base_model(), "config", None)
    use_cache = getattr(config, "use_cache", None)
    with contextlib.ExitStack() as stack:
        try:
            put_aside(model, adapter_name)
            for module, _ in modules:
                module.training = packs(module)  # these know no dropout, and pass no gradient once they were evaluated
                unpack(module)
                if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                    stack.enter_context(_replaced(module, "forward", _checkpointed(module, module.forward)))
            if use_cache:
                config.use_cache = False
            yield
        finally:
            reshard(model)
            for parameter, required in parameters:
                parameter.requires_grad_(required)
            for module, training in modules:
                module.training = training
            for module, names in active:
                module._active_adapter = names
            if use_cache:
                config.use_cache = use_cache


def put_aside(model: PeftModel, adapter_name: str) -> None:
    """Take an adapter out of the pass and ask no parameter for a gradient.

    Also for a loss that has switched adapters off or over, as preference losses do for their reference: switching back
    undoes both.

    Args:
        model: The model.
        adapter_name: The adapter.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module._active_adapter = [name for name in module.active_adapters if name != adapter_name]


@contextlib.contextmanager
def _replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An attribute of a module for a while; one that the module only had from its class is removed again."""
    own = module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        del module.__dict__[name]
        if own is not None:
            module.__dict__[name] = own


def device_of(model: Any) -> torch.device:
    """Where batches go: the device of the input embeddings, or of the first parameter."""
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # not a Transformers model, or one of sounds or pictures
        embeddings = None
    parameter = next((embeddings or model).parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def place_of(layer: nn.Module) -> torch.device:
    """Where a layer computes: the device Accelerate moves its offloaded weights to, or that of its parameters."""
    hooks = (getattr(module, "_hf_hook", None) for module in layer.modules())
    given = next((device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None), None)
    if given is not None:
        return torch.device(given)
    held = (tensor.device for tensor in itertools.chain(layer.parameters(), layer.buffers()) if not tensor.is_meta)
    return next(held, torch.device("cpu"))


def in_half(model: nn.Module, device: torch.device) -> bool:
    """Whether gradients pass through float16: the weights are of it, or autocast is on with it."""
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
    return autocast or any(parameter.dtype == torch.float16 for parameter in model.parameters())
