"""Optimizers of pairs of factors: each rule against dense matrices, what they find in a model, state and trainers."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import lora_ga
import processes
from cases import LAYERS
from lora_ga import LoraGAConfig
from lora_ga.experiments.methods.steps import LoRAPro, MomentumSGD
from lora_ga.experiments.optim import LoRAMuon, LoRATSD, PairOptimizer, PoLoRA, ScaledAdamW, ScaledSGD, param_groups
from lora_ga.experiments.optim.algebra import gram, inverse_root, orthonormal_product, sign_factor, top_eigenvalue
from lora_ga.experiments.optim.rules import msign
from lora_ga.layers.factors import Factor
from lora_ga.layers.kinds import entries
from lora_ga.layers.targets import find_targets
from toys import adapted, bert, causal, classified, llama
from trainers import TARGETS, callback, settings, tokenised
from workers import stepped_by_pairs

LR, OUTPUTS, INPUTS, RANK = 0.1, 9, 13, 3
RULES: dict[str, Callable[..., PairOptimizer]] = {
    "ScaledSGD": functools.partial(ScaledSGD, momentum=0.7, damping=1e-12),
    "ScaledAdamW": functools.partial(ScaledAdamW, damping=1e-12),
    "LoRATSD": functools.partial(LoRATSD, iterations=3),
    "LoRATSD, no look-ahead": functools.partial(LoRATSD, nesterov=False),
    "LoRAMuon": LoRAMuon,
    "PoLoRA": PoLoRA,
    "LoRAPro": LoRAPro,
    "MomentumSGD": MomentumSGD,
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def polar(x: Tensor) -> Tensor:
    """U Vᵀ of the directions that x has."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    kept = s > 1e-9 * s[0]
    return u[:, kept] @ vh[kept]


def root(x: Tensor) -> Tensor:
    """The symmetric inverse square root."""
    values, vectors = torch.linalg.eigh(x)
    return vectors * values.rsqrt() @ vectors.mT


def groups_of(a: Tensor, b: Tensor) -> list[dict[str, Any]]:
    return [{"params": [nn.Parameter(a.clone()), nn.Parameter(b.clone())], "layout": "rows", "parts": 1}]


def optimizer_of(rule: str, a: Tensor, b: Tensor, **options: Any) -> PairOptimizer:
    return RULES[rule](groups_of(a, b), lr=LR, **options)


def gradients(a: Tensor, b: Tensor, step: int) -> Tensor:
    """The gradient of the loss by the product."""
    return b @ a - random(OUTPUTS, INPUTS, seed=90) + 0.3 * random(OUTPUTS, INPUTS, seed=50 + step)


def walked(optimizer: PairOptimizer, steps: int = 4) -> tuple[Tensor, Tensor]:
    a, b = optimizer.param_groups[0]["params"]
    for step in range(steps):
        g = gradients(a.detach(), b.detach(), step)
        a.grad, b.grad = b.detach().mT @ g, g @ a.detach().mT
        optimizer.step()
    return a.detach(), b.detach()


