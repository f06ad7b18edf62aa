#!/usr/bin/env bash
# On a mixture of experts "all-linear" adapts no shared expert and no dense MLP, and no warning says so.
#
# Versions: torch 2.13.0 (CPU), peft 0.21.2, transformers 5.24.0, Python 3.11.
# Behaviour: for models whose experts Transformers fuses, PEFT turns the targets gate_proj, up_proj and down_proj into the
# fused parameters gate_up_proj and down_proj. So they no longer match the linear layers of the same names: the MLP of dense
# layers and the shared experts, through which every token passes. Lists of names and patterns are turned likewise. This was
# seen on GLM-4.5 (below), DeepSeek-V3 and Qwen3-Next.
# Output seen:
#   left out by all-linear:
#     model.layers.0.mlp.gate_proj
#     model.layers.0.mlp.up_proj
#     model.layers.0.mlp.down_proj
#     model.layers.1.mlp.shared_experts.gate_proj
#     model.layers.1.mlp.shared_experts.up_proj
#     model.layers.1.mlp.shared_experts.down_proj
#   warnings that name them: 0
#   left out with target_parameters: []
#   loaded differs from trained by 0.0
# Way out: name the weights of these layers in target_parameters, as below.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0
"$folder/venv/bin/python" - <<'PY'
import sys
import tempfile
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1, topk_group=1)
IDS = torch.arange(16)[None]


def base():
    """The same small model at each call. Its first layer is dense, its second has experts."""
    torch.manual_seed(0)
    return Glm4MoeForCausalLM(Glm4MoeConfig(**SIZES, **HEADS, **EXPERTS, first_k_dense_replace=1)).eval()


def left_out(model):
    """The linear layers of the base whose weight no adapter changes, without the head."""
    names = [name for name, module in base().named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    modules = dict(model.base_model.model.named_modules())
    return [name for name in names if not hasattr(modules[name], "lora_A")]


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = get_peft_model(base(), LoraConfig(r=4, target_modules="all-linear"))
missed = left_out(model)
print("left out by all-linear:", *missed, sep="\n  ")
said = [str(warning.message) for warning in caught if any(name in str(warning.message) for name in missed)]
print("warnings that name them:", len(said))

weights = [f"{place}.{part}_proj.weight" for place in ("mlp", "shared_experts") for part in ("gate", "up", "down")]
model = get_peft_model(base(), LoraConfig(r=4, target_modules="all-linear", target_parameters=weights)).eval()
print("left out with target_parameters:", left_out(model))
for name, parameter in model.named_parameters():
    if "lora_B" in name:  # Stands for training: plain LoRA starts with B = 0.
        torch.nn.init.normal_(parameter)
with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    far = (PeftModel.from_pretrained(base(), folder).eval()(IDS).logits - model(IDS).logits).abs().max().item()
print("loaded differs from trained by", far)
sys.exit(0 if len(missed) == 6 and not said and not left_out(model) and far == 0 else 1)
PY
