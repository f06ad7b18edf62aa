"""OLoRA (Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024): QR of the weight."""

from peft import get_peft_model

from lora_ga.experiments.methods.base import Method

METHOD = Method(lambda inputs: get_peft_model(inputs.base, inputs.lora(init_lora_weights="olora")))
