"""`find_rate` and `lora-ga rate`: the rule, what it leaves unchanged, the input it refuses."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lora_ga
from lora_ga.adapter import rate as rates
from lora_ga.adapter.rate import Group, Search, find_rate
from lora_ga.adapter.trials import Trials
from lora_ga.cli.main import main
from lora_ga.cli.rate import RateOptions, rate_of_lora_ga
from toys import adapted, bert, classified, llama

STEPS = 200


def norm_in_front(**settings: Any) -> nn.Module:
    """A BERT with dropout and a buffer that training changes, ready to train with plain LoRA."""
    model = bert(initializer_range=0.2)  # with the usual weights such a small model barely reacts to a step
    model.bert.embeddings.LayerNorm = nn.Sequential(model.bert.embeddings.LayerNorm, Running())
    return adapted(model, ["query", "value"], task_type="SEQ_CLS", **settings)


class Running(nn.Module):
    """Counts its passes in training mode, as normalisation layers keep running statistics."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training:
            self.count += 1
        return hidden


def lora() -> tuple[nn.Module, list[Any]]:
    return norm_in_front(), classified(8)


def rslora() -> tuple[nn.Module, list[Any]]:
    return norm_in_front(use_rslora=True), classified(8)


def lora_ga_start() -> tuple[nn.Module, list[Any]]:
    model = norm_in_front()
    lora_ga.initialize(model, classified(2))
    return model, classified(8)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any]) -> list[Any]:
    """All that a search could leave behind, as plain values."""
    tensors = [*model.state_dict().values(), *model.buffers(), *(p.grad for p in model.parameters())]
    state = [value for each in optimizer.state.values() for value in each.values()]
    random_states = [torch.get_rng_state(), *([loader.generator.get_state()] if loader.generator else [])]
    return [
        *(None if each is None else each.clone() for each in [*tensors, *state, *random_states]),
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        str(np.random.get_state()),
        random.getstate(),
    ]


def assert_equal(one: list[Any], other: list[Any]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def prepared(make: Callable[[], tuple[nn.Module, list[Any]]]) -> tuple[nn.Module, Any, DataLoader[Any]]:
    """A model in the middle of its training: one step is made, and the gradients of the next are there."""
    model, batches = make()
    model.train()
    next(model.modules()).training = False  # a mode that `train()` would not give
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for batch in batches[:2]:
        model(**batch).loss.backward()
        optimizer.step()
    if make is rslora:  # between two epochs, with a loader that draws from the global generator
        return model.eval(), optimizer, DataLoader(batches, None, shuffle=True)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(5)
    return model, optimizer, DataLoader(batches, None, shuffle=True, generator=draw)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [lora, rslora, lora_ga_start])
def test_a_search_leaves_no_trace(make: Callable[[], tuple[nn.Module, list[Any]]]) -> None:
    model, optimizer, loader = prepared(make)
    before = everything(model, optimizer, loader)
    rate = find_rate(model, loader, STEPS)
    assert 1e-4 < rate < 0.1
    assert_equal(everything(model, optimizer, loader), before)


