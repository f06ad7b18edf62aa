"""Factors: the algebra of joined matrices, how a factor's parameter is stored, and what optimizers find in it."""

from __future__ import annotations

import contextlib
import copy
import functools
import linecache
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from transformers import Adafactor, Gemma3ForCausalLM, Gemma3TextConfig

import lora_ga
from lora_ga import LoraGAConfig
from lora_ga.distributed import sharding
from lora_ga.distributed.sharding import Storage, Zero3Storage, storage_of
from lora_ga.distributed.tensor_parallel import PlannedStorage, Split
from lora_ga.layers.embedding import EMBEDDING
from lora_ga.layers.factors import FACTORS, Delta, DeltaA, DeltaB, Factor
from lora_ga.layers.joined import JoinedA, JoinedB
from lora_ga.layers.optimizers import reads_values, starts_of
from lora_ga.linalg.accumulator import UnitRows
from lora_ga.linalg.low_rank import LowRank
from toys import VOCABULARY, adapted, autograd_gradients, causal, llama, logits, tokens

RANK, INPUTS, OUTPUTS = 4, 6, 5
Side = type[JoinedA] | type[JoinedB]
SHAPES: dict[Side, tuple[int, int]] = {JoinedA: (RANK, INPUTS), JoinedB: (OUTPUTS, RANK)}
KINDS = [kind for pair in FACTORS.values() for kind in pair]


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("side", [JoinedA, JoinedB])
def test_joined_matrices_can_be_split_again(side: Side, parts: int) -> None:
    algebra, start, delta = side(parts), random_tensor(*SHAPES[side]), random_tensor(*SHAPES[side], seed=1)
    joined = algebra.joined(start, delta)
    assert joined.shape[side.dim] == 2 * RANK
    assert torch.equal(algebra.delta_in(joined), delta)
    assert all(
        torch.equal(*pair) for pair in zip(algebra.halves(algebra.join(start, delta)), (start, delta), strict=True)
    )
    assert torch.equal(algebra.start_in(joined, start), start)
    torch.testing.assert_close(algebra.start_in(joined, torch.zeros_like(start)), start)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_product_of_joined_factors_is_the_change_of_the_product(parts: int) -> None:
    """The columns of B and the rows of A are joined within each part."""
    a0, da = (random_tensor(*SHAPES[JoinedA], seed=seed) for seed in (0, 1))
    b0, db = (random_tensor(*SHAPES[JoinedB], seed=seed) for seed in (2, 3))
    a_P2I = JoinedA(parts).joined(a0, da).unflatten(0, (parts, -1))
    for part in range(parts):
        rows = slice(part * RANK // parts, (part + 1) * RANK // parts)
        b_O2 = JoinedB().joined(b0[:, rows], db[:, rows])
        expected = (b0 + db)[:, rows] @ (a0 + da)[rows] - b0[:, rows] @ a0[rows]
        torch.testing.assert_close(b_O2 @ a_P2I[part], expected)


def test_agree_allows_for_the_rounding_of_the_file_and_no_more() -> None:
    algebra, start, delta = JoinedA(), random_tensor(RANK, INPUTS), 1e-3 * random_tensor(RANK, INPUTS, seed=1)
    joined = algebra.joined(start, delta)
    assert algebra.agree(joined, delta.abs(), joined.bfloat16().float())
    assert algebra.agree(joined, delta.abs(), joined * (1 + 1e-7))
    assert not algebra.agree(joined, delta.abs(), joined * (1 + 1e-4))


def factor(kind: type[Factor]) -> Factor:
    shape = (RANK, INPUTS) if kind.joining_class is JoinedA else (OUTPUTS, RANK)
    made = kind(random_tensor(*shape), nn.Parameter(torch.zeros(shape)))
    made.set_delta(random_tensor(*shape, seed=1))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_of_a_factor_is_the_matrix_whose_sizes_it_states(kind: type[Factor]) -> None:
    made = factor(kind)
    assert tuple(made.weight.shape) == (made.out_features, made.in_features)
    assert torch.equal(made.weight, made.joined() if kind.computes_joined else made.trainable)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_state_dicts_hold_the_same_values(kind: type[Factor]) -> None:
    made = factor(kind)
    twin = copy.deepcopy(made)
    assert twin.trainable is not made.trainable
    assert twin.start is not made.start
    assert list(made.state_dict()) == ["weight"]
    twin.set_delta(torch.zeros_like(made.start))
    with pytest.raises(RuntimeError, match='Missing key.*"weight"'):
        twin.load_state_dict({})
    twin.load_state_dict(made.state_dict())
    assert torch.equal(twin.joined(), made.joined())
    assert torch.equal(twin.start, made.start)


def test_a_narrower_dtype_rounds_the_parameter_but_not_the_start() -> None:
    made = factor(DeltaA)
    exact = made.start.clone()
    assert made.to(torch.bfloat16).trainable.dtype == torch.bfloat16
    assert torch.equal(made.float().start, exact)


def test_the_rows_of_a_scaled_embedding_give_the_gradient_of_its_weight() -> None:
    """Gemma's embeddings multiply their output by `embed_scale`."""
    base = nn.Embedding(7, 3, padding_idx=0)
    base.embed_scale = torch.tensor(2.5)
    ids, g = torch.tensor([[1, 4, 0], [4, 4, 6]]), random_tensor(2, 3, 3)
    ((base(ids) * base.embed_scale) * g).sum().backward()
    ((_, x_TI, g_TO),) = EMBEDDING.rows(SimpleNamespace(get_base_layer=lambda: base), ids, g)
    assert base.weight.grad is not None
    assert isinstance(x_TI, UnitRows)
    units = torch.nn.functional.one_hot(x_TI.places, x_TI.width).float()
    torch.testing.assert_close(g_TO.mT @ units, base.weight.grad.mT)


def test_a_trainable_part_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"The trainable part is \(2, 6\), its start \(4, 6\)"):
        DeltaA(random_tensor(RANK, INPUTS), nn.Parameter(torch.zeros(2, INPUTS)))


