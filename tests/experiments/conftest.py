"""A toy suite that runs in seconds, a toy hub, a local judge, and a stand-in for the harness."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.metadata
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, set_seed

from cli.conftest import VOCABULARY, WORDS, save_tokenizer
from experiments.hub import write_data, write_hub
from lora_ga.experiments.judging import judge
from lora_ga.experiments.suites.sources import Sources

METHODS = {
    "full": {"rates": [-6, -5]},
    "lora": {"rates": [-5, -4]},
    **{name: {"rates": [-5]} for name in ("rslora", "lora_plus", "pissa", "dora", "adalora", "olora", "eva")},
    **{name: {"rates": [-6]} for name in ("peft_lora_ga", "lora_ga", "gradient_lora", "steps")},
    "random directions": {"method": "lora_ga", "options": {"directions": "random"}, "rate_of": "lora_ga"},
}


def write_models(folder: Path) -> None:
    """Saves a Llama and a BERT of one layer, with their tokenizers."""
    sizes = {"vocab_size": len(VOCABULARY), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    set_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32, max_position_embeddings=64)).save_pretrained(
        folder / "llama"
    )
    save_tokenizer(folder / "llama")
    BertForSequenceClassification(BertConfig(**sizes, intermediate_size=32)).save_pretrained(folder / "bert")
    save_tokenizer(folder / "bert", template="[CLS] $A [SEP]")


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a toy suite: a tiny Llama on a short text, a tiny BERT on a few rows, all in one folder."""
    folder = tmp_path_factory.mktemp("toy")
    write_models(folder)
    words = [WORDS[(3 * number + number // 7) % 10] for number in range(2000)]
    (folder / "text.txt").write_text(" ".join(words))
    rows = [{"sentence": f"{a} {b} {a}", "class": int(a < b)} for a in WORDS for b in WORDS]
    for part, some in (("train", rows[::2]), ("validation", rows[1::2])):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    suite = {
        "title": "toys",
        "seeds": 2,
        "settings": {
            "steps": 4,
            "batch_size": 4,
            "length": 12,
            "rank": 2,
            "samples": 8,
            "eval_steps": 2,
            "tune_rows": 8,
        },
        "tasks": {
            "text": {"kind": "text", "model": str(folder / "llama"), "files": {"text": str(folder / "text.txt")}},
            "classes": {
                "kind": "classes",
                "model": str(folder / "bert"),
                "files": {part: str(folder / f"{part}.jsonl") for part in ("train", "validation")},
                "columns": {"text": "sentence", "label": "class"},
                "labels": 2,
                "metric": "accuracy",
            },
        },
        "methods": METHODS,
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    return folder / "toy.yaml"


VERSION = functools.cache(importlib.metadata.version)


@pytest.fixture(autouse=True)
def versions_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the hundreds of records names the versions of the libraries, and a look-up reads a file."""
    monkeypatch.setattr(importlib.metadata, "version", VERSION)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the pictures of a page empty. For tests of the text: drawing a picture takes a second."""
    monkeypatch.setattr("lora_ga.experiments.pages.document.render", lambda figure, form: b"<svg")


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """The models and data that the published suites name, at toy size."""
    folder = tmp_path_factory.mktemp("places")
    write_hub(folder / "hub")
    write_data(folder / "data")
    return Sources(data=str(folder / "data"), hub=str(folder / "hub"))


class JudgeHandler(BaseHTTPRequestHandler):
    """A judge's endpoint: sends the next of the server's answers; repeats the last one."""

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))  # type: ignore[attr-defined]
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})  # type: ignore[attr-defined]
        answers = self.server.answers  # type: ignore[attr-defined]
        code, text = answers.pop(0) if len(answers) > 1 else answers[0]
        if code == 0:
            self.server.silence.wait(5)  # type: ignore[attr-defined]
            return
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text if isinstance(text, bytes) else json.dumps(completion(text)).encode())

    def log_message(self, *_: Any) -> None:
        """Logs nothing."""


def completion(text: str) -> dict[str, Any]:
    """The body of a chat completion."""
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def judge_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A judge on this machine: `answers` are its next answers, `asked` and `headers` the requests it received."""
    server: Any = HTTPServer(("127.0.0.1", 0), JudgeHandler)
    server.answers, server.asked, server.headers = [(200, "Rating: [[7]]")], [], []
    server.silence = threading.Event()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setattr(judge, "PAUSE", 0.0)
    yield server
    server.silence.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for lm-evaluation-harness: runs a task as the harness does, and returns the mean score."""

    class Wrapped:
        def __init__(self, pretrained: Any, tokenizer: Any, **_: Any) -> None:
            self.model, self.tokenizer = pretrained, tokenizer

    def simple_evaluate(wrapped: Any, tasks: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
        (config,) = tasks
        most = config["generation_kwargs"]["max_gen_toks"]
        values = []
        for doc in config["custom_dataset"]()[config["test_split"]]:
            answer = judge.answer(wrapped.model, wrapped.tokenizer, config["doc_to_text"](doc), 0.0, most)
            values.append(config["process_results"](doc, [answer])[config["task"]])
        return {"results": {config["task"]: {f"{config['task']},none": sum(values) / len(values)}}}

    stubs = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")}
    for name, module in stubs.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    stubs["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    stubs["lm_eval.models.huggingface"].HFLM = Wrapped  # type: ignore[attr-defined]
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
