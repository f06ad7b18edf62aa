"""`estimate_gradients`: the gradients that it finds, the model it leaves unchanged, the input it refuses."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import lora_ga
from lora_ga import GradientEstimate, LoraGAConfig
from lora_ga.gradients.loss import label_tokens
from toys import FAMILIES, adapted, autograd_gradients, bert, causal, classified, llama, t5, translated

DENSE = LoraGAConfig(estimator="dense", oversample=64, max_batches=None)


def matrix(estimate: GradientEstimate, name: str) -> Tensor:
    part = estimate[name]
    return (part.U * part.S) @ part.V.mT


def uneven(whole: dict[str, Tensor], sizes: list[int], labels: list[int]) -> list[dict[str, Tensor]]:
    """Cut a batch into micro-batches with different numbers of label tokens. Masks the labels of the batch in place."""
    parts, row = [], 0
    for size, kept in zip(sizes, labels, strict=True):
        if whole["labels"].dim() > 1:
            whole["labels"][row : row + size, : whole["labels"].shape[1] - kept] = -100
        parts.append({key: value[row : row + size] for key, value in whole.items()})
        row += size
    return parts


def float64_loss(model: nn.Module, batch: Any) -> Tensor:
    """The model's loss in float64. Transformers computes it in float32, whatever the dtype of the model."""
    logits, labels = model(**batch).logits, batch["labels"]
    if label_tokens(model, {"labels": torch.ones(1, 2, dtype=torch.long)}) == 1:  # a decoder, whose labels are shifted
        logits, labels = logits[:, :-1], labels[:, 1:]
    return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


# The norm layers of Llama and T5 always compute in float32, so parts of a batch are rounded differently.
TOLERANCE = {"llama": 1e-6, "t5": 1e-6, "gpt2": 1e-9, "bert": 1e-9}


@pytest.mark.parametrize("family", FAMILIES)
def test_uneven_micro_batches_give_the_gradient_of_the_whole_batch(family: str) -> None:
    make, batches, targets = FAMILIES[family]
    base = make().double()
    whole = {key: torch.cat([batch[key] for batch in batches(3)])[:12] for key in batches(1)[0]}
    parts = uneven(whole, [1, 5, 2, 4], [6, 2, 5, 1])

    counts = [label_tokens(base, part) or 0 for part in parts]
    each = [autograd_gradients(copy.deepcopy(base), lambda m, part=part: float64_loss(m, part)) for part in parts]  # type: ignore[misc]
    in_parts = {
        name: torch.stack([count * one[name] for count, one in zip(counts, each, strict=True)]).sum(dim=0) / sum(counts)
        for name in each[0]
    }
    at_once = autograd_gradients(copy.deepcopy(base), lambda model: float64_loss(model, whole))
    estimate = lora_ga.estimate_gradients(adapted(base, targets), parts, DENSE, loss_fn=float64_loss)
    assert estimate.batches == 4
    for name in estimate:
        for truth, tolerance in ((in_parts, 1e-9), (at_once, TOLERANCE[family])):
            true = truth[name].mT if family == "gpt2" else truth[name]
            assert (matrix(estimate, name) - true).norm() <= tolerance * true.norm(), name
            assert estimate[name].norm == pytest.approx(true.norm().item(), rel=tolerance)


def test_unweighted_micro_batches_give_another_gradient() -> None:
    whole = {key: torch.cat([batch[key] for batch in causal(3)]) for key in ("input_ids", "labels")}
    parts = uneven(whole, [1, 5, 2, 4], [6, 2, 5, 1])
    model = adapted(llama())
    weighted = lora_ga.estimate_gradients(model, parts, DENSE)
    unweighted = lora_ga.estimate_gradients(model, parts, DENSE, loss_fn=lambda m, batch: (m(**batch).loss, 1))
    a, b = (matrix(estimate, next(iter(weighted))) for estimate in (weighted, unweighted))
    assert (a * b).sum() / (a.norm() * b.norm()) < 0.99


