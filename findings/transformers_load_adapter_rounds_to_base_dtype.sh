#!/usr/bin/env bash
# Transformers' load_adapter() rounds a float32 adapter to the dtype of the base; PEFT's from_pretrained keeps it.
#
# Versions: torch 2.13.0 (CPU), transformers 5.24.0, peft 0.21.2, Python 3.11.
# Behaviour: PEFT trains and saves LoRA weights in float32 on a bfloat16 base (autocast_adapter_dtype=True). Read by
# PeftModel.from_pretrained they are bit-identical. Read by model.load_adapter from the same folder they are bfloat16,
# so the loaded model is not the trained one, and further training goes on in bfloat16.
# Output seen (dtype of one lora_A, largest difference from what was saved):
#   PEFT torch.float32 0.0
#   Transformers torch.bfloat16 0.00714874267578125
# Way out: PeftModel.from_pretrained.
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

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).to(torch.bfloat16)
trained = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["q_proj"]))
for name, parameter in trained.named_parameters():
    if "lora_" in name:
        torch.nn.init.normal_(parameter)


def first(model):
    return next(parameter.detach() for name, parameter in model.named_parameters() if "lora_A" in name)


with tempfile.TemporaryDirectory() as folder:
    trained.save_pretrained(folder)
    by_peft = first(PeftModel.from_pretrained(copy.deepcopy(base), folder))
    other = copy.deepcopy(base)
    other.load_adapter(folder)
    by_transformers = first(other)
saved = first(trained)
kept, rounded = ((saved - read).abs().max().item() for read in (by_peft, by_transformers))
print("PEFT", by_peft.dtype, kept)
print("Transformers", by_transformers.dtype, rounded)
sys.exit(0 if saved.dtype == torch.float32 and kept == 0 and rounded > 1e-4 else 1)
PY
