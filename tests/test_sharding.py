"""Models in DistributedDataParallel and FSDP2 are aligned, trained, saved and loaded as in one process."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule

import lora_ga
import processes
import workers
from lora_ga.adapter import save as sidecar
from lora_ga.distributed.sharding import register_moved, reshard, unwrapped
from lora_ga.layers.factors import Delta
from toys import adapted, causal, llama, logits, train

WAYS = ["ddp, before", "ddp, after", "fsdp, before", "fsdp, after"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wrapped")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return processes.run(workers.all_of(["wrapped", "accelerated"]), 2, folder)


@pytest.fixture(scope="module")
def found(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [result["wrapped"] for result in results]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The results of one process on whole batches."""
    model, batches = adapted(llama()), causal(4)
    estimate = lora_ga.initialize(model, batches, workers.EXACT)
    return {"estimate": workers.numbers(estimate), "curve": workers.curve(model, batches, 0, 1)}


@pytest.mark.parametrize("way", WAYS)
def test_all_processes_get_the_same_start_and_it_keeps_the_outputs(found: list[dict[str, Any]], way: str) -> None:
    first, second = (result[way] for result in found)
    assert len(first["starts"]) == 28
    assert all(torch.equal(*pair) for pair in zip(first["starts"], second["starts"], strict=True))
    base = logits(llama(), causal(1)[0])
    assert torch.equal(first["logits"], base)
    assert torch.equal(second["logits"], base)


@pytest.mark.parametrize("way", WAYS)
def test_training_follows_the_curve_of_one_process(
    found: list[dict[str, Any]], alone: dict[str, Any], way: str
) -> None:
    assert alone["curve"][0] - min(alone["curve"]) > 0.05  # it learns
    for name, each in alone["estimate"]["layers"].items():
        torch.testing.assert_close(found[0][way]["estimate"]["layers"][name][1], each[1], rtol=1e-4, atol=1e-7)
    for result in found:
        assert result[way]["curve"] == pytest.approx(alone["curve"], abs=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_the_saved_adapter_is_plain_and_loads_on_the_original_base(
    found: list[dict[str, Any]], folder: Path, way: str
) -> None:
    batch, trained = causal(1)[0], found[0][way]["trained"]
    assert (trained - logits(llama(), batch)).abs().max() > 1e-3
    assert (folder / way / sidecar.FILE).exists()
    stock = PeftModel.from_pretrained(llama(), folder / way)
    torch.testing.assert_close(logits(stock, batch), trained, rtol=0, atol=1e-5)
    again = lora_ga.load(llama(), folder / way, is_trainable=True)
    torch.testing.assert_close(logits(again, batch), trained, rtol=0, atol=1e-5)


def test_the_state_dict_functions_of_torch_load_the_adapter_and_its_start(tmp_path: Path) -> None:
    found = processes.run(workers.state_dicts, 2, tmp_path)
    assert len(found[0]) == 40
    for result in found:
        for way, (before, trained, loaded) in result.items():
            assert (before - trained).abs().max() > 1e-3, way  # another start does not train to the same
            torch.testing.assert_close(loaded, trained, rtol=0, atol=1e-6, msg=way)


def test_torch_leaves_out_frozen_parameters_and_keeps_the_adapter(tmp_path: Path) -> None:
    """Accelerate saves an adapter under FSDP2 like this."""
    layer = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    table = "base_model.model.model.embed_tokens.lora_embedding_"
    names = sorted([f"{layer}{each}.default.weight" for each in "AB"] + [f"{table}{each}.default" for each in "AB"])
    for found in processes.run(workers.names_of_factors, 2, tmp_path):
        assert found["buffers"] == ["inv_freq", "original_inv_freq"]  # of Llama's positions
        assert found["children"] == ["base_model.model.model.embed_tokens.lora_embedding_A.default"]
        for frozen in ("none", "lora_A", "lora_"):
            assert found[frozen] == (names, True), frozen


def test_an_accelerate_loop_on_two_processes_equals_that_of_one(results: list[dict[str, Any]], tmp_path: Path) -> None:
    one, (first, second) = workers.accelerated(0, 1, tmp_path), (result["accelerated"] for result in results)
    assert first["kind"] == "DistributedDataParallel"
    assert first["losses"] == second["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert first["steps"] == one["steps"] == 4
    assert first["estimate"]["about"][1] == one["estimate"]["about"][1] == 88  # labels in 8 rows


def test_fsdp2_with_mixed_precision_keeps_the_outputs_and_trains(found: list[dict[str, Any]]) -> None:
    first, second = (result["mixed"] for result in found)
    assert torch.equal(first["base"], first["before"])
    assert first["losses"] == second["losses"]
    assert min(first["losses"]) < first["losses"][0] - 0.05
    for name, each in first["estimate"]["layers"].items():
        assert each[0].dtype == torch.float32, name


def test_a_process_without_a_batch_takes_part_in_the_passes_of_sharded_models(
    found: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for result in found:
        assert "1 of 2 processes had no batch (the first is process 1)" in result["mixed"]["said"][0]
        assert result["mixed"]["estimate"]["about"] == alone["estimate"]["about"]


def test_a_batch_that_cannot_be_used_stops_all_processes_of_a_sharded_model(found: list[dict[str, Any]]) -> None:
    other, own = (result["refused"] for result in found)
    assert own.startswith("ValueError: batch 1: The model returned no loss")
    assert other.startswith("RuntimeError: Process 1 of 2 failed, so all of them stop: ValueError: batch 1: The model")


def test_a_batch_without_a_label_is_left_out_of_a_sharded_estimate(found: list[dict[str, Any]]) -> None:
    for result in found:
        assert result["unlabelled"]["estimate"]["about"][0] == 2
        assert ["1 of 3 batches have no label" in text for text in result["unlabelled"]["said"]] == [True]


def test_the_base_offset_is_refused_on_sharded_weights(found: list[dict[str, Any]]) -> None:
    for result in found:
        assert 'q_proj: offset="base" cannot change a sharded weight; use offset="adapter"' in result["base"]


def test_a_tensor_parallel_plan_that_peft_does_not_know_is_refused(found: list[dict[str, Any]]) -> None:
    for result in found:
        message = (
            "layers.1.mlp.up_proj is a Linear that a tensor-parallel plan splits as None; known are nn.Linear layers"
        )
        assert re.search(f"^ValueError: .*{message}", result["parallel"])


def test_a_state_dict_of_the_trained_parts_is_saved_as_a_plain_adapter(tmp_path: Path) -> None:
    """DeepSpeed ZeRO-3 gathers such a state dict, with parameters only."""
    model, batches = adapted(llama()), causal()
    lora_ga.initialize(model, batches)
    train(model, batches)
    model.save_pretrained(tmp_path / "plain")
    state = {
        f"{name}.{factor.trainable_name}": factor.trainable.detach()
        for name, factor in model.named_modules()
        if isinstance(factor, Delta)
    }
    model.save_pretrained(tmp_path / "halves", state_dict=state)
    plain, made = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "halves"))
    assert plain.keys() == made.keys()
    assert all(torch.equal(plain[key], made[key]) for key in plain)
    assert (tmp_path / "halves" / "lora_ga.safetensors").exists()
    other = {key: value + 1 for key, value in plain.items()}
    save_file(other, tmp_path / "plain" / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="no lora_ga.safetensors was written"):
        sidecar.save_sidecar(model, "default", tmp_path / "plain")


def test_parameters_partitioned_by_zero_3_get_no_structure() -> None:
    model = adapted(llama())
    weight: Any = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    weight.ds_numel = 2 * weight.numel()
    with pytest.raises(ValueError, match="partitioned by DeepSpeed ZeRO-3.*Use LoraGACallback, or call lora_ga.init"):
        lora_ga.initialize(model, causal(1))


def layer_in_fsdp2(state: Any) -> nn.Module:
    """A layer that passes for one in FSDP2 and has the given state."""
    layer = nn.Linear(2, 2)
    layer.__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {"_get_fsdp_state": lambda self: state})
    return layer


