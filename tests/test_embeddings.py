"""Gradients of embeddings: rows of padding, and embeddings that scale their output."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import lora_ga
from lora_ga import LoraGAConfig
from lora_ga.linalg.low_rank import LowRank
from toys import VOCABULARY, adapted, autograd_gradients, causal, tokens

DENSE = LoraGAConfig(estimator="dense", oversample=64)
PADDING = 3


class Words(nn.Module):
    """Looks up its words, with padding whose gradient torch leaves out, and pools all of them."""

    def __init__(self, padding_idx: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 16, padding_idx=padding_idx)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.head(self.embed(input_ids).mean(1).tanh()), labels)}


def product(layer: LowRank) -> Tensor:
    return (layer.U * layer.S) @ layer.V.mT


@pytest.mark.parametrize("estimator", ["dense", "streaming"])
@pytest.mark.parametrize("padding_idx", [PADDING, PADDING - VOCABULARY, None])
def test_padding_adds_nothing_to_the_gradient_of_an_embedding(padding_idx: int | None, estimator: str) -> None:
    ids = [tokens(8, 10, seed) for seed in range(3)]
    for each in ids:
        each[:, 6:] = PADDING
    data = [{"input_ids": each, "labels": each[:, 0] % 3} for each in ids]
    base = Words(padding_idx)
    true = autograd_gradients(
        copy.deepcopy(base), lambda model: torch.stack([model(**batch)["loss"] for batch in data]).mean()
    )["embed"]
    found = lora_ga.estimate_gradients(
        adapted(base, ["embed"]), data, LoraGAConfig(estimator=estimator, oversample=64)
    )["embed"]
    assert (true[PADDING].norm() > 0) == (padding_idx is None)
    torch.testing.assert_close(product(found).mT, true, rtol=1e-4, atol=1e-7)
    assert found.norm == pytest.approx(true.norm().item(), rel=1e-4)


def gemma() -> Any:
    """A Gemma, whose embedding multiplies its output by √width."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return Gemma3ForCausalLM(config).eval()


def test_the_gradient_of_an_embedding_that_scales_its_output_is_autograds() -> None:
    base, data = gemma(), causal()
    assert float(base.model.embed_tokens.embed_scale) == 8.0
    true = autograd_gradients(
        copy.deepcopy(base), lambda model: torch.stack([model(**batch).loss for batch in data]).mean()
    )["model.embed_tokens"]
    found = lora_ga.estimate_gradients(adapted(base, ["embed_tokens"]), data, DENSE)["model.embed_tokens"]
    torch.testing.assert_close(product(found).mT, true, rtol=1e-4, atol=1e-6)
    assert found.norm == pytest.approx(true.norm().item(), rel=1e-5)
