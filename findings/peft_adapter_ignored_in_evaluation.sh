#!/usr/bin/env bash
# PEFT's LoRA on the layers of torch's nn.TransformerEncoderLayer is ignored in evaluation mode under torch.no_grad().
#
# Versions: torch 2.13.0 (CPU), peft 0.21.2, transformers 5.24.0, Python 3.11.
# Behaviour: linear1 and linear2 are wrapped by LoRA layers with a non-zero product. In training mode (dropout 0) the
# adapter changes the output. In evaluation mode under no_grad the encoder layer takes torch's fused path, which reads
# linear1.weight and linear2.weight and calls neither module. PEFT's LoRA layer answers with the base weight, so the
# output is the base model's. There is no error and no warning.
# Output seen:
#   evaluation differs from the base by 2.384185791015625e-07
#   training mode differs from the base by 1.2590153217315674
# Way out: torch.backends.mha.set_fastpath_enabled(False) before evaluating, or merge the adapter.
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
layer = nn.TransformerEncoderLayer(d_model=16, nhead=2, dim_feedforward=32, dropout=0.0, batch_first=True)
x = torch.randn(2, 5, 16)
base = layer.eval()(x).detach()
model = get_peft_model(layer, LoraConfig(r=4, target_modules=["linear1", "linear2"], init_lora_weights=False))
with torch.no_grad():
    evaluated = (model.eval()(x) - base).abs().max().item()
    trained = (model.train()(x) - base).abs().max().item()
print("evaluation differs from the base by", evaluated)
print("training mode differs from the base by", trained)
sys.exit(0 if evaluated < 1e-5 and trained > 0.1 else 1)
PY