def test_an_interrupted_search_leaves_no_trace_and_goes_on_from_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, loader = prepared(lora)
    before, file = everything(model, optimizer, loader), tmp_path / "rate.json"
    whole = find_rate(model, loader, STEPS)
    tried: list[float] = []
    trial, loss = Trials.stable, Trials._loss

    def counted(self: Any, rate: float, losses: list[float]) -> tuple[bool, int]:
        tried.append(rate)
        return trial(self, rate, losses)

    def in_the_middle(self: Any, place: int, **more: Any) -> float:
        if place == 2 and file.exists() and json.loads(file.read_text())["groups"][0]["stable"]:
            raise KeyboardInterrupt
        return loss(self, place, **more)

    monkeypatch.setattr(Trials, "_loss", in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        find_rate(model, loader, STEPS, checkpoint=file)
    assert_equal(everything(model, optimizer, loader), before)
    found = json.loads(file.read_text())
    assert list(found["groups"][0]["stable"]) == ["0.01"]

    monkeypatch.setattr(Trials, "_loss", loss)
    monkeypatch.setattr(Trials, "at_start", lambda self: pytest.fail("measured again"))
    monkeypatch.setattr(Trials, "stable", counted)
    assert find_rate(model, loader, STEPS, checkpoint=file) == whole
    assert tried
    assert 0.01 not in tried
    tried.clear()
    assert find_rate(model, loader, 4 * STEPS, checkpoint=file) == pytest.approx(whole / 2, rel=0.1)
    assert not tried


def test_a_checkpoint_of_another_search_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rate.json"
    model, batches = lora()
    find_rate(model, batches, STEPS, checkpoint=file)
    with pytest.raises(ValueError, match=r"rate.json: belongs to the search for another model, adapter or start"):
        find_rate(model, batches[1:], STEPS, checkpoint=file)
    with pytest.raises(ValueError, match=r"checkpoint='.*': a folder. Give the path of a file"):
        find_rate(model, batches, STEPS, checkpoint=tmp_path)
    file.write_text(file.read_text()[:-9])
    with pytest.raises(ValueError, match=r"rate.json: damaged.*Remove it to search again"):
        find_rate(model, batches, STEPS, checkpoint=file)


def identity(model: nn.Module) -> str:
    return Trials(model, [[batch] for batch in classified(4)], None, None).identity()


def test_a_search_is_recognised_by_its_model_its_start_its_scaling_and_its_batches() -> None:
    whole = lora_ga.estimate_gradients(norm_in_front(), classified(2))

    def start(scaling: float = 1.0, **settings: Any) -> Any:
        model = norm_in_front()
        lora_ga.apply_estimate(model, whole, lora_ga.LoraGAConfig(**settings))
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling["default"] *= scaling
        return model

    other = start()
    other.base_model.model.bert.encoder.layer[0].output.dense.weight.data *= 2
    # The values that train are equal in all of these: the changes of A and B, which are zero.
    models = [start(), start(stable_gamma=1.0), start(scaling=2.0), other]
    assert len({identity(model) for model in models}) == len(models)
    assert identity(start()) == identity(start())


def test_the_agreement_is_the_mean_product_of_signs_on_two_batches_and_the_rate_follows_the_rule() -> None:
    model, batches = lora_ga_start()
    trials = Trials(model, [[batch] for batch in batches], None, None)
    model.eval()  # without dropout, as a search computes
    losses, agreement = trials.at_start()
    signs = []
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        adapter = [p for name, p in model.named_parameters() if "lora" in name]
        signs.append(torch.cat([p.grad.flatten().sign() for p in adapter if p.grad is not None]))
    products = [a @ b / len(a) for i, a in enumerate(signs) for b in signs[:i]]
    assert agreement == pytest.approx(float(torch.stack(products).mean()), rel=1e-4)
    assert len(losses) == len(batches)
    group = Group("", agreement=0.25, stable={0.01: True, 0.04: False})
    search = Search([group], 1)
    assert (group.edge, search.rate(200), search.rate(800)) == pytest.approx((0.02, 0.006, 0.003))
    assert search.rate(50) == search.rate(200)


def test_the_rate_of_several_groups_is_their_geometric_mean_and_those_of_a_longer_run_do_not_count() -> None:
    groups = [Group("", agreement=a, stable={0.01: True, 0.04: False}) for a in (0.25, 0.01, 1.0)]
    least = math.sqrt(0.05)  # 0.01 counts as 0.05
    assert Search(groups, 2).rate(200) == pytest.approx(0.6 * 0.02 * math.sqrt(0.5 * least), rel=0.02)
    assert Search(groups, 1).rate(200) == 0.006


@pytest.mark.parametrize("agreement", [-0.1, 0.0, 0.008, 0.019, 0.05])
def test_a_small_agreement_counts_as_a_twentieth_and_below_a_fiftieth_a_warning_says_so(
    agreement: float, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    at_start = Trials.at_start
    monkeypatch.setattr(Trials, "at_start", lambda self: (at_start(self)[0], agreement))
    model, batches = lora_ga_start()
    found = find_rate(model, batches, STEPS)
    monkeypatch.setattr(Trials, "at_start", lambda self: (at_start(self)[0], 0.05))
    assert find_rate(model, batches, STEPS) == found
    said = [str(each.message) for each in recwarn if "hardly agree" in str(each.message)]
    assert len(said) == (agreement < 0.02)
    assert all(f"agreement {agreement:.2g}, and" in each and f"try {2 * found:.2g}" in each for each in said)


def test_the_finest_trial_is_made_only_within_its_share_of_the_run(tmp_path: Path) -> None:
    model, batches = lora_ga_start()
    found = {}
    for steps in (10**6, 50):
        file = tmp_path / f"{steps}.json"
        find_rate(model, batches[:8], steps, checkpoint=file)
        (found[steps],) = (Group(**group) for group in json.loads(file.read_text())["groups"])
    fine, coarse = found[10**6], found[50]
    assert len(fine.stable) == len(coarse.stable) + 1
    assert fine.passes > coarse.passes
    least = -(-(coarse.passes + 8) * 100 // 15)  # steps of which the whole search is just 0.15
    for steps in (least - 1, least):
        file = tmp_path / f"{steps}.json"
        find_rate(model, batches[:8], steps, checkpoint=file)
        (group,) = (Group(**group) for group in json.loads(file.read_text())["groups"])
        assert group.stable == (fine if steps == least else coarse).stable


def test_a_longer_run_is_searched_on_more_groups_and_uses_again_what_a_shorter_one_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = lora_ga_start()
    batches, file = classified(27), tmp_path / "rate.json"
    measured: list[int] = []
    at_start = Trials.at_start

    def counted(self: Any) -> tuple[list[float], float]:
        measured.append(len(self.batches))
        return at_start(self)

    monkeypatch.setattr(Trials, "at_start", counted)
    short = find_rate(model, batches, 399, checkpoint=file)
    assert measured == [8]
    find_rate(model, batches, 800, checkpoint=file)
    assert measured == [8, 8, 8]  # the last three batches are too few for a group
    groups = [Group(**group) for group in json.loads(file.read_text())["groups"]]
    assert len({group.agreement for group in groups}) == 3
    assert find_rate(model, batches, 399, checkpoint=file) == short
    assert len(json.loads(file.read_text())["groups"]) == 3
    others = [*batches[:8], *classified(40)[30:38], *batches[16:]]
    with pytest.raises(ValueError, match=r"rate.json: belongs to the search for another model, adapter or start"):
        find_rate(model, others, 800, checkpoint=file)


@pytest.mark.parametrize(("steps", "read"), [(50, 8), (399, 8), (400, 16), (999, 32), (1000, 40), (10**6, 40)])
def test_the_number_of_batches_that_a_search_reads(steps: int, read: int) -> None:
    assert rates.steps_of_groups(steps) == read


def test_accumulated_batches_count_as_one_step() -> None:
    model, batches = lora_ga_start()
    halves = [
        {name: part[half] for name, part in batch.items()} for batch in batches for half in (slice(4), slice(4, 8))
    ]
    one = Trials(model, [[batch] for batch in batches], None, None).at_start()
    two = Trials(model, [halves[i : i + 2] for i in range(0, 16, 2)], None, None).at_start()
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    assert two[1] == pytest.approx(one[1], rel=1e-2)
    assert find_rate(model, halves, STEPS, gradient_accumulation_steps=2) == find_rate(model, batches, STEPS)


def unlabelled() -> Iterator[dict[str, Tensor]]:
    for batch in classified(8):
        yield batch | {"labels": torch.full_like(batch["labels"], -100)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 20}, r"steps=20: a search costs 20 to 40 steps .* at least 50"),
        ({"steps": 2.0}, r"steps=2.0: it must be an integer of at least 1"),
        ({"steps": np.int64(20)}, r"steps=np.int64\(20\): a search costs|steps=20: a search costs"),
        (
            {"optimizer": lambda rate: torch.optim.SGD([nn.Parameter(torch.ones(1))], rate)},
            r"makes a SGD, but the rule",
        ),
        (
            {"optimizer": lambda rate: torch.optim.AdamW([nn.Parameter(torch.ones(1))], 0.5)},
            r"optimizer= gives the learning rates 0.5 at every rate. Give a function from a rate",
        ),
        ({"data": classified(3)}, r"gives 3 batches with a label, .* those of at least 4 steps, better 8\."),
        ({"data": classified(7), "gradient_accumulation_steps": 2}, r"those of at least 4 steps of 2 batches each"),
        ({"data": unlabelled()}, r"None of the 8 batches has a label"),
        ({"loss_fn": lambda model, batch: model(**batch).loss * torch.nan}, r"batch 1: its loss is nan"),
        ({"loss_fn": lambda model, batch: model(**batch).loss - 9}, r"The loss at the start is -7.*above 0"),
        ({"loss_fn": lambda model, batch: model(**batch).loss * 0 + 1}, r"No gradient reaches the adapter"),
    ],
)
def test_bad_input_is_refused_and_the_model_stays(changes: dict[str, Any], message: str) -> None:
    model, batches = lora_ga_start()
    before = [each.clone() for each in model.state_dict().values()]
    given: dict[str, Any] = {"data": batches, "steps": STEPS} | changes
    with pytest.raises(ValueError, match=message):
        find_rate(model, **given)
    assert_equal(list(model.state_dict().values()), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, r"data is a NoneType, but it must be an iterable of batches"),
        ({"data": classified(1)[0]}, r"data is a .*, but it must be .* one batch alone is given as \[batch\]"),
        ({"optimizer": torch.optim.AdamW}, r"is no function. Give a function from a rate to an optimizer"),
        ({"optimizer": 1e-3}, r"optimizer=0.001 is no function. Give a function"),
        ({"optimizer": lambda rate: None}, r"returned a NoneType. Give a function from a rate to an optimizer"),
    ],
)
def test_input_of_another_kind_is_refused(changes: dict[str, Any], message: str) -> None:
    model, batches = lora_ga_start()
    given: dict[str, Any] = {"data": batches, "steps": STEPS} | changes
    with pytest.raises(TypeError, match=message):
        find_rate(model, **given)


