#!/usr/bin/env bash
# Transformers' load_adapter() does not load the magnitudes of a DoRA adapter; PEFT's from_pretrained does.
#
# Versions: torch 2.13.0 (CPU), transformers 5.24.0, peft 0.21.2, Python 3.11.
# Behaviour: The file has keys that end in lora_magnitude_vector, PEFT's parameters in lora_magnitude_vector.NAME.weight.
# model.load_adapter looks for lora_magnitude_vector.NAME, so the magnitudes stay those of the base's weights. There is no
# error: the load report, a warning, has one line for them as UNEXPECTED and one as MISSING. Transformers 4.55 with PEFT
# 0.18 loads them.
# Output seen (error of the adapter's effect on the logits, largest difference of a magnitude from what was saved):
#   PEFT 0.0 0.0
#   Transformers 0.7610489130020142 0.6549928188323975
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
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
dora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True)
trained = get_peft_model(copy.deepcopy(base), dora).eval()
with torch.no_grad():
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter += 0.3 * torch.randn_like(parameter)


@torch.no_grad()
def logits(model):
    return model(torch.arange(64)[None]).logits


def magnitude(model):
    return next(p.detach() for name, p in model.named_parameters() if "lora_magnitude_vector" in name)


with tempfile.TemporaryDirectory() as folder:
    trained.save_pretrained(folder)
    by_peft = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    by_transformers = copy.deepcopy(base)
    by_transformers.load_adapter(folder)
    by_transformers.eval()
effect = logits(trained) - logits(base)
errors = {}
for name, model in {"PEFT": by_peft, "Transformers": by_transformers}.items():
    errors[name] = ((logits(model) - logits(trained)).norm() / effect.norm()).item()
    print(name, errors[name], (magnitude(model) - magnitude(trained)).abs().max().item())
sys.exit(0 if errors["PEFT"] < 1e-5 and errors["Transformers"] > 0.01 else 1)
PY
