"""The workloads that the cost benchmarks compare: the frozen pass, the estimate, plain LoRA steps."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_ga
from lora_ga.gradients.isolation import isolated

RANK = 8
# PEFT's LoRA-GA does not support "all-linear". The names of Llama's layers, and of BERT's.
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "query", "key", "value", "dense"]
Batches = list[dict[str, Tensor]]


def adapter(**settings: Any) -> LoraConfig:
    """The configuration of the adapter, the same for every workload."""
    return LoraConfig(r=RANK, lora_alpha=16, use_rslora=True, target_modules=LINEAR, **settings)


def frozen_pass(base: nn.Module, batches: Batches) -> None:
    """Forward and backward passes with every weight frozen, back to the output of the embeddings: the lower bound."""
    model = get_peft_model(base, adapter())
    hook = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    with isolated(model, "default"):
        for batch in batches:
            model(**batch).loss.backward()
    hook.remove()


def ours(base: nn.Module, batches: Batches) -> None:
    """LoRA-GA: add the adapter, estimate, initialise."""
    lora_ga.initialize(get_peft_model(base, adapter()), batches)


def lora_steps(base: nn.Module, batches: Batches) -> None:
    """Training steps of plain LoRA with AdamW."""
    model = get_peft_model(base, adapter()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