def test_a_search_in_inference_mode_is_refused() -> None:
    model, batches = lora_ga_start()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"torch.inference_mode\(\) is on"):
        find_rate(model, batches, STEPS)


def test_a_loss_that_is_finite_at_no_rate_or_that_no_rate_raises_is_refused() -> None:
    model, batches = lora_ga_start()
    start = next(p for p in model.parameters() if p.requires_grad).clone()

    def breaks(model: nn.Module, batch: Any) -> Tensor:
        moved = not torch.equal(next(p for p in model.parameters() if p.requires_grad), start)
        return model(**batch).loss * (torch.nan if moved else 1)

    def barely(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).loss * 1e-9 + 1

    with pytest.raises(ValueError, match=r"At every learning rate from 1e-6 to 1e-2 the loss rises or is not finite"):
        find_rate(model, batches, STEPS, loss_fn=breaks)
    before = [each.clone() for each in model.state_dict().values()]
    for data, steps in ((batches, STEPS), (classified(16), 2 * STEPS)):  # one group, and two
        with pytest.raises(
            ValueError, match=r"No learning rate up to 0.316 raises.*bounded loss.*the learning rate your"
        ):
            find_rate(model, data, steps, loss_fn=barely)
    assert_equal(list(model.state_dict().values()), before)