def snapshot(model: Any) -> dict[str, Any]:
    """Everything that an estimate could change, in the model and in the random generators."""
    return {
        "training": [module.training for module in model.modules()],
        "active": [getattr(module, "_active_adapter", None) for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules()],
        "required": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "values": [parameter.detach().clone() for parameter in model.state_dict().values()],
        "cache": model.config.use_cache,
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True)[1].tolist()),  # type: ignore[index]
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def broken(model: nn.Module, batch: Any) -> Tensor:
    model(**batch)
    raise RuntimeError("the loss broke")


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("loss_fn", [None, broken])
def test_an_estimate_does_not_change_the_model_even_if_the_loss_raises(
    mode: str, loss_fn: Callable[..., Tensor] | None
) -> None:
    model = adapted(bert(), FAMILIES["bert"][2], task_type="SEQ_CLS", lora_dropout=0.1)
    model.config.use_cache = True
    getattr(model, mode)()
    model(**classified(1)[0]).loss.backward()  # the estimate must keep these gradients
    before = snapshot(model)

    def shuffled() -> Any:
        for batch in classified(3):
            torch.randperm(5), random.random(), np.random.rand()
            yield batch

    if loss_fn is None:
        lora_ga.estimate_gradients(model, shuffled())
    else:
        with pytest.raises(RuntimeError, match="the loss broke"):
            lora_ga.estimate_gradients(model, shuffled(), loss_fn=loss_fn)
    after = snapshot(model)
    assert [key for key in before if not same(before[key], after[key])] == []


def test_dropout_does_not_change_the_estimate() -> None:
    model = adapted(bert(), FAMILIES["bert"][2], lora_dropout=0.5).train()
    first, again = (lora_ga.estimate_gradients(model, classified()) for _ in range(2))
    assert all(torch.equal(first[name].U, again[name].U) for name in first)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_used_and_gives_the_same_factors(reentrant: bool) -> None:
    plain = lora_ga.estimate_gradients(adapted(llama()), causal(), DENSE)
    base = llama()
    base.activation_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    calls = []
    base.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: calls.append(1))
    model = adapted(base)
    checkpointed = lora_ga.estimate_gradients(model, causal(2), DENSE)
    whole = lora_ga.estimate_gradients(model, causal(), DENSE)
    assert len(calls) == 2 * (2 + 3)  # per batch: once in the forward pass, once in the backward pass
    assert checkpointed.batches == 2
    for name in plain:
        torch.testing.assert_close(whole[name].S, plain[name].S)


def test_the_factors_of_a_layer_depend_on_the_seed_but_not_on_the_other_layers() -> None:
    model = adapted(llama())
    first = lora_ga.estimate_gradients(model, causal())
    torch.manual_seed(99)
    again = lora_ga.estimate_gradients(model, causal())
    few = lora_ga.estimate_gradients(adapted(llama(), ["v_proj"]), causal())
    assert all(torch.equal(first[name].U, again[name].U) for name in first)
    assert all(torch.equal(first[name].V, few[name].V) for name in few)


def test_max_batches_limits_the_number_of_batches_read() -> None:
    read = []

    def endless() -> Any:
        while True:
            read.append(1)
            yield causal(1)[0]

    assert lora_ga.estimate_gradients(adapted(llama()), endless(), LoraGAConfig(max_batches=3)).batches == 3
    assert len(read) == 3


def test_the_forward_pass_uses_other_active_adapters_but_not_the_fresh_one() -> None:
    model = adapted(llama())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    alone = lora_ga.estimate_gradients(model, causal(), DENSE)
    model.base_model.set_adapter(["default", "other"])
    together = lora_ga.estimate_gradients(model, causal(), DENSE)
    name = "model.layers.0.mlp.up_proj"
    assert not torch.allclose(alone[name].S, together[name].S)
    merged = copy.deepcopy(model)
    merged.base_model.set_adapter("other")
    base = merged.merge_and_unload()
    truth = autograd_gradients(base, lambda m: torch.stack([m(**batch).loss for batch in causal()]).mean())
    assert together[name].norm == pytest.approx(truth[name].norm().item(), rel=1e-4)


def test_bfloat16_models_give_nearly_the_float32_factors() -> None:
    exact = lora_ga.estimate_gradients(adapted(llama()), causal(), DENSE)
    rough = lora_ga.estimate_gradients(adapted(llama().to(torch.bfloat16)), causal(), DENSE)
    for name in exact:
        assert rough[name].U.dtype == torch.float32
        a, b = matrix(exact, name), matrix(rough, name)
        assert (a * b).sum() / (a.norm() * b.norm()) > 0.99, name


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [[], iter(())])
def test_data_without_a_batch_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match=r"The data holds no batch; the gradient needs at least one\."):
        lora_ga.estimate_gradients(adapted(llama()), data)


def test_a_batch_without_labels_raises_an_error_with_its_number() -> None:
    data = [*causal(1), {"input_ids": causal(1)[0]["input_ids"]}]
    with pytest.raises(ValueError, match="batch 2: The model returned no loss for a batch of input_ids"):
        lora_ga.estimate_gradients(adapted(llama()), data)