def test_the_part_of_a_plain_parameter_is_the_whole_tensor() -> None:
    storage = storage_of(nn.Parameter(torch.zeros(3, 2)))
    assert type(storage) is Storage
    assert not storage.spread
    assert torch.equal(storage.part_of(random_tensor(3, 2)), random_tensor(3, 2))


@pytest.mark.parametrize(("kind", "dim"), [(DeltaA, 1), (DeltaB, 0)])
def test_in_a_tensor_parallel_forward_pass_a_factor_joins_the_share_of_this_process(
    kind: type[Delta], dim: int
) -> None:
    made = factor(kind)
    shape, width = tuple(made.start.shape), made.start.shape[dim]
    made.split = Split((OUTPUTS, INPUTS), dim, 2, width - 2)
    assert type(made.storage) is Storage  # outside a forward pass
    share = made.trainable.detach().narrow(dim, 2, width - 2)
    whole = made.joined()
    made.register_parameter(made.trainable_name, nn.Parameter(share))  # as the hook of the plan does
    assert isinstance(made.storage, PlannedStorage)
    assert made.storage.spread
    assert torch.equal(made.joined(), whole.narrow(dim, 2, width - 2))
    assert tuple(made.start.shape) == shape


@pytest.fixture
def zero3_parameter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A parameter as ZeRO-3 leaves it: empty until it is gathered, with its shape in `ds_shape`."""
    values = torch.zeros(RANK, INPUTS)
    parameter: Any = nn.Parameter(torch.empty(0))
    parameter.ds_id, parameter.ds_shape, parameter.ds_numel = 0, values.shape, values.numel()
    parameter.writes = 0

    @contextlib.contextmanager
    def gathered(parameters: Any) -> Iterator[None]:
        (taken,) = parameters
        taken.data = values
        before = taken._version
        yield
        taken.writes += taken._version > before
        taken.data = torch.empty(0)

    monkeypatch.setattr(sharding, "gathered", gathered)
    parameter.values = values
    return parameter


def test_a_zero3_parameter_is_written_while_gathered_and_only_if_its_values_differ(zero3_parameter: Any) -> None:
    storage = storage_of(zero3_parameter)
    assert isinstance(storage, Zero3Storage)
    assert storage.spread
    made = DeltaA(random_tensor(RANK, INPUTS), zero3_parameter)
    made.set_delta(random_tensor(RANK, INPUTS, seed=1))
    assert torch.equal(zero3_parameter.values, random_tensor(RANK, INPUTS, seed=1))
    assert zero3_parameter.writes == 1
    made.set_delta(random_tensor(RANK, INPUTS, seed=1))
    assert zero3_parameter.writes == 1
    assert zero3_parameter.numel() == 0


def test_a_zero3_parameter_keeps_its_name_in_the_state_dict_so_that_deepspeed_gathers_it(zero3_parameter: Any) -> None:
    made = DeltaA(random_tensor(RANK, INPUTS), zero3_parameter)
    state = made.state_dict()
    assert list(state) == ["delta_weight", "start"]
    assert torch.equal(state["start"], made.start)


def test_a_zero3_factor_takes_the_start_of_its_state_dict(zero3_parameter: Any) -> None:
    made, other = (DeltaA(random_tensor(RANK, INPUTS, seed=seed), zero3_parameter) for seed in (0, 1))
    assert not torch.equal(made.start, other.start)
    assert other.load_state_dict(made.state_dict()) == ([], [])
    assert torch.equal(made.start, other.start)
    del (old := made.state_dict())["start"]  # of earlier versions: the sidecar has it
    assert other.load_state_dict(old) == ([], [])
    with pytest.raises(RuntimeError, match="Missing key.*weight"):
        other.load_state_dict({})


DENSE = LoraGAConfig(estimator="dense", oversample=64)
PADDING = 3


class Words(nn.Module):
    """Looks up its words, with padding whose gradient torch leaves out, and pools all of them."""

    def __init__(self, padding_idx: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 16, padding_idx=padding_idx)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.head(self.embed(input_ids).mean(1).tanh()), labels)}


def product(layer: LowRank) -> Tensor:
    return (layer.U * layer.S) @ layer.V.mT


@pytest.mark.parametrize("estimator", ["dense", "streaming"])
@pytest.mark.parametrize("padding_idx", [PADDING, PADDING - VOCABULARY, None])
def test_padding_adds_nothing_to_the_gradient_of_an_embedding(padding_idx: int | None, estimator: str) -> None:
    ids = [tokens(8, 10, seed) for seed in range(3)]
    for each in ids:
        each[:, 6:] = PADDING
    data = [{"input_ids": each, "labels": each[:, 0] % 3} for each in ids]
    base = Words(padding_idx)
    true = autograd_gradients(
        copy.deepcopy(base), lambda model: torch.stack([model(**batch)["loss"] for batch in data]).mean()
    )["embed"]
    found = lora_ga.estimate_gradients(
        adapted(base, ["embed"]), data, LoraGAConfig(estimator=estimator, oversample=64)
    )["embed"]
    assert (true[PADDING].norm() > 0) == (padding_idx is None)
    torch.testing.assert_close(product(found).mT, true, rtol=1e-4, atol=1e-7)
    assert found.norm == pytest.approx(true.norm().item(), rel=1e-4)


def gemma() -> Any:
    """A Gemma, whose embedding multiplies its output by √width."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return Gemma3ForCausalLM(config).eval()


