#!/usr/bin/env bash
# An adapter on the shared experts of Laguna is saved, and not found again: they load untrained, with a warning only.
#
# Versions: torch 2.13.0 (CPU), peft 0.21.2, transformers 5.24.0, Python 3.11.
# Behaviour: PEFT renames the keys of a saved adapter as Transformers renames those of a checkpoint. Of Laguna the pattern
# "mlp.shared_expert." also matches keys that have the new name "mlp.shared_experts" already, so none of these is found.
# PeftModel.from_pretrained warns of missing keys, and returns a model whose shared experts are untrained.
# The same was seen of the shared experts of Mistral-Large-4, and of the language layers of Unlimited-OCR.
# Output seen:
#   PEFT warns: Found missing adapter keys while loading the checkpoint:
#     ['base_model.model.model.layers.1.mlp.shared_experts.gate_proj.lora_A...
#   loaded differs from trained: True
#   without the shared experts by 0.0
# Way out: leave the shared experts out, as below (exclude_modules).
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
from transformers import LagunaConfig, LagunaForCausalLM

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0)
HEADS = dict(num_attention_heads=4, num_attention_heads_per_layer=[4, 4], num_key_value_heads=2, head_dim=8)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=24)
IDS = torch.arange(16)[None]


def base():
    """The same small model at each call."""
    torch.manual_seed(0)
    return LagunaForCausalLM(LagunaConfig(**SIZES, **HEADS, **EXPERTS)).eval()


def outcome(**settings):
    """How far the outputs of the loaded adapter are from those of the trained one, and PEFT's warnings."""
    config = LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"], **settings)
    model = get_peft_model(base(), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # Stands for training: plain LoRA starts with B = 0.
            torch.nn.init.normal_(parameter)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(base(), folder).eval()
        far = (loaded(IDS).logits - model(IDS).logits).abs().max().item()
    missing = [str(warning.message) for warning in caught if "missing adapter keys" in str(warning.message)]
    return far, missing


far, missing = outcome()
print("PEFT warns:", missing[0][:141] if missing else "nothing")
print("loaded differs from trained:", far > 1e-3)
without, none = outcome(exclude_modules=[f"shared_experts.{name}_proj" for name in ("gate", "up", "down")])
print("without the shared experts by", without)
sys.exit(0 if missing and "shared_experts" in missing[0] and far > 1e-3 and without == 0 and not none else 1)
PY
