"""The structure of an aligned adapter: without an estimate, filled later, in an adapter that is added, in tied layers.

Also: estimates of experts that end early or resume.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import lora_ga
from cases import LAYERS, Case, mixtral, nf4, seeded
from lora_ga import LoraGACallback, LoraGAConfig
from lora_ga.adapter import load as loading
from lora_ga.adapter.structure import give_structure
from lora_ga.export.merge import merge_adapter
from lora_ga.layers.factors import Factor
from lora_ga.layers.targets import find_targets
from toys import FUSED_EXPERTS, TIED_FACTORS, adapted, autograd_gradients, causal, llama, logits, train

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


def test_layers_too_small_for_their_rank_are_refused_or_stay_plain() -> None:
    model = adapted(llama(), rank_pattern={"q_proj": 32})
    with pytest.raises(ValueError, match="2 of 14 layers cannot be aligned"):
        give_structure(model, LoraGAConfig(), "default")
    assert not factors(model)
    give_structure(model, LoraGAConfig(on_missing="lora"), "default")
    assert len(factors(model)) == 24


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


@FUSED_EXPERTS
def test_each_expert_converges_alone_and_a_layer_keeps_its_hooks_until_all_have() -> None:
    model, batches = adapted_experts(), causal(1, rows=16) * 12
    hooks = []

    def loss_fn(m: Any, batch: Any) -> torch.Tensor:
        hooks.append(sum(len(module._forward_hooks) for module in m.get_base_model().model.modules()))
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


@FUSED_EXPERTS
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
    with pytest.raises(ValueError, match="The largest rank that fits all is 32"):
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
        held = {name: table.entry(name) for name in table}
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
    with model.disable_adapter():  # PEFT asks the tables of an embedding for devices and `requires_grad`
        assert torch.equal(logits(model, causal(1)[0]), logits(llama(), causal(1)[0]))
    model.set_adapter("default")
    assert torch.equal(logits(model, causal(1)[0]), trained)
    model.save_pretrained(tmp_path)
    again = lora_ga.load(llama(), tmp_path / "twin", is_trainable=True).eval()
    torch.testing.assert_close(logits(again, causal(1)[0]), moved, rtol=0, atol=1e-6)


def test_writing_a_converted_weight_to_an_embeddings_table_converts_the_factor_in_place() -> None:
    model = adapted(llama(), ["embed_tokens", "q_proj"])
    lora_ga.initialize(model, causal(), CONFIG)
    table = model.base_model.model.model.embed_tokens.lora_embedding_B
    factor, before = table.entry("default"), table["default"].detach().clone()
    table["default"] = table["default"].to(torch.float64)
    assert table.entry("default") is factor
    assert factor.trainable.dtype == torch.float64
    assert torch.equal(table["default"].float(), before)


# Weights and factors that several layers share


def tied_base() -> Any:
    return llama(tie_word_embeddings=True)


def tied_adapter(base: Any = None, **changes: Any) -> Any:
    """A Llama whose head and embedding have one weight and one change of it."""
    targets = ["embed_tokens", "lm_head", "q_proj"]
    return adapted(tied_base() if base is None else base, targets, ensure_weight_tying=True, **changes)


@pytest.fixture(scope="module")
def tied_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A trained model with a tied head, and its saved adapter."""
    model, folder = tied_adapter(), tmp_path_factory.mktemp("tied")
    lora_ga.initialize(model, causal())
    assert torch.equal(logits(model, causal(1)[0]), logits(tied_base(), causal(1)[0]))
    train(model, causal())
    model.save_pretrained(folder)
    return model.eval(), folder


@TIED_FACTORS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["dense", "streaming"])
def test_the_gradient_of_a_tied_head_and_its_embedding_is_that_of_both_uses(estimator: Any, dtype: torch.dtype) -> None:
    config = LoraGAConfig(estimator=estimator, oversample=64)
    estimate = lora_ga.estimate_gradients(tied_adapter(tied_base().to(dtype)), causal(1), config)
    assert "lm_head" not in estimate
    found = estimate["model.embed_tokens"]
    base = tied_base().to(dtype)
    wanted = autograd_gradients(base, lambda model: model(**causal(1)[0]).loss)["model.embed_tokens"].float().mT
    torch.testing.assert_close((found.U * found.S) @ found.V.mT, wanted, rtol=0, atol=2e-2 * wanted.abs().max().item())
    cosine = torch.nn.functional.cosine_similarity((found.U * found.S @ found.V.mT).flatten(), wanted.flatten(), dim=0)
    assert cosine > (1 - 1e-6 if dtype == torch.float32 else 0.9999)


