#!/usr/bin/env bash
# convert_state_dict_to_diffusers converts only some of a UNet's LoRA layers, and load_lora_weights then drops those.
#
# Versions: torch 2.13.0 (CPU), diffusers 0.42.1, peft 0.21.2, transformers 5.24.0, Python 3.11.
# Behaviour: the documented way to save is save_lora_weights(unet_lora_layers=convert_state_dict_to_diffusers(...)). Where
# convolutions are adapted beside the attention, the conversion renames the keys of the attention and leaves those of the
# convolutions. load_lora_weights then takes the convolutions alone; a RuntimeWarning lists the others as "additional target
# modules", which is "not necessarily an issue". Keys as PEFT has them load whole.
# Output seen:
#   LoRA layers: 16 trained, 16 loaded from PEFT's keys, 8 from converted keys
# Way out: give save_lora_weights the state dict of PEFT, not converted.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet diffusers==0.42.1 peft==0.21.2 transformers==5.24.0
"$folder/venv/bin/python" - <<'PY'
import sys
import tempfile

from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

SIZES = dict(sample_size=8, layers_per_block=1, block_out_channels=(8, 16), cross_attention_dim=16, norm_num_groups=4)
BLOCKS = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=8,
)


def adapted(unet):
    return sum(isinstance(module, LoraLayer) for module in unet.modules())


def loaded(layers):
    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    pipe = StableDiffusionPipeline(
        **parts,
        unet=UNet2DConditionModel(**SIZES, **BLOCKS),
        scheduler=DDPMScheduler(),
        requires_safety_checker=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_lora_weights(folder, unet_lora_layers=layers)
        pipe.load_lora_weights(folder)
    return adapted(pipe.unet)


unet = UNet2DConditionModel(**SIZES, **BLOCKS)
unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "conv2"]))
layers = get_peft_model_state_dict(unet)
found = adapted(unet), loaded(layers), loaded(convert_state_dict_to_diffusers(layers))
print("LoRA layers: {} trained, {} loaded from PEFT's keys, {} from converted keys".format(*found))
sys.exit(0 if found == (16, 16, 8) else 1)
PY
