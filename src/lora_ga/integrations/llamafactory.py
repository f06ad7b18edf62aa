"""LoRA-GA in LLaMA-Factory: its trainer, started with our callback.

    python -m lora_ga.integrations.llamafactory train.yaml        # in place of `llamafactory-cli train train.yaml`

The file may hold `lora_ga: {stable_gamma: 64}`, the fields of `lora_ga.LoraGAConfig`. On several devices start it with
`torchrun --nproc-per-node N -m lora_ga.integrations.llamafactory train.yaml`.
"""

from __future__ import annotations

from typing import Any

from lora_ga.config import LoraGAConfig

# Settings that start the adapter otherwise, or make one that cannot be aligned.
OTHER_STARTS = ("pissa_init", "use_dora", "use_unsloth")


def run_exp(args: dict[str, Any] | list[str] | None = None, callbacks: list[Any] | None = None) -> None:
    """LLaMA-Factory's `run_exp`, with `LoraGACallback` among the callbacks.

    Args:
        args: As LLaMA-Factory's: settings, command-line words, or None for the process's own arguments. Settings may
            hold `lora_ga`, a mapping.
        callbacks: Further callbacks.

    Raises:
        ValueError: The settings train no LoRA adapter or start it otherwise, or `lora_ga` holds what is not a setting.
    """
    from llamafactory.hparams.parser import read_args
    from llamafactory.train.tuner import run_exp as run

    from lora_ga import LoraGACallback

    settings = read_args(args)
    own: dict[str, Any] = {}
    if isinstance(settings, dict):
        settings = dict(settings)
        own = settings.pop("lora_ga", None) or {}
        _check(settings)
    run(settings, callbacks=[*(callbacks or []), LoraGACallback(LoraGAConfig.from_dict(own))])


def _check(settings: dict[str, Any]) -> None:
    """Refuse settings with which there is nothing to align.

    Raises:
        ValueError: They are such.
    """
    kind = settings.get("finetuning_type", "lora")
    if kind != "lora":
        raise ValueError(f"finetuning_type: found {kind!r}, but LoRA-GA starts a LoRA adapter. Set it to lora.")
    for name in OTHER_STARTS:
        if settings.get(name):
            raise ValueError(f"{name}: found true, which does not go together with LoRA-GA. Leave one of the two out.")


if __name__ == "__main__":
    run_exp()
