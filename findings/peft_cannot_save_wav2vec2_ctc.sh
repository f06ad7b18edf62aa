#!/usr/bin/env bash
# An adapter on all linear layers of a Wav2Vec2ForCTC trains, but cannot be saved: save_pretrained raises an error.
#
# Versions: torch 2.13.0 (CPU), peft 0.21.2, transformers 5.24.0, Python 3.11.
# Behaviour: PEFT's target_modules="all-linear" takes lm_head, the head of the letters. PEFT's save_pretrained then looks
# for adapted embeddings and calls get_output_embeddings or get_input_embeddings, which this model does not implement.
# The trained adapter is lost, unless the program catches the error.
# Output seen:
#   all-linear: trained, then NotImplementedError
#   q_proj, v_proj: trained and saved
#   all-linear, save_embedding_layers=False: trained and saved
# Way out: model.save_pretrained(folder, save_embedding_layers=False), or leave lm_head out (exclude_modules).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0
"$folder/venv/bin/python" - <<'PY'
import sys
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=32)
CONVOLUTIONS = dict(conv_dim=(16, 16), conv_stride=(4, 4), conv_kernel=(8, 8), num_feat_extract_layers=2)
POSITIONS = dict(num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)


def outcome(targets, **settings):
    """Train an adapter for one step, and save it."""
    torch.manual_seed(0)
    base = Wav2Vec2ForCTC(Wav2Vec2Config(**SIZES, **CONVOLUTIONS, **POSITIONS))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets))
    loss = model(input_values=torch.randn(2, 800), labels=torch.randint(1, 32, (2, 4))).loss
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder, **settings)
        except NotImplementedError:
            return "trained, then NotImplementedError"
    return "trained and saved"


every = outcome("all-linear")
some = outcome(["q_proj", "v_proj"])
told = outcome("all-linear", save_embedding_layers=False)
print("all-linear:", every)
print("q_proj, v_proj:", some)
print("all-linear, save_embedding_layers=False:", told)
sys.exit(0 if "NotImplemented" in every and some == told == "trained and saved" else 1)
PY