def test_a_loss_that_no_rate_raises_on_some_batches_gives_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = lora_ga_start()
    batches, trial = classified(16), Trials.stable
    first = batches[0]

    def open_at_first(self: Any, rate: float, losses: list[float]) -> tuple[bool, int]:
        return (True, 8) if self.batches[0][0] is first else trial(self, rate, losses)

    monkeypatch.setattr(Trials, "stable", open_at_first)
    with pytest.warns(UserWarning, match=r"On some batches no learning rate up to 0.316 raises.*is a guess"):
        assert find_rate(model, batches, 2 * STEPS) > 0


def test_losses_that_differ_much_between_batches_give_a_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    group = Group("", losses=[1.0, 2.0, 3.0, 2.0])
    assert group.noise == pytest.approx((2 / 3) ** 0.5 / 2 / 2)
    model, batches = lora_ga_start()
    find_rate(model, batches, STEPS)
    assert not [each for each in recwarn if "differ much" in str(each.message)]
    rare = torch.stack([batch["input_ids"].sum() for batch in batches]).max()

    def seldom(model: nn.Module, batch: Any) -> Tensor:
        """A loss that is near zero on all batches but one."""
        return model(**batch).loss * (1.0 if batch["input_ids"].sum() == rare else 1e-3)

    with pytest.warns(
        UserWarning, match=r"losses of the first batches differ much.*is 0.99 of it.*Set the rate yourself"
    ):
        find_rate(model, batches, STEPS, loss_fn=seldom)


