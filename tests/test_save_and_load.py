"""Saved adapters: stock PEFT loads them, training resumes from them, and unsuitable ones are refused."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import logging
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks
from torch.optim.swa_utils import AveragedModel
from transformers import BertForSequenceClassification, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

import lora_ga
from cases import EXPERTS, LAYERS, Case, mixtral, seeded
from lora_ga import LoraGAConfig
from lora_ga.adapter import save as sidecar
from lora_ga.adapter.file import opened
from lora_ga.adapter.load import restore_starts
from lora_ga.adapter.optimizer_state import check_optimizer_state
from lora_ga.adapter.save import FILE
from lora_ga.config import CHOICES
from lora_ga.export.merge import merge_adapter
from lora_ga.files import write_tensors
from lora_ga.layers.factors import Factor, without_start
from lora_ga.layers.targets import PREFIX
from lora_ga.version import written_with
from toys import (
    FAMILIES,
    FUSED_EXPERTS,
    adapted,
    bert,
    causal,
    classified,
    injected,
    llama,
    logits,
    lora_settings,
    t5,
    tokens,
    train,
    translated,
)

WEIGHTS = "adapter_model.safetensors"


def trained(
    folder: Path, make: Callable[..., Any] = llama, data: Any = causal, offset: str = "adapter", **lora: Any
) -> Any:
    """Align, train and save a model, and return it in evaluation mode."""
    model = adapted(make(), lora.pop("targets", "all-linear"), **lora)
    lora_ga.initialize(model, data(), LoraGAConfig(offset=offset))
    train(model, data())
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("offset", CHOICES["offset"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_loads_the_adapter_on_the_original_base(tmp_path: Path, family: str, offset: str) -> None:
    make, data, targets = FAMILIES[family]
    model = trained(tmp_path, make, data, offset, targets=targets)
    stock = PeftModel.from_pretrained(make(), tmp_path)
    assert not any(isinstance(module, Factor) for module in stock.modules())
    expected = logits(model, data(1)[0])
    torch.testing.assert_close(logits(stock, data(1)[0]), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, logits(make(), data(1)[0]), atol=1e-3)


def test_the_saved_factors_join_the_start_and_the_trained_part(tmp_path: Path) -> None:
    trained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    starts = load_file(tmp_path / FILE)
    layer = "model.layers.0.self_attn.q_proj"
    a, b = (tensors[f"base_model.model.{layer}.lora_{letter}.weight"] for letter in "AB")
    assert a.shape == (8, 32)
    assert b.shape == (32, 8)
    assert torch.equal(b[:, :4], starts[f"{layer}.B0"])
    assert torch.equal(a[4:], starts[f"{layer}.A0"] + a[:4])


@pytest.mark.parametrize(
    "lora",
    [
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8}, "alpha_pattern": {"v_proj": 32}},
        {"rank_pattern": {"q_proj": 2}, "use_rslora": False},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]},
        {"lora_dropout": 0.1},
    ],
)
def test_patterns_saved_modules_and_dropout_survive_saving(tmp_path: Path, lora: dict[str, Any]) -> None:
    lora = dict(lora)
    model = trained(tmp_path, targets=lora.pop("target_modules", "all-linear"), **lora)
    for load in (PeftModel.from_pretrained, lora_ga.load):
        again = load(llama(), tmp_path).eval()
        torch.testing.assert_close(logits(again, causal(1)[0]), logits(model, causal(1)[0]), rtol=0, atol=1e-5)


def test_lora_bias_and_a_classification_head_survive_saving(tmp_path: Path) -> None:
    lora = {"lora_bias": True, "task_type": "SEQ_CLS", "targets": FAMILIES["bert"][2]}
    model = trained(tmp_path, bert, classified, **lora)
    for load in (PeftModel.from_pretrained, lora_ga.load):
        again = load(bert(), tmp_path).eval()
        torch.testing.assert_close(logits(again, classified(1)[0]), logits(model, classified(1)[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("offset", CHOICES["offset"])
def test_layers_left_as_plain_lora_survive_saving(tmp_path: Path, offset: str) -> None:
    def encoder_only(model: nn.Module, batch: Any) -> Tensor:
        return model.get_encoder()(batch["input_ids"]).last_hidden_state.square().mean()  # type: ignore[operator]

    model = adapted(t5(), use_rslora=False, rank_pattern={"q": 2}, alpha_pattern={"wo": 3})
    config = LoraGAConfig(on_missing="lora", offset=offset)
    with pytest.warns(UserWarning, match="start as plain LoRA"):
        lora_ga.initialize(model, translated(), config, loss_fn=encoder_only)
    train(model, translated())
    model.save_pretrained(tmp_path)
    expected = logits(model.eval(), translated(1)[0])
    for load in (PeftModel.from_pretrained, lora_ga.load):
        torch.testing.assert_close(logits(load(t5(), tmp_path), translated(1)[0]), expected, rtol=0, atol=1e-5)


def test_a_named_adapter_is_saved_in_its_folder_with_its_sidecar(tmp_path: Path) -> None:
    model = adapted(llama())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    lora_ga.initialize(model, causal(), adapter_name="second")
    model.set_adapter("second")
    train(model, causal())
    model.save_pretrained(tmp_path)
    starts = {name: module.start for name, module in model.named_modules() if isinstance(module, Factor)}
    again = adapted(llama())
    again.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    lora_ga.initialize(again, causal(1), adapter_name="second")
    again.load_adapter(tmp_path / "second", "second", is_trainable=True)  # as a trainer resumes
    restore_starts(again, tmp_path, "second")
    assert all(torch.equal(again.get_submodule(name).start, start) for name, start in starts.items())
    assert not (tmp_path / FILE).exists()
    assert (tmp_path / "second" / FILE).exists()
    stock = PeftModel.from_pretrained(llama(), tmp_path / "second")
    torch.testing.assert_close(logits(stock, causal(1)[0]), logits(model.eval(), causal(1)[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("safe", [True, False])
def test_starts_of_partitioned_factors_are_compared_with_one_reading_of_the_file(
    tmp_path: Path, safe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed ZeRO-3 restores dA and dB itself, so that the adapter file has to say which start they belong to."""
    model, again = adapted(llama()), adapted(llama())
    lora_ga.initialize(model, causal())
    lora_ga.initialize(again, causal(1))
    train(model, causal())
    model.save_pretrained(tmp_path, safe_serialization=safe)
    monkeypatch.setattr("lora_ga.adapter.load.in_zero3", lambda parameter: True)
    factors = [module for module in model.modules() if isinstance(module, Factor)]
    others = [module for module in again.modules() if isinstance(module, Factor)]
    with torch.no_grad():
        for factor, other in zip(factors, others, strict=True):
            other.trainable.copy_(factor.trainable)
    with patch("lora_ga.adapter.file.opened", wraps=opened) as reading:
        restore_starts(again, tmp_path)
    assert reading.call_count == 1
    assert all(torch.equal(other.start, factor.start) for factor, other in zip(factors, others, strict=True))
    with torch.no_grad():
        others[0].trainable.add_(1)
    with pytest.raises(ValueError, match="does not belong to the adapter that was loaded: A of .*q_proj has"):
        restore_starts(again, tmp_path)