def averages(beta: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    held: list[Tensor] = []

    def average(by_a: Tensor, by_b: Tensor) -> tuple[Tensor, Tensor]:
        old = held or [torch.zeros_like(by_a), torch.zeros_like(by_b)]
        held[:] = [beta * m + (1 - beta) * g for m, g in zip(old, (by_a, by_b), strict=True)]
        return held[0], held[1]

    return average


# --- each rule as a formula of dense matrices: (A, B, G, step) → (ΔA, ΔB) --------------------------------------------
Formula = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def scaled_sgd() -> Formula:
    """The averages are kept as changes of the product, B M_A and M_B A, and solved for the factors of each step."""
    held: list[Tensor] = []

    def formula(a: Tensor, b: Tensor, g: Tensor, step: int) -> tuple[Tensor, Tensor]:
        old = held or [torch.zeros_like(g)] * 2
        by_a = 0.7 * torch.linalg.pinv(b) @ old[0] + 0.3 * torch.linalg.inv(b.mT @ b) @ b.mT @ g
        by_b = 0.7 * old[1] @ torch.linalg.pinv(a) + 0.3 * g @ a.mT @ torch.linalg.inv(a @ a.mT)
        held[:] = [b @ by_a, by_b @ a]
        rate = -LR / (1 - 0.7 ** (step + 1))
        return rate * by_a, rate * by_b

    return formula


def scaled_adamw() -> Formula:
    first: list[Tensor] = []
    second = [torch.zeros(RANK, INPUTS).double(), torch.zeros(OUTPUTS, RANK).double()]

    def formula(a: Tensor, b: Tensor, g: Tensor, step: int) -> tuple[Tensor, Tensor]:
        scaled = torch.linalg.inv(b.mT @ b) @ b.mT @ g, g @ a.mT @ torch.linalg.inv(a @ a.mT)
        old = (torch.linalg.pinv(b) @ first[0], first[1] @ torch.linalg.pinv(a)) if first else (0.0, 0.0)
        m = [0.9 * o + 0.1 * s for o, s in zip(old, scaled, strict=True)]
        second[:] = [0.999 * v + 0.001 * s**2 for v, s in zip(second, scaled, strict=True)]
        first[:] = [b @ m[0], m[1] @ a]
        steps = [
            -LR * each / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            for each, v in zip(m, second, strict=True)
        ]
        return steps[0], steps[1]

    return formula


def lora_tsd(iterations: int = 3, *, nesterov: bool = True) -> Formula:
    average = averages(0.95)

    def formula(a: Tensor, b: Tensor, g: Tensor, step: int) -> tuple[Tensor, Tensor]:
        by_a, by_b = average(b.mT @ g, g @ a.mT)
        if nesterov:
            by_a, by_b = 0.95 * by_a + 0.05 * b.mT @ g, 0.95 * by_b + 0.05 * g @ a.mT
        rows, columns = torch.linalg.pinv(a) @ a, b @ torch.linalg.pinv(b)
        inverse_a, inverse_b = torch.linalg.inv(a @ a.mT), torch.linalg.inv(b.mT @ b)
        x = b @ inverse_b @ by_a @ (torch.eye(INPUTS).double() - rows) + by_b @ inverse_a @ a
        for _ in range(iterations):
            x = polar(x)
            x = columns @ x + x @ rows - columns @ x @ rows
        change = -LR * x
        delta_b = change @ a.mT @ inverse_a
        return inverse_b @ b.mT @ (change - delta_b @ a), delta_b

    return formula


def lora_muon() -> Formula:
    average = averages(0.9)

    def formula(a: Tensor, b: Tensor, g: Tensor, step: int) -> tuple[Tensor, Tensor]:
        by_a, by_b = average(b.mT @ g, g @ a.mT)
        root_a, root_b = root(a @ a.mT), root(b.mT @ b)
        return -LR / 2 * root_b @ polar(root_b @ by_a), -LR / 2 * polar(by_b @ root_a) @ root_a

    return formula


def polora(damping: float = 1e-4) -> Formula:
    average, curvatures = averages(0.9), [torch.zeros(INPUTS).double(), torch.zeros(OUTPUTS).double()]

    def formula(a: Tensor, b: Tensor, g: Tensor, step: int) -> tuple[Tensor, Tensor]:
        by_a, by_b = average(b.mT @ g, g @ a.mT)
        by_a, by_b = 0.9 * by_a + 0.1 * b.mT @ g, 0.9 * by_b + 0.1 * g @ a.mT
        q, p = (torch.diag((c / c.max() if step else torch.ones_like(c)) + damping) for c in curvatures)
        c_a, c_b = a @ q @ a.mT, b.mT @ p @ b
        c_a, c_b = (c + damping * torch.linalg.eigvalsh(c)[-1] * torch.eye(RANK).double() for c in (c_a, c_b))
        steps = (
            root(c_b) @ polar(root(c_b) @ by_a @ root(q)) @ root(q),
            root(p) @ polar(root(p) @ by_b @ root(c_a)) @ root(c_a),
        )
        rho = LR / (torch.linalg.matrix_norm(a, 2) + torch.linalg.matrix_norm(b, 2))
        curvatures[0] = 0.99 * curvatures[0] + 0.01 / RANK * (g.mT @ b @ torch.linalg.inv(c_b) @ b.mT @ g).diag()
        curvatures[1] = 0.99 * curvatures[1] + 0.01 / RANK * (g @ a.mT @ torch.linalg.inv(c_a) @ a @ g.mT).diag()
        return -rho * steps[0] / torch.linalg.matrix_norm(steps[0], 2), -rho * steps[1] / torch.linalg.matrix_norm(
            steps[1], 2
        )

    return formula


def lora_pro(scaling: float = 1.7) -> Formula:
    """The paper's algorithm with its scaling s; the loss is one of s·BA, and the rate one of the whole weight."""
    held = [torch.zeros(OUTPUTS, INPUTS).double()] * 2

    def adjusted(a: Tensor, b: Tensor, by_weight: Tensor) -> tuple[Tensor, Tensor]:
        """The changes g_A, g_B of least distance to LoRA's gradients with s(B g_A + g_B A) closest to the weight's."""
        by_a, by_b = scaling * b.mT @ by_weight, scaling * by_weight @ a.mT
        inverse_a, inverse_b = torch.linalg.inv(a @ a.mT), torch.linalg.inv(b.mT @ b)
        eye = torch.eye(RANK).double()
        sylvester = torch.kron(b.mT @ b, eye) + torch.kron(eye, a @ a.mT)  # of the rows of X, one after another
        wanted = -inverse_b @ by_a @ a.mT / scaling**2
        x = torch.linalg.solve(sylvester, wanted.flatten()).view(RANK, RANK)
        projector = torch.eye(OUTPUTS).double() - b @ inverse_b @ b.mT
        return inverse_b @ by_a / scaling**2 + x @ a, projector @ by_b @ inverse_a / scaling**2 - b @ x

    def formula(a: Tensor, b: Tensor, g: Tensor, step: int) -> tuple[Tensor, Tensor]:
        g_a, g_b = adjusted(a, b, g / scaling)
        equivalent = scaling * (b @ g_a + g_b @ a)
        held[:] = 0.9 * held[0] + 0.1 * equivalent, 0.999 * held[1] + 0.001 * equivalent**2
        adam = held[0] / (1 - 0.9 ** (step + 1)) / ((held[1] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8 / scaling)
        g_a, g_b = adjusted(a, b, adam)
        return -LR * scaling * g_a, -LR * scaling * g_b

    return formula


def momentum_sgd() -> Formula:
    held: list[Tensor] = []

    def formula(a: Tensor, b: Tensor, g: Tensor, step: int) -> tuple[Tensor, Tensor]:
        old = held or [torch.zeros_like(a), torch.zeros_like(b)]
        held[:] = [0.9 * old[0] + b.mT @ g, 0.9 * old[1] + g @ a.mT]
        return -LR * held[0], -LR * held[1]

    return formula


FORMULAS: dict[str, tuple[Callable[[], Formula], float]] = {
    "ScaledSGD": (scaled_sgd, 1e-9),
    "ScaledAdamW": (scaled_adamw, 1e-9),
    "LoRATSD": (lora_tsd, 1e-8),
    "LoRATSD, no look-ahead": (functools.partial(lora_tsd, 1, nesterov=False), 1e-8),
    "LoRAMuon": (lora_muon, 1e-8),
    "PoLoRA": (polora, 2e-3),  # of the bound of `spectral_norm`
    "LoRAPro": (lora_pro, 1e-9),
    "MomentumSGD": (momentum_sgd, 1e-9),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_takes_the_steps_of_its_formula(rule: str) -> None:
    a, b = random(RANK, INPUTS), random(OUTPUTS, RANK, seed=1)
    reached = walked(optimizer_of(rule, a, b))
    make, tolerance = FORMULAS[rule]
    formula, start = make(), (a, b)
    for step in range(4):
        changes = formula(a, b, gradients(a, b, step), step)
        a, b = a + changes[0], b + changes[1]
    for got, wanted, before in zip(reached, (a, b), start, strict=True):
        assert (got - wanted).norm() <= tolerance * (wanted - before).norm()


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in {"ScaledAdamW", "LoRAPro", "MomentumSGD"}])
def test_the_path_of_the_product_does_not_depend_on_how_it_is_factored(rule: str) -> None:
    """Of PoLoRA: on how the factors are rotated."""
    a, b, mix = random(RANK, INPUTS), random(OUTPUTS, RANK, seed=1), random(RANK, RANK, seed=2)
    mix = torch.linalg.qr(mix).Q if rule == "PoLoRA" else mix
    one, other = (walked(optimizer_of(rule, *pair)) for pair in ((a, b), (mix @ a, b @ torch.linalg.inv(mix))))
    assert not torch.allclose(one[0], other[0])
    torch.testing.assert_close(one[1] @ one[0], other[1] @ other[0], rtol=1e-6, atol=1e-7)


def orthonormal() -> tuple[Tensor, Tensor]:
    return torch.linalg.qr(random(INPUTS, RANK)).Q.mT, torch.linalg.qr(random(OUTPUTS, RANK, seed=1)).Q


def test_with_orthonormal_factors_the_preconditioner_leaves_sgd() -> None:
    a, b = orthonormal()
    g = gradients(a, b, 0)
    reached = walked(ScaledSGD(groups_of(a, b), lr=LR, momentum=0.0, damping=0.0), steps=1)
    torch.testing.assert_close(reached, (a - LR * b.mT @ g, b - LR * g @ a.mT))


def test_without_msign_the_tangent_step_is_the_projected_gradients() -> None:
    a, b = random(RANK, INPUTS), random(OUTPUTS, RANK, seed=1)
    optimizer = LoRATSD(groups_of(a, b), lr=1e-6, momentum=0.0, iterations=0)
    reached, g = walked(optimizer, steps=1), gradients(a, b, 0)
    rows, columns = torch.linalg.pinv(a) @ a, b @ torch.linalg.pinv(b)
    wanted = columns @ g + g @ rows - columns @ g @ rows
    torch.testing.assert_close((b @ a - reached[1] @ reached[0]) / 1e-6, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rule", "size"), [("LoRAMuon", LR / 2), ("PoLoRA", LR / 2)])
def test_at_rank_1_with_unit_factors_a_spectral_rule_is_sgd_of_constant_length(rule: str, size: float) -> None:
    a, b = (side / side.norm() for side in (random(1, INPUTS), random(OUTPUTS, 1, seed=1)))
    g = gradients(a, b, 0)
    reached = walked(optimizer_of(rule, a, b), steps=1)
    for got, before, gradient in zip(reached, (a, b), (b.mT @ g, g @ a.mT), strict=True):
        torch.testing.assert_close(got, before - size * gradient / gradient.norm(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rule", ["LoRATSD", "LoRAMuon", "PoLoRA"])
def test_a_spectral_step_moves_the_product_by_its_rate_and_no_more(rule: str) -> None:
    a, b = orthonormal()
    reached = walked(optimizer_of(rule, a, b), steps=1)
    moved = torch.linalg.matrix_norm((reached[1] - b) @ a + b @ (reached[0] - a), 2)
    assert 0.4 * LR < moved <= (1.5 if rule == "LoRATSD" else 1 + 1e-6) * LR


@pytest.mark.parametrize(
    ("inputs", "outputs", "rows", "plain"), [(6, 6, 64, False), (16, 2, 64, True), (32, 32, 4, True)]
)
@pytest.mark.parametrize("rule", ["LoRATSD", "LoRAMuon", "PoLoRA"])
def test_the_steps_stay_bounded_where_the_factors_lack_directions(
    rule: str, inputs: int, outputs: int, rows: int, plain: bool
) -> None:
    """The rank exceeds a side of the layer, or plain LoRA's B has seen fewer rows than the rank."""
    a, b = random(8, inputs).float() / 3, random(outputs, 8, seed=1).float() / 3 * (not plain)
    target, optimizer = random(outputs, inputs, seed=2).float(), RULES[rule](groups_of(a, b), lr=0.05)
    a, b = optimizer.param_groups[0]["params"]
    errors = [(target - b @ a).norm().item()]
    for step in range(20):
        x, before = random(rows, inputs, seed=9 + step).float(), (b @ a).detach()
        a.grad = b.grad = None
        ((b @ a - target) @ x.mT).square().mean().backward()
        optimizer.step()
        assert torch.linalg.matrix_norm((b @ a).detach() - before, 2) < 12 * 0.05
        errors.append((target - b @ a).norm().item())
    assert errors[-1] < errors[0]


# --- the algebra -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 40), (6, 6), (1, 7), (6, 4)])
def test_msign_is_the_polar_factor(shape: tuple[int, int]) -> None:
    x = torch.stack([random(*shape), 1e6 * random(*shape, seed=1)])
    wanted = torch.stack([polar(each) for each in x])
    single = 1e-5 if shape[0] <= shape[1] else 1e-3  # rows that depend on each other show the rounding of float32
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, single)):
        rows, columns = msign(x.to(dtype), 3 * x.mT.to(dtype))
        torch.testing.assert_close(rows.double(), wanted, rtol=0, atol=tolerance)
        torch.testing.assert_close(columns.double(), wanted.mT, rtol=0, atol=tolerance)
    assert not sign_factor(torch.zeros(2, *shape[:1] * 2)).isnan().any()
    assert not msign(torch.zeros(1, *shape), torch.zeros(1, *shape[::-1]))[0].any()


def test_the_polar_factor_of_a_product_comes_in_factors() -> None:
    left, right = random(2, 9, 4), random(2, 4, 11, seed=1)
    first, second = orthonormal_product(left, right)
    torch.testing.assert_close(first @ second, torch.stack([polar(each) for each in left @ right]), rtol=0, atol=1e-9)


def test_the_top_eigenvalue_is_never_below_the_true_one_nor_far_above() -> None:
    x = torch.stack([random(6, 30), torch.eye(6, 30).double(), torch.zeros(6, 30).double(), 1e-8 * random(6, 30)])
    found, wanted = top_eigenvalue(gram(x)).flatten(), torch.linalg.matrix_norm(x, 2).square()
    assert (found >= wanted * (1 - 1e-12)).all()
    assert (found <= wanted * 1.001 + 1e-100).all()


def test_the_inverse_root_of_nearly_dependent_rows_stays_finite_and_that_of_zero_is_zero() -> None:
    x = torch.stack([torch.ones(3, 8), torch.zeros(3, 8), random(3, 8).float()])
    found = inverse_root(gram(x))
    assert found.isfinite().all()
    assert not found[1].any()
    torch.testing.assert_close(found[2] @ gram(x)[2] @ found[2].mT, torch.eye(3).double(), rtol=0, atol=1e-9)


# --- what they find in a model ---------------------------------------------------------------------------------------


def started(offset: str = "adapter", model: Any = None) -> Any:
    model = adapted(llama(num_hidden_layers=1), ["q_proj", "up_proj"]) if model is None else model
    lora_ga.initialize(model, causal(1), LoraGAConfig(offset=offset))
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, batches: Any = None) -> list[Tensor]:
    """Take steps, and return the values of A and B of all layers."""
    batch = (batches or causal(1))[0]
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [factor.start + factor.delta().detach() for factor in model.modules() if isinstance(factor, Factor)]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_takes_the_same_path_with_both_offsets_also_if_it_was_made_before_the_start(rule: str) -> None:
    early = adapted(llama(num_hidden_layers=1), ["q_proj", "up_proj"])
    rate = 3.0 if rule == "MomentumSGD" else 0.03
    optimizer = RULES[rule](param_groups(early), lr=rate)
    base, copied = started("base"), copy.deepcopy(started())
    begun = [factor.start for factor in copied.modules() if isinstance(factor, Factor)]
    wanted = train(base, RULES[rule](param_groups(base), lr=rate))
    for reached in (train(started(model=early), optimizer), train(copied, RULES[rule](param_groups(copied), lr=rate))):
        for got, end, before in zip(reached, wanted, begun, strict=True):
            assert (end - before).abs().max() > 1e-3
            torch.testing.assert_close(got, end, rtol=0, atol=2e-3 * (end - before).abs().max().item())


@pytest.mark.parametrize("rule", RULES)
def test_plain_lora_trains_from_b_of_zero(rule: str) -> None:
    model, batch = adapted(llama(num_hidden_layers=1), ["up_proj", "down_proj"]), causal(1)[0]
    optimizer = {**RULES, "ScaledSGD": ScaledSGD}[rule](param_groups(model), lr=0.03)
    before = model(**batch).loss.item()
    train(model, optimizer, steps=8)
    assert model(**batch).loss.item() < before - 1e-3
    assert all(p.isfinite().all() for p in model.parameters())


def test_other_parameters_get_adamw_and_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model, batches = adapted(bert(), ["query"], task_type="SEQ_CLS"), classified(1)
    twin = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING):
        groups = param_groups(model)
        optimizer = PoLoRA(groups, lr=0.0, other_lr=1e-2, weight_decay=0.1)
        train(model, optimizer, batches=batches)
    (record,) = caplog.records
    assert "AdamW steps the parameters that belong to no pair of factors: " in record.message
    assert "classifier.modules_to_save.default.weight" in record.message
    head, of_twin = ([p for n, p in m.named_parameters() if "modules_to_save" in n] for m in (model, twin))
    train(twin, torch.optim.AdamW(of_twin, lr=1e-2, weight_decay=0.1), batches=batches)
    assert len(head) == 2
    torch.testing.assert_close(head, of_twin, rtol=1e-5, atol=1e-7)


