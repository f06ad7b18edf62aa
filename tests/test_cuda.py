"""LoRA-GA on a CUDA device: the same start as on a CPU, the theorem, and files that a CPU reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import lora_ga
from lora_ga import LoraGAConfig
from lora_ga.layers.factors import Factor
from lora_ga.linalg import streaming, tensor_cores
from lora_ga.linalg.tensor_cores import exact_in_tf32
from test_initialize import sgd_alignment
from toys import FAMILIES, adapted, autograd_gradients, causal, llama, logits, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DENSE = LoraGAConfig(estimator="dense")


def to_cuda(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: tensor.cuda() for name, tensor in batch.items()} for batch in batches]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_equals_that_of_the_cpu(family: str) -> None:
    make, batches, targets = FAMILIES[family]
    on_cpu, on_cuda = adapted(make().double(), targets), adapted(make().double().cuda(), targets)
    lora_ga.initialize(on_cpu, batches(), DENSE)
    lora_ga.initialize(on_cuda, to_cuda(batches()), DENSE)
    pairs = [(m, on_cuda.get_submodule(path)) for path, m in on_cpu.named_modules() if isinstance(m, Factor)]
    assert len(pairs) > 0
    for one, other in pairs:
        assert other.start.is_cuda
        assert all(parameter.is_cuda for parameter in other.parameters())
        a, b = (start if start.shape[0] <= start.shape[1] else start.mT for start in (one.start, other.start.cpu()))
        # The signs of directions are free. The norm layers of these two families always compute in float32.
        noise = 1e-7 if family in {"llama", "t5"} else 1e-9
        torch.testing.assert_close(b.mT @ b, a.mT @ a, rtol=1e-6, atol=noise)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_tf32_find_the_directions_that_float32_finds(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = llama(hidden_size=256, intermediate_size=512).to(dtype).cuda()
    batches = to_cuda(causal(4, rows=8, length=24))
    exact = lora_ga.estimate_gradients(
        adapted(copy.deepcopy(base)), batches, LoraGAConfig(estimator="dense", oversample=500)
    )
    found = []
    monkeypatch.setattr(tensor_cores, "LARGE", 0)
    for way in (exact_in_tf32, lambda g: False):
        monkeypatch.setattr(streaming, "exact_in_tf32", way)
        estimate = lora_ga.estimate_gradients(adapted(copy.deepcopy(base)), batches)
        found.append(
            {
                name: float(((part.U.mT @ exact[name].U) * exact[name].S @ (exact[name].V.mT @ part.V)).norm())
                for name, part in estimate.items()
            }
        )
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0] != found[1]  # TF32 was really used


@pytest.mark.parametrize("estimator", ["dense", "streaming"])
def test_the_first_sgd_step_follows_the_best_rank_2r_gradient(estimator: str) -> None:
    base, batch = llama(hidden_size=64, intermediate_size=96).double().cuda(), to_cuda(causal(1, rows=8, length=24))[0]
    gradients = autograd_gradients(copy.deepcopy(base), lambda model: model(**batch).loss)
    model = adapted(base)
    lora_ga.initialize(model, [batch], LoraGAConfig(estimator=estimator, oversample=32))
    assert min(sgd_alignment(model, gradients, batch, rank=4).values()) >= 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initialisation_keeps_the_function_and_the_loss_falls(dtype: torch.dtype) -> None:
    model, batches = adapted(llama().to(dtype).cuda()), to_cuda(causal())
    before = logits(model, batches[0])
    lora_ga.initialize(model, batches)
    assert torch.equal(logits(model, batches[0]), before)
    losses = train(model, batches[:1])
    assert losses[-1] < losses[0]


def test_stock_peft_on_a_cpu_loads_what_was_saved_on_cuda(tmp_path: Path) -> None:
    model, batches = adapted(llama().cuda()), to_cuda(causal())
    lora_ga.initialize(model, batches)
    train(model, batches)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    expected = logits(model.eval(), batches[0]).cpu()
    assert not torch.allclose(expected, logits(llama(), causal()[0]), atol=1e-3)
    torch.testing.assert_close(logits(again, causal()[0]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bfloat16"])
def test_the_callback_works_in_a_trainer(precision: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the trainers need the package datasets, the other tests do not")
    from trainers import TARGETS, callback, transformers_trainer

    lora_callback = callback()
    trainer = transformers_trainer([lora_callback], tmp_path / "run", use_cpu=False, **precision)
    trainer.train()
    assert lora_callback.estimate is not None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert next(trainer.model.parameters()).is_cuda
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    plain = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()  # without autocast
    expected = logits(plain, to_cuda(causal())[0]).cpu()
    torch.testing.assert_close(logits(again, causal()[0]), expected, rtol=1e-4, atol=1e-4)
    assert set(again.peft_config["default"].target_modules) == set(TARGETS)
