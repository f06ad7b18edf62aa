"""Models split by a tensor-parallel plan of Transformers: two processes find, train and save the same as one."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import lora_ga
import processes
import workers
from lora_ga.distributed import tensor_parallel
from lora_ga.distributed.tensor_parallel import Split, unfit
from lora_ga.linalg.accumulator import UnitRows
from toys import adapted, causal, llama, logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return processes.run(workers.parallel, 2, folder)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The results of one process without a plan, on the same batches."""
    batches = causal(4)
    found: dict[str, Any] = {}
    for name, config in (("dense", workers.EXACT), ("streaming", lora_ga.LoraGAConfig())):
        found[name] = workers.numbers(lora_ga.estimate_gradients(adapted(llama()), batches, config))
    model = adapted(llama())
    lora_ga.initialize(model, batches, workers.EXACT)
    return found | {"curve": workers.curve(model, batches, 0, 1), "trained": logits(model, batches[0])}


def gradient(layer: tuple[Tensor, ...]) -> Tensor:
    return (layer[0] * layer[1]) @ layer[2].mT


@pytest.mark.parametrize("dim", [0, 1])
def test_the_zero_padded_blocks_of_a_gradient_add_up_to_it(dim: int) -> None:
    """Three processes share 5 outputs or inputs; the last has fewer."""
    draws = torch.Generator().manual_seed(0)
    x, g = torch.randn(7, 5, generator=draws), torch.randn(7, 5, generator=draws)
    total = torch.zeros(5, 5)
    for begin, count in ((0, 2), (2, 2), (4, 1)):
        split, cut = Split((5, 5), dim, begin, count), slice(begin, begin + count)
        block = split.padded(*((x, g[:, cut]) if dim == 0 else (x[:, cut], g)))
        assert isinstance(block[0], Tensor)
        total += block[1].mT @ block[0]
        if dim == 1:  # the same for inputs that are unit vectors
            units, _ = split.padded(UnitRows(torch.arange(count), count), g)
            assert isinstance(units, UnitRows)
            assert (units.width, units.places.tolist()) == (5, list(range(begin, begin + count)))
    torch.testing.assert_close(total, g.mT @ x)


@pytest.mark.parametrize(
    ("kind", "plan", "fits"),
    [
        (nn.Linear, None, True),
        (nn.Linear, "replicate", True),
        (nn.Linear, "colwise", False),  # the weight is not a DTensor, so its part is unknown
        (NonDynamicallyQuantizableLinear, "rowwise", False),
        (nn.Linear, "sequence_parallel", False),
    ],
)
def test_a_layer_that_is_split_in_an_unknown_way_is_refused(
    kind: type[nn.Linear], plan: str | None, fits: bool
) -> None:
    base: Any = kind(4, 4)
    base._hf_tp_plan = plan
    reason = unfit("model.q_proj", base, fsdp=False)
    if fits:
        assert reason is None
    else:
        assert reason is not None
        assert f"model.q_proj is a {kind.__name__} that a tensor-parallel plan splits as {plan!r}; known are" in reason
        assert "exclude_modules=['q_proj']" in reason


def test_a_plan_of_a_transformers_without_styles_of_plans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base: Any = nn.Linear(4, 4)
    base._hf_tp_plan = "colwise"
    monkeypatch.setattr(tensor_parallel, "_planned", lambda parameter, fsdp: True)
    assert unfit("model.q_proj", base, fsdp=False) is None
    monkeypatch.setattr(tensor_parallel, "STYLES", "transformers.without_styles")
    assert "by Transformers 5.16 or newer" in str(unfit("model.q_proj", base, fsdp=False))


