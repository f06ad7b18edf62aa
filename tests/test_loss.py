"""The loss and the weight of a micro-batch, and the errors of both."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ga
from lora_ga import LoraGAConfig
from lora_ga.gradients.loss import counted_labels, label_tokens, model_loss, refuse_infinite_loss, weighed_loss
from toys import VOCABULARY, adapted, bert, causal, classified, gpt2, llama, t5, tokens, translated


def test_a_decoders_first_position_is_not_a_label() -> None:
    batch = causal(1, rows=4, length=12)[0]
    assert label_tokens(llama(), batch) == label_tokens(gpt2(), batch) == 4 * 11


def test_ignored_labels_do_not_count() -> None:
    batch = causal(1, rows=4, length=12)[0]
    batch["labels"][:, :5] = -100
    assert label_tokens(llama(), batch) == 4 * 7


def test_an_encoder_decoders_labels_are_not_shifted() -> None:
    assert label_tokens(t5(), translated(1)[0]) == 4 * 7


def test_a_classifier_counts_its_rows() -> None:
    assert label_tokens(bert(), classified(1, rows=8)[0]) == 8
    assert label_tokens(bert(), {"labels": torch.rand(8)}) == 8


def test_num_items_in_batch_and_shift_labels_take_precedence_over_labels() -> None:
    batch = causal(1)[0]
    assert label_tokens(llama(), batch | {"num_items_in_batch": torch.tensor(99)}) == 99
    assert label_tokens(llama(), batch | {"shift_labels": torch.tensor([[1, 2, -100]])}) == 2


def test_a_tuple_is_passed_to_the_model_by_position() -> None:
    batch = causal(1)[0]
    model = llama()
    by_name = model_loss(model, batch)
    by_position = model_loss(model, (batch["input_ids"], None, None, None, None, batch["labels"]))
    assert torch.equal(by_name, by_position)


def test_a_batch_without_labels_is_refused_with_its_keys() -> None:
    with pytest.raises(ValueError, match="no loss for a batch of input_ids. Add 'labels'"):
        model_loss(llama(), {"input_ids": tokens()})


def test_a_batch_of_another_type_needs_a_loss_function() -> None:
    with pytest.raises(TypeError, match="A batch is a Tensor; the default loss takes a dict or a tuple"):
        model_loss(llama(), tokens())


@pytest.mark.parametrize("data", [None, 8, {"input_ids": tokens(), "labels": tokens()}])
def test_data_that_is_no_iterable_of_batches_is_refused(data: Any) -> None:
    kind = type(data).__name__
    with pytest.raises(TypeError, match=rf"data is a {kind}, but .* one batch alone is given as \[batch\]"):
        lora_ga.initialize(adapted(llama()), data)


def weighed(batch: Any, loss_fn: Any) -> tuple[Any, float]:
    model = llama()
    return weighed_loss(model, batch, loss_fn, counted_labels(model, batch, loss_fn))


def test_the_loss_function_may_return_the_weight_and_otherwise_labels_or_rows_count() -> None:
    batch = causal(1)[0]
    loss, weight = weighed(batch, lambda model, batch: (model(**batch).loss, 5))
    assert weight == 5
    assert weighed(batch, lambda model, batch: model(**batch).loss)[1] == 44
    assert weighed(tokens(4), lambda model, ids: model(ids, labels=ids).loss)[1] == 4
    assert weighed("text", lambda model, text: torch.ones(()))[1] == 1
    assert torch.isfinite(loss)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.ones(2), r"its loss must be a scalar tensor, found of shape \(2,\)"),
        (1.5, "its loss must be a scalar tensor, found a float"),
        ((torch.tensor(1.0), 0), "its weight is 0.0; it must be a finite number above 0"),
        ((torch.tensor(1.0), float("nan")), "its weight is nan"),
    ],
)
def test_a_loss_that_cannot_be_used_is_refused(result: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighed(causal(1)[0], lambda model, batch: result)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    for value in ("nan", "inf"):
        with pytest.raises(ValueError, match=f"its loss is {value}. Check the data, or compute the loss in float32"):
            refuse_infinite_loss(torch.tensor(float(value)))


def test_a_batch_whose_labels_are_all_ignored_is_refused() -> None:
    batch = causal(1)[0]
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="every label is -100, so it has no loss"):
        weighed(batch, None)


def test_rows_are_counted_where_labels_have_other_names() -> None:
    starts = torch.zeros(3, dtype=torch.long)
    assert label_tokens(bert(), {"input_ids": tokens(3), "start_positions": starts, "end_positions": starts}) == 3
    assert label_tokens(bert(), (tokens(5), None)) == 5
    assert label_tokens(bert(), [{"nested": 1}]) is None


def test_a_second_value_that_is_not_a_weight_is_refused_with_its_type() -> None:
    with pytest.raises(ValueError, match=r"loss_fn returned \(loss, dict\); the second must be the weight, a number"):
        weighed(causal(1)[0], lambda model, batch: (model(**batch).loss, {"logits": 1}))


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


IDS = tokens(2)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"input_ids": IDS.tolist(), "labels": IDS.tolist()}, "input_ids is a list, not a tensor"),
        ({"input_ids": IDS, "labels": IDS.numpy()}, "labels is a ndarray, not a tensor"),
        ({"input_ids": IDS[0], "labels": IDS[0]}, r"input_ids is a tensor of shape \(12,\), one row"),
        ([{"input_ids": IDS[0], "labels": IDS[0]}] * 20, "value 1 is a dict, not a tensor"),
        (["a text", "another"], "value 1 is a str, not a tensor"),
    ],
)
def test_rows_that_are_not_collated_are_named_with_the_batch_and_the_way_to_collate_them(
    batch: Any, found: str
) -> None:
    with pytest.raises(ValueError, match=rf'batch 2: {found}.*DataCollatorWithPadding.*return_tensors="pt"'):
        lora_ga.estimate_gradients(adapted(llama()), [*causal(1), batch])


def test_a_type_error_from_within_the_model_stays_what_it_is() -> None:
    def broken(loss: Any, logits: Any) -> Any:
        raise TypeError("from within")

    with pytest.raises(TypeError, match="^from within$"):
        model_loss(Network(broken), classified(1)[0])
