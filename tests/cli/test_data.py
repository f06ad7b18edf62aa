"""Files, hub data sets and conversations are read, checked and tokenised; `lora-ga train` on conversations."""

import importlib.util
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftModel
from safetensors.torch import load_file as load_tensors
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from lora_ga.cli import conversations, data, tasks
from lora_ga.cli.columns import MOST_BYTES, columns_in, columns_of, with_found_columns
from lora_ga.cli.data import (
    Labels,
    RowEncoder,
    check_columns,
    encode_rows,
    load_file,
    load_hub,
    read_labels,
    usable_rows,
    why_bad,
)
from lora_ga.cli.main import main
from lora_ga.cli.models import load_pretrained, load_tokenizer
from lora_ga.cli.options import DATA_SUFFIXES, DataOptions, ModelOptions

from .conftest import VOCABULARY, text, write_rows

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


def test_a_file_of_plain_text_is_one_text_that_is_split_into_examples(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "play.txt").write_text("a b\n\nc d\n" * 20)
    read = load_file(tmp_path / "play.txt")
    assert read.to_list() == [{"text": "a b\n\nc d\n" * 20}]
    encoder = RowEncoder(load_tokenizer(str(llama)), options(), max_length=10)
    examples = encode_rows(read, RowEncoder.plain_text, encoder, "play.txt")
    assert sum(map(len, examples["input_ids"])) == 80  # the last of 81 tokens, alone, has nothing to predict
    assert max(map(len, examples["input_ids"])) == 10


def test_unknown_missing_damaged_and_empty_files_are_refused(tmp_path: Path) -> None:
    assert tuple(data.FILE_TYPES) == DATA_SUFFIXES  # what is accepted without reading has a reader
    with pytest.raises(ValueError, match=r"a.xlsx: a data file ends in .jsonl, .json, .csv, .tsv, .parquet, .txt;"):
        load_file(tmp_path / "a.xlsx")
    with pytest.raises(FileNotFoundError, match=r"a.csv: there is no such data file"):
        load_file(tmp_path / "a.csv")
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(
        ValueError, match=r"torn.jsonl: could not be read as jsonl \(line 2: .*each line must be one JSON object"
    ):
        load_file(tmp_path / "torn.jsonl")
    (tmp_path / "latin.csv").write_bytes("text,label\ncafé,a\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.csv: could not be read as csv \(it is not in UTF-8, as byte 14 shows"):
        load_file(tmp_path / "latin.csv")
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
    missing = (
        r"no column 'txt' \(--text_column\) and no column 'label' \(--label_column\); its columns are text, y\. Name"
    )
    with pytest.raises(ValueError, match=missing):
        check_columns(rows(text=["a"], y=[1]), {"text_column": "txt", "label_column": "label"}, "f.csv")
    with pytest.raises(
        ValueError, match="its columns are question, answer.* answers by --prompt_column and --target_c"
    ):
        check_columns(rows(question=["a"], answer=["b"]), {"text_column": "text"}, "f.csv")


def test_the_columns_of_a_file_are_seen_without_reading_it_whole(tmp_path: Path) -> None:
    for suffix in (".csv", ".tsv", ".jsonl"):
        WRITERS[suffix](datasets.Dataset.from_list(ROWS), tmp_path / f"f{suffix}")
        assert columns_in(tmp_path / f"f{suffix}") == ["text", "label"]
    (tmp_path / "more.jsonl").write_text('{"text": "a"}\n\n{"text": "b", "label": 1}\n')
    assert columns_in(tmp_path / "more.jsonl") == ["text", "label"]  # a row may lack a column
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n[1]\n')
    (tmp_path / "f.json").write_text("[]")
    (tmp_path / "large.jsonl").write_text('{"text": "a"}\n' + " " * MOST_BYTES)
    assert (
        columns_in(tmp_path / "torn.jsonl")
        is columns_in(tmp_path / "large.jsonl")
        is columns_in(tmp_path / "f.json")
        is None
    )


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


def test_labels_of_one_class_are_refused() -> None:
    with pytest.raises(ValueError, match="f: column 'y' holds only one class, 'a', so there is nothing to learn"):
        read_labels(rows(y=["a", "a"]), "y", "f")


def token_ids(text: str) -> list[int]:
    return [VOCABULARY[word] for word in text.split()]


