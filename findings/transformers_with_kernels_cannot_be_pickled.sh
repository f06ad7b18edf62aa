#!/usr/bin/env bash
# With the package kernels installed, models of Transformers 5.16 cannot be pickled; they can without it.
#
# Versions: torch 2.13.0 (CPU), transformers 5.16.1, kernels 0.16.2 (the pins of Axolotl 0.19.0), Python 3.11.
# Behaviour: Transformers makes a class inside a function for the functions that kernels may replace, and Llama's modules
# hold an object of it. Nothing asks for a kernel: that the package is installed is enough. So torch.save(model),
# multiprocessing and other ways that pickle a whole model fail. copy.deepcopy and save_pretrained work.
# With transformers 5.24.0 and kernels 0.17.2 the model can be pickled again.
# Output seen:
#   without kernels: pickled
#   with kernels: AttributeError Can't pickle local object '_create_func_module.<locals>.Func'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.16.1
cat > "$folder/attempt.py" <<'PY'
import pickle
import sys

from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
try:
    pickle.dumps(model)
    outcome = "pickled"
except AttributeError as error:
    outcome = f"AttributeError {error}"
print(f"{sys.argv[1]} kernels: {outcome}")
sys.exit(0 if (outcome == "pickled") == (sys.argv[1] == "without") else 1)
PY
"$folder/venv/bin/python" "$folder/attempt.py" without
"$folder/venv/bin/pip" install --quiet kernels==0.16.2
"$folder/venv/bin/python" "$folder/attempt.py" with
