"""LoRA-GA: initialise LoRA adapters from the gradient of the weights they adapt."""

import importlib
from typing import TYPE_CHECKING, Any

from lora_ga.version import __version__ as __version__
from lora_ga.version import check_versions

if TYPE_CHECKING:
    from lora_ga.adapter.initialize import get_lora_ga_model, initialize
    from lora_ga.adapter.load import load
    from lora_ga.adapter.ranks import allocate_ranks
    from lora_ga.adapter.rate import find_rate
    from lora_ga.adapter.write import apply_estimate
    from lora_ga.config import LoraGAConfig
    from lora_ga.export.compress import compress_adapter
    from lora_ga.gradients.estimate import estimate_gradients
    from lora_ga.gradients.result import GradientEstimate
    from lora_ga.integrations.trainer import LoraGACallback
    from lora_ga.linalg.low_rank import LowRank

check_versions()

__all__ = [
    "GradientEstimate",
    "LoraGACallback",
    "LoraGAConfig",
    "LowRank",
    "allocate_ranks",
    "apply_estimate",
    "compress_adapter",
    "estimate_gradients",
    "find_rate",
    "get_lora_ga_model",
    "initialize",
    "load",
]

# Name → module, imported on first use: `lora-ga --help` need not wait for torch and PEFT.
_HOMES = {
    "GradientEstimate": "gradients.result",
    "LoraGACallback": "integrations.trainer",
    "LoraGAConfig": "config",
    "LowRank": "linalg.low_rank",
    "allocate_ranks": "adapter.ranks",
    "apply_estimate": "adapter.write",
    "compress_adapter": "export.compress",
    "estimate_gradients": "gradients.estimate",
    "find_rate": "adapter.rate",
    "get_lora_ga_model": "adapter.initialize",
    "initialize": "adapter.initialize",
    "load": "adapter.load",
}


def __getattr__(name: str) -> Any:
    if name == "entrypoint":  # ms-swift reaches this module as an attribute after a bare `import lora_ga`
        return importlib.import_module("lora_ga.entrypoint")
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_ga' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"lora_ga.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