def test_the_processes_find_the_gradient_of_the_unsplit_model(
    found: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    assert found[0]["dense"]["layers"].keys() == alone["dense"]["layers"].keys()
    for name, exact in alone["dense"]["layers"].items():
        dense, streamed = (result[name] for result in (found[0]["dense"]["layers"], found[0]["streaming"]["layers"]))
        torch.testing.assert_close(gradient(dense), gradient(exact), rtol=1e-4, atol=1e-6)
        assert dense[3] == pytest.approx(exact[3], rel=1e-4)
        # Each process keeps as many directions of its block as one process keeps of the whole, so hardly more is lost.
        lost = (gradient(streamed) - gradient(exact)).norm() / exact[3]
        assert lost <= (gradient(alone["streaming"]["layers"][name]) - gradient(exact)).norm() / exact[3] + 0.01, name
        torch.testing.assert_close(streamed[4], exact[4], rtol=1e-4, atol=1e-6)  # the sketch


def test_layers_that_the_plan_leaves_whole_count_once(found: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for name, exact in alone["dense"]["layers"].items():
        torch.testing.assert_close(gradient(found[0]["in part"]["layers"][name]), gradient(exact), rtol=1e-4, atol=1e-6)


def test_batches_and_labels_are_counted_once(found: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    assert found[0]["dense"]["about"] == found[0]["in part"]["about"] == alone["dense"]["about"]
    assert found[0]["at most"]["about"][0] == 3


def test_both_processes_end_with_the_same_values_bit_for_bit(found: list[dict[str, Any]]) -> None:
    first, second = found
    for name in ("dense", "streaming", "at most", "in part"):
        assert first[name]["about"] == second[name]["about"]
        for key, layer in first[name]["layers"].items():
            for one, other in zip(layer, second[name]["layers"][key], strict=True):
                assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert all(torch.equal(*pair) for pair in zip(first["starts"], second["starts"], strict=True))


def test_no_process_sends_more_than_the_bound(found: list[dict[str, Any]]) -> None:
    layers = found[0]["streaming"]["layers"].values()
    bound = 2 * math.log2(2) * sum((u.shape[0] + v.shape[0]) * s.numel() * 4 for u, s, v, _, _ in layers)
    assert all(0 < result["bytes, streaming"] <= bound for result in found)


def test_the_start_keeps_the_outputs_and_training_follows_one_process(
    found: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for result in found:
        before, after = result["logits"]
        assert torch.equal(before, after)
        assert torch.equal(before, result["disabled"])
        assert result["curve"] == pytest.approx(alone["curve"], abs=1e-4)
    assert alone["curve"][0] - min(alone["curve"]) > 0.05  # it learns


def test_a_start_written_later_into_the_structure_is_the_same(found: list[dict[str, Any]]) -> None:
    """LoraGACallback starts an adapter like this."""
    for result in found:
        late, shown = result["late"]
        assert torch.equal(shown, result["logits"][0])
        assert all(torch.equal(one, other) for one, other in zip(late, result["starts"], strict=True))


def test_the_saved_adapter_is_plain_and_loads_on_the_original_base(
    found: list[dict[str, Any]], alone: dict[str, Any], folder: Path
) -> None:
    batch, trained = causal(1)[0], found[0]["trained"]
    torch.testing.assert_close(trained, alone["trained"], rtol=0, atol=1e-3)
    stock = PeftModel.from_pretrained(llama(), folder / "parallel")
    torch.testing.assert_close(logits(stock, batch), trained, rtol=0, atol=1e-5)
    again = lora_ga.load(llama(), folder / "parallel", is_trainable=True)
    torch.testing.assert_close(logits(again, batch), trained, rtol=0, atol=1e-5)
    assert torch.equal(found[0]["again"], trained)  # loaded to train, and split again


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("different", "Processes 0 and 1 of 2 were given different batches, but a tensor-parallel plan splits"),
        ("fewer", "Processes 0 and 1 of 2 were given different batches"),
        ("tolerance", "LoraGAConfig.tolerance is 0.01, but a tensor-parallel plan .* Use tolerance=None"),
        ("alone", "plan splits the model over 2 processes, but 1 work together here.*process_group="),
        ("head", "lm_head is a Linear that a tensor-parallel plan splits as 'colwise_gather_output'; known are"),
        ("base", 'q_proj: offset="base" cannot change a sharded weight; use offset="adapter"'),
    ],
)
def test_calls_that_a_plan_does_not_allow_are_refused_in_all_processes(
    found: list[dict[str, Any]], case: str, message: str
) -> None:
    for result in found:
        assert result[case].startswith("ValueError: ")
        assert re.search(message, result[case])
