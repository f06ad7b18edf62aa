"""The pages of docs/: the Python blocks and the commands of the README, the quick start and the tutorials run.

They name models of the hub. The tests put tiny models with random weights into folders of these names, in the
directory in which the blocks run.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import shlex
import string
from collections.abc import Iterator
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
from lora_ga.cli.main import main
from toys import INPUTS, bert, llama

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
LETTERS = {letter: number for number, letter in enumerate(["[PAD]", "[UNK]", "</s>", *string.printable])}


def letters(template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each letter, and a chat template or none."""
    model = Tokenizer(WordLevel(LETTERS, unk_token="[UNK]"))
    model.pre_tokenizer = Split("", "isolated")
    special = {"unk_token": "[UNK]", "eos_token": "</s>", "pad_token": "[PAD]"}
    return PreTrainedTokenizerFast(tokenizer_object=model, chat_template=template, model_input_names=INPUTS, **special)


def small_llama() -> Any:
    """A Llama for these letters. On some CPUs bitsandbytes needs layers of a width of 64."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    return llama(vocab_size=len(LETTERS), **sizes)


def vit() -> ViTForImageClassification:
    """A vision transformer for pictures of 224 × 224."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return ViTForImageClassification(ViTConfig(patch_size=56, num_labels=2, **sizes))


# Name on the hub → function that makes the model that stands for it.
STANDINS: dict[str, Any] = {
    "MODEL": small_llama,  # of the README's commands
    "HuggingFaceTB/SmolLM2-135M-Instruct": small_llama,
    "HuggingFaceTB/SmolLM2-135M": small_llama,
    "google-bert/bert-base-uncased": lambda: bert(vocab_size=len(LETTERS), num_labels=2),
    "google/vit-base-patch16-224-in21k": vit,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model for each name in `STANDINS`."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in STANDINS.items():
        model().save_pretrained(folder / name)
        letters(None if name.endswith("135M") else CHAT).save_pretrained(folder / name)
    return folder


# The commands that run here. The others need a network, hours, or two runs; tests/cli and tests/experiments run them.
QUICK = {"train", "estimate", "rate", "inspect", "export"}


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of each call of `lora-ga` in a text; a backslash at the end of a line joins it with the next."""
    for call in re.findall(r"^(?:\w+=\w+ )?lora-ga (.*)", text.replace("\\\n", " "), flags=re.MULTILINE):
        yield shlex.split(call, comments=True)


def data(page: str, names: dict[str, Any]) -> None:
    """Writes the training file that the commands of a page name, if its Python blocks have not written it."""
    if page == "README.md":
        rows = [{"text": text, "label": len(text) % 2} for text in names["texts"]]
    else:
        rows = [{"text": text} for text in names.get("texts", [])]
    if not Path("train.jsonl").exists():
        Path("train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


PAGES = ["README.md", "docs/quickstart.md", *(f"docs/tutorials/{path.name}" for path in DOCS.glob("tutorials/*.md"))]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_the_blocks_and_commands_of_a_page_run_in_their_order_and_save_an_adapter(
    page: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for owner in models.iterdir():
        (tmp_path / owner.name).symlink_to(owner)
    names: dict[str, Any] = {}
    said = ""
    for language, block in re.findall(r"```(\w*)\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL):
        if language == "python":
            exec(compile(block, page, "exec"), names)
            said = caplog.text
        elif language == "jinja":
            Path("chat.jinja").write_text(block)
        for command in commands(block) if language in {"", "bash"} else ():
            data(page, names)
            assert command[0] not in QUICK or main(command) == 0, f"lora-ga {shlex.join(command)}"
    assert names["name"] in STANDINS
    assert [path.parent for path in tmp_path.rglob("lora_ga.safetensors")], "no adapter with a start was saved"
    if "tutorials" not in page:  # their few rows stand for a file
        assert "alignment limit" in said
        assert "too little to learn anything" not in said


@functools.cache
def options(command: str) -> set[str]:
    """The options that the help of a command names."""
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        main([command, "--help"])
    return set(re.findall(r"--\w+", shown.getvalue()))


def test_every_command_of_the_pages_has_options_that_exist() -> None:
    found = 0
    for page in [ROOT / "README.md", *DOCS.glob("**/*.md")]:
        text = page.read_text()
        for command in [*commands(text), *commands("\n".join(re.findall(r"`(lora-ga [^`]+)`", text)))]:
            named = {word.partition("=")[0] for word in command if word.startswith("--")} - {"--help"}
            assert named <= options(command[0]), f"{page.name}: lora-ga {shlex.join(command)}"
            found += len(named)
    assert found > 50


def test_no_line_of_code_is_too_long_for_the_site() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("**/*.md")]:
        for block in re.findall(r"```\w*\n(.*?)```", page.read_text(), flags=re.DOTALL):
            assert max(len(line) for line in block.splitlines()) <= 90, f"{page.name}: {block}"


def test_the_picture_of_the_start_is_drawn_from_its_record() -> None:
    assert picture.PATH.read_text() == picture.picture()
