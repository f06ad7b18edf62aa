"""Axolotl and LLaMA-Factory: stand-ins for their interfaces, and the packages themselves if they are installed."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lora_ga
from cli.conftest import VOCABULARY, save_tokenizer
from test_integrations import block
from toys import llama


class FakePlugin:
    """A stand-in for axolotl.integrations.base.BasePlugin, whose methods do nothing."""


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`lora_ga.integrations.axolotl`, imported with a stand-in for Axolotl."""
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = FakePlugin  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    monkeypatch.delitem(sys.modules, "lora_ga.integrations.axolotl", raising=False)
    yield importlib.import_module("lora_ga.integrations.axolotl")
    sys.modules.pop("lora_ga.integrations.axolotl", None)


def test_the_axolotl_plugin_declares_and_checks_its_settings(axolotl: Any) -> None:
    module, _, name = axolotl.LoraGAPlugin().get_input_args().rpartition(".")
    arguments = getattr(importlib.import_module(module), name)
    assert arguments(lora_ga={"stable_gamma": 64}).model_dump(exclude_none=True) == {"lora_ga": {"stable_gamma": 64}}
    assert arguments().model_dump(exclude_none=True) == {}
    with pytest.raises(ValueError, match="LoraGAConfig has no setting gamma; it has direction"):
        arguments(lora_ga={"gamma": 64})
    with pytest.raises(ValueError, match="LoraGAConfig.scale is 'big'; it must be one of"):
        arguments(lora_ga={"scale": "big"})


def test_the_documented_lines_for_axolotl_configure_the_callback(axolotl: Any) -> None:
    configuration = yaml.safe_load(block("Axolotl"))
    (path,) = configuration["plugins"]
    module, _, name = path.rpartition(".")
    plugin = getattr(importlib.import_module(module), name)()
    assert isinstance(plugin, axolotl.LoraGAPlugin)
    plugin.register(configuration | {"adapter": "lora"})
    (callback,) = plugin.add_callbacks_pre_trainer(configuration, None)
    assert callback.config == lora_ga.LoraGAConfig(**configuration["lora_ga"])


def test_the_documented_line_for_llamafactory_adds_the_callback(
    llamafactory: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = block("LLaMA-Factory").partition("#")[0].split()
    assert words[:2] == ["python", "-m"]
    monkeypatch.setattr(sys, "argv", words[2:])
    runpy.run_module(words[2], run_name="__main__")
    assert [type(callback) for _, callbacks in llamafactory for callback in callbacks] == [lora_ga.LoraGACallback]


def test_the_axolotl_plugin_turns_fused_kernels_off(axolotl: Any) -> None:
    configuration: dict[str, Any] = {"adapter": "lora"}
    axolotl.LoraGAPlugin().register(configuration)
    assert all(configuration[kernel] is False for kernel in axolotl.KERNELS)


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({}, "adapter: found None, but LoRA-GA initializes a LoRA adapter. Set adapter to lora or qlora"),
        ({"adapter": "llama-adapter"}, "adapter: found 'llama-adapter'"),
        (
            {"adapter": "qlora", "peft_init_lora_weights": "pissa"},
            "peft_init_lora_weights: found 'pissa', which initializes",
        ),
        (
            {"adapter": "lora", "lora_mlp_kernel": True},
            "lora_mlp_kernel: found true, but fused LoRA kernels do not call",
        ),
    ],
)
def test_the_axolotl_plugin_refuses_settings_that_cannot_be_aligned(
    axolotl: Any, configuration: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        axolotl.LoraGAPlugin().register(configuration)


def test_the_axolotl_plugin_gives_the_trainer_a_callback_with_the_settings(axolotl: Any) -> None:
    plugin = axolotl.LoraGAPlugin()
    (callback,) = plugin.add_callbacks_pre_trainer({"lora_ga": {"stable_gamma": 64}}, None)
    assert callback.config == lora_ga.LoraGAConfig(stable_gamma=64)
    (callback,) = plugin.add_callbacks_pre_trainer({}, None)
    assert callback.config == lora_ga.LoraGAConfig()


@pytest.fixture
def llamafactory(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of the calls of a stand-in for LLaMA-Factory's `run_exp`."""
    calls: list[Any] = []
    modules = {name: ModuleType(name) for name in ("llamafactory", "llamafactory.hparams", "llamafactory.train")}
    parser, tuner = ModuleType("llamafactory.hparams.parser"), ModuleType("llamafactory.train.tuner")
    parser.read_args = lambda args: args  # type: ignore[attr-defined]
    tuner.run_exp = lambda args, callbacks: calls.append((args, callbacks))  # type: ignore[attr-defined]
    for module in (*modules.values(), parser, tuner):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_the_llamafactory_launcher_adds_the_callback_and_removes_its_settings(llamafactory: list[Any]) -> None:
    from lora_ga.integrations.llamafactory import run_exp

    given = {"stage": "sft", "lora_ga": {"stable_gamma": 64}}
    run_exp(given, callbacks=["another"])
    ((settings, callbacks),) = llamafactory
    assert settings == {"stage": "sft"}
    assert given["lora_ga"] == {"stable_gamma": 64}
    assert callbacks[0] == "another"
    assert callbacks[1].config == lora_ga.LoraGAConfig(stable_gamma=64)
    run_exp(["--stage", "sft"])
    assert llamafactory[1][0] == ["--stage", "sft"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"finetuning_type": "full"}, "finetuning_type: found 'full', but LoRA-GA initializes a LoRA adapter"),
        ({"pissa_init": True}, "pissa_init: found true, which cannot be combined with LoRA-GA"),
        ({"lora_ga": {"gamma": 1}}, "LoraGAConfig has no setting gamma"),
    ],
)
def test_the_llamafactory_launcher_refuses_settings_that_cannot_be_aligned(
    llamafactory: list[Any], settings: dict[str, Any], message: str
) -> None:
    from lora_ga.integrations.llamafactory import run_exp

    with pytest.raises(ValueError, match=message):
        run_exp(settings)
    assert llamafactory == []


