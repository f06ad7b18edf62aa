"""The gradients that hooks record, in passes of the estimate and in passes that the caller makes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_ga
from lora_ga import GradientEstimate, LoraGAConfig
from lora_ga.gradients.hooks import Coverage, record_layers, record_parameters
from lora_ga.gradients.isolation import isolated
from lora_ga.gradients.recording import Recording, recording
from lora_ga.layers.targets import find_targets
from lora_ga.linalg.accumulator import Inputs
from toys import FAMILIES, adapted, autograd_gradients, causal, fused_llama, llama


class Summed:
    """A sink that adds up gᵀx for each layer name."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Inputs, g: Tensor) -> None:
        assert isinstance(x, Tensor)
        self.sums[name] = self.sums.get(name, 0) + g.mT @ x


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_gradients_equal_those_of_autograd_in_every_layer(family: str) -> None:
    make, batches, targets = FAMILIES[family]
    base = make().double()
    batch = batches(1)[0]
    truth = autograd_gradients(copy.deepcopy(base), lambda model: model(**batch).loss)
    model, sink = adapted(base, targets), Summed()
    found = find_targets(model)
    with isolated(model, "default"), record_layers({n: t.layer for n, t in found.items()}, sink):
        model(**batch).loss.backward()
    assert set(sink.sums) == set(found)
    for name, recorded in sink.sums.items():
        stored = recorded.mT if family == "gpt2" else recorded  # Conv1D stores its weight as (inputs, outputs)
        assert (stored - truth[name]).norm() <= 1e-9 * truth[name].norm(), name


class Block(nn.Module):
    """A block that changes outputs in place, calls a layer twice, and gives linear layers with bias a 3-D input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.mul_(2.0).relu_()
        y = self.shared(y) + self.shared(y.cos())
        z = self.last(y)
        z += 1
        return z


def run(block: nn.Module, x: Tensor, mode: str) -> Tensor:
    if mode == "plain":
        return block(x)
    return checkpoint(block, x.requires_grad_(), use_reentrant=mode == "reentrant")


@pytest.mark.parametrize("mode", ["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("trainable", [True, False])
def test_recording_is_exact_with_in_place_changes_shared_layers_and_checkpointing(mode: str, trainable: bool) -> None:
    torch.manual_seed(0)
    block = Block().double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    block(x).square().sum().backward()
    truth = {name: layer.weight.grad.clone() for name, layer in block.named_children()}  # type: ignore[union-attr,operator]
    for parameter in block.parameters():
        parameter.grad = None
        parameter.requires_grad_(trainable)
    sink = Summed()
    with record_layers(dict(block.named_children()), sink) as coverage:
        run(block, x.clone(), mode).square().sum().backward()
    assert coverage.ran == coverage.got_gradient == {"first", "shared", "last"}
    for name, true in truth.items():
        torch.testing.assert_close(sink.sums[name], true)


def test_recording_does_not_change_the_models_output_or_gradients() -> None:
    block = Block()
    x = torch.randn(2, 3, 6, requires_grad=True)
    plain = block(x)
    (expected,) = torch.autograd.grad(plain.square().sum(), x)
    with record_layers(dict(block.named_children()), Summed()):
        recorded = block(x)
        (found,) = torch.autograd.grad(recorded.square().sum(), x)
    assert torch.equal(plain, recorded)
    assert torch.equal(expected, found)


def test_hooks_are_gone_when_the_loss_raises() -> None:
    block = Block()

    def broken() -> None:
        with record_layers(dict(block.named_children()), Summed()):
            block(torch.randn(2, 3, 6))
            raise RuntimeError("the loss broke")

    with pytest.raises(RuntimeError, match="the loss broke"):
        broken()
    assert not any(layer._forward_hooks for layer in block.modules())


def test_coverage_distinguishes_layers_without_a_gradient_from_layers_that_never_ran() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return self.used(x)

    model = Forked()
    with record_layers(dict(model.named_children()), Summed()) as coverage:
        model(torch.randn(3, 4)).sum().backward()
    assert coverage.ran == {"used", "unused"}
    assert coverage.got_gradient == {"used"}


def test_nothing_is_recorded_for_a_layer_without_tokens() -> None:
    calls: list[Any] = []
    layer = nn.Linear(4, 4)
    with record_layers({"layer": layer}, lambda *call: calls.append(call)) as coverage:
        layer(torch.randn(0, 4)).sum().backward()
    assert coverage.got_gradient == {"layer"}
    assert calls == []


# --- passes that the caller makes ------------------------------------------------------------------------------------

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
    model = adapted(llama(), lora_dropout=0.1).train()
    required = [parameter.requires_grad for parameter in model.parameters()]
    error = pytest.raises(KeyError, match="of the caller") if failing else contextlib.nullcontext()
    with error, recording(model):
        assert {type(module) for module in model.modules() if not module.training} == {nn.Dropout}
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

    def sink(name: str, x: Inputs, g: Tensor) -> None:
        sums.append(name)

    message = "experts: its weight is on the meta device while the layer runs"
    recorded = record_parameters({"experts": (layer, "weight")}, sink, {}, Coverage())
    with pytest.raises(ValueError, match=message), recorded:
        layer(torch.empty(1, 2, device="meta"))
    assert not layer._forward_pre_hooks
    assert sums == []


def test_a_parameter_is_itself_again_after_a_call_that_raises_an_error() -> None:
    layer = nn.Linear(2, 2)
    recorded = record_parameters({"experts": (layer, "weight")}, lambda *_: None, {}, Coverage())
    with recorded:
        with pytest.raises(RuntimeError, match="shapes"):
            layer(torch.ones(1, 3))
        assert layer.weight is layer._parameters["weight"]
