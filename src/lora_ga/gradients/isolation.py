"""The model as an estimate needs it, and afterwards exactly as it was.

This is the only file of the package that assigns to attributes of other people's modules. Each function here either
restores what it changed, or names the function that does.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_ga.distributed.sharding import reshard
from lora_ga.files import base_model
from lora_ga.layers.kinds import packs, unpack
from lora_ga.layers.targets import peft_model_in


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the global random generators (torch on all devices, numpy, random) on leaving."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextlib.contextmanager
def unfused_attention() -> Iterator[None]:
    """Let torch's attention and encoder layers call their parts, as in training.

    In evaluation mode, where no weight requires a gradient, they run one fused kernel: it calls no layer, ignores
    adapters, passes no gradient, and packs padded batches into nested tensors.

    Yields:
        Nothing.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def grad_kept(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Set the `.grad` of leaves to None; on leaving, put the same tensors back, without a copy.

    Args:
        leaves: The leaves.

    Yields:
        Nothing.
    """
    kept = [(leaf, leaf.grad) for leaf in leaves]
    try:
        for leaf, _ in kept:
            leaf.grad = None
        yield
    finally:
        for leaf, gradient in kept:
            leaf.grad = gradient


@contextlib.contextmanager
def called_modules_kept() -> Iterator[None]:
    """Restore the `.grad` and the buffers of all modules that are called in the block, whoever owns them.

    The loss may call modules outside the model: a head, a projector, a teacher. They are not known beforehand. So a
    hook on all modules of the process notes what each has at its first call.

    Yields:
        Nothing.
    """
    called = _CalledModules()
    handle = nn.modules.module.register_module_forward_pre_hook(called.note)
    try:
        yield
    finally:
        handle.remove()
        called.restore()


class _CalledModules:
    """What modules had at their first call: the `.grad` of their parameters, and their buffers."""

    def __init__(self) -> None:
        self.gradients: dict[nn.Parameter, Tensor | None] = {}
        self.buffers: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}

    def note(self, module: nn.Module, _: Any) -> None:
        """Note what a module has, unless it was called before."""
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and parameter not in self.gradients:
                self.gradients[parameter] = parameter.grad
                parameter.grad = None
        if not module.training:  # normalisation layers update their running statistics in training mode alone
            return
        for name, buffer in module.named_buffers(recurse=False):
            if (module, name) not in self.buffers and not buffer.is_meta:
                self.buffers[module, name] = buffer, buffer.clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what was noted."""
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient
        for (module, name), (buffer, values) in self.buffers.items():
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)
            if not torch.equal(buffer, values):
                buffer.copy_(values)