def test_the_folder_that_save_pretrained_was_given_loads_an_adapter_by_its_name(tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = get_peft_model(llama(), lora_settings(), adapter_name="mine")
    lora_ga.initialize(model, causal(), adapter_name="mine")
    train(model, causal())
    model.save_pretrained(tmp_path)
    shutil.copytree(tmp_path / "mine", tmp_path / "other")
    batch, expected = causal(1)[0], logits(model.eval(), causal(1)[0])
    loaded = lora_ga.load(llama(), tmp_path, adapter_name="mine", is_trainable=True)
    assert torch.equal(logits(loaded, batch), expected)
    torch.manual_seed(7)
    filled = get_peft_model(llama(), lora_settings(), adapter_name="mine")
    assert torch.equal(logits(lora_ga.load(filled, tmp_path, adapter_name="mine", is_trainable=True), batch), expected)
    for base in (llama(), adapted(llama())):
        with pytest.raises(FileNotFoundError, match=f"subfolders hold adapters: mine, other. Give .*{tmp_path}/mine"):
            lora_ga.load(base, tmp_path)
        found = logits(lora_ga.load(base, tmp_path / "mine"), batch)  # as the message says
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("offset", CHOICES["offset"])
def test_training_resumes_bit_for_bit_after_save_and_load(tmp_path: Path, offset: str) -> None:
    uninterrupted = adapted(llama())
    lora_ga.initialize(uninterrupted, causal(), LoraGAConfig(offset=offset))
    optimizers = []

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, index: int) -> None:
        model(**causal(3)[index % 3]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    optimizers.append(torch.optim.AdamW([p for p in uninterrupted.parameters() if p.requires_grad], lr=1e-2))
    for index in range(4):
        step(uninterrupted, optimizers[0], index)
    uninterrupted.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizers[0].state_dict())
    resumed = lora_ga.load(llama(), tmp_path, is_trainable=True)
    optimizers.append(torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=1e-2))
    optimizers[1].load_state_dict(state)
    check_optimizer_state(optimizers[1])
    # A trainer loads the weights a second time, into the structure. This must not round the exact values.
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    for index in range(4, 8):
        step(uninterrupted, optimizers[0], index)
        step(resumed, optimizers[1], index)
    assert torch.equal(logits(uninterrupted, causal(1)[0]), logits(resumed, causal(1)[0]))
    for (name, mine), (other, theirs) in zip(uninterrupted.named_parameters(), resumed.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("offset", CHOICES["offset"])
def test_saving_a_loaded_adapter_writes_the_same_files(tmp_path: Path, offset: str) -> None:
    trained(tmp_path / "first", offset=offset)
    lora_ga.load(llama(), tmp_path / "first", is_trainable=True).save_pretrained(tmp_path / "second")
    for file in ("adapter_model.safetensors", FILE):
        mine, theirs = load_file(tmp_path / "first" / file), load_file(tmp_path / "second" / file)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("first", "second")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])  # PEFT keeps a set
    assert configs[0] == configs[1]


def test_loading_a_base_offset_adapter_for_inference_leaves_the_base_unchanged(tmp_path: Path) -> None:
    model = trained(tmp_path, offset="base")
    loaded = lora_ga.load(llama(), tmp_path)
    torch.testing.assert_close(logits(loaded, causal(1)[0]), logits(model, causal(1)[0]), rtol=0, atol=1e-5)
    again = lora_ga.load(llama(), tmp_path, is_trainable=True)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            assert again.get_submodule(name).r == layer.r == {"default": 4}
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, causal(1)[0]), logits(llama(), causal(1)[0]))


def test_an_adapter_loaded_for_inference_does_not_train(tmp_path: Path) -> None:
    trained(tmp_path)
    assert not any(parameter.requires_grad for parameter in lora_ga.load(llama(), tmp_path).parameters())
    again = lora_ga.load(llama(), tmp_path, is_trainable=True)
    assert sum(p.numel() for p in again.parameters() if p.requires_grad) == sum(
        p.numel() for p in adapted(llama()).parameters() if p.requires_grad
    )


