"""Gradients recorded during passes that the caller runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ga
from fused import fused_llama
from lora_ga import GradientEstimate, LoraGAConfig
from lora_ga.gradients.hooks import Coverage, record_parameters
from lora_ga.gradients.recording import Recording, recording
from toys import adapted, causal, llama

DENSE = LoraGAConfig(estimator="dense", oversample=64)
PROBE = LoraGAConfig(estimator="probe", oversample=24)


def run_passes(model: nn.Module, scale: float = 1.0) -> None:
    for batch in causal():
        (model(**batch).loss * scale).backward()


def assert_close(found: GradientEstimate, true: GradientEstimate, tolerance: float = 1e-5) -> None:
    assert set(found) == set(true)
    for name in true:
        one, other = ((each[name].U * each[name].S) @ each[name].V.mT for each in (found, true))
        assert (one - other).norm() <= tolerance * other.norm(), name
        assert found[name].norm == pytest.approx(true[name].norm, rel=1e-3), name


def test_recorded_passes_add_up_to_the_estimate_over_their_batches() -> None:
    model = adapted(llama())
    with recording(model, DENSE) as recorded:
        run_passes(model, 1 / len(causal()))
    found = recorded.estimate()
    assert (found.batches, found.weight) == (1, 1.0)
    assert_close(found, lora_ga.estimate_gradients(model, causal(), DENSE))


def test_layers_that_are_not_called_are_probed() -> None:
    model, calls = fused_llama({"q_proj"}), []

    def step() -> None:
        calls.append(1)
        run_passes(model, 1 / len(causal()))

    exact, message = LoraGAConfig(oversample=24), "12 of 14 layers ran without being called"
    recorded = record_step(model, exact, step, message)
    assert len(calls) == 3
    with pytest.warns(UserWarning, match=message):
        true = lora_ga.estimate_gradients(fused_llama({"q_proj"}), causal(), exact)
    assert_close(recorded.estimate(), true, 1e-3)


def record_step(model: Any, config: LoraGAConfig, step: Callable[[], None], message: str) -> Recording:
    """Record a step, which is repeated with a warning for the layers that are not called."""
    with pytest.warns(UserWarning, match=message), recording(model, config, repeat=step) as recorded:
        step()
    return recorded


def test_the_probe_records_only_the_repeated_passes_and_needs_repeat() -> None:
    model = fused_llama()
    with recording(model, PROBE, repeat=lambda: run_passes(model, 1 / len(causal()))) as recorded:
        pass
    assert_close(recorded.estimate(), lora_ga.estimate_gradients(fused_llama(), causal(), PROBE), 1e-4)
    with pytest.raises(ValueError, match='estimator="probe" needs `repeat`'), recording(model, PROBE):
        pass


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_unchanged_even_after_an_error(failing: bool) -> None:
    model = adapted(llama()).train()
    required = [parameter.requires_grad for parameter in model.parameters()]
    error = pytest.raises(KeyError, match="of the caller") if failing else contextlib.nullcontext()
    with error, recording(model):
        assert not any(module.training for module in model.modules())
        run_passes(model)
        if failing:
            raise KeyError("of the caller")
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    model = adapted(llama())
    message = r"batch 1: model\.layers\.\d\.\w+\.\w+: the gradient is not finite"
    with pytest.raises(ValueError, match=message), recording(model):
        (model(**causal(1)[0]).loss * float("nan")).backward()


def test_a_parameter_on_the_meta_device_is_refused() -> None:
    layer = nn.Linear(2, 2, device="meta")
    sums: list[Any] = []

    def sink(name: str, x: Tensor, g: Tensor) -> None:
        sums.append(name)

    message = "experts: its weight is on the meta device while the layer runs"
    recorded = record_parameters({"experts": (layer, "weight")}, sink, {}, Coverage())
    with pytest.raises(ValueError, match=message), recorded:
        layer(torch.empty(1, 2, device="meta"))
    assert not layer._forward_pre_hooks
    assert sums == []
