"""Ranks and scalings of single layers, by PEFT's patterns: whatever is saved and loaded keeps them."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import lora_ga
from cases import EXPERTS, Convolutions, Twisted, pictures, qwen_moe, seeded
from lora_ga import LoraGAConfig
from lora_ga.adapter.save import FILE
from lora_ga.config import CHOICES
from lora_ga.export.merge import merge_adapter
from lora_ga.export.readers import check_reader
from lora_ga.layers.targets import layer_name
from lora_ga.version import is_before
from toys import FAMILIES, FUSED_EXPERTS, adapted, causal, gpt2, llama, logits, train

GATE, DOWN = "experts.gate_up_proj", "experts.down_proj"
CONVOLUTIONS = ["wide", "point", "even", "head"]
# What the patterns are on → the base model, its batches, and the settings of the adapter.
CASES: dict[str, tuple[Callable[[], Any], Any, dict[str, Any]]] = {
    "PEFT's own, of fused experts": (seeded(qwen_moe), causal, {"target_modules": "all-linear", "r": 2}),
    "rank of one parameter": (seeded(qwen_moe), causal, EXPERTS | {"rank_pattern": {GATE: 2}}),
    "rank of the other": (seeded(qwen_moe), causal, EXPERTS | {"rank_pattern": {DOWN: 2}}),
    "alpha of a parameter": (seeded(qwen_moe), causal, EXPERTS | {"alpha_pattern": {GATE: 3}}),
    "both, of both": (
        seeded(qwen_moe),
        causal,
        EXPERTS | {"rank_pattern": {GATE: 2, DOWN: 3, "q_proj": 5}, "alpha_pattern": {GATE: 3, DOWN: 7}},
    ),
    "Conv1D": (
        gpt2,
        causal,
        {
            "target_modules": FAMILIES["gpt2"][2],
            "fan_in_fan_out": True,
            "rank_pattern": {"c_attn": 2},
            "alpha_pattern": {r"h\.1\.mlp\.c_fc": 5},
        },
    ),
    "embedding": (
        seeded(Twisted),
        causal,
        {"target_modules": ["embed", "first", "head"], "rank_pattern": {"embed": 2}, "alpha_pattern": {"head": 5}},
    ),
    "convolution": (
        seeded(Convolutions),
        pictures,
        {"target_modules": CONVOLUTIONS, "rank_pattern": {"wide": 2}, "alpha_pattern": {"point": 5}},
    ),
}
EXPERT_CASES = [
    name for name, (_, _, settings) in CASES.items() if "target_parameters" in settings or "experts" in name
]
# PEFT 0.18 knows no fused targets, and allows one adapter on parameters; 0.19 does not work with new Transformers.
NEW_PEFT = pytest.mark.skipif(is_before("peft", "0.21"), reason="PEFT makes patterns for fused experts well since 0.21")
EXPERTS_MARKED = [
    pytest.param(name, marks=[FUSED_EXPERTS, *[NEW_PEFT] * ("own" in name)]) if name in EXPERT_CASES else name
    for name in CASES
]
every_case = pytest.mark.parametrize("case", EXPERTS_MARKED)


def scalings(model: nn.Module) -> dict[str, float]:
    """The scaling of every LoRA layer."""
    return {
        layer_name(name): layer.scaling["default"]
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def saved(case: str, folder: Path, *, use_rslora: bool = True, **config: Any) -> Any:
    """Align, train and save an adapter of a case; the model, in evaluation mode."""
    make, data, settings = CASES[case]
    model = get_peft_model(make(), LoraConfig(**{"r": 4, "lora_alpha": 16, "use_rslora": use_rslora} | settings))
    lora_ga.initialize(model, data(), LoraGAConfig(**config))
    train(model, data())
    model.save_pretrained(folder)
    assert len({round(s, 6) for s in scalings(model).values()}) > 1 or not use_rslora
    return model.eval()


@pytest.mark.parametrize(("use_rslora", "offset"), [(True, "adapter"), (True, "base"), (False, "adapter")])
@every_case
def test_every_way_of_loading_keeps_the_scalings_and_the_function(
    tmp_path: Path, case: str, use_rslora: bool, offset: str
) -> None:
    make, data, _ = CASES[case]
    model, batch = saved(case, tmp_path, use_rslora=use_rslora, offset=offset), data()[0]
    expected = logits(model, batch)
    ways = {
        "PEFT": PeftModel.from_pretrained(make(), tmp_path),
        "to use": lora_ga.load(make(), tmp_path),
        "to train": lora_ga.load(make(), tmp_path, is_trainable=True),
    }
    if case not in EXPERT_CASES or not is_before("peft", "0.21"):
        ways["beside another"] = second = PeftModel.from_pretrained(make(), tmp_path, adapter_name="second")
        second.load_adapter(tmp_path, "default")
        second.set_adapter("default")
    again = ways["to train"]
    again.save_pretrained(tmp_path / "again")
    ways["saved again"] = PeftModel.from_pretrained(make(), tmp_path / "again")
    for way, loaded in ways.items():
        assert scalings(loaded) == pytest.approx(scalings(model), rel=1e-12), way
        torch.testing.assert_close(logits(loaded.eval(), batch), expected, rtol=0, atol=1e-5, msg=way)
    merged = ways["PEFT"].merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, logits(make().eval(), batch), atol=1e-3)


@every_case
def test_an_adapter_that_exists_takes_the_saved_values(tmp_path: Path, case: str) -> None:
    make, data, settings = CASES[case]
    model = saved(case, tmp_path)
    fresh = get_peft_model(make(), LoraConfig(**{"r": 4, "lora_alpha": 16, "use_rslora": True} | settings))
    lora_ga.load(fresh, tmp_path, is_trainable=True)
    assert torch.equal(logits(fresh.eval(), data()[0]), logits(model, data()[0]))


@FUSED_EXPERTS
@pytest.mark.parametrize("case", EXPERTS_MARKED[: len(EXPERT_CASES)])
def test_a_merged_model_has_the_whole_change_of_the_experts(tmp_path: Path, case: str) -> None:
    make, data, _ = CASES[case]
    model = saved(case, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=make())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged, data()[0]), logits(model, data()[0]), rtol=0, atol=1e-5)


@FUSED_EXPERTS
@pytest.mark.parametrize("offset", CHOICES["offset"])
def test_experts_beside_plain_layers_keep_their_ranks_and_scalings(tmp_path: Path, offset: str) -> None:
    def first_block(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(**batch, output_hidden_states=True).hidden_states[1].square().mean()

    make = seeded(qwen_moe)
    model = adapted(make(), ["q_proj"], target_parameters=EXPERTS["target_parameters"], rank_pattern={GATE: 2, DOWN: 3})
    with pytest.warns(UserWarning, match="They start as plain LoRA"):
        lora_ga.initialize(model, causal(), LoraGAConfig(on_missing="lora", offset=offset), loss_fn=first_block)
    train(model, causal())
    model.save_pretrained(tmp_path)
    for loaded in (PeftModel.from_pretrained(make(), tmp_path), lora_ga.load(make(), tmp_path, is_trainable=True)):
        assert scalings(loaded) == pytest.approx(scalings(model), rel=1e-12)
        torch.testing.assert_close(
            logits(loaded.eval(), causal()[0]), logits(model.eval(), causal()[0]), rtol=0, atol=1e-5
        )


def spoil(folder: Path) -> None:
    """Give the file the names in its alpha pattern that earlier versions wrote: of modules, not of parameters."""
    file = folder / "adapter_config.json"
    fields = json.loads(file.read_text())
    old = {r"\.gate_up_proj": r"\.base_layer", r"\.down_proj": ""}
    pattern = fields["alpha_pattern"]
    for end, module in old.items():
        pattern = {key.removesuffix(end) + module if key.endswith(end) else key: a for key, a in pattern.items()}
    assert pattern != fields["alpha_pattern"]
    file.write_text(json.dumps(fields | {"alpha_pattern": pattern}))


@FUSED_EXPERTS
@NEW_PEFT
@pytest.mark.parametrize("case", ["PEFT's own, of fused experts", "both, of both"])
def test_a_file_with_the_names_of_earlier_versions_is_loaded_with_the_trained_scalings(
    tmp_path: Path, case: str
) -> None:
    make, data, settings = CASES[case]
    model = saved(case, tmp_path / "old")
    batch, expected = data()[0], logits(model, data()[0])
    spoil(tmp_path / "old")
    assert not torch.allclose(logits(PeftModel.from_pretrained(make(), tmp_path / "old"), batch), expected, atol=1e-4)
    for is_trainable in (False, True):
        with pytest.warns(UserWarning, match="under a name that PEFT does not match.*Save it again"):
            loaded = lora_ga.load(make(), tmp_path / "old", is_trainable=is_trainable)
        assert scalings(loaded) == pytest.approx(scalings(model), rel=1e-12)
        loaded.save_pretrained(tmp_path / f"new{is_trainable}")
        again = PeftModel.from_pretrained(make(), tmp_path / f"new{is_trainable}")
        torch.testing.assert_close(logits(again, batch), expected, rtol=0, atol=1e-5)
    fresh = get_peft_model(make(), LoraConfig(**{"r": 4, "lora_alpha": 16, "use_rslora": True} | settings))
    with pytest.warns(UserWarning, match="under a name that PEFT does not match"):
        lora_ga.load(fresh, tmp_path / "old")
    torch.testing.assert_close(logits(fresh.eval(), batch), expected, rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match="under a name that PEFT does not match"):
        merge_adapter(tmp_path / "old", tmp_path / "merged", base=make())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("is_trainable", [True, False])
def test_a_compiled_base_gets_the_scalings_of_the_original_one(tmp_path: Path, is_trainable: bool) -> None:
    model = adapted(llama(), rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32})
    lora_ga.initialize(model, causal())
    train(model, causal())
    model.save_pretrained(tmp_path)
    compiled: Any = torch.compile(llama(), backend="eager")
    with torch.compiler.set_stance("force_eager"):
        loaded = lora_ga.load(compiled, tmp_path, is_trainable=is_trainable).eval()
        assert scalings(loaded) == pytest.approx(scalings(model), rel=1e-12)
        torch.testing.assert_close(logits(loaded, causal()[0]), logits(model.eval(), causal()[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("is_trainable", [True, False])
def test_an_adapter_that_would_be_scaled_otherwise_than_it_was_trained_is_refused(
    tmp_path: Path, is_trainable: bool
) -> None:
    make, _, _ = CASES["Conv1D"]
    saved("Conv1D", tmp_path)
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"alpha_pattern": {}}))
    base = make()
    with pytest.raises(ValueError, match=rf"h\.0\.attn\.c_attn would be scaled by 16, but was.* 11\.3137 .*{FILE}"):
        lora_ga.load(base, tmp_path, is_trainable=is_trainable)
    assert not any(isinstance(module, LoraLayer) for module in base.modules())
    with pytest.raises(ValueError, match="would be scaled by 16"):
        merge_adapter(tmp_path, tmp_path / "merged", base=make())
    (tmp_path / FILE).unlink()  # as the message says
    assert lora_ga.load(base, tmp_path) is not None


def test_the_scaling_of_a_layer_that_stayed_plain_lora_is_compared_too(tmp_path: Path) -> None:
    def first_block(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(**batch, output_hidden_states=True).hidden_states[1].square().mean()

    last = "model.layers.1.self_attn.q_proj"
    model = adapted(llama(), ["q_proj"], alpha_pattern={last: 4})
    with pytest.warns(UserWarning, match="They start as plain LoRA"):
        lora_ga.initialize(model, causal(), LoraGAConfig(on_missing="lora"), loss_fn=first_block)
    model.save_pretrained(tmp_path)
    trained = model.get_submodule(f"base_model.model.{last}").scaling["default"]
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    (key,) = (key for key in fields["alpha_pattern"] if last in key.replace("\\", ""))
    fields["alpha_pattern"][key] *= 2
    file.write_text(json.dumps(fields))
    with pytest.raises(
        ValueError, match=rf"{last} would be scaled by {2 * trained:g}, but was trained with {trained:g}"
    ):
        lora_ga.load(llama(), tmp_path)


@pytest.mark.parametrize("is_trainable", [True, False])
def test_a_file_in_which_peft_does_not_find_a_layer_is_refused_with_its_name(
    tmp_path: Path, is_trainable: bool
) -> None:
    """As of models whose layers PEFT renames on saving. PEFT itself only warns."""
    make, _, _ = CASES["Conv1D"]
    saved("Conv1D", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key.replace("h.0.mlp.c_fc.", "h.0.ffn.c_fc."): value for key, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    base = make()
    with pytest.raises(
        ValueError, match=r"PEFT did not find transformer\.h\.0\.mlp\.c_fc in the file.*_modules=\['0\.mlp\.c_fc'\]"
    ):
        lora_ga.load(base, tmp_path, is_trainable=is_trainable)
    assert not any(isinstance(module, LoraLayer) for module in base.modules())
    with pytest.raises(ValueError, match=r"PEFT did not find transformer\.h\.0\.mlp\.c_fc"):
        merge_adapter(tmp_path, tmp_path / "merged", base=base)
    assert not any(isinstance(module, LoraLayer) for module in base.modules())


def laguna() -> Any:
    """A small Laguna, whose shared experts PEFT does not find in a file."""
    config = transformers.LagunaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_attention_heads_per_layer=[4, 4],
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        pad_token_id=0,
    )
    return transformers.LagunaForCausalLM(config).eval()


@NEW_PEFT
@pytest.mark.skipif(not hasattr(transformers, "LagunaConfig"), reason="this version of Transformers has no Laguna")
@pytest.mark.filterwarnings("ignore:.*experts .or groups. got no gradient:UserWarning")
def test_layers_that_peft_will_not_find_are_named_before_they_train_with_the_line_that_leaves_them_out(
    tmp_path: Path,
) -> None:
    """See findings/peft_does_not_load_laguna_shared_experts.sh."""
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    with pytest.warns(UserWarning, match=r"PEFT will not find model\.layers\.1\.mlp\.shared_experts") as caught:
        lora_ga.initialize(adapted(seeded(laguna)(), targets), causal())
    (message,) = (str(each.message) for each in caught if "will not find" in str(each.message))
    (line,) = re.findall(r"LoraConfig\(exclude_modules=(\[.*?\])\)", message)
    model = adapted(seeded(laguna)(), targets, exclude_modules=ast.literal_eval(line))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="PEFT will not find")
        lora_ga.initialize(model, causal())
    train(model, causal())
    model.save_pretrained(tmp_path)
    loaded = lora_ga.load(seeded(laguna)(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, causal()[0]), logits(model.eval(), causal()[0]), rtol=0, atol=1e-5)


def test_another_warning_of_peft_that_the_program_makes_an_error_is_raised_as_it_is(tmp_path: Path) -> None:
    make, _, _ = CASES["Conv1D"]
    saved("Conv1D", tmp_path)
    refusing = mock.patch.object(PeftModel, "from_pretrained", side_effect=UserWarning("another"))
    with refusing, pytest.raises(UserWarning, match="^another$"):
        lora_ga.load(make(), tmp_path)


@FUSED_EXPERTS
def test_programs_that_refuse_fused_experts_name_no_wrong_scaling(tmp_path: Path) -> None:
    saved("both, of both", tmp_path)
    verdict = check_reader(tmp_path, "vllm")
    assert verdict.refused
    assert verdict.fixable == ()
    assert PeftConfig.from_pretrained(tmp_path).target_parameters