def test_an_adapter_stored_in_bfloat16_is_close_and_loads(tmp_path: Path) -> None:
    # The learning rate of the published runs is small, so B A is close to B0 A0, and rounding matters most.
    model = adapted(llama())
    lora_ga.initialize(model, causal())
    train(model, causal(), steps=20, lr=1e-4)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    exact = {name: tensor.clone() for name, tensor in load_file(file).items()}  # else they may be a view of the file
    save_file({name: tensor.bfloat16() for name, tensor in exact.items()}, file)
    rough = load_file(file)
    for name, a in exact.items():
        if name.endswith("lora_A.weight"):
            other = name.replace("lora_A", "lora_B")
            true = exact[other].double() @ a.double()
            assert (rough[other].double() @ rough[name].double() - true).norm() <= 0.005 * true.norm(), name
    again = lora_ga.load(llama(), tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(again, causal(1)[0]), logits(model.eval(), causal(1)[0]), rtol=0, atol=1e-2)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("4.55.4", "from Transformers 4.55.4: Transformers {here}, which .* trained with .transformers==4.55.4.. If"),
        (None, "from another Transformers: Transformers {here}, which .* it was trained with. If another adapter"),
    ],
)
def test_the_error_about_another_base_names_the_transformers_that_saved_the_adapter(
    tmp_path: Path, version: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = written_with()
    assert made["transformers"] == transformers.__version__
    older = {key: value for key, value in made.items() if key != "transformers"}  # as the first files
    monkeypatch.setattr(sidecar, "written_with", lambda: older | ({"transformers": version} if version else {}))
    trained(tmp_path)
    with pytest.raises(ValueError, match=said.format(here=re.escape(transformers.__version__))):
        lora_ga.load(llama(num_hidden_layers=3), tmp_path)
    monkeypatch.setattr(sidecar, "written_with", lambda: made)
    trained(tmp_path)
    with pytest.raises(ValueError, match="Give the base model it was trained on. If another adapter was saved"):
        lora_ga.load(llama(num_hidden_layers=3), tmp_path)


def test_another_base_model_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    trained(tmp_path)
    base = llama(intermediate_size=64)
    with pytest.raises(
        ValueError, match=r"trained on another base model: .*down_proj is 32 x 48 there, and 32 x 64 in this"
    ):
        lora_ga.load(base, tmp_path)
    assert not any("lora" in name for name, _ in base.named_modules())
    wrapped: Any = torch.compile(base, backend="eager")
    with pytest.raises(ValueError, match="down_proj is 32 x 48 there, and 32 x 64 in this model"):
        lora_ga.load(wrapped, tmp_path)
    (tmp_path / FILE).unlink()  # an adapter of plain LoRA, whose layers the base does not have
    with pytest.raises(ValueError, match="Target modules .* Give the base model it was trained on"):
        lora_ga.load(bert(), tmp_path)


def test_a_base_with_another_number_of_classes_is_refused_with_the_layer_and_its_two_shapes(tmp_path: Path) -> None:
    model = adapted(bert(num_labels=4), ["query"], task_type="SEQ_CLS")
    lora_ga.initialize(model, classified())
    model.save_pretrained(tmp_path)
    message = r"classifier is 4 x 32 in this adapter, and 2 x 32 in the model. Load the base model with num_labels=4."
    with pytest.raises(ValueError, match=message):
        lora_ga.load(bert(num_labels=2), tmp_path)
    (tmp_path / FILE).unlink()  # an adapter of plain LoRA
    with pytest.raises(ValueError, match=message):
        lora_ga.load(bert(num_labels=2), tmp_path)


def test_the_folder_alone_loads_the_base_too_and_names_the_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # so that caplog sees its messages
    bert(num_labels=2).save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=4, ignore_mismatched_sizes=True
    ).eval()
    model = adapted(base, ["query"], task_type="SEQ_CLS")
    lora_ga.initialize(model, classified())
    model.save_pretrained(tmp_path / "adapter")
    names = {0: "a", 1: "b", 2: "c", 3: "d"}
    (tmp_path / "adapter" / "labels.json").write_text(json.dumps(names))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of names that Transformers has renamed and PEFT uses
        alone = lora_ga.load(tmp_path / "adapter")
    ids = {"input_ids": tokens()}
    assert torch.equal(logits(alone, ids), logits(model.eval(), ids))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    torch.save(tensors, file.with_suffix(".bin"))
    file.unlink()
    assert torch.equal(logits(lora_ga.load(tmp_path / "adapter"), ids), logits(model, ids))
    save_file(tensors, file, {"format": "pt"})
    file.with_suffix(".bin").unlink()
    of_run = lora_ga.load(tmp_path)  # the folder of a run holds the folder of its adapter
    assert torch.equal(logits(of_run, ids), logits(model, ids))
    for given in ((tmp_path / "base",), (bert(), tmp_path / "base")):
        with pytest.raises(FileNotFoundError, match=r"base: there is no adapter .* It holds a whole model"):
            lora_ga.load(*given)
    bert().bert.save_pretrained(tmp_path / "base")  # without a head
    caplog.clear()
    with caplog.at_level("WARNING"), warnings.catch_warnings():
        warnings.filterwarnings("error", "Neither the base")
        again = lora_ga.load(tmp_path / "adapter")
    assert "classifier" not in caplog.text
    assert torch.equal(again.classifier.weight, alone.classifier.weight)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for name in ("attention.output.dense.bias", "attention.output.dense.weight", "intermediate.dense.bias"):
        del weights[f"encoder.layer.0.{name}"]
    del weights["encoder.layer.0.output.dense.bias"]
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.warns(
        UserWarning,
        match=r"Neither the base model nor .* has .*0\.intermediate\.dense\.bias and 1 more: random w",
    ):
        lora_ga.load(tmp_path / "adapter")
    bert(num_labels=2).save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=4, ignore_mismatched_sizes=True)
    given = lora_ga.load(base, tmp_path / "adapter")
    assert alone.config.id2label == given.config.id2label == names
    with pytest.raises(TypeError, match="the base is a name. Give the model itself, or the folder alone"):
        lora_ga.load("base", tmp_path / "adapter")
    with pytest.raises(TypeError, match=r"load\(base\) lacks the adapter"):
        lora_ga.load(base)
    config = tmp_path / "adapter" / "adapter_config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"SEQ_CLS"', "null"))
    with pytest.raises(ValueError, match=r"its task type is None\. Load the base model yourself"):
        lora_ga.load(tmp_path / "adapter")
    config.write_text(whole)
    (tmp_path / "adapter" / "labels.json").write_text("[]")
    with pytest.raises(ValueError, match="labels.json: damaged"):
        lora_ga.load(untouched := bert(num_labels=4), tmp_path / "adapter")
    assert not any("lora" in name for name, _ in untouched.named_modules())
    config.write_text("{")
    with pytest.raises(ValueError, match="adapter: damaged, or not what it should be"):
        lora_ga.load(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="no-folder: not a local folder, and the hub does not give it"):
        lora_ga.load(tmp_path / "no-folder")


@pytest.mark.parametrize("name", ["no-such-owner/no-such-adapter", "no/such/folder"])
def test_an_adapter_that_does_not_exist_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # otherwise it retries for half a minute
    base = llama()
    with pytest.raises(FileNotFoundError, match=f"{name}: not a local folder, and the hub does not give it"):
        lora_ga.load(base, name)
    assert not any("lora" in path for path, _ in base.named_modules())


def test_an_adapter_on_the_hub_may_have_no_sidecar(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> str:
        raise EntryNotFoundError("404")

    monkeypatch.setattr(sidecar, "hf_hub_download", absent)
    assert sidecar.read_sidecar("owner/adapter") is None


def test_a_damaged_sidecar_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="lora_ga.safetensors: damaged, or not a safetensors file"):
        lora_ga.load(llama(), tmp_path)


def test_the_sidecar_of_another_adapter_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "a")
    trained(tmp_path / "b", data=lambda: causal(3, rows=5))
    (tmp_path / "a" / FILE).write_bytes((tmp_path / "b" / FILE).read_bytes())
    base = llama()
    with pytest.raises(
        ValueError, match="not belong to this adapter: A of model.layers.0.* has another start.*Remove it"
    ):
        lora_ga.load(base, tmp_path / "a", is_trainable=True)
    assert not any("lora" in name for name, _ in base.named_modules())


