"""Files that earlier versions wrote load, train on, merge and resume to the numbers of that version, or are refused.

docs/formats.md describes the formats; tests/golden_set.py writes the sets and says when to make the next one.
"""

from __future__ import annotations

import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import golden_set
import lora_ga
from lora_ga import GradientEstimate
from lora_ga.adapter import save
from lora_ga.cli.main import main as command
from lora_ga.experiments.records.runs import load_run
from lora_ga.experiments.records.store import Store
from lora_ga.experiments.suites import trained
from lora_ga.experiments.suites.cells import missing
from lora_ga.experiments.suites.spec import load_suite
from lora_ga.export.merge import merge_adapter
from lora_ga.files import read_tensors, write_tensors
from lora_ga.gradients import result

GOLDEN = Path(__file__).parent / "golden"
# Set → what is new in it.
SETS = {
    "0.1-first": "safetensors files of format 1, without checksums",
    "0.1-json-store": "format 2; a store of format 1, with one JSON file for each record",
    "0.1-rslora": "a store of format 2; adapter_config.json with use_rslora",
    "0.1-alpha": "adapter_config.json without use_rslora; estimates in training mode",
}
ADAPTERS = ("delta", "base", "dora", "head")
WITH = {
    "adapters": ("0.1-first", "0.1-rslora", "0.1-alpha"),
    "state": ("0.1-rslora", "0.1-alpha"),
    "store": ("0.1-json-store", "0.1-rslora", "0.1-alpha"),
}


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all sets."""
    folder = tmp_path_factory.mktemp("golden")
    # Python before 3.10.12 and 3.11.4 does not know the filter; Debian 12 has 3.11.2.
    safely: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    for name in SETS:
        with tarfile.open(GOLDEN / f"{name}.tar.gz") as file:
            file.extractall(folder / name, **safely)
    return folder


@pytest.fixture
def golden(request: pytest.FixtureRequest, unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of one set, which is the current folder: its files name each other by relative paths."""
    folder = shutil.copytree(unpacked / request.param, tmp_path / "set")
    monkeypatch.chdir(folder)
    return folder