def test_a_pair_of_texts_becomes_one_sequence_cut_to_the_length(bert: Path) -> None:
    encoder = RowEncoder(
        load_tokenizer(str(bert)), options(text_pair_column="other"), 6, Labels(("x", "y"), {"x": 0, "y": 1})
    )
    found = encode_rows(
        rows(text=["a b", "a b c d"], other=["c", "e f"], label=["y", "x"]), RowEncoder.classes, encoder, "f"
    )
    assert found["input_ids"][0] == token_ids("[CLS] a b [SEP] c [SEP]")
    assert found["token_type_ids"][0] == [0, 0, 0, 0, 1, 1]
    assert [len(example) for example in found["input_ids"]] == [6, 6]
    assert found["labels"][:] == [1, 0]


def test_a_label_that_is_not_in_the_training_data_is_refused(bert: Path) -> None:
    encoder = RowEncoder(load_tokenizer(str(bert)), options(), 8, Labels(("x", "y"), {"x": 0, "y": 1}))
    with pytest.raises(
        ValueError, match=r"f: row 1 has the label 'z', but the classes of the training data are 'x', 'y'"
    ):
        encode_rows(rows(text=["a", "b"], label=["x", "z"]), RowEncoder.classes, encoder, "f")


BAD_ROWS: list[tuple[str, str, dict[str, str], str]] = [
    (".csv", 'text,y\n"a\nb",x\n,x\nc,z\n', {"text_column": "text"}, "line 4: an empty text in column 'text'"),
    (".tsv", "text\ty\na\t\nb\tz\n", {"label_column": "y"}, "line 2: an empty text in column 'y'"),
    (".jsonl", '{"t": "a"}\n\n{"t": null}\n', {"target_column": "t"}, "line 3: nothing in column 't'"),
    (".json", '[{"t": "a"}, {"t": " "}]', {"target_column": "t"}, "row 1: an empty text in column 't'"),
    (
        ".jsonl",
        '{"m": [{"role": "user", "content": "a"}]}\n{"m": [{"role": "user", "content": null}]}\n',
        {"messages_column": "m"},
        "line 2: a message of role 'user' without content in column 'm'",
    ),
    (
        ".jsonl",
        '{"m": [{"role": "user", "content": "a"}]}\n{"m": []}\n',
        {"messages_column": "m"},
        "line 2: an empty conv",
    ),
]


