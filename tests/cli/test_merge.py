"""`lora-ga merge`, and the shards of `lora-ga estimate` that it merges."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lora_ga
from lora_ga import GradientEstimate, LoraGAConfig
from lora_ga.cli.main import main
from toys import adapted, causal, llama


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
    out = tmp_path / "all.safetensors"
    assert main(["merge", *estimate_files(tmp_path), "-o", str(out)]) == 0
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
