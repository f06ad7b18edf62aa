"""PEFT's own LoRA-GA flow on this library: the same four names, so that a script written for PEFT changes one import.

    from lora_ga.compat import LoraConfig, LoraGAConfig, get_peft_model, preprocess_loraga

`preprocess_loraga` runs the script's `train_step` under our capture, and `get_peft_model` writes the start. The formula
is the paper's (PEFT multiplies B by the singular values and scales B only), and the base model is not changed.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, LoraGAConfig, PeftModel
from torch import Tensor, nn

from lora_ga.adapter.write import apply_estimate
from lora_ga.config import LoraGAConfig as Settings
from lora_ga.files import fingerprint
from lora_ga.gradients.estimate import estimate_gradients
from lora_ga.gradients.isolation import random_state_kept
from lora_ga.gradients.result import GradientEstimate

__all__ = ["LoraConfig", "LoraGAConfig", "get_peft_model", "preprocess_loraga"]

INIT = "lora_ga"
# Written into a preprocessed configuration: PEFT's own get_peft_model refuses it by name, where it would make a plain
# LoRA of "lora_ga" without a word.
PREPROCESSED = "lora_ga (preprocessed by lora_ga.compat: call lora_ga.compat.get_peft_model)"
# PEFT's names of the scales that this library calls otherwise.
SCALES = {"weight_svd": "weight", "gd_scale": "gd"}

_estimates: weakref.WeakKeyDictionary[nn.Module, GradientEstimate] = weakref.WeakKeyDictionary()


def settings_of(lora_config: LoraConfig, config: Settings) -> Settings:
    """This library's settings for PEFT's sub-configuration.

    Args:
        lora_config: PEFT's configuration, with a `lora_ga_config`.
        config: All other settings.

    Returns:
        `config` with PEFT's direction, scale and γ.

    Raises:
        ValueError: There is no `lora_ga_config`.
    """
    theirs = lora_config.lora_ga_config
    if theirs is None:
        raise ValueError(
            "LoraConfig.lora_ga_config is None; lora_ga_config must be provided, since direction, scale and gamma come "
            f'from there. If you want to use LoRA-GA: LoraConfig(init_lora_weights="{INIT}", '
            "lora_ga_config=LoraGAConfig())."
        )
    scale = SCALES.get(theirs.scale, theirs.scale)
    return dataclasses.replace(config, direction=theirs.direction, scale=scale, stable_gamma=theirs.stable_gamma)


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], Any],
    cache_file: str | Path | None = None,
    *,
    config: Settings = Settings(),  # noqa: B008 (frozen)
) -> GradientEstimate:
    """Estimate the gradients that `get_peft_model` will start from, by running the script's own backward passes.

    Unlike PEFT's function of this name, no weight is asked for a gradient and none is kept whole, `zero_grad()` between
    the passes loses nothing, dropout is off, and only inputs and output gradients of the layers are read.

    Args:
        model: The bare base model that `train_step` calls; afterwards exactly as it was.
        lora_config: The adapter to be made. Its `init_lora_weights` is replaced by a note for `get_peft_model`.
        train_step: Runs forward and backward passes, as many as the estimate is to see; their gradients add up.
        cache_file: Where the estimate is kept, as a safetensors file; one that is there is read, and `train_step` does
            not run.
        config: Settings that PEFT does not have: `estimator`, `oversample`, `power_steps`, `on_missing`, `seed`.

    Returns:
        The estimate, which `get_peft_model` will also find by itself.

    Raises:
        ValueError: There is no `lora_ga_config`, the adapter cannot be aligned, `train_step` gives layers no gradient,
            or the cache belongs to another model.
    """
    settings = settings_of(lora_config, config)
    cache = None if cache_file is None else Path(cache_file)
    if cache is not None and cache.is_file() and cache.stat().st_size > 0:
        estimate = GradientEstimate.load(cache)
        if estimate.fingerprint != fingerprint(model):
            raise ValueError(
                f"{cache}: the cached estimate belongs to another model: its fingerprint is {estimate.fingerprint}, "
                f"this model's {fingerprint(model)}. Remove the file, or name another."
            )
    else:
        estimate = _estimated(model, lora_config, train_step, settings)
        if cache is not None:
            estimate.save(cache)
    _estimates[model] = estimate
    lora_config.init_lora_weights = PREPROCESSED
    return estimate


def _estimated(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any], settings: Settings
) -> GradientEstimate:
    """Run `train_step` on the model with a plain adapter put in for the while, and take it out again."""

    def script(_: nn.Module, __: Any) -> tuple[Tensor, float]:
        train_step()
        return torch.zeros(()), 1.0  # its backward passes are done: nothing is left to differentiate

    plain = dataclasses.replace(
        _fresh(lora_config), task_type=None, modules_to_save=None, trainable_token_indices=None, bias="none"
    )
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with random_state_kept():
        probe = peft.get_peft_model(model, plain)
    try:
        return estimate_gradients(probe, [None], settings, loss_fn=script)
    finally:
        probe.unload()
        for parameter, needed in required:
            parameter.requires_grad_(needed)


def _fresh(lora_config: LoraConfig) -> LoraConfig:
    """A copy that makes a plain adapter."""
    return dataclasses.replace(lora_config, init_lora_weights=True, lora_ga_config=None)


def get_peft_model(model: nn.Module, peft_config: Any, adapter_name: str = "default", **kwargs: Any) -> PeftModel:
    """`peft.get_peft_model`; a configuration for LoRA-GA gets the start that `preprocess_loraga` estimated.

    Args:
        model: The base model.
        peft_config: PEFT's configuration; without `init_lora_weights="lora_ga"` this is PEFT's function.
        adapter_name: The adapter.
        **kwargs: As PEFT's.

    Returns:
        The adapted model. Its function is the base's, and `save_pretrained` writes a plain rank-2r adapter for the
        original base. If the start is refused, the base model is given back without LoRA layers.

    Raises:
        ValueError: `preprocess_loraga` has not been called for this model, there is no `lora_ga_config`, or the
            estimate does not fit the adapter.
    """
    if not isinstance(peft_config, LoraConfig) or peft_config.init_lora_weights not in {INIT, PREPROCESSED}:
        return peft.get_peft_model(model, peft_config, adapter_name, **kwargs)
    estimate = _estimates.get(model)
    if estimate is None:
        raise ValueError(
            f'init_lora_weights="{INIT}", but no gradients were estimated for this {type(model).__name__}. Call '
            "lora_ga.compat.preprocess_loraga(model, lora_config, train_step) first, once for each adapter."
        )
    settings = settings_of(peft_config, estimate.config)
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapted = peft.get_peft_model(model, _fresh(peft_config), adapter_name, **kwargs)
    try:
        apply_estimate(adapted, estimate, settings, adapter_name=adapter_name)
    except BaseException:
        adapted.unload()
        for parameter, needed in required:
            parameter.requires_grad_(needed)
        raise
    del _estimates[model]
    return adapted