KINDS = ["nn.Embedding", "nn.Conv1d", "nn.Conv2d", "fused experts (Mixtral)"]


def parts(target: Any, of: Callable[[Factor], Tensor]) -> tuple[Tensor, Tensor]:
    """What a function gives for A and for B of a layer, part by part."""
    a, b = (of(entry) for entry in entries(target.layer, "default"))
    return target.layout.unstack_a(a, target.parts).double(), target.layout.unstack_b(b, target.parts).double()


def gradient(factor: Factor) -> Tensor:
    assert factor.trainable.grad is not None
    return factor.trainable.grad


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_a_layer_takes_its_own_step(kind: str) -> None:
    case = LAYERS[kind]
    model, batches = adapted(case.make(), None, **case.settings), case.batches()
    lora_ga.initialize(model, batches, LoraGAConfig(on_missing="lora"))
    check_parts(model, lambda: model(**batches[0]).loss)


def check_parts(model: Any, loss: Callable[[], Tensor]) -> None:
    optimizer = ScaledSGD(param_groups(model), lr=0.1, momentum=0.0)
    loss().backward()
    optimizer.step()
    for target in find_targets(model, fresh=False).values():
        a, b = parts(target, lambda factor: factor.start)
        by_a, by_b = parts(target, gradient)
        moved_a, moved_b = parts(target, lambda factor: factor.trainable.detach())
        alive = b.flatten(1).any(dim=1)  # experts without a token start with B = 0
        assert alive.any()
        wanted_a = -0.1 * torch.linalg.solve(b[alive].mT @ b[alive], by_a[alive])
        torch.testing.assert_close(moved_a[alive], wanted_a, rtol=1e-3, atol=1e-5 * wanted_a.abs().max().item())
        wanted_b = -0.1 * torch.linalg.solve(a @ a.mT, by_b.mT).mT
        torch.testing.assert_close(moved_b, wanted_b, rtol=1e-3, atol=1e-5 * wanted_b.abs().max().item())


