"""The import path that ms-swift uses. The code is in `lora_ga.integrations.ms_swift`."""

from lora_ga.integrations.ms_swift import LoraGAContext, get_lora_ga_model

__all__ = ["LoraGAContext", "get_lora_ga_model"]
