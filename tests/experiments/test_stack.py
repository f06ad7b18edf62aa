"""Several cells of one task, trained as one batch of adapters over one base model."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_ga
from lora_ga.cli.main import main
from lora_ga.experiments.methods import METHODS, load_method
from lora_ga.experiments.methods.base import Method
from lora_ga.experiments.methods.starts import STARTS
from lora_ga.experiments.records.store import Store
from lora_ga.experiments.suites import run as alone
from lora_ga.experiments.suites import run_stack as running
from lora_ga.experiments.suites.cells import Cell, cell_of, stacks
from lora_ga.experiments.suites.run import Place, build, now, run_cell
from lora_ga.experiments.suites.run_stack import run_stack
from lora_ga.experiments.suites.sources import Sources
from lora_ga.experiments.suites.spec import load_suite
from lora_ga.experiments.suites.stack import AloneError, Stack, check_member, share_memory
from lora_ga.experiments.suites.training import Curves
from lora_ga.experiments.tasks import classes
from toys import causal, llama, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization"),
]
PLACE = Place(Sources())
STACKED = ("lora", "rslora", "lora_plus", "pissa", "olora", "peft_lora_ga", "lora_ga", "gradient_lora", "steps")


def cells_of(toy: Path, task: str, labels: tuple[str, ...], **settings: Any) -> list[Cell]:
    """A cell of each method, with rates and seeds that differ."""
    suite = load_suite(str(toy))
    cells = [cell_of(suite, task, label, 1e-3 * (1 + n % 3), n % 2) for n, label in enumerate(labels)]
    return [replace(cell, settings=replace(cell.settings, **settings)) for cell in cells]


@pytest.fixture
def without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads classifiers without dropout: a stack draws other masks than a run alone."""
    real = classes.load_model

    def load(*args: Any, **settings: Any) -> Any:
        model = real(*args, **settings)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    monkeypatch.setattr(classes, "load_model", load)


@pytest.mark.parametrize("task", ["text", "classes"])
def test_a_stack_trains_every_cell_as_a_run_alone_does(toy: Path, task: str, without_dropout: None) -> None:
    cells = cells_of(toy, task, STACKED)
    for found, cell in zip(run_stack(cells, PLACE), cells, strict=True):
        alone = run_cell(cell, PLACE)
        assert found["status"] == "done", found["reason"]
        assert found["stack"] == len(cells)
        assert "stack" not in alone
        assert found["digest"] == alone["digest"]
        assert found["curves"]["training"] == pytest.approx(alone["curves"]["training"], abs=2e-5)
        for split in ("tune", "report"):
            assert found["metrics"][split]["loss"] == pytest.approx(alone["metrics"][split]["loss"], abs=2e-5)
        for ours, theirs in zip(found["curves"]["report"], alone["curves"]["report"], strict=True):
            assert ours["step"] == theirs["step"]
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-5)
        assert found["trained_parameters"] == alone["trained_parameters"]


def test_the_training_moves_the_loss_by_far_more_than_the_tolerance(toy: Path) -> None:
    for record in run_stack(cells_of(toy, "text", ("lora_ga", "lora")), PLACE):
        losses = [point["loss"] for point in record["curves"]["report"]]
        assert abs(losses[-1] - losses[0]) > 2e-3


def test_cells_that_cannot_be_stacked_run_alone(toy: Path) -> None:
    cells = cells_of(toy, "text", ("full", "lora", "dora", "adalora", "lora_ga"))
    records = run_stack(cells, PLACE)
    assert [record["digest"] for record in records] == [cell.digest() for cell in cells]
    assert {record["status"] for record in records} == {"done"}
    assert [record.get("stack") for record in records] == [None, 2, None, None, 2]


