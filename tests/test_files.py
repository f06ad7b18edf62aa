"""Files of estimates: saving and loading, merging, atomic writing, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_ga
from lora_ga import GradientEstimate, LoraGAConfig
from lora_ga import files as files_module
from lora_ga.files import check_empty, fingerprint, new_folder, write_atomically, write_tensors
from toys import adapted, causal, gpt2, llama


@pytest.fixture
def estimate() -> GradientEstimate:
    return lora_ga.estimate_gradients(adapted(llama()), causal(), LoraGAConfig(seed=5))


def test_a_saved_estimate_loads_with_the_same_values(tmp_path: Path, estimate: GradientEstimate) -> None:
    estimate.save(tmp_path / "deep" / "estimate.safetensors")
    again = GradientEstimate.load(tmp_path / "deep" / "estimate.safetensors")
    assert (again.config, again.fingerprint, again.weight, again.batches) == (
        estimate.config,
        estimate.fingerprint,
        estimate.weight,
        estimate.batches,
    )
    assert list(again) == list(estimate)
    for name in estimate:
        assert all(torch.equal(getattr(again[name], part), getattr(estimate[name], part)) for part in ("U", "S", "V"))
        assert again[name].norm == estimate[name].norm
    one, other = adapted(llama()), adapted(llama())
    lora_ga.initialize(one, estimate)
    lora_ga.initialize(other, again)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_an_estimate_gives_its_limits_and_spectrum(estimate: GradientEstimate) -> None:
    limits = estimate.limit(4)
    assert set(limits) == set(estimate.spectrum()) == set(estimate)
    assert all(0.5 < limit <= 1 for limit in limits.values())
    assert all(math.isnan(limit) for limit in estimate.limit(13).values())
    assert all((s.diff() <= 0).all() for s in estimate.spectrum().values())


def test_estimates_of_two_halves_merge_to_that_of_the_whole() -> None:
    model = adapted(llama())
    batches = causal(8)
    batches[1]["labels"][:, :6] = -100
    halves = [lora_ga.estimate_gradients(model, part) for part in (batches[:3], batches[3:])]
    whole = lora_ga.estimate_gradients(model, batches, LoraGAConfig(estimator="dense"))
    merged = halves[0].merge(halves[1])
    assert (merged.weight, merged.batches) == (whole.weight, 8)
    for name in whole:
        captured = (
            merged[name].U[:, :8].mT @ (whole[name].U * whole[name].S) @ (whole[name].V.mT @ merged[name].V[:, :8])
        )
        assert captured.norm() > 0.98 * whole[name].S[:8].norm(), name
        assert merged[name].norm == pytest.approx(whole[name].norm, rel=0.05)


def test_estimates_of_other_models_or_settings_do_not_merge(estimate: GradientEstimate) -> None:
    model = adapted(llama())
    cases = {
        r"1 and 2 differ: config\.seed is 5 in one, 0 in the other": lora_ga.estimate_gradients(model, causal()),
        "1 and 2 differ: fingerprint is": dataclasses.replace(estimate, fingerprint="0" * 16),
        r"differ in their layers: model\.layers\.0\.mlp\.down_proj": dataclasses.replace(
            estimate, layers={n: e for n, e in estimate.items() if n != "model.layers.0.mlp.down_proj"}
        ),
        r"hold 24 and 20 directions of model\.layers\.0\.self_attn\.q_proj": lora_ga.estimate_gradients(
            adapted(llama(), r=2), causal(), estimate.config
        ),
        "1 and 2 are one and the same": estimate,
    }
    for message, other in cases.items():
        with pytest.raises(ValueError, match=message):
            estimate.merge(other)


def test_the_fingerprint_depends_on_the_base_but_not_on_the_adapter_or_the_values() -> None:
    base = llama()
    found = fingerprint(base)
    assert fingerprint(llama(seed=9)) == found
    model = adapted(base, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    assert fingerprint(model) == found
    lora_ga.initialize(model, causal())
    assert fingerprint(model) == found
    assert len({found, fingerprint(llama(num_hidden_layers=1)), fingerprint(llama(intermediate_size=64))}) == 3
    assert fingerprint(adapted(gpt2(), ["c_attn"])) == fingerprint(gpt2())


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file .expected a LoRA-GA gradient estimate"):
        GradientEstimate.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, estimate: GradientEstimate, share: float) -> None:
    file = tmp_path / "estimate.safetensors"
    estimate.save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="damaged, or not a safetensors file"):
        GradientEstimate.load(file)


def test_a_pickle_is_refused_as_damaged(tmp_path: Path) -> None:
    file = tmp_path / "estimate.safetensors"
    torch.save({"a": 1}, file)
    with pytest.raises(ValueError, match="damaged, or not a safetensors file"):
        GradientEstimate.load(file)


def test_files_of_another_kind_or_format_and_incomplete_files_are_refused(
    tmp_path: Path, estimate: GradientEstimate
) -> None:
    file = tmp_path / "estimate.safetensors"
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="holds tensors of another program, expected a LoRA-GA gradient estimate"):
        GradientEstimate.load(file)
    adapted_model = adapted(llama())
    lora_ga.initialize(adapted_model, causal())
    adapted_model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds the LoRA-GA sidecar of an adapter"):
        GradientEstimate.load(tmp_path / "adapter" / "lora_ga.safetensors")
    estimate.save(file)
    tensors = load_file(file)
    header = {"kind": "a LoRA-GA gradient estimate", "schema": "99", "record": "{}"}
    save_file(tensors, file, metadata=header)
    with pytest.raises(ValueError, match="written in format 99, this version reads format 2"):
        GradientEstimate.load(file)
    write_tensors(file, "a LoRA-GA gradient estimate", tensors, {})
    with pytest.raises(ValueError, match="damaged, 'norms' is missing"):
        GradientEstimate.load(file)
    with safe_open(str(file), "pt") as written:
        header = written.metadata()
    save_file(tensors, file, metadata={key: value for key, value in header.items() if key != "record"})
    with pytest.raises(ValueError, match="damaged, its record cannot be read .'record'"):
        GradientEstimate.load(file)


def test_a_file_with_one_changed_byte_is_refused(tmp_path: Path, estimate: GradientEstimate) -> None:
    file = tmp_path / "estimate.safetensors"
    estimate.save(file)
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged, its values do not fit their checksum"):
        GradientEstimate.load(file)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a folder; give the file itself"):
        GradientEstimate.load(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(OSError, match="No space left"), new_folder(tmp_path / "folder") as folder:
        (folder / "inner").write_bytes(b"new")
    assert list(tmp_path.iterdir()) == [file]


def test_a_new_folder_appears_when_all_of_it_is_written(tmp_path: Path) -> None:
    target = tmp_path / "made" / "folder"
    with new_folder(target) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_bytes(b"content")
        assert not target.exists()
    assert (target / "deep" / "file").read_bytes() == b"content"
    assert list(target.parent.iterdir()) == [target]
    assert check_empty(tmp_path / "none") == tmp_path / "none"
    with pytest.raises(ValueError, match="folder: not empty. Choose another output folder"):
        check_empty(target)
    with pytest.raises(RuntimeError, match="stopped"), new_folder(tmp_path / "other"):
        raise RuntimeError("stopped")
    assert not (tmp_path / "other").exists()