def test_labels_all_ignored_are_counted_in_a_warning_and_refused_where_no_others_are_left() -> None:
    data = causal(3)
    data[2]["labels"][:] = -100
    with pytest.warns(UserWarning, match=r"1 of 3 batches have no label \(every label is -100\)"):
        lora_ga.estimate_gradients(adapted(llama()), data)
    with pytest.raises(ValueError, match=r"None of the 1 batches has a label\. Every label is -100"):
        lora_ga.estimate_gradients(adapted(llama()), data[2:])


def test_a_loss_that_is_not_finite_raises_an_error_with_its_batch() -> None:
    with pytest.raises(ValueError, match="batch 1: its loss is nan"):
        lora_ga.estimate_gradients(
            adapted(llama()), causal(), loss_fn=lambda model, batch: model(**batch).loss * float("nan")
        )


@pytest.mark.parametrize("estimator", ["dense", "streaming"])
def test_a_gradient_that_is_not_finite_raises_an_error_with_its_layer_and_batch(estimator: str) -> None:
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, *g: Tensor) -> Tensor:
            return g[0] * float("nan")

    base = llama()
    calls: list[int] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        calls.append(1)
        return Poison.apply(output) if len(calls) == 2 else output

    base.model.layers[1].register_forward_hook(hook)
    with pytest.raises(ValueError, match=r"batch 2: model\.layers\.1\.mlp\.down_proj: the gradient is not finite"):
        lora_ga.estimate_gradients(adapted(base), causal(), LoraGAConfig(estimator=estimator))


def encoder_only(model: nn.Module, batch: Any) -> Tensor:
    return model.get_encoder()(batch["input_ids"]).last_hidden_state.square().mean()  # type: ignore[operator]


def first_layer_only(model: nn.Module, batch: Any) -> Tensor:
    """A loss that uses only the hidden states of the first layer."""
    return model(**batch, output_hidden_states=True).hidden_states[1].square().mean()


def vanishing(model: nn.Module, batch: Any) -> Tensor:
    """A loss whose gradient is zero beyond the first layer."""
    states = model(**batch, output_hidden_states=True).hidden_states
    return states[1].square().mean() + 0 * states[2].sum()


@pytest.mark.parametrize(
    ("make", "data", "loss_fn", "reason", "count"),
    [
        (t5, translated, encoder_only, "never ran in 3 batches", "20 of 32"),
        (llama, causal, first_layer_only, "ran, but got no gradient", "7 of 14"),
        (llama, causal, vanishing, "its gradient is exactly zero", "7 of 14"),
    ],
)
def test_layers_without_a_gradient_are_an_error_or_by_choice_a_warning(
    make: Any, data: Any, loss_fn: Any, reason: str, count: str
) -> None:
    with pytest.raises(ValueError, match=f"(?s){count} layers cannot be aligned:.*{reason}.*on_missing="):
        lora_ga.estimate_gradients(adapted(make()), data(), loss_fn=loss_fn)
    with pytest.warns(UserWarning, match=f"(?s){count} layers cannot be aligned:.*{reason}.*They start as plain LoRA"):
        estimate = lora_ga.estimate_gradients(adapted(make()), data(), LoraGAConfig(on_missing="lora"), loss_fn=loss_fn)
    assert f"{len(estimate.missing)} of {len(estimate) + len(estimate.missing)}" == count
    assert all(reason in why for why in estimate.missing.values())


def test_a_loss_that_uses_no_layer_is_always_an_error() -> None:
    with pytest.raises(ValueError, match="(?s)14 of 14 layers cannot be aligned.*No layer is left"):
        lora_ga.estimate_gradients(
            adapted(llama()), causal(), LoraGAConfig(on_missing="lora"), loss_fn=lambda model, batch: torch.ones(())
        )


def test_a_rank_above_half_the_smaller_side_is_refused_before_a_batch_is_read() -> None:
    model = adapted(llama(), rank_pattern={"k_proj": 9})

    def unread() -> Any:
        raise AssertionError("a batch was read")
        yield

    message = r"(?s)2 of 14 layers.*layers\.0\.self_attn\.k_proj: rank 9 needs 18 gradient directions, but the weight "
    with pytest.raises(ValueError, match=message + r"is 16 x 32: use a rank of at most 8"):
        lora_ga.estimate_gradients(model, unread())
    with pytest.warns(UserWarning, match=message):
        estimate = lora_ga.estimate_gradients(model, causal(), LoraGAConfig(on_missing="lora"))
    assert len(estimate) == 12