def edited(folder: Path, **changes: Any) -> None:
    """Change the configuration of a saved adapter."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_layers(folder: Path) -> None:
    edited(folder, target_modules=["absent"])


def another_rank(folder: Path) -> None:
    edited(folder, r=16)


def another_sidecar(folder: Path) -> None:
    other = adapted(llama())
    lora_ga.initialize(other, causal(5)[3:])
    other.save_pretrained(folder / "other")
    shutil.copy(folder / "other" / FILE, folder)


@pytest.mark.parametrize("spoil", [without_layers, another_rank, another_sidecar])
def test_a_load_that_fails_leaves_the_base_without_layers_and_as_trainable_as_before(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    trained(tmp_path / "good", modules_to_save=["embed_tokens"], targets=["q_proj"])
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    spoil(tmp_path / "bad")
    base = llama()
    base.lm_head.requires_grad_(False)
    modules, required = dict(base.named_modules()), [parameter.requires_grad for parameter in base.parameters()]
    with pytest.raises(ValueError, match=str(tmp_path / "bad")):
        lora_ga.load(base, tmp_path / "bad", is_trainable=True)
    assert dict(base.named_modules()) == modules
    assert [parameter.requires_grad for parameter in base.parameters()] == required
    assert not hasattr(base, "peft_config")
    lora_ga.load(base, tmp_path / "good", is_trainable=True)


def test_making_an_adapter_that_fails_leaves_the_base_as_before() -> None:
    base = llama()
    modules = dict(base.named_modules())
    with pytest.raises(ValueError, match="[Tt]arget.modules"):
        lora_ga.get_lora_ga_model(base, lora_settings(["absent"]), causal())
    assert dict(base.named_modules()) == modules
    assert all(parameter.requires_grad for parameter in base.parameters())
    held = adapted(base)  # its layers stay where a second adapter cannot be made
    with pytest.raises(ValueError, match="[Tt]arget.modules"), pytest.warns(UserWarning, match="PEFT"):
        lora_ga.get_lora_ga_model(held, lora_settings(["absent"]), causal())
    assert any(isinstance(module, LoraLayer) for module in held.modules())
    assert "default" in held.peft_config


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"], ["q_proj", "lm_head"]])
@pytest.mark.parametrize("whole", [[], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("sidecar", [True, False])
def test_a_base_with_another_vocabulary_is_refused_and_loads_once_it_is_resized(
    tmp_path: Path, targets: list[str], whole: list[str], sidecar: bool
) -> None:
    base = llama()
    base.resize_token_embeddings(70, mean_resizing=False)
    model = adapted(base, targets, modules_to_save=[name for name in whole if name not in targets] or None)
    lora_ga.initialize(model, causal())
    train(model, causal(), steps=1)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    if not sidecar:
        (tmp_path / FILE).unlink()
    again = llama()
    with pytest.raises(ValueError, match=r"70 tokens .*64 in (the|this) model.*resize_token_embeddings\(70\)"):
        lora_ga.load(again, tmp_path)
    again.resize_token_embeddings(70, mean_resizing=False)  # as the message says
    loaded = lora_ga.load(again, tmp_path)
    torch.testing.assert_close(logits(loaded, causal(1)[0]), logits(model.eval(), causal(1)[0]), rtol=0, atol=1e-5)


def test_an_adapter_without_its_sidecar_trains_as_plain_lora_with_a_warning(tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.warns(UserWarning, match="has no lora_ga.safetensors: it trains on as plain LoRA"):
        model = lora_ga.load(llama(), tmp_path, is_trainable=True)
    assert not any(isinstance(module, Factor) for module in model.modules())


def test_the_optimizer_state_of_a_lora_ga_run_is_refused_for_a_plain_adapter(tmp_path: Path) -> None:
    model = trained(tmp_path)
    (tmp_path / FILE).unlink()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(**causal(1)[0]).loss.backward()
    optimizer.step()
    stock = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    wrong = torch.optim.AdamW([p for p in stock.parameters() if p.requires_grad])
    wrong.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"exp_avg is \(4, 32\), its parameter \(8, 32\): the state of a LoRA-GA run"):
        check_optimizer_state(wrong)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="(?s)lora_ga.safetensors is missing.*optimizer state.*has other shapes"):
        lora_ga.load(llama(), tmp_path, is_trainable=True)
    torch.save({"state": {}, "code": Mock}, tmp_path / "optimizer.pt")  # a class would have to be imported
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        lora_ga.load(llama(), tmp_path, is_trainable=True)


def load_as_plain(folder: Path) -> PeftModel:
    if not (folder / FILE).is_file():
        trained(folder)
    (folder / FILE).unlink()
    with pytest.warns(UserWarning, match="trains on as plain LoRA"):
        return lora_ga.load(llama(), folder, is_trainable=True)


def optimizer_with_halved_state(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer with a state like that of a LoRA-GA run, in which A and B are half as large."""
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
        optimizer.state[parameter]["exp_avg"] = torch.zeros(len(parameter) // 2, *parameter.shape[1:])
    return optimizer


def test_the_first_step_of_a_plain_adapter_checks_the_optimizer_state(tmp_path: Path) -> None:
    model = load_as_plain(tmp_path)
    optimizer = optimizer_with_halved_state(p for p in model.parameters() if p.requires_grad)
    for _ in range(2):
        with pytest.raises(ValueError, match="the state of a LoRA-GA run .* does not fit a plain rank-2r adapter"):
            optimizer.step()
    optimizer.state.clear()
    optimizer.step()
    with patch.object(model, "modules") as looks:
        optimizer.step()  # it looks at each optimizer once
    assert looks.call_count == 0


def test_the_optimizers_of_other_models_are_not_checked(tmp_path: Path) -> None:
    model = load_as_plain(tmp_path)
    model.base_model.model.lm_head.requires_grad_(True)
    for module in (nn.Linear(4, 4), model.base_model.model.lm_head):  # not of the adapter, in and outside its model
        optimizer = optimizer_with_halved_state(module.parameters())
        after = Mock()
        optimizer.register_step_post_hook(after)
        optimizer.step()
        assert after.call_count == 1


def test_the_check_is_removed_with_the_model(tmp_path: Path) -> None:
    trained(tmp_path)  # the first LoRA-GA adapter of a process registers a hook that stays
    gc.collect()  # models of other tests
    before = len(hooks)
    model = load_as_plain(tmp_path)
    assert len(hooks) == before + 1
    del model
    gc.collect()
    assert len(hooks) == before


def test_an_adapter_of_another_rank_does_not_load_into_an_aligned_one(tmp_path: Path) -> None:
    adapted(llama(), r=6).save_pretrained(tmp_path)
    model = adapted(llama())
    lora_ga.initialize(model, causal())
    with pytest.raises(RuntimeError, match=r"weight is \(6, 32\), but this layer is aligned.* loads \(8, 32\)"):
        model.load_adapter(tmp_path, "default")


def test_a_plain_adapter_of_twice_the_rank_loads_into_an_aligned_one(tmp_path: Path) -> None:
    plain = adapted(llama(), r=8, lora_alpha=8 * 2**0.5)
    train(plain, causal())
    plain.save_pretrained(tmp_path)
    model = adapted(llama())
    lora_ga.initialize(model, causal())
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(logits(model, causal(1)[0]), logits(plain.eval(), causal(1)[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_the_trained_tensors_saved_by_hand_are_refused_and_their_joined_matrices_load(
    tmp_path: Path, file: str
) -> None:
    model = trained(tmp_path, targets=["q_proj"])
    tensors = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    write: Any = save_file if file.endswith("safetensors") else torch.save
    (tmp_path / "adapter_model.safetensors").unlink()
    write(tensors, tmp_path / file)
    assert len(without_start(tensors)) == 1  # says it of the first
    message = r"lora_A.default.delta_weight holds a trained change .* rank 2r.* lora_ga.safetensors is there, join them"
    for trainable in (True, False):
        with pytest.raises(ValueError, match=f"{file}: .*{message}"):
            lora_ga.load(llama(), tmp_path, is_trainable=trainable)
    if file.endswith("safetensors"):
        with pytest.raises(ValueError, match=f"{file}: .*{message}"):
            lora_ga.load(injected(llama(), ["q_proj"]), tmp_path)
        with pytest.raises(ValueError, match=f"{file}: .*{message}"):
            lora_ga.compress_adapter(tmp_path, tmp_path / "small", rank=2)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(tensors, strict=False)

    starts, joined = load_file(tmp_path / FILE), {}
    for name, delta in tensors.items():
        layer, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
        start = starts[f"{layer}.{rest[0]}0"]
        plain = name.replace(".default.delta_weight", ".weight")
        joined[plain] = torch.cat([delta, start + delta]) if rest[0] == "A" else torch.cat([start, delta], dim=1)
    write(joined, tmp_path / file)
    batch = causal()[0]
    assert torch.equal(logits(lora_ga.load(llama(), tmp_path).eval(), batch), logits(model, batch))
    write({name: value.contiguous() for name, value in get_peft_model_state_dict(model).items()}, tmp_path / file)
    assert torch.equal(logits(lora_ga.load(llama(), tmp_path).eval(), batch), logits(model, batch))


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_bin_file_is_the_same_adapter_as_a_safetensors_file(tmp_path: Path, by_hand: bool) -> None:
    """With a layer that stays plain LoRA and is padded; the given tensors are the trained halves alone."""
    model = adapted(llama(), ["q_proj", "k_proj"], rank_pattern={"0.self_attn.k_proj": 12})
    with pytest.warns(UserWarning, match="start as plain LoRA"):
        lora_ga.initialize(model, causal(), LoraGAConfig(on_missing="lora"))
    train(model, causal())
    given: dict[str, Any] = {}
    if by_hand:
        given = {"state_dict": {name: value for name, value in model.named_parameters() if value.requires_grad}}
    for name in ("safetensors", "bin"):
        model.save_pretrained(tmp_path / name, safe_serialization=name == "safetensors", **given)
    tensors = torch.load(tmp_path / "bin" / "adapter_model.bin", weights_only=True)
    expected = load_file(tmp_path / "safetensors" / WEIGHTS)
    assert sorted(tensors) == sorted(expected)
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())
    config = (tmp_path / "safetensors" / "adapter_config.json").read_text()
    assert (tmp_path / "bin" / "adapter_config.json").read_text() == config
    batch = causal(1)[0]
    stock = PeftModel.from_pretrained(llama(), tmp_path / "bin")
    torch.testing.assert_close(logits(stock, batch), logits(model.eval(), batch), rtol=0, atol=1e-5)
    again = lora_ga.load(llama(), tmp_path / "bin", is_trainable=True)
    assert train(again.train(), causal()) == train(model.train(), causal())


@pytest.mark.parametrize("layers", ["llama", "nn.Embedding", "nn.Conv2d"])
def test_the_average_of_a_run_is_saved_with_its_sidecar(tmp_path: Path, layers: str) -> None:
    case = LAYERS.get(layers, Case(llama))
    model = adapted(case.make(), **case.settings)
    lora_ga.initialize(model, case.batches(), LoraGAConfig(on_missing="lora"), loss_fn=case.loss_fn)
    average = AveragedModel(model)
    for _ in range(2):
        train(model, case.batches(), steps=1)
        average.update_parameters(model)
    model.save_pretrained(tmp_path, state_dict=average.module.state_dict())
    assert (tmp_path / FILE).is_file()
    loaded = lora_ga.load(case.make(), tmp_path, is_trainable=True).eval()
    batch = case.batches()[0]
    expected = case.outputs(average.module.eval(), batch)
    torch.testing.assert_close(case.outputs(loaded, batch), expected, rtol=0, atol=1e-5)


def test_the_average_of_a_run_with_a_changed_base_is_saved_without_the_sidecar(tmp_path: Path) -> None:
    model = adapted(llama())
    lora_ga.initialize(model, causal(), LoraGAConfig(offset="base"))
    average = AveragedModel(model)
    for _ in range(2):
        train(model, causal(), steps=1)
        average.update_parameters(model)
    with pytest.warns(UserWarning, match="no lora_ga.safetensors was written"):
        model.save_pretrained(tmp_path, state_dict=average.module.state_dict())
    assert not (tmp_path / FILE).exists()


def test_a_sidecar_that_another_adapter_was_saved_over_is_refused_with_the_advice_to_remove_it(tmp_path: Path) -> None:
    trained(tmp_path, targets=["q_proj"])
    plain = adapted(llama(vocab_size=80), ["q_proj"])
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"If another adapter was saved over it since, {FILE} .* remove the file"):
        lora_ga.load(llama(vocab_size=80), tmp_path)
    (tmp_path / FILE).unlink()
    lora_ga.load(llama(vocab_size=80), tmp_path)


@pytest.mark.parametrize("offset", CHOICES["offset"])
@pytest.mark.parametrize(
    "lora", [{}, {"r": 3, "lora_alpha": 7}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}]
)
def test_every_reader_that_divides_alpha_by_the_rank_gets_the_scaling(
    tmp_path: Path, offset: str, lora: dict[str, Any]
) -> None:
    model = trained(tmp_path, offset=offset, **lora)
    config = PeftConfig.from_pretrained(tmp_path)
    assert not config.use_rslora
    assert config.r == 2 * lora.get("r", 4)
    assert bool(config.alpha_pattern) == ("rank_pattern" in lora)  # one α where the layers allow it
    stock = PeftModel.from_pretrained(llama(), tmp_path)
    layers = {name: m.scaling["default"] for name, m in stock.named_modules() if isinstance(m, LoraLayer)}
    assert layers == {name: m.scaling["default"] for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    again = lora_ga.load(llama(), tmp_path, is_trainable=True)
    again.save_pretrained(tmp_path / "again")
    assert PeftConfig.from_pretrained(tmp_path / "again").to_dict() == config.to_dict()


class Grouped(nn.Module):
    """An embedding, a grouped convolution and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.grouped = nn.Embedding(64, 16), nn.Conv1d(16, 16, 1, groups=2)
        self.lm_head = nn.Linear(16, 64)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        """Predict each label from the input at its place."""
        scores = self.lm_head(self.grouped(self.embed(input_ids).mT).mT)
        loss = None if labels is None else nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=scores)


def last_block(model: nn.Module, batch: Any) -> Tensor:
    """A loss that only the last block's layers have a gradient of."""
    hidden = model(**batch, output_hidden_states=True).hidden_states[1].detach()
    return model.get_submodule("base_model.model.model.layers.1.mlp")(hidden).square().mean()


def last_layer(model: nn.Module, batch: Any) -> Tensor:
    """A loss that only the last layer has a gradient of."""
    hidden = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    return model.get_submodule("base_model.model.lm_head")(hidden).square().mean()


def half_plain(model: Any, offset: str = "adapter", loss: Any = last_block) -> Any:
    """Start an adapter of which two layers stay plain LoRA, since they have no gradient, and train it."""
    with pytest.warns(UserWarning, match="They start as plain LoRA"):
        lora_ga.initialize(model, causal(), LoraGAConfig(on_missing="lora", offset=offset), loss_fn=loss)
    train(model, causal())
    return model


MLP: dict[str, Any] = {"targets": ["down_proj", "up_proj"]}
HALF_PLAIN: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "rsLoRA": (llama, MLP, last_block),
    "no rsLoRA": (llama, MLP | {"use_rslora": False}, last_block),
    "patterns": (llama, MLP | {"rank_pattern": {"up_proj": 2}}, last_block),
    "embedding and groups": (Grouped, {"targets": ["embed", "grouped", "lm_head"]}, last_layer),
    "experts": (seeded(mixtral), {"targets": [], "target_parameters": EXPERTS["target_parameters"]}, last_block),
}


@pytest.mark.parametrize("offset", CHOICES["offset"])
@pytest.mark.parametrize("case", [*list(HALF_PLAIN)[:-1], pytest.param("experts", marks=FUSED_EXPERTS)])
def test_a_file_with_plain_layers_has_one_rank_and_one_alpha_and_resumes_bit_for_bit(
    tmp_path: Path, offset: str, case: str
) -> None:
    make, settings, loss = HALF_PLAIN[case]
    model = half_plain(adapted(make(), **settings), offset, loss)
    assert len(model.peft_config["default"].alignment.plain) == 2
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.r == 8
    if "rank_pattern" not in settings:
        assert (config.rank_pattern, config.alpha_pattern) == ({}, {})
        rows = {len(t) for name, t in load_file(tmp_path / WEIGHTS).items() if "_A" in name}
        assert rows == {8 * (make().config.num_local_experts if case == "experts" else 1)}
    stock = PeftModel.from_pretrained(make(), tmp_path)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            assert stock.get_submodule(name).scaling == layer.scaling
    torch.testing.assert_close(logits(stock, causal(1)[0]), logits(model.eval(), causal(1)[0]), rtol=0, atol=1e-5)
    ways = [lora_ga.load(make(), tmp_path, is_trainable=True)]
    if offset == "adapter":
        again = half_plain(adapted(make(), **settings), loss=loss)
        again.load_adapter(tmp_path, "default", is_trainable=True)  # as a trainer resumes
        restore_starts(again, tmp_path)
        ways += [again, lora_ga.load(adapted(make(), **settings), tmp_path, is_trainable=True)]
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    losses = train(model.train(), causal())
    for other in ways:
        assert [p.shape for p in other.parameters() if p.requires_grad] == shapes
        other.save_pretrained(tmp_path / "again")
        assert PeftConfig.from_pretrained(tmp_path / "again").to_dict() == config.to_dict()
        for module in other.modules():
            if isinstance(module, nn.Linear):
                sizes = (module.out_features, module.in_features)
                assert str(tuple(module.weight.shape)) == str(sizes)  # 8 and not 8.0
        both = (sidecar.read_sidecar(folder) for folder in (tmp_path, tmp_path / "again"))
        assert len({json.dumps(each[1]["plain"]) for each in both if each is not None}) == 1
        assert train(other.train(), causal()) == losses
        shutil.rmtree(tmp_path / "again")


def compiled(*, blocks: bool = False) -> Any:
    """A Llama that torch.compile has wrapped, or one whose blocks it has wrapped."""
    base: Any = llama()
    if not blocks:
        return torch.compile(base, backend="eager")
    layers: list[Any] = [torch.compile(layer, backend="eager") for layer in base.model.layers]
    base.model.layers = nn.ModuleList(layers)
    return base


@pytest.fixture
def untraced() -> Iterator[None]:
    """Compiled modules run without being compiled; their names are what counts."""
    with torch.compiler.set_stance("force_eager"):
        yield


SOME: dict[str, Any] = {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("blocks", [False, True])
def test_an_adapter_of_a_compiled_base_has_the_names_of_the_base(tmp_path: Path, blocks: bool) -> None:
    whole = trained(tmp_path, lambda: compiled(blocks=blocks), **SOME)
    plain = trained(tmp_path / "plain", **SOME)
    for file in ("adapter_model.safetensors", FILE):
        mine, theirs = load_file(tmp_path / file), load_file(tmp_path / "plain" / file)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path), causal(1)[0]), logits(plain, causal(1)[0]))
    again = lora_ga.load(compiled(blocks=blocks), tmp_path, is_trainable=True)
    adapter = adapted(compiled(blocks=blocks), **SOME)
    for other in (again, lora_ga.load(adapter, tmp_path, is_trainable=True)):
        assert torch.equal(logits(other.eval(), causal(1)[0]), logits(whole, causal(1)[0]))
    train(whole.train(), causal())
    again.load_adapter(tmp_path, "default", is_trainable=True)  # as a trainer resumes
    assert train(again.train(), causal()) == train(lora_ga.load(llama(), tmp_path, is_trainable=True).train(), causal())


