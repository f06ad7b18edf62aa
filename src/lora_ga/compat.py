"""The import path of scripts written for PEFT's LoRA-GA; see `lora_ga.integrations.peft`."""

from lora_ga.integrations.peft import LoraConfig, LoraGAConfig, get_peft_model, preprocess_loraga

__all__ = ["LoraConfig", "LoraGAConfig", "get_peft_model", "preprocess_loraga"]
