"""Compressing and merging saved adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lora_ga
from lora_ga.export.merge import merge_adapter
from toys import adapted, bert, causal, classified, llama, logits, saved, train


def close_in_effect(small: Any, whole: Any, base: Any, batch: Any) -> bool:
    """Whether the two adapters' logits differ by at most a tenth of the whole adapter's effect on the logits."""
    effect = logits(whole, batch) - logits(base, batch)
    return bool((logits(small, batch) - logits(whole, batch)).norm() <= 0.1 * effect.norm())


def product(folder: Path, layer: str) -> torch.Tensor:
    """B A of a layer of the saved adapter."""
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{layer}.lora_{letter}.weight"].double() for letter in "AB")
    return b @ a


def test_compressing_gives_the_best_product_of_the_rank_and_reports_its_error(tmp_path: Path) -> None:
    model = saved(tmp_path / "whole", rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32})
    errors = lora_ga.compress_adapter(tmp_path / "whole", tmp_path / "small", 3)
    assert len(errors) == 14
    for layer, error in errors.items():
        scaling = model.base_model.model.get_submodule(layer).scaling["default"]
        whole = scaling * product(tmp_path / "whole", layer)
        values = torch.linalg.svdvals(whole)
        assert error == pytest.approx((values[3:].norm() / values.norm()).item(), abs=1e-6)
        lost = (product(tmp_path / "small", layer) - whole).norm() / whole.norm()
        assert lost.item() == pytest.approx(error, abs=1e-5)


def test_stock_peft_loads_the_compressed_adapter(tmp_path: Path) -> None:
    model = saved(tmp_path / "whole", modules_to_save=["lm_head"], targets=["q_proj", "v_proj"])
    lora_ga.compress_adapter(tmp_path / "whole", tmp_path / "small", 7)
    small = PeftModel.from_pretrained(llama(), tmp_path / "small")
    assert small.peft_config["default"].r == 7
    assert close_in_effect(small, model, llama(), causal(1)[0])
    assert not (tmp_path / "small" / "lora_ga.safetensors").exists()


def test_compressing_to_the_rank_of_the_product_loses_nothing(tmp_path: Path) -> None:
    model = saved(tmp_path / "whole", rank_pattern={"q_proj": 2}, lora_bias=False)
    tensors = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert max(t.shape[0] for name, t in tensors.items() if "lora_A" in name) == 8
    errors = lora_ga.compress_adapter(tmp_path / "whole", tmp_path / "small", 4)
    assert errors["model.layers.0.self_attn.q_proj"] < 1e-6
    assert errors["model.layers.0.self_attn.v_proj"] > 1e-3
    assert torch.isfinite(logits(model, causal(1)[0])).all()


def test_compressing_keeps_lora_biases(tmp_path: Path) -> None:
    model = adapted(bert(), ["query", "dense"], lora_bias=True)
    lora_ga.initialize(model, classified())
    train(model, classified())
    model.save_pretrained(tmp_path / "whole")
    lora_ga.compress_adapter(tmp_path / "whole", tmp_path / "small", 7)
    small = PeftModel.from_pretrained(bert(), tmp_path / "small")
    assert close_in_effect(small, model.eval(), bert(), classified(1)[0])


def test_bad_ranks_folders_and_adapters_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    saved(tmp_path / "whole")
    saved(tmp_path / "dora", use_dora=True)
    saved(tmp_path / "embedding", use_dora=True, targets=["q_proj"])
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(ValueError, match="rank 8: the adapter has rank 8; compress to a rank from 1 to 7"):
        lora_ga.compress_adapter(tmp_path / "whole", tmp_path / "out", 8)
    with pytest.raises(ValueError, match="full: not empty. Choose another output folder"):
        lora_ga.compress_adapter(tmp_path / "whole", full, 2)
    with pytest.raises(FileNotFoundError, match="full: holds no adapter_config.json"):
        lora_ga.compress_adapter(full, tmp_path / "out", 2)
    with pytest.raises(ValueError, match="a DoRA adapter"):
        lora_ga.compress_adapter(tmp_path / "dora", tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()
    assert [file.name for file in full.iterdir()] == ["file"]


def test_compressing_an_embedding_adapter_is_refused(tmp_path: Path) -> None:
    model = adapted(llama(), ["embed_tokens", "q_proj"])
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="lora_embedding_A is not a factor of a linear layer"):
        lora_ga.compress_adapter(tmp_path / "whole", tmp_path / "out", 2)


def test_the_merged_checkpoint_has_the_function_of_the_adapted_model(tmp_path: Path) -> None:
    model = saved(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=llama())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, causal(1)[0]), logits(model, causal(1)[0]), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="merged: not empty"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=llama())
