"""What PEFT can do with a trained adapter: merge, disable, save, load, combine, swap. Tested with both offsets."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import hotswap

import lora_ga
from cases import LAYERS, nf4, wide_llama
from lora_ga import LoraGAConfig
from lora_ga.config import CHOICES
from toys import adapted, bert, causal, classified, llama, logits, train

pytestmark = pytest.mark.parametrize("offset", CHOICES["offset"])
BATCH = causal(1)[0]


def cell(row: str) -> Any:
    """The marker of a test that fills a row of the support matrix."""
    return pytest.mark.support("after training", row, "works")


@pytest.fixture
def model(offset: str) -> PeftModel:
    """A trained adapter on a small Llama."""
    return trained(offset)


def trained(offset: str) -> PeftModel:
    """A trained adapter without rsLoRA, because PEFT's weighted sums ignore the scaling of rsLoRA."""
    made = adapted(llama(), use_rslora=False)
    lora_ga.initialize(made, causal(), LoraGAConfig(offset=offset))
    train(made, causal(), steps=3)
    return made.eval()


@cell("merge_and_unload, weights not quantised")
def test_merging_keeps_the_adapted_function(model: PeftModel, offset: str) -> None:
    expected = logits(model, BATCH)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    torch.testing.assert_close(logits(merged, BATCH), expected, rtol=0, atol=1e-5)


@cell("unload")
def test_unload_gives_the_original_base_unless_the_offset_changed_it(model: PeftModel, offset: str) -> None:
    base = model.unload()
    assert not any(isinstance(module, LoraLayer) for module in base.modules())
    same = torch.equal(logits(base, BATCH), logits(llama(), BATCH))
    assert same == (offset == "adapter")  # offset="base" has changed the base


@cell("disable_adapter as a DPO reference")
def test_disabling_gives_the_original_function_unless_the_offset_changed_the_base(
    model: PeftModel, offset: str
) -> None:
    with model.disable_adapter():
        shown = logits(model, BATCH)
    same = torch.equal(shown, logits(llama(), BATCH))
    assert same == (offset == "adapter")


@cell("saved, then loaded with low_cpu_mem_usage")
def test_loading_with_low_cpu_mem_usage_gives_the_saved_function(model: PeftModel, offset: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True).eval()
    torch.testing.assert_close(logits(stock, BATCH), logits(model, BATCH), rtol=0, atol=1e-5)


@cell("add_weighted_adapter")
@pytest.mark.parametrize("combination", ["cat", "linear", "svd"])
def test_a_sum_with_weights_1_and_0_is_the_first_saved_adapter(
    model: PeftModel, offset: str, combination: str, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "one")
    other = trained("adapter")
    train(other, causal()[1:], steps=2)
    other.save_pretrained(tmp_path / "two")
    stock = PeftModel.from_pretrained(llama(), tmp_path / "one", adapter_name="one")
    stock.load_adapter(tmp_path / "two", "two")
    stock.add_weighted_adapter(["one", "two"], [1.0, 0.0], "sum", combination_type=combination, svd_rank=16)
    stock.set_adapter("sum")
    tolerance = 1e-4 if combination == "svd" else 1e-5
    torch.testing.assert_close(logits(stock.eval(), BATCH), logits(model, BATCH), rtol=0, atol=tolerance)


