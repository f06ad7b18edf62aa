"""torch's own encoder layers, which run one fused kernel in evaluation mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ga
from lora_ga import LoraGAConfig
from toys import VOCABULARY, adapted, autograd_gradients, tokens

TARGETS = ["linear1", "linear2"]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, 3)
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, input_ids: Tensor, labels: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
        x = self.encoder(self.embed(input_ids), src_key_padding_mask=padding)
        logits = self.head(x[:, 0])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def batches(*, padded: bool) -> list[dict[str, Tensor]]:
    made = [{"input_ids": (ids := tokens(8, 10, seed)), "labels": ids[:, 0] % 3} for seed in range(2)]
    if padded:
        for batch in made:
            batch["padding"] = torch.arange(10) >= 5 + torch.arange(8)[:, None] % 4
    return made


@pytest.fixture(params=[True, False], ids=["fast path on", "fast path off"], autouse=True)
def fast_path(request: pytest.FixtureRequest) -> Any:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(request.param)
    yield request.param
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole rows"])
@pytest.mark.parametrize("estimator", ["dense", "streaming", "probe"])
def test_the_estimate_is_that_of_the_layers_as_they_train(
    estimator: str, padded: bool, training: bool, fast_path: bool
) -> None:
    base, data = Classifier(), batches(padded=padded)
    true = autograd_gradients(
        copy.deepcopy(base).train(), lambda model: torch.stack([model(**batch)["loss"] for batch in data]).mean()
    )
    model = adapted(base.train(training), TARGETS)
    found = lora_ga.estimate_gradients(model, data, LoraGAConfig(estimator=estimator, oversample=24))
    assert len(found) == 4
    for name, layer in found.items():
        product, g = (layer.U * layer.S) @ layer.V.mT, true[name]
        assert (product * g).sum() / (product.norm() * g.norm()) > 0.9999, name
    assert torch.backends.mha.get_fastpath_enabled() == fast_path


def test_the_fast_path_is_as_it_was_also_after_an_error(fast_path: bool) -> None:
    def broken(model: nn.Module, batch: Any) -> Tensor:
        assert not torch.backends.mha.get_fastpath_enabled()
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        lora_ga.estimate_gradients(adapted(Classifier(), TARGETS), batches(padded=False), loss_fn=broken)
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
