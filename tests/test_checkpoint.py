"""Estimates that end when all layers have converged, and estimates that resume from a checkpoint."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ga
import processes
from lora_ga import GradientEstimate, LoraGAConfig
from lora_ga.files import read_tensors
from lora_ga.gradients.checkpoint import FILE_KIND, Checkpoint, Progress
from toys import adapted, causal, gpt2, llama

BATCHES = causal(9)


def assert_same(mine: GradientEstimate, true: GradientEstimate) -> None:
    assert list(mine) == list(true)
    for name in true:
        for part in ("U", "S", "V", "sketch"):
            assert torch.equal(getattr(mine[name], part), getattr(true[name], part)), (name, part)
        assert mine[name].norm == true[name].norm
    for field in ("weight", "batches", "settled", "settled_weight", "config", "fingerprint"):
        assert getattr(mine, field) == getattr(true, field), field


class InterruptedRunError(Exception):
    """Interrupts an estimate."""


def batches_until(count: int, batches: list[Any] = BATCHES) -> Iterator[Any]:
    """Yield the first batches, then raise."""
    yield from batches[:count]
    raise InterruptedRunError


def estimate(data: Any, config: LoraGAConfig, file: Path | None = None, every: int = 2, **changes: Any) -> Any:
    return lora_ga.estimate_gradients(adapted(llama(), **changes), data, config, checkpoint=file, every=every)


# Convergence


def test_a_layer_has_converged_when_batches_times_change_is_small_twice_in_a_row() -> None:
    progress = Progress()
    found = []
    for index, change in enumerate([0.5, 0.004, 0.02, 0.002, 0.002, 0.0], start=1):
        progress.batches, progress.weight = index, 10.0 * index
        found.append(progress.update_converged({"a": change}, 0.01))
    # n · change: 0.5, 0.008, 0.06, 0.008, 0.01, 0
    assert found[:5] == [[], [], [], [], ["a"]]
    # The loop would have removed the hooks at 5.
    assert (progress.settled, progress.settled_weight) == (
        {"a": 6},
        {"a": 60.0},
    )


@pytest.fixture(scope="module")
def steady() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A model, and batches so similar that the directions converge early."""
    batch, draw = causal(1, rows=16)[0], torch.Generator().manual_seed(0)
    rows = [torch.randperm(16, generator=draw)[:14] for _ in range(40)]
    return adapted(llama()), [{key: value[some] for key, value in batch.items()} for some in rows]


def test_converged_layers_lose_their_hooks_and_the_pass_ends_when_all_have_converged(
    steady: tuple[Any, list[dict[str, Tensor]]],
) -> None:
    model, batches = steady
    whole = lora_ga.estimate_gradients(model, batches, LoraGAConfig(max_batches=None))
    passes = []

    def loss_fn(m: Any, batch: Any) -> Tensor:
        passes.append(sum(len(module._forward_hooks) for module in m.get_base_model().model.modules()))
        return m(**batch).loss

    early = lora_ga.estimate_gradients(model, batches, LoraGAConfig(max_batches=None, tolerance=0.02), loss_fn=loss_fn)
    assert set(early.settled) == set(early)
    assert early.batches == max(early.settled.values()) == len(passes) < 40
    assert len(set(early.settled.values())) > 1
    for index, hooks in enumerate(passes):  # layers that converged within `index` batches have no hook
        assert hooks == sum(count > index for count in early.settled.values())
    for name in early:
        lost = 1 - torch.linalg.svdvals(whole[name].V[:, :8].mT @ early[name].V[:, :8])[0]
        assert lost < 0.01, name
        # The mean is over the batches until the layer converged.
        assert early[name].norm == pytest.approx(whole[name].norm, rel=0.1), name
        assert early.weight_of(name) == early.settled[name] * 14 * 11  # 14 rows of 11 label tokens a batch


def test_without_a_tolerance_all_batches_are_read_and_nothing_converges() -> None:
    found = estimate(BATCHES, LoraGAConfig())
    assert (found.batches, found.settled, found.settled_weight) == (9, {}, {})
    assert estimate(BATCHES, LoraGAConfig(tolerance=1e-9)).batches == 9