def test_a_cell_that_diverges_leaves_the_others_as_they_are(toy: Path) -> None:
    good = cells_of(toy, "text", ("lora", "lora_ga"))
    wild = replace(good[0], learning_rate=1e30)
    first, diverged, last = run_stack([good[0], wild, good[1]], PLACE)
    alone = run_cell(wild, PLACE)
    assert (diverged["status"], diverged["reason"]) == ("diverged", alone["reason"])
    assert len(diverged["curves"]["training"]) == len(alone["curves"]["training"]) < 4
    for found, cell in ((first, good[0]), (last, good[1])):
        assert found["curves"]["training"] == pytest.approx(run_cell(cell, PLACE)["curves"]["training"], abs=2e-5)


def test_a_cell_that_is_not_finite_from_the_start_leaves_the_others_as_they_are(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(inputs: Any) -> Any:
        model = load_method("lora").build(inputs)
        next(p for name, p in model.named_parameters() if "down_proj.lora_B" in name).data.fill_(torch.nan)
        return model

    real = load_method
    broken = replace(load_method("pissa"), build=build, options=load_method("lora").options)
    monkeypatch.setattr(
        "lora_ga.experiments.suites.run.load_method", lambda name: broken if name == "pissa" else real(name)
    )
    monkeypatch.setattr("lora_ga.experiments.suites.run.complete", lambda name, options: {"init_scale": 1.0})
    records = run_stack(cells_of(toy, "text", ("lora", "pissa", "rslora")), PLACE)
    assert [record["status"] for record in records] == ["done", "diverged", "done"]
    assert "the report split's metrics are not finite" in records[1]["reason"]
    assert records[0]["stack"] == 3


def test_a_cell_that_fails_leaves_the_others_as_they_are(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(inputs: Any) -> Any:
        raise RuntimeError("out of luck")

    real = load_method
    monkeypatch.setattr(
        "lora_ga.experiments.suites.run.load_method", lambda name: Method(build) if name == "pissa" else real(name)
    )
    records = run_stack(cells_of(toy, "text", ("lora", "pissa", "lora_ga")), PLACE)
    assert [record["status"] for record in records] == ["done", "failed", "done"]
    assert records[1]["reason"] == "RuntimeError: out of luck"
    assert records[0]["stack"] == 2


def test_an_error_of_the_stack_or_of_its_data_is_in_every_record(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    cells = cells_of(toy, "text", ("lora", "lora_ga"))
    for name in ("train_stack", "prepare"):
        with monkeypatch.context() as patch:
            patch.setattr(running, name, fails)
            records = run_stack(cells, PLACE)
        assert [record["reason"] for record in records] == ["RuntimeError: out of memory"] * 2
        assert {record["status"] for record in records} == {"failed"}


def test_stacks_hold_cells_of_one_task_with_equal_settings(toy: Path) -> None:
    texts, classes = (cells_of(toy, task, ("lora", "rslora", "pissa")) for task in ("text", "classes"))
    mixed = [cell for pair in zip(texts, classes, strict=True) for cell in pair]
    assert stacks(mixed, 2) == [texts[:2], texts[2:], classes[:2], classes[2:]]
    assert stacks(mixed, 1) == [[cell] for cell in mixed]
    longer = cells_of(toy, "text", ("lora",), steps=5)[0]
    assert stacks([texts[0], longer], 8) == [[texts[0]], [longer]]
    accumulating = cells_of(toy, "text", ("lora", "rslora"), gradient_accumulation_steps=2)
    assert stacks(accumulating, 8) == [[cell] for cell in accumulating]


@pytest.mark.parametrize(
    ("label", "options"),
    [*((label, {}) for label in METHODS), ("eva", {"rho": 1.0}), *(("steps", {"start": start}) for start in STARTS)],
)
def test_a_cell_takes_a_place_in_a_stack_only_if_a_stack_can_train_it(
    toy: Path, label: str, options: dict[str, Any]
) -> None:
    first, cell = cells_of(toy, "text", ("lora", label))
    cell = replace(cell, options=options)
    run = build(cell, PLACE, Curves())
    try:
        check_member(run.model, run.method, cell.settings.rank)
        stacked = True
    except AloneError:
        stacked = False
    cell = replace(cell, learning_rate=2e-3)
    assert stacks([first, cell], 8) == ([[first, cell]] if stacked else [[first], [cell]])


def test_the_command_runs_a_grid_in_stacks(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reproduce", str(toy), "--only", "text/lora", "text/lora_ga", "--stack", "4"]
    assert main([*command, "--store", str(tmp_path / "stacked")]) == 0
    assert capsys.readouterr().out.count("2 of 2") == 2
    assert main([*command[:-2], "--store", str(tmp_path / "alone")]) == 0
    found, alone = (Store(tmp_path / name).records() for name in ("stacked", "alone"))
    assert set(found) == set(alone)
    assert max(record.get("stack", 1) for record in found.values()) > 2
    for digest, record in found.items():
        assert record["metrics"]["tune"]["loss"] == pytest.approx(alone[digest]["metrics"]["tune"]["loss"], abs=2e-5)


def aligned(seed: int, **changes: Any) -> Any:
    """A tiny Llama with an adapter that LoRA-GA has started."""
    model = get_peft_model(llama(seed=0), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **changes))
    ids = tokens(seed=seed)
    lora_ga.initialize(model, [{"input_ids": ids, "labels": ids}])
    return model


def test_the_gradients_of_a_stack_are_those_of_its_models() -> None:
    models = [aligned(seed).double() for seed in (1, 2)]
    batches = causal(2)
    wanted = []
    for model, batch in zip(models, batches, strict=True):
        with torch.no_grad():
            for n, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)))
        model(**batch).loss.backward()
        wanted.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    stack = Stack(llama(seed=0).double(), models)
    logits = stack.logits(batches)
    for model, batch, own in zip(models, batches, logits, strict=True):
        torch.testing.assert_close(own, model(**batch).logits, rtol=1e-10, atol=1e-10)
    losses = [
        nn.functional.cross_entropy(own[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        for own, batch in zip(logits, batches, strict=True)
    ]
    torch.stack(losses).sum().backward()
    for model, gradients in zip(models, wanted, strict=True):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert gradients[name].abs().max() > 1e-6
                # Llama's norms compute in float32, whatever the model's dtype.
                torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-9)
    stack.zero_grad()
    assert all(not p.grad.any() for model in models for p in model.parameters() if p.requires_grad)


def test_a_batch_of_other_length_does_not_change_a_cells_logits() -> None:
    models = [aligned(seed).eval() for seed in (1, 2)]
    batches = [{name: x[:, :width] for name, x in causal(1)[0].items()} for width in (6, 4)]
    stack = Stack(llama(seed=0).eval(), models)
    with torch.no_grad():
        for model, batch, own in zip(models, batches, stack.logits(batches), strict=True):
            torch.testing.assert_close(own, model(**batch).logits, rtol=1e-5, atol=1e-6)


def test_frozen_weights_of_the_models_share_the_memory_of_the_base() -> None:
    base, model = llama(seed=0), aligned(1)
    with torch.no_grad():
        model.get_base_model().lm_head.weight[0] += 1
    share_memory(base, model)
    own = {p.data_ptr() for p in base.parameters()}
    others = [name for name, p in model.named_parameters() if not p.requires_grad and p.data_ptr() not in own]
    assert others == ["base_model.model.lm_head.weight"]  # which is not equal


def test_each_model_of_a_stack_shares_the_base_before_the_next_is_built(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[tuple[Any, Any]] = []
    real = running.build

    def build(*arguments: Any) -> Any:
        for base, model in shared:
            own = {p.data_ptr() for p in base.parameters()}
            assert all(p.requires_grad or p.data_ptr() in own for p in model.parameters())
        run = real(*arguments)
        shared.append((arguments[-1].base, run.model))
        return run

    monkeypatch.setattr(running, "build", build)
    records = run_stack(cells_of(toy, "text", ("lora", "rslora", "lora_ga")), PLACE)
    assert [record["stack"] for record in records] == [3] * 3


def test_the_models_of_a_stack_are_freed_before_other_cells_run_alone(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[weakref.ref[Any]] = []
    real = running.build

    def build(*arguments: Any) -> Any:
        run = real(*arguments)
        built.append(weakref.ref(run.model))
        return run

    def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
        return {"alone": cell.label, "models": [each() for each in built]}

    monkeypatch.setattr(running, "build", build)
    monkeypatch.setattr(running, "run_cell", run_cell)
    records = run_stack(cells_of(toy, "text", ("lora", "full", "rslora")), PLACE)
    assert records[1] == {"alone": "full", "models": [None, None, None]}


def test_the_time_on_a_gpu_is_read_once_it_has_computed_all(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    assert now("cpu") <= now("cuda:1")
    assert waited == ["cuda:1"]


def test_all_seconds_of_a_run_are_read_from_that_clock(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    for module in (alone, running):
        monkeypatch.setattr(module, "now", lambda device: float(next(ticks)))
    each = {"load": 1.0, "start": 1.0, "train": 1.0, "evaluate": 1.0}
    one, *two = cells_of(toy, "text", ("lora", "rslora", "lora_ga"))
    seconds = [run_cell(one, PLACE)["seconds"], *(record["seconds"] for record in run_stack(two, PLACE))]
    totals = [found.pop("total") for found in seconds]
    assert seconds == [each, each | {"train": 0.5}, each | {"train": 0.5}]
    assert all(total > 0 for total in totals)
    judged = SimpleNamespace(prepared=SimpleNamespace(evaluate=lambda model: {"score": 1.0}), model=llama())
    found = alone.evaluated(judged, PLACE, {"seconds": {"evaluate": 1.0}, "metrics": {"report": {}}})  # type: ignore[arg-type]
    assert found == {"seconds": {"evaluate": 2.0}, "metrics": {"report": {"score": 1.0}}}


def _broken(change: Callable[[Any], None]) -> Any:
    model = aligned(1)
    change(model)
    return model


def _bias(model: Any) -> None:
    next(m for m in model.modules() if hasattr(m, "lora_A")).lora_A["default"].bias = nn.Parameter(torch.zeros(2))


def _norm(model: Any) -> None:
    next(p for name, p in model.named_parameters() if "norm" in name).requires_grad_()


def _shared(model: Any) -> None:
    first, second = [m for m in model.modules() if hasattr(m, "lora_A")][::2]
    second.lora_A = first.lora_A


def _frozen(model: Any) -> None:
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: llama(seed=0), "no adapter"),
        (lambda: aligned(1, lora_dropout=0.1), "dropout or a bias"),
        (lambda: _broken(_bias), "dropout or a bias"),
        (lambda: _broken(_norm), "it trains .*norm"),
        (lambda: _broken(_frozen), "frozen or shared"),
        (lambda: _broken(_shared), "frozen or shared"),
        (lambda: aligned(1, rank_pattern={"q_proj": 3}), "another rank"),
    ],
)
def test_a_model_that_a_stack_cannot_follow_is_refused(model: Callable[[], Any], said: str) -> None:
    check_member(aligned(1), load_method("lora_ga"), 2)
    with pytest.raises(AloneError, match=said):
        check_member(model(), load_method("lora_ga"), 2)


def test_a_method_that_acts_after_each_step_is_refused() -> None:
    with pytest.raises(AloneError, match="after each step"):
        check_member(aligned(1), load_method("adalora"), 2)


def test_a_base_that_was_changed_by_more_than_its_start_is_refused() -> None:
    models = [get_peft_model(llama(seed=0), LoraConfig(r=2, target_modules=["q_proj"])) for _ in range(2)]
    layer = next(m for m in models[1].modules() if hasattr(m, "lora_A"))
    with torch.no_grad():
        layer.base_layer.weight.mul_(1.5)
    with pytest.raises(AloneError, match="something else than its start"):
        Stack(llama(seed=0), models)


def test_all_pairs_of_methods_share_a_stack(toy: Path) -> None:
    for pair in itertools.combinations(("lora", "pissa", "lora_ga"), 2):
        records = run_stack(cells_of(toy, "classes", pair), PLACE)
        assert [record.get("stack") for record in records] == [2, 2]
