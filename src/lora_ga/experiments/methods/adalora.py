"""AdaLoRA (Zhang and others, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023).

The adapters begin with 1.5 times the rank, and lose the surplus during training.
"""

from typing import Any

from peft import AdaLoraConfig, get_peft_model

from lora_ga.experiments.methods.base import BuildInputs, Method


def build(inputs: BuildInputs) -> Any:
    """Builds the model; ranks are pruned between one tenth and one half of the steps."""
    config = AdaLoraConfig(
        init_r=inputs.rank + inputs.rank // 2,
        target_r=inputs.rank,
        lora_alpha=inputs.alpha,
        tinit=inputs.steps // 10,
        tfinal=inputs.steps // 2,
        deltaT=max(1, inputs.steps // 40),
        total_step=inputs.steps,
        target_modules=list(inputs.targets),
        task_type=inputs.task_type,
    )
    return get_peft_model(inputs.base, config)


def after_step(model: Any, step: int) -> None:
    """Reallocates the rank budget, from the gradients."""
    model.base_model.update_and_allocate(step)


METHODS = {"adalora": Method(build, after_step=after_step)}