def test_saving_and_merging_keep_the_convergence(tmp_path: Path, steady: tuple[Any, list[dict[str, Tensor]]]) -> None:
    model, batches = steady
    config = LoraGAConfig(max_batches=None, tolerance=0.02)
    early = lora_ga.estimate_gradients(model, batches, config)
    early.save(tmp_path / "early.safetensors")
    assert_same(GradientEstimate.load(tmp_path / "early.safetensors"), early)
    other = lora_ga.estimate_gradients(model, batches[::-1], config)
    both = early.merge(other)
    for name in both:
        weights = [each.weight_of(name) for each in (early, other)]
        assert both.settled[name] == early.settled[name] + other.settled[name]
        assert both.weight_of(name) == sum(weights)
        sketch = sum(w * sketch_of(each, name) for w, each in zip(weights, (early, other), strict=True)) / sum(weights)
        torch.testing.assert_close(both[name].sketch, sketch)


def sketch_of(each: GradientEstimate, name: str) -> Tensor:
    sketch = each[name].sketch
    assert sketch is not None
    return sketch


# Checkpoints


@pytest.mark.parametrize(
    "config",
    [LoraGAConfig(), LoraGAConfig(estimator="dense"), LoraGAConfig(tolerance=0.3), LoraGAConfig(max_batches=7)],
    ids=["streaming", "dense", "converging", "capped"],
)
@pytest.mark.parametrize("broken_after", [1, 4, 5])
def test_a_resumed_estimate_equals_the_uninterrupted_one(
    tmp_path: Path, config: LoraGAConfig, broken_after: int
) -> None:
    true, file = estimate(BATCHES, config), tmp_path / "state.safetensors"
    with pytest.raises(InterruptedRunError):
        estimate(batches_until(broken_after), config, file)
    assert file.exists() == (broken_after >= 2)
    assert_same(estimate(BATCHES, config, file), true)


def estimate_until_killed(file: Path, after: int) -> None:
    """Estimate with a checkpoint after each batch. Kills this process when it asks for the batch with index `after`."""

    def batches() -> Iterator[Any]:
        yield from BATCHES[:after]
        os.kill(os.getpid(), signal.SIGKILL)

    estimate(batches(), LoraGAConfig(), file, every=1)


