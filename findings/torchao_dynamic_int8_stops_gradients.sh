#!/usr/bin/env bash
# A torchao layer with dynamically quantised activations passes no gradient to its input; LoRA below it stays untrained.
#
# Versions: torch 2.13.0 (CPU), torchao 0.17.0, peft 0.21.2, transformers 5.24.0, Python 3.11.
# Behaviour: three linear layers, LoRA on the first and the last, the one between quantised by torchao and frozen. With
# Int8WeightOnlyConfig both adapters get a gradient. With Int8DynamicActivationInt8WeightConfig the backward pass raises
# nothing, the last adapter gets its gradient, and the first one's .grad stays None: everything below the quantised
# layer is not trained.
# Output seen (gradient norms of lora_A of the first and the last layer):
#   Int8WeightOnlyConfig 0.0368 0.0966
#   Int8DynamicActivationInt8WeightConfig None 0.0964
# Way out: weight-only quantisation for training.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0 torchao==0.17.0
"$folder/venv/bin/python" - <<'PY'
import sys
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

warnings.simplefilter("ignore")  # torchao announces deprecations of its own.
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_  # noqa: E402

found = {}
for quantisation in (Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    quantize_(network[2], quantisation)
    model = get_peft_model(network, LoraConfig(r=4, target_modules=["0", "4"], init_lora_weights=False))
    model(torch.randn(8, 32)).square().mean().backward()
    norms = [None if p.grad is None else p.grad.norm().item() for n, p in model.named_parameters() if "lora_A" in n]
    found[type(quantisation).__name__] = norms
    print(type(quantisation).__name__, *("None" if norm is None else f"{norm:.4f}" for norm in norms))
weight_only, dynamic = found.values()
sys.exit(0 if all(weight_only) and dynamic[0] is None and dynamic[1] else 1)
PY
