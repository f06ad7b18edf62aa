"""The fingerprint of a base model: the same under every wrapper of PEFT, and what an error says about another base."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_ga
from lora_ga import files
from lora_ga.files import another_base, fingerprint
from toys import adapted, bert, causal, gpt2, llama, logits, train

WRAPPERS: dict[str, dict[str, Any]] = {
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "head, tied": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [1, 2]},
    "tokens, tied": {"trainable_token_indices": [1, 2], "ensure_weight_tying": True},
    "container": {"modules_to_save": ["mlp"]},
    "norm": {"modules_to_save": ["norm"]},
}
# As version 0.1.0 computed them before this test was written. Files hold them.
RECORDED = {
    "llama": "311708645a05235e",
    "tied llama": "311708645a05235e",
    "gpt2": "0ed91318c9130e96",
    "bert": "3dea1ad1986f5781",
}


def wrapped(base: nn.Module, settings: dict[str, Any]) -> Any:
    # PEFT extends the list of modules in place.
    copied = {key: list(value) if isinstance(value, list) else value for key, value in settings.items()}
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **copied))


def test_fingerprints_in_files_stay_valid() -> None:
    found = {
        "llama": llama(),
        "tied llama": llama(tie_word_embeddings=True),
        "gpt2": gpt2(),
        "bert": bert(),
    }
    assert {name: fingerprint(model) for name, model in found.items()} == RECORDED


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
def test_no_wrapper_of_peft_changes_the_fingerprint(name: str, tied: bool) -> None:
    base = llama(tie_word_embeddings=tied)
    found = fingerprint(base)
    assert fingerprint(wrapped(base, WRAPPERS[name])) == found


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("name", ["embeddings, tied", "head, tied"])
def test_an_adapter_with_a_tied_head_loads_onto_its_base(name: str, is_trainable: bool, tmp_path: Path) -> None:
    model = wrapped(llama(tie_word_embeddings=True), WRAPPERS[name])
    lora_ga.initialize(model, causal())
    train(model, causal())
    model.save_pretrained(tmp_path)
    again = lora_ga.load(llama(tie_word_embeddings=True), tmp_path, is_trainable=is_trainable).eval()
    torch.testing.assert_close(logits(again, causal(1)[0]), logits(model.eval(), causal(1)[0]), rtol=0, atol=1e-5)


def test_files_with_the_fingerprint_that_earlier_versions_gave_a_tied_head_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = files._shapes
    monkeypatch.setattr(files, "_shapes", lambda model, *, wrappers: shapes(model, wrappers=True))
    model = wrapped(llama(tie_word_embeddings=True), WRAPPERS["head, tied"])
    estimate = lora_ga.estimate_gradients(model, causal())
    lora_ga.apply_estimate(model, estimate)
    model.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert estimate.fingerprint != fingerprint(llama(tie_word_embeddings=True))
    lora_ga.apply_estimate(wrapped(llama(tie_word_embeddings=True), WRAPPERS["head, tied"]), estimate)
    lora_ga.load(llama(tie_word_embeddings=True), tmp_path)


def test_another_base_is_refused_behind_a_tied_head_too(tmp_path: Path) -> None:
    model = wrapped(llama(tie_word_embeddings=True), WRAPPERS["head, tied"])
    lora_ga.initialize(model, causal())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained on another base model"):
        lora_ga.load(llama(tie_word_embeddings=True, intermediate_size=64), tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_an_error_about_another_base_names_a_resized_vocabulary(tied: bool, tmp_path: Path) -> None:
    model = adapted(llama(tie_word_embeddings=tied))
    estimate = lora_ga.initialize(model, causal())
    model.save_pretrained(tmp_path)
    resized = llama(tie_word_embeddings=tied, vocab_size=71)
    with pytest.raises(
        ValueError, match=r"Only the vocabulary differs: 64 tokens there, 71 in this model \(see resize"
    ):
        lora_ga.load(resized, tmp_path)
    with pytest.raises(ValueError, match="Only the vocabulary differs: 64 tokens there, 71 in this model"):
        lora_ga.apply_estimate(adapted(resized), estimate)


def test_the_vocabulary_is_not_named_where_more_differs() -> None:
    base = llama()
    assert another_base(base, fingerprint(base)) is None
    for other in (llama(vocab_size=71, num_hidden_layers=1), nn.Linear(2, 3)):
        difference = another_base(other, fingerprint(base))
        assert difference is not None
        assert "vocabulary" not in difference


def test_a_vocabulary_of_a_head_with_a_bias() -> None:
    assert "64 tokens there, 80 in this model" in str(another_base(bert(vocab_size=80), fingerprint(bert())))


def test_an_estimate_of_another_fingerprint_is_still_refused() -> None:
    model = adapted(llama())
    estimate = dataclasses.replace(lora_ga.estimate_gradients(model, causal()), fingerprint="0" * 16)
    with pytest.raises(ValueError, match=r"belongs to another model: .*weight shapes\)\. Estimate the gradients"):
        lora_ga.apply_estimate(model, estimate)
