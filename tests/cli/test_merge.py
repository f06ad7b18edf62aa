"""`lora-ga merge` and the estimate's checkpoint, through the program's own entry."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lora_ga
from lora_ga import GradientEstimate, LoraGAConfig
from lora_ga.cli.main import main
from toys import adapted, causal, llama


def made(folder: Path, count: int = 3, seed: int = 0) -> list[str]:
    """Estimate files of different batches of one model."""
    files = []
    for index in range(count):
        batches = causal(3 * count)[3 * index : 3 * index + 3]
        file = folder / f"{index}.safetensors"
        lora_ga.estimate_gradients(adapted(llama()), batches, LoraGAConfig(seed=seed)).save(file)
        files.append(str(file))
    return files


def test_the_sum_of_the_files_is_the_estimate_of_all_their_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "all.safetensors"
    assert main(["merge", *made(tmp_path), "-o", str(out)]) == 0
    assert "from 9 batches with 396 labels in 3 files" in capsys.readouterr().out
    merged, whole = GradientEstimate.load(out), lora_ga.estimate_gradients(adapted(llama()), causal(9))
    assert (merged.batches, merged.weight) == (whole.batches, whole.weight)
    for name in whole:
        torch.testing.assert_close(merged[name].sketch, whole[name].sketch)
        assert merged[name].norm == pytest.approx(whole[name].norm, rel=0.02)
        cosines = torch.linalg.svdvals(merged[name].V[:, :4].mT @ whole[name].V[:, :8])
        assert cosines.min() > 0.95, name


def test_what_does_not_add_up_is_refused_and_nothing_written(
    tmp_path: Path, refused: Callable[[list[object]], str]
) -> None:
    first, second, _ = made(tmp_path)
    (tmp_path / "seeded").mkdir()
    other = made(tmp_path / "seeded", seed=4)[0]
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
        assert message in refused(["merge", *argv])
    assert not out.exists()
