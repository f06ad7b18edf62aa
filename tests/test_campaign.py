"""The campaign of faults in its short form, and what the whole one has found, as quick tests."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_ga
from lora_ga.cli.checkpoints import STATE, read_trainer_state
from lora_ga.cli.parsing import read_mapping
from lora_ga.experiments.records import gzip_lines
from lora_ga.experiments.records.store import Store
from lora_ga.experiments.suites.spec import load_suite
from lora_ga.export.merge import merge_adapter
from lora_ga.export.saved_adapter import read_adapter
from lora_ga.files import damaged, read_labels, read_tensors, write_tensors
from toys import llama, saved

DEEP = "[" * 100_000


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks processes")
def test_no_fault_of_the_short_campaign_loses_anything(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    command = [sys.executable, "-m", "campaign", "--short", "--seed", "7", "--record", str(record)]
    path = os.pathsep.join(each for each in sys.path if each)
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads(record.read_text())["runs"]
    found = run["parts"]
    assert found.keys() == {"kills", "disks", "bytes", "deaths", "ranks", "numbers"}
    for part in found.values():
        assert part["tried"] == part["survived"] + part["refused"] > 0
        assert part["lost"] == []


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    saved(tmp_path / "adapter", targets=["q_proj"])
    return tmp_path / "adapter"


def test_a_changed_record_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write_tensors(file, "a test", {"x": torch.ones(2)}, {"weight": 12345})
    content = file.read_bytes()
    assert content.count(b"12345") == 1
    file.write_bytes(content.replace(b"12345", b"12346"))
    with pytest.raises(ValueError, match="x.safetensors: damaged, its record does not fit its checksum"):
        read_tensors(file, "a test")


def test_a_value_without_dimensions_has_a_checksum(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", "a test", {"x": torch.tensor(2.0)}, {})
    assert read_tensors(tmp_path / "x.safetensors", "a test")[0]["x"].item() == 2.0


def test_errors_of_other_code_get_the_name_of_the_file() -> None:
    with pytest.raises(ValueError, match=r"^here: damaged, or not .* \(KeyError: 'r'\)\. Put a"), damaged("here"):
        raise KeyError("r")
    with pytest.raises(ValueError, match="^here: bad$"), damaged("here"):
        raise ValueError("here: bad")
    for error in (OSError, ModuleNotFoundError, torch.OutOfMemoryError):
        with pytest.raises(error, match="^another cause$"), damaged("here"):
            raise error("another cause")


def test_numbers_that_are_not_finite_are_refused_before_they_are_compressed(adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(iter(tensors))
    tensors[key][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"adapter: {key} holds numbers that are not finite"):
        lora_ga.compress_adapter(adapter, tmp_path / "small", rank=2)


@pytest.mark.parametrize("text", ["{}", "[1]", DEEP, "{"])
def test_a_damaged_configuration_is_refused_with_its_folder(adapter: Path, text: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    for read in (read_adapter, lambda folder: lora_ga.load(llama(), folder)):
        with pytest.raises(ValueError, match=r"adapter(/adapter_config.json)?: (damaged|an adapter of type)"):
            read(adapter)


@pytest.mark.parametrize("content", [b"", b"x" * 30, bytes(8), b"\xff" * 40])
def test_a_damaged_adapter_file_is_refused_with_its_name(adapter: Path, content: bytes) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: damaged, or not what"):
        lora_ga.load(llama(), adapter)


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "bomb.jsonl.gz": (gzip_lines.read, "holds more than 524,288 bytes of text"),
    "deep.jsonl.gz": (gzip_lines.read, "line 1 is damaged, it is not JSON .nested too deeply"),
    "store.json": (lambda file: Store(file.parent).records(), "written in format None"),
    STATE: (
        lambda file: read_trainer_state(file.parent),
        "is damaged .*Remove .* to resume from the checkpoint b",
    ),
    "labels.json": (lambda file: read_labels(file.parent), "damaged, it must map the numbers"),
    "options.yaml": (read_mapping, "could not be read as YAML: more than 100000 values"),
    "suite.yaml": (lambda file: load_suite(str(file)), "could not be read as YAML .more than 100000 values"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gzip_lines, "MOST", 2**19)
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    aliases = "\n".join(["a0: &a0 [x]", *levels]).encode()
    contents = {
        "bomb.jsonl.gz": gzip.compress(bytes(2**20)),
        "deep.jsonl.gz": gzip.compress(DEEP.encode()),
        "store.json": b"[2]",
        STATE: b'{"global_step": 1',
        "labels.json": b'{"one": "good"}',
        "options.yaml": aliases,
        "suite.yaml": aliases,
    }
    (tmp_path / name).write_bytes(contents[name])
    read, message = DAMAGED[name]
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"):
        read(tmp_path / name)


def test_what_goes_with_a_written_folder_appears_with_it(adapter: Path, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
        raise OSError("the disk is full")

    for name, write in {
        "merged": lambda out: merge_adapter(adapter, out, base=llama(), companions=fail),
        "small": lambda out: lora_ga.compress_adapter(adapter, out, rank=2, companions=fail),
    }.items():
        with pytest.raises(OSError, match="the disk is full"):
            write(tmp_path / name)
        assert not (tmp_path / name).exists()
