"""LoRA-GA: start a LoRA adapter where full fine-tuning would go."""

from lora_ga.adapter import apply_estimate
from lora_ga.config import LoraGAConfig
from lora_ga.estimate import estimate_gradients
from lora_ga.export import compress_adapter
from lora_ga.gradient import GradientEstimate
from lora_ga.initialize import get_lora_ga_model, initialize
from lora_ga.lowrank import LowRank
from lora_ga.restore import load

__version__ = "0.1.0"

__all__ = [
    "GradientEstimate",
    "LoraGAConfig",
    "LowRank",
    "apply_estimate",
    "compress_adapter",
    "estimate_gradients",
    "get_lora_ga_model",
    "initialize",
    "load",
]
