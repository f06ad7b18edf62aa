#!/usr/bin/env bash
# PEFT's merge_and_unload() into a frozen layer of optimum-quanto merges nothing, without an error or a warning.
#
# Versions: torch 2.13.0 (CPU), peft 0.21.2, optimum-quanto 0.2.7, transformers 5.24.0, Python 3.11.
# Behaviour: a frozen quanto layer is a subclass of nn.Linear, so PEFT wraps it as a plain linear layer. Merging adds the
# change to a dequantised copy of the weight. The result is the base model, and the trained adapter is gone.
# Output seen (largest differences of the output):
#   adapter from base 3.0053
#   merged from adapter 3.0053, merged from base 0.0
# Way out: keep the adapter apart, or merge into the weights before they are quantised.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0 optimum-quanto==0.2.7
"$folder/venv/bin/python" - <<'PY'
import sys
import warnings

import torch
from optimum.quanto import freeze, qint8, quantize
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
network = nn.Sequential(nn.Linear(32, 32, bias=False))
quantize(network, weights=qint8)
freeze(network)
model = get_peft_model(network, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)).eval()
x = torch.randn(3, 32)
with torch.no_grad(), warnings.catch_warnings():
    warnings.simplefilter("error")  # A warning of the merge would be a change.
    adapted = model(x)
    with model.disable_adapter():
        base = model(x)
    merged = model.merge_and_unload()(x)


def largest(a, b):
    return (a - b).abs().max().item()


print(f"adapter from base {largest(adapted, base):.4f}")
print(f"merged from adapter {largest(merged, adapted):.4f}, merged from base {largest(merged, base)}")
sys.exit(0 if largest(adapted, base) > 1 and largest(merged, base) == 0 else 1)
PY