def test_a_model_without_trained_parameters_or_without_an_adapter_is_refused() -> None:
    model, batches = lora_ga_start()
    with pytest.raises(ValueError, match="No parameter of the model trains"):
        find_rate(model.requires_grad_(False), batches, STEPS)
    with pytest.raises(TypeError):
        find_rate(llama(), batches, STEPS)


# --- lora-ga rate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        # The authors of LoRA-GA advise full fine-tuning's rate for gamma = 16 and width 4096 (Outsider565/LoRA-GA #12).
        ({"learning_rate": 2e-5, "known_for": "full", "stable_gamma": 16.0, "width": 4096}, 2e-5),
        ({"learning_rate": 2e-4}, 2e-4),  # a start smaller than LoRA's
        ({"learning_rate": 2e-4, "reach": 2.309401}, 1e-4),  # twice LoRA's
        ({"learning_rate": 1e-4, "known_for": "rslora"}, 8**0.5 * 1e-4),
        ({"learning_rate": 2e-4, "stable_gamma": 16.0, "width": 256, "use_rslora": False}, 2e-4 / 3**0.5),
    ],
)
def test_the_calculated_rate_has_the_s_f_rate_of_the_known_one(options: dict[str, Any], rate: float) -> None:
    assert rate_of_lora_ga(RateOptions(**options)) == pytest.approx(rate, rel=0.03)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--learning_rate is missing. Give it: the rate that is known."),
        (["--learning_rate", "0"], "--learning_rate: found 0, but it must be a number greater than 0"),
        (["--learning_rate", "-1"], "--learning_rate: found -1, but it must be a number greater than 0"),
        (["--learning_rate", "1e-4", "--stable_gamma", "16"], "--stable_gamma needs --width"),
        (["--learning_rate", "1e-4", "--width", "4096"], "--width needs --stable_gamma"),
        (
            ["--learning_rate", "1e-4", "--stable_gamma", "16", "--width", "4096", "--reach", "1"],
            "--reach and --stable_gamma are two ways to choose the size of the start. Leave one of them out.",
        ),
        (["--learning_rate", "1e-4", "--rank", "0"], "--rank: found 0, but it must be at least 1"),
    ],
)
def test_the_calculator_refuses_bad_numbers(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rate", *argv]) == 2
    assert message in capsys.readouterr().err


def test_the_help_has_one_heading_and_no_default_of_what_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["rate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("options:") == 1
    assert "the rate that is known (required) --known_for" in text
    assert "(default: 0.35)" in text


def test_the_command_prints_the_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rate", "--learning_rate=2e-5", "--known_for=full", "--stable_gamma=16", "--width=4096"]) == 0
    assert capsys.readouterr().out.startswith(
        "Begin LoRA-GA at 2e-05. Computed from 2e-05 for full fine-tuning; size of the start s·f: 11 (gamma 16, width "
        "4096; LoRA's: 1.15). Sweep around it, "
    )
    assert main(["rate", "--learning_rate=2e-4"]) == 0
    assert capsys.readouterr().out.startswith(
        "Begin LoRA-GA at 0.0002. Computed from 0.0002 for LoRA; size of the start s·f: 0.35 (LoRA's: 1.15). Sweep "
    )
