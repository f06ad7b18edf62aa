#!/usr/bin/env bash
# After one evaluation on a CPU with AVX512-BF16, 4-bit layers of bitsandbytes pass no gradient to their input in training.
#
# Versions: torch 2.13.0 (CPU), bitsandbytes 0.50.2, Python 3.11.
# Behaviour: in evaluation mode Linear4bit packs its weight for this kind of CPU. Back in training mode the weight stays packed.
# Its input then gets no gradient, so adapters in the layers before it are not trained. No error is raised;
# torch warns that the operator has no autograd kernel. A training that evaluates in the middle goes on like this.
# Output seen:
#   before the evaluation the input gets a gradient: True
#   after it, in training mode: False
# Way out: set support_avx512bf16_for_cpu to False in each such layer before the first evaluation.
# On a CPU without AVX512-BF16 nothing is packed, and this script fails.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet bitsandbytes==0.50.2
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
from bitsandbytes.nn import Linear4bit


def passes_gradient(layer):
    """Whether the layer's input gets a gradient in training mode."""
    x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    layer.train()(x).sum().backward()
    return x.grad is not None and bool(x.grad.any())


def make():
    """A layer whose weight is quantised."""
    torch.manual_seed(0)
    return Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16).to("cpu")


def evaluate(layer):
    """One evaluation."""
    with torch.no_grad():
        layer.eval()(torch.randn(2, 64, dtype=torch.bfloat16))


layer, kept = make(), make()
kept.support_avx512bf16_for_cpu = False
before = passes_gradient(layer)
evaluate(layer)
evaluate(kept)
print("before the evaluation the input gets a gradient:", before)
after = passes_gradient(layer)
print("after it, in training mode:", after)
sys.exit(0 if before and not after and passes_gradient(kept) else 1)
PY
