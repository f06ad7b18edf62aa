"""Axolotl, LLaMA-Factory, ms-swift: their integrations, with stand-ins, and with the packages if installed. Unsloth.

`make test-frameworks` installs each package in an environment of its own, and runs the tests of "the installed …".
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

import lora_ga
from cli.conftest import VOCABULARY, save_tokenizer
from lora_ga import LoraGAConfig
from lora_ga.entrypoint import LoraGAContext, get_lora_ga_model
from test_integrations import block
from toys import ALL, FusedLlama, adapted, causal, fused_llama, llama, logits, tokens, train


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
    if importlib.util.find_spec("torchaudio") is None:  # LLaMA-Factory imports it for models that hear
        stub = ModuleType("torchaudio")
        stub.__spec__ = importlib.util.spec_from_loader("torchaudio", None)
        monkeypatch.setitem(sys.modules, "torchaudio", stub)
    import_or_skip("llamafactory.train.tuner")
    from lora_ga.integrations.llamafactory import run_exp

    base = save_model(tmp_path / "base")
    write_instructions(tmp_path / "toys.json")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"toys": {"file_name": "toys.json"}}))
    settings = {"model_name_or_path": str(base), "stage": "sft", "do_train": True, "finetuning_type": "lora"}
    settings |= {"lora_rank": 2, "lora_target": "all", "dataset": "toys", "dataset_dir": str(tmp_path)}
    settings |= {"template": "default", "cutoff_len": 32, "output_dir": str(tmp_path / "out"), "max_steps": 3}
    settings |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none", "lora_ga": {"seed": 1}}
    run_exp(settings | {"use_cpu": True, "plot_loss": False, "logging_steps": 1})
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


# --- ms-swift --------------------------------------------------------------------------------------------------------

EXAMPLES = [{"input_ids": row.tolist(), "labels": row.tolist(), "attention_mask": [1] * 20} for row in tokens(12, 20)]


def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([example[key] for example in examples]) for key in examples[0]}


def call_as_ms_swift(model: nn.Module, dataset: Any = EXAMPLES, lora: Any = None, **changes: Any) -> Any:
    """Call `get_lora_ga_model` as `swift.pipelines.train.tuner.prepare_adapter` of ms-swift 3 and 4 does.

    That function makes `lora_config` from the user's flags. It passes the arguments below, but not `lora_config`.
    """
    lora_config = lora or LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], init_lora_weights="lora-ga"
    )
    assert lora_config is not None
    settings: dict[str, Any] = {"batch_size": 2, "num_iters": 3, "max_length": 16, "direction": "ArB2r"}
    settings |= {"dtype": None, "scale": "stable", "stable_gamma": 16}
    return lora_ga.entrypoint.get_lora_ga_model(
        model=model, data_collator=collate, dataset=dataset, **(settings | changes)
    )


def test_rank_alpha_and_targets_are_those_of_the_caller(tmp_path: Path) -> None:
    model = call_as_ms_swift(llama())
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.task_type) == (6, 14, "CAUSAL_LM")
    assert config.target_modules == {"q_proj", "down_proj"}
    assert config.init_lora_weights is True  # so that ms-swift saves no initial and no converted adapter
    assert torch.equal(logits(model, causal(1)[0]), logits(llama(), causal(1)[0]))
    train(model, causal(), lr=1e-3)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(stock, causal(1)[0]), logits(model, causal(1)[0]), rtol=0, atol=1e-5)


def starts(model: Any) -> list[torch.Tensor]:
    return [module.start for module in model.modules() if hasattr(module, "start")]


class SizedStream(torch.utils.data.IterableDataset[Any]):
    """A stream that says its length, and cannot be indexed."""

    def __len__(self) -> int:
        return len(EXAMPLES)

    def __iter__(self) -> Iterator[Any]:
        return iter(EXAMPLES)


def test_the_estimate_uses_the_first_examples_cut_to_max_length() -> None:
    model = call_as_ms_swift(llama(), iter(EXAMPLES))
    expected = lora_ga.get_lora_ga_model(
        llama(),
        LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"]),
        [collate([{k: v[:16] for k, v in e.items()} for e in EXAMPLES[i : i + 2]]) for i in (0, 2, 4)],
        lora_ga.LoraGAConfig(stable_gamma=16),
    )
    assert starts(expected)
    assert all(torch.equal(one, other) for one, other in zip(starts(model), starts(expected), strict=True))
    streamed = call_as_ms_swift(llama(), SizedStream())
    assert all(torch.equal(one, other) for one, other in zip(starts(streamed), starts(expected), strict=True))
    whole = call_as_ms_swift(llama(), max_length=None)
    assert not torch.equal(starts(whole)[0], starts(expected)[0])


@pytest.mark.parametrize("scale", ["gd", "unit", "stable", "weightS", "weights"])
def test_the_scales_and_dtypes_of_ms_swift_are_accepted(scale: str) -> None:
    model = call_as_ms_swift(llama(), scale=scale, dtype="bfloat16", direction="random", stable_gamma=64)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.bfloat16}
    assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {torch.float32}


@pytest.mark.parametrize(
    ("target", "changes", "part"),
    [
        ("q_proj", {"use_dora": True}, "lora_magnitude_vector"),
        ("q_proj", {"lora_bias": True}, "lora_B.default.bias"),
        ("embed_tokens", {}, "lora_embedding_A"),
    ],
)
def test_all_parameters_of_the_adapter_are_cast(target: str, changes: dict[str, Any], part: str) -> None:
    lora = LoraConfig(r=3, target_modules=[target], **changes)
    model = get_lora_ga_model(llama(), collate, EXAMPLES, dtype="float16", peft_config=lora)
    cast = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float16}
    assert cast == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert any(part in name for name in cast)


def test_a_caller_without_a_configuration_is_refused() -> None:
    lora_config = None
    with pytest.raises(ValueError, match="found no LoraConfig named lora_config in the calling function"):
        get_lora_ga_model(llama(), collate, EXAMPLES)
    assert lora_config is None


def test_a_passed_configuration_takes_precedence_over_that_of_the_caller() -> None:
    lora_config = LoraConfig(r=3, target_modules=["down_proj"])
    passed = LoraConfig(r=2, target_modules=["q_proj"])
    model = get_lora_ga_model(llama(), collate, EXAMPLES, peft_config=passed)
    assert model.peft_config["default"].r == 4
    found = get_lora_ga_model(llama(), collate, EXAMPLES)
    assert found.peft_config["default"].target_modules == lora_config.target_modules == {"down_proj"}


def test_a_refused_call_does_not_change_the_base_model() -> None:
    model = llama()
    with pytest.raises(ValueError, match="The data set holds no example"):
        call_as_ms_swift(model, [])
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be one of float32, float16, bfloat16"):
        call_as_ms_swift(model, dtype="int8")
    with pytest.raises(ValueError, match=r"LoraGAConfig.scale is 'huge'"):
        call_as_ms_swift(model, scale="huge")
    with pytest.raises(ValueError, match="rank 20 is more than half of .* The largest rank that fits all is 16"):
        call_as_ms_swift(model, lora=LoraConfig(r=20, target_modules=["q_proj"]))
    assert not any("lora" in name for name, _ in model.named_modules())
    assert all(p.requires_grad for p in model.parameters())


def test_saving_inside_the_context_converts_nothing(tmp_path: Path) -> None:
    model = call_as_ms_swift(llama())
    train(model, causal(), lr=1e-3)
    with LoraGAContext(model):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path / "initial_model"))
    with pytest.raises(ZeroDivisionError), LoraGAContext(model):
        raise ZeroDivisionError
    assert "save_pretrained" not in vars(model)
    stock = PeftModel.from_pretrained(llama(), tmp_path)
    assert stock.peft_config["default"].r == 6
    torch.testing.assert_close(logits(stock, causal(1)[0]), logits(model, causal(1)[0]), rtol=0, atol=1e-5)


def prepare_adapter_of_ms_swift() -> Any:
    """The function of ms-swift that calls `get_lora_ga_model`."""
    try:
        return importlib.import_module("swift.pipelines.train.tuner").prepare_adapter
    except ImportError as error:
        pytest.skip(f"ms-swift or one of its requirements is not installed ({error})")


def test_the_installed_ms_swift_calls_as_the_fallback_expects() -> None:
    """`_lora_config_from_call_stack` reads this variable, which ms-swift does not document."""
    prepare_adapter = prepare_adapter_of_ms_swift()
    assert "lora_config" in prepare_adapter.__code__.co_varnames
    assert "get_lora_ga_model" in prepare_adapter.__code__.co_names


def test_the_installed_ms_swift_makes_an_aligned_model(tmp_path: Path) -> None:
    prepare_adapter = prepare_adapter_of_ms_swift()
    flags = SimpleNamespace(
        task_type="causal_lm", target_modules=["q_proj", "v_proj"], modules_to_save=[], lora_rank=2, lora_alpha=6
    )
    flags.__dict__.update(lora_dropout=0.0, lora_bias="none", use_rslora=True, use_dora=False, lorap_lr_ratio=None)
    flags.__dict__.update(init_weights="lora-ga", tuner_type="lora", use_swift_lora=False, tuner_backend="peft")
    flags.__dict__.update(target_parameters=None, lora_dtype=None, lora_ga_batch_size=2, lora_ga_iters=2)
    flags.__dict__.update(lora_ga_max_length=16, lora_ga_direction="ArB2r", lora_ga_scale="stable")
    flags.__dict__.update(lora_ga_stable_gamma=16)
    base: Any = llama()
    base.model_meta = SimpleNamespace(is_multimodal=False)
    template = SimpleNamespace(data_collator=collate)
    model = prepare_adapter(flags, base, template=template, train_dataset=EXAMPLES)
    assert model.peft_config["default"].r == 4
    train(model, causal(), lr=1e-3)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(stock, causal(1)[0]), logits(model, causal(1)[0]), rtol=0, atol=1e-5)


# --- Unsloth: stand-ins after the source of unsloth and unsloth_zoo 2026.10.9, whose kernels need a GPU ---


def unsloth_llama(**settings: Any) -> Any:
    """A Llama with layers as Unsloth computes them. As in Unsloth the embedded tokens require a gradient."""
    base = FusedLlama(unsloth=True).eval()
    base.embed.register_forward_hook(lambda module, args, output: output.requires_grad_())
    model = adapted(base, ALL, **settings)
    for name, parameter in model.named_parameters():  # what its preparation lets train
        parameter.requires_grad_(".lora_A." in name or ".lora_B." in name)
    return model


def test_unsloths_layers_are_called_in_the_estimate_and_fused_in_training(recwarn: pytest.WarningsRecorder) -> None:
    exact = LoraGAConfig(estimator="dense", oversample=10**4)
    true = lora_ga.estimate_gradients(fused_llama(set(ALL)), causal(), exact)
    for config in (exact, LoraGAConfig(estimator="probe", oversample=10**4)):
        model = unsloth_llama()
        before = logits(model, causal(1)[0])
        found = lora_ga.initialize(model, causal(), config)
        for name, part in true.items():
            g = (part.U * part.S) @ part.V.mT
            assert ((found[name].U * found[name].S) @ found[name].V.mT - g).norm() <= 1e-3 * g.norm(), name
        assert torch.equal(logits(model, causal(1)[0]), before)
    assert not any("ran without being called" in str(warning.message) for warning in recwarn)
    losses = train(model, causal(1), steps=4, lr=1e-3)
    assert losses[-1] < losses[0]


def test_unsloth_saves_merges_and_loads_the_trained_adapter(tmp_path: Path) -> None:
    model, batch = unsloth_llama(), causal(1)[0]
    lora_ga.initialize(model, causal())
    for name, parameter in model.named_parameters():  # its preparation runs again when a model is loaded
        trains = ".lora_A." in name or ".lora_B." in name
        assert parameter.requires_grad == trains
    train(model, causal())
    trained = logits(model, batch)
    # save_lora, for vLLM: the factors by their names in the state dict.
    factors = {key: value for key, value in model.state_dict().items() if ".lora_A." in key or ".lora_B." in key}
    model.save_pretrained(tmp_path / "lora", state_dict=factors)
    stock = PeftModel.from_pretrained(FusedLlama(set(ALL)).eval(), tmp_path / "lora", is_trainable=True)
    torch.testing.assert_close(logits(stock, batch), trained, rtol=0, atol=1e-5)
    again = lora_ga.load(unsloth_llama(), tmp_path / "lora", is_trainable=True)
    torch.testing.assert_close(logits(again, batch), trained, rtol=0, atol=1e-5)
    assert train(again, causal()) == pytest.approx(train(model, causal()), abs=1e-4)  # both with LoRA-GA's structure
    # save_pretrained_merged: W + s·B A, of the modules whose path ends in lora_A.default and lora_B.default.
    trained, modules, merged = logits(model, batch), dict(model.named_modules()), FusedLlama(set(ALL)).eval()
    count = 0
    for name, module in modules.items():
        if name.endswith(".lora_A.default"):
            layer = modules[name.removesuffix(".lora_A.default")]
            assert layer._modules["lora_B"]._modules["default"]._parameters.get("bias") is None  # its fast path
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
            linear: Any = merged.get_submodule(path)
            linear.weight.data.addmm_(layer.lora_B.default.weight, module.weight, alpha=layer.scaling["default"])
            count += 1
    assert count == 2 * len(ALL)
    torch.testing.assert_close(logits(merged, batch), trained, rtol=0, atol=1e-5)
