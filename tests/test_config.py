"""LoraGAConfig checks its settings when it is made."""

from __future__ import annotations

from typing import Any

import pytest

from lora_ga import LoraGAConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("direction", "ArB", "direction is 'ArB'; it must be one of ArB2r, A2rBr, ArBr, random"),
        ("scale", "weight_svd", "scale is 'weight_svd'; it must be one of stable, gd, unit, weight"),
        ("offset", "layer", "offset is 'layer'; it must be one of adapter, base"),
        ("estimator", "svd", "estimator is 'svd'; it must be one of streaming, dense, probe"),
        ("on_missing", "warn", "on_missing is 'warn'; it must be one of error, lora"),
        ("stable_gamma", 0, "stable_gamma is 0; it must be a finite number above 0"),
        ("stable_gamma", float("inf"), "stable_gamma is inf"),
        ("reach", 0, "reach is 0; it must be a finite number above 0"),
        ("reach", True, "reach is True; it must be a finite number above 0"),
        ("oversample", -1, "oversample is -1; it must be an integer of at least 0"),
        ("power_steps", 1.5, "power_steps is 1.5; it must be an integer of at least 0"),
        ("max_batches", 0, "max_batches is 0; it must be an integer of at least 1"),
        ("seed", True, "seed is True; it must be an integer"),
        ("tolerance", 0, "tolerance is 0; it must be None or between 0 and 1"),
        ("tolerance", 1.5, "tolerance is 1.5; it must be None or between 0 and 1"),
        ("tolerance", True, "tolerance is True; it must be None or between 0 and 1"),
    ],
)
def test_an_invalid_value_raises_an_error_that_says_what_is_allowed(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraGAConfig(**{field: value})


def test_a_tolerance_needs_the_streaming_estimator() -> None:
    for other in ("dense", "probe"):
        with pytest.raises(ValueError, match=rf'tolerance is 0.1 with estimator="{other}".* estimator="streaming"'):
            LoraGAConfig(tolerance=0.1, estimator=other)


def test_the_number_of_directions_is_twice_the_rank_plus_oversample() -> None:
    assert LoraGAConfig(oversample=5).directions(8) == 21
    assert LoraGAConfig(oversample=0).directions(3) == 6


def test_settings_survive_the_conversion_to_a_dict_and_back() -> None:
    config = LoraGAConfig(direction="random", stable_gamma=64, max_batches=None, tolerance=0.01)
    assert LoraGAConfig.from_dict(config.to_dict()) == config


def test_an_unknown_setting_raises_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no setting gamma; it has direction, estimator, .*stable_gamma"):
        LoraGAConfig.from_dict({"gamma": 16})
