"""LoRA-GA (Wang, Yu, Li, 2024) by PEFT 0.21, whose formula differs from the paper's; see `docs/guide.md`."""

from typing import Any

from peft import LoraGAConfig, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga

from lora_ga.experiments.methods.base import BuildInputs, Method


def build(inputs: BuildInputs) -> Any:
    """Builds the model by PEFT's two calls, with the scaling of the paper."""
    own = LoraGAConfig(stable_gamma=int(inputs.options["stable_gamma"]))
    config = inputs.lora(use_rslora=True, init_lora_weights="lora_ga", lora_ga_config=own)

    def step() -> None:
        for batch in inputs.batches:
            inputs.base(**batch).loss.backward()

    preprocess_loraga(inputs.base, config, step)
    return get_peft_model(inputs.base, config)


METHODS = {"peft_lora_ga": Method(build, options={"stable_gamma": 16.0})}
