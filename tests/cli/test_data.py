"""Files and hub data sets are read, checked and tokenised."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from lora_ga.cli import data, tasks
from lora_ga.cli.data import Labels, RowEncoder, check_columns, encode_rows, load_file, load_hub, read_labels
from lora_ga.cli.models import load_tokenizer
from lora_ga.cli.options import DataOptions, ModelOptions

from .conftest import VOCABULARY, write_rows

ROWS = [{"text": "a b", "label": 1}, {"text": "NA", "label": 0}, {"text": 'c, "d"', "label": 1}]
WRITERS: dict[str, Callable[[datasets.Dataset, Path], Any]] = {
    ".jsonl": lambda table, path: table.to_json(path),
    ".json": lambda table, path: path.write_text(json.dumps(table.to_list())),
    ".csv": lambda table, path: table.to_csv(path),
    ".tsv": lambda table, path: table.to_csv(path, sep="\t"),
    ".parquet": lambda table, path: table.to_parquet(path),
}


def rows(**columns: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def options(**given: Any) -> DataOptions:
    return DataOptions(train_file="t.jsonl", **given)


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_file_format_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{suffix}"
    WRITERS[suffix](datasets.Dataset.from_list(ROWS), file)
    assert load_file(file).to_list() == ROWS


def test_unknown_missing_damaged_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.xlsx: a data file ends in .jsonl, .json, .csv, .tsv, .parquet"):
        load_file(tmp_path / "a.xlsx")
    with pytest.raises(FileNotFoundError, match=r"a.csv: there is no such data file"):
        load_file(tmp_path / "a.csv")
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ValueError, match=r"torn.jsonl: could not be read as jsonl \("):
        load_file(tmp_path / "torn.jsonl")
    (tmp_path / "nothing.jsonl").touch()
    with pytest.raises(ValueError, match=r"nothing.jsonl: holds no rows"):
        load_file(tmp_path / "nothing.jsonl")
    (tmp_path / "empty.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match=r"empty.csv: holds no rows"):
        load_file(tmp_path / "empty.csv")


def test_hub_data_is_loaded_by_name_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return rows(text=["a"]) if split == "train" else rows(text=[])

    monkeypatch.setattr(data, "load_dataset", load)
    assert load_hub("glue", "mrpc", "train").to_list() == [{"text": "a"}]
    assert asked == [("glue", "mrpc", "train")]
    with pytest.raises(ValueError, match="--dataset glue, split test: holds no rows"):
        load_hub("glue", "mrpc", "test")


def test_hub_data_that_cannot_be_loaded_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        raise ConnectionError("no route")

    monkeypatch.setattr(data, "load_dataset", load)
    message = r"--dataset glue, configuration None, split train: could not be loaded \(no route\)"
    with pytest.raises(ValueError, match=message):
        load_hub("glue", None, "train")


def test_a_missing_column_is_refused_and_the_existing_ones_are_listed() -> None:
    with pytest.raises(ValueError, match=r"f.csv: there is no column 'txt' \(--text_column\); its columns are text, y"):
        check_columns(rows(text=["a"], y=[1]), {"text_column": "txt"}, "f.csv")


@pytest.mark.parametrize(
    ("option", "values", "found"),
    [("text_column", [1, 2], "int64"), ("text_column", [["a"]], "List"), ("label_column", [0.5], "float64")],
)
def test_a_column_of_the_wrong_type_is_refused(option: str, values: list[Any], found: str) -> None:
    with pytest.raises(ValueError, match=rf"column 'c' \(--{option}\) holds {found}, but it must hold"):
        check_columns(rows(c=values), {option: "c"}, "f.csv")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["no", "yes", "maybe", "no"], ("maybe", "no", "yes")),
        ([2, 10, 1], ("1", "2", "10")),
        ([True, False], ("False", "True")),
    ],
)
def test_the_classes_are_the_sorted_values_of_the_label_column(values: list[Any], names: tuple[str, ...]) -> None:
    labels = read_labels(rows(y=values), "y", "f")
    assert labels.names == names
    assert list(labels.ids.values()) == list(range(len(names)))


def test_declared_classes_are_kept_even_if_one_has_no_rows() -> None:
    declared = datasets.Features({"y": datasets.ClassLabel(names=["no", "maybe", "yes"])})
    labels = read_labels(datasets.Dataset.from_dict({"y": [2, 0]}, features=declared), "y", "f")
    assert labels == Labels(("no", "maybe", "yes"), {0: 0, 1: 1, 2: 2})


def test_missing_labels_and_labels_of_one_class_are_refused() -> None:
    with pytest.raises(ValueError, match="f: row 1 has no label in column 'y'"):
        read_labels(rows(y=["a", None, "b"]), "y", "f")
    with pytest.raises(ValueError, match="f: row 2 has no label in column 'y'"):
        read_labels(rows(y=["a", "b", ""]), "y", "f")
    with pytest.raises(ValueError, match="f: column 'y' holds only one class, 'a', so there is nothing to learn"):
        read_labels(rows(y=["a", "a"]), "y", "f")


def ids(text: str) -> list[int]:
    return [VOCABULARY[word] for word in text.split()]


def test_a_pair_of_texts_becomes_one_sequence_cut_to_the_length(bert: Path) -> None:
    encoder = RowEncoder(
        load_tokenizer(str(bert)), options(text_pair_column="other"), 6, Labels(("x", "y"), {"x": 0, "y": 1})
    )
    found = encode_rows(
        rows(text=["a b", "a b c d"], other=["c", "e f"], label=["y", "x"]), RowEncoder.classes, encoder, "f"
    )
    assert found["input_ids"][0] == ids("[CLS] a b [SEP] c [SEP]")
    assert found["token_type_ids"][0] == [0, 0, 0, 0, 1, 1]
    assert [len(example) for example in found["input_ids"]] == [6, 6]
    assert found["labels"][:] == [1, 0]


def test_a_label_that_is_not_in_the_training_data_is_refused(bert: Path) -> None:
    encoder = RowEncoder(load_tokenizer(str(bert)), options(), 8, Labels(("x", "y"), {"x": 0, "y": 1}))
    with pytest.raises(
        ValueError, match=r"f: row 1 has the label 'z', but the classes of the training data are 'x', 'y'"
    ):
        encode_rows(rows(text=["a", "b"], label=["x", "z"]), RowEncoder.classes, encoder, "f")


def test_a_missing_text_is_refused_with_its_row(bert: Path) -> None:
    encoder = RowEncoder(load_tokenizer(str(bert)), options(), 8, Labels(("x", "y"), {"x": 0, "y": 1}))
    with pytest.raises(ValueError, match=r"f: row 1 has nothing in column 'text'"):
        encode_rows(rows(text=["a", None], label=["x", "y"]), RowEncoder.classes, encoder, "f")


def test_plain_text_is_divided_without_loss_of_tokens(llama: Path) -> None:
    encoder = RowEncoder(load_tokenizer(str(llama)), options(), 4)
    found = encode_rows(rows(text=["a b c d e", "f", ""]), RowEncoder.plain_text, encoder, "f")
    assert found["input_ids"][:] == [ids("a b c d"), ids("e </s>"), ids("f </s>")]
    assert found["labels"][:] == found["input_ids"][:]


def test_prompts_and_targets_of_seq2seq_become_inputs_and_labels(t5: Path) -> None:
    encoder = RowEncoder(load_tokenizer(str(t5)), options(prompt_column="p", target_column="t"), 3)
    found = encode_rows(rows(p=["a b c d"], t=["e"]), RowEncoder.pairs, encoder, "f")
    assert found[0] == {"input_ids": ids("a b </s>"), "attention_mask": [1, 1, 1], "labels": ids("e </s>")}


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("causal-lm", {"text_pair_column": "b"}, "--text_pair_column belongs to --task seq-cls"),
        ("seq-cls", {"prompt_column": "p", "target_column": "t"}, "do not belong to --task seq-cls"),
        ("seq2seq", {"messages_column": "m"}, "--messages_column belongs to --task causal-lm"),
        ("causal-lm", {"assistant_only_loss": True}, "--assistant_only_loss belongs to conversations"),
        ("seq2seq", {}, "--task seq2seq needs --prompt_column and --target_column"),
    ],
)
def test_columns_of_another_task_are_refused(task: str, given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.columns_of(task, options(**given))


def test_the_length_is_at_most_what_the_model_reads(llama: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "f.jsonl", [{"text": " ".join("a" * 100)}])
    model = ModelOptions(model=str(llama), task="causal-lm")
    prepared = tasks.prepare_data(model, DataOptions(train_file=str(file)))
    assert [len(example) for example in prepared.train["input_ids"]] == [64, 37]
    with pytest.raises(ValueError, match=r"--max_length 65: .* reads at most 64 tokens"):
        tasks.prepare_data(model, DataOptions(train_file=str(file), max_length=65))


def test_a_tokenizer_without_a_padding_token_pads_with_the_end_token(llama: Path) -> None:
    assert load_tokenizer(str(llama)).pad_token == "</s>"


def test_a_tokenizer_without_padding_and_end_tokens_is_refused(llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["eos_token"] = None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="its tokenizer has neither a padding token nor an end-of-text token"):
        load_tokenizer(str(tmp_path))


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--model .*none: AutoTokenizer could not load it"):
        load_tokenizer(str(tmp_path / "none"))
