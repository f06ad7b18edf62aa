"""The only table of layer kinds, and what a layer's kind says of its weight and its factors."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from lora_ga.layers.convolution import CONVOLUTION
from lora_ga.layers.embedding import LOOKUP
from lora_ga.layers.experts import EXPERTS
from lora_ga.layers.linear import LINEAR, TRANSPOSED, Form


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of layer. Classes are named, not imported: most come from optional packages.

    Attributes:
        layer: PEFT's layer, below `peft.tuners.lora`.
        base: What it wraps: this class or one derived from it.
        form: How the weight is held.
        read: Reads the weight of a quantised layer, as (d_out, d_in); None where the weight is plain numbers.
        ready: Whether the weight has been quantised already.
        ran: Whether this library's tests have run on such layers.
    """

    layer: str
    base: str
    form: Form = LINEAR
    read: Callable[[Any], Tensor] | None = None
    ready: Callable[[Any], bool] = lambda base: True
    ran: bool = True


def _blocks_ready(base: Any) -> bool:
    return getattr(base.weight, "quant_state", None) is not None and not base.weight.is_meta


def _bytes_ready(base: Any) -> bool:
    return (not base.weight.is_meta and base.weight.itemsize == 1) or base.state.has_fp16_weights


@torch.no_grad()
def _packed(base: Any) -> Tensor:
    """What the layer makes of unit vectors, less the bias: its backends share no other way to read the weight."""
    device = base.qweight.device
    units_II = torch.eye(base.in_features, device=device)
    return (base(units_II) - base(torch.zeros_like(units_II[:1]))).mT


READ, BITS_4, BITS_8 = (
    dequantize_module_weight,
    "bitsandbytes.nn.modules.Linear4bit",
    "bitsandbytes.nn.modules.Linear8bitLt",
)
# The first row that fits counts. A new kind is a new row, with a test that its captured gradient is autograd's.
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
    Kind("layer.Conv2d", "torch.nn.modules.conv.Conv2d", CONVOLUTION),
    Kind("layer.Embedding", "torch.nn.modules.sparse.Embedding", LOOKUP),
    Kind("layer.ParamWrapper", "torch.nn.modules.module.Module", EXPERTS),
)


def _named(kind: type, name: str) -> bool:
    return f"{kind.__module__}.{kind.__qualname__}" == name


def packs(module: nn.Module) -> bool:
    """Whether a module changes its weight's layout when it is evaluated: bitsandbytes' 4-bit layers on some CPUs.

    In that layout they pass no gradient on, without an error, also when they are trained again.

    Args:
        module: A module.

    Returns:
        Whether it is such a layer, on whatever device.
    """
    return any(_named(ancestor, BITS_4) for ancestor in type(module).__mro__)


def unpack(module: Any) -> None:
    """Give a weight its usual layout back; the numbers stay the same."""
    if packs(module) and getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        module.state_dict()  # which unpacks the weight in place


def kind_of(layer: LoraLayer) -> Kind | None:
    """The layer's row of `KINDS`; None if it has none."""
    ancestors = type(layer.get_base_layer()).__mro__
    for kind in KINDS:
        if _named(type(layer), f"peft.tuners.lora.{kind.layer}") and any(_named(c, kind.base) for c in ancestors):
            return kind
    return None


def form_of(layer: LoraLayer) -> Form:
    """How a LoRA layer holds its weight."""
    kind = kind_of(layer)
    return LINEAR if kind is None else kind.form


def base_weights(layer: LoraLayer) -> Tensor:
    """The base weight of a LoRA layer of a known kind.

    Args:
        layer: The layer.

    Returns:
        (parts, d_out, d_in): a view of the weight, or of a quantised one a dequantised copy.
    """
    kind, base = kind_of(layer), layer.get_base_layer()
    if kind is not None and kind.read is not None:
        unpack(base)
        return kind.read(base)[None]
    return form_of(layer).matrices(layer, getattr(base, getattr(layer, "parameter_name", "weight")))


def entries(layer: LoraLayer, adapter_name: str) -> tuple[Any, Any]:
    """A and B of an adapter in a layer: modules, or of an embedding parameters or `Factor`s."""
    pair = (layer.lora_A, layer.lora_B)
    if adapter_name in layer.lora_embedding_A:
        pair = (layer.lora_embedding_A, layer.lora_embedding_B)
    a, b = (dict(table.items())[adapter_name] for table in pair)
    return a, b


def weight_of(entry: Any) -> Tensor:
    """What PEFT computes with of one of `entries`: a module's weight, or the parameter itself."""
    weight: Tensor = getattr(entry, "weight", entry)
    return weight


@functools.cache
def say_never_run(kind: Kind) -> None:
    """Say once that a kind of layer is known but was never tried."""
    warnings.warn(
        f"{kind.layer.rpartition('.')[2]} is a kind of layer that LoRA-GA knows and has never been run on. Compare "
        "a few gradients with autograd's before you trust the start, and report what you find.",
        UserWarning,
        stacklevel=4,
    )
