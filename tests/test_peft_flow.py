"""Scripts written for PEFT's LoRA-GA, on this library: what they may rely on, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from torch import nn

import lora_ga
from bench_alignment import alignment_ratios, gradients
from lora_ga.compat import LoraConfig, LoraGAConfig, get_peft_model, preprocess_loraga
from lora_ga.experiments.methods import load_method
from toys import FAMILIES, adapted, causal, classified, gpt2, llama, logits, train

DENSE = lora_ga.LoraGAConfig(estimator="dense")


def config(targets: Any = "all-linear", **changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    settings |= {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    return LoraConfig(**(settings | changes))


def make_train_step(model: nn.Module, batches: list[Any], *, clear_gradients: bool = False) -> Callable[[], None]:
    """A script's train_step. With `clear_gradients` it clears them before each pass, as PEFT's example does."""

    def train_step() -> None:
        for batch in batches:
            if clear_gradients:
                model.zero_grad()
            model(**batch).loss.backward()

    return train_step


def aligned_model(model: Any, batches: Any = None, **changes: Any) -> Any:
    """The model with an aligned adapter, made by the flow."""
    lora = config(**changes)
    preprocess_loraga(model, lora, make_train_step(model, batches or causal()))
    return get_peft_model(model, lora)


@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", "all-linear"), ("bert", ["query", "value"]), ("t5", ["q", "v", "wo"])],
)
@pytest.mark.parametrize("clear_gradients", [False, True])
def test_the_flow_reaches_the_alignment_limit(family: str, targets: Any, clear_gradients: bool) -> None:
    make, batches_of, _ = FAMILIES[family]
    batches, base = batches_of(), make().double()
    truth = gradients(make().double(), batches)
    lora = config(targets)
    preprocess_loraga(base, lora, make_train_step(base, batches, clear_gradients=clear_gradients), config=DENSE)
    ratios = alignment_ratios(get_peft_model(base, lora), truth, batches, 4)
    assert ratios
    assert min(ratios.values()) > 1 - 1e-6


def test_the_flow_gives_the_start_of_initialize() -> None:
    model = gpt2()
    flow = aligned_model(model, targets=["c_attn", "c_fc"], use_rslora=True)
    initialised = adapted(gpt2(), ["c_attn", "c_fc"])
    lora_ga.initialize(initialised, causal(), lora_ga.LoraGAConfig(stable_gamma=16))
    starts = {name: module.start for name, module in initialised.named_modules() if hasattr(module, "start")}
    assert starts
    for name, module in flow.named_modules():
        if hasattr(module, "start"):
            assert torch.allclose(module.start, starts[name], atol=1e-5), name


def test_preprocessing_does_not_change_the_model_or_the_random_generator() -> None:
    model = llama().train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    required = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    preprocess_loraga(model, config(), make_train_step(model, causal()))
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_preprocessing_restores_the_model_if_the_script_fails() -> None:
    model = llama()

    def broken() -> None:
        raise RuntimeError("the script's own")

    lora = config()
    with pytest.raises(RuntimeError, match="the script's own"):
        preprocess_loraga(model, lora, broken)
    assert not any("lora" in name for name, _ in model.named_modules())
    assert all(p.requires_grad for p in model.parameters())
    assert lora.init_lora_weights == "lora_ga"


def test_the_flow_works_if_no_weight_requires_a_gradient() -> None:
    model = llama().requires_grad_(False)
    adapter = aligned_model(model)
    assert torch.equal(logits(adapter, causal(1)[0]), logits(llama(), causal(1)[0]))


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_every_direction_and_scale_of_peft_saves_and_loads_on_the_original_base(
    direction: Any, scale: Any, tmp_path: Path
) -> None:
    model = aligned_model(
        llama(), targets=["q_proj", "v_proj"], lora_ga_config=LoraGAConfig(direction=direction, scale=scale)
    )
    batch = causal(1)[0]
    assert torch.equal(logits(model, batch), logits(llama(), batch))
    train(model, causal(), lr=1e-3)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(llama(), tmp_path)
    assert not torch.equal(logits(stock, batch), logits(llama(), batch))
    torch.testing.assert_close(logits(stock, batch), logits(model, batch), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*no lora_ga.safetensors was written:UserWarning")
@pytest.mark.parametrize("use_rslora", [False, True])
def test_saving_with_pefts_conversion_gives_an_adapter_for_the_original_base(use_rslora: bool, tmp_path: Path) -> None:
    model = aligned_model(llama(), use_rslora=use_rslora)
    model.save_pretrained(tmp_path / "init")
    train(model, causal(), lr=1e-3)
    model.save_pretrained(tmp_path / "final", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    stock = PeftModel.from_pretrained(llama(), tmp_path / "final")
    torch.testing.assert_close(logits(stock, causal(1)[0]), logits(model, causal(1)[0]), rtol=0, atol=1e-5)


def test_a_cached_estimate_is_read_and_the_script_does_not_run(tmp_path: Path) -> None:
    cache = tmp_path / "folder" / "gradients.pt"
    model, again = llama(), llama()
    preprocess_loraga(model, config(), make_train_step(model, causal()), cache_file=str(cache))

    def never() -> None:
        raise AssertionError("the cache was not read")

    lora = config()
    estimate = preprocess_loraga(again, lora, never, cache_file=str(cache))
    assert len(estimate) == 14
    assert torch.equal(logits(get_peft_model(again, lora), causal(1)[0]), logits(llama(), causal(1)[0]))
    with pytest.raises(ValueError, match=r"the cached estimate belongs to another model: .*gate_proj is 48 x 32 there"):
        preprocess_loraga(llama(intermediate_size=64), config(), never, cache_file=cache)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_models_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama().to(dtype)
    lora = config()
    preprocess_loraga(model, lora, make_train_step(model, causal()))
    adapter = get_peft_model(model, lora, autocast_adapter_dtype=False)
    layer = adapter.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.dtype == layer.lora_B["default"].weight.dtype == dtype
    assert torch.equal(logits(adapter, causal(1)[0]), logits(llama().to(dtype), causal(1)[0]))
    adapter.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(llama().to(dtype), tmp_path)
    torch.testing.assert_close(logits(stock, causal(1)[0]), logits(adapter, causal(1)[0]), rtol=0, atol=1e-2)


def test_heads_and_biases_stay_trainable() -> None:
    make, _, _ = FAMILIES["bert"]
    model = aligned_model(make(), classified(), targets=["query"], task_type="SEQ_CLS", bias="lora_only")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("classifier" in name for name in trained)
    assert any(name.endswith("query.base_layer.bias") for name in trained)
    assert train(model, classified())[-1] > 0


def test_other_configurations_are_passed_on_to_peft() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]), "other")
    assert list(model.peft_config) == ["other"]
    assert model.peft_config["other"].r == 2


def test_a_model_without_estimated_gradients_is_refused() -> None:
    """PEFT itself makes a plain LoRA here."""
    with pytest.raises(
        ValueError, match=r"no gradients were estimated for this LlamaForCausalLM. Call .*preprocess_lor"
    ):
        get_peft_model(llama(), config())


def test_an_estimate_is_used_for_one_adapter_only() -> None:
    model = llama()
    lora = config()
    preprocess_loraga(model, lora, make_train_step(model, causal()))
    get_peft_model(model, lora).unload()
    with pytest.raises(ValueError, match="no gradients were estimated"):
        get_peft_model(model, lora)


def test_pefts_own_get_peft_model_is_refused_after_preprocessing() -> None:
    model = llama()
    lora = config()
    preprocess_loraga(model, lora, make_train_step(model, causal()))
    with pytest.raises(ValueError, match="call lora_ga.compat.get_peft_model"):
        peft.get_peft_model(model, lora)


def test_a_configuration_without_lora_ga_config_is_refused() -> None:
    model = llama()
    with pytest.raises(ValueError, match="LoraConfig.lora_ga_config is None"):
        preprocess_loraga(model, config(lora_ga_config=None), make_train_step(model, causal()))
    preprocess_loraga(model, config(), make_train_step(model, causal()))
    with pytest.raises(ValueError, match="LoraConfig.lora_ga_config is None"):
        get_peft_model(model, config(lora_ga_config=None))


def test_a_rank_too_large_for_the_estimate_is_refused_and_the_model_is_restored() -> None:
    model = llama()
    preprocess_loraga(model, config(), make_train_step(model, causal()), config=lora_ga.LoraGAConfig(oversample=0))
    with pytest.raises(ValueError, match="rank 8 needs 16 gradient directions, but the estimate holds 8"):
        get_peft_model(model, config(r=8))
    assert not any("lora" in name for name, _ in model.named_modules())
    assert all(p.requires_grad for p in model.parameters())


def test_an_embedding_among_the_targets_is_aligned() -> None:
    """PEFT itself makes a plain LoRA of it."""
    model, settings = llama(), config(["q_proj", "embed_tokens"])
    estimate = preprocess_loraga(model, settings, make_train_step(model, causal()))
    assert estimate["model.embed_tokens"].norm > 0
    started = get_peft_model(model, settings)
    assert "model.embed_tokens" in started.peft_config["default"].alignment.factors


def test_targets_without_a_gradient_are_refused() -> None:
    """PEFT itself makes a plain LoRA of them."""
    model = llama()
    with pytest.raises(ValueError, match="14 of 14 layers cannot be aligned"):
        preprocess_loraga(model, config(), lambda: None)


def test_the_experiments_name_the_peft_that_their_method_of_pefts_own_lora_ga_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("peft.LoraGAConfig", raising=False)  # as in PEFT 0.18
    with pytest.raises(ValueError, match="peft_lora_ga needs PEFT 0.19 or newer, but PEFT .* is installed"):
        load_method("peft_lora_ga").build(None)  # type: ignore[arg-type]
