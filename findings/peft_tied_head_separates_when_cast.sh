#!/usr/bin/env bash
# PEFT's ensure_weight_tying=True ties embedding and head only until a parameter is cast or moved.
#
# Versions: torch 2.13.0 (CPU), peft 0.21.2, transformers 5.24.0, Python 3.11.
# Behaviour: with target_modules=["embed_tokens"] the tied lm_head gets a second pair of Parameters in the memory of the
# embedding's factors. A cast or a move gives each its own memory, without a word. get_peft_model itself casts, on every
# bfloat16 base (autocast_adapter_dtype). Then embedding and head train two different changes of the one weight.
# Output seen:
#   float32 base: one memory True
#   bfloat16 base: one memory False
#   float32 base, then .double(): one memory False
#   bfloat16 base, largest difference of the two changes after three steps of SGD: 1.29
# Way out: none with PEFT's tie on a bfloat16 base; put only one of the two into target_modules and do not tie.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0
"$folder/venv/bin/python" - <<'PY'
import sys
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)


def tied(dtype=torch.float32):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **SIZES)).to(dtype)
    return get_peft_model(base, LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True))


def parts(model):
    return model.base_model.model.model.embed_tokens, model.base_model.model.lm_head


def one_memory(model):
    embedding, head = parts(model)
    return head.lora_A["default"].weight.data_ptr() == embedding.lora_embedding_B["default"].data_ptr()


shared = {
    "float32 base": one_memory(tied()),
    "bfloat16 base": one_memory(tied(torch.bfloat16)),
    "float32 base, then .double()": one_memory(tied().double()),
}
for name, value in shared.items():
    print(f"{name}: one memory {value}")
model, ids = tied(torch.bfloat16), torch.arange(1, 17)[None]
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
for _ in range(3):
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
embedding, head = (part.get_delta_weight("default") for part in parts(model))
difference = (embedding - head).abs().max().item()
print(f"bfloat16 base, largest difference of the two changes after three steps of SGD: {difference:.2f}")
sys.exit(0 if list(shared.values()) == [True, False, False] and difference > 0.1 else 1)
PY
