#!/usr/bin/env bash
# PEFT's add_weighted_adapter() with weight 1.0 changes the function of an adapter that uses rsLoRA.
#
# Versions: torch 2.13.0 (CPU), peft 0.21.2, transformers 5.24.0, Python 3.11.
# Behaviour: the combined adapter gets lora_alpha = r and keeps use_rslora=True. Its factor is then
# alpha / sqrt(r) = sqrt(r) and not the 1.0 that the combination assumes. A single rsLoRA adapter of rank 8, combined with
# weight 1.0, has its change multiplied by sqrt(8) = 2.83, for each of the combination types "linear", "svd" and "cat".
# Without rsLoRA the change is the same to rounding.
# Output seen (size of the combined change divided by the adapter's):
#   use_rslora=False linear 1.0000 svd 1.0000 cat 1.0000
#   use_rslora=True linear 2.8284 svd 2.8284 cat 2.8284
# Way out: divide the weights by sqrt(r), or save the adapter with use_rslora=False and the same factor.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
x = torch.randn(3, 16)
ratios = {}
for rslora in (False, True):
    config = LoraConfig(r=8, lora_alpha=16, use_rslora=rslora, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 16)), config)
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    change = model(x) - base
    shown = []
    for kind in ("linear", "svd", "cat"):
        model.add_weighted_adapter(["default"], [1.0], kind, combination_type=kind)
        model.set_adapter(kind)
        ratios[rslora, kind] = ((model(x) - base).norm() / change.norm()).item()
        shown.append(f"{kind} {ratios[rslora, kind]:.4f}")
        model.set_adapter("default")
    print(f"use_rslora={rslora}", *shown)
expected = {key: 8**0.5 if key[0] else 1.0 for key in ratios}
sys.exit(0 if all(abs(ratios[key] - expected[key]) < 1e-4 for key in ratios) else 1)
PY
