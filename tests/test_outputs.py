"""What models return as their loss, and what batches they take."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ga
from lora_ga import LoraGAConfig
from lora_ga.gradients.loss import model_loss
from toys import VOCABULARY, adapted, bert, classified, tokens

DENSE = LoraGAConfig(estimator="dense")
Pair = namedtuple("Pair", "loss logits")


class Network(nn.Module):
    """A classifier of the user's own, which returns `form(loss, logits)`."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first, self.last = nn.Embedding(VOCABULARY, 32), nn.Linear(32, 32), nn.Linear(32, 3)
        self.form = form

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.last(self.first(self.embed(input_ids)).relu().mean(1))
        return self.form(None if labels is None else nn.functional.cross_entropy(logits, labels), logits)


FORMS = {
    "tuple": lambda loss, logits: (loss, logits),
    "list": lambda loss, logits: [loss, logits],
    "named tuple": Pair,
    "loss alone": lambda loss, logits: loss,
    "tuple of the loss": lambda loss, logits: (loss,),
    "dict": lambda loss, logits: {"logits": logits, "loss": loss},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_output_gives_the_gradient_of_the_same_loss(form: str) -> None:
    def own_loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch["input_ids"]), batch["labels"])

    found = lora_ga.estimate_gradients(adapted(Network(FORMS[form]), ["first"]), classified(), DENSE)
    only_logits = adapted(Network(lambda loss, logits: logits), ["first"])
    true = lora_ga.estimate_gradients(only_logits, classified(), DENSE, loss_fn=own_loss)
    assert (found.weight, found.batches) == (true.weight, true.batches)
    assert torch.equal(found["first"].S, true["first"].S)
    assert torch.equal(found["first"].U, true["first"].U)


def test_a_transformers_model_may_return_tuples() -> None:
    one, other = (
        lora_ga.estimate_gradients(adapted(bert(**settings), ["query", "value"]), classified(), DENSE)
        for settings in ({"return_dict": False}, {})
    )
    assert all(torch.equal(one[name].S, other[name].S) for name in other)


def test_positional_batches_are_passed_by_place() -> None:
    batches = [(batch["input_ids"], batch["labels"]) for batch in classified()]
    model = adapted(Network(FORMS["tuple"]), ["first"])
    one, other = (lora_ga.estimate_gradients(model, data, DENSE) for data in (batches, classified()))
    assert torch.equal(one["first"].S, other["first"].S)


@pytest.mark.parametrize(
    ("returned", "kind"),
    [
        (lambda loss, logits: logits, r"a tensor of shape \(8, 3\)"),
        (lambda loss, logits: logits[:1, :1], r"a tensor of shape \(1, 1\)"),  # a prediction, not a loss
        (lambda loss, logits: logits.argmax(), r"a tensor of shape \(\)"),
        (lambda loss, logits: (logits, loss), r"a tuple that begins with a tensor of shape \(8, 3\)"),
        (lambda loss, logits: {"logits": logits}, "a dict"),
        (lambda loss, logits: (), "a tuple"),
    ],
)
def test_an_output_without_a_loss_is_described_where_labels_were_given(returned: Any, kind: str) -> None:
    message = rf"^The model returned no loss for a batch of input_ids, labels; it returned {kind}\. Pass a loss_fn$"
    with pytest.raises(ValueError, match=message):
        model_loss(Network(returned), classified(1)[0])
    with pytest.raises(ValueError, match=f"batch of 2 positional values; it returned {kind}"):
        model_loss(Network(returned), tuple(classified(1)[0].values()))


def test_without_labels_the_advice_is_to_add_them() -> None:
    with pytest.raises(ValueError, match="no loss for a batch of input_ids. Add 'labels' to the batch, or pass a loss"):
        model_loss(bert(return_dict=False), {"input_ids": tokens()})


class OnlyInputs(Network):
    """Takes no labels, as models whose loss is computed outside."""

    def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
        return super().forward(input_ids)


@pytest.mark.parametrize(
    ("batch", "described"),
    [
        (tuple(classified(1)[0].values()), "2 positional values"),
        (list(classified(1)[0].values()), "2 positional values"),
        (classified(1)[0], "input_ids, labels"),
    ],
)
def test_a_batch_that_the_model_does_not_take_is_named_with_what_it_takes(batch: Any, described: str) -> None:
    model = adapted(OnlyInputs(lambda loss, logits: logits), ["first"])
    message = rf"batch 1: The model takes no batch of {described}: its arguments are \(input_ids\)\. Make batches of th"
    with pytest.raises(ValueError, match=message + r"ese, or pass a loss_fn\(model, batch\)"):
        lora_ga.estimate_gradients(model, [batch])


def test_a_type_error_from_within_the_model_stays_what_it_is() -> None:
    def broken(loss: Any, logits: Any) -> Any:
        raise TypeError("from within")

    with pytest.raises(TypeError, match="^from within$"):
        model_loss(Network(broken), classified(1)[0])
