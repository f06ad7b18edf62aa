"""The table of layer kinds, and what is read from a LoRA layer by its kind: its base weight and its factors."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from lora_ga.layers.convolution import CONVOLUTION
from lora_ga.layers.embedding import EMBEDDING, FactorTable
from lora_ga.layers.experts import EXPERTS
from lora_ga.layers.linear import LINEAR, TRANSPOSED, WeightLayout
from lora_ga.warn import warn


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of layer. Classes are named, not imported, since most come from optional packages.

    Attributes:
        layer: PEFT's layer class, as a path below `peft.tuners.lora`.
        base: The class of the base layer, or a base class of it.
        layout: How the layer stores its weight.
        read: Dequantises the weight of a base layer, as (d_out, d_in); None where the weight is not quantised.
        ready: Whether a base layer's weight has been quantised already.
        ran: Whether the tests of this library run such layers.
    """

    layer: str
    base: str
    layout: WeightLayout = LINEAR
    read: Callable[[Any], Tensor] | None = None
    ready: Callable[[Any], bool] = lambda base: True
    ran: bool = True


def _blocks_ready(base: Any) -> bool:
    return getattr(base.weight, "quant_state", None) is not None and not base.weight.is_meta


def _bytes_ready(base: Any) -> bool:
    return (not base.weight.is_meta and base.weight.itemsize == 1) or base.state.has_fp16_weights


@torch.no_grad()
def _packed(base: Any) -> Tensor:
    """The weight, as the layer's outputs for unit vectors less its bias: the only way that all its backends share."""
    device = base.qweight.device
    units_II = torch.eye(base.in_features, device=device)
    return (base(units_II) - base(torch.zeros_like(units_II[:1]))).mT


READ = dequantize_module_weight
BITS_4, BITS_8 = "bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt"
# The first row that fits is used. A new kind is a new row, with a case in tests/cases.py. If no `WeightLayout` fits how
# the layer stores its weight, write a new one, in a new file.
KINDS: tuple[Kind, ...] = (
    Kind("bnb.Linear4bit", BITS_4, read=READ, ready=_blocks_ready),
    Kind("bnb.Linear8bitLt", BITS_8, read=READ, ready=_bytes_ready),
    # PEFT wraps these as plain layers where the model was not loaded quantised but its layers were replaced.
    Kind("layer.Linear", BITS_4, read=READ, ready=_blocks_ready),
    Kind("layer.Linear", BITS_8, read=READ, ready=_bytes_ready),
    Kind("layer.Linear", "optimum.quanto.nn.qlinear.QLinear", read=lambda base: base.qweight.dequantize()),
    Kind("torchao.TorchaoLoraLinear", "torch.nn.modules.linear.Linear", read=READ),
    Kind("hqq.HqqLoraLinear", "hqq.core.quantize.HQQLinear", read=READ, ready=lambda base: bool(base.ready)),
    Kind("gptq.GPTQLoraLinear", "gptqmodel.nn_modules.qlinear.BaseQuantLinear", read=_packed),
    Kind("awq.AwqLoraLinear", "gptqmodel.nn_modules.qlinear.BaseQuantLinear", read=_packed),
    Kind("layer.Linear", "torch.nn.modules.linear.Linear"),
    Kind("layer.Linear", "transformers.pytorch_utils.Conv1D", TRANSPOSED),
    Kind("layer.Conv1d", "torch.nn.modules.conv.Conv1d", CONVOLUTION),
    Kind("layer.Conv2d", "torch.nn.modules.conv.Conv2d", CONVOLUTION),
    Kind("layer.Embedding", "torch.nn.modules.sparse.Embedding", EMBEDDING),
    Kind("layer.ParamWrapper", "torch.nn.modules.module.Module", EXPERTS),
)


# Weakly, since torch makes a class for each layer whose weight it computes, and such a class holds the layer.
_names: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


def _names_of(kind: type) -> frozenset[str]:
    """The names of a class and of its ancestors, with their modules."""
    if kind not in _names:
        _names[kind] = frozenset(f"{each.__module__}.{each.__qualname__}" for each in kind.__mro__)
    return _names[kind]


def packs(module: nn.Module) -> bool:
    """Whether a module may repack its weight in evaluation mode, as bitsandbytes' 4-bit layers do on some CPUs.

    A repacked layer passes no gradient to its input. It raises no error, and going back to training mode does not help.

    Args:
        module: A module.

    Returns:
        Whether it is such a layer, whatever its device.
    """
    return BITS_4 in _names_of(type(module))


def unpack(module: Any) -> None:
    """Undo the packing of a 4-bit weight; its values stay those of the packed one, whose scales are rounded."""
    if packs(module) and getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        module.state_dict()  # which unpacks the weight in place
        state = module.weight.quant_state
        if state.absmax.dim() == 2:  # bitsandbytes 0.50 leaves the scales of the blocks transposed
            state.absmax = state.absmax.mT.flatten().float()


def keep_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes from packing the 4-bit weights of a model, where it evaluates on some CPUs.

    A packed layer passes no gradient to its input, in training too, and packing rounds the scales of its blocks. So an
    evaluation in the middle of training would spoil all later steps.

    Args:
        model: The model that will be trained.
    """
    module: Any
    for module in filter(packs, model.modules()):
        unpack(module)
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def kind_of(layer: LoraLayer) -> Kind | None:
    """The layer's row of `KINDS`; None if it has none."""
    name, bases = f"{type(layer).__module__}.{type(layer).__qualname__}", _names_of(type(layer.get_base_layer()))
    return next((kind for kind in KINDS if name == f"peft.tuners.lora.{kind.layer}" and kind.base in bases), None)


def layout_of(layer: LoraLayer) -> WeightLayout:
    """How a LoRA layer stores its weight."""
    kind = kind_of(layer)
    return LINEAR if kind is None else kind.layout


def base_weights(layer: LoraLayer) -> Tensor:
    """The base weight of a LoRA layer of a known kind.

    Args:
        layer: The layer.

    Returns:
        (parts, d_out, d_in): a view of the weight, or a dequantised copy of a quantised one.
    """
    kind, base = kind_of(layer), layer.get_base_layer()
    if kind is not None and kind.read is not None:
        unpack(base)
        return kind.read(base)[None]
    layout = layout_of(layer)
    return layout.matrices(layer, getattr(base, layout.parameter_name(layer)))


def entries(layer: LoraLayer, adapter_name: str) -> tuple[Any, Any]:
    """The factors A and B of an adapter in a layer: modules, or in an embedding parameters or `Factor`s."""
    tables = (getattr(layer, name) for name in layout_of(layer).factor_tables)
    # Not `table[adapter_name]`: of a factor in an embedding's table that is the joined matrix.
    a, b = (table.entry(adapter_name) if isinstance(table, FactorTable) else table[adapter_name] for table in tables)
    return a, b


def weight_of(entry: Any) -> Tensor:
    """The matrix that PEFT computes with, of one of `entries`: a module's weight, or the parameter itself."""
    weight: Tensor = getattr(entry, "weight", entry)
    return weight


@functools.cache
def warn_never_run(kind: Kind) -> None:
    """Warn once that no test has run a kind of layer."""
    warn(
        f"{kind.layer.rpartition('.')[2]} is a kind of layer that LoRA-GA supports but has never been run on. Compare "
        "a few gradients with autograd's before you trust the start, and report what you find."
    )
