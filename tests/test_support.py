"""Every row of the support matrix: the gradient, the start, a training step, and the saved adapter in stock PEFT."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lora_ga
import support_page
import versions
from cases import CASES, Case
from conftest import _weight
from lora_ga import LoraGAConfig
from lora_ga.export.merge import merge_adapter
from lora_ga.layers.factors import Factor
from lora_ga.layers.kinds import base_weights, kind_of
from lora_ga.layers.targets import Target, find_targets
from lora_ga.version import MINIMUM

pytestmark = pytest.mark.filterwarnings("ignore:.*experts .or groups. got no gradient:UserWarning")


# The tests that fill the cells of the matrix.
MODULES = ["test_support", "test_ways_of_running", "test_kinds", "test_trained_adapters", "test_probe"]


def rows(
    column: str, *, only: Callable[[Case], bool] = lambda case: True, groups: Collection[str] = tuple(CASES)
) -> Any:
    """Parametrize a test by the rows of the matrix, and mark each as the cell in `column`."""
    found = [
        pytest.param(case, id=row, marks=pytest.mark.support(group, row, column))
        for group, cases in CASES.items()
        if group in groups
        for row, case in cases.items()
        if only(case)
    ]
    return pytest.mark.parametrize("case", found)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Ignore the warnings of PEFT and of the quantisation packages about small models."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?!.*lora_ga)")
        yield


def fresh(case: Case, base: nn.Module | None = None) -> PeftModel:
    case.check_installed()
    made = case.make() if base is None else base
    torch.manual_seed(7)
    settings = {"r": 4, "lora_alpha": 8, "use_rslora": True} | dict(case.settings)
    return get_peft_model(made, LoraConfig(**settings)).eval()


def output(case: Case, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return case.outputs(model, case.batches()[0])


def loss_of(case: Case, model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss if case.loss_fn is None else case.loss_fn(model, batch)


def as_plain(base: nn.Module, targets: dict[str, Target]) -> nn.Module:
    """Replace the quantised layers of the base by `nn.Linear` with the dequantised weights."""
    for name, target in targets.items():
        if getattr(kind_of(target.layer), "read", None) is not None:
            weight = base_weights(target.layer)[0].detach().float().clone()
            outputs, inputs = weight.shape
            linear = nn.Linear(inputs, outputs, bias=False)
            linear.weight = nn.Parameter(weight)
            base.set_submodule(name, linear)
    return base


def oracle(case: Case, model: PeftModel, batch: Any) -> dict[str, Tensor]:
    """Compute by autograd the gradient of every adapted weight: name → (parts, O, I). Quantised layers are replaced."""
    targets = find_targets(model)
    read = {name: target for name, target in targets.items() if getattr(kind_of(target.layer), "read", None)}
    if read:
        plain = as_plain(case.make(), targets)
        targets = find_targets(fresh(case, plain))
    weights = {
        name: getattr(target.layer.get_base_layer(), getattr(target.layer, "parameter_name", "weight"))
        for name, target in targets.items()
    }
    whole = model if not read else plain
    tied = {name: nn.Parameter(weight.detach().clone()) for name, weight in weights.items()}
    for name, target in targets.items():  # an untied copy: the gradient of a tied weight includes its other use
        setattr(target.layer.get_base_layer(), getattr(target.layer, "parameter_name", "weight"), tied[name])
    loss = loss_of(case, whole, batch)
    found = torch.autograd.grad(loss, list(tied.values()))
    return {
        name: target.layout.matrices(target.layer, gradient)
        for (name, target), gradient in zip(targets.items(), found, strict=True)
    }


def grouped(case: Case) -> bool:
    return "grouped" in case.settings.get("target_modules", ())


def mergeable(case: Case) -> bool:
    return not (case.quantised or grouped(case))


@rows("gradient", only=lambda case: not grouped(case))
def test_the_estimated_gradient_equals_autograds(case: Case) -> None:
    model, batch = fresh(case), case.batches()[0]
    config = LoraGAConfig(estimator="dense", oversample=10**4)
    estimate = lora_ga.estimate_gradients(model, [batch], config, loss_fn=case.loss_fn)
    keys = {name: target.keys for name, target in find_targets(model).items()}
    for name, truth_POI in oracle(case, model, batch).items():
        for key, truth in zip(keys[name], truth_POI, strict=True):
            if key not in estimate:
                assert not truth.any(), key
                continue
            found = (estimate[key].U * estimate[key].S) @ estimate[key].V.mT
            assert (found * truth).sum() >= case.cosine * found.norm() * truth.norm(), key
            assert abs(found.norm() / truth.norm() - 1) < max(1e-4, 1 - case.cosine) * 5, key


class Trained(NamedTuple):
    """A model after its start and a training step.

    Attributes:
        model: The model.
        base: The outputs of its base.
        start: Its outputs at the start.
        starts: For every factor whether its start has a nonzero entry.
        losses: The loss of a batch before and after the step on it.
        outputs: Its outputs after the step.
        folder: Where it is saved.
    """

    model: PeftModel
    base: Tensor
    start: Tensor
    starts: list[bool]
    losses: tuple[float, float]
    outputs: Tensor
    folder: Path


def train(case: Case, folder: Path) -> Trained:
    model = fresh(case)
    with model.disable_adapter():
        base = output(case, model)
    lora_ga.initialize(model, case.batches(), loss_fn=case.loss_fn)
    start = output(case, model)
    starts = [bool(module.start.any()) for module in model.modules() if isinstance(module, Factor)]
    losses = one_step(case, model)
    outputs = output(case, model)
    model.save_pretrained(folder)
    return Trained(model, base, start, starts, losses, outputs, folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Trained]:
    """The trained model of a case: made once, for all tests of a row that leave it as it is."""
    made: dict[int, Trained] = {}

    def of(case: Case) -> Trained:
        if id(case) not in made:
            made[id(case)] = train(case, tmp_path_factory.mktemp("adapter"))
        return made[id(case)]

    return of


def one_step(case: Case, model: PeftModel) -> tuple[float, float]:
    """Return the loss of a batch before and after a small step of gradient descent on it."""
    batch = case.batches()[0]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = loss_of(case, model, batch)
    before.backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        return before.item(), loss_of(case, model, batch).item()


@rows("start")
def test_outputs_at_the_start_equal_those_of_the_base_bit_for_bit(
    case: Case, trained: Callable[[Case], Trained]
) -> None:
    found = trained(case)
    assert torch.equal(found.start, found.base)
    assert found.starts
    assert all(found.starts)


@rows("step")
def test_one_training_step_lowers_the_loss(case: Case, trained: Callable[[Case], Trained]) -> None:
    before, after = trained(case).losses
    assert after < before


@rows("reload")
def test_stock_peft_loads_the_saved_adapter_on_the_original_base(
    case: Case, trained: Callable[[Case], Trained]
) -> None:
    found = trained(case)
    stock = PeftModel.from_pretrained(case.make(), found.folder).eval()
    torch.testing.assert_close(output(case, stock), found.outputs, rtol=0, atol=case.reload_error)
    with stock.disable_adapter():
        assert not torch.equal(output(case, stock), found.outputs)


@rows("resume")
def test_training_resumes_from_a_saved_adapter_in_the_same_structure(
    case: Case, trained: Callable[[Case], Trained]
) -> None:
    found = trained(case)
    again = lora_ga.load(case.make(), found.folder, is_trainable=True).eval()
    shapes = [parameter.shape for parameter in found.model.parameters() if parameter.requires_grad]
    assert [parameter.shape for parameter in again.parameters() if parameter.requires_grad] == shapes
    torch.testing.assert_close(output(case, again), output(case, found.model), rtol=0, atol=case.reload_error)


@rows('offset="base"', only=lambda case: case.base_offset)
def test_the_base_offset_keeps_the_outputs_and_saves_for_the_original_base(case: Case, tmp_path: Path) -> None:
    model = fresh(case)
    before = output(case, model)
    lora_ga.initialize(model, case.batches(), LoraGAConfig(offset="base"), loss_fn=case.loss_fn)
    torch.testing.assert_close(output(case, model), before, rtol=0, atol=2e-4)
    first, after = one_step(case, model)
    assert after < first
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(case.make(), tmp_path).eval()
    torch.testing.assert_close(output(case, stock), output(case, model), rtol=0, atol=2e-4)


@rows('offset="base" refused', only=lambda case: not case.base_offset)
def test_the_base_offset_is_refused_where_the_weight_cannot_be_changed(case: Case) -> None:
    model = fresh(case)
    with pytest.raises(ValueError, match='offset="base"'):
        lora_ga.initialize(model, case.batches(), LoraGAConfig(offset="base"), loss_fn=case.loss_fn)
    assert not any(isinstance(module, Factor) for module in model.modules())


@rows("merge", only=mergeable, groups=["layers"])
def test_the_merged_model_computes_what_the_adapted_one_does(case: Case) -> None:
    model = fresh(case)
    lora_ga.initialize(model, case.batches(), loss_fn=case.loss_fn)
    one_step(case, model)
    trained = output(case, model)
    assert not torch.equal(output(case, case.make()), trained)
    torch.testing.assert_close(output(case, model.merge_and_unload()), trained, rtol=0, atol=1e-4)


@rows("merge refused", only=lambda case: not mergeable(case), groups=["layers"])
def test_merging_into_quantised_layers_and_grouped_convolutions_is_refused(case: Case, tmp_path: Path) -> None:
    model = fresh(case)
    lora_ga.initialize(model, case.batches(), loss_fn=case.loss_fn)
    model.save_pretrained(tmp_path / "adapter")
    base = case.make()
    if grouped(case):  # not a model of Transformers
        base.save_pretrained = torch.save
    with pytest.raises(ValueError, match="quantised.*in full precision to merge|cannot merge .* with 2 groups"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()


def test_the_page_is_drawn_from_the_record() -> None:
    drawn = support_page.page(json.loads(support_page.RECORD.read_text()), version_rows())
    assert support_page.PAGE.read_text() == drawn


def version_rows() -> Any:
    return json.loads(support_page.VERSIONS.read_text())["rows"]


def test_all_situations_and_core_tests_pass_with_every_set_of_versions() -> None:
    rows = version_rows()
    assert list(rows) == versions.RECORDED
    for row, outcome in rows.items():
        assert outcome["situations"] == {"passed": 25, "failed": 0, "skipped": 0, "reasons": []}
        assert outcome["core"]["passed"] > 150
        assert versions.passed(outcome)
        assert ("framework" in outcome) == (row in versions.FRAMEWORKS)
    oldest = rows["oldest of all"]["versions"]
    assert {name: oldest[name].partition("+")[0].removesuffix(".0") for name in MINIMUM} == MINIMUM


def marked_cells() -> set[tuple[str, ...]]:
    """Group, row and column of every cell of the matrix that a test is marked with."""
    cells = set()
    for name in MODULES:
        for function in vars(importlib.import_module(name)).values():
            for mark in getattr(function, "pytestmark", []):
                values = mark.args[1] if mark.name == "parametrize" else []
                marks = [mark, *(each for value in values for each in getattr(value, "marks", ()))]
                cells |= {each.args for each in marks if each.name == "support"}
    return cells


def test_the_record_has_the_cells_that_the_tests_fill_and_nothing_failed() -> None:
    groups = json.loads(support_page.RECORD.read_text())["groups"]
    recorded = {
        (group, row, column): outcome
        for group, rows in groups.items()
        for row, cells in rows.items()
        for column, outcome in cells.items()
    }
    assert set(recorded) == marked_cells()
    assert "failed" not in recorded.values()
    # The page and the tests know the same groups, rows and columns.
    assert set(groups) == {*CASES, "ways of running", "after training"}
    assert {column for _, _, column in recorded} == set(support_page.MEANING)


def test_the_command_of_the_page_runs_every_test_that_fills_a_cell() -> None:
    users = {path.stem for path in Path(__file__).parent.rglob("test_*.py") if "mark.support(" in path.read_text()}
    assert users == set(MODULES)
    assert all(f"tests/{name}.py" in (support_page.__doc__ or "") for name in MODULES)


def test_a_failure_and_a_missing_package_are_shown() -> None:
    rows = {"one": {"start": "failed", "step": "skipped: x is not installed"}, "two": {"start": "passed"}}
    shown = support_page.page({"versions": {"torch": "2"}, "groups": {"layers": rows}}, version_rows())
    assert "| one | **✗** | not run |" in shown
    assert "| two | ✓ |  |" in shown
    assert "- one, step: x is not installed." in shown


@pytest.mark.parametrize(
    ("outcomes", "worst"),
    [
        (["passed", "failed", "skipped: x"], "failed"),
        (["skipped: x", "passed"], "passed"),
        (["skipped: x"], "skipped: x"),
    ],
)
def test_a_cell_with_several_tests_shows_the_worst_outcome_of_those_that_ran(outcomes: list[str], worst: str) -> None:
    assert min(outcomes, key=_weight) == worst
