"""Finished adapters: converting runs of PEFT's own LoRA-GA, compressing, merging, and serving by vLLM."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import lora_ga
from cases import MODELS
from lora_ga.cli.main import main
from lora_ga.export.convert import convert_run
from lora_ga.export.merge import merge_adapter
from lora_ga.export.readers import VLLM_RANKS, check_reader, write_for
from toys import VOCABULARY, adapted, bert, causal, classified, gpt2, llama, logits, saved, train, translated

WEIGHTS = "adapter_model.safetensors"


@dataclasses.dataclass
class OldRun:
    """A run of PEFT's LoRA-GA, on a changed base: its initial and final adapter on disk, and the trained model."""

    init: Path
    final: Path
    model: Any


def old_run(folder: Path, make: Callable[[], Any], batches: list[Any], targets: list[str], **lora: Any) -> OldRun:
    loraga = pytest.importorskip("peft.tuners.lora.loraga", reason="PEFT has LoRA-GA since version 0.19")
    base = make()
    lora_bias = lora.pop("lora_bias", False)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": targets} | lora
    config = LoraConfig(**settings, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    config.lora_bias = lora_bias  # PEFT's constructor refuses it with LoRA-GA; the authors' fork does not

    def train_step() -> None:
        for batch in batches:
            base(**batch).loss.backward()

    loraga.preprocess_loraga(base, config, train_step)
    torch.manual_seed(3)
    model = get_peft_model(base, config)
    model.save_pretrained(folder / "init")
    train(model, batches, lr=1e-3)
    model.save_pretrained(folder / "final")
    return OldRun(folder / "init", folder / "final", model.eval())


@pytest.fixture
def run(tmp_path: Path) -> OldRun:
    return old_run(tmp_path, llama, causal(), ["q_proj", "v_proj", "down_proj"])


LLAMA = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, tuple[Callable[[], Any], Callable[..., list[Any]], list[str], dict[str, Any]]] = {
    "plain": (llama, causal, LLAMA, {}),
    "rank-stabilised": (llama, causal, LLAMA, {"use_rslora": True}),
    "patterns": (llama, causal, LLAMA, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}),
    "patterns, rank-stabilised": (
        llama,
        causal,
        LLAMA,
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32, "down_proj": 1}},
    ),
    "DoRA": (llama, causal, LLAMA, {"use_dora": True}),
    "modules trained in full": (llama, causal, LLAMA, {"modules_to_save": ["lm_head"]}),
    "embedding": (llama, causal, [*LLAMA, "embed_tokens"], {}),
    "biases of the layers": (bert, classified, ["query", "dense"], {"bias": "lora_only"}),
    "all biases, a head": (bert, classified, ["query", "dense"], {"bias": "all", "task_type": "SEQ_CLS"}),
    "biases of B": (bert, classified, ["query", "dense"], {"lora_bias": True}),
    "transposed weights": (gpt2, causal, ["c_attn", "c_fc"], {"fan_in_fan_out": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_converted_adapter_gives_the_original_base_the_function_of_the_run(kind: str, tmp_path: Path) -> None:
    make, batches_of, targets, lora = KINDS[kind]
    batches = batches_of()
    run = old_run(tmp_path, make, batches, targets, **lora)
    errors = convert_run(run.init, run.final, tmp_path / "out")
    assert max(errors.values()) < 1e-6
    wanted = logits(run.model, batches[0])
    stock = PeftModel.from_pretrained(make(), tmp_path / "out").eval()
    torch.testing.assert_close(logits(stock, batches[0]), wanted, rtol=0, atol=1e-5)
    change_config(run.final, init_lora_weights=True, lora_ga_config=None)
    unconverted = PeftModel.from_pretrained(make(), run.final).eval()
    assert (logits(unconverted, batches[0]) - wanted).abs().max() > 1e-4
    assert stock.peft_config["default"].r == 8


def test_the_converted_file_is_float32_and_loses_less_in_low_precision_than_stacked_factors(tmp_path: Path) -> None:
    run = old_run(tmp_path, llama, causal(), ["q_proj"])
    # As in the authors' fork, the initial factors have size 1, and training changes them little.
    # (In PEFT, B has the size of the gradient.)
    draw = torch.Generator().manual_seed(1)
    start = {key: torch.randn(value.shape, generator=draw) / 4 for key, value in load_file(run.init / WEIGHTS).items()}
    change_tensors(run.init, lambda _: start)
    change_tensors(run.final, lambda _: {k: v + 1e-3 * torch.randn(v.shape, generator=draw) for k, v in start.items()})
    convert_run(run.init, run.final, tmp_path / "out")
    written, first, last = (load_file(path / WEIGHTS) for path in (tmp_path / "out", run.init, run.final))
    assert all(tensor.dtype == torch.float32 for tensor in written.values())
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    a_0, b_0, a, b = (file[key.format(letter)].double() for file in (first, last) for letter in "AB")
    change = b @ a - b_0 @ a_0

    def rounding_error(left: torch.Tensor, right: torch.Tensor) -> float:
        return ((left.bfloat16().double() @ right.bfloat16().double() - change).norm() / change.norm()).item()

    ours = rounding_error(written[key.format("B")], written[key.format("A")])
    assert ours < rounding_error(torch.cat([b, -b_0], dim=1), torch.cat([a, a_0])) / 10


def test_a_run_of_the_authors_fork_is_converted(run: OldRun, tmp_path: Path) -> None:
    for folder in (run.init, run.final):
        config = json.loads((folder / "adapter_config.json").read_text())
        config |= {"peft_type": "LORAGA", "bsz": 2, "iters": 2, "direction": "ArB2r", "stable_gamma": 16}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    convert_run(run.init, run.final, tmp_path / "out")
    assert "bsz" not in json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    stock = PeftModel.from_pretrained(llama(), tmp_path / "out")
    torch.testing.assert_close(logits(stock, causal(1)[0]), logits(run.model, causal(1)[0]), rtol=0, atol=1e-5)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, r"do not belong together: their rank \(r\) is 4 and 8"),
        ({"lora_alpha": 16}, r"their alpha \(lora_alpha\) is 8 and 16"),
        ({"use_rslora": True}, r"rank-stabilised scaling \(use_rslora\) is None and True"),
        ({"rank_pattern": {"q_proj": 2}}, r"rank pattern \(rank_pattern\) is None and {'q_proj': 2}"),
        ({"target_modules": ["q_proj"]}, r"target modules .* and \['q_proj'\]"),
        ({"peft_type": "IA3"}, "an adapter of type IA3; only LoRA can be converted"),
        ({"layer_replication": [[0, 2]]}, "layer_replication makes several layers share one base weight"),
        ({"target_parameters": ["experts.w"]}, r"adapts parameters by target_parameters \(experts.w\)"),
    ],
)
def test_adapters_that_do_not_belong_together_or_cannot_be_converted_are_refused(
    changes: dict[str, Any], message: str, run: OldRun, tmp_path: Path
) -> None:
    change_config(run.final, **changes)
    with pytest.raises(ValueError, match=message):
        convert_run(run.init, run.final, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_different_bases_are_refused(run: OldRun, tmp_path: Path) -> None:
    change_config(run.init, base_model_name_or_path="one/model")
    change_config(run.final, base_model_name_or_path="another/model")
    with pytest.raises(ValueError, match="their base models are one/model and another/model"):
        convert_run(run.init, run.final, tmp_path / "out")


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def test_adapters_with_different_layers_or_shapes_are_refused(run: OldRun, tmp_path: Path) -> None:
    whole = load_file(run.final / WEIGHTS)
    change_tensors(run.final, lambda file: {key: value for key, value in file.items() if "layers.1.mlp" not in key})
    with pytest.raises(ValueError, match="only one of them holds .*layers.1.mlp.down_proj.lora_A.weight .2 such"):
        convert_run(run.init, run.final, tmp_path / "out")
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    save_file(whole | {key: whole[key][:, :32].contiguous()}, run.final / WEIGHTS)
    with pytest.raises(ValueError, match=r"down_proj.lora_A.weight is \(4, 48\) and \(4, 32\)"):
        convert_run(run.init, run.final, tmp_path / "out")
    save_file({name: value for name, value in whole.items() if name != key}, run.final / WEIGHTS)
    with pytest.raises(ValueError, match="damaged, .*down_proj has only one of the factors A and B"):
        convert_run(run.init, run.final, tmp_path / "out")


def test_the_same_adapter_twice_is_refused(run: OldRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold the same factors: nothing was trained, or one was given twice"):
        convert_run(run.init, run.init, tmp_path / "out")


def test_an_adapter_that_needs_no_conversion_is_refused(run: OldRun, tmp_path: Path) -> None:
    convert_run(run.init, run.final, tmp_path / "converted")
    with pytest.raises(ValueError, match="one that was converted already is for the original base"):
        convert_run(run.init, tmp_path / "converted", tmp_path / "out")
    shutil.copytree(run.final, tmp_path / "ours")
    (tmp_path / "ours" / "lora_ga.safetensors").touch()
    with pytest.raises(ValueError, match="it was trained with this library and needs no conversion"):
        convert_run(run.init, tmp_path / "ours", tmp_path / "out")
    plain = adapted(llama(), ["q_proj"])
    plain.save_pretrained(tmp_path / "plain")
    train(plain, causal())
    plain.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="every product B₀A₀ is zero, as plain LoRA starts"):
        convert_run(tmp_path / "plain", tmp_path / "trained", tmp_path / "out")


def test_an_initial_adapter_of_another_run_gives_a_warning(run: OldRun, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    change_tensors(
        run.init, lambda file: {key: torch.randn(value.shape, generator=generator) for key, value in file.items()}
    )
    with pytest.warns(UserWarning, match="may not be of one run: the cosine between their A is "):
        convert_run(run.init, run.final, tmp_path / "out")


def test_damaged_and_missing_files_raise_errors_that_name_them(run: OldRun, tmp_path: Path) -> None:
    change_tensors(run.final, lambda file: file | {min(file): file[min(file)] * float("nan")})
    with pytest.raises(ValueError, match="holds numbers that are not finite"):
        convert_run(run.init, run.final, tmp_path / "out")
    (run.final / WEIGHTS).write_bytes(b"{}")
    with pytest.raises(ValueError, match="damaged, its files cannot be read"):
        convert_run(run.init, run.final, tmp_path / "out")
    (run.final / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="final: holds no adapter_model.safetensors"):
        convert_run(run.init, run.final, tmp_path / "out")
    (run.init / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="nothing: there is no such folder; give the folder that"):
        convert_run(run.init.parent / "nothing", run.final, run.init.parent / "out")
    with pytest.raises(FileNotFoundError, match="init: holds no adapter_config.json"):
        convert_run(run.init, run.final, tmp_path / "out")


def test_the_command_converts_and_reports_errors(
    run: OldRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["convert", str(run.init), str(run.final)]
    assert main([*argv, "--output", str(tmp_path / "out")]) == 0
    assert "out: 6 layers for the original base, read back with a relative error of " in capsys.readouterr().out
    stock = PeftModel.from_pretrained(llama(), tmp_path / "out")
    torch.testing.assert_close(logits(stock, causal(1)[0]), logits(run.model, causal(1)[0]), rtol=0, atol=1e-5)
    assert main([*argv, "--output", str(tmp_path / "out")]) == 2
    assert "not empty. Choose another output folder" in capsys.readouterr().err
    assert main(argv) == 2
    assert "--output is missing" in capsys.readouterr().err


# --- compressing and merging ------------------------------------------------------------------------------------------


def close_in_effect(small: Any, whole: Any, base: Any, batch: Any) -> bool:
    """Whether the two adapters' logits differ by at most a tenth of the whole adapter's effect on the logits."""
    effect = logits(whole, batch) - logits(base, batch)
    return bool((logits(small, batch) - logits(whole, batch)).norm() <= 0.1 * effect.norm())


def product(folder: Path, layer: str) -> torch.Tensor:
    """B A of a layer of the saved adapter."""
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{layer}.lora_{letter}.weight"].double() for letter in "AB")
    return b @ a


def test_compressing_gives_the_best_product_of_the_rank_and_reports_its_error(tmp_path: Path) -> None:
    model = saved(tmp_path / "whole", rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32})
    errors = lora_ga.compress_adapter(tmp_path / "whole", tmp_path / "small", 3)
    assert len(errors) == 14
    for layer, error in errors.items():
        scaling = model.base_model.model.get_submodule(layer).scaling["default"]
        whole = scaling * product(tmp_path / "whole", layer)
        values = torch.linalg.svdvals(whole)
        assert error == pytest.approx((values[3:].norm() / values.norm()).item(), abs=1e-6)
        lost = (product(tmp_path / "small", layer) - whole).norm() / whole.norm()
        assert lost.item() == pytest.approx(error, abs=1e-5)


def test_stock_peft_loads_the_compressed_adapter(tmp_path: Path) -> None:
    model = saved(tmp_path / "whole", modules_to_save=["lm_head"], targets=["q_proj", "v_proj"])
    lora_ga.compress_adapter(tmp_path / "whole", tmp_path / "small", 7)
    small = PeftModel.from_pretrained(llama(), tmp_path / "small")
    assert small.peft_config["default"].r == 7
    assert close_in_effect(small, model, llama(), causal(1)[0])
    assert not (tmp_path / "small" / "lora_ga.safetensors").exists()


def test_compressing_to_the_rank_of_the_product_loses_nothing(tmp_path: Path) -> None:
    model = saved(tmp_path / "whole", rank_pattern={"q_proj": 2}, lora_bias=False)
    tensors = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert max(t.shape[0] for name, t in tensors.items() if "lora_A" in name) == 8
    errors = lora_ga.compress_adapter(tmp_path / "whole", tmp_path / "small", 4)
    assert errors["model.layers.0.self_attn.q_proj"] < 1e-6
    assert errors["model.layers.0.self_attn.v_proj"] > 1e-3
    assert torch.isfinite(logits(model, causal(1)[0])).all()


def test_compressing_keeps_lora_biases(tmp_path: Path) -> None:
    model = adapted(bert(), ["query", "dense"], lora_bias=True)
    lora_ga.initialize(model, classified())
    train(model, classified())
    model.save_pretrained(tmp_path / "whole")
    lora_ga.compress_adapter(tmp_path / "whole", tmp_path / "small", 7)
    small = PeftModel.from_pretrained(bert(), tmp_path / "small")
    assert close_in_effect(small, model.eval(), bert(), classified(1)[0])


def test_bad_ranks_folders_and_adapters_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    saved(tmp_path / "whole")
    saved(tmp_path / "dora", use_dora=True)
    saved(tmp_path / "embedding", use_dora=True, targets=["q_proj"])
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(ValueError, match="rank 8: the adapter has rank 8; compress to a rank from 1 to 7"):
        lora_ga.compress_adapter(tmp_path / "whole", tmp_path / "out", 8)
    with pytest.raises(ValueError, match="full: not empty. Choose another output folder"):
        lora_ga.compress_adapter(tmp_path / "whole", full, 2)
    with pytest.raises(FileNotFoundError, match="nothing: there is no such folder; give the folder that"):
        lora_ga.compress_adapter(tmp_path / "nothing", tmp_path / "out", 2)
    with pytest.raises(FileNotFoundError, match="full: holds no adapter_config.json"):
        lora_ga.compress_adapter(full, tmp_path / "out", 2)
    with pytest.raises(ValueError, match="a DoRA adapter"):
        lora_ga.compress_adapter(tmp_path / "dora", tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()
    assert [file.name for file in full.iterdir()] == ["file"]


def test_compressing_an_embedding_adapter_is_refused(tmp_path: Path) -> None:
    model = adapted(llama(), ["embed_tokens", "q_proj"])
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="lora_embedding_A is not a factor of a linear layer"):
        lora_ga.compress_adapter(tmp_path / "whole", tmp_path / "out", 2)


def test_the_merged_checkpoint_has_the_function_of_the_adapted_model(tmp_path: Path) -> None:
    model = saved(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=llama())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, causal(1)[0]), logits(model, causal(1)[0]), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="merged: not empty"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=llama())


