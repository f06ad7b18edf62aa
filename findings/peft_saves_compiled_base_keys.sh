#!/usr/bin/env bash
# An adapter trained on get_peft_model(torch.compile(base)) cannot be loaded: its keys contain "_orig_mod".
#
# Versions: torch 2.13.0 (CPU), peft 0.21.2, transformers 5.24.0, Python 3.11.
# Behaviour: torch.compile(base) wraps the base in a module with the attribute _orig_mod. PEFT's save_pretrained writes
# keys with that name. On the plain base, PeftModel.from_pretrained finds none of them, warns of missing keys and returns
# a model whose adapter is the untrained one: its output is the base's.
# Output seen:
#   key base_model.model._orig_mod.model.layers.0.self_attn.q_proj.lora_A.weight
#   loaded differs from trained by 0.0093, from the base by 0.0
# Way out: torch.compile(get_peft_model(base, config)), or remove "_orig_mod." from the keys of the file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0
"$folder/venv/bin/python" - <<'PY'
import copy
import sys
import tempfile
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
config = LoraConfig(r=4, target_modules=["q_proj"])
trained = get_peft_model(torch.compile(copy.deepcopy(base), backend="eager"), config).eval()
for name, parameter in trained.named_parameters():
    if "lora_B" in name:  # Stands for training: plain LoRA starts with B = 0.
        torch.nn.init.normal_(parameter)
ids = torch.arange(8)[None]
with torch.no_grad(), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trained.save_pretrained(folder)
    with safe_open(f"{folder}/adapter_model.safetensors", "pt") as file:
        key = min(file.keys())
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    from_trained = (loaded(ids).logits - trained(ids).logits).abs().max().item()
    from_base = (loaded(ids).logits - base(ids).logits).abs().max().item()
print("key", key)
print(f"loaded differs from trained by {from_trained:.4f}, from the base by {from_base}")
sys.exit(0 if "_orig_mod" in key and from_trained > 1e-3 and from_base == 0 else 1)
PY
