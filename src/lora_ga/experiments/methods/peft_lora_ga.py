"""LoRA-GA (Wang, Yu, Li, 2024) by PEFT 0.21, whose formula differs from the paper's; see `docs/guide.md`."""

from importlib.metadata import version
from typing import Any

from peft import get_peft_model

from lora_ga.experiments.methods.base import BuildInputs, Method


def build(inputs: BuildInputs) -> Any:
    """Builds the model by PEFT's two calls, with the scaling of the paper.

    Returns:
        The model.

    Raises:
        ValueError: PEFT is too old.
    """
    try:
        from peft import LoraGAConfig
        from peft.tuners.lora.loraga import preprocess_loraga
    except ImportError as error:
        raise ValueError(
            f"peft_lora_ga needs PEFT 0.19 or newer, but PEFT {version('peft')} is installed. Run: "
            'pip install --upgrade "peft>=0.19"'
        ) from error
    own = LoraGAConfig(stable_gamma=int(inputs.options["stable_gamma"]))
    config = inputs.lora(use_rslora=True, init_lora_weights="lora_ga", lora_ga_config=own)

    def step() -> None:
        for batch in inputs.batches:
            inputs.base(**batch).loss.backward()

    preprocess_loraga(inputs.base, config, step)
    return get_peft_model(inputs.base, config)


METHODS = {"peft_lora_ga": Method(build, options={"stable_gamma": 16.0})}
