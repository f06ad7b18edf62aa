"""Everything that the loss reaches is as it was after an estimate, whoever owns it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import BertModel, Trainer, TrainingArguments

import lora_ga
from lora_ga import LoraGACallback, LoraGAConfig
from lora_ga.adapter.alignment import factors_of
from lora_ga.gradients.isolation import compute_device, isolated, replaced
from lora_ga.layers.factors import Factor
from toys import adapted, bert, causal, llama

ROWS = [(torch.randint(1, 64, (8, 10), generator=(g := torch.Generator().manual_seed(seed))), g) for seed in range(3)]
BATCHES = [{"input_ids": ids, "labels": torch.randint(0, 3, (8,), generator=g)} for ids, g in ROWS]


class Network(nn.Module):
    """A BERT with an adapter, between a projector and a head that train in full, and a temperature."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.encoder = get_peft_model(
            BertModel(bert().config, add_pooling_layer=False).eval(),
            LoraConfig(r=4, target_modules=["query", "value", "dense"]),
        )
        self.embedding, self.projector = nn.Embedding(64, 32), nn.Linear(32, 32)
        self.head = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 3))
        self.temperature = nn.Parameter(torch.zeros(()))
        self.reentrant = reentrant

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss, under the key "loss"."""
        x = self.encoder(inputs_embeds=self.projector(self.embedding(input_ids))).last_hidden_state[:, 0]
        x = self.head(x) if self.reentrant is None else checkpoint(self.head, x, use_reentrant=self.reentrant)
        return {"loss": cross_entropy(x * self.temperature.exp(), labels)}


def trained_once(network: nn.Module) -> None:
    """Give some parameters outside the adapter a `.grad`, and leave that of the others None."""
    network(**BATCHES[0])["loss"].backward()
    network.projector.weight.grad = None  # type: ignore[union-attr]


def state(network: nn.Module) -> dict[str, Any]:
    """Everything that an estimate must not change; `.grad` by identity and by value."""
    grads = {name: (id(p.grad), None if p.grad is None else p.grad.tolist()) for name, p in network.named_parameters()}
    return {
        "grad": {
            name: (identity if values is not None else None, values) for name, (identity, values) in grads.items()
        },
        "values": {name: value.tolist() for name, value in network.state_dict().items()},
        "required": [p.requires_grad for p in network.parameters()],
        "modes": [module.training for module in network.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in network.modules()
        ],
        "random": torch.get_rng_state().tolist(),
        "global hooks": len(nn.modules.module._global_forward_pre_hooks),
    }


def by_closure(network: Any) -> Callable[[Any, Any], Tensor]:
    return lambda model, batch: network(**batch)["loss"]


@pytest.mark.parametrize("estimator", ["streaming", "dense", "probe"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_no_gradient_or_buffer_outside_the_model_changes(estimator: Any, reentrant: bool | None) -> None:
    network = Network(reentrant).train()
    trained_once(network)
    before = state(network)
    lora_ga.estimate_gradients(
        network.encoder, BATCHES, lora_ga.LoraGAConfig(estimator=estimator), loss_fn=by_closure(network)
    )
    assert state(network) == before


def test_no_gradient_outside_the_model_changes_when_the_loss_raises() -> None:
    network = Network().train()
    trained_once(network)
    before, calls = state(network), []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise KeyError("the second batch")
        return network(**batch)["loss"]

    with pytest.raises(KeyError, match="the second batch"):
        lora_ga.estimate_gradients(network.encoder, BATCHES, loss_fn=loss)
    assert state(network) == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_plain_tensors_of_a_loss_keep_their_gradient(reentrant: bool) -> None:
    model, scale = adapted(llama()), torch.ones((), requires_grad=True)

    def loss(model: Any, batch: Any) -> Tensor:
        found = model(**batch).loss
        return (checkpoint(torch.exp, found, use_reentrant=True) if reentrant else found) * scale

    lora_ga.estimate_gradients(model, causal(), loss_fn=loss)
    assert scale.grad is None
    scale.grad = before = torch.full((), 5.0)
    lora_ga.estimate_gradients(model, causal(), loss_fn=loss)
    assert scale.grad is before
    assert before.item() == 5.0


def test_an_optimizer_inside_the_backward_pass_does_not_train_the_head() -> None:
    network = Network().eval()
    weight: Tensor = network.head[2].weight  # type: ignore[assignment]
    before = weight.detach().clone()

    def step(parameter: Tensor) -> None:
        parameter.data.sub_(parameter.grad)  # type: ignore[arg-type]

    weight.register_post_accumulate_grad_hook(step)
    lora_ga.estimate_gradients(network.encoder, BATCHES, loss_fn=by_closure(network))
    assert torch.equal(weight, before)


def test_recorded_passes_of_the_caller_leave_no_gradient_in_the_head() -> None:
    from lora_ga.gradients.recording import recording

    network = Network().train()
    trained_once(network)
    network.temperature.requires_grad_(False)
    before = state(network)
    with recording(network.encoder) as recorded:
        for batch in BATCHES:
            network(**batch)["loss"].backward()
    recorded.estimate()
    assert state(network) == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_estimate_is_the_same_with_and_without_checkpoints_outside_the_model(reentrant: bool) -> None:
    torch.manual_seed(0)
    plain, checkpointed = Network().eval(), Network(reentrant).eval()
    checkpointed.load_state_dict(plain.state_dict())
    one, other = (
        lora_ga.estimate_gradients(network.encoder, BATCHES, loss_fn=by_closure(network))
        for network in (plain, checkpointed)
    )
    assert all(torch.equal(one[name].S, other[name].S) for name in one)


NETWORK_ROWS = [{"input_ids": torch.randint(1, 64, (10,)), "labels": torch.tensor(row % 3)} for row in range(32)]
NETWORK_BATCHES = [
    {key: torch.stack([row[key] for row in NETWORK_ROWS[start : start + 8]]) for key in NETWORK_ROWS[0]}
    for start in range(0, 32, 8)
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
    lora_ga.initialize(whole, NETWORK_BATCHES, config)
    lora_ga.initialize(inner.encoder, NETWORK_BATCHES, config, loss_fn=lambda model, batch: inner(**batch)["loss"])
    assert same(whole, inner)
    assert all(module.training for module in whole.modules() if isinstance(module, nn.Dropout))
    assert whole.head.weight.requires_grad
    assert whole.head.weight.grad is None


def test_the_loss_function_gets_the_whole_network() -> None:
    network, got = Classifier(), []

    def loss(model: Any, batch: Any) -> Tensor:
        got.append(model)
        return model(**batch)["loss"]

    estimate = lora_ga.estimate_gradients(network, NETWORK_BATCHES, loss_fn=loss)
    assert all(model is network for model in got)
    lora_ga.apply_estimate(network, estimate)
    lora_ga.apply_estimate(Classifier().encoder, estimate)


def test_the_adapter_inside_is_saved_and_loads_again(tmp_path: Path) -> None:
    network = Classifier()
    lora_ga.initialize(network, NETWORK_BATCHES)
    network.encoder.save_pretrained(str(tmp_path))
    base = BertModel(bert().config, add_pooling_layer=False)
    base.load_state_dict(Classifier().encoder.unload().state_dict())
    again = lora_ga.load(base, tmp_path, is_trainable=True).eval()
    ids = NETWORK_BATCHES[0]["input_ids"]
    with torch.no_grad():
        found, wanted = again(input_ids=ids)[0], network.encoder.eval()(input_ids=ids)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_network_with_several_is_refused_with_their_names() -> None:
    pair = nn.ModuleDict({"student": adapted(llama()), "teacher": adapted(llama())})
    with pytest.raises(ValueError, match=r"contains 2 models with adapters \(student, teacher\)\. Give one of them"):
        lora_ga.initialize(pair, causal())


def test_a_network_with_none_is_refused_as_before() -> None:
    with pytest.raises(
        TypeError, match="The Sequential has no LoRA layers. Add an adapter first, with peft.get_peft_model"
    ):
        lora_ga.initialize(nn.Sequential(nn.Linear(2, 2)), causal())


def test_a_weight_shared_with_the_network_outside_is_not_changed() -> None:
    network = Classifier()
    network.shared = nn.Linear(32, 32)
    network.shared.weight = network.encoder.get_submodule(
        "base_model.model.encoder.layer.0.attention.self.query.base_layer"
    ).weight
    with pytest.raises(ValueError, match='its weight is shared .*so offset="base" would change them all'):
        lora_ga.initialize(network, NETWORK_BATCHES, LoraGAConfig(offset="base"))


def test_a_compiled_part_of_a_network_is_found() -> None:
    whole, compiled = Classifier(), Classifier()
    compiled.encoder = torch.compile(compiled.encoder, backend="eager")
    lora_ga.initialize(whole, NETWORK_BATCHES)
    lora_ga.initialize(compiled, NETWORK_BATCHES)
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
    return Trainer(network, arguments, train_dataset=NETWORK_ROWS, callbacks=[callback] if callback else [])


def test_the_callback_starts_the_adapter_inside_a_network(tmp_path: Path) -> None:
    network, by_hand, callback = Classifier(), Classifier(), LoraGACallback(batches=NETWORK_BATCHES)
    trainer(tmp_path, network, callback, max_steps=1, save_strategy="no").train()
    lora_ga.initialize(by_hand, NETWORK_BATCHES)
    assert isinstance(network.encoder, PeftModel)
    assert callback.estimate is not None
    mine, theirs = (factors_of(each.encoder, "default") for each in (network, by_hand))
    for name, pair in mine.items():
        assert all(torch.equal(a.start, b.start) for a, b in zip(pair, theirs[name], strict=True))


def test_a_run_of_a_network_resumes_bit_for_bit(tmp_path: Path) -> None:
    once, again = Classifier(), Classifier(seed=1)
    trainer(tmp_path, once, LoraGACallback(batches=NETWORK_BATCHES), max_steps=4, save_steps=2).train()
    again.encoder.base_model.model.load_state_dict(Classifier().encoder.base_model.model.state_dict())
    resumed = trainer(tmp_path, again, LoraGACallback(batches=NETWORK_BATCHES), max_steps=4, save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(once, again)


def test_a_network_that_returns_its_loss_needs_no_loss_function() -> None:
    class Bare(Classifier):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            return super().forward(input_ids, labels)["loss"]

    bare, whole = Bare(), Classifier()
    lora_ga.initialize(bare, NETWORK_BATCHES)
    lora_ga.initialize(whole, NETWORK_BATCHES)
    assert same(bare, whole)


def test_preparing_an_estimate_computes_no_factor_whose_parts_may_be_in_other_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted(llama())
    lora_ga.initialize(model, causal())
    computed: list[Factor] = []
    monkeypatch.setattr(Factor, "joined", computed.append)
    with isolated(model, "default"):
        pass
    assert computed == []


def test_a_replaced_method_is_afterwards_what_it_was() -> None:
    """That of the class, or one of the module's own."""
    module = nn.Linear(2, 2)
    for own in (None, lambda x: x):
        if own is not None:
            module.__dict__["forward"] = own
        with replaced(module, "forward", torch.sin):
            assert module.forward is torch.sin
        assert module.__dict__.get("forward") is own


def test_a_layer_computes_where_its_tensors_with_values_are() -> None:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.empty(2, 2, device="meta"))
    assert compute_device(layer) == torch.device("cpu")
