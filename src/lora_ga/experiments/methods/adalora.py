"""AdaLoRA (Zhang and others, 2023): starts with half as much rank again and prunes it on the way."""

from typing import Any

from peft import AdaLoraConfig, get_peft_model

from lora_ga.experiments.methods.base import Method, Work


def build(work: Work) -> Any:
    """Prunes between a tenth and half of the steps, ten times or more."""
    config = AdaLoraConfig(
        init_r=work.rank + work.rank // 2,
        target_r=work.rank,
        lora_alpha=work.alpha,
        tinit=work.steps // 10,
        tfinal=work.steps // 2,
        deltaT=max(1, work.steps // 40),
        total_step=work.steps,
        target_modules=list(work.targets),
        task_type=work.task_type,
    )
    return get_peft_model(work.base, config)


def after_step(model: Any, step: int) -> None:
    """Moves the rank budget; reads the gradients."""
    model.base_model.update_and_allocate(step)


METHOD = Method(build, after_step=after_step)
