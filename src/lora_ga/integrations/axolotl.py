"""LoRA-GA in Axolotl: a plugin, with its settings in the YAML.

plugins: [lora_ga.integrations.axolotl.LoraGAPlugin]
lora_ga: {stable_gamma: 64}    # the fields of lora_ga.LoraGAConfig; may be left out
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from lora_ga.config import LoraGAConfig

# Fused kernels that compute a layer without calling its module, so that nobody can listen to it.
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
ADAPTERS = ("lora", "qlora")


class LoraGAArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    lora_ga: dict[str, Any] | None = None

    @field_validator("lora_ga")
    @classmethod
    def known_settings(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        """Refuse settings that `LoraGAConfig` does not have or allow, when the file is read."""
        LoraGAConfig.from_dict(value or {})
        return value


class LoraGAPlugin(BasePlugin):
    """Starts the adapter by the gradient, through `LoraGACallback`, which Axolotl's trainer gets when it is made."""

    def get_input_args(self) -> str:
        """Where the plugin's settings are declared."""
        return f"{LoraGAArgs.__module__}.{LoraGAArgs.__name__}"

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the configuration, and keep Axolotl from switching fused LoRA kernels on by itself.

        Args:
            cfg: The configuration as read; changed in place.

        Raises:
            ValueError: The configuration trains no LoRA adapter, starts it otherwise, or asks for fused LoRA kernels.
        """
        if cfg.get("adapter") not in ADAPTERS:
            raise ValueError(
                f"adapter: found {cfg.get('adapter')!r}, but LoRA-GA starts a LoRA adapter. Set adapter to "
                f"{' or '.join(ADAPTERS)}, or leave LoraGAPlugin out of plugins."
            )
        if cfg.get("peft_init_lora_weights") not in {None, True}:
            raise ValueError(
                f"peft_init_lora_weights: found {cfg['peft_init_lora_weights']!r}, another start of the adapter than "
                "LoRA-GA's. Leave one of the two out."
            )
        for kernel in KERNELS:
            if cfg.get(kernel):
                raise ValueError(
                    f"{kernel}: found true, but fused LoRA kernels call no layer, so its gradient cannot be heard. Set "
                    "it to false."
                )
            cfg[kernel] = False

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """The callback, for the trainer about to be made.

        Args:
            cfg: The whole configuration.
            model: The adapted model; the callback finds it in the trainer.

        Returns:
            The callback.
        """
        from lora_ga import LoraGACallback

        found = cfg.get("lora_ga")
        return [LoraGACallback(LoraGAConfig.from_dict(dict(found) if isinstance(found, Mapping) else {}))]
