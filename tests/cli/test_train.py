"""`lora-ga train` on small models: what it writes, that it learns, and what it refuses."""

import ast
import json
import math
import random
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForSequenceClassification,
    TrainingArguments,
    set_seed,
)

import lora_ga
import peft_script
from bench_alignment import alignment_ratios, gradients
from lora_ga.cli import data as reading
from lora_ga.cli import finetune, tasks
from lora_ga.cli.data import EstimateBatches, Labels
from lora_ga.cli.finetune import optimizer_steps, training_arguments
from lora_ga.cli.main import main
from lora_ga.cli.models import device, load_base, load_tokenizer
from lora_ga.cli.options import EstimateOptions, ModelOptions
from lora_ga.cli.train import parse
from lora_ga.experiments.records.runs import load_run
from lora_ga.version import dtype_setting
from toys import FUSED_EXPERTS

from .conftest import VOCABULARY, save_tokenizer, text, write_rows

QUICK = {"rank": 2, "estimate_batches": 2, "max_steps": 6, "logging_steps": 2, "learning_rate": 3e-3, "warmup_ratio": 0}


def command(model: Path, data: Path | None, out: Path, /, **options: object) -> list[object]:
    given = {"task": "seq-cls", **QUICK, "model": model, "train_file": data, "output_dir": out, **options}
    return ["train", *(f"--{name}={value}" for name, value in given.items() if value is not None)]


