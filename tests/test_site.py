"""The pages of docs/: the Python blocks of the README, the quick start and the tutorials run; links lead somewhere.

The blocks name models of the hub. The tests put tiny models with random weights into folders of these names, in the
directory in which the blocks run.
"""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, ViTConfig, ViTForImageClassification

import picture
from toys import bert, llama

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
LETTERS = {letter: number for number, letter in enumerate(["[PAD]", "[UNK]", "</s>", *string.printable])}


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each letter, and a chat template."""
    model = Tokenizer(WordLevel(LETTERS, unk_token="[UNK]"))
    model.pre_tokenizer = Split("", "isolated")
    special = {"unk_token": "[UNK]", "eos_token": "</s>", "pad_token": "[PAD]"}
    return PreTrainedTokenizerFast(tokenizer_object=model, chat_template=CHAT, **special)


def vit() -> ViTForImageClassification:
    """A vision transformer for pictures of 224 × 224."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return ViTForImageClassification(ViTConfig(patch_size=56, num_labels=2, **sizes))


# Name on the hub → function that makes the model that stands for it.
STANDINS: dict[str, Any] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": lambda: llama(vocab_size=len(LETTERS), max_position_embeddings=512),
    "google-bert/bert-base-uncased": lambda: bert(vocab_size=len(LETTERS), num_labels=2),
    "google/vit-base-patch16-224-in21k": vit,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model for each name in `STANDINS`."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in STANDINS.items():
        model().save_pretrained(folder / name)
        letters().save_pretrained(folder / name)
    return folder


PAGES = ["README.md", "docs/quickstart.md", *(f"docs/tutorials/{path.name}" for path in DOCS.glob("tutorials/*.md"))]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_the_blocks_of_a_page_run_in_their_order_and_save_an_adapter(
    page: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for owner in models.iterdir():
        (tmp_path / owner.name).symlink_to(owner)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL):
        exec(compile(block, page, "exec"), names)
    assert names["name"] in STANDINS
    assert [path.parent for path in tmp_path.rglob("lora_ga.safetensors")], "no adapter with a start was saved"
    if "tutorials" not in page:  # their few rows stand for a file
        assert "alignment limit" in caplog.text
        assert "too little to learn anything" not in caplog.text


def test_the_picture_of_the_start_is_drawn_from_its_record() -> None:
    assert picture.PATH.read_text() == picture.picture()
