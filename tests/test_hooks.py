"""The gradients that hooks record, compared with those of autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_ga.gradients.hooks import record_layers
from lora_ga.gradients.isolation import isolated
from lora_ga.layers.targets import find_targets
from toys import FAMILIES, adapted, autograd_gradients


class Summed:
    """A sink that adds up gᵀx for each layer name."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor, g: Tensor) -> None:
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
