"""LoRA-GA: start a LoRA adapter where full fine-tuning would go."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_ga.adapter import apply_estimate
    from lora_ga.callback import LoraGACallback
    from lora_ga.config import LoraGAConfig
    from lora_ga.estimate import estimate_gradients
    from lora_ga.export import compress_adapter
    from lora_ga.gradient import GradientEstimate
    from lora_ga.lowrank import LowRank
    from lora_ga.restore import load
    from lora_ga.start import get_lora_ga_model, initialize

__version__ = "0.1.0"

__all__ = [
    "GradientEstimate",
    "LoraGACallback",
    "LoraGAConfig",
    "LowRank",
    "apply_estimate",
    "compress_adapter",
    "estimate_gradients",
    "get_lora_ga_model",
    "initialize",
    "load",
]

# Name → module, imported on first use: `lora-ga --help` need not wait for torch and PEFT.
_HOMES = {
    "GradientEstimate": "gradient",
    "LoraGACallback": "callback",
    "LoraGAConfig": "config",
    "LowRank": "lowrank",
    "apply_estimate": "adapter",
    "compress_adapter": "export",
    "estimate_gradients": "estimate",
    "get_lora_ga_model": "start",
    "initialize": "start",
    "load": "restore",
}

# Modules that other programs reach as attributes after a bare `import lora_ga`: ms-swift does so.
_MODULES = ("entrypoint",)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"lora_ga.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_ga' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"lora_ga.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