def test_a_compiled_base_is_merged_as_the_base_and_one_with_compiled_blocks_is_refused(tmp_path: Path) -> None:
    model = trained(tmp_path / "adapter", targets=["q_proj"])
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=compiled())
    merged = logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval(), causal(1)[0])
    torch.testing.assert_close(merged, logits(model, causal(1)[0]), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="Blocks of the base model are wrapped by torch.compile.* Load the base model"):
        merge_adapter(tmp_path / "adapter", tmp_path / "other", base=compiled(blocks=True))
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("untraced")
def test_a_file_with_the_names_of_a_compiled_base_is_refused_with_the_cause(tmp_path: Path) -> None:
    whole = trained(tmp_path, compiled, targets=["q_proj"])
    for file in (tmp_path / "adapter_model.safetensors", tmp_path / FILE):  # as PEFT and earlier versions wrote them
        tensors, record = load_file(file), sidecar.read_sidecar(tmp_path)
        if file.name == FILE:
            assert record is not None
            named = {f"_orig_mod.{name}": value for name, value in record[1]["scaling"].items()}
            renamed = {f"_orig_mod.{name}": value for name, value in tensors.items()}
            write_tensors(file, sidecar.FILE_KIND, renamed, record[1] | {"scaling": named})
        else:
            save_file({name.replace(PREFIX, f"{PREFIX}_orig_mod."): t for name, t in tensors.items()}, file)
    for trainable in (True, False):
        with pytest.raises(
            ValueError,
            match=r"\(torch.compile\(base\)\), so its names contain _orig_mod.* \(as .*0\.self_attn\.q_proj\.lora_A",
        ):
            lora_ga.load(llama(), tmp_path, is_trainable=trainable)
    with pytest.raises(ValueError, match="so its names contain _orig_mod"):
        merge_adapter(tmp_path, tmp_path / "merged", base=llama())
    again = lora_ga.load(compiled(), tmp_path, is_trainable=True)
    again.save_pretrained(tmp_path / "again")  # what the message says to do
    assert torch.equal(logits(lora_ga.load(llama(), tmp_path / "again"), causal(1)[0]), logits(whole, causal(1)[0]))