def state_of_fsdp2(**changes: Any) -> SimpleNamespace:
    parameter = SimpleNamespace(_module_info=SimpleNamespace(module=nn.Linear(2, 2), param_name="weight"))
    groups = [SimpleNamespace(fsdp_params=[parameter])]
    return SimpleNamespace(**{"_is_root": True, "_lazy_init": lambda: None, "_fsdp_param_groups": groups} | changes)


@pytest.mark.parametrize(
    ("state", "version", "found"),
    [
        (SimpleNamespace(_is_root=True, _lazy_init=None, groups=[]), "2.13.0", "'_fsdp_param_group'"),
        (SimpleNamespace(_lazy_init=None, _fsdp_param_groups=[]), "2.13.0", "its state lacks _is_root"),
        (state_of_fsdp2(_fsdp_param_groups=[SimpleNamespace(params=[])]), "2.13.0", "'fsdp_params'"),
        (state_of_fsdp2(), "2.16.0a0", "the newest version tried is 2.15"),
    ],
)
def test_a_state_of_fsdp2_in_another_layout_is_refused(
    state: Any, version: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    for use in (reshard, lambda model: register_moved(model, {})):
        with pytest.raises(ValueError, match=f"FSDP2 of torch {version} .*{found}.* before fully_shard"):
            use(nn.Sequential(layer_in_fsdp2(state)))


@pytest.mark.parametrize("plural", [True, False], ids=["torch 2.13", "torch 2.8"])
def test_register_moved_gives_fsdp2_the_modules_that_hold_the_parameters_now(plural: bool) -> None:
    state, new = state_of_fsdp2(), nn.Linear(2, 2)
    info = state._fsdp_param_groups[0].fsdp_params[0]._module_info
    if not plural:  # one group, under another name
        state._fsdp_param_group = vars(state).pop("_fsdp_param_groups")[0]
    register_moved(layer_in_fsdp2(state), {info.module: (new, "delta_weight")})
    assert (info.module, info.param_name) == (new, "delta_weight")


def test_a_module_of_fsdp2_without_parameters_of_its_own_is_accepted_in_older_versions_of_torch() -> None:
    state = SimpleNamespace(_is_root=True, _lazy_init=None, _fsdp_param_group=None)
    register_moved(layer_in_fsdp2(state), {})
    assert state._fsdp_param_group is None


def test_fsdp_1_is_refused() -> None:
    class FullyShardedDataParallel(torch.distributed.fsdp.FullyShardedDataParallel):
        def __init__(self) -> None:
            nn.Module.__init__(self)

        def modules(self, remove_duplicate: bool = True) -> Any:
            return iter([self])

    with pytest.raises(TypeError, match="wrapped by FullyShardedDataParallel .FSDP 1.*Use FSDP2"):
        unwrapped(FullyShardedDataParallel())
