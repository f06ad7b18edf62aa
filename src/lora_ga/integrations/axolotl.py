"""LoRA-GA in Axolotl: a plugin with settings in the YAML file.

plugins: [lora_ga.integrations.axolotl.LoraGAPlugin]
lora_ga: {stable_gamma: 64}    # the fields of lora_ga.LoraGAConfig; may be left out
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from lora_ga.config import LoraGAConfig

# Settings for fused kernels, which compute a layer without calling its module, so that no hook of it runs.
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
ADAPTERS = ("lora", "qlora")


class LoraGAArgs(BaseModel):
    """The settings that the plugin adds to Axolotl's configuration."""

    lora_ga: dict[str, Any] | None = None

    @field_validator("lora_ga")
    @classmethod
    def known_settings(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        """Refuse settings that `LoraGAConfig` does not have or allow as soon as the file is read."""
        LoraGAConfig.from_dict(value or {})
        return value


class LoraGAPlugin(BasePlugin):
    """Adds `LoraGACallback` to Axolotl's trainer."""

    def get_input_args(self) -> str:
        """The path of the class that declares the plugin's settings."""
        return f"{LoraGAArgs.__module__}.{LoraGAArgs.__name__}"

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the configuration, and switch off the fused LoRA kernels that Axolotl would switch on by default.

        Args:
            cfg: The configuration as read from the file; changed in place.

        Raises:
            ValueError: The configuration trains no LoRA adapter, initializes it by another method, or asks for fused
                LoRA kernels.
        """
        if cfg.get("adapter") not in ADAPTERS:
            raise ValueError(
                f"adapter: found {cfg.get('adapter')!r}, but LoRA-GA initializes a LoRA adapter. Set adapter to "
                f"{' or '.join(ADAPTERS)}, or leave LoraGAPlugin out of plugins."
            )
        if cfg.get("peft_init_lora_weights") not in {None, True}:
            raise ValueError(
                f"peft_init_lora_weights: found {cfg['peft_init_lora_weights']!r}, which initializes the adapter by "
                "another method than LoRA-GA. Remove this setting, or leave LoraGAPlugin out of plugins."
            )
        for kernel in KERNELS:
            if cfg.get(kernel):
                raise ValueError(
                    f"{kernel}: found true, but fused LoRA kernels do not call the layers, so LoRA-GA's hooks, which "
                    "collect the gradients, do not run. Set it to false."
                )
            cfg[kernel] = False

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Make the callback for Axolotl's trainer.

        Args:
            cfg: The whole configuration.
            model: The adapted model. It is not used here: the trainer passes it to the callback.

        Returns:
            A list with the callback, which Axolotl passes to the trainer that it makes next.
        """
        from lora_ga import LoraGACallback

        settings = cfg.get("lora_ga")
        return [LoraGACallback(LoraGAConfig.from_dict(dict(settings) if isinstance(settings, Mapping) else {}))]
