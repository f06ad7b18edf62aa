"""Several processes give the same estimate and start as one, and an error in one of them stops them all."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import operations
from torch import Tensor

import lora_ga
import processes
import workers
from lora_ga.distributed.processes import DeferredError, Processes, buckets, device_for
from lora_ga.gradients import setup
from lora_ga.gradients.checkpoint import Progress, digest_of
from toys import adapted, autograd_gradients, causal, llama, logits

DATA = ["real"] if os.environ.get("LORA_GA_DATA") else []
Results = dict[int, list[dict[str, dict[str, Any]]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of 1 (without a process group), 2 and 4 processes. Each group is started once."""
    folder = tmp_path_factory.mktemp("processes")
    alone = {name: getattr(workers, name)(0, 1, folder) for name in ["estimates", *DATA]}
    two = processes.run(workers.all_of(["estimates", *DATA, "bad_input", "interrupted"]), 2, folder / "2")
    four = processes.run(workers.all_of(["estimates", *DATA]), 4, folder / "4")
    return {1: [alone], 2: two, 4: four}


def cosine(one: dict[str, Any], other: dict[str, Any], count: int) -> float:
    """The lowest cosine of the principal angles between leading subspaces, left and right, over all layers."""
    return min(
        torch.linalg.svdvals(one["layers"][name][side][:, :count].mT @ other["layers"][name][side][:, :count])
        .min()
        .item()
        for name in one["layers"]
        for side in (0, 2)
    )


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are equal bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return one == other


def alignment_ratio(directions: tuple[Tensor, ...], gradient: Tensor, rank: int) -> float:
    """The alignment of the start that these directions give, divided by its limit."""
    a, b = directions[2][:, :rank].mT, directions[0][:, rank : 2 * rank]
    step = gradient @ a.mT @ a + b @ b.mT @ gradient
    values = torch.linalg.svdvals(gradient)
    limit = (values[: 2 * rank].square().sum() / values.square().sum()).sqrt()
    return float((step * gradient).sum() / step.norm() / gradient.norm() / limit)


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
def test_all_processes_get_the_same_results_bit_for_bit(results: Results, size: int) -> None:
    first, *others = (result["estimates"] for result in results[size])
    compared = ("streaming", "dense", "starts", "uneven", "at most", "few", "probe", "unseen", "said")
    assert all(same(first[key], other[key]) for other in others for key in compared)


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_give_the_estimate_of_one_on_the_same_batches(results: Results, size: int) -> None:
    one, many = results[1][0]["estimates"], results[size][0]["estimates"]
    for key in ("streaming", "dense", "uneven", "few"):
        assert many[key]["about"] == one[key]["about"]
        for name, each in one[key]["layers"].items():
            torch.testing.assert_close(many[key]["layers"][name][4], each[4], rtol=1e-4, atol=1e-7)  # the sketch
    assert cosine(one["dense"], many["dense"], 8) >= 0.999
    assert cosine(one["few"], many["few"], 8) >= 0.999  # the kept directions hold all of a gradient of 20 tokens


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", ["probe", "unseen"])
def test_several_processes_give_the_estimate_of_one_for_layers_that_are_never_called(
    results: Results, case: str, size: int
) -> None:
    """The probe is exact, because its rank is that of the gradients. With 3 batches, one of 4 processes has none."""
    one, many = (results[count][0]["estimates"] for count in (1, size))
    assert many[case]["about"] == one[case]["about"]
    assert many[case]["layers"].keys() == one[case]["layers"].keys()
    for name, each in one[case]["layers"].items():
        whole, found = ((layer[0] * layer[1]) @ layer[2].mT for layer in (each, many[case]["layers"][name]))
        assert (found - whole).norm() <= 1e-3 * whole.norm(), name
        assert many[case]["layers"][name][3] == pytest.approx(each[3], rel=1e-3)
    assert any("12 of 14 layers ran without being called" in text for text in many["said"])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.skipif(not DATA, reason="set LORA_GA_DATA to the folder of the research data to run this test")
