#!/usr/bin/env bash
# Transformers' model.add_adapter() refuses the newest PEFT that exists.
#
# Versions: torch 2.13.0 (CPU), transformers 5.24.0 and 5.23.0, peft 0.21.2, Python 3.11.
# Behaviour: in 5.24.0 add_adapter, set_adapter, enable_adapters, disable_adapters, active_adapters and delete_adapter ask
# for PEFT 0.22.0. On 2026-11-27 the newest PEFT on PyPI is 0.21.2. load_adapter with a saved adapter does not check, so a
# model can be loaded and then not be asked for its active adapter. 5.23.0 asks for 0.20.0 and accepts 0.21.2.
# (5.10.0 likewise asks for 0.18.2, a version that was never on PyPI.)
# Output seen:
#   transformers 5.24.0: ValueError: The version of PEFT you are using is not compatible, please use a version >= 0.22.0
#   transformers 5.23.0: added
# Way out: transformers 5.23.0, or peft.get_peft_model / peft.inject_adapter_in_model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0
"$folder/venv/bin/python" - <<'PY'
import subprocess
import sys

PROGRAM = """
import transformers
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
try:
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    print(f"transformers {transformers.__version__}: added")
except ValueError as error:
    print(f"transformers {transformers.__version__}: ValueError: {error}")
"""


def run():
    out = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout.strip()
    print(out)
    return out


newest = run()
subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "transformers==5.23.0"], check=True)
before = run()
sys.exit(0 if newest.endswith(">= 0.22.0") and before.endswith("added") else 1)
PY