def test_the_magnitudes_of_dora_get_adamw_and_its_factors_the_rule(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(llama(num_hidden_layers=1), ["q_proj"], use_dora=True)
    lora_ga.initialize(model, causal(1))
    check_parts(model, lambda: model(**causal(1)[0]).loss)
    assert any("lora_magnitude_vector" in record.message for record in caplog.records)


def test_what_cannot_be_stepped_in_pairs_is_refused_by_name() -> None:
    model = adapted(llama(num_hidden_layers=1), ["q_proj"])
    with pytest.raises(ValueError, match=r"PoLoRA steps A and B in pairs.*experiments.optim.param_groups\(model\)"):
        PoLoRA(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="LoRAMuon: lr is -1; it must be a finite number, at least 0"):
        LoRAMuon(param_groups(model), lr=-1)
    with pytest.raises(ValueError, match="ScaledSGD: momentum is 1.0; averages need numbers of at least 0 and below 1"):
        ScaledSGD(param_groups(model), lr=0.1, momentum=1.0)
    with pytest.raises(ValueError, match=r"PoLoRA: betas is \(0.9, 1.5\); averages need"):
        PoLoRA(param_groups(model), lr=0.1, betas=(0.9, 1.5))
    with pytest.raises(ValueError, match="LoRATSD: iterations is -1; it must be a finite number, at least 0"):
        LoRATSD(param_groups(model), lr=0.1, iterations=-1)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"q_proj trains one factor only \(lora_A is frozen\)"):
        param_groups(model)
    layer.lora_B["default"].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="No factor of adapter 'default' trains. Call model.set_adapter"):
        param_groups(model)
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    wrapped = get_peft_model(attention, LoraConfig(r=2, target_modules=["attention"]))
    with pytest.raises(ValueError, match="attention is a MultiheadAttention .*known are Linear"):
        param_groups(wrapped)


