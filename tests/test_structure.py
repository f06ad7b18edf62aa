"""The structure of an aligned adapter: without an estimate, filled later, and in an adapter that is added.

Also: estimates of experts that end early or resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lora_ga
from cases import LAYERS, Case, mixtral, nf4, seeded
from lora_ga import LoraGAConfig
from lora_ga.adapter.structure import give_structure
from lora_ga.layers.factors import Factor
from lora_ga.layers.targets import find_targets
from toys import adapted, causal, llama, logits, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*experts .or groups. got no gradient:UserWarning"),
]
CONFIG = LoraGAConfig(on_missing="lora")
ROWS = ["nn.Linear", "Conv1D (GPT-2)", "bitsandbytes nf4", "nn.Embedding", "nn.Conv2d", "fused experts (Mixtral)"]


def make_model(case: Case) -> PeftModel:
    """Make the model of a case with a fresh adapter, the same in every call."""
    base = case.make()
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8} | dict(case.settings)))


def factors(model: nn.Module) -> dict[str, Factor]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Factor)}


@pytest.mark.parametrize("row", ROWS)
def test_a_structure_without_an_estimate_keeps_the_outputs_and_takes_the_same_start_later(row: str) -> None:
    case = LAYERS[row]
    case.check_installed()
    late, direct, batch = make_model(case), make_model(case), case.batches()[0]
    before = case.outputs(late, batch)
    trained = {id(parameter) for parameter in late.parameters() if parameter.requires_grad}
    give_structure(late, CONFIG, "default")
    assert torch.equal(case.outputs(late, batch), before)
    assert {id(parameter) for parameter in late.parameters() if parameter.requires_grad} == trained
    # `late` has the structure, but is not aligned yet.
    ranks = {name: target.rank for name, target in find_targets(late).items()}
    assert ranks == {name: target.rank for name, target in find_targets(direct).items()}
    for model in (late, direct):
        lora_ga.initialize(model, case.batches(), CONFIG, loss_fn=case.loss_fn)
    assert {id(parameter) for parameter in late.parameters() if parameter.requires_grad} == trained
    assert set(factors(late)) == set(factors(direct)) != set()
    for name, factor in factors(direct).items():
        assert torch.equal(factors(late)[name].start, factor.start), name
    torch.testing.assert_close(case.outputs(late, batch), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="already aligned"):
        find_targets(late)


def test_an_adapter_on_the_meta_device_gets_no_structure() -> None:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="q_proj: its adapter is on the meta device and has no values to compute with"):
        give_structure(model, CONFIG, "default")
    assert not factors(model)


def test_an_adapter_added_with_an_aligned_convolutions_configuration_gets_its_structure() -> None:
    case = LAYERS["nn.Conv2d, one group"]
    model = make_model(case)
    lora_ga.initialize(model, case.batches(), CONFIG)
    model.add_adapter("twin", model.peft_config["default"])
    layer = model.base_model.model.wide
    a, b = layer.lora_A["default"], layer.lora_A["twin"]
    assert isinstance(b, Factor)
    assert torch.equal(a.joined(), b.joined())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(b(x), a(x))


def adapted_experts() -> PeftModel:
    return adapted(seeded(mixtral)(), [], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])


def test_each_expert_converges_alone_and_a_layer_keeps_its_hooks_until_all_have() -> None:
    model, batches = adapted_experts(), causal(1, rows=16) * 12
    hooks = []

    def loss_fn(m: nn.Module, batch: Any) -> torch.Tensor:
        hooks.append(sum(len(module._forward_hooks) for module in m.modules()))
        return m(**batch).loss

    early = lora_ga.estimate_gradients(model, batches, LoraGAConfig(tolerance=0.02), loss_fn=loss_fn)
    whole = lora_ga.estimate_gradients(model, batches, LoraGAConfig())
    assert set(early.settled) == set(early)
    assert early.batches == max(early.settled.values()) == len(hooks) < 12
    last: dict[str, int] = {}
    for key, count in early.settled.items():
        name = key.partition("[")[0]
        last[name] = max(count, last.get(name, 0))
    assert hooks == [sum(count > index for count in last.values()) for index in range(len(hooks))]
    for key in early:
        assert early[key].norm == pytest.approx(whole[key].norm, rel=0.02), key


def test_a_resumed_estimate_of_experts_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    batches, file = causal(6), tmp_path / "state.safetensors"
    true = lora_ga.estimate_gradients(adapted_experts(), batches, CONFIG)

    def interrupted() -> Iterator[Any]:
        yield from batches[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lora_ga.estimate_gradients(adapted_experts(), interrupted(), CONFIG, checkpoint=file, every=2)
    again = lora_ga.estimate_gradients(adapted_experts(), batches, CONFIG, checkpoint=file, every=2)
    assert set(again) == set(true)
    for key in true:
        assert torch.equal(again[key].S, true[key].S), key
        assert torch.equal(again[key].U, true[key].U), key


def test_4_bit_layers_that_cannot_get_the_structure_are_left_unchanged() -> None:
    case = Case(nf4, needs="bitsandbytes")
    case.check_installed()
    model = adapted(nf4(), ["q_proj"], r=64)
    with pytest.raises(ValueError, match="No layer is left"):
        give_structure(model, CONFIG, "default")
    assert not factors(model)


def test_an_adapter_added_with_an_aligned_embeddings_configuration_gets_its_structure(tmp_path: Path) -> None:
    model = adapted(llama(), ["embed_tokens", "q_proj"])
    lora_ga.initialize(model, causal(), CONFIG)
    train(model, causal(), steps=2)
    trained = logits(model, causal(1)[0])
    model.add_adapter("twin", model.peft_config["default"])
    layer = model.base_model.model.model.embed_tokens
    for table in (layer.lora_embedding_A, layer.lora_embedding_B):
        held = dict(table.items())
        assert isinstance(held["twin"], Factor)
        assert held["twin"].rank == held["default"].rank == 4
        assert torch.equal(held["twin"].start, held["default"].start)
        assert not held["twin"].delta().any()
    model.set_adapter("twin")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 3
    assert all("twin" in name for name in names)
    assert torch.equal(logits(model, causal(1)[0]), logits(llama(), causal(1)[0]))
    losses = train(model, causal(1), steps=4)
    assert losses[-1] < losses[0]
    moved = logits(model, causal(1)[0])
    model.set_adapter("default")
    assert torch.equal(logits(model, causal(1)[0]), trained)
    model.save_pretrained(tmp_path)
    again = lora_ga.load(llama(), tmp_path / "twin", is_trainable=True).eval()
    torch.testing.assert_close(logits(again, causal(1)[0]), moved, rtol=0, atol=1e-6)


def test_writing_a_converted_weight_to_an_embeddings_table_converts_the_factor_in_place() -> None:
    model = adapted(llama(), ["embed_tokens", "q_proj"])
    lora_ga.initialize(model, causal(), CONFIG)
    table = model.base_model.model.model.embed_tokens.lora_embedding_B
    factor, before = dict(table.items())["default"], table["default"].detach().clone()
    table["default"] = table["default"].to(torch.float64)
    assert dict(table.items())["default"] is factor
    assert factor.trainable.dtype == torch.float64
    assert torch.equal(table["default"].float(), before)
