"""The probe finds the gradients of layers that are never called, by an adapter whose product is zero."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding

import lora_ga
from cases import Convolutions, Twisted, mixtral, seeded
from lora_ga import GradientEstimate, LoraGAConfig
from lora_ga.adapter.structure import give_structure
from lora_ga.gradients.coverage import warn_probed
from lora_ga.gradients.probe import random_probe
from lora_ga.layers.factors import Factor
from lora_ga.layers.targets import find_targets
from lora_ga.linalg.low_rank import LowRank
from toys import (
    ALL,
    FusedLlama,
    adapted,
    causal,
    data_folder,
    fused_llama,
    gpt2,
    llama,
    logits,
    minilm_folder,
    t5,
    tokens,
    train,
)

PROBE = LoraGAConfig(estimator="probe")
DENSE = LoraGAConfig(estimator="dense", oversample=10**4)


def product(part: LowRank) -> Tensor:
    return (part.U * part.S) @ part.V.mT


def expected_estimate(batches: list[dict[str, Tensor]], config: LoraGAConfig = DENSE) -> GradientEstimate:
    """The oracle: the estimate of the same model with every layer called."""
    return lora_ga.estimate_gradients(fused_llama(set(ALL)), batches, config)


def assert_products_close(found: Mapping[str, LowRank], true: Mapping[str, LowRank], tolerance: float) -> None:
    assert set(found) == set(true)
    for name, part in true.items():
        g = product(part)
        assert (product(found[name]) - g).norm() <= tolerance * g.norm(), name


def alignment_ratios(found: GradientEstimate, true: GradientEstimate, rank: int) -> list[float]:
    """Return cos(G AᵀA + B BᵀG, G) divided by its limit, for each layer, by the definition."""
    ratios = []
    for name, part in found.items():
        g = product(true[name])
        a_Ir, b_Or = part.V[:, :rank].to(g), part.U[:, rank : 2 * rank].to(g)
        step = g @ a_Ir @ a_Ir.mT + b_Or @ (b_Or.mT @ g)
        limit = torch.linalg.svdvals(g)[: 2 * rank].norm() / g.norm()
        ratios.append(((step * g).sum() / (step.norm() * g.norm()) / limit).item())
    return ratios


@pytest.mark.support("ways of running", "fused kernels that never call the layers", "gradient")
def test_a_probe_as_wide_as_the_gradients_rank_is_exact() -> None:
    batches = causal()
    found = lora_ga.estimate_gradients(fused_llama(), batches, LoraGAConfig(estimator="probe", oversample=24))
    truth = expected_estimate(batches)
    assert_products_close(found, truth, 1e-4)
    assert found.weight == truth.weight
    assert found.batches == len(batches)
    for name, part in found.items():
        assert part.norm == pytest.approx(truth[name].norm, rel=1e-3), name


def test_a_smaller_probe_is_exact_for_gradients_of_lower_rank() -> None:
    # One row of four tokens has three labels, so the gradients have rank three. The probe has rank sixteen.
    batches = [{"input_ids": (ids := torch.tensor([[5, 9, 2, 7]])), "labels": ids}]
    with pytest.warns(UserWarning, match="Fewer gradient directions than the start uses"):
        found = lora_ga.estimate_gradients(fused_llama(), batches, LoraGAConfig(estimator="probe", oversample=8))
    with pytest.warns(UserWarning, match="Fewer gradient directions than the start uses"):
        truth = expected_estimate(batches)
    assert {part.S.numel() for part in found.values()} == {16}
    assert_products_close(found, truth, 1e-4)


def test_micro_batches_are_weighted_by_their_label_tokens() -> None:
    whole = causal(1, rows=6)[0]
    short = whole["labels"].clone()
    short[2:, 3:] = -100
    whole = whole | {"labels": short}
    parts = [{key: value[rows] for key, value in whole.items()} for rows in (slice(0, 2), slice(2, 6))]
    exact = LoraGAConfig(estimator="probe", oversample=24)
    found = lora_ga.estimate_gradients(adapted(llama()), parts, exact)
    assert found.weight == 2 * 11 + 4 * 2
    assert_products_close(found, lora_ga.estimate_gradients(adapted(llama()), [whole], DENSE), 1e-4)


@pytest.mark.support("ways of running", "fused kernels that never call the layers", "start")
def test_layers_that_are_never_called_start_from_their_gradients_with_a_warning() -> None:
    model, batches = fused_llama(), causal()
    expected = logits(model, batches[0])
    with pytest.warns(UserWarning, match=r"14 of 14 layers ran without being called.*blocks\.0\.q_proj, .*and 11 more"):
        estimate = lora_ga.initialize(model, batches)
    assert torch.equal(logits(model, batches[0]), expected)
    assert min(alignment_ratios(estimate, expected_estimate(batches), 4)) >= 0.99


@pytest.mark.support("ways of running", "fused kernels that never call the layers", "step")
def test_the_loss_of_a_model_with_fused_layers_falls_from_its_start() -> None:
    model, batches = fused_llama(), causal(1)
    lora_ga.initialize(model, batches, PROBE)
    losses = train(model, batches, steps=4, lr=1e-3)
    assert losses[-1] < losses[0]


@pytest.mark.support("ways of running", "fused kernels that never call the layers", "reload")
def test_stock_peft_loads_an_adapter_trained_under_fused_kernels(tmp_path: Path) -> None:
    model, batches = fused_llama(), causal()
    lora_ga.initialize(model, batches, PROBE)
    train(model, batches, steps=3)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(FusedLlama().eval(), tmp_path)
    torch.testing.assert_close(logits(stock, batches[0]), logits(model, batches[0]), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model, batches[0]), logits(FusedLlama(), batches[0]), rtol=0, atol=1e-3)


def test_called_layers_get_hooks_and_fused_layers_get_the_probe_and_a_warning() -> None:
    model, batches = fused_llama({"q_proj", "down_proj"}), causal()
    with pytest.warns(UserWarning, match="10 of 14 layers ran without being called"):
        found = lora_ga.estimate_gradients(model, batches, LoraGAConfig(oversample=24))
    truth = expected_estimate(batches)
    assert_products_close(found, truth, 1e-3)
    assert list(found) == list(truth)


@pytest.mark.parametrize("estimator", ["streaming", "dense", "probe"])
def test_a_layer_that_does_not_run_is_distinguished_from_one_that_is_not_called(estimator: str) -> None:
    targets = [*ALL, "unused"]
    with pytest.raises(
        ValueError, match=r"1 of 15 layers cannot be aligned:\n  unused: never ran in 3 batches, and an"
    ):
        lora_ga.estimate_gradients(fused_llama(targets=targets), causal(), LoraGAConfig(estimator=estimator))
    config = LoraGAConfig(estimator=estimator, on_missing="lora")
    with pytest.warns(UserWarning, match="1 of 15 layers cannot be aligned"):
        estimate = lora_ga.estimate_gradients(fused_llama(targets=targets), causal(), config)
    assert set(estimate.missing) == {"unused"}
    assert len(estimate) == 14


def test_of_many_layers_that_were_probed_three_are_named() -> None:
    with pytest.warns(UserWarning, match=r"3 of 9 layers ran .*: a, b, c\. Their"):
        warn_probed(["a", "b", "c"], 9)
    with pytest.warns(UserWarning, match=r"5 of 9 layers ran .*: a, b, c and 2 more\. Their"):
        warn_probed(["a", "b", "c", "d", "e"], 9)


def test_a_model_whose_layers_are_all_called_gives_no_warning_and_keeps_no_batch() -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def batches() -> Iterator[dict[str, Tensor]]:
        for seed in range(4):
            ids = tokens(seed=seed)
            made.append(weakref.ref(ids))
            yield {"input_ids": ids, "labels": ids}
            del ids

    def loss_fn(adapted: Any, batch: Any) -> Tensor:
        gc.collect()
        alive.append(sum(each() is not None for each in made))
        return adapted(**batch).loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = fused_llama(set(ALL))
        estimate = lora_ga.estimate_gradients(model, batches(), loss_fn=loss_fn)
    assert len(estimate) == 14
    assert alive == [1, 1, 1, 1]


def test_layers_that_a_loss_does_not_use_cost_one_pass_and_keep_at_most_two_batches() -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def batches() -> Iterator[dict[str, Tensor]]:
        for seed in range(5):
            ids = tokens(seed=seed)
            made.append(weakref.ref(ids))
            yield {"input_ids": ids}
            del ids

    def of_encoder(model: Any, batch: Any) -> Tensor:
        gc.collect()
        alive.append(sum(each() is not None for each in made))
        return model.get_encoder()(**batch).last_hidden_state[..., 0].square().mean()

    model = adapted(t5(), ["q", "v"])
    with pytest.warns(
        UserWarning, match=r"8 of 12 layers cannot be aligned:\n  decoder.*never ran in 5 batches"
    ) as seen:
        estimate = lora_ga.estimate_gradients(model, batches(), LoraGAConfig(on_missing="lora"), loss_fn=of_encoder)
    assert sum("cannot be aligned" in str(each.message) for each in seen) == 1
    assert len(estimate) == 4
    assert len(alive) == 5 + 1  # the first batch is tried once more
    assert max(alive) <= 2
    alone = lora_ga.estimate_gradients(adapted(t5(), r"encoder.*\.[qv]"), batches(), loss_fn=of_encoder)
    assert all(torch.equal(part.S, alone[name].S) for name, part in estimate.items())


def as_generator(batches: list[Any]) -> Iterator[Any]:
    yield from batches


@pytest.mark.parametrize("estimator", ["streaming", "probe"])
def test_both_passes_work_with_a_generator_and_with_a_loss_that_empties_its_batches(estimator: str) -> None:
    def emptying(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(input_ids=batch.pop("input_ids"), labels=batch.pop("labels")).loss

    config = LoraGAConfig(estimator=estimator, max_batches=3)
    moved_in_place = [BatchEncoding(batch) for batch in causal(5)]  # moving a dict copies it, moving these does not
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = lora_ga.estimate_gradients(fused_llama(), causal(3), config)
        found = lora_ga.estimate_gradients(fused_llama(), as_generator(moved_in_place), config, loss_fn=emptying)
    assert found.batches == 3
    assert found.weight == expected.weight
    assert all(torch.allclose(part.S, expected[name].S, rtol=1e-4) for name, part in found.items())


def state_of(model: nn.Module) -> dict[str, Any]:
    """The state that the estimate must leave unchanged."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {
        "modules": {name: (id(module), module.training) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        "order": [list(layer.lora_A) for layer in layers.values()],
        "ranks": [(layer.r, layer.lora_alpha, layer.scaling, layer.active_adapters) for layer in layers.values()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("structure", [False, True])
@pytest.mark.parametrize("estimator", ["streaming", "probe"])
@pytest.mark.parametrize("failing", [None, 1, 4])
def test_the_model_is_left_unchanged_even_after_an_error(failing: int | None, estimator: str, structure: bool) -> None:
    model = fused_llama()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("default")
    if structure:
        give_structure(model, LoraGAConfig(), "default")
    model.train()
    before, values = copy.deepcopy(state_of(model)), copy.deepcopy(model.state_dict())
    calls = itertools.count(1)

    def loss_fn(adapted: Any, batch: Any) -> Tensor:
        if next(calls) == failing:
            raise KeyError("of the loss")
        return adapted(**batch).loss

    config = LoraGAConfig(estimator=estimator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if failing is None:
            lora_ga.estimate_gradients(model, causal(), config, loss_fn=loss_fn)
        else:
            with pytest.raises(KeyError, match="of the loss"):
                lora_ga.estimate_gradients(model, causal(), config, loss_fn=loss_fn)
    assert state_of(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_the_probe_does_not_change_the_outputs() -> None:
    model, batches, seen = fused_llama(), causal(), []

    def loss_fn(adapted: Any, batch: Any) -> Tensor:
        output = adapted(**batch)
        seen.append(output.logits.detach())
        return output.loss

    expected = [logits(model, batch) for batch in batches]
    lora_ga.estimate_gradients(model, batches, PROBE, loss_fn=loss_fn)
    assert len(seen) == 6
    assert all(torch.equal(found, true) for found, true in zip(seen, expected * 2, strict=True))


def test_the_probes_directions_depend_only_on_the_seed_and_the_layer() -> None:
    first, again, other = (
        lora_ga.estimate_gradients(fused_llama(), causal(), LoraGAConfig(estimator="probe", oversample=2, seed=seed))
        for seed in (3, 3, 4)
    )
    few = lora_ga.estimate_gradients(
        fused_llama(targets=["up_proj"]), causal(), LoraGAConfig(estimator="probe", oversample=2, seed=3)
    )
    assert all(torch.equal(product(first[name]), product(again[name])) for name in first)
    assert not any(torch.equal(product(first[name]), product(other[name])) for name in first)
    assert all(torch.allclose(product(first[name]), product(few[name]), atol=1e-6) for name in few)
    target = find_targets(fused_llama())["blocks.0.q_proj"]
    one, two = (random_probe(name, target, 4, 0, torch.float32) for name in ("blocks.0.q_proj", "blocks.0.k_proj"))
    assert not torch.equal(one.omega, two.omega)
    assert not torch.equal(one.psi, two.psi)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (llama, {"use_dora": True}),
        (llama, {"use_rslora": False, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}),
        (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    ],
    ids=["DoRA", "patterns", "Conv1D"],
)
def test_the_probe_finds_what_the_hooks_record(make: Any, settings: dict[str, Any]) -> None:
    settings = {"targets": settings.get("target_modules", "all-linear")} | settings
    settings.pop("target_modules", None)
    exact = LoraGAConfig(estimator="probe", oversample=40)
    found = lora_ga.estimate_gradients(adapted(make(), **settings), causal(), exact)
    assert_products_close(found, lora_ga.estimate_gradients(adapted(make(), **settings), causal(), DENSE), 1e-4)


def test_other_active_adapters_stay_active_and_a_disabled_adapter_is_probed_too() -> None:
    exact = LoraGAConfig(estimator="probe", oversample=40)
    model = adapted(llama())
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    found = {}
    for active in (["default"], ["default", "other"]):
        model.base_model.set_adapter(active)
        found[len(active)] = lora_ga.estimate_gradients(model, causal(), exact)
        assert_products_close(found[len(active)], lora_ga.estimate_gradients(model, causal(), DENSE), 1e-4)
    assert found[1]["model.layers.0.mlp.up_proj"].norm != pytest.approx(found[2]["model.layers.0.mlp.up_proj"].norm)
    with model.disable_adapter():
        switched_off = lora_ga.estimate_gradients(model, causal(), exact)
        assert all(layer.disable_adapters for layer in lora_layers(model))
    assert_products_close(switched_off, found[1], 1e-4)


def test_an_adapter_with_a_scaling_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)14 of 14 layers cannot be aligned.*its gradient is exactly zero"):
        lora_ga.estimate_gradients(adapted(llama(), lora_alpha=0), causal(), PROBE)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_gradients_of_half_precision_models_are_summed_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    exact = LoraGAConfig(estimator="probe", oversample=24)
    found = lora_ga.estimate_gradients(fused_llama().to(dtype), causal(), exact)
    assert all(part.U.dtype == torch.float32 for part in found.values())
    assert_products_close(found, expected_estimate(causal()), tolerance)


def test_small_float16_losses_are_scaled_up_and_their_gradients_scaled_back() -> None:
    model, batches = fused_llama().half(), causal(1)
    exact = LoraGAConfig(estimator="probe", oversample=24)

    def loss_fn(adapted: Any, batch: Any) -> tuple[Tensor, float]:
        return adapted(**batch).loss * 1e-3, 2.0**12  # without scaling these gradients vanish in float16

    found = lora_ga.estimate_gradients(model, batches, exact, loss_fn=loss_fn)
    true = expected_estimate(batches)
    for name, part in found.items():
        assert part.norm == pytest.approx(true[name].norm * 1e-3, rel=0.02), name


def test_a_gradient_that_is_not_finite_is_refused_with_its_layer_and_batch() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] * float("nan")

    count = itertools.count(1)

    def loss_fn(adapted: Any, batch: Any) -> Tensor:
        output = adapted(**batch)
        return Broken.apply(output.loss) if next(count) == 2 else output.loss

    with pytest.raises(ValueError, match=r"batch 2: blocks\.0\.\w+: the gradient is not finite \(and in 13 more"):
        lora_ga.estimate_gradients(fused_llama(), causal(), PROBE, loss_fn=loss_fn)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: adapted(seeded(Twisted)(), ["embed", "first"]),
            'embed is a Embedding, and estimator="probe" works on',
        ),
        (lambda: adapted(seeded(Convolutions)(), ["wide", "point"]), r"wide is a Conv2d.* \(1 more layers like this\)"),
        (
            lambda: adapted(seeded(mixtral)(), [], target_parameters=["mlp.experts.down_proj"]),
            "is a MixtralExperts, and",
        ),
    ],
)
def test_layers_whose_factors_are_not_two_linear_maps_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_ga.estimate_gradients(make(), causal(), PROBE)