def test_a_killed_process_leaves_a_whole_checkpoint_to_resume_from(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    for after in (3, 7):  # killed twice
        process = processes.start(estimate_until_killed, file, after)
        assert processes.exit_codes([process]) == [-signal.SIGKILL]
        assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
        assert read_tensors(file, FILE_KIND)[1]["progress"]["batches"] == after
    assert_same(estimate(BATCHES, LoraGAConfig(), file, every=1), estimate(BATCHES, LoraGAConfig()))


def test_a_finished_checkpoint_gives_the_estimate_without_another_pass(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    true = estimate(BATCHES, LoraGAConfig(), file, every=3)

    def never(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError("the model ran")

    again = lora_ga.estimate_gradients(adapted(llama()), BATCHES, loss_fn=never, checkpoint=file, every=3)
    assert_same(again, true)


def test_a_checkpoint_has_the_key_names_of_older_files(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "state.safetensors", 1, {})
    progress = Progress(3, 30.0, {"a"}, {"a"}, {"a": 1}, settled={"b": 2}, settled_weight={"b": 20.0}, digest="d")
    checkpoint.save(progress, {"a.U": torch.ones(1)})
    names = {"batches", "weight", "ran", "got_gradient", "calm", "settled", "settled_weight", "digest"}
    assert read_tensors(checkpoint.path, FILE_KIND)[1]["progress"].keys() == names
    assert checkpoint.load()[0] == progress


def swap_first_two(batches: list[Any]) -> list[Any]:
    return [batches[1], batches[0], *batches[2:]]


OTHERS: dict[str, tuple[Callable[[], Any], list[Any], dict[str, Any], str]] = {
    "model": (lambda: adapted(llama(num_hidden_layers=1)), BATCHES, {}, "fingerprint is "),
    "family": (lambda: adapted(gpt2(), ["c_attn"]), BATCHES, {}, "fingerprint is "),
    "seed": (lambda: adapted(llama()), BATCHES, {"seed": 1}, r"config\.seed is 0 in one, 1 in the other"),
    "settings": (lambda: adapted(llama()), BATCHES, {"oversample": 2}, r"config\.oversample is 16 in one, 2 in"),
    "rank": (lambda: adapted(llama(), r=2), BATCHES, {}, r"q_proj is 4 in one, 2 in the other; .* and \d+ more"),
    "order": (lambda: adapted(llama()), swap_first_two(BATCHES), {}, "made from other batches: it has read 4"),
    "fewer": (lambda: adapted(llama()), BATCHES[:3], {}, "made from other batches: it has read 4"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_estimate_is_refused_and_kept(tmp_path: Path, other: str) -> None:
    file = tmp_path / "state.safetensors"
    with pytest.raises(InterruptedRunError):
        estimate(batches_until(5), LoraGAConfig(), file)
    before = file.read_bytes()
    make, batches, changes, message = OTHERS[other]
    with pytest.raises(ValueError, match=message):
        lora_ga.estimate_gradients(make(), batches, LoraGAConfig(**changes), checkpoint=file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_checkpoint_or_a_file_of_another_kind_is_refused(tmp_path: Path, share: float) -> None:
    file = tmp_path / "state.safetensors"
    estimate(BATCHES[:2], LoraGAConfig(), file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"state\.safetensors: damaged, or not a safetensors file"):
        estimate(BATCHES, LoraGAConfig(), file)
    lora_ga.estimate_gradients(adapted(llama()), BATCHES).save(file)
    with pytest.raises(ValueError, match="expected the running state of a LoRA-GA gradient estimate"):
        estimate(BATCHES, LoraGAConfig(), file)


@pytest.mark.parametrize("every", [0, -1, 2.5, True])
def test_an_interval_that_is_not_a_positive_integer_is_refused(tmp_path: Path, every: Any) -> None:
    with pytest.raises(ValueError, match="it must be an integer of at least 1"):
        estimate(BATCHES, LoraGAConfig(), tmp_path / "state.safetensors", every=every)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "is intact. Make room and call again: the estimate continues from there"),
        (errno.EDQUOT, "is intact. Make room and call again: the estimate continues from there"),
        (errno.ENOTDIR, "is intact. A folder of this path is a file. Give checkpoint= another path"),
        (errno.EACCES, "is intact. Let this program write there and call again: the estimate continues from there"),
        (errno.EIO, "is intact. Remove the cause and call again: the estimate continues from there"),
    ],
)
def test_the_advice_for_a_checkpoint_that_cannot_be_written_fits_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("lora_ga.gradients.checkpoint.write_tensors", refuse)
    with pytest.raises(OSError, match=rf"after batch 2 \({os.strerror(number)}\)") as caught:
        estimate(BATCHES, LoraGAConfig(), tmp_path / "state.safetensors")
    assert caught.value.errno == number
    assert str(caught.value.strerror).endswith(advice)


def test_a_checkpoint_below_a_file_is_refused_and_the_advice_works(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(FileExistsError, match="A folder of this path is a file. Give checkpoint= another path"):
        estimate(BATCHES[:2], LoraGAConfig(), tmp_path / "file" / "state.safetensors")
    assert (tmp_path / "file").read_text() == "kept"
    assert estimate(BATCHES[:2], LoraGAConfig(), tmp_path / "folder" / "state.safetensors").batches == 2


def test_a_full_disk_is_reported_and_the_old_checkpoint_stays_intact(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def filling() -> Iterator[Any]:
        yield from BATCHES[:3]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # from here on no file can grow beyond a kilobyte
        yield from BATCHES[3:]

    try:
        with pytest.raises(OSError, match=r"could not be written after batch 4 .*the state saved before.* is intact"):
            estimate(filling(), LoraGAConfig(), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    assert read_tensors(file, FILE_KIND)[1]["progress"]["batches"] == 2
    assert_same(estimate(BATCHES, LoraGAConfig(), file), estimate(BATCHES, LoraGAConfig()))
