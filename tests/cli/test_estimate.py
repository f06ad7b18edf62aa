"""`lora-ga estimate` writes a file that `train` starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import lora_ga
from lora_ga import GradientEstimate, LoraGAConfig
from lora_ga.cli import tasks
from lora_ga.cli.data import EstimateBatches
from lora_ga.cli.main import main
from lora_ga.cli.options import DataOptions, EstimateOptions, ModelOptions
from toys import adapted, causal, llama


def command(model: Path, data: Path, out: Path, /, **options: object) -> list[str]:
    given = {"task": "causal-lm", "rank": 2, "estimate_batches": 3, "batch_size": 4, **options}
    given |= {"model": model, "train_file": data, "output": out}
    return ["estimate", *(f"--{name}={value}" for name, value in given.items())]


def test_the_file_holds_the_librarys_estimate(
    llama: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "estimate.safetensors"
    assert main(command(llama, prompts, file, seed=3)) == 0
    shown = capsys.readouterr().out
    found = lora_ga.GradientEstimate.load(file)
    assert f"{file}: the gradient of {len(found)} layers from 3 batches with {found.weight:.0f} labels" in shown
    assert "a rank of 2 can follow 0." in shown

    model = ModelOptions(model=str(llama), task="causal-lm", seed=3)
    data = DataOptions(train_file=str(prompts), batch_size=4)
    base, prepared, collate = tasks.prepare_model(model, tasks.prepare_data(model, data))
    options = EstimateOptions(estimate_batches=3)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    expected = lora_ga.estimate_gradients(
        adapted, EstimateBatches(prepared.train, collate, options, 4, 3), lora_ga.LoraGAConfig(max_batches=3, seed=3)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].U, expected[name].U) for name in found)
    assert found.config.max_batches == 3


def test_train_gives_the_same_adapter_from_the_file_as_from_its_own_estimate(
    llama: Path, prompts: Path, tmp_path: Path
) -> None:
    file = tmp_path / "estimate.safetensors"
    assert main(command(llama, prompts, file)) == 0
    argv = [f"--model={llama}", "--task=causal-lm", f"--train_file={prompts}", "--batch_size=4", "--max_steps=2"]
    for name, more in (("given", [f"--estimate_file={file}"]), ("own", ["--estimate_batches=3"])):
        assert main(["train", *argv, "--rank=2", f"--output_dir={tmp_path / name}", *more]) == 0
    given, own = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("given", "own"))
    assert given.read_bytes() == own.read_bytes()


def test_train_refuses_the_estimate_of_another_model(
    llama: Path,
    bert: Path,
    prompts: Path,
    labelled_texts: Path,
    tmp_path: Path,
    error_of: Callable[[list[object]], str],
) -> None:
    file = tmp_path / "estimate.safetensors"
    assert main(command(bert, labelled_texts, file, task="seq-cls")) == 0
    argv = [f"--model={llama}", "--task=causal-lm", f"--train_file={prompts}", f"--estimate_file={file}", "--rank=2"]
    message = error_of(["train", *argv, f"--output_dir={tmp_path / 'run'}"])
    assert "The estimate belongs to another model: this model has no bert.encoder.layer.0." in message
    assert not (tmp_path / "run").exists()


def test_the_output_is_checked_before_anything_is_loaded(
    tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    nothing = Path("/none")
    (tmp_path / "there.safetensors").touch()
    assert "this file exists. Give another name" in error_of(
        [*command(nothing, nothing, tmp_path / "there.safetensors")]
    )
    assert "an estimate is a .safetensors file" in error_of([*command(nothing, nothing, tmp_path / "estimate.pt")])
    assert "there is no folder" in error_of([*command(nothing, nothing, tmp_path / "no" / "e.safetensors")])
    assert "--output is missing" in error_of(["estimate", "--model=m", "--task=seq-cls", "--train_file=f"])


def test_a_refused_estimate_writes_nothing(
    llama: Path, prompts: Path, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    message = error_of([*command(llama, prompts, tmp_path / "e.safetensors", rank=17)])
    assert "rank 17" in message
    assert list(tmp_path.glob("*.safetensors")) == []


def test_a_bfloat16_base_gives_a_float32_estimate_close_to_that_of_a_float32_base(
    llama: Path, prompts: Path, tmp_path: Path
) -> None:
    for dtype in ("float32", "bfloat16"):
        assert main(command(llama, prompts, tmp_path / f"{dtype}.safetensors", dtype=dtype)) == 0
    full, half = (lora_ga.GradientEstimate.load(tmp_path / f"{d}.safetensors") for d in ("float32", "bfloat16"))
    assert {layer.U.dtype for layer in half.values()} == {torch.float32}
    assert all(half[name].norm == pytest.approx(full[name].norm, rel=0.05) for name in full)
    assert AutoModelForCausalLM.from_pretrained(llama).dtype == torch.float32


def test_an_estimate_resumed_from_a_checkpoint_equals_the_uninterrupted_one(
    llama: Path, prompts: Path, tmp_path: Path, error_of: Callable[[list[object]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, whole, again = (tmp_path / f"{name}.safetensors" for name in ("state", "whole", "again"))
    assert main(command(llama, prompts, whole)) == 0
    original = EstimateBatches.__iter__

    def interrupted(self: EstimateBatches) -> Iterator[Any]:
        for index, batch in enumerate(original(self)):
            if index == 2:
                raise KeyboardInterrupt
            yield batch

    options = {"checkpoint": state, "checkpoint_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(EstimateBatches, "__iter__", interrupted)
        assert main(command(llama, prompts, again, **options)) == 130
    assert state.exists()
    assert not again.exists()
    message = error_of(list(command(llama, prompts, again, **options, seed=1)))
    assert "state.safetensors belongs to another estimate: config.seed is 0 in one, 1 in the other" in message
    assert main(command(llama, prompts, again, **options)) == 0
    first, second = (lora_ga.GradientEstimate.load(file) for file in (whole, again))
    assert all(torch.equal(first[name].U, second[name].U) for name in first)
    assert first.weight == second.weight


def test_tolerance_and_power_steps_reach_the_estimate(llama: Path, prompts: Path, tmp_path: Path) -> None:
    file = tmp_path / "estimate.safetensors"
    assert main(command(llama, prompts, file, tolerance=0.9, power_steps=1, estimate_batches=6)) == 0
    found = lora_ga.GradientEstimate.load(file)
    assert (found.config.tolerance, found.config.power_steps) == (0.9, 1)
    assert found.settled
    # The first batch has no earlier one to compare with, and two comparisons in a row must be within the tolerance.
    assert min(found.settled.values()) == 3


def estimate_files(folder: Path, count: int = 3, seed: int = 0) -> list[str]:
    """Writes estimates of one model, each from other batches; returns the files."""
    files = []
    for index in range(count):
        batches = causal(3 * count)[3 * index : 3 * index + 3]
        file = folder / f"{index}.safetensors"
        lora_ga.estimate_gradients(adapted(llama()), batches, LoraGAConfig(seed=seed)).save(file)
        files.append(str(file))
    return files


def test_merged_files_give_the_estimate_of_all_their_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, files = tmp_path / "all.safetensors", estimate_files(tmp_path)
    (tmp_path / "run").mkdir()
    files[0] = str(Path(files[0]).rename(tmp_path / "run" / "estimate.safetensors").parent)  # the folder of a run
    assert main(["merge", *files, "-o", str(out)]) == 0
    assert "from 9 batches with 396 labels in 3 files" in capsys.readouterr().out
    merged, whole = GradientEstimate.load(out), lora_ga.estimate_gradients(adapted(llama()), causal(9))
    assert (merged.batches, merged.weight) == (whole.batches, whole.weight)
    for name in whole:
        torch.testing.assert_close(merged[name].sketch, whole[name].sketch)
        assert merged[name].norm == pytest.approx(whole[name].norm, rel=0.02)
        cosines = torch.linalg.svdvals(merged[name].V[:, :4].mT @ whole[name].V[:, :8])
        assert cosines.min() > 0.95, name


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_divide_the_batches_and_merge_to_the_estimate_of_them_all(
    llama: Path, prompts: Path, tmp_path: Path, shards: int
) -> None:
    given = ["--model", llama, "--task", "causal-lm", "--train_file", prompts, "--rank", 4, "--max_length", 16]
    given += ["--estimate_batches", 8, "--batch_size", 4, "--on_missing", "lora"]

    def estimate(name: str, *more: object) -> str:
        file = str(tmp_path / f"{name}.safetensors")
        assert main([str(word) for word in ["estimate", *given, *more, "--output", file]]) == 0
        return file

    files = [estimate(str(index), "--shard", f"{index}/{shards}") for index in range(shards)]
    out = str(tmp_path / "all.safetensors")
    assert main(["merge", *files, "-o", out]) == 0
    whole, merged = GradientEstimate.load(estimate("whole")), GradientEstimate.load(out)
    assert (merged.batches, merged.weight) == (whole.batches, whole.weight)
    assert [GradientEstimate.load(file).batches for file in files] == [len(range(8)[i::shards]) for i in range(shards)]
    for name in whole:
        torch.testing.assert_close(merged[name].sketch, whole[name].sketch, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(merged[name].S[:8], whole[name].S[:8], rtol=0.02, atol=0.01 * whole[name].norm)


@pytest.mark.parametrize("shard", ["3/3", "1", "-1/2", "0/0", "a/b"])
def test_an_impossible_shard_is_refused(
    llama: Path, prompts: Path, tmp_path: Path, error_of: Callable[[list[object]], str], shard: str
) -> None:
    given = ["estimate", "--model", llama, "--task", "causal-lm", "--train_file", prompts]
    given += ["--output", tmp_path / "one.safetensors", f"--shard={shard}"]
    assert f"--shard {shard}: it must be i/n with i from 0 to n-1" in error_of(given)


def test_a_shard_without_a_batch_is_refused(
    llama: Path, prompts: Path, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    given = ["estimate", "--model", llama, "--task", "causal-lm", "--train_file", prompts, "--estimate_batches", 2]
    given += ["--output", tmp_path / "one.safetensors", "--shard", "2/3"]
    assert "--shard 2/3: the data gives 2 batches, so this shard has none" in error_of(given)


def test_files_that_cannot_be_merged_are_refused_and_nothing_is_written(
    tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    first, second, _ = estimate_files(tmp_path)
    (tmp_path / "seeded").mkdir()
    other = estimate_files(tmp_path / "seeded", seed=4)[0]
    out = tmp_path / "all.safetensors"
    cases = {
        "1 estimate files given, but it must be two or more": [first, "-o", str(out)],
        "--output is required": [first, second],
        "differ: config.seed is 0 in one, 4 in the other": [first, other, "-o", str(out)],
        f"1 is {first}; 2 is {other}": [first, other, "-o", str(out)],
        "Estimates 1 and 3 are one and the same": [first, second, first, "-o", str(out)],
        "no such file": [first, str(tmp_path / "none.safetensors"), "-o", str(out)],
        "this file exists": [first, second, "-o", first],
        "a .safetensors file": [first, second, "-o", str(tmp_path / "all.bin")],
    }
    for message, argv in cases.items():
        assert message in error_of(["merge", *argv])
    assert not out.exists()
