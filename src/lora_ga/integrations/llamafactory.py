"""LoRA-GA in LLaMA-Factory: runs its training with `LoraGACallback`.

    python -m lora_ga.integrations.llamafactory train.yaml        # in place of `llamafactory-cli train train.yaml`

The file may have an entry `lora_ga: {stable_gamma: 64}` with fields of `lora_ga.LoraGAConfig`. On several devices run
`torchrun --nproc-per-node N -m lora_ga.integrations.llamafactory train.yaml`.
"""

from __future__ import annotations

from typing import Any

from lora_ga.config import LoraGAConfig

# Settings that initialize the adapter by another method, or make an adapter that LoRA-GA cannot initialize.
INCOMPATIBLE_SETTINGS = ("pissa_init", "use_dora", "use_unsloth")


def run_exp(args: dict[str, Any] | list[str] | None = None, callbacks: list[Any] | None = None) -> None:
    """Call LLaMA-Factory's `run_exp` with `LoraGACallback` among the callbacks.

    Args:
        args: As in LLaMA-Factory: a mapping of settings, a list of command-line arguments, or None for the arguments
            of the process. The mapping may have an entry `lora_ga`, a mapping of fields of `LoraGAConfig`.
        callbacks: Other callbacks.

    Raises:
        ValueError: The settings train no LoRA adapter or initialize it by another method, or `lora_ga` has an unknown
            field.
    """
    from llamafactory.hparams.parser import read_args
    from llamafactory.train.tuner import run_exp as run

    from lora_ga import LoraGACallback

    settings = read_args(args)
    fields: dict[str, Any] = {}
    if isinstance(settings, dict):
        settings = dict(settings)
        fields = settings.pop("lora_ga", None) or {}
        _check(settings)
    run(settings, callbacks=[*(callbacks or []), LoraGACallback(LoraGAConfig.from_dict(fields))])


def _check(settings: dict[str, Any]) -> None:
    """Refuse settings that LoRA-GA cannot be used with.

    Raises:
        ValueError: They train no LoRA adapter, or initialize it by another method.
    """
    kind = settings.get("finetuning_type", "lora")
    if kind != "lora":
        raise ValueError(f"finetuning_type: found {kind!r}, but LoRA-GA initializes a LoRA adapter. Set it to lora.")
    for name in INCOMPATIBLE_SETTINGS:
        if settings.get(name):
            raise ValueError(
                f"{name}: found true, which cannot be combined with LoRA-GA. Remove this setting, or run "
                "llamafactory-cli train."
            )


if __name__ == "__main__":
    run_exp()