# --- loading into an adapter that exists ----------------------------------------------------------------------------

PATTERNS: dict[str, Any] = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}


def state(model: Any) -> list[Tensor]:
    """All tensors of a model, the configuration of its adapter and what trains."""
    config = str(sorted(vars(model.peft_config["default"]).items(), key=str))
    return [*model.state_dict().values(), torch.tensor([*config.encode()])]


@pytest.mark.parametrize("make", [injected, adapted], ids=["injected", "PeftModel"])
@pytest.mark.parametrize("started", [False, True])
def test_training_continues_bit_for_bit_in_an_adapter_that_exists(tmp_path: Path, make: Any, started: bool) -> None:
    whole = trained(tmp_path, **PATTERNS).train()
    model = make(llama(), **PATTERNS).train()
    if started:  # as a script does that is started again without a change
        lora_ga.initialize(model, causal(2))
    held = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert lora_ga.load(model, tmp_path, is_trainable=True) is model
    assert all(
        one is other for one, other in zip(held, (p for p in model.parameters() if p.requires_grad), strict=True)
    )
    assert train(model, causal()) == train(whole, causal())
    assert torch.equal(logits(model, causal(1)[0]), logits(whole, causal(1)[0]))


def test_a_file_without_a_sidecar_fills_the_structure_up_to_rounding(tmp_path: Path) -> None:
    model = trained(tmp_path, **PATTERNS)
    (tmp_path / FILE).unlink()
    again = lora_ga.load(injected(llama(), **PATTERNS), tmp_path / "adapter_model.safetensors", is_trainable=True)
    torch.testing.assert_close(logits(again, causal(1)[0]), logits(model, causal(1)[0]), rtol=0, atol=1e-6)
    assert all(p.shape[0] == 4 or p.shape[1] == 4 for p in again.parameters() if p.requires_grad and 2 not in p.shape)
    (tmp_path / "adapter_config.json").unlink()  # then nothing says by what B A is multiplied
    alone = lora_ga.load(injected(llama(), **PATTERNS), tmp_path)
    assert torch.equal(logits(alone, causal(1)[0]), logits(again, causal(1)[0]))