def sets(part: str) -> Any:
    return pytest.mark.parametrize("golden", WITH[part], indirect=True)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """The logits are about 1. Other versions of torch may add up in another order."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


def numbers() -> dict[str, Tensor]:
    return load_file("logits.safetensors")


def test_every_set_has_a_row_and_they_are_small() -> None:
    files = sorted(GOLDEN.glob("*.tar.gz"))
    assert [file.name.removesuffix(".tar.gz") for file in files] == sorted(SETS)
    assert sum(file.stat().st_size for file in files) < 2 * 2**20


@sets("adapters")
@pytest.mark.parametrize("name", [*ADAPTERS, "small"])
def test_an_old_adapter_has_its_logits_merges_and_trains_on(golden: Path, name: str) -> None:
    folder, wanted = f"adapters/{name}", numbers()
    if folder not in wanted:
        pytest.skip("this version did not know it")
    assert_close(golden_set.logits(golden_set.base()), wanted["base"])
    assert_close(golden_set.logits(lora_ga.load(golden_set.base(), folder)), wanted[folder])
    merge_adapter(folder, "merged", base=golden_set.base())
    assert_close(golden_set.logits(AutoModelForCausalLM.from_pretrained("merged").eval()), wanted[folder])
    if name != "small":
        model = lora_ga.load(golden_set.base(), folder, is_trainable=True).train()
        assert_close(golden_set.logits(golden_set.train(model, 1, 20)), wanted[f"{folder}, next"])


@sets("adapters")
def test_old_estimates_load_add_up_and_start_an_adapter(golden: Path) -> None:
    parts = [GradientEstimate.load(f"estimate-{number}.safetensors") for number in (0, 1)]
    added, wanted = parts[0].merge(parts[1]), GradientEstimate.load("sum.safetensors")
    assert (added.weight, added.batches) == (wanted.weight, wanted.batches) == (144.0, 8)
    for name in wanted:
        torch.testing.assert_close(added[name].S, wanted[name].S, rtol=1e-4, atol=1e-6)
    model = golden_set.adapted(golden_set.ADAPTERS["delta"][0])
    lora_ga.initialize(model, parts[0], parts[0].config)  # the default size of a start has changed since
    assert_close(golden_set.logits(golden_set.train(model, 1, 20)), numbers()["estimate-0.safetensors, next"])


@sets("state")
def test_an_estimate_that_an_old_version_broke_off_goes_on(golden: Path) -> None:
    model, whole = golden_set.adapted(golden_set.ADAPTERS["delta"][0]), GradientEstimate.load("whole.safetensors")
    settings: dict[str, Any] = {"checkpoint": "state.safetensors", "every": 2}
    if not whole.config.training_mode:
        with pytest.raises(
            ValueError, match=r"training_mode is False in one, True in the other.* by version 0\.1\.0, or"
        ):
            lora_ga.estimate_gradients(model, golden_set.batches(8), **settings)
    estimate = lora_ga.estimate_gradients(model, golden_set.batches(8), whole.config, **settings)
    assert (estimate.batches, estimate.weight) == (whole.batches, whole.weight)
    for name in whole:
        torch.testing.assert_close(estimate[name].S, whole[name].S, rtol=1e-4, atol=1e-6)


@sets("adapters")
def test_an_old_run_resumes_to_its_result(golden: Path) -> None:
    assert command(["train", "--resume", "--output_dir", "runs/broken"]) == 0
    assert_close(
        golden_set.logits(lora_ga.load(golden_set.base(), "runs/broken/adapter")), numbers()["runs/whole/adapter"]
    )
    old, new = load_run(Path("runs/whole")), load_run(Path("runs/broken"))
    assert [step for step, _ in new.curve] == [step for step, _ in old.curve] == [1, 2, 3, 4]
    assert [loss for _, loss in new.curve] == pytest.approx([loss for _, loss in old.curve], abs=1e-4)


@sets("store")
def test_no_cell_of_an_old_store_runs_again(golden: Path) -> None:
    Path("golden.yaml").write_text(yaml.safe_dump(golden_set.SUITE, sort_keys=False))
    suite, store = load_suite("golden.yaml"), Store("store")
    records = store.records()
    assert len(records) >= 10
    assert missing(suite, suite.lines(), records) == []
    with store.locked():
        store.compact()
    assert store.records() == records


NEWER = {
    "an estimate": (
        "estimate-0.safetensors: written in format 3, this version of LoRA-GA reads the formats 1 and 2. Read it with",
        lambda: GradientEstimate.load(newer("estimate-0.safetensors")),
    ),
    "a sidecar": (
        "lora_ga.safetensors: written in format 3, this version of LoRA-GA reads the formats 1 and 2. Read it with",
        lambda: newer("adapters/delta/lora_ga.safetensors") and lora_ga.load(torch.nn.Linear(1, 1), "adapters/delta"),
    ),
    "a run": (
        "run.json: schema 2, but this version of lora-ga reads schema 1. Read it with the version that wrote it",
        lambda: replaced("runs/whole/run.json", '"schema": 1', '"schema": 2') and load_run(Path("runs/whole")),
    ),
    "a store": (
        "store: written in format 3, this version reads format 1 or 2. Use the version of lora-ga that wrote it",
        lambda: replaced("store/store.json", '"schema": 2', '"schema": 3') and Store("store").records(),
    ),
    "a trained model": (
        "trained: written in format 2, this version reads format 1. Judge it with the version that wrote it, or remove",
        lambda: (
            replaced("trained/facts.json", '"schema": 1', '"schema": 2')
            and trained.restore(Path("trained"), nn.Module())
        ),
    ),
}


def replaced(file: str, old: str, new: str) -> str:
    text = Path(file).read_text(encoding="utf-8")
    assert text.count(old) == 1
    Path(file).write_text(text.replace(old, new), encoding="utf-8")
    return file


def restored(facts: str) -> object:
    return trained.restore(Path(facts).parent, torch.nn.Linear(2, 2))


def newer(file: str) -> str:
    """Writes a safetensors file anew, as of the next format."""
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata() | {"schema": "3"}
    save_file(load_file(file), file, header)
    return file


@pytest.mark.parametrize("golden", ["0.1-alpha"], indirect=True)
@pytest.mark.parametrize("name", NEWER)
def test_files_of_a_later_format_are_refused_with_the_way_out(golden: Path, name: str) -> None:
    trained.save(Path("trained"), torch.nn.Linear(2, 2), {}, {})
    message, read = NEWER[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        read()


@pytest.mark.parametrize("golden", ["0.1-alpha"], indirect=True)
def test_a_setting_that_this_version_does_not_know_is_refused_with_the_file_and_its_version(golden: Path) -> None:
    for file, kind in (
        ("estimate-0.safetensors", result.FILE_KIND),
        ("adapters/delta/lora_ga.safetensors", save.FILE_KIND),
    ):
        tensors, record = read_tensors(file, kind)
        record["config"]["hindsight"] = 1
        write_tensors(file, kind, tensors, record | {"versions": {"lora_ga": "0.9"}})
    with pytest.raises(ValueError, match=r"estimate-0.*no setting hindsight; .*by version 0\.9\. Make the"):
        GradientEstimate.load("estimate-0.safetensors")
    with pytest.raises(ValueError, match=r"lora_ga\.s.*no setting hindsight; .* wrote it \(0\.9\), or remove"):
        lora_ga.load(torch.nn.Linear(1, 1), "adapters/delta")


@pytest.mark.parametrize("golden", ["0.1-alpha"], indirect=True)
def test_a_sidecar_whose_record_cannot_be_used_is_refused_with_its_folder(golden: Path) -> None:
    file = "adapters/delta/lora_ga.safetensors"
    tensors, record = read_tensors(file, save.FILE_KIND)
    write_tensors(file, save.FILE_KIND, tensors, record | {"plain": {"model.layers.0.self_attn.q_proj": [1]}})
    with pytest.raises(ValueError, match=r"^adapters/delta: damaged, or not .*not enough values to unpack"):
        lora_ga.load(golden_set.base(), "adapters/delta", is_trainable=True)
