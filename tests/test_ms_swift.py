"""The functions that ms-swift imports, called as ms-swift calls them, and by ms-swift itself if it is installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

import lora_ga
from lora_ga.entrypoint import LoraGAContext, get_lora_ga_model
from toys import causal, llama, logits, tokens, train

EXAMPLES = [{"input_ids": row.tolist(), "labels": row.tolist(), "attention_mask": [1] * 20} for row in tokens(12, 20)]


def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([example[key] for example in examples]) for key in examples[0]}


def call_as_ms_swift(model: nn.Module, dataset: Any = EXAMPLES, lora: Any = None, **changes: Any) -> Any:
    """Call `get_lora_ga_model` as `swift.pipelines.train.tuner.prepare_adapter` of ms-swift 3 and 4 does.

    That function makes `lora_config` from the user's flags. It passes the arguments below, but not `lora_config`.
    """
    lora_config = lora or LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], init_lora_weights="lora-ga"
    )
    assert lora_config is not None
    settings: dict[str, Any] = {"batch_size": 2, "num_iters": 3, "max_length": 16, "direction": "ArB2r"}
    settings |= {"dtype": None, "scale": "stable", "stable_gamma": 16}
    return lora_ga.entrypoint.get_lora_ga_model(
        model=model, data_collator=collate, dataset=dataset, **(settings | changes)
    )


def test_rank_alpha_and_targets_are_those_of_the_caller(tmp_path: Path) -> None:
    model = call_as_ms_swift(llama())
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.task_type) == (6, 14, "CAUSAL_LM")
    assert config.target_modules == {"q_proj", "down_proj"}
    assert config.init_lora_weights is True  # so that ms-swift saves no initial and no converted adapter
    assert torch.equal(logits(model, causal(1)[0]), logits(llama(), causal(1)[0]))
    train(model, causal(), lr=1e-3)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(stock, causal(1)[0]), logits(model, causal(1)[0]), rtol=0, atol=1e-5)


def starts(model: Any) -> list[torch.Tensor]:
    return [module.start for module in model.modules() if hasattr(module, "start")]


def test_the_estimate_uses_the_first_examples_cut_to_max_length() -> None:
    model = call_as_ms_swift(llama(), iter(EXAMPLES))
    expected = lora_ga.get_lora_ga_model(
        llama(),
        LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"]),
        [collate([{k: v[:16] for k, v in e.items()} for e in EXAMPLES[i : i + 2]]) for i in (0, 2, 4)],
        lora_ga.LoraGAConfig(stable_gamma=16),
    )
    assert starts(expected)
    assert all(torch.equal(one, other) for one, other in zip(starts(model), starts(expected), strict=True))
    whole = call_as_ms_swift(llama(), max_length=None)
    assert not torch.equal(starts(whole)[0], starts(expected)[0])


@pytest.mark.parametrize("scale", ["gd", "unit", "stable", "weightS", "weights"])
def test_the_scales_and_dtypes_of_ms_swift_are_accepted(scale: str) -> None:
    model = call_as_ms_swift(llama(), scale=scale, dtype="bfloat16", direction="random", stable_gamma=64)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.bfloat16}
    assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {torch.float32}


@pytest.mark.parametrize(
    ("target", "changes", "part"),
    [
        ("q_proj", {"use_dora": True}, "lora_magnitude_vector"),
        ("q_proj", {"lora_bias": True}, "lora_B.default.bias"),
        ("embed_tokens", {}, "lora_embedding_A"),
    ],
)
def test_all_parameters_of_the_adapter_are_cast(target: str, changes: dict[str, Any], part: str) -> None:
    lora = LoraConfig(r=3, target_modules=[target], **changes)
    model = get_lora_ga_model(llama(), collate, EXAMPLES, dtype="float16", peft_config=lora)
    cast = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float16}
    assert cast == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert any(part in name for name in cast)


def test_a_caller_without_a_configuration_is_refused() -> None:
    lora_config = None
    with pytest.raises(ValueError, match="found no LoraConfig named lora_config in the calling function"):
        get_lora_ga_model(llama(), collate, EXAMPLES)
    assert lora_config is None


def test_a_passed_configuration_takes_precedence_over_that_of_the_caller() -> None:
    lora_config = LoraConfig(r=3, target_modules=["down_proj"])
    passed = LoraConfig(r=2, target_modules=["q_proj"])
    model = get_lora_ga_model(llama(), collate, EXAMPLES, peft_config=passed)
    assert model.peft_config["default"].r == 4
    found = get_lora_ga_model(llama(), collate, EXAMPLES)
    assert found.peft_config["default"].target_modules == lora_config.target_modules == {"down_proj"}


def test_a_refused_call_does_not_change_the_base_model() -> None:
    model = llama()
    with pytest.raises(ValueError, match="The data set holds no example"):
        call_as_ms_swift(model, [])
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be one of float32, float16, bfloat16"):
        call_as_ms_swift(model, dtype="int8")
    with pytest.raises(ValueError, match=r"LoraGAConfig.scale is 'huge'"):
        call_as_ms_swift(model, scale="huge")
    with pytest.raises(ValueError, match="rank 20 needs 40 gradient directions"):
        call_as_ms_swift(model, lora=LoraConfig(r=20, target_modules=["q_proj"]))
    assert not any("lora" in name for name, _ in model.named_modules())
    assert all(p.requires_grad for p in model.parameters())


def test_saving_inside_the_context_converts_nothing(tmp_path: Path) -> None:
    model = call_as_ms_swift(llama())
    train(model, causal(), lr=1e-3)
    with LoraGAContext(model):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path / "initial_model"))
    with pytest.raises(ZeroDivisionError), LoraGAContext(model):
        raise ZeroDivisionError
    assert "save_pretrained" not in vars(model)
    stock = PeftModel.from_pretrained(llama(), tmp_path)
    assert stock.peft_config["default"].r == 6
    torch.testing.assert_close(logits(stock, causal(1)[0]), logits(model, causal(1)[0]), rtol=0, atol=1e-5)


def prepare_adapter_of_ms_swift() -> Any:
    """The function of ms-swift that calls `get_lora_ga_model`."""
    try:
        return importlib.import_module("swift.pipelines.train.tuner").prepare_adapter
    except ImportError as error:
        pytest.skip(f"ms-swift or one of its requirements is not installed ({error})")


def test_the_installed_ms_swift_calls_as_the_fallback_expects() -> None:
    """`_lora_config_from_call_stack` reads this variable, which ms-swift does not document."""
    prepare_adapter = prepare_adapter_of_ms_swift()
    assert "lora_config" in prepare_adapter.__code__.co_varnames
    assert "get_lora_ga_model" in prepare_adapter.__code__.co_names


def test_the_installed_ms_swift_makes_an_aligned_model(tmp_path: Path) -> None:
    prepare_adapter = prepare_adapter_of_ms_swift()
    flags = SimpleNamespace(
        task_type="causal_lm", target_modules=["q_proj", "v_proj"], modules_to_save=[], lora_rank=2, lora_alpha=6
    )
    flags.__dict__.update(lora_dropout=0.0, lora_bias="none", use_rslora=True, use_dora=False, lorap_lr_ratio=None)
    flags.__dict__.update(init_weights="lora-ga", tuner_type="lora", use_swift_lora=False, tuner_backend="peft")
    flags.__dict__.update(target_parameters=None, lora_dtype=None, lora_ga_batch_size=2, lora_ga_iters=2)
    flags.__dict__.update(lora_ga_max_length=16, lora_ga_direction="ArB2r", lora_ga_scale="stable")
    flags.__dict__.update(lora_ga_stable_gamma=16)
    base: Any = llama()
    base.model_meta = SimpleNamespace(is_multimodal=False)
    template = SimpleNamespace(data_collator=collate)
    model = prepare_adapter(flags, base, template=template, train_dataset=EXAMPLES)
    assert model.peft_config["default"].r == 4
    train(model, causal(), lr=1e-3)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(stock, causal(1)[0]), logits(model, causal(1)[0]), rtol=0, atol=1e-5)