def test_the_scaling_in_the_header_of_a_pipelines_file_is_checked(tmp_path: Path) -> None:
    model = trained(tmp_path, targets=["q_proj"], use_rslora=False)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for alpha in (16, 32):
        settings = {"peft_type": "LORA", "r": 8, "lora_alpha": alpha, "target_modules": ["q_proj"]}
        header = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
        save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", header)
        again = injected(llama(), ["q_proj"], use_rslora=False)
        refused = pytest.raises(ValueError, match="multiplies B A of .* by 4, this adapter by 2")
        with contextlib.nullcontext() if alpha == 16 else refused:
            lora_ga.load(again, tmp_path / "pytorch_lora_weights.safetensors")
            torch.testing.assert_close(logits(again, causal(1)[0]), logits(model, causal(1)[0]), rtol=0, atol=1e-6)


def test_an_adapter_of_rank_2r_may_be_filled_as_plain_lora(tmp_path: Path) -> None:
    model = trained(tmp_path, targets=["q_proj"], use_rslora=False)
    wide = lora_ga.load(injected(llama(), ["q_proj"], r=8, lora_alpha=16, use_rslora=False), tmp_path)
    assert torch.equal(logits(wide, causal(1)[0]), logits(model, causal(1)[0]))
    assert not any(parameter.requires_grad for name, parameter in wide.named_parameters() if "lora_" in name)
    with pytest.raises(ValueError, match=r"2 train at half their rank, and in this adapter 0; .*is_trainable=False"):
        lora_ga.load(wide, tmp_path, is_trainable=True)
    (tmp_path / FILE).unlink()
    with pytest.warns(UserWarning, match="it trains on as plain LoRA, every row"):
        lora_ga.load(wide, tmp_path, is_trainable=True)


def trains(model: Any, adapter: str = "default") -> list[bool]:
    """What trains of an adapter: A and B, whole modules, trained tokens."""
    return [parameter.requires_grad for name, parameter in model.named_parameters() if f".{adapter}" in name]


WHOLE: dict[str, Any] = {"targets": ["q_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": [3]}


@pytest.mark.parametrize("active", ["default", "second"])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_filling_one_adapter_freezes_or_trains_that_one_alone(tmp_path: Path, active: str, is_trainable: bool) -> None:
    adapted(llama(), **WHOLE).save_pretrained(tmp_path)
    model = adapted(llama(), **WHOLE)
    model.add_adapter("second", lora_settings(**WHOLE))
    model.set_adapter(active)
    before = trains(model)
    plain = pytest.warns(UserWarning, match="trains on as plain LoRA")
    with plain if is_trainable else contextlib.nullcontext():
        lora_ga.load(model, tmp_path, adapter_name="second", is_trainable=is_trainable)
    assert set(before) == {active == "default"}
    assert trains(model) == before
    assert len(trains(model, "second")) == len(before)
    assert set(trains(model, "second")) == {is_trainable}


@pytest.mark.parametrize("make", [injected, adapted], ids=["injected", "PeftModel"])
def test_an_adapter_loaded_for_use_trains_after_it_is_loaded_to_train(tmp_path: Path, make: Any) -> None:
    whole = trained(tmp_path).train()
    model = make(llama()).train()
    assert not any(trains(lora_ga.load(model, tmp_path)))
    assert all(trains(lora_ga.load(model, tmp_path, is_trainable=True)))
    assert train(model, causal()) == train(whole, causal())


def test_the_optimizer_state_of_a_lora_ga_run_is_refused_before_an_adapter_is_filled(tmp_path: Path) -> None:
    whole = trained(tmp_path, targets=["q_proj"], use_rslora=False)
    (tmp_path / FILE).unlink()
    optimizer = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad])
    whole(**causal(1)[0]).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    model = adapted(llama(), ["q_proj"], r=8, lora_alpha=16, use_rslora=False)
    before = [value.clone() for value in state(model)]
    with pytest.raises(ValueError, match=r"remove optimizer\.pt to train as plain LoRA"):
        lora_ga.load(model, tmp_path, is_trainable=True)
    assert all(torch.equal(one, other) for one, other in zip(before, state(model), strict=True))
    (tmp_path / "optimizer.pt").unlink()  # as the message says
    with pytest.warns(UserWarning, match="trains on as plain LoRA"):
        lora_ga.load(model, tmp_path, is_trainable=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda classes: bert(num_labels=classes), "classifier.bias is 5 in this adapter, and 3 in the model. Give"),
        (
            lambda tokens: llama(vocab_size=tokens),
            r"lm_head has 5 tokens in this adapter, and 3 in the model. Call res",
        ),
    ],
    ids=["classes", "tokens"],
)
def test_whole_modules_of_another_size_are_refused_before_an_adapter_is_filled(
    tmp_path: Path, make: Any, message: str
) -> None:
    settings = {"targets": ["query", "q_proj"], "modules_to_save": ["classifier", "lm_head"]}
    adapted(make(5), **settings).save_pretrained(tmp_path)
    model = adapted(make(3), **settings)
    before = [value.clone() for value in state(model)]
    with pytest.raises(ValueError, match=message):
        lora_ga.load(model, tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(before, state(model), strict=True))


