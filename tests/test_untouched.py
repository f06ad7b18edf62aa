"""Everything that the loss reaches is as it was after an estimate, whoever owns it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import BertModel

import lora_ga
from toys import adapted, bert, causal, llama

ROWS = [(torch.randint(1, 64, (8, 10), generator=(g := torch.Generator().manual_seed(seed))), g) for seed in range(3)]
BATCHES = [{"input_ids": ids, "labels": torch.randint(0, 3, (8,), generator=g)} for ids, g in ROWS]


class Network(nn.Module):
    """A BERT with an adapter, between a projector and a head that train in full, and a temperature."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.encoder = get_peft_model(
            BertModel(bert().config, add_pooling_layer=False).eval(),
            LoraConfig(r=4, target_modules=["query", "value", "dense"]),
        )
        self.embedding, self.projector = nn.Embedding(64, 32), nn.Linear(32, 32)
        self.head = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 3))
        self.temperature = nn.Parameter(torch.zeros(()))
        self.reentrant = reentrant

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss, under the key "loss"."""
        x = self.encoder(inputs_embeds=self.projector(self.embedding(input_ids))).last_hidden_state[:, 0]
        x = self.head(x) if self.reentrant is None else checkpoint(self.head, x, use_reentrant=self.reentrant)
        return {"loss": cross_entropy(x * self.temperature.exp(), labels)}


def trained_once(network: nn.Module) -> None:
    """Give some parameters outside the adapter a `.grad`, and leave that of the others None."""
    network(**BATCHES[0])["loss"].backward()
    network.projector.weight.grad = None  # type: ignore[union-attr]


def state(network: nn.Module) -> dict[str, Any]:
    """Everything that an estimate must not change; `.grad` by identity and by value."""
    grads = {name: (id(p.grad), None if p.grad is None else p.grad.tolist()) for name, p in network.named_parameters()}
    return {
        "grad": {
            name: (identity if values is not None else None, values) for name, (identity, values) in grads.items()
        },
        "values": {name: value.tolist() for name, value in network.state_dict().items()},
        "required": [p.requires_grad for p in network.parameters()],
        "modes": [module.training for module in network.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in network.modules()
        ],
        "random": torch.get_rng_state().tolist(),
        "global hooks": len(nn.modules.module._global_forward_pre_hooks),
    }


def by_closure(network: Any) -> Callable[[Any, Any], Tensor]:
    return lambda model, batch: network(**batch)["loss"]


@pytest.mark.parametrize("estimator", ["streaming", "dense", "probe"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_no_gradient_or_buffer_outside_the_model_changes(estimator: Any, reentrant: bool | None) -> None:
    network = Network(reentrant).train()
    trained_once(network)
    before = state(network)
    lora_ga.estimate_gradients(
        network.encoder, BATCHES, lora_ga.LoraGAConfig(estimator=estimator), loss_fn=by_closure(network)
    )
    assert state(network) == before


def test_no_gradient_outside_the_model_changes_when_the_loss_raises() -> None:
    network = Network().train()
    trained_once(network)
    before, calls = state(network), []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise KeyError("the second batch")
        return network(**batch)["loss"]

    with pytest.raises(KeyError, match="the second batch"):
        lora_ga.estimate_gradients(network.encoder, BATCHES, loss_fn=loss)
    assert state(network) == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_plain_tensors_of_a_loss_keep_their_gradient(reentrant: bool) -> None:
    model, scale = adapted(llama()), torch.ones((), requires_grad=True)

    def loss(model: Any, batch: Any) -> Tensor:
        found = model(**batch).loss
        return (checkpoint(torch.exp, found, use_reentrant=True) if reentrant else found) * scale

    lora_ga.estimate_gradients(model, causal(), loss_fn=loss)
    assert scale.grad is None
    scale.grad = before = torch.full((), 5.0)
    lora_ga.estimate_gradients(model, causal(), loss_fn=loss)
    assert scale.grad is before
    assert before.item() == 5.0


def test_an_optimizer_inside_the_backward_pass_does_not_train_the_head() -> None:
    network = Network().eval()
    weight: Tensor = network.head[2].weight  # type: ignore[assignment]
    before = weight.detach().clone()

    def step(parameter: Tensor) -> None:
        parameter.data.sub_(parameter.grad)  # type: ignore[arg-type]

    weight.register_post_accumulate_grad_hook(step)
    lora_ga.estimate_gradients(network.encoder, BATCHES, loss_fn=by_closure(network))
    assert torch.equal(weight, before)


def test_recorded_passes_of_the_caller_leave_no_gradient_in_the_head() -> None:
    from lora_ga.gradients.recording import recording

    network = Network().train()
    trained_once(network)
    network.temperature.requires_grad_(False)
    before = state(network)
    with recording(network.encoder) as recorded:
        for batch in BATCHES:
            network(**batch)["loss"].backward()
    recorded.estimate()
    assert state(network) == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_estimate_is_the_same_with_and_without_checkpoints_outside_the_model(reentrant: bool) -> None:
    torch.manual_seed(0)
    plain, checkpointed = Network().eval(), Network(reentrant).eval()
    checkpointed.load_state_dict(plain.state_dict())
    one, other = (
        lora_ga.estimate_gradients(network.encoder, BATCHES, loss_fn=by_closure(network))
        for network in (plain, checkpointed)
    )
    assert all(torch.equal(one[name].S, other[name].S) for name in one)