# Base with tied weights, batches, targets, and the module that trains in full and so is tied no longer.
UNTIED: dict[str, tuple[Callable[[], Any], Callable[[], list[Any]], str, str]] = {
    "head": (partial(llama, tie_word_embeddings=True), causal, "q_proj", "lm_head"),
    "embedding": (partial(llama, tie_word_embeddings=True), causal, "q_proj", "embed_tokens"),
    "head of a text part": (MODELS["Gemma 3 (vision and language)"].make, causal, "q_proj", "lm_head"),
}


def untied(case: str, folder: Path) -> tuple[Any, Any]:
    """Train and save an adapter with a module in full; the model, and the base model as it was."""
    make, batches, target, module = UNTIED[case]
    torch.manual_seed(0)
    base = make()
    model = adapted(copy.deepcopy(base), [target], modules_to_save=[module])
    train(model, batches())
    model.save_pretrained(folder)
    return model.eval(), base


def merge_as_before_peft_0_19(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PEFT leave the configuration of a merged model as it is."""
    merge = LoraModel.merge_and_unload

    def merge_alone(self: Any, **settings: Any) -> Any:
        config = self.model.config
        ties = config.tie_word_embeddings
        merged = merge(self, **settings)
        config.tie_word_embeddings = ties
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", merge_alone)


@pytest.mark.parametrize("untied_by_peft", [True, False])
@pytest.mark.parametrize("case", UNTIED)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_weights_that_training_has_untied_stay_apart_in_the_merged_model(
    case: str, untied_by_peft: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base = untied(case, tmp_path / "adapter")
    if not untied_by_peft:
        merge_as_before_peft_0_19(monkeypatch)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=base)
    merged = type(base).from_pretrained(tmp_path / "merged").eval()
    assert {merged.config.tie_word_embeddings, merged.config.get_text_config().tie_word_embeddings} == {False}
    torch.testing.assert_close(logits(merged, causal(1)[0]), logits(model, causal(1)[0]), rtol=0, atol=1e-5)


def test_a_tie_that_training_has_kept_stays(tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=True)
    adapted(base, ["q_proj"]).save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=llama(tie_word_embeddings=True))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.tie_word_embeddings is True


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_an_untied_model_that_computes_something_else_without_the_tie_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_experts": 2}
    config = SwitchTransformersConfig(**sizes, num_layers=2, num_decoder_layers=2, decoder_start_token_id=0)
    monkeypatch.setitem(
        UNTIED, "scaled", (partial(SwitchTransformersForConditionalGeneration, config), translated, "q", "lm_head")
    )
    _, base = untied("scaled", tmp_path / "adapter")
    with pytest.raises(ValueError, match="they are no longer one weight, but with tie_word_embeddings=False this mod"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()


def test_biases_without_a_place_and_replicated_layers_cannot_be_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "lora_bias": ({"lora_bias": True}, r"q_proj: the adapter has a bias here \(lora_bias\), but the base model's"),
        "layer_replication": (
            {"layer_replication": [[0, 2], [1, 2]]},
            r"replicates layers \(layer_replication \[\[0, 2",
        ),
    }
    for name, (settings, message) in cases.items():
        model = adapted(llama(), ["q_proj"], **settings)
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"{message}.*from Python, by lora_ga.load"):
            merge_adapter(tmp_path / name, tmp_path / "merged", base=llama())
        found = logits(lora_ga.load(llama(), tmp_path / name).eval(), causal(1)[0])
        torch.testing.assert_close(found, logits(model.eval(), causal(1)[0]), rtol=0, atol=1e-5)
        assert main(["export", str(tmp_path / name), "--for", "vllm"]) == 2
        shown = capsys.readouterr().out
        assert f"in the way: {name}: " in shown
        assert "Merge it" not in shown
    assert not (tmp_path / "merged").exists()


def test_biases_of_b_merge_into_layers_with_a_bias(tmp_path: Path) -> None:
    model = adapted(bert(), ["query"], lora_bias=True)
    train(model, classified())
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=bert())
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits(merged, classified(1)[0]), logits(model.eval(), classified(1)[0]), rtol=0, atol=1e-5
    )


def with_more_tokens(tied: bool, folder: Path, **settings: Any) -> Any:
    """Add six tokens to a saved base model, train an adapter and save it."""
    llama(tie_word_embeddings=tied).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    base.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
    base.save_pretrained(folder / "resized")
    saves = {"save_embedding_layers": False} if settings.pop("parts", False) else {}
    base.config._name_or_path = str(folder / "base")
    model = adapted(base, task_type="CAUSAL_LM", **settings)
    train(model, causal())
    model.save_pretrained(folder / "adapter", **saves)
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"targets": ["q_proj"]},
        {"targets": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"targets": ["q_proj"], "trainable_token_indices": [1, VOCABULARY + 1]},
    ],
    ids=["frozen", "trained in full", "trained tokens"],
)
@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers)")
def test_an_adapter_trained_after_tokens_were_added_is_merged_with_them(
    settings: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    model = with_more_tokens(tied, tmp_path, **settings)
    assert main(["export", str(tmp_path / "adapter"), "--merge", "--output", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    batch = {"input_ids": torch.arange(VOCABULARY + 6)[None]}
    torch.testing.assert_close(logits(merged, batch), logits(model, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("tied", "settings"),
    [
        (False, {"targets": ["q_proj", "embed_tokens"]}),
        (False, {"targets": ["q_proj", "embed_tokens"], "parts": True}),
        (True, {"targets": ["q_proj"], "modules_to_save": ["embed_tokens"], "parts": True}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers)")
def test_added_tokens_of_which_the_adapter_lacks_weights_are_refused_with_a_way_out(
    tied: bool, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_more_tokens(tied, tmp_path, **settings)
    argv = ["export", str(tmp_path / "adapter"), "--merge", "--output", str(tmp_path / "merged")]
    assert main(argv) == 2
    assert "vocabulary of 70 tokens, and does not hold all of the embedding and the head." in capsys.readouterr().err
    assert main([*argv, "--model", str(tmp_path / "resized")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    batch = {"input_ids": torch.arange(VOCABULARY + 6)[None]}
    torch.testing.assert_close(logits(merged, batch), logits(model, batch), rtol=0, atol=1e-5)


def test_merging_into_a_quantised_layer_of_a_model_that_does_not_say_so_is_refused(tmp_path: Path) -> None:
    class Quantised(torch.Tensor):
        """Stands for quanto's frozen weight, of which PEFT changes a copy."""

    saved(tmp_path / "adapter", targets=["v_proj"])
    base = llama()
    projection = base.model.layers[1].self_attn.v_proj
    projection.weight = torch.nn.Parameter(projection.weight.data.as_subclass(Quantised), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.v_proj: its weight is quantised .*in full precision"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()


# --- serving ----------------------------------------------------------------------------------------------------


# Program → the factor of a layer's B A that it computes from adapter_config.json and the rank of the layer's matrices.
RULES: dict[str, Callable[[dict[str, Any], int], float]] = {
    "vllm": lambda config, rank: config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"]),
    "sglang": lambda config, rank: config["lora_alpha"] / config["r"],
    "llama.cpp": lambda config, rank: config["lora_alpha"] / rank,
}


def merged_as_by(name: str, folder: Path) -> Any:
    """Add the adapter to the base as a program does."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors, base = load_file(folder / WEIGHTS), llama()
    assert name != "vllm" or config["r"] in VLLM_RANKS
    with torch.no_grad():
        for key, a in tensors.items():
            if key.endswith(".lora_A.weight"):
                assert len(a) <= config["r"] if name == "vllm" else len(a) == config["r"] or name == "llama.cpp"
                layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                change = tensors[key.replace("lora_A", "lora_B")] @ a
                base.get_submodule(layer).weight += RULES[name](config, len(a)) * change
    return base


def merged_as_by_mlx(folder: Path) -> Any:
    """Add the adapter to the base as mlx-lm does: y + scale · x A B, in the last `num_layers` blocks (-1: all)."""
    config, base = json.loads((folder / "adapter_config.json").read_text()), llama()
    settings, tensors = config["lora_parameters"], load_file(folder / "adapters.safetensors")
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", -1)
    with torch.no_grad():
        for number, block in enumerate(base.model.layers):
            for key in settings["keys"]:
                a, b = (tensors[f"model.layers.{number}.{key}.lora_{letter}"] for letter in "ab")
                assert (a.shape[1], b.shape[0]) == (settings["rank"], settings["rank"])
                block.get_submodule(key).weight += settings["scale"] * (a @ b).T
    return base


def test_transformers_loads_a_saved_adapter(tmp_path: Path) -> None:
    model = saved(tmp_path)
    base = llama()
    base.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(base, causal(1)[0]), logits(model, causal(1)[0]), rtol=0, atol=1e-5)


def test_stock_peft_loads_a_saved_adapter_beside_another(tmp_path: Path) -> None:
    model = saved(tmp_path)
    base = adapted(llama(), ["q_proj"])
    base.load_adapter(str(tmp_path), "served")
    base.set_adapter("served")
    torch.testing.assert_close(logits(base.eval(), causal(1)[0]), logits(model, causal(1)[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_rslora", [True, False])
def test_every_program_that_reads_pefts_files_reads_a_saved_adapter_right(use_rslora: bool, tmp_path: Path) -> None:
    model = saved(tmp_path, use_rslora=use_rslora)
    for name in RULES:
        verdict = check_reader(tmp_path, name)
        assert (verdict.refused, verdict.fixable, verdict.rank) == ((), (), 8)
        found = logits(merged_as_by(name, tmp_path), causal(1)[0])
        torch.testing.assert_close(found, logits(model, causal(1)[0]), rtol=0, atol=1e-5)


def test_a_file_that_programs_would_scale_wrongly_is_rewritten_without_loss(tmp_path: Path) -> None:
    model = saved(tmp_path / "a", rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 64})
    wanted = logits(model, causal(1)[0])
    texts = {
        "vllm": r"^4 of 14 layers would be scaled wrongly, .* as model.layers.0.self_attn.q_proj by .*: vLLM before 0",
        "sglang": r"^4 of 14 layers would be .*: SGLang scales every layer by lora_alpha / r",
        "llama.cpp": r"^4 of 14 layers would be .*: llama.cpp scales each layer by lora_alpha over its own rank",
    }
    for name in RULES:
        verdict = check_reader(tmp_path / "a", name)
        assert re.match(texts[name], verdict.fixable[0])
        errors = write_for(tmp_path / "a", tmp_path / name, name)
        assert set(errors.values()) == {0.0}
        assert check_reader(tmp_path / name, name).fixable == ()
        torch.testing.assert_close(logits(merged_as_by(name, tmp_path / name), causal(1)[0]), wanted, rtol=0, atol=1e-5)
        stock = PeftModel.from_pretrained(llama(), tmp_path / name)
        torch.testing.assert_close(logits(stock, causal(1)[0]), wanted, rtol=0, atol=1e-5)
    assert "2 of 14 layers have another rank than r = 8, as" in check_reader(tmp_path / "a", "sglang").fixable[1]
    assert (logits(merged_as_by("llama.cpp", tmp_path / "a"), causal(1)[0]) - wanted).abs().max() > 1e-2


def test_an_adapter_of_an_earlier_version_with_rslora_is_mended(tmp_path: Path) -> None:
    model = adapted(llama(), ["q_proj"], init_lora_weights=False)
    model.save_pretrained(tmp_path / "a")  # as PEFT saves rsLoRA
    for name, wrong in {"sglang": True, "llama.cpp": True, "vllm": False}.items():
        assert bool(check_reader(tmp_path / "a", name).fixable) == wrong
        write_for(tmp_path / "a", tmp_path / name, name)
        found = logits(merged_as_by(name, tmp_path / name), causal(1)[0])
        torch.testing.assert_close(found, logits(model.eval(), causal(1)[0]), rtol=0, atol=1e-5)


def test_for_mlx_the_adapter_is_written_as_mlx_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path / "a", rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 64})
    argv = ["export", str(tmp_path / "a"), "--for", "mlx-lm"]
    assert main(argv) == 2
    assert "in the way: mlx-lm does not read PEFT's files, it has its own" in capsys.readouterr().out
    assert main([*argv, "--output", str(tmp_path / "b")]) == 0
    assert f"Use it with: mlx_lm.generate --model BASE --adapter-path {tmp_path / 'b'}" in capsys.readouterr().out
    found = logits(merged_as_by_mlx(tmp_path / "b"), causal(1)[0])
    torch.testing.assert_close(found, logits(model, causal(1)[0]), rtol=0, atol=1e-5)


def test_a_rank_that_vllm_does_not_allow_is_padded_or_compressed_to_one_it_does(tmp_path: Path) -> None:
    saved(tmp_path / "a", r=6)
    assert check_reader(tmp_path / "a", "vllm").rank == 16
    errors = write_for(tmp_path / "a", tmp_path / "padded", "vllm")
    assert json.loads((tmp_path / "padded" / "adapter_config.json").read_text())["r"] == 16
    assert set(errors.values()) == {0.0}
    errors = write_for(tmp_path / "a", tmp_path / "small", "vllm", 8)
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["r"] == 8
    assert 0 < max(errors.values()) < 0.5


def test_a_rank_above_the_largest_allowed_one_is_reported(tmp_path: Path) -> None:
    saved(tmp_path / "a", targets=["q_proj"])
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 1024}))
    assert "rank 1024: the largest --max-lora-rank is 512; give --rank" in check_reader(tmp_path / "a", "vllm").fixable


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A run's adapter of rank 8 that every program reads right."""
    lora = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj"], base_model_name_or_path="base")
    get_peft_model(llama(), lora).save_pretrained(tmp_path / "my run" / "adapter")
    return tmp_path / "my run" / "adapter"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora: DoRA is not supported"),
    (
        {"modules_to_save": ["lm_head"], "targets": ["q_proj"]},
        "modules_to_save: modules trained in full are not",
    ),
    ({"trainable_token_indices": [1, 2], "targets": ["q_proj"]}, "trainable_token_indices: trained tokens are not"),
]


@pytest.mark.parametrize(("lora", "message"), REFUSED)
def test_adapters_that_no_rewriting_can_fix_are_refused(lora: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path / "a", **lora)
    verdict = check_reader(tmp_path / "a", "vllm")
    assert message in verdict.refused[0]
    assert verdict.mergeable
    with pytest.raises(ValueError, match=f"vllm does not accept it, whatever its rank. {message}"):
        write_for(tmp_path / "a", tmp_path / "b", "vllm")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("program", "task", "advice"),
    [
        ("vllm", "SEQ_CLS", "`vllm serve FOLDER --runner pooling`"),
        ("vllm", "SEQ_2_SEQ_LM", "use it from Python, by lora_ga.load"),
        ("sglang", "SEQ_2_SEQ_LM", "use it from Python, by lora_ga.load"),
    ],
)
def test_adapters_for_a_task_that_a_program_does_not_serve_are_refused_with_another_way(
    program: str, task: str, advice: str, served: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = served / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "task_type": task}))
    assert main(["export", str(served), "--for", program]) == 2
    shown = capsys.readouterr().out
    assert f"in the way: {task}: " in shown
    assert advice in shown
    assert (f"Merge it: lora-ga export {shlex.quote(str(served))} --merge " in shown) == (task == "SEQ_CLS")


