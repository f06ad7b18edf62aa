"""Networks that contain a PeftModel: the start is that of the model inside, with the whole network's loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertModel, Trainer, TrainingArguments

import lora_ga
from lora_ga import LoraGACallback, LoraGAConfig
from lora_ga.adapter.alignment import factors_of
from toys import adapted, bert, causal, llama

ROWS = [{"input_ids": torch.randint(1, 64, (10,)), "labels": torch.tensor(row % 3)} for row in range(32)]
BATCHES = [
    {key: torch.stack([row[key] for row in ROWS[start : start + 8]]) for key in ROWS[0]} for start in range(0, 32, 8)
]


class Classifier(nn.Module):
    """An encoder with an adapter, and a head of its own that trains in full."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        base = BertModel(bert().config, add_pooling_layer=False)
        self.encoder = get_peft_model(base, LoraConfig(r=4, target_modules=["query", "value"]))
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(32, 3)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss, under the key "loss"."""
        x = self.encoder(input_ids=input_ids).last_hidden_state[:, 0]
        scores = self.head(self.drop(x))
        return {"loss": cross_entropy(scores, labels), "logits": scores}


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("estimator", ["streaming", "probe"])
def test_a_network_is_started_as_the_model_inside_with_the_networks_loss(estimator: Any) -> None:
    config = LoraGAConfig(estimator=estimator)
    whole, inner = Classifier(), Classifier().eval()
    lora_ga.initialize(whole, BATCHES, config)
    lora_ga.initialize(inner.encoder, BATCHES, config, loss_fn=lambda model, batch: inner(**batch)["loss"])
    assert same(whole, inner)
    assert all(module.training for module in whole.modules() if isinstance(module, nn.Dropout))
    assert whole.head.weight.requires_grad
    assert whole.head.weight.grad is None


def test_the_loss_function_gets_the_whole_network() -> None:
    network, got = Classifier(), []

    def loss(model: Any, batch: Any) -> Tensor:
        got.append(model)
        return model(**batch)["loss"]

    estimate = lora_ga.estimate_gradients(network, BATCHES, loss_fn=loss)
    assert all(model is network for model in got)
    lora_ga.apply_estimate(network, estimate)
    lora_ga.apply_estimate(Classifier().encoder, estimate)


def test_the_adapter_inside_is_saved_and_loads_again(tmp_path: Path) -> None:
    network = Classifier()
    lora_ga.initialize(network, BATCHES)
    network.encoder.save_pretrained(str(tmp_path))
    base = BertModel(bert().config, add_pooling_layer=False)
    base.load_state_dict(Classifier().encoder.unload().state_dict())
    again = lora_ga.load(base, tmp_path, is_trainable=True).eval()
    ids = BATCHES[0]["input_ids"]
    with torch.no_grad():
        found, wanted = again(input_ids=ids)[0], network.encoder.eval()(input_ids=ids)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_network_with_several_is_refused_with_their_names() -> None:
    pair = nn.ModuleDict({"student": adapted(llama()), "teacher": adapted(llama())})
    with pytest.raises(ValueError, match=r"ModuleDict contains 2 PeftModels \(student, teacher\)\. Give one of them"):
        lora_ga.initialize(pair, causal())


def test_a_network_with_none_is_refused_as_before() -> None:
    with pytest.raises(TypeError, match="The model is a Sequential, not a PeftModel with LoRA layers. Call peft.get"):
        lora_ga.initialize(nn.Sequential(nn.Linear(2, 2)), causal())


def test_a_weight_shared_with_the_network_outside_is_not_changed() -> None:
    network = Classifier()
    network.shared = nn.Linear(32, 32)
    network.shared.weight = network.encoder.get_submodule(
        "base_model.model.encoder.layer.0.attention.self.query.base_layer"
    ).weight
    with pytest.raises(ValueError, match='its weight is shared .*so offset="base" would change them all'):
        lora_ga.initialize(network, BATCHES, LoraGAConfig(offset="base"))


def test_a_compiled_part_of_a_network_is_found() -> None:
    whole, compiled = Classifier(), Classifier()
    compiled.encoder = torch.compile(compiled.encoder, backend="eager")
    lora_ga.initialize(whole, BATCHES)
    lora_ga.initialize(compiled, BATCHES)
    mine, theirs = whole.state_dict(), compiled.state_dict()
    assert all(torch.equal(mine[name.replace("_orig_mod.", "")], value) for name, value in theirs.items())


def trainer(folder: Path, network: nn.Module, callback: LoraGACallback | None, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **settings,
    )
    return Trainer(network, arguments, train_dataset=ROWS, callbacks=[callback] if callback else [])


def test_the_callback_starts_the_adapter_inside_a_network(tmp_path: Path) -> None:
    network, by_hand, callback = Classifier(), Classifier(), LoraGACallback(batches=BATCHES)
    trainer(tmp_path, network, callback, max_steps=1, save_strategy="no").train()
    lora_ga.initialize(by_hand, BATCHES)
    assert isinstance(network.encoder, PeftModel)
    assert callback.estimate is not None
    mine, theirs = (factors_of(each.encoder, "default") for each in (network, by_hand))
    for name, pair in mine.items():
        assert all(torch.equal(a.start, b.start) for a, b in zip(pair, theirs[name], strict=True))


def test_a_run_of_a_network_resumes_bit_for_bit(tmp_path: Path) -> None:
    once, again = Classifier(), Classifier(seed=1)
    trainer(tmp_path, once, LoraGACallback(batches=BATCHES), max_steps=4, save_steps=2).train()
    again.encoder.base_model.model.load_state_dict(Classifier().encoder.base_model.model.state_dict())
    resumed = trainer(tmp_path, again, LoraGACallback(batches=BATCHES), max_steps=4, save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(once, again)