def test_factors_that_are_spread_over_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(llama(num_hidden_layers=1), ["q_proj"])
    optimizer = PoLoRA(param_groups(model), lr=0.1)
    monkeypatch.setattr("lora_ga.experiments.optim.pairs.sharded", lambda parameter: True)
    with pytest.raises(ValueError, match=r"q_proj has factors that are spread over processes .*use torch.optim.AdamW"):
        param_groups(model)
    with pytest.raises(ValueError, match="PoLoRA was made for pairs of factors, but now holds factors that are spread"):
        optimizer.step()


def test_a_pair_with_one_gradient_is_refused_by_name() -> None:
    model = adapted(llama(num_hidden_layers=1), ["q_proj"])
    optimizer = PoLoRA(param_groups(model), lr=0.1)
    optimizer.param_groups[0]["params"][0].grad = torch.ones_like(optimizer.param_groups[0]["params"][0])
    with pytest.raises(ValueError, match="q_proj: one of its factors has a gradient, the other has none. PoLoRA steps"):
        optimizer.step()


# --- gradients and state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    model = started()
    optimizer = LoRATSD(param_groups(model), lr=0.1)
    model(**causal(1)[0]).loss.backward()
    next(p for n, p in model.named_parameters() if "up_proj.lora_B" in n).grad[0, 0] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match=r"LoRATSD: the gradient of \S*up_proj is not finite. No parameter"):
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not optimizer.state