def import_or_skip(module: str) -> Any:
    """Import a framework's module; skip the test if that fails."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a framework without all its requirements can raise any error on import
        pytest.skip(f"{module} or one of its requirements is not installed ({type(error).__name__}: {error})")


def save_model(folder: Path) -> Path:
    llama(vocab_size=len(VOCABULARY)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def write_instructions(path: Path) -> Path:
    rows = [{"instruction": f"a b {'c d'[i % 3 :]}", "input": "", "output": "e f g h"[i % 4 :]} for i in range(24)]
    path.write_text(json.dumps(rows))
    return path


def assert_trained_adapter(adapter: Path, base: Path) -> None:
    assert (adapter / "lora_ga.safetensors").exists()
    ids = torch.arange(5, 12)[None]
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    before = plain(ids).logits.detach()
    stock = PeftModel.from_pretrained(plain, adapter).eval()
    assert stock.peft_config["default"].r == 4
    assert not torch.equal(stock(ids).logits, before)


def test_the_installed_llamafactory_trains_an_aligned_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    import_or_skip("llamafactory.train.tuner")
    from lora_ga.integrations.llamafactory import run_exp

    base = save_model(tmp_path / "base")
    write_instructions(tmp_path / "toys.json")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"toys": {"file_name": "toys.json"}}))
    settings = {"model_name_or_path": str(base), "stage": "sft", "do_train": True, "finetuning_type": "lora"}
    settings |= {"lora_rank": 2, "lora_target": "all", "dataset": "toys", "dataset_dir": str(tmp_path)}
    settings |= {"template": "default", "cutoff_len": 32, "output_dir": str(tmp_path / "out"), "max_steps": 3}
    settings |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none", "lora_ga": {"seed": 1}}
    run_exp(
        settings | {"use_cpu": True, "disable_gradient_checkpointing": True, "plot_loss": False, "logging_steps": 1}
    )
    assert_trained_adapter(tmp_path / "out", base)


def test_the_installed_axolotl_reads_the_plugin_and_its_settings(tmp_path: Path) -> None:
    base = import_or_skip("axolotl.integrations.base")
    import_or_skip("axolotl.integrations.config")
    manager = base.PluginManager.get_instance()
    manager.register("lora_ga.integrations.axolotl.LoraGAPlugin")
    configuration = yaml.safe_load(
        "{adapter: lora, plugins: [lora_ga.integrations.axolotl.LoraGAPlugin], lora_ga: {stable_gamma: 64}}"
    )
    try:
        for plugin in manager.plugins.values():
            plugin.register(configuration)
        _, schema = importlib.import_module("axolotl.integrations.config").merge_input_args()
        assert "lora_ga" in schema.model_fields
        assert configuration["lora_qkv_kernel"] is False
        (callback,) = manager.add_callbacks_pre_trainer(configuration, None)
        assert callback.config.stable_gamma == 64
    finally:
        manager.plugins.clear()