@contextlib.contextmanager
def isolated(network: nn.Module, adapter_name: str) -> Iterator[None]:
    """Prepare a model for an estimate, and restore it exactly on leaving, also after an error.

    Meanwhile no parameter requires a gradient, so no `.grad` changes. The adapter `adapter_name` is inactive; other
    active adapters stay active. All modules are in evaluation mode, so there is no dropout. Layers that checkpoint
    their activations in training mode do so here too. No key-value cache is filled. Torch's fused kernel for encoder
    layers is off.

    Args:
        network: A model with adapters, or a network that contains one; all of it is prepared.
        adapter_name: The adapter to deactivate.

    Yields:
        Nothing.
    """
    # FSDP2 may have left gathered copies in place of its shards; `requires_grad` has to be set on the shards.
    reshard(network)
    parameters = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    modules = [(module, module.training) for module in network.modules()]
    adapters = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in _lora_layers(network)]
    config: Any = getattr(base_model(peft_model_in(network)), "config", None)
    use_cache = getattr(config, "use_cache", None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(unfused_attention())
        try:
            deactivate_adapter(network, adapter_name)
            for module, _ in modules:
                # A layer that packs its weight in evaluation mode passes no gradient afterwards; it has no dropout.
                module.training = packs(module)
                unpack(module)
                if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                    stack.enter_context(_checkpointed_in_evaluation(module))
            if use_cache:
                config.use_cache = False
            yield
        finally:
            reshard(network)
            for layer, active, disabled in adapters:
                _set_active(layer, active, enabled=not disabled)
            for parameter, required in parameters:
                parameter.requires_grad_(required)
            for module, training in modules:
                module.training = training
            if use_cache:
                config.use_cache = use_cache


def deactivate_adapter(network: nn.Module, adapter_name: str) -> None:
    """Deactivate an adapter, and let no parameter require a gradient. `isolated` restores both.

    Call it again after a loss that disables adapters or switches between them, as preference losses do for their
    reference model: switching back activates the adapter and lets its parameters require gradients.

    Args:
        network: A model with adapters, or a network that contains one.
        adapter_name: The adapter.
    """
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    for layer in _lora_layers(network):
        active = [name for name in layer.active_adapters if name != adapter_name]
        layer.set_adapter(active, inference_mode=True)


def activate_adapter(layer: LoraLayer, adapter_name: str) -> None:
    """Activate an adapter in one layer, frozen, beside those that take part in the pass. `isolated` restores them.

    Args:
        layer: The layer.
        adapter_name: The adapter.
    """
    others = [] if layer.disable_adapters else [name for name in layer.active_adapters if name != adapter_name]
    _set_active(layer, [*others, adapter_name], enabled=True)


def _set_active(layer: LoraLayer, names: Sequence[str], *, enabled: bool) -> None:
    """Activate exactly these adapters of a layer, and freeze the parameters of all of them."""
    if enabled != (not layer.disable_adapters):
        layer.enable_adapters(enabled)  # with True, PEFT also unfreezes the active ones
    layer.set_adapter(list(names), inference_mode=True)


def _lora_layers(network: nn.Module) -> Iterator[LoraLayer]:
    return (module for module in peft_model_in(network).modules() if isinstance(module, LoraLayer))


@contextlib.contextmanager
def factors_replaced(layer: Any, adapter_name: str, a: nn.Module, b: nn.Module) -> Iterator[None]:
    """Put two modules in the place of an adapter's A and B in one linear layer, and put A and B back on leaving.

    Args:
        layer: PEFT's layer.
        adapter_name: The adapter.
        a: In the place of `layer.lora_A[adapter_name]`.
        b: In the place of `layer.lora_B[adapter_name]`.

    Yields:
        Nothing.
    """
    with contextlib.ExitStack() as stack:
        for table, factor in ((layer.lora_A, a), (layer.lora_B, b)):
            # `table[name] = factor` would give the factor LoRA-GA's structure where the adapter has it.
            stack.callback(table.add_module, adapter_name, table[adapter_name])
            table.add_module(adapter_name, factor.train(layer.training))
        yield


def shadow_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let `module.<name>` return a tensor in place of the parameter, until `unshadow_parameter`.

    Python finds an entry in the module's `__dict__` before torch finds the parameter.

    Args:
        module: The module.
        name: The parameter's name.
        tensor: What to return.
    """
    module.__dict__[name] = tensor


def unshadow_parameter(module: nn.Module, name: str) -> None:
    """Let `module.<name>` return the parameter again; no error if it does already."""
    module.__dict__.pop(name, None)


@contextlib.contextmanager
def replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a module while the context is open; afterwards it is what it was before.

    Args:
        module: The module.
        name: The attribute's name.
        value: The value in its place.

    Yields:
        Nothing.
    """
    own = module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        del module.__dict__[name]
        if own is not None:
            module.__dict__[name] = own


@contextlib.contextmanager
def _checkpointed_in_evaluation(layer: GradientCheckpointingLayer) -> Iterator[None]:
    """Let a layer checkpoint its activations in evaluation mode; Transformers does so in training mode only.

    Transformers has no setting for this, and training mode would switch on the dropout of the layer. So the layer's
    `forward` is replaced for the time of the estimate.

    Args:
        layer: The layer.

    Yields:
        Nothing.
    """
    with replaced(layer, "forward", _checkpointed(layer, layer.forward)):
        yield


def _checkpointed(layer: GradientCheckpointingLayer, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward with its activations checkpointed."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        # Computing the activations a second time would also fill a cache a second time.
        for key in ("past_key_values", "past_key_value", "layer_past"):
            if kwargs.get(key) is not None:
                kwargs[key] = None
        return layer._gradient_checkpointing_func(functools.partial(forward, **kwargs), *args)

    return wrapped


def input_device(model: Any) -> torch.device:
    """Where batches have to be: the device of the input embeddings, or of the first parameter."""
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # not a Transformers model, or one for audio or images
        embeddings = None
    parameter = next((embeddings or model).parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def compute_device(layer: nn.Module) -> torch.device:
    """Where a layer computes: the device to which Accelerate moves offloaded weights, or that of its parameters."""
    hooks = (getattr(module, "_hf_hook", None) for module in layer.modules())
    given = next((device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None), None)
    if given is not None:
        return torch.device(given)
    held = (tensor.device for tensor in itertools.chain(layer.parameters(), layer.buffers()) if not tensor.is_meta)
    return next(held, torch.device("cpu"))


def computes_in_float16(model: nn.Module, device: torch.device) -> bool:
    """Whether gradients pass through float16: the model has float16 weights, or autocast to float16 is on."""
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
    return autocast or any(parameter.dtype == torch.float16 for parameter in model.parameters())
