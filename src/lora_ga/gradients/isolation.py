"""The model as an estimate needs it, and afterwards exactly as it was.

This is the only file of the package that assigns to attributes of other people's modules. Each function here either
restores what it changed, or names the function that does.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_ga.base import base_model
from lora_ga.distributed.sharding import reshard
from lora_ga.gradients.noise import drops, rates
from lora_ga.layers.factors import Factor
from lora_ga.layers.kinds import packs, unpack
from lora_ga.layers.targets import peft_model_in
from lora_ga.warn import warn

LARGEST_COUNTER = 2**20  # numbers in a buffer of whole numbers that a pass may change
SUMS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
def called_modules_kept(network: nn.Module) -> Iterator[CalledModules]:
    """Restore what a loss changes in all modules that are called in the block, whoever owns them; switch off noise.

    The loss may call modules outside the model: a head, a projector, a teacher. They are not known beforehand. So a
    hook on all modules of the process notes what each has at its first call: the `.grad` of its parameters, its buffers
    (running statistics) and its rates of dropout, which are 0 in the block. A module outside the network keeps the mode
    that it has.

    Args:
        network: Its modules have no noise, also those that are never called.

    Yields:
        What was noted.
    """
    called = CalledModules()
    handles = [nn.modules.module.register_module_forward_pre_hook(called.note)]
    try:
        for module in network.modules():
            called.switch_off_noise(module)
            if _may_stop_gradients(module):
                handles.append(module.register_forward_hook(called.note_output))
        yield called
    finally:
        for handle in handles:
            handle.remove()
        called.restore()


def _may_stop_gradients(module: nn.Module) -> bool:
    """Whether a module is a linear layer of another class or with another kind of weight than torch's own."""
    if "in_features" not in vars(module) or isinstance(module, (LoraLayer, Factor)):
        return False
    if type(module) is not nn.Linear:  # its weight is not read: it may be computed from parts that are sharded
        return True
    return isinstance(module.weight, Tensor) and type(module.weight.data) is not Tensor


class CalledModules:
    """What modules had at their first call: `.grad`, buffers and rates of noise; and where gradients ended."""

    def __init__(self) -> None:
        self.gradients: dict[nn.Parameter, Tensor | None] = {}
        self.buffers: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}
        self.modes: dict[nn.Module, bool] = {}
        self.rates: list[tuple[Any, str, float]] = []
        self._quiet: dict[int, Any] = {}
        self._without_gradient: dict[nn.Module, None] = {}
        self._with_gradient: set[nn.Module] = set()
        self._stops_gradient: dict[nn.Module, None] = {}

    def note(self, module: nn.Module, args: Any) -> None:
        """Note what a module has, unless it was called before, and switch its noise off."""
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and parameter not in self.gradients:
                self.gradients[parameter] = parameter.grad
                parameter.grad = None
        if id(module) not in self._quiet:
            self.switch_off_noise(module)
        if not module.training:
            self._note_gradient(module, args)
            return  # normalisation layers update their running statistics in training mode alone
        if module in self.modes:  # the loss has called `train`
            module.training = False
        for name, buffer in module.named_buffers(recurse=False):
            if (module, name) not in self.buffers and _changes(buffer):
                self.buffers[module, name] = buffer, buffer.clone()

    def switch_off_noise(self, module: nn.Module) -> None:
        """Set the rates of a module and of its configuration to 0; a dropout layer is in evaluation mode."""
        for holder in (module, getattr(module, "config", None)):
            if id(holder) in self._quiet or not hasattr(holder, "__dict__"):
                continue
            self._quiet[id(holder)] = holder
            for name in rates(holder):
                self.rates.append((holder, name, vars(holder)[name]))
                vars(holder)[name] = 0.0
            if holder is module and drops(module):
                self.modes[module] = module.training
                module.training = False

    def _note_gradient(self, module: nn.Module, args: Any) -> None:
        """Note whether a module in evaluation mode passes the gradient of its input on."""
        if torch.is_grad_enabled():
            self._with_gradient.add(module)
        elif any(isinstance(value, Tensor) and value.requires_grad for value in args):
            self._without_gradient[module] = None

    def note_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note whether the gradient of a linear layer's output ends in the layer: its input gets none."""
        ends = torch.is_grad_enabled() and isinstance(output, Tensor) and not output.requires_grad
        if ends and any(isinstance(value, Tensor) and value.requires_grad for value in args):
            self._stops_gradient[module] = None

    def warn_stopped_gradients(self, network: nn.Module) -> None:
        """Warn of linear layers that pass no gradient to their input, as quantised ones may.

        Args:
            network: What computes the loss.
        """
        if not self._stops_gradient:
            return
        found = [
            (name.removesuffix(".base_layer"), module)
            for name, module in network.named_modules()
            if module in self._stops_gradient
        ]
        if found:
            names = ", ".join(name for name, _ in found[:3])
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            module = found[0][1]
            kind = f"{type(module).__name__}, weight {type(getattr(module, 'weight', None)).__name__}"
            warn(
                f"{len(found)} layers pass no gradient to their input: {names}{more} ({kind}). The layers before them "
                "lack this part of their gradient, here and in training. Of torchao's quantisations use one that "
                "quantises weights only (Int8WeightOnlyConfig), not one with dynamic activations."
            )

    def warn_without_gradient(self, network: nn.Module) -> None:
        """Warn of modules that ran in evaluation mode and under `torch.no_grad` only, although targets came before.

        Args:
            network: What computes the loss.
        """
        cut = self._without_gradient.keys() - self._with_gradient
        names = [name for name, module in network.named_modules() if module in cut]
        outer = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
        if outer:
            more = f" and {len(outer) - 3} more" if len(outer) > 3 else ""
            warn(
                f"No gradient passes through {', '.join(outer[:3])}{more}: in evaluation mode the model runs this "
                "under torch.no_grad. If the loss depends on it, the gradients of the layers before it lack this part. "
                "Use LoraGAConfig(training_mode=True)."
            )

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
        for holder, name, rate in self.rates:
            vars(holder)[name] = rate
        for module, training in self.modes.items():
            module.training = training


