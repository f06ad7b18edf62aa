"""PEFT's own LoRA-GA flow on this library: the same four names, so that a script written for PEFT changes one import.

    from lora_ga.compat import LoraConfig, LoraGAConfig, get_peft_model, preprocess_loraga

`preprocess_loraga` runs the script's `train_step` and records the gradients; `get_peft_model` writes the start. The
formula is the paper's (PEFT multiplies B by the singular values and scales B only). The base model does not change.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
from peft import PeftModel
from torch import nn

from lora_ga.adapter.undo import base_kept
from lora_ga.adapter.write import apply_estimate
from lora_ga.base import another_base
from lora_ga.config import LoraGAConfig as Settings
from lora_ga.gradients.isolation import random_state_kept
from lora_ga.gradients.recording import recording
from lora_ga.gradients.result import GradientEstimate

__all__ = ["LoraConfig", "LoraGAConfig", "get_peft_model", "preprocess_loraga"]

if hasattr(peft, "LoraGAConfig"):
    from peft import LoraConfig, LoraGAConfig
else:  # PEFT 0.18, which has no LoRA-GA

    @dataclasses.dataclass
    class LoraGAConfig:  # type: ignore[no-redef]
        """The class of this name in PEFT 0.19 and newer."""

        direction: str = "ArB2r"
        scale: str = "stable"
        stable_gamma: int = 16

    class LoraConfig(peft.LoraConfig):  # type: ignore[no-redef]
        """PEFT's class with the attribute of PEFT 0.19. It is no field, so saved configurations do not name it."""

        def __init__(self, *args: Any, lora_ga_config: LoraGAConfig | None = None, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.lora_ga_config = lora_ga_config


INIT = "lora_ga"


class _Preprocessed(str):
    """The mark that `preprocess_loraga` leaves in a configuration, for `get_peft_model` here.

    With "lora_ga", PEFT's own get_peft_model would make a plain LoRA of the configuration without an error. It refuses
    every value of `init_lora_weights` that it does not know, and shows its `repr`, which therefore says what to call.
    """

    def __repr__(self) -> str:
        return f"{str(self)!r} (preprocessed by lora_ga.compat: call lora_ga.compat.get_peft_model)"


PREPROCESSED = _Preprocessed("lora_ga_preprocessed")
# PEFT's names of scales → the names that this library uses.
SCALES = {"weight_svd": "weight", "gd_scale": "gd"}

_estimates: weakref.WeakKeyDictionary[nn.Module, GradientEstimate] = weakref.WeakKeyDictionary()


def settings_of(lora_config: LoraConfig, config: Settings) -> Settings:
    """This library's settings for those in PEFT's configuration.

    Args:
        lora_config: PEFT's configuration, with a `lora_ga_config`.
        config: All other settings.

    Returns:
        `config` with PEFT's direction, scale and γ.

    Raises:
        TypeError: `config` or the `lora_ga_config` is of another type.
        ValueError: There is no `lora_ga_config`.
    """
    Settings.check(config)
    theirs = getattr(lora_config, "lora_ga_config", None)  # PEFT 0.18's own class has no such field
    if theirs is None:
        raise ValueError(
            "LoraConfig.lora_ga_config is None, but it holds the direction, the scale and gamma. Use "
            f'LoraConfig(init_lora_weights="{INIT}", lora_ga_config=LoraGAConfig()), with both classes from '
            "lora_ga.compat."
        )
    if not all(hasattr(theirs, name) for name in ("direction", "scale", "stable_gamma")):
        raise TypeError(
            f"LoraConfig.lora_ga_config is a {type(theirs).__name__}; it must be a LoraGAConfig from lora_ga.compat."
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
    """Estimate the gradients that `get_peft_model` starts from, by running the script's backward passes.

    In PEFT's function of this name the weights get gradients, which stay in memory. Here they get none: the inputs and
    output gradients of the layers are recorded. So `zero_grad()` between the passes loses nothing. The
    model is in training mode, with dropout off.

    Args:
        model: The bare base model that `train_step` calls; afterwards exactly as it was.
        lora_config: The adapter to be made. Its `init_lora_weights` becomes a mark for `get_peft_model`.
        train_step: Runs all forward and backward passes of the estimate. Their gradients add up. If layers ran without
            being called, as under fused kernels, it is called twice more.
        cache_file: A safetensors file for the estimate. If it exists, it is read and `train_step` does not run.
        config: Settings that PEFT does not have: `estimator`, `oversample`, `power_steps`, `on_missing`,
            `training_mode`, `seed`.

    Returns:
        The estimate. `get_peft_model` finds it without being given it.

    Raises:
        TypeError: `config` or the `lora_ga_config` is of another type.
        ValueError: There is no `lora_ga_config`, the adapter cannot be aligned, `train_step` gives layers no gradient,
            or the cached estimate belongs to another model.
    """
    settings = settings_of(lora_config, config)
    cache = None if cache_file is None else Path(cache_file)
    if cache is not None and cache.is_file() and cache.stat().st_size > 0:
        estimate = GradientEstimate.load(cache)
        if difference := another_base(model, estimate.fingerprint, layers=estimate.shapes()):
            raise ValueError(
                f"{cache}: the cached estimate belongs to another model: {difference}. Remove the file, or name "
                "another."
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
    """Run `train_step` on the model with a plain adapter in it, and remove the adapter again."""
    plain = dataclasses.replace(
        _plain(lora_config), task_type=None, modules_to_save=None, trainable_token_indices=None, bias="none"
    )
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with random_state_kept():
        adapted = peft.get_peft_model(model, plain)
    try:
        with recording(adapted, settings, repeat=train_step) as recorded:
            if settings.estimator != "probe":  # which would record nothing of it
                train_step()
        return recorded.estimate()
    finally:
        adapted.unload()
        for parameter, needed in required:
            parameter.requires_grad_(needed)


def _plain(lora_config: LoraConfig) -> LoraConfig:
    """A copy of the configuration that makes a plain adapter."""
    return dataclasses.replace(lora_config, init_lora_weights=True, lora_ga_config=None)


def get_peft_model(model: nn.Module, peft_config: Any, adapter_name: str = "default", **kwargs: Any) -> PeftModel:
    """`peft.get_peft_model`, with the start that `preprocess_loraga` estimated for a configuration for LoRA-GA.

    Args:
        model: The base model.
        peft_config: PEFT's configuration; without `init_lora_weights="lora_ga"` this is PEFT's function.
        adapter_name: The adapter.
        **kwargs: As PEFT's.

    Returns:
        The adapted model. It computes what the base computes, and `save_pretrained` writes a plain adapter of rank 2r
        for the original base. After an error the base model is without LoRA layers again.

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
    with base_kept(model):
        adapted = peft.get_peft_model(model, _plain(peft_config), adapter_name, **kwargs)
        apply_estimate(adapted, estimate, settings, adapter_name=adapter_name)
    del _estimates[model]
    return adapted
