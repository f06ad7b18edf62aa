"""vLLM: which saved adapters it serves, and how the others are rewritten. Also stock PEFT and Transformers' loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import lora_ga
from lora_ga.cli.main import main
from lora_ga.export.vllm import VLLM_RANKS, check_served, write_served
from toys import adapted, bert, causal, classified, llama, logits, saved


def merged_as_by_vllm(folder: Path) -> Any:
    """Add the adapter to the base as vLLM does: B A of every layer times one scaling, from r and lora_alpha."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] in VLLM_RANKS
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    tensors, base = load_file(folder / "adapter_model.safetensors"), llama()
    with torch.no_grad():
        for key, a in tensors.items():
            if key.endswith(".lora_A.weight"):
                assert len(a) <= config["r"]
                layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                base.get_submodule(layer).weight += scaling * tensors[key.replace("lora_A", "lora_B")] @ a
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
def test_a_plain_adapter_is_served_as_it_is(use_rslora: bool, tmp_path: Path) -> None:
    model = saved(tmp_path, use_rslora=use_rslora)
    verdict = check_served(tmp_path, "vllm")
    assert (verdict.refused, verdict.fixable, verdict.rank) == ((), (), 8)
    served = logits(merged_as_by_vllm(tmp_path), causal(1)[0])
    torch.testing.assert_close(served, logits(model, causal(1)[0]), rtol=0, atol=1e-5)


def test_patterns_that_vllm_would_scale_wrongly_are_rewritten_without_loss(tmp_path: Path) -> None:
    model = saved(tmp_path / "a", rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 64})
    verdict = check_served(tmp_path / "a", "vllm")
    assert "rank_pattern, alpha_pattern: vLLM scales every layer by r" in verdict.fixable[0]
    wanted = logits(model, causal(1)[0])
    assert (logits(merged_as_by_vllm(tmp_path / "a"), causal(1)[0]) - wanted).abs().max() > 1e-2
    errors = write_served(tmp_path / "a", tmp_path / "b", "vllm")
    assert set(errors.values()) == {0.0}
    assert check_served(tmp_path / "b", "vllm").fixable == ()
    torch.testing.assert_close(logits(merged_as_by_vllm(tmp_path / "b"), causal(1)[0]), wanted, rtol=0, atol=1e-5)
    stock = PeftModel.from_pretrained(llama(), tmp_path / "b")
    torch.testing.assert_close(logits(stock, causal(1)[0]), wanted, rtol=0, atol=1e-5)


def test_a_rank_that_vllm_does_not_allow_is_padded_or_compressed_to_one_it_does(tmp_path: Path) -> None:
    saved(tmp_path / "a", r=6)
    assert check_served(tmp_path / "a", "vllm").rank == 16
    errors = write_served(tmp_path / "a", tmp_path / "padded", "vllm")
    assert json.loads((tmp_path / "padded" / "adapter_config.json").read_text())["r"] == 16
    assert set(errors.values()) == {0.0}
    errors = write_served(tmp_path / "a", tmp_path / "small", "vllm", 8)
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["r"] == 8
    assert 0 < max(errors.values()) < 0.5


def test_a_rank_above_the_largest_allowed_one_is_reported(tmp_path: Path) -> None:
    saved(tmp_path / "a", targets=["q_proj"])
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 1024}))
    assert "rank 1024: the largest --max-lora-rank is 512; give --rank" in check_served(tmp_path / "a", "vllm").fixable


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora: DoRA is not supported"),
    (
        {"modules_to_save": ["lm_head"], "targets": ["q_proj"]},
        "modules_to_save: modules trained in full are not",
    ),
    ({"trainable_token_indices": [1, 2], "targets": ["q_proj"]}, "trainable_token_indices: trained tokens need"),
]


@pytest.mark.parametrize(("lora", "message"), REFUSED)
def test_adapters_that_no_rewriting_can_fix_are_refused(lora: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path / "a", **lora)
    assert message in check_served(tmp_path / "a", "vllm").refused[0]
    with pytest.raises(ValueError, match=f"vllm does not accept it, whatever its rank. {message}"):
        write_served(tmp_path / "a", tmp_path / "b", "vllm")
    assert not (tmp_path / "b").exists()


def test_biases_are_refused(tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {"bias": {"bias": "lora_only"}, "lora_bias": {"lora_bias": True}}
    for name, settings in cases.items():
        model = adapted(bert(), ["query"], **settings)
        lora_ga.initialize(model, classified())
        model.save_pretrained(tmp_path / name)
        assert name in check_served(tmp_path / name, "vllm").refused[0]


def test_the_command_reports_the_obstacles_and_writes_an_adapter_that_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "good")
    assert main(["export", str(tmp_path / "good"), "--for", "vllm"]) == 0
    assert "nothing is in the way. Serve it with: vllm serve BASE --enable-lora --max-lora-rank 8" in (
        capsys.readouterr().out
    )
    saved(tmp_path / "a", r=5, alpha_pattern={"q_proj": 1})
    argv = ["export", str(tmp_path / "a"), "--for", "vllm"]
    assert main(argv) == 2
    shown = capsys.readouterr().out
    assert "in the way: rank_pattern, alpha_pattern" in shown
    assert "not served by vllm as it is. Write one that is: lora-ga export " in shown
    assert main([*argv, "--output", str(tmp_path / "b"), "--rank", "8"]) == 0
    shown = capsys.readouterr().out
    assert "b: rank 8; median error " in shown
    assert "b: nothing is in the way" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--for", "tgi"], "--for tgi: the rules of this server are not known; known are vllm."),
        (["--for", "vllm", "--merge"], "--for checks adapters, and --merge makes a full model"),
        (["--for", "vllm", "--rank", "8"], "--rank was given with --for, but no --output to write to"),
        (
            ["--for", "vllm", "--rank", "7", "--output", "out"],
            "--rank 7: vllm allows 8, 16, 32, 64, 128, 256, 320, 512",
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
