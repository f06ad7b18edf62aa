#!/usr/bin/env bash
# Transformers' Trainer saves checkpoints of a model with add_adapter() that it cannot resume from.
#
# Versions: torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2, accelerate 1.15.0, Python 3.11.
# Behaviour: the checkpoint of a model whose adapter was added by model.add_adapter holds adapter_model.safetensors, and
# no weights of the model. train(resume_from_checkpoint=...) looks for whole weights and raises an error. (5.24.0 does the
# same; there add_adapter itself asks for a PEFT that is not on PyPI.)
# Output seen:
#   saved: adapter_config.json, adapter_model.safetensors
#   ValueError: Can't find a checkpoint index (pytorch_model.bin.index.json or model.safetensors.index.json)
# Way out: train a PeftModel (get_peft_model), or load the adapter file by hand before train().
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
"$folder/venv/bin/python" - <<'PY'
import os
import sys
import tempfile
import warnings

import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

warnings.simplefilter("ignore")
SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)


def trainer(folder):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZES))
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    rows = [{"input_ids": list(range(8)), "labels": list(range(8))} for _ in range(8)]
    arguments = TrainingArguments(folder, max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    return Trainer(model=model, args=arguments, train_dataset=rows)


with tempfile.TemporaryDirectory() as folder:
    trainer(folder).train()
    checkpoint = os.path.join(folder, "checkpoint-1")
    saved = sorted(name for name in os.listdir(checkpoint) if name.startswith(("adapter", "model", "pytorch")))
    print("saved:", ", ".join(saved))
    try:
        trainer(folder).train(resume_from_checkpoint=checkpoint)
        message = "resumed"
    except ValueError as error:
        message = f"ValueError: {error}"
print(message.split(" in ")[0][:110])
sys.exit(0 if "adapter_model.safetensors" in saved and "checkpoint index" in message else 1)
PY