def test_several_processes_align_a_pretrained_model_as_well_as_one(results: Results, size: int) -> None:
    one, many = results[1][0]["real"], results[size][0]["real"]
    assert cosine(one["dense"], many["dense"], 16) >= 0.999
    for name, exact in one["dense"]["layers"].items():
        gradient = (exact[0] * exact[1]) @ exact[2].mT  # its leading 32 directions
        alone, together = (alignment_ratio(each["streaming"]["layers"][name], gradient, 8) for each in (one, many))
        assert together >= alone - 0.002, name
        # The directions of several processes hold this share of the energy of the leading 2r directions of one.
        u, s, v = one["streaming"]["layers"][name][:3]
        others = many["streaming"]["layers"][name]
        for of_one, of_many in ((u, others[0]), (v, others[2])):
            kept = ((of_many[:, :16].mT @ of_one[:, :16]).square().sum(0) * s[:16].square()).sum() / s[
                :16
            ].square().sum()
            assert kept >= 0.98, name


@pytest.mark.parametrize("size", [2, 4])
def test_batches_are_weighted_by_their_label_tokens_over_all_processes(results: Results, size: int) -> None:
    """Compares the exact estimate with autograd's gradient of the mean loss over all label tokens."""
    batches = workers.uneven(3)
    counts = [float((batch["labels"][:, 1:] != -100).sum()) for batch in batches]

    def loss(model: Any) -> Tensor:
        return sum(model(**batch).loss * count for batch, count in zip(batches, counts, strict=True)) / sum(counts)

    truth = autograd_gradients(llama(), loss)
    for name, (u, s, v, norm, _) in results[size][0]["estimates"]["uneven"]["layers"].items():
        assert norm == pytest.approx(float(truth[name].norm()), rel=1e-4)
        best = torch.linalg.svd(truth[name]).S[: len(s)]
        torch.testing.assert_close(s, best, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(((u * s) @ v.mT * truth[name]).sum(), best.square().sum(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_max_batches_counts_the_batches_of_all_processes(results: Results, size: int) -> None:
    assert results[size][0]["estimates"]["at most"]["about"][0] == size


@pytest.mark.parametrize("size", [2, 4])
def test_initialisation_keeps_the_function_in_every_process(results: Results, size: int) -> None:
    base = logits(llama(), causal(1)[0])
    assert all(torch.equal(result["estimates"]["logits"], base) for result in results[size])


@pytest.mark.parametrize("size", [2, 4])
def test_no_process_sends_more_bytes_than_the_bound(results: Results, size: int) -> None:
    layers = results[1][0]["estimates"]["streaming"]["layers"].values()
    bound = 2 * math.log2(size) * sum((u.shape[0] + v.shape[0]) * s.numel() * 4 for u, s, v, _, _ in layers)
    for result in results[size]:
        factors, values = result["estimates"]["bytes"]
        assert 0 < factors <= bound
        assert values < 20_000 * (size - 1)  # names, counts, digests: independent of the layers' widths


@pytest.mark.parametrize("size", [2, 3, 5])
def test_tensors_of_all_dtypes_and_shapes_are_summed_and_shared(tmp_path: Path, size: int) -> None:
    found = processes.run(processes.sums, size, tmp_path)
    assert all(same(each["shared"], found[0]["shared"]) for each in found)
    shared = found[0]["shared"]
    assert torch.equal(shared["all.sum"], torch.full((2, 3), 2.0**size - 1))
    for rank in range(size):
        assert same(shared[f"own {rank}.x"], torch.tensor(float(rank), dtype=torch.float64))
    assert same(shared["all.made"], torch.ones(3, dtype=torch.bfloat16))
    assert len(shared) == size + 2
    assert found[0]["gathered"] == [{"rank": rank} for rank in range(size)]
    assert found[0]["shares"] == math.ceil(5 / size)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 13])
def test_every_layer_belongs_to_one_process_and_no_process_has_more_than_its_share(size: int) -> None:
    layers = [f"layer {number}" for number in range(29)]
    shares = [Processes(rank, size).own(layers) for rank in range(size)]
    assert sorted(layer for share in shares for layer in share) == sorted(layers)
    working = 2 ** (size.bit_length() - 1)
    assert max(map(len, shares)) == math.ceil(29 / working)
    assert all(not share for share in shares[working:])


def test_one_process_sends_nothing() -> None:
    with workers.Traffic() as traffic:
        lora_ga.initialize(adapted(llama()), causal(2))
    assert (traffic.factors, traffic.values) == (0, 0)
    assert Processes().gather("value") == ["value"]


def test_buckets_keep_the_order_and_the_size_limit() -> None:
    assert list(buckets([1, 2, 3])) == [[0, 1, 2]]
    assert list(buckets([2**25, 2**25, 1, 2**30, 1])) == [[0, 1], [2], [3], [4]]
    assert list(buckets([])) == []


def test_a_resumed_estimate_gives_the_warning_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "processes", lambda group: Processes(0, 2))
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, value])
    monkeypatch.setattr(Processes, "merge", lambda self, keys, state, absorb: list(keys))
    monkeypatch.setattr(Processes, "share", lambda self, tensors: dict(tensors))
    data, file = causal(4), tmp_path / "estimate"

    def broken() -> Iterator[Any]:
        yield from data[:2]
        raise OSError("the disk is gone")

    for batches, failure in ((broken(), pytest.raises(OSError, match="is gone")), (data, contextlib.nullcontext())):
        model = adapted(llama(num_hidden_layers=1), ["q_proj"])
        with pytest.warns(UserWarning, match="All 2 processes begin with the same batch"), failure:
            lora_ga.estimate_gradients(model, batches, checkpoint=file, every=1)


