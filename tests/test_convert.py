"""The conversion of runs of PEFT's own LoRA-GA to adapters for the original base."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file

from lora_ga.cli.main import main
from lora_ga.export.convert import convert_run
from toys import adapted, bert, causal, classified, gpt2, llama, logits, train

WEIGHTS = "adapter_model.safetensors"


@dataclasses.dataclass
class OldRun:
    """A run of PEFT's LoRA-GA, on a changed base: its initial and final adapter on disk, and the trained model."""

    init: Path
    final: Path
    model: Any


def old_run(folder: Path, make: Callable[[], Any], batches: list[Any], targets: list[str], **lora: Any) -> OldRun:
    base = make()
    lora_bias = lora.pop("lora_bias", False)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": targets} | lora
    config = LoraConfig(**settings, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    config.lora_bias = lora_bias  # PEFT's constructor refuses it with LoRA-GA; the authors' fork does not

    def train_step() -> None:
        for batch in batches:
            base(**batch).loss.backward()

    preprocess_loraga(base, config, train_step)
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