def test_a_chat_template_beside_the_adapter_is_in_the_command_that_serves_it(
    served: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (served / "chat_template.jinja").write_text("{{ messages }}")
    for program in ("vllm", "sglang", "llama.cpp"):
        assert main(["export", str(served), "--for", program]) == 0
        template = shlex.quote(str(served / "chat_template.jinja"))
        shown = capsys.readouterr().out
        assert shown.endswith(f" --chat-template {template}\n") == (program != "llama.cpp")


def test_biases_are_refused(tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {"bias": {"bias": "lora_only"}, "lora_bias": {"lora_bias": True}}
    for name, settings in cases.items():
        model = adapted(bert(), ["query"], **settings)
        lora_ga.initialize(model, classified())
        model.save_pretrained(tmp_path / name)
        assert name in check_reader(tmp_path / name, "vllm").refused[0]


def test_the_command_reports_the_obstacles_and_writes_an_adapter_that_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "good")
    assert main(["export", str(tmp_path / "good"), "--for", "vllm"]) == 0
    served = f"--enable-lora --max-lora-rank 8 --lora-modules good={tmp_path / 'good'}"
    assert f"nothing is in the way. Use it with: vllm serve BASE {served}\n" in capsys.readouterr().out
    config = tmp_path / "good" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "my base"}))
    assert main(["export", str(tmp_path / "good"), "--for", "vllm"]) == 0
    assert f"Use it with: vllm serve 'my base' {served}\n" in capsys.readouterr().out
    saved(tmp_path / "a", r=5, alpha_pattern={"q_proj": 1})
    argv = ["export", str(tmp_path / "a"), "--for", "vllm"]
    assert main(argv) == 2
    shown = capsys.readouterr().out
    assert "in the way: 2 of 14 layers would be scaled wrongly" in shown
    assert "not read right by vllm as it is. Write one that is: lora-ga export " in shown
    assert main([*argv, "--output", str(tmp_path / "b"), "--rank", "8"]) == 0
    shown = capsys.readouterr().out
    assert "b: rank 8; median error " in shown
    assert "b: nothing is in the way" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--for", "tgi"],
            "--for tgi: the rules of this program are not known; known are vllm, sglang, llama.cpp, mlx-lm. PEFT, Tra",
        ),
        (["--for", "vllm", "--merge"], "--for checks adapters, and --merge makes a full model"),
        (["--for", "vllm", "--rank", "8"], "--rank was given with --for, but no --output to write to"),
        (
            ["--for", "vllm", "--rank", "7", "--output", "out"],
            "--rank 7: vllm allows 1, 8, 16, 32, 64, 128, 256, 320, 512",
        ),
    ],
)
def test_invalid_options_of_an_export_for_a_server_are_refused(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "a", targets=["q_proj"])
    assert main(["export", "a", *argv]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
