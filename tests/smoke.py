"""Twenty-five situations, each small, that must work with every supported version of the libraries.

`benchmarks/versions.py` runs this file in environments with old and new versions. It is no part of the usual run: other
tests make the same claims more thoroughly with one set of versions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import MixtralForCausalLM

import lora_ga
from cases import EXPERTS, LAYERS, MODELS, mixtral, nf4, seeded
from lora_ga import LoraGAConfig
from lora_ga.adapter.save import FILE
from lora_ga.cli.main import main
from toys import FAMILIES, adapted, causal, llama, logits, reactive_llama, saved, train
from trainers import callback, sft, transformers_trainer

pytestmark = pytest.mark.filterwarnings("ignore")
VIT = MODELS["ViT (vision)"]


@dataclasses.dataclass
class Situation:
    """A model, its batches, the settings of its adapter and those of LoRA-GA."""

    make: Callable[[], Any] = llama
    batches: Callable[[], list[Any]] = causal
    lora: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: LoraGAConfig = dataclasses.field(default_factory=LoraGAConfig)
    lr: float = 1e-2


def experts() -> dict[str, Any]:
    """The targets of Mixtral's experts: fused since Transformers 5, linear layers before."""
    fused = any("gate_up_proj" in name for name, _ in MixtralForCausalLM(seeded(mixtral)().config).named_parameters())
    return dict(EXPERTS) if fused else {"targets": ["q_proj", "w1", "w2", "w3"]}


CYCLES = {
    "Llama": Situation(),
    "T5": Situation(FAMILIES["t5"][0], FAMILIES["t5"][1]),
    "GPT-2, Conv1D": Situation(FAMILIES["gpt2"][0], lora={"targets": FAMILIES["gpt2"][2], "fan_in_fan_out": True}),
    "ViT": Situation(VIT.make, VIT.batches, config=LoraGAConfig(on_missing="lora")),
    "convolution": Situation(VIT.make, VIT.batches, {"targets": ["projection"]}),
    "embedding": Situation(lora={"targets": ["embed_tokens", "q_proj"]}),
    "DoRA": Situation(lora={"use_dora": True}),
    "patterns and a layer trained in full": Situation(
        lora={"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 4}, "modules_to_save": ["lm_head"]}
    ),
    "experts": Situation(seeded(mixtral), lora=experts(), config=LoraGAConfig(on_missing="lora")),
    "start in the base weight": Situation(config=LoraGAConfig(offset="base")),
    "the paper's gamma": Situation(config=LoraGAConfig(stable_gamma=16), lr=1e-3),
    "probe": Situation(config=LoraGAConfig(estimator="probe")),
}


def assert_close(found: nn.Module, trained: torch.Tensor, batch: Any) -> None:
    tolerance = 1e-4 * max(1, float(trained.abs().max()))
    torch.testing.assert_close(logits(found.eval(), batch), trained, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CYCLES)
def test_an_adapter_starts_exactly_trains_and_loads(name: str, tmp_path: Path) -> None:
    case = CYCLES[name]
    batches = case.batches()
    lora = dict(case.lora)
    model = adapted(case.make(), lora.pop("target_modules", lora.pop("targets", "all-linear")), **lora).eval()
    before = logits(model, batches[0])
    lora_ga.initialize(model, batches, case.config)
    tolerance = 1e-5 if case.config.offset == "base" else 0
    torch.testing.assert_close(logits(model, batches[0]), before, rtol=0, atol=tolerance)
    train(model, batches, lr=case.lr)
    trained = logits(model, batches[0])
    assert (trained - before).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    assert (tmp_path / FILE).exists()
    assert_close(PeftModel.from_pretrained(case.make(), tmp_path), trained, batches[0])
    assert_close(lora_ga.load(case.make(), tmp_path, is_trainable=True), trained, batches[0])


def test_every_public_name_can_be_imported() -> None:
    assert all(callable(getattr(lora_ga, name)) for name in lora_ga.__all__)


def test_a_learning_rate_is_found_and_the_model_stays() -> None:
    model = adapted(reactive_llama())
    lora_ga.initialize(model, causal())
    before = [each.clone() for each in model.state_dict().values()]
    assert 0 < lora_ga.find_rate(model, causal(4), steps=100) < 1
    assert all(map(torch.equal, before, model.state_dict().values()))


def test_the_start_is_exact_in_bfloat16() -> None:
    model, batch = adapted(llama().to(torch.bfloat16)).eval(), causal(1)[0]
    before = logits(model, batch)
    lora_ga.initialize(model, causal())
    assert torch.equal(logits(model, batch), before)


def test_gradient_checkpointing_stays_as_it_was() -> None:
    base = llama()
    base.gradient_checkpointing_enable()
    model = adapted(base).train()
    model.enable_input_require_grads()
    estimate = lora_ga.initialize(model, causal())
    assert all(part.norm > 0 for _, part in estimate.items())
    assert model.training
    assert base.is_gradient_checkpointing


def test_the_merged_model_computes_the_same(tmp_path: Path) -> None:
    model, batch = saved(tmp_path), causal(1)[0]
    assert_close(model.merge_and_unload(), logits(model, batch), batch)


def test_the_adapter_can_be_disabled_and_gets_a_second_beside_it() -> None:
    model, batch = adapted(llama()), causal(1)[0]
    lora_ga.initialize(model, causal())
    train(model, causal())
    trained = logits(model, batch)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(llama(), batch))
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), trained)