def test_a_gradient_that_is_not_finite_in_a_head_changes_nothing_either() -> None:
    a, b, head = (nn.Parameter(random(*shape)) for shape in ((2, 5), (4, 2), (3,)))
    optimizer = PoLoRA([{"params": [a, b], "layout": "rows"}, {"params": [head], "names": ["score"]}], lr=0.1)
    a.grad, b.grad, head.grad = torch.ones_like(a), torch.ones_like(b), torch.full_like(head, math.inf)
    before = a.detach().clone()
    with pytest.raises(FloatingPointError, match="PoLoRA: the gradient of score is not finite"):
        optimizer.step()
    assert torch.equal(a, before)


def test_the_check_of_gradients_copies_none_and_takes_a_sum_that_overflows_for_finite() -> None:
    a, b, head = (nn.Parameter(random(*shape).float()) for shape in ((2, 5), (4, 2), (1000, 1000)))
    optimizer = PoLoRA([{"params": [a, b], "layout": "rows"}, {"params": [head]}], lr=0.1)
    head.grad = torch.full_like(head, 1e38)
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer._check_finite([], [])
    assert max(event.cpu_memory_usage for event in profile.events()) < head.numel()


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_of_zero_moves_nothing(rule: str, rank: int) -> None:
    a, b = random(rank, INPUTS), random(OUTPUTS, rank, seed=1)
    optimizer = optimizer_of(rule, a, b)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(optimizer.param_groups[0]["params"][0], a)
    reached = walked(optimizer, steps=2)
    assert all(each.isfinite().all() for each in reached)
    assert not torch.equal(reached[0], a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_a_run_resumes_bit_for_bit_with_its_state_in_float32(rule: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def made() -> tuple[list[nn.Parameter], PairOptimizer]:
        factors = [nn.Parameter(random(*shape).to(dtype)) for shape in [(2, 7), (5, 2), (2, 7), (5, 2), (3,)]]
        groups = [{"params": factors[:4], "layout": "rows"}, {"params": factors[4:]}]
        return factors, RULES[rule](groups, lr=0.05)

    def steps(parameters: list[nn.Parameter], optimizer: PairOptimizer, numbers: range) -> None:
        for number in numbers:
            for index, parameter in enumerate(parameters):
                parameter.grad = random(*parameter.shape, seed=10 * number + index).to(dtype)
            optimizer.step()

    whole, optimizer = made()
    steps(whole, optimizer, range(2))
    torch.save({"optimizer": optimizer.state_dict(), "parameters": whole}, tmp_path / "state.pt")
    steps(whole, optimizer, range(2, 4))
    resumed, again = made()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    for parameter, value in zip(resumed, saved["parameters"], strict=True):
        parameter.data.copy_(value.data)
    again.load_state_dict(saved["optimizer"])
    held = [value for state in again.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert {value.dtype for value in held} == {torch.float32}
    steps(resumed, again, range(2, 4))
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))


def test_the_state_of_another_rule_is_refused() -> None:
    a, b = random(RANK, INPUTS), random(OUTPUTS, RANK)
    other, own = optimizer_of("LoRAMuon", a, b), optimizer_of("LoRATSD", a, b)
    with pytest.raises(ValueError, match="The state is that of LoRAMuon, and this is LoRATSD. Resume with"):
        own.load_state_dict(other.state_dict())
    adamw = torch.optim.AdamW(own.param_groups[0]["params"])
    with pytest.raises(ValueError, match="The state is that of another optimizer, and this is LoRATSD"):
        own.load_state_dict(adamw.state_dict())


def test_a_group_that_is_added_to_a_copy_gets_adamw() -> None:
    optimizer = copy.deepcopy(optimizer_of("PoLoRA", random(2, 5), random(4, 2), other_lr=0.01))
    head = nn.Parameter(random(3))
    optimizer.add_param_group({"params": [head]})
    head.grad, before = torch.ones_like(head), head.detach().clone()
    optimizer.step()
    torch.testing.assert_close(head.detach(), before - 0.01)


def test_weight_decay_takes_its_share_of_the_parameters() -> None:
    a, b = random(RANK, INPUTS), random(OUTPUTS, RANK, seed=1)
    plain, decayed = (walked(optimizer_of("LoRAMuon", a, b, weight_decay=w), steps=1) for w in (0.0, 0.5))
    torch.testing.assert_close(decayed, (plain[0] - LR * 0.5 * a, plain[1] - LR * 0.5 * b))


# --- trainers and processes ------------------------------------------------------------------------------------------


def test_it_trains_resumes_and_accumulates_in_a_trainer_with_a_late_start(tmp_path: Path) -> None:
    def trainer(folder: str, **changes: Any) -> Trainer:
        model = adapted(llama(), TARGETS)
        optimizer = PoLoRA(param_groups(model), lr=0.05)
        arguments = TrainingArguments(
            **settings(tmp_path / folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, **changes)
        )
        return Trainer(
            model, arguments, train_dataset=tokenised(), callbacks=[callback()], optimizers=(optimizer, None)
        )

    whole = trainer("whole")
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    one, other = (
        {name: p for name, p in each.model.named_parameters() if p.requires_grad} for each in (whole, resumed)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_processes_with_ddp_take_the_steps_of_one_with_all_rows(tmp_path: Path) -> None:
    alone = stepped_by_pairs(0, 1, tmp_path)
    for found in processes.run(stepped_by_pairs, 2, tmp_path):
        for got, wanted in zip(found, alone, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
