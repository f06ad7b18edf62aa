"""Small models with their tokenizers, and small data files, saved as a user would have them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from lora_ga.cli.main import main
from toys import INPUTS

WORDS = [*"abcdefghij", *"klmnopqrst"]
VOCABULARY = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "</s>", "[CLS]", "[SEP]", *WORDS])}


def save_tokenizer(folder: Path, *, template: str | None = None, pad: bool = True) -> None:
    """Saves a tokenizer with one token per word; `template` adds special tokens around a text, as in BERT and T5."""
    words = Tokenizer(WordLevel(VOCABULARY, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    if template is not None:
        special = [(token, VOCABULARY[token]) for token in ("[CLS]", "[SEP]", "</s>")]
        pair = f"{template} $B:1 [SEP]:1" if "[SEP]" in template else f"{template} $B </s>"
        words.post_processor = TemplateProcessing(single=template, pair=pair, special_tokens=special)
    options: dict[str, Any] = {"model_input_names": INPUTS} | ({"pad_token": "[PAD]"} if pad else {})
    if template is not None and "[SEP]" in template:
        options["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", eos_token="</s>", model_max_length=64, **options
    ).save_pretrained(folder)


@pytest.fixture(scope="session", autouse=True)
def temporary_datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Puts the cache of `datasets` into a temporary folder, and turns its progress bars off."""
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with dropout, two layers, width 32."""
    folder = tmp_path_factory.mktemp("bert")
    set_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    save_tokenizer(folder, template="[CLS] $A [SEP]")
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers and width 32, whose tokenizer has no padding token."""
    folder = tmp_path_factory.mktemp("llama")
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=VOCABULARY["</s>"],
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, pad=False)
    return folder


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of two layers and width 32."""
    folder = tmp_path_factory.mktemp("t5")
    set_seed(0)
    config = T5Config(
        vocab_size=len(VOCABULARY),
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=VOCABULARY["</s>"],
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    save_tokenizer(folder, template="$A </s>")
    return folder


def text(number: int, length: int = 8) -> str:
    """A text of single letters, a different one for each number."""
    return " ".join(WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)] for place in range(length))


@pytest.fixture
def labelled_texts(tmp_path: Path) -> Path:
    """40 texts with the labels "good" and "bad"."""
    return write_rows(
        tmp_path / "sorting.jsonl",
        [{"text": text(number, 5 + number % 4), "label": ("good", "bad")[number % 2]} for number in range(40)],
    )


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """40 rows with a prompt, its target, and a plain text."""
    return write_rows(
        tmp_path / "asking.jsonl",
        [
            {"prompt": text(number) + " ", "target": text(number + 1, 4), "text": text(number, 12)}
            for number in range(40)
        ],
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes a jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]) -> Callable[[list[object]], str]:
    """Runs a command that must end with exit code 2 and without a traceback; returns its error message."""

    def run(argv: list[object]) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in argv]) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    return run
