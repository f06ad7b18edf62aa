"""Files of estimates: saving and loading, merging, atomic writing, and what is refused."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora_ga
from lora_ga import GradientEstimate, LoraGAConfig, base
from lora_ga import files as files_module
from lora_ga.base import another_base, fingerprint
from lora_ga.cli.checkpoints import check_output_dir
from lora_ga.cli.estimate import check_new_file
from lora_ga.experiments.suites.trained import save as save_trained
from lora_ga.files import check_empty, new_folder, write_atomically, write_safetensors, write_tensors
from toys import adapted, bert, causal, gpt2, llama, logits, saved, train


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


def test_weights_with_signs_give_that_combination_of_gradients() -> None:
    model = adapted(llama(), ["q_proj", "up_proj"])
    config = LoraGAConfig(oversample=1_000)
    first, second = (lora_ga.estimate_gradients(model, [batch], config) for batch in causal(2))
    dense = [
        lora_ga.estimate_gradients(model, [batch], dataclasses.replace(config, estimator="dense"))
        for batch in causal(2)
    ]
    combined = first.merge(second, weights=[1, -0.5])
    for name, layer in combined.items():
        one, other = ((each[name].U * each[name].S) @ each[name].V.mT for each in dense)
        wanted = one - 0.5 * other
        torch.testing.assert_close((layer.U * layer.S) @ layer.V.mT, wanted, rtol=1e-3, atol=1e-6)
        assert layer.norm == pytest.approx(wanted.norm().item(), rel=1e-3)
        assert (layer.S >= 0).all()
    for weights in ([1.0], [1.0, 0.0], [1.0, math.nan]):
        with pytest.raises(ValueError, match="it must hold a finite number other than 0 for each of the 2 estimates"):
            first.merge(second, weights=weights)


def test_estimates_of_other_models_or_settings_do_not_merge(estimate: GradientEstimate) -> None:
    model, narrow = adapted(llama()), adapted(llama(intermediate_size=40))
    cases = {
        r"1 and 2 are of different models: .*down_proj is \d+ x \d+ in one, \d+ x 40": lora_ga.estimate_gradients(
            narrow, causal(), estimate.config
        ),
        r"1 and 2 differ: config\.seed is 5 in one, 0 in the other": lora_ga.estimate_gradients(model, causal()),
        r"1 and 2 are of different models: only one of them has model\.layers\.1": lora_ga.estimate_gradients(
            adapted(llama(num_hidden_layers=1)), causal(), estimate.config
        ),
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
    with pytest.raises(ValueError, match="written in format 99, this version of LoRA-GA reads the formats 1 and 2"):
        GradientEstimate.load(file)
    write_tensors(file, "a LoRA-GA gradient estimate", tensors, {})
    with pytest.raises(ValueError, match="damaged, 'batches' is missing"):
        GradientEstimate.load(file)
    with safe_open(str(file), "pt") as written:
        header = written.metadata()
    save_file(tensors, file, metadata={key: value for key, value in header.items() if key != "record"})
    with pytest.raises(ValueError, match="damaged, its record does not fit its checksum"):
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


def test_a_place_that_cannot_be_written_to_is_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "no" / "target"
    assert check_empty(target) == target
    assert list(tmp_path.iterdir()) == []

    def read_only(dir: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), dir)

    monkeypatch.setattr(files_module.tempfile, "TemporaryFile", read_only)
    message = rf"{target}: nothing can be written in {tmp_path} \(Read-only file system\)\. Choose another\."
    with pytest.raises(PermissionError, match=message):
        check_empty(target)
    with pytest.raises(PermissionError, match="nothing can be written in"):
        check_new_file(str(tmp_path / "estimate.safetensors"))
    with pytest.raises(PermissionError, match="nothing can be written in"):
        check_output_dir(target)


@pytest.mark.parametrize("kind", ["current", "mounted", "read-only parent"])
def test_a_folder_that_must_stay_is_filled_and_its_configuration_comes_last(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    before, replace = target.stat().st_ino, Path.replace
    order: list[str] = []
    if kind == "current":
        monkeypatch.chdir(target)
    elif kind == "mounted":
        monkeypatch.setattr(files_module.os.path, "ismount", lambda path: Path(path) == target)
    else:
        monkeypatch.setattr(files_module.os, "access", lambda path, mode: Path(path) != tmp_path)

    def replace_and_note(path: Path, new: Path) -> Path:
        order.append(new.name)
        return replace(path, new)

    monkeypatch.setattr(Path, "replace", replace_and_note)
    with new_folder("." if kind == "current" else target) as folder:
        for name in ("adapter_config.json", "config.json", "model.safetensors", "a"):
            (folder / name).write_text(name)
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
        assert [path.name for path in target.iterdir()] == [folder.name]
    assert target.stat().st_ino == before
    assert {path.name for path in target.iterdir()} == {*order[1:]}
    assert len(order) == 6
    assert set(order[-2:]) == {"config.json", "adapter_config.json"}
    assert (target / "deep" / "file").read_text() == "x"


def test_a_folder_that_must_stay_is_as_before_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="stopped"), new_folder("."):
        raise RuntimeError("stopped")
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    for link, real in (("link", "real"), ("dangling", "new")):
        with new_folder(tmp_path / link) as folder:
            (folder / "file").write_text("x")
        assert (tmp_path / link).is_symlink()
        assert [path.name for path in (tmp_path / real).iterdir()] == ["file"]


@pytest.fixture(params=[0o077, 0o022, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    if os.name != "posix":
        pytest.skip("Windows has no umask")
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_every_file_and_folder_follows_the_umask(umask: int, tmp_path: Path) -> None:
    write_atomically(tmp_path / "bytes", b"x")
    write_safetensors(tmp_path / "plain.safetensors", {"x": torch.ones(2)}, {"format": "pt"})
    write_tensors(tmp_path / "record.safetensors", "a test", {"x": torch.ones(2)}, {})
    with new_folder(tmp_path / "folder") as folder:
        (folder / "inner").write_text("x")
    files = [*tmp_path.glob("*.safetensors"), tmp_path / "bytes", tmp_path / "folder" / "inner"]
    assert len(files) == 4
    assert {mode(file) for file in files} == {0o666 & ~umask}
    assert mode(tmp_path / "folder") == 0o777 & ~umask
    assert {path.name for path in tmp_path.iterdir()} == {"bytes", "folder", "plain.safetensors", "record.safetensors"}


def test_what_is_replaced_keeps_its_permissions(umask: int, tmp_path: Path) -> None:
    for name in ("bytes", "x.safetensors"):
        (tmp_path / name).touch(0o600)
    (tmp_path / "folder").mkdir(0o700)
    write_atomically(tmp_path / "bytes", b"new")
    write_safetensors(tmp_path / "x.safetensors", {"x": torch.ones(2)}, {})
    with new_folder(tmp_path / "folder"):
        pass
    assert [mode(tmp_path / name) for name in ("bytes", "x.safetensors", "folder")] == [0o600, 0o600, 0o700]
    assert (tmp_path / "bytes").read_bytes() == b"new"
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], torch.ones(2))


@pytest.mark.parametrize("umask", [0o027], ids=oct, indirect=True)
def test_what_users_save_follows_the_umask(umask: int, tmp_path: Path) -> None:
    model = saved(tmp_path / "adapter")
    lora_ga.compress_adapter(tmp_path / "adapter", tmp_path / "small", rank=4)
    state = tmp_path / "state.safetensors"
    estimate = lora_ga.estimate_gradients(adapted(llama()), causal(1), checkpoint=state, every=1)
    estimate.save(tmp_path / "estimate.safetensors")
    save_trained(tmp_path / "trained", model, {}, {})
    with new_folder(tmp_path / "merged") as folder:  # as `lora-ga export --merge` writes it
        llama().save_pretrained(folder)
    folders = [tmp_path / name for name in ("adapter", "small", "trained", "merged")]
    ours = [*(path for folder in folders for path in folder.iterdir()), *tmp_path.glob("*.safetensors")]
    assert len(ours) >= 12
    assert {file.name: mode(file) for file in ours} == {file.name: 0o666 & ~umask for file in ours}


WRAPPERS: dict[str, dict[str, Any]] = {
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "head, tied": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [1, 2]},
    "tokens, tied": {"trainable_token_indices": [1, 2], "ensure_weight_tying": True},
    "container": {"modules_to_save": ["mlp"]},
    "norm": {"modules_to_save": ["norm"]},
}
# As version 0.1.0 computed them before this test was written. Files hold them.
RECORDED = {
    "llama": "311708645a05235e",
    "tied llama": "311708645a05235e",
    "gpt2": "0ed91318c9130e96",
    "bert": "3dea1ad1986f5781",
}


def wrapped(base: nn.Module, settings: dict[str, Any]) -> Any:
    # PEFT extends the list of modules in place.
    copied = {key: list(value) if isinstance(value, list) else value for key, value in settings.items()}
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **copied))


def test_fingerprints_in_files_stay_valid() -> None:
    found = {
        "llama": llama(),
        "tied llama": llama(tie_word_embeddings=True),
        "gpt2": gpt2(),
        "bert": bert(),
    }
    assert {name: fingerprint(model) for name, model in found.items()} == RECORDED


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
def test_no_wrapper_of_peft_changes_the_fingerprint(name: str, tied: bool) -> None:
    base = llama(tie_word_embeddings=tied)
    found = fingerprint(base)
    assert fingerprint(wrapped(base, WRAPPERS[name])) == found


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("name", ["embeddings, tied", "head, tied"])
def test_an_adapter_with_a_tied_head_loads_onto_its_base(name: str, is_trainable: bool, tmp_path: Path) -> None:
    model = wrapped(llama(tie_word_embeddings=True), WRAPPERS[name])
    lora_ga.initialize(model, causal())
    train(model, causal())
    model.save_pretrained(tmp_path)
    again = lora_ga.load(llama(tie_word_embeddings=True), tmp_path, is_trainable=is_trainable).eval()
    torch.testing.assert_close(logits(again, causal(1)[0]), logits(model.eval(), causal(1)[0]), rtol=0, atol=1e-5)


def test_files_with_the_fingerprint_that_earlier_versions_gave_a_tied_head_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = base._shapes
    monkeypatch.setattr(base, "_shapes", lambda model, **settings: shapes(model, **settings | {"wrappers": True}))
    model = wrapped(llama(tie_word_embeddings=True), WRAPPERS["head, tied"])
    estimate = lora_ga.estimate_gradients(model, causal())
    lora_ga.apply_estimate(model, estimate)
    model.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert estimate.fingerprint != fingerprint(llama(tie_word_embeddings=True))
    lora_ga.apply_estimate(wrapped(llama(tie_word_embeddings=True), WRAPPERS["head, tied"]), estimate)
    lora_ga.load(llama(tie_word_embeddings=True), tmp_path)


def test_another_base_is_refused_behind_a_tied_head_too(tmp_path: Path) -> None:
    model = wrapped(llama(tie_word_embeddings=True), WRAPPERS["head, tied"])
    lora_ga.initialize(model, causal())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained on another base model"):
        lora_ga.load(llama(tie_word_embeddings=True, intermediate_size=64), tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_an_error_about_another_base_names_a_resized_vocabulary(tied: bool, tmp_path: Path) -> None:
    model = adapted(llama(tie_word_embeddings=tied))
    estimate = lora_ga.initialize(model, causal())
    model.save_pretrained(tmp_path)
    resized = llama(tie_word_embeddings=tied, vocab_size=71)
    with pytest.raises(
        ValueError,
        match=r"Only the vocabulary differs: 64 tokens there, 71 in this model \(resize_token_embeddings\(64\) ch",
    ):
        lora_ga.load(resized, tmp_path)
    with pytest.raises(ValueError, match="Only the vocabulary differs: 64 tokens there, 71 in this model"):
        lora_ga.apply_estimate(adapted(resized), estimate)


def test_the_vocabulary_is_not_named_where_more_differs() -> None:
    base = llama()
    assert another_base(base, fingerprint(base)) is None
    for other in (llama(vocab_size=71, num_hidden_layers=1), nn.Linear(2, 3)):
        difference = another_base(other, fingerprint(base))
        assert difference is not None
        assert "vocabulary" not in difference


def test_a_vocabulary_of_a_head_with_a_bias() -> None:
    assert "64 tokens there, 80 in this model" in str(another_base(bert(vocab_size=80), fingerprint(bert())))


def test_an_estimate_of_another_fingerprint_is_still_refused() -> None:
    model = adapted(llama())
    estimate = dataclasses.replace(lora_ga.estimate_gradients(model, causal()), fingerprint="0" * 16)
    with pytest.raises(ValueError, match=r"belongs to another model: .*weight shapes\)\. Estimate the gradients"):
        lora_ga.apply_estimate(model, estimate)