def test_the_gradient_of_an_embedding_that_scales_its_output_is_autograds() -> None:
    base, data = gemma(), causal()
    assert float(base.model.embed_tokens.embed_scale) == 8.0
    true = autograd_gradients(
        copy.deepcopy(base), lambda model: torch.stack([model(**batch).loss for batch in data]).mean()
    )["model.embed_tokens"]
    found = lora_ga.estimate_gradients(adapted(base, ["embed_tokens"]), data, DENSE)["model.embed_tokens"]
    torch.testing.assert_close(product(found).mT, true, rtol=1e-4, atol=1e-6)
    assert found.norm == pytest.approx(true.norm().item(), rel=1e-5)


class PairOptimizer(Optimizer):
    """Divides each gradient by the Gram matrix of the other factor. It does not move if the factors are zero."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for a, b in zip(group["params"][::2], group["params"][1::2], strict=True):
                steps = torch.linalg.pinv(b.mT @ b) @ a.grad, b.grad @ torch.linalg.pinv(a @ a.mT)
                for parameter, step in zip((a, b), steps, strict=True):
                    parameter.sub_(step, alpha=group["lr"])


class LoRARite(PairOptimizer):
    """An optimizer of this name is in pytorch-optimizer."""


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def riemannian(model: Any) -> Any:
    """PEFT's Riemannian optimizer."""
    module = pytest.importorskip("peft.optimizers.riemannian", reason="PEFT has this optimizer since version 0.21")
    return module.create_riemannian_optimizer(model, SGD, lr=0.1)


READERS: dict[str, Callable[[Any], Any]] = {
    "LoRA-RITE": lambda model: LoRARite(trained_parameters(model)),
    "PEFT, Riemannian": riemannian,
    "PEFT, LoRA-FA": lambda model: create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.01),
    "torch, Adafactor": lambda model: torch.optim.Adafactor(trained_parameters(model), lr=0.1),
}


def started(offset: str) -> Any:
    model = adapted(llama(num_hidden_layers=1), ["q_proj"])
    lora_ga.initialize(model, causal(1), LoraGAConfig(offset=offset))
    return model