@TIED_FACTORS
def test_a_tied_head_trains_the_embeddings_change_and_has_none_of_its_own(tied_run: tuple[Any, Path]) -> None:
    model, _ = tied_run
    head, embedding = model.base_model.model.lm_head, model.base_model.model.model.embed_tokens
    assert not list(head.lora_A.parameters()) + list(head.lora_B.parameters())
    assert torch.equal(head.get_delta_weight("default"), embedding.get_delta_weight("default"))
    assert head.get_delta_weight("default").any()
    assert head.r == embedding.r == {"default": 8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_saved_adapter_of_a_tied_head_is_what_was_trained(dtype: torch.dtype, tmp_path: Path) -> None:
    model, batch = tied_adapter(tied_base().to(dtype)), causal(1)[0]
    lora_ga.initialize(model, causal())
    train(model, causal())
    model.save_pretrained(tmp_path)
    wanted = logits(model.eval(), batch)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tied_base().to(dtype), tmp_path), batch), wanted)
    again = lora_ga.load(tied_base().to(dtype), tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(again.eval(), batch), wanted)
    assert train(again, causal()) == train(model, causal())


@TIED_FACTORS
def test_a_tied_adapter_that_exists_takes_the_saved_change_and_no_other(
    tied_run: tuple[Any, Path], tmp_path: Path
) -> None:
    model, folder = tied_run
    again = lora_ga.load(tied_adapter(), folder, is_trainable=True)
    assert torch.equal(logits(again.eval(), causal(1)[0]), logits(model, causal(1)[0]))
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.lora_A.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"lm_head has not the change of model.embed_tokens, which this model ties"):
        lora_ga.load(tied_adapter(), tmp_path)


def test_a_tied_head_starts_in_a_trainer_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in causal(1, rows=8)[0]["input_ids"]]
    start: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 2, "report_to": []}
    start |= {"use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2}

    def run(model: Any, resume: str | None = None) -> Any:
        callback = LoraGACallback(batches=causal())
        Trainer(model, TrainingArguments(str(tmp_path), **start), train_dataset=rows, callbacks=[callback]).train(
            resume
        )
        return model.state_dict()

    once, again = run(tied_adapter()), run(tied_adapter(), str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(once[name], again[name]) for name in once)
    with_own_start = lora_ga.load(tied_base(), tmp_path / "checkpoint-4").state_dict()
    assert all(torch.equal(once[name], with_own_start[name]) for name in once)


@TIED_FACTORS
def test_an_adapter_with_a_tied_head_is_merged_once_and_on_a_tied_base_alone(
    tied_run: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = tied_run
    merge_adapter(folder, tmp_path / "merged", base=tied_base())
    merged: Any = type(tied_base()).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged.eval(), causal(1)[0]), logits(model, causal(1)[0]), rtol=0, atol=1e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    with pytest.raises(ValueError, match="The adapter changes lm_head, but PEFT does not load .*tie_word_embeddings=T"):
        merge_adapter(folder, tmp_path / "other", base=llama())
    with pytest.raises(ValueError, match="lm_head tied to the embedding .* Load the base model with tie_word_embedd"):
        lora_ga.load(llama(), folder)
    monkeypatch.setattr(loading, "is_before", lambda *_: True)
    with pytest.raises(ValueError, match="lm_head tied to the embedding .* Upgrade it to PEFT 0.19 or newer"):
        lora_ga.load(llama(), folder)


@TIED_FACTORS
def test_an_adapter_added_with_a_tied_heads_configuration_is_tied_too(tied_run: tuple[Any, Path]) -> None:
    model = lora_ga.load(tied_base(), tied_run[1], is_trainable=True)
    model.add_adapter("ref", model.peft_config["default"])
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name in [name for name in values if ".default." in name]:
            values[name.replace(".default.", ".ref.")].copy_(values[name])
    expected = logits(model.eval(), causal(1)[0])
    model.set_adapter("ref")
    assert torch.equal(logits(model, causal(1)[0]), expected)


@TIED_FACTORS
def test_a_file_in_which_a_tied_head_has_its_own_start_is_refused_with_advice_that_works(tmp_path: Path) -> None:
    """As earlier versions wrote it."""
    model = adapted(tied_base(), ["embed_tokens", "lm_head", "q_proj"])
    lora_ga.initialize(model, causal())
    train(model, causal())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    listed = {"ensure_weight_tying": True, "target_modules": ["model.embed_tokens", "embed_tokens", "q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | listed))
    with pytest.raises(ValueError, match='set "ensure_weight_tying" to false and add "lm_head" to "target_modules"'):
        lora_ga.load(tied_base(), tmp_path)
    listed = {"ensure_weight_tying": False, "target_modules": [*listed["target_modules"], "lm_head"]}  # type: ignore[misc]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | listed))
    again = lora_ga.load(tied_base(), tmp_path)
    torch.testing.assert_close(logits(again, causal(1)[0]), logits(model.eval(), causal(1)[0]), rtol=0, atol=1e-5)


@TIED_FACTORS
@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ({"alpha_pattern": {"lm_head": 99}}, "rank 4 and scaling 49.5"),
        ({"rank_pattern": {"lm_head": 2}}, "rank 2 and scaling 5.65685"),
    ],
)
def test_a_tied_head_with_another_rank_or_scaling_is_refused(settings: dict[str, Any], own: str) -> None:
    message = (
        rf"lm_head is tied to the embedding .* {own}, the embedding 4 and 4\. Give both the same \(rank_pattern, al"
    )
    with pytest.raises(ValueError, match=message):
        lora_ga.initialize(tied_adapter(**settings), causal())


def test_the_base_offset_refuses_a_tied_head_and_weights_that_peft_saves() -> None:
    config = LoraGAConfig(offset="base")
    with pytest.raises(ValueError, match=r"embed_tokens: its weight is shared .* use offset=\"adapter\""):
        lora_ga.initialize(tied_adapter(), causal(), config)
    for name in ("embed_tokens", "lm_head"):
        with pytest.raises(ValueError, match=rf"{name}: PEFT saves the weights .* the changed weight into the file"):
            lora_ga.initialize(adapted(llama(), [name, "q_proj"]), causal(), config)


@TIED_FACTORS
def test_a_tied_head_that_ddp_has_wrapped_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(tied_adapter())
        with pytest.raises(
            ValueError, match="DistributedDataParallel holds the head's own. Call this before the model"
        ):
            lora_ga.initialize(wrapped, causal())
    finally:
        dist.destroy_process_group()


def share_table(one: Any, other: Any) -> None:
    one.lora_A = other.lora_A


def share_parameter(one: Any, other: Any) -> None:
    one.lora_B["default"].weight = other.lora_B["default"].weight


def share_memory(one: Any, other: Any) -> None:
    one.lora_A["default"].weight = nn.Parameter(other.lora_A["default"].weight.data)


@pytest.mark.parametrize("share", [share_table, share_parameter, share_memory])
def test_factors_that_layers_share_are_refused_before_anything_is_written(share: Any) -> None:
    model = adapted(llama(), ["q_proj"])
    first, second = (layer.self_attn.q_proj for layer in model.base_model.model.model.layers)
    share(first, second)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"of model.layers.0.self_attn.q_proj \('default'\) and lora_. of model.layers.1"
    ):
        lora_ga.initialize(model, causal())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_factor_that_another_adapter_uses_is_refused() -> None:
    model = adapted(llama(), ["q_proj"])
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["other"].weight = layer.lora_A["default"].weight
    with pytest.raises(
        ValueError, match=r"\('default'\) and lora_A of model.layers.0.self_attn.q_proj \('other'\) are"
    ):
        lora_ga.initialize(model, causal())