def _changes(buffer: Tensor) -> bool:
    """Whether a pass may change a buffer: not one without values, nor the large packed weight of a quantised layer."""
    return not buffer.is_meta and (buffer.numel() <= LARGEST_COUNTER or buffer.dtype in SUMS)


@contextlib.contextmanager
def isolated(network: nn.Module, adapter_name: str, *, training_mode: bool = True) -> Iterator[None]:
    """Prepare a model for an estimate, and restore it exactly on leaving, also after an error.

    Meanwhile no parameter requires a gradient, so no `.grad` changes. The adapter `adapter_name` is inactive; other
    active adapters stay active. The modules are in the modes that `set_modes` gives, without dropout (see
    `called_modules_kept`). No key-value cache is filled. Torch's fused kernel for encoder layers is off.

    Args:
        network: A model with adapters, or a network that contains one; all of it is prepared.
        adapter_name: The adapter to deactivate.
        training_mode: Whether the network is in the mode in which it trains.

    Yields:
        Nothing.
    """
    # FSDP2 may have left gathered copies in place of its shards; `requires_grad` has to be set on the shards.
    reshard(network)
    parameters = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    adapters = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in _lora_layers(network)]
    config: Any = getattr(base_model(peft_model_in(network)), "config", None)
    use_cache = getattr(config, "use_cache", None)
    with unfused_attention(), modes_kept(network):
        try:
            deactivate_adapter(network, adapter_name)
            set_modes(network, training=training_mode)
            if use_cache:
                config.use_cache = False
            with called_modules_kept(network) as called:
                yield
            called.warn_stopped_gradients(network)
            if not training_mode:
                called.warn_without_gradient(network)
        finally:
            reshard(network)
            for layer, active, disabled in adapters:
                _set_active(layer, active, enabled=not disabled)
            for parameter, required in parameters:
                parameter.requires_grad_(required)
            if use_cache:
                config.use_cache = use_cache


@contextlib.contextmanager
def modes_kept(network: nn.Module) -> Iterator[None]:
    """Restore the mode of each module of a network on leaving.

    Args:
        network: The network.

    Yields:
        Nothing.
    """
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def set_modes(network: nn.Module, *, training: bool) -> None:
    """Put a network in the mode in which it trains, or in evaluation mode. `modes_kept` restores the modes.

    If the base model is in evaluation mode, as `from_pretrained` leaves it, its `train` method is called, as trainers
    do before every step. A `train` method that leaves parts in evaluation mode is respected. If the base model is in
    training mode, each module keeps its mode: a loop of your own trains with these.

    Args:
        network: A `PeftModel`, or a network that contains one.
        training: Whether it is to be in the mode in which it trains.
    """
    if not training:
        network.eval()
    elif not base_model(peft_model_in(network)).training:
        network.train()
    for module in network.modules():
        unpack(module)
        # A layer that packs its weight in evaluation mode passes no gradient afterwards. Transformers' layers
        # checkpoint their activations in training mode only.
        if packs(module) or (isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing):
            module.training = True


def deactivate_adapter(network: nn.Module, adapter_name: str) -> None:
    """Deactivate an adapter, and let no parameter require a gradient. `isolated` restores both.

    A layer without another active adapter is disabled as a whole: the kernels of Unsloth and Axolotl look for this,
    and fail where no adapter is active. Under it Unsloth's call the layers, whose hooks then see the gradients.

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
        _set_active(layer, active, enabled=bool(active) and not layer.disable_adapters)


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
def without_autocast() -> Iterator[None]:
    """Switch autocast off, on the CPU and on an accelerator: offloaded parameters are not where a layer computes."""
    accelerator = torch.accelerator.current_accelerator()
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", "cpu" if accelerator is None else accelerator.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def input_device(model: Any) -> torch.device:
    """Where batches have to be: where the input embeddings compute, or the model if it has none."""
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # not a Transformers model, or one for audio or images
        embeddings = None
    # A Perceiver gives a parameter: its latents.
    return compute_device(embeddings if isinstance(embeddings, nn.Module) else model)


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
