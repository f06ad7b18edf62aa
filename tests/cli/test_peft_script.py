"""The example script with PEFT's flow runs, and its start is aligned."""

import ast
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_script
from bench_alignment import alignment_ratios, gradients

from .conftest import text


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text(" ".join(text(number, 12) for number in range(60)), encoding="utf-8")
    return path


def test_the_script_trains_and_saves_an_adapter_for_the_original_base(llama: Path, notes: Path, tmp_path: Path) -> None:
    argv = [f"--model={llama}", f"--train_file={notes}", f"--output_dir={tmp_path / 'out'}", "--rank=2", "--length=12"]
    peft_script.main([*argv, "--max_steps=4", "--learning_rate=1e-3"])
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "out")
    assert stock.peft_config["default"].r == 4
    ids = torch.arange(5, 12)[None]
    assert not torch.equal(stock(ids).logits, AutoModelForCausalLM.from_pretrained(llama)(ids).logits)


def test_the_scripts_start_is_aligned(llama: Path, notes: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    examples = peft_script.examples_of(tokenizer, notes.read_text(), 12)
    batches = peft_script.estimate_batches(examples, 4)
    truth = gradients(AutoModelForCausalLM.from_pretrained(llama).double(), batches)
    model = peft_script.adapt(AutoModelForCausalLM.from_pretrained(llama).double(), batches, 2)
    ratios = alignment_ratios(model, truth, batches, 2)
    assert len(ratios) == 14
    assert min(ratios.values()) > 0.999


def test_the_script_imports_lora_ga_compat_in_place_of_peft() -> None:
    tree = ast.parse(Path(peft_script.__file__).read_text(encoding="utf-8"))
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert modules.count("lora_ga.compat") == 1
    assert "peft" not in modules
