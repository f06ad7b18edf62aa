"""`estimate_gradients`: the gradients that it finds, the model it leaves unchanged, the input it refuses."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import logging
import math
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import safe_open, save_file
from torch import Tensor, nn

import lora_ga
from cases import EXPERTS, mixtral, seeded
from lora_ga import GradientEstimate, LoraGAConfig
from lora_ga.distributed.processes import Processes
from lora_ga.gradients import loop, progress
from lora_ga.gradients.coverage import report_missing
from lora_ga.gradients.loss import label_tokens
from lora_ga.gradients.setup import prepare
from lora_ga.layers.linear import LINEAR
from lora_ga.linalg.low_rank import LowRank, probes, truncated_svd
from toys import (
    FAMILIES,
    FUSED_EXPERTS,
    adapted,
    autograd_gradients,
    bert,
    causal,
    checkpoint_activations,
    classified,
    llama,
    t5,
    tokens,
    translated,
)

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
    checkpoint_activations(base, use_reentrant=reentrant)
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


def test_one_process_computes_no_digests_of_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "digest_of", None)
    assert lora_ga.estimate_gradients(adapted(llama(), ["q_proj"]), causal(2)).batches == 2


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


@pytest.mark.parametrize("function", [lora_ga.estimate_gradients, lora_ga.initialize])
def test_every_warning_shows_the_line_of_the_user(function: Any) -> None:
    data = causal(2, rows=1, length=3)
    data[1]["labels"][:] = -100
    model = adapted(llama())
    with pytest.warns(UserWarning, match="Fewer gradient directions") as caught:
        function(model, data)
    assert {str(each.message)[:6] for each in caught} == {"1 of 2", "Fewer "}
    assert {each.filename for each in caught} == {__file__}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from Python 3.11 on")
def test_an_error_of_the_model_has_a_note_with_the_number_of_the_batch() -> None:
    data = causal(3)
    data[1]["input_ids"][0, 0] = 10_000  # the vocabulary is smaller
    with pytest.raises(IndexError) as caught:
        lora_ga.estimate_gradients(adapted(llama()), data)
    assert caught.value.__notes__ == ["This happened in batch 2 of those that LoRA-GA reads."]


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


@pytest.mark.parametrize(("factor", "offset", "found"), [(math.nan, 0.0, "nan"), (1.0, math.inf, "inf")])
def test_a_loss_that_is_not_finite_raises_an_error_with_its_batch(factor: float, offset: float, found: str) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).loss * factor + offset  # with the offset alone, the gradients stay finite

    with pytest.raises(ValueError, match=f"batch 1: its loss is {found}"):
        lora_ga.estimate_gradients(adapted(llama()), causal(), loss_fn=loss)


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
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        lora_ga.apply_estimate(adapted(make()), estimate, LoraGAConfig(on_missing="lora"))
    assert not any("experts" in str(each.message) for each in shown)


def test_a_loss_that_uses_no_layer_is_always_an_error() -> None:
    with pytest.raises(ValueError, match="(?s)14 of 14 layers cannot be aligned.*No layer is left"):
        lora_ga.estimate_gradients(
            adapted(llama()), causal(), LoraGAConfig(on_missing="lora"), loss_fn=lambda model, batch: torch.ones(())
        )


@pytest.mark.parametrize(("count", "text"), [(8, "\n  8: too far\n"), (9, "\n  1, 2, 3 and 6 more: too far\n")])
def test_up_to_eight_layers_with_one_reason_are_listed_one_by_one(count: int, text: str) -> None:
    targets: Any = {str(number): SimpleNamespace(unknown=None, unfit=None, layout=LINEAR) for number in range(1, 20)}
    with pytest.raises(ValueError, match=text):
        report_missing(dict.fromkeys(list(targets)[:count], "too far"), targets, "error")


def test_a_rank_above_half_the_smaller_side_is_refused_before_a_batch_is_read() -> None:
    model = adapted(llama(), rank_pattern={"k_proj": 9})

    def unread() -> Any:
        raise AssertionError("a batch was read")
        yield

    message = r"(?s)2 of 14 layers.*layers\.0\.self_attn\.k_proj.*: rank 9 is more than half of a layer's smaller side"
    with pytest.raises(ValueError, match=message + r".* The largest rank that fits all is 8 .*k_proj is 16 x 32"):
        lora_ga.estimate_gradients(model, unread())
    with pytest.warns(UserWarning, match=message):
        estimate = lora_ga.estimate_gradients(model, causal(), LoraGAConfig(on_missing="lora"))
    assert len(estimate) == 12


INPUTS, OUTPUTS = 9, 7
WEIGHTS = (5.0, 1.0, 12.0, 3.0)
BATCHES = (2, 1, 4, 1)
# Layer → which of the four runs reached it, as an expert is reached by the tokens of some batches only.
REACHED = {"dense": (0, 1, 2, 3), "common": (0, 2, 3), "rare": (1,), "late": (2, 3), "first": (0,)}
# Layer → the run in which it converged, and after how many batches and label tokens.
SETTLED = {"late": (3, 1, 2.0), "first": (0, 1, 2.0)}


def gradient(name: str, run: int) -> Tensor:
    """The mean gradient of a layer over the batches of one run."""
    seed = 10 * list(REACHED).index(name) + run
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def single(run: int) -> GradientEstimate:
    """The estimate of one run, which keeps every direction."""
    layers = {}
    for name, runs in REACHED.items():
        if run in runs:
            g = gradient(name, run)
            layers[name] = LowRank(*truncated_svd(g, OUTPUTS), g.norm().item(), g @ probes(INPUTS, 0).double())
    settled = {name: (batches, weight) for name, (when, batches, weight) in SETTLED.items() if when == run}
    return GradientEstimate(
        layers,
        LoraGAConfig(),
        "0" * 16,
        WEIGHTS[run],
        BATCHES[run],
        missing={name: "got no token" for name in REACHED if name not in layers},
        settled={name: batches for name, (batches, _) in settled.items()},
        settled_weight={name: weight for name, (_, weight) in settled.items()},
    )


def weight_in(name: str, run: int) -> float:
    """How many label tokens of a run a layer has seen, whether or not they reached it."""
    when, _, weight = SETTLED.get(name, (None, 0, 0.0))
    return weight if when == run else WEIGHTS[run]


def groupings(parts: Sequence[GradientEstimate]) -> Iterator[GradientEstimate]:
    """Every way to add up estimates in their order: all at once, or groups of neighbours first."""
    if len(parts) == 1:
        yield parts[0]
        return
    for cuts in itertools.product((False, True), repeat=len(parts) - 1):
        if not any(cuts):
            continue
        edges = [0, *(at for at, cut in enumerate(cuts, start=1) if cut), len(parts)]
        for groups in itertools.product(*(list(groupings(parts[a:b])) for a, b in itertools.pairwise(edges))):
            yield groups[0].merge(*groups[1:])


def product(layer: LowRank) -> Tensor:
    return (layer.U * layer.S) @ layer.V.mT


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_every_grouping_and_order_gives_the_mean_over_all_label_tokens(order: tuple[int, ...]) -> None:
    parts = [single(run) for run in order]
    merged = list(groupings(parts))
    assert len(merged) == 11
    for whole in merged:
        assert (whole.weight, whole.batches) == (sum(WEIGHTS), sum(BATCHES))
        assert whole.settled == {"late": 8 - 1 + 1, "first": 8 - 2 + 1}
        assert not whole.missing
        assert sorted(whole.merged_from) == sorted(digest for run in range(4) for digest in single(run)._digests())
        for name, runs in REACHED.items():
            total = sum(weight_in(name, run) for run in range(4))
            assert whole.weight_of(name) == total
            true = torch.stack([weight_in(name, run) / total * gradient(name, run) for run in runs]).sum(dim=0)
            torch.testing.assert_close(product(whole[name]), true, rtol=1e-11, atol=1e-12)
            assert whole[name].norm == pytest.approx(true.norm().item(), rel=1e-11)
            torch.testing.assert_close(whole[name].sketch, true @ probes(INPUTS, 0).double(), rtol=1e-11, atol=1e-11)


@FUSED_EXPERTS
def test_estimates_of_a_mixture_with_silent_experts_add_up_to_that_of_one_run() -> None:
    config = LoraGAConfig(estimator="dense", oversample=64, on_missing="lora")
    base = seeded(mixtral)()
    model = adapted(base, **EXPERTS)
    # One token repeated reaches few experts.
    ids = [torch.full((1, 3), 5), torch.full((1, 4), 40), tokens(2, 8)]
    batches: list[Any] = [{"input_ids": each, "labels": each} for each in ids]
    with pytest.warns(UserWarning, match="experts .or groups. got no gradient"):
        parts = [lora_ga.estimate_gradients(model, [batch], config) for batch in batches]
    whole = lora_ga.estimate_gradients(model, batches, config)
    silent = {name for part in parts for name in part.missing} & {*whole}
    assert silent, "every expert got a token in every part, so the test shows nothing"
    a, b, c = parts
    for merged in (a.merge(b, c), a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a, b), b.merge(c.merge(a))):
        assert set(merged) == set(whole)
        for name in whole:
            difference = (product(merged[name]) - product(whole[name])).norm()
            assert difference <= 1e-5 * whole[name].norm, name
            assert merged[name].norm == pytest.approx(whole[name].norm, rel=1e-5)


@pytest.mark.parametrize(
    ("runs", "numbers"),
    [((0, 0), "1 and 2"), ((0, 1, 1), "2 and 3"), ((0, 1, 0), "1 and 3"), ((2, 1, 0, 1), "2 and 4")],
)
def test_the_same_estimate_given_twice_is_refused_wherever_it_stands(runs: tuple[int, ...], numbers: str) -> None:
    first, *others = [single(run) for run in runs]
    with pytest.raises(ValueError, match=f"Estimates {numbers} are one and the same, which would count twice"):
        first.merge(*others)


def test_an_estimate_that_is_in_a_sum_is_refused_also_after_saving(tmp_path: Path) -> None:
    a, b, c = (single(run) for run in range(3))
    a.merge(b).save(tmp_path / "sum.safetensors")
    b.save(tmp_path / "b.safetensors")
    both, again = (GradientEstimate.load(tmp_path / f"{name}.safetensors") for name in ("sum", "b"))
    for parts, numbers in (((both, again), "1 and 2"), ((c, again, both), "2 and 3"), ((both, c.merge(b)), "1 and 2")):
        with pytest.raises(ValueError, match=f"(?s)Estimates {numbers} contain the same estimate.*each of them once"):
            parts[0].merge(*parts[1:])
    with pytest.raises(ValueError, match="1 and 2 are one and the same"):
        both.merge(b.merge(a))
    assert both.merge(c).merged_from == a.merge(b, c).merged_from


def test_files_written_before_sums_listed_their_parts_still_load(tmp_path: Path) -> None:
    single(0).merge(single(1)).save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    record = json.loads(header["record"])
    del record["merged_from"]
    header = {key: value for key, value in header.items() if key != "record_sha256"}  # which came later
    save_file(tensors, tmp_path / "old.safetensors", header | {"record": json.dumps(record)})
    old = GradientEstimate.load(tmp_path / "old.safetensors")
    assert old.merged_from == ()
    assert old.merge(single(2)).weight == sum(WEIGHTS[:3])


def test_ranks_are_compared_between_estimates_that_the_first_lacks() -> None:
    first, second, third = (single(run) for run in (1, 2, 3))
    late = third["late"]
    shorter = LowRank(late.U[:, :5], late.S[:5], late.V[:, :5], late.norm, late.sketch)
    with pytest.raises(ValueError, match="Estimates 2 and 3 hold 7 and 5 directions of late; make both with one rank"):
        first.merge(second, dataclasses.replace(third, layers=dict(third) | {"late": shorter}))


def test_estimates_of_a_model_without_experts_are_what_they_were() -> None:
    """The weight of all parts is that of the parts which have the layer, if all have it."""
    model = adapted(llama())
    one, other = (lora_ga.estimate_gradients(model, part) for part in (causal(3)[:1], causal(3)[1:]))
    merged = one.merge(other)
    for name in merged:
        sketches = [each[name].sketch * (each.weight / merged.weight) for each in (one, other)]  # type: ignore[operator]
        assert torch.equal(merged[name].sketch, torch.stack(sketches).sum(dim=0))  # type: ignore[arg-type]


def test_a_rank_too_large_for_all_layers_is_one_line_with_the_largest_that_fits() -> None:
    message = (
        r" layers cannot be aligned: rank 17 is more than half of a layer's smaller side\. "
        r"The largest rank that fits all is 8 \(.*k_proj is 16 x 32\)\.$"
    )
    for count, targets in ((14, "all-linear"), (2, ["k_proj"])):
        with pytest.raises(ValueError, match=f"^{count} of {count}" + message):
            lora_ga.estimate_gradients(adapted(llama(), targets, r=17), causal())
    with pytest.raises(
        ValueError, match=r"4 of 6 layers .*:\n  .*k_proj, .*v_proj, .* and 1 more: rank 9 .* is 8 \(.*\n"
    ):
        lora_ga.estimate_gradients(adapted(llama(), ["q_proj", "k_proj", "v_proj"], r=9), causal())


# --- what an estimate says -------------------------------------------------------------------------------------------


def test_an_estimate_says_a_line_before_and_a_line_after(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lora_ga"):
        lora_ga.initialize(adapted(llama()), causal(), LoraGAConfig(max_batches=2))
    before, after = (record.getMessage() for record in caplog.records if record.name == "lora_ga")
    assert before == "LoRA-GA: estimating the gradients of 14 layers on 2 batches"
    assert re.fullmatch(
        r"LoRA-GA: done in \d+ s: 14 gradients from 2 batches, alignment limit [01]\.\d\d \(median\)", after
    )


def test_lines_are_printed_where_the_program_has_no_logging_and_are_silenced_by_the_level(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(progress.LOGGER, "level", logging.INFO)
    monkeypatch.setattr(progress.LOGGER, "_cache", {})
    progress.LOGGER.info("one line")
    assert capsys.readouterr().err == "one line\n"
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    progress.LOGGER.info("for the handler of the program")
    assert capsys.readouterr().err == ""


def test_a_bar_counts_the_passes_and_is_hidden_in_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    def bar(**settings: Any) -> Any:
        bars.append(SimpleNamespace(count=0, **settings))
        return SimpleNamespace(update=lambda: setattr(bars[-1], "count", bars[-1].count + 1), close=lambda: None)

    monkeypatch.setattr(progress, "tqdm", bar)
    monkeypatch.setattr(progress.LOGGER, "level", logging.INFO)
    monkeypatch.setattr(progress.LOGGER, "_cache", {})
    setup, _ = prepare(adapted(llama()), DENSE, "default", None)
    progress.Report(dataclasses.replace(setup, processes=Processes(rank=1, size=2)), causal())
    lora_ga.estimate_gradients(adapted(llama()), causal(), DENSE)
    assert [(bar.total, bar.count, bar.disable) for bar in bars] == [(3, 0, True), (3, 3, None)]


def test_an_estimate_is_one_line_in_a_terminal_and_a_table_in_a_notebook() -> None:
    estimate = lora_ga.estimate_gradients(adapted(llama()), causal(), DENSE)
    assert repr(estimate) == (
        "GradientEstimate(14 gradients, 3 batches, 132 label tokens; 100% of the squared norm held (median))"
    )
    name = next(iter(estimate))
    assert re.fullmatch(r"LowRank\(32 x 32, 32 directions, norm \S+, 100% of its square held\)", repr(estimate[name]))
    table = estimate._repr_html_()
    assert table.count("<tr>") == 15
    assert f"<td>{name}</td><td>32 × 32</td>" in table


def cached_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """As cached losses of sentence-transformers: the graph ends before the model, and a hook runs the model again."""
    with torch.no_grad():
        outputs = model(input_ids=batch["input_ids"]).logits
    outputs.requires_grad_()
    inner = nn.functional.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten())
    inner.backward()
    loss = inner.detach().requires_grad_()

    def run_again(gradient: Tensor) -> None:
        with torch.enable_grad():
            again = model(input_ids=batch["input_ids"]).logits
            ((again * outputs.grad).sum() * gradient).backward()

    loss.register_hook(run_again)
    return 1.0 * loss


@pytest.mark.parametrize("estimator", ["streaming", "probe"])
def test_a_loss_whose_hook_runs_the_model_again_gives_the_gradient_of_the_plain_loss(estimator: str) -> None:
    def plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(
            model(input_ids=batch["input_ids"]).logits.flatten(0, 1), batch["labels"].flatten()
        )

    model, config = adapted(llama()), LoraGAConfig(estimator=estimator)
    found, expected = (
        lora_ga.estimate_gradients(model, causal(), config, loss_fn=loss) for loss in (cached_loss, plain)
    )
    assert len(found) == len(expected) == 14
    for name, part in expected.items():
        torch.testing.assert_close(found[name].S[:8], part.S[:8], rtol=1e-3, atol=1e-7)
    assert all(parameter.grad is None for parameter in model.parameters())