def test_get_lora_ga_model_gives_the_start_of_initialize() -> None:
    model = adapted(llama())
    lora_ga.initialize(model, causal())
    torch.manual_seed(7)
    other = lora_ga.get_lora_ga_model(llama(), adapted(llama()).peft_config["default"], causal())
    assert starts(model)
    assert all(torch.equal(one, two) for one, two in zip(starts(model), starts(other), strict=True))


def starts(model: nn.Module) -> list[Any]:
    return [module.start for module in model.modules() if hasattr(module, "start")]


def test_a_saved_adapter_can_be_compressed(tmp_path: Path) -> None:
    saved(tmp_path)
    lora_ga.compress_adapter(tmp_path, tmp_path / "small", rank=4)
    stock = PeftModel.from_pretrained(llama(), tmp_path / "small")
    assert stock.peft_config["default"].r == 4
    assert not torch.equal(logits(stock, causal(1)[0]), logits(llama(), causal(1)[0]))


def test_the_trainer_resumes_exactly(tmp_path: Path) -> None:
    whole = transformers_trainer([callback()], tmp_path)
    whole.train()
    stock = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-8")
    assert_close(stock, logits(whole.model.eval(), causal(1)[0]), causal(1)[0])
    resumed = transformers_trainer([callback()], tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_trls_trainer_starts_the_adapter_and_saves_it(tmp_path: Path) -> None:
    lora_ga_callback = callback()
    trainer = sft([lora_ga_callback], tmp_path, max_steps=2)
    trainer.train()
    assert lora_ga_callback.estimate is not None
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / FILE).exists()


def test_a_4_bit_base_starts_exactly_trains_and_loads(tmp_path: Path) -> None:
    LAYERS["bitsandbytes nf4"].check_installed()
    model, batch = adapted(nf4()).eval(), causal(1)[0]
    before = logits(model, batch)
    lora_ga.initialize(model, causal())
    assert torch.equal(logits(model, batch), before)
    train(model, causal())
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(nf4(), tmp_path).eval()
    torch.testing.assert_close(logits(stock, batch), logits(model, batch), rtol=0, atol=1e-3)


def test_the_flow_of_pefts_lora_ga_starts_exactly() -> None:
    from lora_ga.compat import LoraConfig, LoraGAConfig, get_peft_model, preprocess_loraga

    base = llama()
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(base, config, lambda: [base(**batch).loss.backward() for batch in causal()])
    model = get_peft_model(base, config)
    assert starts(model)
    assert torch.equal(logits(model, causal(1)[0]), logits(llama(), causal(1)[0]))


def test_the_command_line_explains_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    assert "--train_file" in capsys.readouterr().out


def test_the_import_path_of_ms_swift_exists() -> None:
    assert callable(lora_ga.entrypoint.get_lora_ga_model)