@pytest.mark.parametrize(("suffix", "content", "columns", "found"), BAD_ROWS, ids=[row[3][:25] for row in BAD_ROWS])
def test_a_row_that_cannot_be_used_is_refused_with_its_line_or_dropped_with_a_count(
    suffix: str, content: str, columns: dict[str, str], found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"rows{suffix}"
    file.write_text(content)
    table = load_file(file)
    with pytest.raises(ValueError, match=re.escape(f"rows{suffix}, {found}")) as refused:
        usable_rows(table, columns, str(file), "error")
    assert f"1 of {len(table)} rows cannot be used. Mend them, or leave them out with --on_bad_row" in str(
        refused.value
    )
    assert len(usable_rows(table, columns, str(file), "drop")) == len(table) - 1
    assert f"1 of {len(table)} rows cannot be used and are left out." in capsys.readouterr().err


def test_empty_prompts_and_calls_of_tools_can_be_used_and_a_file_of_bad_rows_alone_is_refused() -> None:
    call = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert why_bad("", "prompt_column") is why_bad(call, "messages_column") is why_bad(3, "label_column") is None
    with pytest.raises(ValueError, match=r"f, row 0: an empty text in column 't'; 2 of 2 rows cannot be used\.$"):
        usable_rows(rows(t=["", ""]), {"text_column": "t"}, "f", "drop")


def test_plain_text_is_divided_without_loss_of_tokens(llama: Path) -> None:
    encoder = RowEncoder(load_tokenizer(str(llama)), options(), 4)
    found = encode_rows(rows(text=["a b c d e", "f", ""]), RowEncoder.plain_text, encoder, "f")
    assert found["input_ids"][:] == [token_ids("a b c d"), token_ids("e </s>"), token_ids("f </s>")]
    assert found["labels"][:] == found["input_ids"][:]


def test_prompts_and_targets_of_seq2seq_become_inputs_and_labels(t5: Path) -> None:
    encoder = RowEncoder(load_tokenizer(str(t5)), options(prompt_column="p", target_column="t"), 3)
    found = encode_rows(rows(p=["a b c d"], t=["e"]), RowEncoder.pairs, encoder, "f")
    assert found[0] == {"input_ids": token_ids("a b </s>"), "attention_mask": [1, 1, 1], "labels": token_ids("e </s>")}


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("causal-lm", {"text_pair_column": "b"}, "--text_pair_column belongs to --task seq-cls"),
        ("seq2seq", {"label_column": "b"}, "--label_column belongs to --task seq-cls"),
        ("seq-cls", {"prompt_column": "p", "target_column": "t"}, "do not belong to --task seq-cls"),
        ("seq2seq", {"messages_column": "m"}, "--messages_column belongs to --task causal-lm"),
        ("causal-lm", {"assistant_only_loss": True}, "--assistant_only_loss belongs to conversations"),
        ("seq2seq", {}, "--task seq2seq needs --prompt_column and --target_column"),
    ],
)
def test_columns_of_another_task_are_refused(task: str, given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        columns_of(task, options(**given))


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


def test_a_hub_that_cannot_be_reached_is_one_line_with_the_folder_that_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unreachable:
        @staticmethod
        def from_pretrained(model: str) -> None:
            raise OSError("several\nlines") from LocalEntryNotFoundError("nothing in the cache")

    (tmp_path / "models" / "minilm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the whole text is compared)
        load_pretrained(Unreachable, "models/minlm")
    assert str(refused.value) == (
        "--model models/minlm: there is no folder models/minlm. Did you mean models/minilm? As a name on the hub it is "
        "not among the models fetched before, and the hub was not reached (no connection)."
    )


# --- conversations, and prompts with targets -------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}{{ '[CLS] ' if message['role'] == 'user' else '[SEP] ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + ' </s>' }}{% endgeneration %}"
    "{{ ' ' }}{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[SEP] {% endif %}"
)


@pytest.fixture(autouse=True)
def trl() -> None:
    pytest.importorskip("trl", reason="install the extra 'trl' to run this test")


@pytest.fixture(scope="session")
def chat_llama(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama with a chat template."""
    folder = tmp_path_factory.mktemp("chatty")
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def conversation(*turns: str) -> list[dict[str, str]]:
    """A conversation of these turns; the first is the user's."""
    return [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """40 conversations of two turns, each as messages and as a prompt with its completion."""
    turns = [(text(n), text(n + 1, 4)) for n in range(40)]
    rows = [
        {"messages": conversation(q, a), "asked": conversation(q), "answered": conversation(q, a)[1:]} for q, a in turns
    ]
    return write_rows(tmp_path / "talks.jsonl", rows)


def ids(words: str) -> list[int]:
    return [VOCABULARY[word] for word in words.split()]


def encode(model: Path, row: dict[str, Any], length: int = 64, **given: Any) -> dict[str, list[int]]:
    """Encodes one row into tokens and labels."""
    options = DataOptions(train_file="f.jsonl", **given)
    rows = datasets.Dataset.from_list([row])
    columns = columns_of("causal-lm", options)
    return conversations.encode(rows, columns, load_tokenizer(str(model)), options, length, "f")[0]


def test_prompts_have_no_loss_and_long_rows_are_cut(llama: Path) -> None:
    columns: dict[str, Any] = {"prompt_column": "p", "target_column": "t"}
    found = encode(llama, {"p": "a b ", "t": "c"}, **columns)
    assert found == {"input_ids": ids("a b c </s>"), "labels": [-100, -100, *ids("c </s>")]}
    found = encode(llama, {"p": "a ", "t": "b c d e f"}, 4, **columns)
    assert found == {"input_ids": ids("a b c d"), "labels": [-100, *ids("b c d")]}


def test_the_chat_template_formats_conversations(chat_llama: Path) -> None:
    row = {"m": conversation("a b", "c", "d", "e f")}
    whole = ids("[CLS] a b [SEP] c </s> [CLS] d [SEP] e f </s>")
    assert encode(chat_llama, row, messages_column="m") == {"input_ids": whole, "labels": whole}
    found = encode(chat_llama, row, messages_column="m", assistant_only_loss=True)
    labels = [-100] * 4 + ids("c </s>") + [-100] * 3 + ids("e f </s>")
    assert found == {"input_ids": whole, "labels": labels}
    found = encode(
        chat_llama, {"p": conversation("a b"), "t": conversation("", "c")[1:]}, prompt_column="p", target_column="t"
    )
    assert found == {"input_ids": ids("[CLS] a b [SEP] c </s>"), "labels": [-100] * 4 + ids("c </s>")}


def by_trl(model: Path, row: dict[str, Any], length: int, *, assistant_only: bool) -> dict[str, list[int]]:
    """Encodes one row with TRL's SFTTrainer; the columns have TRL's names."""
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig("unused", max_length=length, assistant_only_loss=assistant_only, report_to=[], bf16=False)
    base = AutoModelForCausalLM.from_pretrained(model)
    rows = datasets.Dataset.from_list([row])
    trainer = SFTTrainer(base, settings, train_dataset=rows, processing_class=load_tokenizer(str(model)))
    found = trainer.train_dataset.select_columns(["input_ids", "labels"])
    return found[0] if len(found) else {}


@pytest.mark.parametrize("length", [64, 7])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a b ", "completion": "c d e f g"},
        {"prompt": "a b ", "completion": "c </s>"},
        # The last token of the prompt merges with the first of the target.
        {"prompt": "a b", "completion": "c d"},
        {"prompt": "a ", "completion": ""},
        {"messages": conversation("a b", "c", "d", "e f")},
        {"messages": conversation("a b", "c", "d")},
        {"prompt": conversation("a b"), "completion": conversation("", "c d e f g")[1:]},
        {"prompt": conversation("a b", "c", "d"), "completion": conversation("", "e", "f", "g")[1:]},
        # The prompt ends inside an answer, so the whole text does not contain the generation prompt after it.
        {"prompt": conversation("a b", "c"), "completion": conversation("d", "e")},
    ],
)
def test_tokens_and_labels_equal_those_of_trls_trainer(row: dict[str, Any], length: int, chat_llama: Path) -> None:
    given = {"messages_column": "messages"} if "messages" in row else {}
    given |= {"prompt_column": "prompt", "target_column": "completion"} if "prompt" in row else {}
    # Plain text has no turns, so the assistant's cannot be picked out.
    for assistant_only in [False] if isinstance(row.get("prompt"), str) else [False, True]:
        expected = by_trl(chat_llama, row, length, assistant_only=assistant_only)
        if expected:
            assert encode(chat_llama, row, length, assistant_only_loss=assistant_only, **given) == expected
        else:
            with pytest.raises(ValueError, match=f"no row has a token to learn within {length} tokens"):
                encode(chat_llama, row, length, assistant_only_loss=assistant_only, **given)


def test_a_target_whose_first_token_merges_with_the_prompt_gives_a_warning(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(llama, {"p": "a b ", "t": "c"}, prompt_column="p", target_column="t")
    assert capsys.readouterr().err == ""
    encode(llama, {"p": "a b", "t": "c"}, prompt_column="p", target_column="t")
    assert "f: in 1 of 1 rows the tokens of the prompt alone are not the first tokens" in capsys.readouterr().err


def test_assistant_only_loss_needs_a_template_that_marks_the_turns_and_their_end(
    chat_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = DataOptions(train_file="f.jsonl", messages_column="m", assistant_only_loss=True)
    rows = datasets.Dataset.from_list([{"m": conversation("a", "b")}])
    tokenizer = load_tokenizer(str(chat_llama))
    columns = {"messages_column": "m"}
    conversations.encode(rows, columns, tokenizer, options, 64, "f")
    assert capsys.readouterr().err == ""
    # TRL itself would test the template with a word that this small tokenizer does not know.
    monkeypatch.setattr("trl.chat_template_utils.is_chat_template_stop_token_trained", lambda *given: False)
    conversations.encode(rows, columns, tokenizer, options, 64, "f")
    assert "leaves the token that ends the assistant's turn out of the loss" in capsys.readouterr().err
    tokenizer.chat_template = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(ValueError, match="f: --assistant_only_loss needs a chat template that marks"):
        conversations.encode(rows, columns, tokenizer, options, 64, "f")
    monkeypatch.delattr("trl.chat_template_utils.is_chat_template_stop_token_trained")  # as in TRL before 1.9
    with pytest.raises(ValueError, match="--assistant_only_loss needs TRL 1.9 or newer, but TRL .* is installed"):
        conversations.encode(rows, columns, tokenizer, options, 64, "f")


def test_rows_that_cannot_be_formatted_are_refused_with_the_reason(chat_llama: Path) -> None:
    tokenizer = load_tokenizer(str(chat_llama))
    pairs: dict[str, Any] = {"prompt_column": "p", "target_column": "t"}
    mixed = datasets.Dataset.from_list([{"p": "a", "t": conversation("", "b")[1:]}])
    with pytest.raises(ValueError, match=r"f: row 0 cannot be formatted \(prompt and target must both be text"):
        conversations.encode(mixed, pairs, tokenizer, DataOptions(train_file="f", **pairs), 64, "f")
    texts = datasets.Dataset.from_list([{"p": "a ", "t": "b"}])
    options = DataOptions(train_file="f", **pairs, assistant_only_loss=True)
    with pytest.raises(ValueError, match="f: --assistant_only_loss needs messages, but the columns hold text"):
        conversations.encode(texts, pairs, tokenizer, options, 64, "f")
    tokenizer.chat_template = "{% for m in messages %}{{ raise_exception('roles must alternate') }}{% endfor %}"
    messages = datasets.Dataset.from_list([{"m": conversation("a", "b")}])
    options = DataOptions(train_file="f", messages_column="m")
    with pytest.raises(ValueError, match=r"f: row 0 cannot be formatted \(roles must alternate\)"):
        conversations.encode(messages, {"messages_column": "m"}, tokenizer, options, 64, "f")
    unanswered = datasets.Dataset.from_list([{"m": conversation("a")}])
    options = DataOptions(train_file="f", messages_column="m", assistant_only_loss=True)
    with pytest.raises(ValueError, match=r"f: row 0 cannot be formatted \(the chat template marks no token as the"):
        conversations.encode(unanswered, {"messages_column": "m"}, load_tokenizer(str(chat_llama)), options, 64, "f")


@pytest.mark.parametrize("method", ["lora-ga", "lora", "full"])
@pytest.mark.parametrize(
    "columns", [["--messages_column=messages"], ["--prompt_column=asked", "--target_column=answered"]]
)
def test_every_method_learns_conversations(
    method: str, columns: list[str], chat_llama: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, begin = [], Trainer.train

    def train(self: Trainer, *given: Any, **named: Any) -> Any:
        trained.append(type(self).__name__)
        return begin(self, *given, **named)

    monkeypatch.setattr(Trainer, "train", train)
    out = tmp_path / "run"
    argv = [
        "train",
        f"--model={chat_llama}",
        "--task=causal-lm",
        f"--train_file={chats}",
        f"--eval_file={chats}",
        *columns,
    ]
    argv += [f"--output_dir={out}", f"--method={method}", "--rank=2", "--max_steps=12", "--logging_steps=2"]
    assert main([*argv, "--learning_rate=3e-3", "--estimate_batches=2", "--warmup_ratio=0"]) == 0
    assert trained == ["SFTTrainer"]
    record = json.loads((out / "run.json").read_text())
    losses = [point["loss"] for point in record["curve"]]
    assert losses[-1] < losses[0]
    assert record["metrics"]["eval_loss"] < losses[0]
    if method != "full":
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chat_llama), out / "adapter")


def test_a_resumed_run_equals_the_uninterrupted_one(chat_llama: Path, chats: Path, tmp_path: Path) -> None:
    argv = [
        f"--model={chat_llama}",
        "--task=causal-lm",
        f"--train_file={chats}",
        "--messages_column=messages",
        "--rank=2",
    ]
    argv += ["--max_steps=6", "--save_steps=3", "--logging_steps=1", "--estimate_batches=2", "--lora_dropout=0.1"]
    whole, interrupted = tmp_path / "whole", tmp_path / "broken"
    for out in (whole, interrupted):
        assert main(["train", *argv, f"--output_dir={out}"]) == 0
    for path in ("run.json", "checkpoints/checkpoint-6/trainer_state.json"):
        (interrupted / path).unlink()
    assert main(["train", "--resume", f"--output_dir={interrupted}"]) == 0
    one, other = (load_tensors(out / "adapter" / "adapter_model.safetensors") for out in (whole, interrupted))
    assert all(torch.equal(one[name], other[name]) for name in one)
    curves = [json.loads((out / "run.json").read_text())["curve"] for out in (whole, interrupted)]
    assert curves[0] == curves[1]


def test_lora_ga_estimate_gives_the_estimate_of_the_run(chat_llama: Path, chats: Path, tmp_path: Path) -> None:
    argv = [
        f"--model={chat_llama}",
        "--task=causal-lm",
        f"--train_file={chats}",
        "--messages_column=messages",
        "--rank=2",
    ]
    assert main(["estimate", *argv, "--estimate_batches=2", f"--output={tmp_path / 'e.safetensors'}"]) == 0
    assert main(["train", *argv, "--estimate_batches=2", "--max_steps=1", f"--output_dir={tmp_path / 'run'}"]) == 0
    one, other = load_tensors(tmp_path / "e.safetensors"), load_tensors(tmp_path / "run" / "estimate.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_warning_counts_the_rows_that_are_left_out(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "f.jsonl", [{"p": "a b c d ", "t": "e"}, {"p": "a ", "t": "b"}])
    columns = DataOptions(train_file=str(file), prompt_column="p", target_column="t", max_length=4)
    prepared = tasks.prepare_data(ModelOptions(model=str(llama), task="causal-lm"), columns)
    assert len(prepared.train) == 1
    assert "1 of 2 rows have no token to learn within 4 tokens and are left out" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"f: no row has a token to learn within 2 tokens. Raise --max_length"):
        encode(llama, {"p": "a b ", "t": "c"}, 2, prompt_column="p", target_column="t")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"m": conversation("a", "b")}, {"m": []}], "line 2: an empty conversation in column 'm'"),
        ([{"m": "a b"}], r"row 0 of column 'm' \(--messages_column\) is 'a b', but must be a list of messages, each"),
        ([{"other": "a b"}], r"there is no column 'm' \(--messages_column\); its columns are other"),
    ],
)
def test_rows_without_a_conversation_are_refused(
    rows: list[dict[str, Any]], message: str, chat_llama: Path, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    file = write_rows(tmp_path / "f.jsonl", rows)
    argv = ["train", "--task=causal-lm", f"--model={chat_llama}", f"--train_file={file}", "--messages_column=m"]
    shown = error_of([*argv, f"--output_dir={tmp_path / 'run'}"])
    assert re.search(message, shown)
    assert not (tmp_path / "run").exists()


def test_without_a_chat_template_one_may_be_given_and_messages_are_found_by_themselves(
    llama: Path,
    chat_llama: Path,
    chats: Path,
    tmp_path: Path,
    error_of: Callable[[list[object]], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [
        "train",
        "--task=causal-lm",
        f"--model={llama}",
        f"--train_file={chats}",
        f"--output_dir={tmp_path / 'run'}",
    ]
    argv += ["--rank=2", "--max_steps=1", "--estimate_batches=1"]
    shown = error_of([*argv])
    assert "note: the data has no column 'text': taking --messages_column messages" in shown
    assert "tokenizer has no chat template to write them with. Give one by --chat_template FILE" in shown
    template = AutoTokenizer.from_pretrained(chat_llama).chat_template
    (tmp_path / "chat.jinja").write_text(template)
    assert "chat_template none: there is no such file" in error_of([*argv, "--chat_template", "none"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main([*argv, "--chat_template", str(tmp_path / "chat.jinja")]) == 0
    assert [str(each.message) for each in caught if issubclass(each.category, FutureWarning)] == []
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter").chat_template == template
    out, err = capsys.readouterr()
    assert err.startswith(f"lora-ga: loading {llama} and the data ...\n")
    assert f"adapter --chat-template {tmp_path / 'run' / 'adapter' / 'chat_template.jinja'}\n" in out
    assert "messages_column: messages" in (tmp_path / "run" / "config.yaml").read_text()


def test_prompts_and_completions_are_found_by_their_names() -> None:
    found = with_found_columns("causal-lm", options(), ["prompt", "completion"])
    assert (found.prompt_column, found.target_column) == ("prompt", "completion")
    for columns in (["text", "messages"], ["other"]):
        assert with_found_columns("causal-lm", options(), columns) == options()
    assert with_found_columns("seq2seq", options(), ["text", "prompt", "completion"]) == found
    assert with_found_columns("seq-cls", options(), ["prompt", "completion"]) == options()


def test_without_trl_the_extra_is_named_and_plain_text_still_works(
    llama: Path, prompts: Path, tmp_path: Path, error_of: Callable[[list[object]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else find(name, *rest))
    argv = [
        "train",
        "--task=causal-lm",
        f"--model={llama}",
        f"--train_file={prompts}",
        f"--output_dir={tmp_path / 'run'}",
    ]
    shown = error_of([*argv, "--prompt_column=prompt", "--target_column=target"])
    assert 'Run pip install -e ".[trl]" in a checkout of LoRA-GA (it is not on PyPI yet)' in shown
    assert not (tmp_path / "run").exists()
    assert main([*argv, "--max_steps=1", "--rank=2"]) == 0