def test_an_empty_data_set_and_a_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The data holds no batch"):
        lora_ga.estimate_gradients(fused_llama(), [], PROBE)
    with pytest.raises(ValueError, match='estimator="probe" keeps no running state, but a checkpoint'):
        lora_ga.estimate_gradients(fused_llama(), causal(), PROBE, checkpoint=tmp_path / "state.safetensors")


def test_a_resumed_estimate_with_probed_layers_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    batches, path = causal(4), tmp_path / "state.safetensors"

    def interrupted() -> Iterator[Any]:
        yield from batches[:2]
        raise OSError("interrupted")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = lora_ga.estimate_gradients(fused_llama({"q_proj"}), batches)
        with pytest.raises(OSError, match="interrupted"):
            lora_ga.estimate_gradients(fused_llama({"q_proj"}), interrupted(), checkpoint=path, every=1)
        rest = lora_ga.estimate_gradients(fused_llama({"q_proj"}), batches, checkpoint=path, every=1)
    assert rest.weight == whole.weight
    assert all(torch.equal(product(rest[name]), product(whole[name])) for name in whole)


def test_estimates_by_the_probe_merge_to_that_of_all_batches() -> None:
    exact = LoraGAConfig(estimator="probe", oversample=24)
    first, second, both = (
        lora_ga.estimate_gradients(fused_llama(), part, exact) for part in (causal()[:2], causal()[2:], causal())
    )
    merged = first.merge(second)
    assert_products_close(merged, both, 1e-4)
    assert all(part.norm == pytest.approx(both[name].norm, rel=1e-3) for name, part in merged.items())


