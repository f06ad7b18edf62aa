"""The gradients that hooks record, against those that autograd computes."""

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
    """A sink that adds up gᵀx by name."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor, g: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + g.mT @ x


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_gradients_equal_autograds_in_every_layer(family: str) -> None:
    make, batches, targets = FAMILIES[family]
    base = make().double()
    batch = batches(1)[0]
    truth = autograd_gradients(copy.deepcopy(base), lambda model: model(**batch).loss)
    model, sink = adapted(base, targets), Summed()
    found = find_targets(model)
    with isolated(model, "default"), record_layers({n: t.layer for n, t in found.items()}, sink):
        model(**batch).loss.backward()
    assert set(sink.sums) == set(found)
    for name, captured in sink.sums.items():
        stored = captured.mT if family == "gpt2" else captured  # Conv1D stores its weight as (inputs, outputs)
        assert (stored - truth[name]).norm() <= 1e-9 * truth[name].norm(), name


class Block(nn.Module):
    """A block that changes outputs in place, shares a layer, and gives a linear layer with bias a 3-D input."""

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


def run(block: nn.Module, x: Tensor, way: str) -> Tensor:
    if way == "plain":
        return block(x)
    return checkpoint(block, x.requires_grad_(), use_reentrant=way == "reentrant")


@pytest.mark.parametrize("way", ["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("trainable", [True, False])
def test_in_place_changes_shared_layers_and_checkpointing_are_recorded_exactly(way: str, trainable: bool) -> None:
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
        run(block, x.clone(), way).square().sum().backward()
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


def test_layers_that_ran_without_a_gradient_are_distinguished_from_those_that_never_ran() -> None:
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


def test_of_a_layer_that_got_no_token_nothing_is_recorded() -> None:
    calls: list[Any] = []
    layer = nn.Linear(4, 4)
    with record_layers({"layer": layer}, lambda *call: calls.append(call)) as coverage:
        layer(torch.randn(0, 4)).sum().backward()
    assert coverage.got_gradient == {"layer"}
    assert calls == []