class Sharing(nn.Module):
    """Two linear layers with one weight, and one linear layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.four = self.three

    def forward(self, x: Tensor) -> Any:
        x = self.four(self.three(self.two(self.one(x).tanh()).tanh()).tanh())
        return {"loss": x.square().mean()}


@pytest.mark.parametrize("targets", [["one", "two"], ["one"], ["three"]])
def test_a_shared_base_weight_has_a_start_for_each_layer_and_cannot_be_changed(targets: list[str]) -> None:
    """PEFT wraps a module in the first of its places alone, and each adapter changes its own use of the weight."""
    batches = [{"x": torch.randn(16, 6, generator=torch.Generator().manual_seed(0))}]
    model = adapted(Sharing(), targets, r=2)
    estimate = lora_ga.estimate_gradients(model, batches, LoraGAConfig(estimator="dense", oversample=6))
    separate = Sharing()
    for name in ("two", "three"):  # the same function, whose uses of a weight are parameters of their own
        layer: Any = nn.Linear(6, 6)
        layer.load_state_dict(separate.get_submodule(name).state_dict())
        separate.set_submodule(name, layer)
    loss = separate(**batches[0])["loss"]
    for name in targets:
        used: Any = separate.get_submodule(name)
        (wanted,) = torch.autograd.grad(loss, used.weight, retain_graph=True)
        found = estimate[name]
        torch.testing.assert_close((found.U * found.S) @ found.V.mT, wanted, rtol=0, atol=1e-6)
    with pytest.raises(
        ValueError, match=rf"{targets[0]}: its weight is shared .* so offset=\"base\" would change them"
    ):
        lora_ga.initialize(model, batches, LoraGAConfig(offset="base"))
    lora_ga.apply_estimate(model, estimate)
    assert torch.equal(model(**batches[0])["loss"], Sharing()(**batches[0])["loss"])


def test_a_parameter_that_a_second_place_uses_without_the_adapter_is_refused() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("eoi,ni->no", self.weight, x)

    model = nn.ModuleDict({"one": (module := Stacked()), "two": module})
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=["one.weight"]))
    with pytest.raises(ValueError, match=r"the module under one is also called as .*two, where PEFT adapts nothing"):
        find_targets(adapter)