def factors_after(model: nn.Module, optimizer: Optimizer, steps: int = 3) -> list[Tensor]:
    """Train, and return the values of A and B."""
    for _ in range(steps):
        model(**causal(1)[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [factor.start + factor.delta().detach() for factor in model.modules() if isinstance(factor, Factor)]


@pytest.mark.parametrize("name", READERS)
def test_an_optimizer_that_reads_values_takes_the_same_path_with_both_offsets(name: str) -> None:
    base, model = started("base"), copy.deepcopy(started("adapter"))  # a copy is followed too
    begun = [factor.start for factor in model.modules() if isinstance(factor, Delta)]
    reached = factors_after(model, READERS[name](model))
    for got, wanted, before in zip(reached, factors_after(base, READERS[name](base)), begun, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3 * (wanted - before).abs().max().item() + 1e-7)
    assert (reached[1] - begun[1]).abs().max() > 1e-4
    assert not any(factor.holds_factor for factor in model.modules() if isinstance(factor, Delta))


def moved(make: Callable[[Any], Optimizer], start: Tensor) -> Tensor:
    """The way from a start in three steps with given gradients."""
    parameter = nn.Parameter(start.clone())
    optimizer = make([parameter])
    for step in range(3):
        parameter.grad = random_tensor(*start.shape, seed=step)
        optimizer.step(lambda: 1.0)
    return parameter.detach() - start


OPTIONS: dict[str, Any] = {"ASGD": {"lambd": 0.0}, "AdamW": {"weight_decay": 0.0}, "Muon": {"weight_decay": 0.0}}
KINDS_OF_TORCH: dict[str, Any] = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and name not in ("Optimizer", "SparseAdam")
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    **{name: functools.partial(kind, lr=0.01, **OPTIONS.get(name, {})) for name, kind in KINDS_OF_TORCH.items()},
    "Adafactor of Transformers": Adafactor,
    "Adafactor as the Trainer makes it": functools.partial(
        Adafactor, lr=0.01, scale_parameter=False, relative_step=False
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_table_says_of_every_optimizer_of_torch_and_transformers_whether_it_reads_values(name: str) -> None:
    make, start = OPTIMIZERS[name], random_tensor(4, 6, seed=9)
    same = torch.allclose(moved(make, start), moved(make, torch.zeros_like(start)), rtol=1e-3, atol=1e-6)
    assert reads_values(make([nn.Parameter(start)])) is (not same)


class InTheMiddle(torch.optim.Adafactor):
    """Calls a function in the middle of its step."""

    middle: Callable[[], None]

    def step(self, closure: Any = None) -> Any:
        self.middle()
        super().step()


def test_a_model_computes_and_saves_the_same_during_and_after_a_step_that_fails() -> None:
    model, batch = started("adapter"), causal(1)[0]
    factors_after(model, SGD(trained_parameters(model), lr=0.1))
    held = [factor for factor in model.modules() if isinstance(factor, Delta)]
    deltas = [factor.delta().detach().clone() for factor in held]
    before, saved = logits(model, batch), model.state_dict()
    found: list[Tensor] = []

    def fail() -> None:
        found.extend(factor.trainable.detach().clone() for factor in held)
        raise ArithmeticError

    optimizer = InTheMiddle(trained_parameters(model))
    optimizer.middle = fail
    with pytest.raises(ArithmeticError):
        optimizer.step()
    for factor, delta, value in zip(held, deltas, found, strict=True):
        assert torch.equal(value, factor.start + delta)
    assert starts_of([held[0].trainable]) == {}  # it holds A or B itself
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=1e-6)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, saved[name], rtol=0, atol=1e-6)
    optimizer.middle = lambda: None
    optimizer.step()  # without gradients
    assert starts_of([held[0].trainable]) == {id(held[0].trainable): held[0].start}
    for factor, delta in zip(held, deltas, strict=True):
        torch.testing.assert_close(factor.trainable.detach(), delta, rtol=0, atol=1e-6)


def test_an_optimizer_that_moves_nothing_is_reported_by_name() -> None:
    model = started("adapter")
    silent = PairOptimizer(trained_parameters(model), lr=0.0)  # a warm-up begins with zero
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factors_after(model, silent, steps=1)
        factors_after(copied := copy.deepcopy(model), SGD(trained_parameters(copied), lr=0.1), steps=1)
        still = PairOptimizer(parameters := trained_parameters(copied := copy.deepcopy(model)), lr=0.1)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        still.step()
    silent.param_groups[0]["lr"] = 0.1
    with pytest.warns(UserWarning, match='PairOptimizer has changed no parameter.*offset="base"') as warned:
        factors_after(model, silent, steps=1)
    (place,) = ((each.filename, each.lineno) for each in warned if "PairOptimizer" in str(each.message))
    assert linecache.getline(*place).strip() == "optimizer.step()"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factors_after(model, silent, steps=1)
    base = started("base")  # the advice works
    begun = [factor.start for factor in base.modules() if isinstance(factor, Factor)]
    reached = factors_after(base, PairOptimizer(trained_parameters(base)), steps=1)
    assert all(not torch.equal(value, start) for value, start in zip(reached, begun, strict=True))
