"""The grid of a suite runs from end to end, at toy size."""

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

import processes
from lora_ga.cli.main import main
from lora_ga.cli.reproduce import check_device, chosen
from lora_ga.experiments.methods import METHODS, load_method
from lora_ga.experiments.methods.base import BuildInputs
from lora_ga.experiments.optim import PairOptimizer
from lora_ga.experiments.records.store import Store
from lora_ga.experiments.suites.cells import Cell, cell_of
from lora_ga.experiments.suites.grid import WorkerPool, run_grid
from lora_ga.experiments.suites.run import Place, run_cell
from lora_ga.experiments.suites.sources import Sources
from lora_ga.experiments.suites.spec import load_suite
from lora_ga.experiments.suites.training import EXPLODED, WINDOW, DivergedError, check_loss
from lora_ga.experiments.tasks import split_metrics
from toys import autograd_gradients, causal, llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization"),
]
PLACE = Place(Sources())


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """Starts the server that other tests use too; otherwise the grid would start one with fewer libraries."""
    processes.start_server()


@pytest.mark.parametrize(("device", "prepared"), [("cpu", True), ("cuda", False), ("cuda:1", False)])
def test_processes_for_a_gpu_are_not_forked_from_one_that_has_started_cuda(
    device: str, prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PEFT imports bitsandbytes, which starts CUDA where it finds a GPU.
    preloaded: list[str] = []
    monkeypatch.setattr(ForkServerContext, "set_forkserver_preload", lambda _, names: preloaded.extend(names))
    WorkerPool(device)
    assert ("peft" in preloaded) == prepared
    assert prepared or preloaded == ["torch"]


@pytest.mark.parametrize("task", ["text", "classes"])
@pytest.mark.parametrize("label", [*METHODS, "random directions"])
def test_every_method_runs_on_every_kind_of_task(toy: Path, task: str, label: str) -> None:
    record = run_cell(cell_of(load_suite(str(toy)), task, label, 1e-3, 0), PLACE)
    assert record["status"] == "done", record["reason"]
    assert len(record["curves"]["training"]) == 4
    assert [point["step"] for point in record["curves"]["report"]] == [0, 2, 4]
    assert record["metrics"]["report"]["loss"] != record["curves"]["report"][0]["loss"]
    assert set(record["metrics"]["tune"]) == set(split_metrics(load_suite(str(toy)).tasks[task]))
    assert record["trained_parameters"] > 0
    assert record["peak_memory_mib"] > 0


def test_all_methods_start_at_the_base_models_loss_on_the_same_batches(toy: Path) -> None:
    suite = load_suite(str(toy))
    for task in suite.tasks:
        runs = [run_cell(cell_of(suite, task, label, 1e-3, 0), PLACE) for label in ("full", "lora", "lora_ga", "olora")]
        for record in runs[1:]:
            assert record["curves"]["report"][0] == pytest.approx(runs[0]["curves"]["report"][0], abs=1e-5)


def test_the_same_cell_gives_the_same_numbers(toy: Path) -> None:
    cell = cell_of(load_suite(str(toy)), "classes", "lora_ga", 1e-3, 1)
    first, second = run_cell(cell, PLACE), run_cell(cell, PLACE)
    assert first["curves"] == second["curves"]
    assert first["metrics"] == second["metrics"]
    other = run_cell(replace(cell, seed=2), PLACE)
    assert other["curves"]["training"] != first["curves"]["training"]


def test_a_diverged_run_is_recorded_with_its_losses_up_to_that_step(toy: Path) -> None:
    record = run_cell(cell_of(load_suite(str(toy)), "text", "full", 1e30, 0), PLACE)
    assert record["status"] == "diverged"
    assert 0 < len(record["curves"]["training"]) < 4
    assert "not finite" in record["reason"] or "training loss is nan" in record["reason"]


def test_the_command_runs_every_cell_once_even_if_resumed(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reproduce", str(toy), "--only", "text/lora", "--store", str(tmp_path / "runs"), "--workers", "2"]
    assert main([*command, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "3 cells left" in plan
    assert main([*command, "--dry-run", "--stack", "2"]) == 0
    said = "The hours are those of runs that train alone. What --stack saves is not known before, and not counted.\n"
    assert capsys.readouterr().out == plan + said
    assert not (tmp_path / "runs").exists()
    assert main(command) == 0
    before = (tmp_path / "runs/toy.jsonl.gz").read_bytes()
    records = Store(tmp_path / "runs").records()
    assert len(Store(tmp_path / "runs").attempts()) == len(records) >= 4
    assert {record["status"] for record in records.values()} == {"done"}
    assert main([*command, "--resume"]) == 0
    assert (tmp_path / "runs/toy.jsonl.gz").read_bytes() == before
    assert "2 of 2" in capsys.readouterr().out


def test_a_failed_cell_does_not_stop_the_grid_and_runs_again_only_with_retry(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, calls = load_suite(str(toy)), []

    def result(cell: Cell, place: Any, *rest: Any) -> dict[str, Any]:
        calls.append(cell.learning_rate)
        if cell.learning_rate == 0.01 and calls.count(0.01) == 1:
            raise RuntimeError("out of luck")
        metrics = {split: {"loss": abs(cell.learning_rate - 0.00316)} for split in ("tune", "report")}
        seconds = dict.fromkeys(("load", "start", "train"), 1.0)
        return {"status": "done", "metrics": metrics, "seconds": seconds, "trained_parameters": 1}

    monkeypatch.setattr("lora_ga.experiments.suites.run.result", result)
    lines = [("text", "lora")]
    with Store(tmp_path).locked() as store:
        records = run_grid(suite, lines, store, PLACE, workers=0)
        failed = [record for record in records.values() if record["status"] == "failed"]
        assert [record["reason"] for record in failed] == ["RuntimeError: out of luck"]
        # The search needs the rate that failed: it neither ends nor goes on as if that rate were bad.
        assert calls == [0.00316, 0.01]
        run_grid(suite, lines, store, PLACE, workers=0)
        assert len(calls) == 2
        records = run_grid(suite, lines, store, PLACE, workers=0, retry=True)
    assert calls[2:] == [0.01, 0.001, 0.00316]
    assert {record["status"] for record in records.values()} == {"done"}


def test_a_killed_process_leaves_a_record_that_names_the_signal(toy: Path, tmp_path: Path) -> None:
    suite = load_suite(str(toy))
    with Store(tmp_path).locked() as store:
        records = run_grid(suite, [("text", "full")], store, Fatal(), workers=1)
    assert {record["reason"] for record in records.values()} == {"its process was killed by SIGKILL"}


class Fatal:
    """Stands in for a `Place`, and kills the process that unpickles it."""

    device, commit = "cpu", None

    def __reduce__(self) -> Any:
        return _fatal, (os.getpid(),)


def test_a_line_is_named_by_task_and_method_in_either_order(toy: Path) -> None:
    suite = load_suite(str(toy))
    assert chosen(suite, ["lora/text"]) == chosen(suite, ["text/lora"]) == [("text", "lora")]
    assert chosen(suite, ["*/text"]) == [line for line in suite.lines() if line[0] == "text"] != suite.lines()


def _fatal(parent: int) -> "Fatal":
    if os.getpid() != parent:
        os.kill(os.getpid(), 9)
    return Fatal()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "nonsense: there is no such suite. The suites are .*stories-shakespeare"),
        (
            ["TOY", "--only", "nonsense"],
            "names no line of toy. Its tasks are text, classes; its methods are full, lora,",
        ),
        ([], "which suite. There are "),
    ],
)
def test_an_unknown_suite_or_line_is_refused_and_the_known_ones_are_listed(
    toy: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_GA_DEBUG", "1")
    with pytest.raises(ValueError, match=message):
        main(["reproduce", *(str(toy) if each == "TOY" else each for each in arguments)])


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:0", "cpu:1", "cuda:-1", "meta"])
def test_a_device_that_is_not_here_is_refused_before_the_store_is_made(
    toy: Path, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    store = tmp_path / "runs"
    assert main(["reproduce", str(toy), "--only", "text/lora", "--store", str(store), "--device", device]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"error: --device {device}: torch {torch.__version__} finds no such device on this machine. It fi" in error
    assert not store.exists()


def test_the_devices_that_are_here_are_accepted_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cpu", "cpu:0", "cuda", "cuda:1"):
        check_device(device)
    with pytest.raises(ValueError, match=r"--device cuda:2: .* It finds cpu, cuda:0, cuda:1.*\. Give one of these\.$"):
        check_device("cuda:2")


def test_the_command_says_how_many_failed_cells_it_did_not_run_again(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def result(*_: Any) -> dict[str, Any]:
        raise RuntimeError("out of luck")

    def in_process(*arguments: Any, **settings: Any) -> Any:
        return run_grid(*arguments, **settings | {"workers": 0})

    monkeypatch.setattr("lora_ga.experiments.suites.run.result", result)
    monkeypatch.setattr("lora_ga.experiments.suites.grid.run_grid", in_process)
    # Of the last line the one before is a part: its cells count once.
    lines = ["text/full", "text/lora_ga", "text/random directions"]
    command = ["reproduce", str(toy), "--store", str(tmp_path / "runs"), "--only", *lines]
    waits = f"The search for a rate waits for cells that failed: {', '.join(lines)}. --retry runs them again."
    assert main(command) == 1
    assert capsys.readouterr().out.splitlines()[-1] == waits
    count = len(Store(tmp_path / "runs").records())
    assert count == 3
    assert main(command) == 1
    said = f"{count} cells failed before and were not run again; --retry runs them."
    assert capsys.readouterr().out.splitlines()[-1] == said
    assert main([*command, "--retry"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == waits


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_a_run(loss: float) -> None:
    check_loss([3.0, 2.0])
    with pytest.raises(DivergedError, match=f"the training loss is {loss} at step 3"):
        check_loss([3.0, 2.0, loss])


def test_a_loss_that_explodes_ends_a_run_and_a_single_peak_does_not() -> None:
    high = 2.0 * EXPLODED
    check_loss([1.0] * WINDOW + [high])
    # Too few steps to judge.
    check_loss([1.0] + [high] * (WINDOW - 2))
    with pytest.raises(DivergedError, match=f"the training loss is 20 at step {WINDOW + 1}, it began at 1"):
        check_loss([1.0] + [high] * WINDOW)


def start_inputs(**options: Any) -> BuildInputs:
    chosen = {**load_method("steps").options, "rule": "adamw", **options}
    targets = ["q_proj", "down_proj"]
    return BuildInputs(llama(num_hidden_layers=1), causal(2), targets, "CAUSAL_LM", 3, 6.0, 10, 0.2, 0, chosen)


def adapter_layers(model: Any) -> Iterator[tuple[Tensor, Tensor, Tensor, Any]]:
    """A, B, the exact gradient of the weight, and the layer, of every adapted layer."""
    base = llama(num_hidden_layers=1)
    true = autograd_gradients(base, lambda model: torch.stack([model(**batch).loss for batch in causal(2)]).mean())
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            yield layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach(), true[name], layer


def best(matrix: Tensor, rank: int = 3) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def test_the_starts_from_a_gradient_have_the_products_of_their_formulas() -> None:
    model = load_method("steps").build(start_inputs(start="lora_one", size=32.0))
    for a, b, g, _ in adapter_layers(model):
        torch.testing.assert_close(b @ a, -best(g) / torch.linalg.matrix_norm(g, 2) / 32, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
    model = load_method("steps").build(start_inputs(start="gora", size=0.1))
    for a, b, g, layer in adapter_layers(model):
        wanted = -0.1 * math.sqrt(a.shape[1] / 3) * g @ torch.linalg.pinv(a) @ a
        torch.testing.assert_close(layer.scaling["default"] * b @ a, wanted, rtol=1e-3, atol=1e-7)
    model = load_method("steps").build(start_inputs(start="nystrom", size=0.1))
    for a, b, _, layer in adapter_layers(model):
        omega = torch.linalg.pinv(layer.get_base_layer().weight.detach()) @ b
        assert not a.any()
        assert omega.std().item() == pytest.approx(0.1, rel=0.3)


def test_lora_sb_starts_at_the_best_product_of_a_sign_step_and_trains_what_is_between() -> None:
    inputs = start_inputs(start="lora_sb")
    model = load_method("steps").build(inputs)
    for a, b, g, layer in adapter_layers(model):
        wanted = best(-inputs.rate * g.sign())
        torch.testing.assert_close(layer.scaling["default"] * b @ a, wanted, rtol=1e-3, atol=1e-4)
    (group,) = load_method("steps").groups(model, inputs)
    assert {tuple(parameter.shape) for parameter in group["params"]} == {(3, 3)}


def test_an_unknown_start_or_rule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="steps: start is 'best'; it must be one of lora, lora_ga, random, lora_one"):
        load_method("steps").build(start_inputs(start="best"))
    with pytest.raises(ValueError, match="steps: rule is 'best'; it must be one of adamw, tsd"):
        load_method("steps").optimizer([], start_inputs(rule="best"))


@pytest.mark.parametrize("rule", ["adamw", "tsd", "muon", "scaled_sgd", "scaled_adamw", "lora_pro", "momentum_sgd"])
def test_every_rule_of_steps_trains_the_toy(toy: Path, rule: str) -> None:
    cell = replace(cell_of(load_suite(str(toy)), "classes", "steps", 1e-2, 0), options={"rule": rule})
    record = run_cell(cell, PLACE)
    assert record["status"] == "done", record["reason"]
    assert record["metrics"]["report"]["loss"] != record["curves"]["report"][0]["loss"]


def test_a_gradient_that_an_optimizer_of_pairs_refuses_is_a_divergence(toy: Path) -> None:
    cell = replace(cell_of(load_suite(str(toy)), "classes", "steps", 1e-2, 0), options={"rule": "momentum_sgd"})
    refused = FloatingPointError("MomentumSGD: the gradient of q_proj is not finite.")
    with mock.patch.object(PairOptimizer, "_check_finite", side_effect=refused):
        record = run_cell(cell, PLACE)
    assert (record["status"], record["reason"]) == ("diverged", "a gradient is not finite at step 1")