def test_an_adapter_that_already_has_the_structure_gets_the_same_start() -> None:
    model, batches = fused_llama(), causal()
    give_structure(model, LoraGAConfig(), "default")
    lora_ga.initialize(model, batches, PROBE)
    assert all(isinstance(target.lora_A["default"], Factor) for target in lora_layers(model))
    fresh = fused_llama()
    lora_ga.initialize(fresh, batches, PROBE)
    assert all(
        torch.equal(one.weight, other.weight) for one, other in zip(factors_of(model), factors_of(fresh), strict=True)
    )


def lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def factors_of(model: nn.Module) -> list[Factor]:
    return [module for module in model.modules() if isinstance(module, Factor)]


def test_the_probe_comes_close_to_the_exact_start_on_a_pretrained_minilm() -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    texts = [
        f"{word} is {more}."
        for word in ("the sea", "a late train", "my old house", "music")
        for more in ("green in the morning", "too expensive", "not what she wanted", "gone")
    ]
    made = tokenizer(texts, padding=True, return_tensors="pt")
    batches = [dict(made) | {"labels": torch.arange(16) % 2}]
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=2).eval()
    model = adapted(base, ["query", "key", "value", "dense"])
    found = lora_ga.estimate_gradients(model, batches, PROBE)
    ratios = alignment_ratios(found, lora_ga.estimate_gradients(model, batches, DENSE), 4)
    assert sorted(ratios)[len(ratios) // 2] >= 0.99
    assert len(find_targets(model)) == 37


def test_the_probe_comes_close_to_the_exact_start_on_a_pretrained_llama() -> None:
    folder = data_folder("models", "stories260k")
    text = data_folder("data", "text", "tinyshakespeare.txt").read_text()[:6000]
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])[: 8 * 128].reshape(8, 128)
    model = adapted(AutoModelForCausalLM.from_pretrained(folder).eval())
    batches = [{"input_ids": part, "labels": part} for part in ids.split(4)]
    found = lora_ga.estimate_gradients(model, batches, PROBE)
    ratios = alignment_ratios(found, lora_ga.estimate_gradients(model, batches, DENSE), 4)
    assert sorted(ratios)[len(ratios) // 2] >= 0.99