@pytest.mark.parametrize("way", ["streaming", "probe", "sharded"])
def test_one_batch_that_all_processes_have_is_enough_for_the_warning(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the other one of two processes says what this one says, so it has the same batch."""
    monkeypatch.setattr(setup, "processes", lambda group: Processes(0, 2))
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, value])
    monkeypatch.setattr(Processes, "merge", lambda self, keys, state, absorb: list(keys))
    monkeypatch.setattr(Processes, "share", lambda self, tensors: dict(tensors))
    monkeypatch.setattr(setup, "in_step", lambda network: way == "sharded")
    config = lora_ga.LoraGAConfig(estimator="probe" if way == "probe" else "streaming")
    model = adapted(llama(num_hidden_layers=1), ["q_proj"])
    with pytest.warns(UserWarning, match="All 2 processes begin with the same batch"):
        assert lora_ga.estimate_gradients(model, causal(1), config).batches == 2


# --- errors and warnings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (
            "seeds",
            "Processes 0 and 1 of 2 differ: config.seed is 0 in one, 1 in the other. Give all processes the same",
        ),
        ("targets", "Processes 0 and 1 of 2 differ: ranks.model.layers.0.self_attn.q_proj is 4 in one, 'nothing' in"),
        ("models", "Processes 0 and 1 of 2 differ: fingerprint is"),
        ("gammas", "Processes 0 and 1 of 2 differ: config.stable_gamma is 16.0 in one, 17.0 in the other"),
        ("no data", "The data holds no batch"),
        ("rate", "find_rate runs in one process, but there are several. Search in one process, on batches as large"),
    ],
)
def test_all_processes_refuse_differing_input_with_the_same_error(results: Results, case: str, text: str) -> None:
    first, second = (result["bad_input"][case] for result in results[2])
    assert first == second
    assert first.startswith(f"ValueError: {text}")


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("no adapter", "TypeError: The LlamaForCausalLM has no LoRA layers"),
        ("raises", "OSError: the disk of process 1 is gone"),
        ("not data", "TypeError: data is a name, 'estimate.safetensors', but it must be batches"),
        ("no loss", "ValueError: batch 1: The model returned no loss for a batch of input_ids"),
    ],
)
def test_an_error_in_one_process_stops_all_and_the_others_quote_it(results: Results, case: str, text: str) -> None:
    other, failed = (result["bad_input"][case] for result in results[2])
    assert failed.startswith(text)
    assert other.startswith(f"RuntimeError: Process 1 of 2 failed, so all of them stop: {text}")
    assert other.endswith("The model is unchanged.")


def test_batches_without_a_label_are_counted_over_all_processes(results: Results) -> None:
    (estimate, warnings), (other, other_warnings) = (result["bad_input"]["no labels"] for result in results[2])
    assert same(estimate, other)
    assert estimate["about"][0] == 3  # two of process 0, and the labelled one of process 1
    for texts in (warnings, other_warnings):
        assert ["2 of 5 batches have no label" in text for text in texts] == [True]
    first, second = (result["bad_input"]["no label anywhere"] for result in results[2])
    assert first == second
    assert first.startswith("ValueError: None of the 2 batches has a label. Every label is -100")


def test_a_process_without_a_batch_gives_a_warning_and_the_others_continue(results: Results) -> None:
    (estimate, warnings), (other, other_warnings) = (result["bad_input"]["idle"] for result in results[2])
    assert same(estimate, other)
    assert estimate["about"][0] == 2
    assert warnings == other_warnings
    assert "1 of 2 processes had no batch (the first is process 1)" in warnings[0]


def test_processes_that_read_the_same_data_get_a_warning(results: Results) -> None:
    for result in results[2]:
        (warning,) = result["bad_input"]["same"][1]
        assert "All 2 processes begin with the same batch" in warning
    assert digest_of({"x": torch.ones(2)}) != digest_of({"x": torch.zeros(2)})
    assert digest_of(object()) == ""


def test_a_process_group_of_one_process_estimates_alone(results: Results) -> None:
    first, second = (result["bad_input"]["alone"] for result in results[2])
    assert first["about"][0] == second["about"][0] == 2
    assert not same(first, second)


def test_an_interrupted_estimate_of_two_processes_continues_to_the_same_result(results: Results) -> None:
    first, second = (result["interrupted"] for result in results[2])
    assert first["error"] == "OSError: broken off"
    assert first["files"] == ["state-0-of-2.safetensors", "state-1-of-2.safetensors"]
    assert same(first["again"], first["whole"])
    assert same(first["again"], second["again"])


def test_all_processes_agree_on_the_layers_that_have_converged(results: Results) -> None:
    alone = lora_ga.estimate_gradients(adapted(llama()), causal(1, rows=16) * 12, lora_ga.LoraGAConfig(tolerance=0.01))
    (batches, settled), other = (result["interrupted"]["early"] for result in results[2])
    assert (batches, settled) == other
    assert set(settled) == set(alone.settled)
    assert batches <= 2 * alone.batches
    parts = [Progress(3, 30.0, {"a"}, {"a"}, settled={"a": 2}, settled_weight={"a": 20.0}), Progress(2, 8.0, {"b"})]
    total = Progress.sum(parts)
    assert (total.batches, total.weight, total.ran, total.got_gradient) == (5, 38.0, {"a", "b"}, {"a"})
    assert (total.settled, total.settled_weight) == ({"a": 4}, {"a": 28.0})


def test_a_length_that_cannot_be_found_out_in_one_process_does_not_matter(results: Results) -> None:
    for result in results[2]:
        assert same(result["bad_input"]["no length"], result["bad_input"]["length"])
        assert result["bad_input"]["length"]["about"][0] == 4


# --- errors inside of a communication ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "fails_at"), [("loader", 0), ("loader", 9), ("wrapped", 9), ("probe", 9), ("trainer", 9)]
)
def test_a_stream_that_one_process_reads_for_all_stops_all_when_it_fails(
    tmp_path: Path, way: str, fails_at: int
) -> None:
    """The other process waits for the batch, so an exchange would never end."""
    reader, other = processes.run(workers.failing_reader(way, fails_at), 2, tmp_path, timeout=20)
    assert reader["error"] == "OSError: the stream broke"
    assert reader["events"][-1] == "failed"
    assert "exchange" in reader["events"]
    assert other["error"].startswith("RuntimeError: ")
    assert "failed" not in other["events"]


def test_files_of_different_batches_go_on_where_one_process_reads_for_all(tmp_path: Path) -> None:
    first, second = processes.run(workers.resumed_reader, 2, tmp_path, timeout=40)
    assert (first["all"]["at"], second["all"]["at"]) == ((6, 0), (3, 0))
    assert (first["early"]["at"], second["early"]["at"]) == ((3, 14), (3, 0))  # all 14 layers of one have converged
    for name in ("all", "early"):
        assert second[name]["error"] == "KeyError: 'broken off'"
        assert same(first[name]["again"], first[name]["whole"])
        assert same(first[name]["again"], second[name]["again"])


@pytest.mark.parametrize(("way", "text"), [("before", "before the forward pass"), ("backward", "in the backward pass")])
def test_an_error_in_a_pass_of_a_sharded_model_is_raised_in_its_process(tmp_path: Path, way: str, text: str) -> None:
    other, own = processes.run(workers.failing_pass(way), 2, tmp_path, timeout=20)
    assert own == f"ZeroDivisionError: {text}"
    assert other.startswith("RuntimeError: ")


@pytest.mark.parametrize(
    ("fails", "own", "other"),
    [
        ("before", "ZeroDivisionError: before the gathering", ""),
        ("after", "ZeroDivisionError: after the gathering", "Process 1 of 2 failed, so all of them stop: Zero"),
        ("backward", "ZeroDivisionError: in the backward", "Process 1 of 2 failed, so all of them stop: Zero"),
    ],
)
def test_an_error_in_a_loss_that_gathers_stops_all_processes(tmp_path: Path, fails: str, own: str, other: str) -> None:
    """At the second batch it is known how often the loss gathers, in whatever function."""
    found = processes.run(workers.failing_gathering(fails), 2, tmp_path, timeout=20)
    assert found[1].startswith(own)
    assert found[0].startswith(f"RuntimeError: {other}")


def test_a_process_without_a_batch_takes_part_where_the_loss_gathers(tmp_path: Path) -> None:
    for found in processes.run(workers.gathering, 2, tmp_path, timeout=40):
        assert found["plain"]["about"][0] == 6
        assert same(found["gathering"], found["plain"])
        assert found["passes"] in (4, None)  # of process 1, which has two batches
        for name in ("all in one", "beside", "beside, in shards"):
            assert found[name]["about"] == found["plain"]["about"]
            for layer, each in found["plain"]["layers"].items():
                torch.testing.assert_close(found[name]["layers"][layer][1], each[1], rtol=1e-4, atol=1e-7)


def broadcast_after(fails: Callable[[], Any]) -> Any:
    """As a loader of a framework that reads in one process for all."""
    value = fails()
    dist.broadcast_object_list([value])
    return value


def gather_after(fails: Callable[[], Any]) -> Any:
    """As a trainer whose loss gathers."""
    trainer = mock.Mock()
    value = fails()
    return trainer.accelerator.gather(value)


def take_in_group_after(fails: Callable[[], Any]) -> Any:
    """With the method of tensors, beside names that libraries for several processes have too."""
    dist = SimpleNamespace(logits=torch.zeros(2, 2), accelerator=SimpleNamespace(device="cpu"), shape=())
    value = fails()
    return dist.logits.gather(0, value.to(dist.accelerator.device))


def gather_all_after(fails: Callable[[], Any]) -> Any:
    """As in a file that has imported the function of Accelerate."""

    def call() -> Any:
        return gather(fails())  # type: ignore[name-defined] # noqa: F821 (a global name of the next line)

    return FunctionType(call.__code__, {"gather": operations.gather}, closure=call.__closure__)()


def take_after(fails: Callable[[], Any]) -> Any:
    """With the method that tensors have."""
    value = fails()
    return value.gather(0, value)


def translated() -> None:
    try:
        broadcast_after(lambda: 1 / 0)
    except ZeroDivisionError as error:
        raise KeyError("the loader failed") from error


def after_a_broadcast() -> None:
    with mock.patch.object(dist, "broadcast_object_list"):
        broadcast_after(lambda: 1)
    raise KeyError("after it")


@pytest.mark.parametrize(
    ("call", "at_once"),
    [
        (lambda: broadcast_after(lambda: 1 / 0), True),
        (lambda: list(map(broadcast_after, [lambda: 1 / 0])), True),
        (translated, True),
        (lambda: gather_after(lambda: 1 / 0), True),
        (lambda: take_in_group_after(lambda: 1 / 0), False),
        (lambda: gather_all_after(lambda: 1 / 0), True),
        (lambda: take_after(lambda: 1 / 0), False),
        (after_a_broadcast, False),
        (lambda: torch.zeros(2).gather(0, torch.tensor([3])), False),
    ],
    ids=["inside", "wrapped", "its cause", "accelerator", "beside", "function", "method", "after it", "of tensors"],
)
def test_only_an_error_inside_of_a_communication_is_raised_at_once(call: Callable[[], Any], at_once: bool) -> None:
    deferred = DeferredError()
    with pytest.raises((KeyError, ZeroDivisionError)) if at_once else contextlib.nullcontext(), deferred:
        call()
    assert (deferred.error is None) == at_once


def failure(cause: Exception | None = None) -> ValueError:
    error = ValueError("of this process")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("cause", [None, KeyError("its own cause")])
def test_the_error_of_this_process_is_raised_where_the_exchange_fails(
    cause: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = RuntimeError("connection closed")

    def fail(self: Processes, value: Any) -> None:
        raise failed

    monkeypatch.setattr(Processes, "gather", fail)
    deferred = DeferredError()
    with deferred:
        raise failure(cause)
    with pytest.raises(ValueError, match="of this process") as caught:
        Processes(0, 2).exchange(deferred)
    assert caught.value.__cause__ is (failed if cause is None else cause)
    with pytest.raises(RuntimeError, match="connection closed"):
        Processes(0, 2).exchange(DeferredError())


def test_the_other_processes_stop_if_one_dies(tmp_path: Path) -> None:
    survivor, dead = processes.run(workers.dying, 2, tmp_path, timeout=60)
    assert dead is None
    assert "RuntimeError: Process 0 of 2: an exchange with the other processes failed" in survivor["error"]
    assert "One of them may have died" in survivor["error"]
    assert not survivor["touched"]
    assert {path.name for path in tmp_path.iterdir()} <= {"0.pt", "meeting"}


def test_a_backend_without_a_device_on_this_machine_is_refused() -> None:
    assert device_for("cpu:gloo,cuda:gloo") == "cpu"
    with pytest.raises(
        ValueError, match="backend .other:exotic. serves neither the CPU nor a device that this machine"
    ):
        device_for("other:exotic")


def test_an_error_waits_for_the_next_exchange_and_an_interrupt_does_not() -> None:
    deferred, error = DeferredError(), ValueError("found in a block")
    with deferred:
        raise error
    with pytest.raises(ValueError, match="found in a block"):
        Processes().exchange(deferred)
    with pytest.raises(KeyboardInterrupt), deferred:
        raise KeyboardInterrupt