@cell("several adapters")
def test_another_adapter_does_not_change_the_function_of_the_first(
    model: PeftModel, offset: str, tmp_path: Path
) -> None:
    if offset == "base":
        pytest.skip('offset="base" is for one adapter; that others are refused is tested in test_edge_cases.py')
    expected = logits(model, BATCH)
    model.add_adapter("plain", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("plain")
    assert not torch.equal(logits(model, BATCH), expected)
    model.set_adapter("default")
    assert torch.equal(logits(model, BATCH), expected)
    model.add_weighted_adapter(["default", "plain"], [1.0, 0.0], "both", combination_type="cat")
    model.set_adapter("both")
    torch.testing.assert_close(logits(model, BATCH), expected, rtol=0, atol=1e-5)


@cell("hot-swap")
def test_hot_swapping_gives_the_function_of_the_new_adapter(model: PeftModel, offset: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "one")
    other = trained("adapter")
    train(other, causal()[1:], steps=2)
    other.save_pretrained(tmp_path / "two")
    running = PeftModel.from_pretrained(llama(), tmp_path / "two").eval()
    hotswap.hotswap_adapter(running, tmp_path / "one", adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits(running, BATCH), logits(model, BATCH), rtol=0, atol=1e-5)


@cell("set_scale")
def test_set_scale_scales_the_effect_of_the_adapter(model: PeftModel, offset: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(llama(), tmp_path).eval()
    for scale, expected in ((0.0, llama()), (1.0, model)):
        for layer in stock.modules():
            if isinstance(layer, LoraLayer):
                layer.set_scale("default", scale)
        torch.testing.assert_close(logits(stock, BATCH), logits(expected, BATCH), rtol=0, atol=1e-5)
    if offset == "adapter":  # the same on the model in which the adapter was trained
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.set_scale("default", 0.0)
        assert torch.equal(logits(model, BATCH), logits(llama(), BATCH))


@cell("modules_to_save")
def test_modules_to_save_are_saved_with_the_adapter(offset: str, tmp_path: Path) -> None:
    made, batch = adapted(bert(), ["query", "value"], modules_to_save=["classifier"]), classified(1)[0]
    lora_ga.initialize(made, classified(), LoraGAConfig(offset=offset))
    train(made, classified(), steps=3)
    made.eval().save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(bert(), tmp_path).eval()
    torch.testing.assert_close(logits(stock, batch), logits(made, batch), rtol=0, atol=1e-5)


@cell("merged and saved in shards")
def test_a_merged_model_saved_in_shards_keeps_its_function(model: PeftModel, offset: str, tmp_path: Path) -> None:
    expected = logits(model, BATCH)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = type(merged).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, BATCH), expected, rtol=0, atol=1e-5)


@cell("a copy of the model")
def test_training_a_deep_copy_does_not_change_the_original(model: PeftModel, offset: str) -> None:
    expected, other = logits(model, BATCH), copy.deepcopy(model)
    train(other, causal(), steps=1)
    assert torch.equal(logits(model, BATCH), expected)
    assert not torch.equal(logits(other.eval(), BATCH), expected)


@cell("trained on a 4-bit base, loaded on it and on the full-precision base")
def test_an_adapter_trained_on_a_4_bit_base_loads_on_both_bases(offset: str, tmp_path: Path) -> None:
    LAYERS["bitsandbytes nf4"].check_installed()
    if offset == "base":
        pytest.skip('offset="base" is refused on quantised weights, which test_support.py tests')
    made = adapted(nf4())
    lora_ga.initialize(made, causal())
    train(made, causal(), steps=3)
    made.eval().save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(nf4(), tmp_path).eval()
    torch.testing.assert_close(logits(stock, BATCH), logits(made, BATCH), rtol=0, atol=1e-5)
    full = PeftModel.from_pretrained(wide_llama(), tmp_path).eval()
    products = [
        {name: layer.get_delta_weight("default") for name, layer in m.named_modules() if isinstance(layer, LoraLayer)}
        for m in (full, made)
    ]
    for name, product in products[0].items():
        torch.testing.assert_close(product, products[1][name], rtol=0, atol=1e-6)
    assert not torch.equal(logits(full, BATCH), logits(wide_llama(), BATCH))
    resumed = lora_ga.load(wide_llama(), tmp_path, is_trainable=True).eval()  # both bases have the same fingerprint
    torch.testing.assert_close(logits(resumed, BATCH), logits(full, BATCH), rtol=0, atol=1e-5)


@cell("trained on the full-precision base, loaded on a 4-bit one")
def test_an_adapter_trained_on_the_full_base_loads_on_a_4_bit_base(offset: str, tmp_path: Path) -> None:
    LAYERS["bitsandbytes nf4"].check_installed()
    made = adapted(wide_llama())
    lora_ga.initialize(made, causal(), LoraGAConfig(offset=offset))
    train(made, causal(), steps=3)
    made.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(nf4(), tmp_path).eval()
    plain = PeftModel.from_pretrained(wide_llama(), tmp_path).eval()
    for name, layer in stock.named_modules():
        if isinstance(layer, LoraLayer):
            expected = plain.get_submodule(name).get_delta_weight("default")
            torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=0, atol=1e-6)
    assert not torch.equal(logits(stock, BATCH), logits(nf4(), BATCH))
