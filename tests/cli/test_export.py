"""`lora-ga export` writes smaller adapters and merged models."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

import lora_ga
from lora_ga.cli.main import main
from lora_ga.export.convert import convert_run
from lora_ga.version import dtype_setting

from .conftest import VOCABULARY, text, write_rows

LOADERS: dict[str, Any] = {
    "seq-cls": AutoModelForSequenceClassification,
    "causal-lm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}


def trained(model: Path, data: Path, out: Path, task: str) -> Path:
    """Trains a LoRA-GA adapter of rank 2r = 4 until it differs from its start; returns its folder."""
    columns = {"seq2seq": ["--prompt_column=prompt", "--target_column=target"]}.get(task, [])
    argv = [f"--model={model}", f"--task={task}", f"--train_file={data}", f"--output_dir={out}", *columns]
    assert main(["train", *argv, "--rank=2", "--max_steps=4", "--learning_rate=1e-2", "--estimate_batches=2"]) == 0
    return out / "adapter"


@pytest.fixture(scope="module")
def made_once(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    rows = write_rows(folder / "data.jsonl", [{"text": text(number, 12)} for number in range(40)])
    return trained(llama, rows, folder / "run", "causal-lm")


@pytest.fixture
def adapter(made_once: Path, tmp_path: Path) -> Path:
    """A copy of a trained adapter."""
    return Path(shutil.copytree(made_once, tmp_path / "adapter"))


def batch(task: str) -> dict[str, torch.Tensor]:
    ids = torch.arange(5, len(VOCABULARY))[None]
    return {"input_ids": ids, "decoder_input_ids": ids} if task == "seq2seq" else {"input_ids": ids}


@pytest.mark.parametrize(("task", "model"), [("seq-cls", "bert"), ("causal-lm", "llama"), ("seq2seq", "t5")])
def test_a_merged_model_computes_what_base_and_adapter_compute(
    task: str,
    model: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base_folder = request.getfixturevalue(model)
    adapter = trained(
        base_folder,
        request.getfixturevalue("labelled_texts" if task == "seq-cls" else "prompts"),
        tmp_path / "run",
        task,
    )
    transformers.utils.logging.enable_progress_bar()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # so that caplog sees its messages
    capsys.readouterr()
    caplog.clear()
    assert main(["export", str(adapter), "--output", str(tmp_path / "merged"), "--merge"]) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith(f"merged: {base_folder} with the adapter merged in\n")
    assert "it/s" not in shown.err  # no bars where there is no terminal
    assert "newly initialized" not in caplog.text  # the adapter holds the head
    merged = LOADERS[task].from_pretrained(tmp_path / "merged").eval()
    adapted = PeftModel.from_pretrained(LOADERS[task].from_pretrained(base_folder), adapter).eval()
    with torch.no_grad():
        difference = merged(**batch(task)).logits - adapted(**batch(task)).logits
    assert difference.abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("a")["input_ids"]
    if task == "seq-cls":
        assert merged.config.id2label == {0: "bad", 1: "good"}


def test_a_merged_model_has_the_requested_dtype(adapter: Path, tmp_path: Path) -> None:
    assert main(["export", str(adapter), "--output", str(tmp_path / "m"), "--merge", "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m", **dtype_setting("auto")).dtype == torch.bfloat16


def test_a_smaller_adapter_is_written_and_a_table_shows_what_is_lost(
    adapter: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(adapter), "--output", str(tmp_path / "small"), "--rank", "3"]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in shown
    assert re.search(r"small: rank 3; median error \d+\.\d%, worst \d+\.\d% \(model", shown)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "small")
    assert model.peft_config["default"].r == 3
    assert (tmp_path / "small" / "tokenizer.json").exists()


def test_the_folder_of_a_run_is_taken_and_a_notable_loss_gets_a_word(
    made_once: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(made_once.parent), "--output", str(tmp_path / "small"), "--rank", "1"]) == 0
    shown = capsys.readouterr().out
    assert "part of each layer's trained change that rank 1 cannot hold" in shown
    assert "The adapter as it is, of rank 4, loses nothing." in shown


def test_a_smaller_adapter_keeps_the_names_of_the_classes(bert: Path, labelled_texts: Path, tmp_path: Path) -> None:
    adapter = trained(bert, labelled_texts, tmp_path / "run", "seq-cls")
    assert main(["export", str(adapter), "--output", str(tmp_path / "small"), "--rank", "1"]) == 0
    assert main(["export", str(tmp_path / "small"), "--output", str(tmp_path / "merged"), "--merge"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.id2label == {0: "bad", 1: "good"}
    others = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3, ignore_mismatched_sizes=True)
    others.save_pretrained(tmp_path / "others")  # its head is for other classes; the adapter has its own
    argv = ["export", str(tmp_path / "small"), "--output", str(tmp_path / "again"), "--merge"]
    assert main([*argv, "--model", str(tmp_path / "others")]) == 0
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(again.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("method", ["lora-ga", "lora"])
def test_a_checkpoint_of_a_classifier_keeps_its_classes(
    method: str, bert: Path, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    rows = [{"text": text(number), "label": ("good", "bad", "so so")[number % 3]} for number in range(30)]
    data, run = write_rows(tmp_path / "data.jsonl", rows), tmp_path / "run"
    argv = ["train", "--model", bert, "--task", "seq-cls", "--train_file", data, "--output_dir", run, "--rank", "2"]
    assert main([*map(str, argv), "--max_steps=2", "--save_steps=1", f"--method={method}"]) == 0
    names = {0: "bad", 1: "good", 2: "so so"}
    for checkpoint in ("checkpoint-1", "checkpoint-2"):
        folder, out = run / "checkpoints" / checkpoint, tmp_path / checkpoint
        assert main(["export", str(folder), "--output", str(out / "merged"), "--merge"]) == 0
        assert AutoModelForSequenceClassification.from_pretrained(out / "merged").config.id2label == names
        assert main(["export", str(folder), "--output", str(out / "small"), "--rank", "1"]) == 0
        assert lora_ga.load(out / "small").config.id2label == names
        assert lora_ga.load(folder).config.id2label == names
    (folder / "labels.json").rename(tmp_path / "labels.json")  # as in checkpoints of earlier versions
    argv = ["export", folder, "--output", tmp_path / "merged", "--merge"]
    assert "It has 3 classes, and there is no labels.json that names them. Copy that of the finished" in error_of(argv)
    shutil.copy(run / "adapter" / "labels.json", folder)
    assert main([str(each) for each in argv]) == 0
    assert (tmp_path / "labels.json").read_bytes() == (run / "adapter" / "labels.json").read_bytes()


def test_a_merged_classifier_reads_padded_batches_even_if_its_base_had_no_padding_token(
    llama: Path, labelled_texts: Path, tmp_path: Path
) -> None:
    adapter = trained(llama, labelled_texts, tmp_path / "run", "seq-cls")
    assert main(["export", str(adapter), "--output", str(tmp_path / "merged"), "--merge"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    texts = AutoTokenizer.from_pretrained(tmp_path / "merged")(["a b c", "a"], padding=True, return_tensors="pt")
    assert model(**texts).logits.shape == (2, 2)


def test_the_base_given_on_the_command_line_is_used(adapter: Path, llama: Path, tmp_path: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    moved = shutil.copytree(llama, tmp_path / "moved")
    for file in [*adapter.glob("tokenizer*"), *Path(moved).glob("tokenizer*")]:
        file.unlink()
    assert main(["export", str(adapter), "--output", str(tmp_path / "m"), "--merge", "--model", str(moved)]) == 0
    assert (tmp_path / "m" / "model.safetensors").exists()
    assert not (tmp_path / "m" / "tokenizer.json").exists()


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_cannot_be_loaded_is_left_out_with_a_warning(
    file: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (adapter / file).read_bytes()
    (adapter / file).write_bytes(content[: len(content) // 3])
    assert main(["export", str(adapter), "--output", str(tmp_path / "small"), "--rank", "2"]) == 0
    assert f"warning: {adapter}: the tokenizer could not be loaded and is left out (" in capsys.readouterr().err
    assert (tmp_path / "small" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "small" / "tokenizer_config.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--merge (a full model); neither was given. --for PROGRAM"),
        (["--merge", "--rank", "2"], "or --merge (a full model); both were given."),
        (["--rank", "0"], "--rank: found 0, but it must be at least 1."),
        (["--rank", "4"], "rank 4: the adapter has rank 4; compress to a rank from 1 to 3."),
        (["--rank", "2", "--dtype", "float16"], "--model and --dtype belong to --merge, but --rank was given."),
        (["--merge", "--model", "/none"], "--model /none: AutoModelForCausalLM could not load it"),
    ],
)
def test_an_impossible_request_is_refused_and_nothing_is_written(
    argv: list[str], message: str, adapter: Path, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    assert message in error_of(["export", adapter, "--output", tmp_path / "out", *argv])
    assert not (tmp_path / "out").exists()


def test_a_missing_adapter_and_an_output_folder_that_is_not_empty_are_refused(
    adapter: Path, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    (tmp_path / "nothing").mkdir()
    assert "there is no adapter (no adapter_config.json)" in error_of(
        ["export", tmp_path / "nothing", "--output", tmp_path / "out", "--merge"]
    )
    for argv in (["--merge"], ["--rank", "2"]):
        assert "not empty. Choose another output folder" in error_of(["export", adapter, "--output", tmp_path, *argv])
    assert "--output is missing" in error_of(["export", adapter, "--merge"])


def test_adapters_below_the_folder_are_named(
    adapter: Path, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    for inner in ("named/mine", "named/other", "run/checkpoints/checkpoint-1"):
        shutil.copytree(adapter, tmp_path / inner)
    named = tmp_path / "named"
    argv = ["export", named, "--output", tmp_path / "out", "--rank", "1"]
    assert f"(no adapter_config.json). Give one of these: {named / 'mine'}, {named / 'other'}.\n" in error_of(argv)
    message = error_of(["export", tmp_path / "run", "--output", tmp_path / "out", "--rank", "1"])
    assert f"Give one of these: {tmp_path / 'run' / 'checkpoints' / 'checkpoint-1'}.\n" in message
    calls: list[Callable[..., Any]] = [partial(lora_ga.compress_adapter, rank=1), partial(convert_run, named / "mine")]
    for function in calls:
        with pytest.raises(FileNotFoundError, match="holds no adapter_config.json; give .*mine or .*other."):
            function(named, tmp_path / "out")


def test_an_adapter_in_the_place_of_the_base_model_is_refused(
    adapter: Path, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    argv = ["export", adapter, "--output", tmp_path / "out", "--merge", "--model", adapter]
    assert f"--model {adapter}: this is an adapter of the base model" in error_of(argv)


def test_where_nothing_is_lost_one_line_says_so(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["export", str(adapter), "--for", "vllm", "--rank", "8", "--output", str(tmp_path / "served")]
    assert main(argv) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{tmp_path / 'served'}: rank 8; nothing is lost"
    assert len(shown) == 2


def test_an_adapter_without_base_name_or_task_or_of_another_base_is_refused(
    adapter: Path, bert: Path, t5: Path, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())

    def attempt(**changes: object) -> str:
        (adapter / "adapter_config.json").write_text(json.dumps(settings | changes))
        return error_of(["export", adapter, "--output", tmp_path / "out", "--merge"])

    assert "the adapter does not name its base model. Give it by --model" in attempt(base_model_name_or_path=None)
    assert "its task type is None, but --merge knows SEQ_CLS, CAUSAL_LM, SEQ_2_SEQ_LM" in attempt(task_type=None)
    wider = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"]).config
    wider.intermediate_size = 64
    AutoModelForCausalLM.from_config(wider).save_pretrained(tmp_path / "wider")
    message = attempt(base_model_name_or_path=str(tmp_path / "wider"))
    assert f"does not fit {tmp_path / 'wider'} (size mismatch for " in message
    assert message.endswith("Give its base model by --model.\n")
    assert not (tmp_path / "out").exists()


def test_another_error_than_a_wrong_size_is_shown_as_it_is(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: object, **settings: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr("lora_ga.export.merge.merge_adapter", fails)
    with pytest.raises(RuntimeError, match="^the device is gone$"):
        main(["export", str(adapter), "--output", str(tmp_path / "out"), "--merge"])


@pytest.mark.parametrize("what", [["--rank", 2], ["--merge"]])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_is_refused_by_name(
    adapter: Path, tmp_path: Path, error_of: Callable[[list[object]], str], what: list[object], file: str
) -> None:
    content = (adapter / file).read_bytes()
    (adapter / file).write_bytes(content[: len(content) // 3])
    message = error_of(["export", adapter, "--output", tmp_path / "out", *what])
    assert f"{adapter / file}: damaged, or not what it should be" in message
    assert not (tmp_path / "out").exists()