@pytest.mark.parametrize(
    ("lora", "text"),
    [
        (
            {"r": 16},
            r"A of .*q_proj is 8 x 32; into this adapter of rank 16 goes 32 x 32 \(twice its rank.*of the run",
        ),
        ({"r": 2, "lora_alpha": 4}, "into this adapter of rank 2 goes 4 x 32"),
        ({"targets": ["q_proj", "v_proj"]}, "with other layers: 2 are in only one of the two, as .*v_proj. Give"),
        ({"targets": ["up_proj"]}, "holds the layer model.layers.0.mlp.up_proj of this model not at all"),
        ({"lora_alpha": 16}, "multiplies B A of .*q_proj by 4, this adapter by 8. Give the adapter the lora_alpha"),
        ({"layers": 1}, "with other layers"),
        ({"width": 64}, "A of .* is 8 x 32; into this adapter of rank 4 goes 8 x 64"),
        ({"sizes": {"intermediate_size": 96}}, "trained on another base model"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
@pytest.mark.parametrize("started", [False, True])
def test_a_file_that_does_not_fit_the_adapter_leaves_both_as_they_were(
    tmp_path: Path, lora: dict[str, Any], text: str, started: bool
) -> None:
    trained(tmp_path, targets=["q_proj"])
    lora = dict(lora)
    changes = lora.pop("sizes", {}) | {"hidden_size": lora.pop("width", 32), "num_hidden_layers": lora.pop("layers", 2)}
    model = injected(llama(**changes), lora.pop("targets", ["q_proj"]), **lora)
    if started:
        lora_ga.initialize(model, causal())
    before, files = [value.clone() for value in state(model)], (tmp_path / FILE).read_bytes()
    with pytest.raises(ValueError, match=text):
        lora_ga.load(model, tmp_path, is_trainable=True)
    assert all(torch.equal(one, other) for one, other in zip(before, state(model), strict=True))
    assert (tmp_path / FILE).read_bytes() == files


@pytest.mark.parametrize("make", [injected, adapted], ids=["injected", "PeftModel"])
@pytest.mark.parametrize(
    ("saved", "own", "text"),
    [
        ({"use_dora": True}, {}, "holds .*query.lora_magnitude_vector, which this adapter has not. Give the adapter"),
        ({}, {"use_dora": True}, "does not hold .*query.lora_magnitude_vector"),
        ({"lora_bias": True}, {}, "holds .*query.lora_B.bias, which"),
        ({"modules_to_save": ["classifier"]}, {}, "holds classifier.bias, which"),
        ({}, {"bias": "all"}, "does not hold .*bias"),
    ],
    ids=str,
)
def test_parts_that_a_file_or_an_adapter_has_alone_are_refused(
    tmp_path: Path, make: Any, saved: dict[str, Any], own: dict[str, Any], text: str
) -> None:
    adapted(bert(), ["query"], **saved).save_pretrained(tmp_path)
    model = make(bert(), ["query"], **own)
    before = [value.clone() for value in state(model)]
    with pytest.raises(ValueError, match=text):
        lora_ga.load(model, tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(before, state(model), strict=True))
    lora_ga.load(adapted(bert(), ["query"], **saved), tmp_path)  # as the message says


def test_an_embeddings_base_weight_in_the_file_is_no_part_of_its_own(tmp_path: Path) -> None:
    model = adapted(llama(), ["embed_tokens", "q_proj"])
    lora_ga.initialize(model, causal())
    train(model, causal())
    model.save_pretrained(tmp_path)
    assert any("lora" not in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    again = lora_ga.load(injected(llama(), ["embed_tokens", "q_proj"]), tmp_path, is_trainable=True)
    assert torch.equal(logits(again, causal(1)[0]), logits(model, causal(1)[0]))


def test_two_adapters_of_one_name_are_refused() -> None:
    """One was injected, and then a `PeftModel` made: the configuration of the second has replaced that of the first."""
    model = adapted(injected(llama(), ["q_proj"]), ["v_proj"])
    before = [value.clone() for value in state(model)]
    for call in (lambda: lora_ga.initialize(model, causal()), lambda: lora_ga.load(model, "nowhere")):
        with pytest.raises(
            ValueError, match="q_proj is not among the target_modules of the PeftModel's adapter: an ad"
        ):
            call()
    assert all(torch.equal(one, other) for one, other in zip(before, state(model), strict=True))
    torch.manual_seed(7)
    second = get_peft_model(injected(llama(), ["q_proj"]), lora_settings(["v_proj"]), adapter_name="second")
    assert len(lora_ga.initialize(second, causal(), adapter_name="second")) == 2
    both = nn.ModuleList([injected(llama(), ["q_proj"]), adapted(llama(), ["q_proj"])])
    with pytest.raises(ValueError, match=r"The ModuleList contains 2 models with adapters \(0, 1\). Give one of them"):
        lora_ga.load(both, "nowhere")


def test_what_is_no_model_is_refused_before_the_file_is_read() -> None:
    pipeline: Any = SimpleNamespace(unet=injected(llama(), ["q_proj"]))
    with pytest.raises(
        TypeError, match="A SimpleNamespace is no model. Of a pipeline give the unet or the transformer"
    ):
        lora_ga.load(pipeline, "nowhere")
    with pytest.raises(TypeError, match="The SimpleNamespace has no LoRA layers. Give the module that has the adapter"):
        lora_ga.initialize(pipeline, causal())


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("adapter_config.json", "{", "adapter_config.json: damaged"),
        ("adapter_config.json", '{"peft_type": "LOHA"}', ": an adapter of type LOHA; into this LoRA adapter goes LoRA"),
        (FILE, '"schema":"2"', ": written in format 9, this version of LoRA-GA reads the formats 1 and 2"),
    ],
    ids=["damaged", "another kind", "another version"],
)
def test_a_configuration_or_sidecar_of_another_kind_is_refused(
    tmp_path: Path, file: str, text: str, message: str
) -> None:
    trained(tmp_path, targets=["q_proj"])
    path, model = tmp_path / file, injected(llama(), ["q_proj"])
    path.write_bytes(path.read_bytes().replace(text.encode(), b'"schema":"9"') if file == FILE else text.encode())
    before, held = [value.clone() for value in state(model)], path.read_bytes()
    for trainable in (True, False):
        with pytest.raises(ValueError, match=rf"^\S+{message}"):  # named once, by its own file
            lora_ga.load(model, tmp_path, is_trainable=trainable)
    assert all(torch.equal(one, other) for one, other in zip(before, state(model), strict=True))
    assert path.read_bytes() == held


def test_unreadable_files_for_an_adapter_that_exists_are_refused(tmp_path: Path) -> None:
    model = injected(llama(), ["q_proj"])
    with pytest.raises(FileNotFoundError, match="neither a file nor a local folder with adapter_model.safetensors or"):
        lora_ga.load(model, tmp_path)
    trained(tmp_path / "one", targets=["q_proj"])
    trained(tmp_path / "two", targets=["q_proj"], data=lambda: causal(1))
    (tmp_path / "one" / FILE).write_bytes((tmp_path / "two" / FILE).read_bytes())
    with pytest.raises(ValueError, match="beside it does not belong to it: . of .*q_proj has another start"):
        lora_ga.load(model, tmp_path / "one", is_trainable=True)
    trained(tmp_path / "base", targets=["q_proj"], offset="base")
    with pytest.raises(ValueError, match='trained with offset="base", for which the base has to change'):
        lora_ga.load(model, tmp_path / "base", is_trainable=True)
    (tmp_path / "two" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged, or not a safetensors file"):
        lora_ga.load(model, tmp_path / "two")
