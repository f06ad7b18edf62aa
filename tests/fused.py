"""A small Llama whose layers are never called: fused kernels, with their own backward pass, read the factors."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from toys import VOCABULARY, adapted


class _Fused(torch.autograd.Function):
    """A LoRA layer as one operation. Its backward pass computes no gradient of the base weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling = scaling
        return x @ weight.mT + scaling * (x.to(a.dtype) @ a.mT @ b.mT).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        (g,), (x, weight, a, b) = gradients, ctx.saved_tensors
        flat_x, flat_g = x.flatten(0, -2).to(a.dtype), g.flatten(0, -2).to(a.dtype)
        below = flat_g @ b * ctx.scaling
        inputs = g @ weight + (g.to(a.dtype) @ b @ a * ctx.scaling).to(g.dtype)
        return inputs, None, below.mT @ flat_x, flat_g.mT @ (flat_x @ a.mT) * ctx.scaling, None


def fused(layer: Any, x: Tensor) -> Tensor:
    """Compute a layer as Unsloth's and Axolotl's kernels do: read its parameters and call no module."""
    if not isinstance(layer, LoraLayer):
        return layer(x)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return _Fused.apply(x, layer.get_base_layer().weight, a, b, layer.scaling["default"])


class Block(nn.Module):
    """Attention with one head, and a gated feed-forward network."""

    def __init__(self, width: int, inner: int, called: set[str]) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.called = called

    def apply_layer(self, name: str, x: Tensor) -> Tensor:
        layer = getattr(self, name)
        return layer(x) if name in self.called else fused(layer, x)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.rms_norm(x, x.shape[-1:])
        q, k, v = (self.apply_layer(name, y) for name in ("q_proj", "k_proj", "v_proj"))
        attended = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]
        x = x + self.apply_layer("o_proj", attended)
        y = nn.functional.rms_norm(x, x.shape[-1:])
        gated = nn.functional.silu(self.apply_layer("gate_proj", y)) * self.apply_layer("up_proj", y)
        return x + self.apply_layer("down_proj", gated)


class FusedLlama(nn.Module):
    """A small Llama. Fused kernels read the parameters of its layers, except of those in `called`, which are called."""

    def __init__(self, called: set[str] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.blocks = nn.ModuleList(Block(32, 48, called or set()) for _ in range(2))
        self.unused = nn.Linear(32, 32)
        self.head = nn.Linear(32, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def fused_llama(called: set[str] | None = None, targets: list[str] = ALL, **settings: Any) -> PeftModel:
    return adapted(FusedLlama(called).eval(), targets, **settings)