def run(*argv: object, **options: Any) -> dict[str, Any]:
    """Trains, and returns the record."""
    assert main([str(argument) for argument in command(*argv, **options)]) == 0  # type: ignore[arg-type]
    record: dict[str, Any] = json.loads((Path(str(argv[2])) / "run.json").read_text())
    return record


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["lora-ga", "lora", "full"])
@pytest.mark.parametrize(
    ("task", "model", "columns"),
    [
        ("seq-cls", "bert", {}),
        ("causal-lm", "llama", {}),
        ("causal-lm", "llama", {"prompt_column": "prompt", "target_column": "target"}),
        ("seq2seq", "t5", {"prompt_column": "prompt", "target_column": "target"}),
    ],
)
def test_every_method_learns_every_task(
    method: str, task: str, model: str, columns: dict[str, str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if task == "causal-lm" and columns:
        pytest.importorskip("trl", reason="install the extra 'trl' to run this test")
    data = request.getfixturevalue("labelled_texts" if task == "seq-cls" else "prompts")
    folder = request.getfixturevalue(model)
    # At the rate of full fine-tuning, twelve steps of a LoRA change the loss less than it varies between batches.
    rate = QUICK["learning_rate"] if method == "full" else 1e-2
    options = {"method": method, "task": task, "max_steps": 12, "eval_file": data, "learning_rate": rate, **columns}
    record = run(folder, data, tmp_path / "run", **options)
    losses = [point["loss"] for point in record["curve"]]
    assert losses[-1] < losses[0]
    assert record["metrics"]["train_loss"] == pytest.approx(np.mean(losses))
    assert [point["step"] for point in record["eval"]] == [12]
    assert record["metrics"]["eval_loss"] < losses[0]
    assert (tmp_path / "run" / "estimate.safetensors").exists() == (method == "lora-ga")


def test_the_record_and_the_folder_hold_what_comparisons_read(bert: Path, labelled_texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    record = run(bert, labelled_texts, out, eval_file=labelled_texts, eval_steps=3, run_name="first", seed=5)
    found = load_run(out)
    assert (found.name, found.method, found.task, found.seed, found.steps) == ("first", "lora-ga", "seq-cls", 5, 6)
    assert (found.learning_rate, found.rank, found.alpha) == (3e-3, 2, 16.0)
    assert (found.model, found.dataset, found.device) == (str(bert), str(labelled_texts), "cpu")
    assert [step for step, _ in found.curve] == [2, 4, 6]
    assert [point["step"] for point in record["eval"]] == [3, 6]
    assert set(record["metrics"]) == {"eval_loss", "eval_accuracy", "train_loss"}
    assert set(record["versions"]) == {"lora_ga", "torch", "transformers", "peft"}
    assert record["config"]["estimate_batches"] == 2
    seconds = record["seconds"]
    assert 0 < seconds["estimate"] < seconds["total"]
    assert 0 < seconds["train"] < seconds["total"]
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    # Half of a saved LoRA-GA factor is its start. The head trains in full and is saved once.
    trained = sum(tensor.numel() // (2 if "lora_" in name else 1) for name, tensor in saved.items())
    assert record["trainable_parameters"] == trained
    assert AutoTokenizer.from_pretrained(out / "adapter")("a b")["input_ids"] == [3, *map(VOCABULARY.get, "ab"), 4]
    # Six layers in each of the two blocks, and the pooler.
    assert len(lora_ga.GradientEstimate.load(out / "estimate.safetensors")) == 13
    assert not any(path.name.startswith(".") for path in out.rglob("*"))


def test_full_fine_tuning_has_no_rank(bert: Path, labelled_texts: Path, tmp_path: Path) -> None:
    record = run(bert, labelled_texts, tmp_path / "run", method="full")
    assert (record["rank"], record["alpha"]) == (None, None)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert record["trainable_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert model.config.id2label == {0: "bad", 1: "good"}


def test_the_saved_config_repeats_the_run(llama: Path, prompts: Path, tmp_path: Path) -> None:
    first = run(llama, prompts, tmp_path / "first", task="causal-lm", use_rslora=False)
    replay = ["train", "--config", str(tmp_path / "first" / "config.yaml"), "--output_dir", str(tmp_path / "second")]
    assert main(replay) == 0
    second = json.loads((tmp_path / "second" / "run.json").read_text())
    assert second["curve"] == first["curve"]
    for file in ("adapter/adapter_model.safetensors", "estimate.safetensors"):
        assert_same_tensors(tmp_path / "first" / file, tmp_path / "second" / file)


def test_the_config_file_holds_every_option(llama: Path, prompts: Path, tmp_path: Path) -> None:
    record = run(llama, prompts, tmp_path / "run", task="causal-lm", learning_rate=None, method="lora")
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved == record["config"]
    assert saved["learning_rate"] == 2e-4


def test_the_estimate_of_an_earlier_run_gives_the_same_adapter(llama: Path, prompts: Path, tmp_path: Path) -> None:
    run(llama, prompts, tmp_path / "first", task="causal-lm")
    run(llama, prompts, tmp_path / "second", task="causal-lm", estimate_file=tmp_path / "first")
    for name in ("adapter/adapter_model.safetensors", "estimate.safetensors"):
        assert_same_tensors(tmp_path / "first" / name, tmp_path / "second" / name)


@pytest.mark.parametrize("method", ["lora-ga", "lora"])
def test_an_adapter_is_trained_further_from_where_it_was(
    method: str, bert: Path, labelled_texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, still, further, again = (tmp_path / name for name in ("first", "still", "further", "again"))
    run(bert, labelled_texts, first, method=method, alpha=4, eval_file=labelled_texts)
    own = {"method": method, "rank": None, "estimate_batches": None, "from_adapter": first, "eval_file": labelled_texts}
    record = run(bert, labelled_texts, still, **{**own, "learning_rate": 1e-30, "max_steps": 1})
    assert (record["rank"], record["alpha"], record["config"]["use_rslora"]) == (2, 4.0, True)
    before, after = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first, still))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-9) for name in before)
    if method == "lora-ga":
        assert_same_tensors(first / "adapter" / "lora_ga.safetensors", still / "adapter" / "lora_ga.safetensors")
    assert not (still / "estimate.safetensors").exists()
    capsys.readouterr()
    run(bert, labelled_texts, further, **{**own, "rank": 4, "save_steps": 3, "learning_rate": 1e-2})
    assert "warning: --rank: no effect with --from_adapter.\n" in capsys.readouterr().err
    trained = load_file(further / "adapter" / "adapter_model.safetensors")
    assert not any(torch.allclose(before[name], trained[name], atol=1e-6) for name in before if "lora_B" in name)
    # A run that was interrupted at step 3 needs the first adapter no more.
    shutil.copytree(further, again)
    (again / "run.json").unlink()
    for folder in (again / "adapter", again / "checkpoints" / "checkpoint-6"):
        shutil.rmtree(folder)
    shutil.rmtree(first)
    assert main(["train", "--resume", "--output_dir", str(again)]) == 0
    name = "adapter/adapter_model.safetensors"
    assert_same_tensors(further / name, again / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "full"}, "--from_adapter trains an adapter further, but the method is full."),
        ({"estimate_file": "run"}, "--estimate_file starts a new adapter, --from_adapter has its start."),
        ({"from_adapter": "ru"}, "--from_adapter ru: there is no adapter (no adapter_config.json). Did you mean run?"),
        ({"method": "lora"}, "it trains as LoRA-GA (lora_ga.safetensors). Leave --method lora out."),
        (
            {"from_adapter": "plain"},
            "plain/adapter: it has no lora_ga.safetensors, the file with the start of LoRA-GA.",
        ),
        (
            {"model": "wider"},
            "trained on another base model: bert.encoder.layer.0.intermediate.dense is 48 x 32 there, and",
        ),
        (
            {"train_file": "others.jsonl"},
            "its classes are bad, good, those of the data bad, fine. Give data with the same",
        ),
        ({"from_adapter": "chat"}, "--from_adapter chat: it was trained for --task causal-lm, but --task is seq-cls."),
    ],
)
def test_an_adapter_that_cannot_be_trained_further_is_refused(
    options: dict[str, Any],
    message: str,
    bert: Path,
    labelled_texts: Path,
    tmp_path: Path,
    error_of: Callable[[list[object]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run(bert, labelled_texts, Path("run"), max_steps=1)
    if options.get("from_adapter") == "plain":
        run(bert, labelled_texts, Path("plain"), max_steps=1, method="lora")
    if options.get("from_adapter") == "chat":
        file = Path(shutil.copytree("run", "chat")) / "adapter" / "adapter_config.json"
        file.write_text(file.read_text().replace("SEQ_CLS", "CAUSAL_LM"))
    if "model" in options:
        config = BertConfig.from_pretrained(bert, intermediate_size=40)
        BertForSequenceClassification(config).bert.save_pretrained("wider")
        save_tokenizer(Path("wider"), template="[CLS] $A [SEP]")
    Path("others.jsonl").write_text(labelled_texts.read_text().replace("good", "fine"))
    given = {"from_adapter": "run", "model": bert, "train_file": labelled_texts, **options}
    assert message in error_of(command(given.pop("model"), given.pop("train_file"), Path("new"), **given))
    assert not Path("new").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora-ga", "lora"])
def test_the_adapter_works_with_stock_peft_on_the_original_base(
    method: str, dtype: str, bert: Path, labelled_texts: Path, tmp_path: Path
) -> None:
    record = run(bert, labelled_texts, tmp_path / "run", method=method, dtype=dtype, eval_file=labelled_texts)
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2, **dtype_setting(torch.float32))
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    rows = [json.loads(line) for line in labelled_texts.read_text().splitlines()]
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([["bad", "good"].index(row["label"]) for row in rows])
    with torch.no_grad():
        found = model(**batch, labels=labels)
    assert found.loss.item() == pytest.approx(record["metrics"]["eval_loss"], abs=1e-5 if dtype == "float32" else 1e-2)
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    # Transformers loads the base and the adapter from the adapter's folder alone.
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "adapter").eval()
    with torch.no_grad():
        assert whole(**batch, labels=labels).loss.item() == pytest.approx(found.loss.item(), abs=1e-6)
    assert json.loads((tmp_path / "run" / "adapter" / "labels.json").read_text()) == {"0": "bad", "1": "good"}


def test_full_fine_tuning_keeps_float32_weights_in_mixed_precision(
    bert: Path, labelled_texts: Path, tmp_path: Path
) -> None:
    run(bert, labelled_texts, tmp_path / "run", method="full", dtype="bfloat16")
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize("method", ["lora-ga", "lora"])
def test_a_head_of_any_name_trains_in_full_and_is_not_adapted(
    method: str, labelled_texts: Path, tmp_path: Path
) -> None:
    set_seed(0)
    config = T5Config(
        vocab_size=len(VOCABULARY),
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=1,
        num_heads=2,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    T5ForSequenceClassification(config).transformer.save_pretrained(tmp_path / "t5")
    save_tokenizer(tmp_path / "t5", template="$A </s>")
    run(tmp_path / "t5", labelled_texts, tmp_path / "run", method=method, eval_file=labelled_texts)
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    head = {name.rpartition("classification_head.")[2] for name in saved if "classification_head" in name}
    assert head == {"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"}


def test_a_trained_head_is_replaced_if_the_data_has_other_classes(
    bert: Path, labelled_texts: Path, tmp_path: Path
) -> None:
    run(bert, labelled_texts, tmp_path / "two", method="full", max_steps=1)
    rows = [
        json.loads(line) | {"label": number % 3} for number, line in enumerate(labelled_texts.read_text().splitlines())
    ]
    three = write_rows(tmp_path / "three.jsonl", rows)
    run(tmp_path / "two" / "model", three, tmp_path / "three", method="full", max_steps=1)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "three" / "model").num_labels == 3


def test_gradient_checkpointing_does_not_change_the_losses(llama: Path, prompts: Path, tmp_path: Path) -> None:
    plain = run(llama, prompts, tmp_path / "plain", task="causal-lm")
    saving = run(llama, prompts, tmp_path / "saving", task="causal-lm", gradient_checkpointing=True)
    assert [p["loss"] for p in saving["curve"]] == pytest.approx([p["loss"] for p in plain["curve"]], rel=1e-5)


def test_hub_data_gives_the_same_run_as_a_file(
    llama: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_file = run(llama, prompts, tmp_path / "file", task="causal-lm")
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    monkeypatch.setattr(reading, "load_dataset", lambda name, config, split: Dataset.from_list(rows))
    from_hub = run(
        llama, None, tmp_path / "hub", task="causal-lm", dataset="o/d", dataset_config="c", eval_split="validation"
    )
    assert from_hub["curve"] == from_file["curve"]
    assert from_hub["dataset"] == "o/d/c (train)"
    assert from_hub["metrics"]["eval_loss"] > 0


def test_estimation_batches_follow_their_seed_and_leave_the_global_random_state_unchanged() -> None:
    examples = Dataset.from_dict({"x": list(range(50))})
    options = EstimateOptions(estimate_batches=3, estimate_batch_size=4)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    batches = EstimateBatches(examples, lambda rows: [row["x"] for row in rows], options, 8, seed=1)
    seen = list(batches)
    flat = [number for batch in seen for number in batch]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index]
    assert seen == list(batches)
    assert (len(batches), [len(batch) for batch in seen]) == (3, [4, 4, 4])
    assert len(set(flat)) == 12
    assert flat != sorted(flat)
    other = EstimateBatches(examples, lambda rows: [row["x"] for row in rows], options, 8, seed=2)
    assert seen != list(other)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(
    llama: Path, prompts: Path, tmp_path: Path, error_of: Callable[[list[object]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, made = torch.optim.AdamW.step, []

    def breaks(self: torch.optim.AdamW, *given: Any) -> Any:
        found = step(self, *given)
        made.append(found)
        if next(iter(self.state.values()))["step"] == 3:
            for parameter in self.param_groups[0]["params"]:
                parameter.data.fill_(math.nan)  # of one alone, attention on some CPUs makes a finite loss
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", breaks)
    argv = command(llama, prompts, tmp_path / "run", task="causal-lm", save_steps=2, max_steps=8, logging_steps=1)
    message = error_of(argv)
    assert len(made) == 4
    assert "the training loss is nan at step 4, so training has stopped and no result was written." in message
    assert f"The last good checkpoint is {tmp_path / 'run' / 'checkpoints' / 'checkpoint-2'}" in message
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"checkpoint-2"}
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "run.json").exists()


def test_no_checkpoint_is_written_after_a_gradient_that_is_not_finite(
    llama: Path, prompts: Path, tmp_path: Path, error_of: Callable[[list[object]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = iter([1.0, math.nan])
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *_, **__: torch.tensor(next(norms)))
    argv = command(llama, prompts, tmp_path / "run", task="causal-lm", save_steps=1, max_steps=4, logging_steps=5)
    message = error_of(argv)
    assert "the norm of the gradient is nan at step 2, so training has stopped and no result was written." in message
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"checkpoint-1"}


@pytest.mark.parametrize("method", ["lora-ga", "full"])
@pytest.mark.parametrize(("task", "model"), [("seq-cls", "bert"), ("causal-lm", "llama"), ("seq2seq", "t5")])
def test_the_end_of_a_run_says_what_took_the_time_and_gives_commands_that_work(
    method: str,
    task: str,
    model: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = request.getfixturevalue("labelled_texts" if task == "seq-cls" else "prompts")
    columns = {"prompt_column": "prompt", "target_column": "target"} if task == "seq2seq" else {}
    folder = tmp_path / "my run"
    run(request.getfixturevalue(model), data, folder, task=task, method=method, max_steps=1, **columns)
    shown, said = capsys.readouterr()
    warning = "warning: --rank, --estimate_batches: no effect for --method full.\n"
    assert (warning in said, "no effect" in said) == (method == "full", method == "full")
    parts = "estimate, " if method == "lora-ga" else ""
    assert re.search(rf": 1 steps in \d+ s \(.*{parts}\d+ s training, \d+ s loading, evaluation and saving\), ", shown)
    commands = [shlex.split(line) for line in shown.splitlines() if line.startswith("  ")]
    assert [words[0] for words in commands] == ["python", *["lora-ga"] * (method != "full"), commands[-1][0]]
    exec(commands[0][2], {})  # python -c CODE
    result = folder / ("model" if method == "full" else "adapter")
    card = (result / "README.md").read_text()
    assert "More Information Needed" not in card
    facts = [f"| training data | `{data}` |", "| learning rate | 0.003, cosine |", "| train_loss | "]
    assert [fact for fact in facts if fact not in card] == []
    assert commands[0][2].replace("; ", "\n") in card
    assert ("## LoRA-GA start" in card, card.startswith("---\n")) == (method == "lora-ga", method == "lora-ga")
    assert len(capsys.readouterr().out) > 0
    for words in commands[1:]:
        if words[0] == "lora-ga":
            assert main(words[1:]) == 0
    if task == "causal-lm" and method != "full":
        served = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"my-run={folder / 'adapter'}"]
        assert commands[-1] == ["vllm", "serve", str(request.getfixturevalue(model)), *served]


@pytest.mark.parametrize(("task", "model"), [("seq-cls", "bert"), ("causal-lm", "llama")])
def test_a_base_in_4_bits_trains_resumes_and_merges(
    task: str, model: str, request: pytest.FixtureRequest, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    pytest.importorskip("bitsandbytes", reason="install the extra 'dev' to run this test")
    data = request.getfixturevalue("labelled_texts" if task == "seq-cls" else "prompts")
    folder, labels = request.getfixturevalue(model), Labels(("bad", "good"), {}) if task == "seq-cls" else None
    base = load_base(
        ModelOptions(model=str(folder), task=task, load_in_4bit=True),  # type: ignore[arg-type]
        tasks.TASK_CLASSES[task].model_class,
        load_tokenizer(str(folder)),
        labels,
    )
    kinds = {name.rpartition(".")[2]: type(module).__name__ for name, module in base.named_modules()}
    assert (kinds["query" if labels else "q_proj"], kinds["classifier" if labels else "lm_head"]) == (
        "Linear4bit",
        "Linear",
    )
    given: dict[str, Any] = {"task": task, "load_in_4bit": True, "save_steps": 3, "logging_steps": 1}
    record = run(folder, data, tmp_path / "run", **given)
    assert record["curve"][-1]["loss"] < record["curve"][0]["loss"]
    first = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
    assert main(["train", "--resume", f"--output_dir={tmp_path / 'run'}"]) == 0
    again = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert main(["export", str(tmp_path / "run"), "--merge", f"--output={tmp_path / 'merged'}"]) == 0
    argv = command(folder, data, tmp_path / "full", method="full", **given)
    assert "--load_in_4bit freezes the weights, but --method full trains them" in error_of(argv)
    argv = command(folder, data, tmp_path / "shifted", offset="base", **given)
    assert "--offset base changes the base model's weights, which --load_in_4bit quantises. Leave" in error_of(argv)
    assert (
        main([str(each) for each in command(folder, data, tmp_path / "lora", method="lora", offset="base", **given)])
        == 0
    )


def test_bitsandbytes_packs_no_weight_before_during_or_after_training(
    llama: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = pytest.importorskip("bitsandbytes.nn.modules", reason="install the extra 'dev' to run this test")
    packed: list[torch.Tensor] = []
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)  # as on CPUs for which it packs
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", lambda weight, state: packed.append(weight))
    given: dict[str, Any] = {"task": "causal-lm", "load_in_4bit": True, "eval_file": prompts, "save_steps": 3}
    record = run(llama, prompts, tmp_path / "run", **given)
    assert record["metrics"]["eval_loss"] > 0
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
    assert main(["train", "--resume", f"--output_dir={tmp_path / 'run'}"]) == 0
    assert packed == []


def test_a_short_run_estimates_on_fewer_batches(
    llama: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(llama, prompts, tmp_path / "run", task="causal-lm", estimate_batches=None, batch_size=2, max_steps=3)
    assert lora_ga.GradientEstimate.load(tmp_path / "run" / "estimate.safetensors").batches == 8
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["estimate_batches"] == "auto"


def test_auto_finds_a_rate_and_the_saved_config_repeats_the_run_with_it(
    bert: Path, labelled_texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"learning_rate": "auto", "max_steps": 60, "batch_size": 4, "logging_steps": 20}
    found = run(bert, labelled_texts, tmp_path / "auto", **options)
    rate = found["learning_rate"]
    assert rate not in (2e-4, QUICK["learning_rate"])
    assert f"learning rate {rate:g} for 60 steps" in caplog.text
    again = run(bert, labelled_texts, tmp_path / "again", **options | {"learning_rate": rate})
    assert [point["loss"] for point in again["curve"]] == [point["loss"] for point in found["curve"]]
    assert again["config"]["learning_rate"] == found["config"]["learning_rate"] == rate


def test_auto_takes_the_default_in_a_short_run(
    bert: Path, labelled_texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = run(bert, labelled_texts, tmp_path / "run", learning_rate="auto", method="lora")
    assert found["learning_rate"] == 2e-4
    assert "6 steps are too few to look for a learning rate" in caplog.text


def test_auto_reads_batches_for_all_groups_of_a_longer_run(
    bert: Path,
    labelled_texts: Path,
    tmp_path: Path,
    error_of: Callable[[list[object]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def counted(model: Any, batches: Any, steps: int, **options: Any) -> float:
        raise ValueError(f"{len(list(batches))} batches for {steps} steps")

    monkeypatch.setattr(lora_ga, "find_rate", counted)
    options = {"learning_rate": "auto", "max_steps": 400, "batch_size": 1, "gradient_accumulation_steps": 2}
    assert "32 batches for 400 steps" in error_of(command(bert, labelled_texts, tmp_path / "run", **options))


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"max_steps": 7}, 7), ({"epochs": 2.0}, 10), ({"epochs": 0.5, "gradient_accumulation_steps": 2}, 2)],
)
def test_the_steps_of_a_run_are_those_of_the_trainer(
    options: dict[str, Any], steps: int, llama: Path, prompts: Path, tmp_path: Path
) -> None:
    given = {"task": "causal-lm", "batch_size": 8, "max_steps": None, "method": "lora"} | options
    assert run(llama, prompts, tmp_path / "run", **given)["steps"] == steps
    argv = command(llama, prompts, tmp_path / "new", **given)
    assert optimizer_steps(parse([str(argument) for argument in argv[1:]])[0], examples=40) == steps


def test_an_output_folder_that_is_not_empty_is_refused(
    bert: Path, labelled_texts: Path, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    assert "the folder is not empty. Give a new one." in error_of(command(bert, labelled_texts, tmp_path / "run"))
    assert "this is a file. Give a new folder" in error_of(command(bert, labelled_texts, labelled_texts))
    (tmp_path / "run" / "notes.txt").unlink()
    assert parse([str(argument) for argument in command(bert, labelled_texts, tmp_path / "run")[1:]])[1] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "txt"}, "there is no column 'txt' (--text_column); its columns are text, label."),
        ({"train_file": "none.jsonl"}, "none.jsonl: there is no such data file."),
        ({"train_file": "none.doc"}, "none.doc: a data file ends in .jsonl, .json, .csv, .tsv, .parquet"),
        ({"model": "/none"}, "--model /none: there is no folder /none."),
        (
            {"model": "no/ne"},
            "--model no/ne: there is no folder no/ne. As a name on the hub it is not among the models fetched before, "
            "and the hub was not reached (HF_HUB_OFFLINE is set).",
        ),
        (
            {"target_modules": "nothing"},
            "--target_modules nothing: the model has no layer of this name. It has word_embeddings (1 Embedding), "
            "position_embeddings (1 Embedding), token_type_embeddings (1 Embedding), query (2 Linear)",
        ),
        (
            {"target_modules": "query,value"},
            "names are separated by spaces, not commas: --target_modules query value",
        ),
        ({"rank": 17}, "17"),
        ({"report_to": "paper"}, "--report_to paper: not installed or not known. Available here are none, all"),
        ({"estimate_file": "none.safetensors"}, "none.safetensors"),
        ({"task": "causal-lm", "text_pair_column": "label"}, "--text_pair_column belongs to --task seq-cls"),
    ],
)
def test_an_impossible_request_is_refused_and_nothing_is_written(
    options: dict[str, Any],
    message: str,
    bert: Path,
    labelled_texts: Path,
    tmp_path: Path,
    error_of: Callable[[list[object]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert message in error_of(command(bert, labelled_texts, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_rank_that_some_layers_are_too_small_for_is_refused_with_options_that_help(
    llama: Path, prompts: Path, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    given: dict[str, Any] = {"task": "causal-lm", "max_steps": 1}
    message = error_of(command(llama, prompts, tmp_path / "run", **given, rank=12))
    assert (
        "\nGive --rank 8, leave them out of --target_modules, or set --on_missing lora to start them as plain LoRA.\n"
        in message
    )
    run(llama, prompts, tmp_path / "lower", **given, rank=8)
    run(llama, prompts, tmp_path / "plain", **given, rank=12, on_missing="lora")


@FUSED_EXPERTS
def test_parameters_that_are_no_layers_are_adapted_by_name(
    prompts: Path, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 2}
    tokens = {"vocab_size": len(VOCABULARY), "bos_token_id": None, "eos_token_id": VOCABULARY["</s>"]}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads, **tokens)).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", pad=False)
    named = ["--target_modules", "q_proj", "--target_parameters", "experts.gate_up_proj"]
    argv = [*command(tmp_path / "base", prompts, tmp_path / "run", task="causal-lm"), *named]
    wrong = (
        "--target_parameters experts.up_proj: the model has no parameter of this name. Those that are no weights of "
    )
    assert f"{wrong}layers: experts.gate_up_proj, experts.down_proj." in error_of([*argv[:-1], "experts.up_proj"])
    assert main([*map(str, argv), "experts.down_proj"]) == 0
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    experts = [name for name in saved if ".mlp.experts." in name]
    assert len(experts) == 4
    assert len(saved) == 6  # A and B of q_proj and of both parameters; none of the router
    assert all(saved[name].any() for name in saved)


def test_an_adapter_in_the_place_of_the_model_is_refused_with_what_to_do(
    llama: Path, prompts: Path, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    given: dict[str, Any] = {"task": "causal-lm", "max_steps": 1}
    run(llama, prompts, tmp_path / "my run", **given)
    adapter = tmp_path / "my run" / "adapter"
    for folder in (adapter, adapter.parent):
        message = error_of(command(folder, prompts, tmp_path / "next", **given))
        assert f"--model {folder}: this is an adapter of the base model {llama}, not a model. Give its base" in message
    merge = shlex.split(message.partition("first: lora-ga ")[2].partition(" FOLDER")[0])
    argv = ["--model", adapter, "--task", "causal-lm", "--train_file", prompts, "--output", tmp_path / "e.safetensors"]
    assert f"--model {adapter}: this is an adapter of" in error_of(["estimate", *argv])
    assert main([*merge, str(tmp_path / "merged")]) == 0
    run(tmp_path / "merged", prompts, tmp_path / "next", **given)
    assert lora_ga.load(str(adapter), is_trainable=True).active_adapter == "default"
    (adapter / "adapter_config.json").write_text("{")
    assert "this is an adapter, not a model." in error_of(command(adapter, prompts, tmp_path / "again", **given))


@pytest.mark.parametrize(
    ("loader", "model"), [(AutoModelForCausalLM, "llama"), (AutoModelForSeq2SeqLM, "t5")], ids=["causal-lm", "seq2seq"]
)
def test_the_base_folder_is_not_changed(
    loader: Any, model: str, prompts: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(model)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    columns = {} if model == "llama" else {"task": "seq2seq", "prompt_column": "prompt", "target_column": "target"}
    run(folder, prompts, tmp_path / "run", **({"task": "causal-lm", "max_steps": 1} | columns))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    PeftModel.from_pretrained(loader.from_pretrained(folder), tmp_path / "run" / "adapter")


def test_a_model_that_sees_later_tokens_is_refused_for_causal_lm(
    bert: Path, prompts: Path, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    argv = ["train", "--model", bert, "--task", "causal-lm", "--train_file", prompts, "--output_dir", tmp_path / "run"]
    assert "sees later tokens, so it cannot learn to continue text" in error_of(argv)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        (
            "t5",
            "causal-lm",
            "is an encoder-decoder, which --task causal-lm cannot train: use --task seq2seq",
        ),
        (
            "llama",
            "seq2seq",
            "is a model of type llama, which --task seq2seq cannot train: use --task causal-lm",
        ),
    ],
)
def test_a_model_for_another_task_is_refused_with_the_task_that_it_fits(
    model: str,
    task: str,
    message: str,
    prompts: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    error_of: Callable[[list[object]], str],
) -> None:
    columns = {"prompt_column": "prompt", "target_column": "target"} if task == "seq2seq" else {}
    argv = command(request.getfixturevalue(model), prompts, tmp_path / "run", task=task, **columns)
    assert message in error_of(argv)


def test_an_output_folder_below_a_file_is_refused(
    bert: Path, labelled_texts: Path, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    (tmp_path / "file").touch()
    argv = ["train", "--model", bert, "--task", "seq-cls", "--train_file", labelled_texts]
    assert f"{tmp_path / 'file'} is a file, so no folder" in error_of(
        [*argv, "--output_dir", tmp_path / "file" / "run"]
    )


@pytest.mark.parametrize(("old", "name"), [(True, "warmup_ratio"), (False, "warmup_steps")])
def test_the_share_of_warm_up_is_given_by_the_name_that_transformers_knows(
    old: bool, name: str, llama: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = command(llama, prompts, tmp_path / "run", task="causal-lm", warmup_ratio=0.5)
    job, _ = parse([str(argument) for argument in argv[1:]])
    given = Mock(return_value=SimpleNamespace(n_gpu=0))
    monkeypatch.setattr(tasks, "trainer_classes", lambda *_: (None, given, {}))
    monkeypatch.setattr(finetune, "is_before", lambda *_: old)
    training_arguments(job, tmp_path)
    assert {key: value for key, value in given.call_args.kwargs.items() if "warm" in key} == {name: 0.5}


def test_without_an_accelerator_the_device_is_the_cpu_whatever_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", Mock(side_effect=RuntimeError))  # torch 2.6
    assert device() == torch.device("cpu")


def test_the_trainer_uses_one_gpu_even_if_several_are_visible(
    llama: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def three_gpus(settings: TrainingArguments, **given: Any) -> None:
        settings.__dict__["_n_gpu"] = 3

    argv = command(llama, prompts, tmp_path / "run", task="causal-lm")
    job, _ = parse([str(argument) for argument in argv[1:]])
    monkeypatch.setattr(TrainingArguments, "__post_init__", three_gpus)
    assert TrainingArguments().n_gpu == 3
    assert training_arguments(job, tmp_path).n_gpu == 1


# --- the example script with PEFT's flow -----------------------------------------------------------------------------


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
