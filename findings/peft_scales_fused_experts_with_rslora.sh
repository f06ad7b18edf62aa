#!/usr/bin/env bash
# With rsLoRA the fused experts' gate_up_proj gets a scaling sqrt(2) times that of all other layers.
#
# Versions: torch 2.13.0 (CPU), peft 0.21.2, transformers 5.24.0, Python 3.11.
# Behaviour: for target_modules="all-linear" on a mixture of experts PEFT adapts the fused parameters, and gives
# gate_up_proj, two matrices in one, twice the rank and twice alpha "to keep alpha/r unchanged". With use_rslora=True the
# scaling is alpha/sqrt(r), so it grows by sqrt(2): the experts train with another scaling than the user has set. And a
# RuntimeWarning says that the two patterns "did not match any targeted module and were ignored", which is not so.
# Output seen:
#   use_rslora=False: other layers 2.0000, gate_up_proj 2.0000
#   use_rslora=True: other layers 4.0000, gate_up_proj 5.6569
#   the warning says that the patterns were ignored; rank of gate_up_proj 8, of other layers 4
# Way out: use_rslora=False with lora_alpha * sqrt(r), which gives every layer the scaling of rsLoRA.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0
"$folder/venv/bin/python" - <<'PY'
import sys
import warnings

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=1)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)


def adapted(use_rslora):
    """Scaling and rank of gate_up_proj and of the other layers, and the warnings."""
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **HEADS, num_experts=4, num_experts_per_tok=2))
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=use_rslora, target_modules="all-linear")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(base, config)
    fused, others = set(), set()
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            mine = getattr(layer, "parameter_name", "") == "gate_up_proj"
            (fused if mine else others).add((layer.scaling["default"], layer.r["default"]))
    ((fused,), (others,)) = fused, others
    return fused, others, any("gate_up_proj" in str(w.message) and "ignored" in str(w.message) for w in caught)


found = {use_rslora: adapted(use_rslora) for use_rslora in (False, True)}
for use_rslora, (fused, others, _) in found.items():
    print(f"use_rslora={use_rslora}: other layers {others[0]:.4f}, gate_up_proj {fused[0]:.4f}")
fused, others, said = found[True]
if said:
    print(f"the warning says that the patterns were ignored; rank of gate_up_proj {fused[1]}, of other layers {others[1]}")
plain, plain_others, _ = found[False]
grown = fused[0] / others[0]
sys.exit(0 if plain[0] == plain_others[0] and abs(grown - 2**0.5) < 1e-6 and said and fused[1] == 8 else 1)
PY
