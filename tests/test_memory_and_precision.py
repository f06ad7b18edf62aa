"""The estimate allocates no gradient, does not wait for the device, and hardly depends on kernels and dtypes.

Also the streaming estimator in both dtypes of sums, from the first block on, and where directions are weak or missing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora_ga
from lora_ga import LoraGAConfig
from lora_ga.gradients.isolation import isolated
from lora_ga.layers.embedding import EMBEDDING
from lora_ga.layers.experts import EXPERTS
from lora_ga.layers.targets import find_targets
from lora_ga.linalg import streaming, tensor_cores
from lora_ga.linalg.accumulator import Size, all_finite, refuse_infinite
from lora_ga.linalg.dense import Dense
from lora_ga.linalg.low_rank import LowRank, gaussian
from lora_ga.linalg.streaming import FRESH, STACKED, Streaming
from lora_ga.linalg.subspace import STRIDE, first_directions, orthonormal
from toys import VOCABULARY, adapted, causal, classified, llama


class NewShapes(TorchDispatchMode):
    """Keeps the shapes of all new tensors. Views of other tensors are not new."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in given:
                self.shapes.add(tuple(each.shape))
        return result


Batches = list[dict[str, Any]]


class Reads(TorchDispatchMode):
    """Counts the operations for which the host needs a value from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        self.count += func.overloadpacket in {aten._local_scalar_dense, aten.nonzero, aten._unique2, aten.unique_dim}
        return func(*args, **(kwargs or {}))


# No batch, head or rank has these widths, so a shape with two of them is that of a gradient.
SIZES: dict[str, Any] = {
    "hidden_size": 92,
    "intermediate_size": 104,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize("settings", [{}, {"power_steps": 1}, {"tolerance": 0.5}, {"estimator": "dense"}])
def test_no_tensor_of_the_size_of_a_gradient_is_allocated(settings: dict[str, Any]) -> None:
    model = adapted(llama(**SIZES))
    forbidden = {(t.outputs, t.inputs) for t in find_targets(model).values()}
    assert len(forbidden) == 4
    forbidden |= {(inputs, outputs) for outputs, inputs in forbidden}
    with NewShapes() as new:
        lora_ga.estimate_gradients(model, causal(4, rows=3, length=7), LoraGAConfig(**settings))
    found = {shape for shape in new.shapes if shape[-2:] in forbidden}
    assert len(new.shapes) > 30
    assert bool(found) == (settings.get("estimator") == "dense")  # so the check can fail


def test_an_embedding_allocates_at_most_a_tenth_more_than_its_output_gradient() -> None:
    layer = SimpleNamespace(get_base_layer=lambda: nn.Embedding(600, 48, padding_idx=3))
    ids, g = torch.randint(0, 600, (4, 500)), torch.randn(4, 500, 48)
    for kind in (Streaming, Dense):
        accumulator = kind({"layer": Size(kept=12, used=4)}, 0, 0)
        with NewShapes() as new:
            ((_, x_TI, g_TO),) = EMBEDDING.rows(layer, ids, g)
            accumulator.add("layer", x_TI, g_TO, 1.0)
            accumulator.flush()
        assert g.numel() / 4 < max(math.prod(shape) for shape in new.shapes) <= 1.1 * g.numel()


def test_experts_allocate_less_than_half_a_gradient_of_an_expert_and_read_no_value() -> None:
    layer = SimpleNamespace(_did_swap_in_out_features=True)
    experts, outputs, inputs = 3, 400, 600
    accumulator = Streaming(dict.fromkeys("012", Size(kept=12, used=4)), 0, 0)
    g = torch.randn(experts, outputs, inputs)
    g[1] = 0  # no token reached it
    with NewShapes() as new, Reads() as reads:
        for part, x_TI, g_TO in EXPERTS.rows(layer, g, g):
            accumulator.add(str(part), x_TI, g_TO, 1.0)
        assert reads.count == 0
        accumulator.flush()
    assert max(math.prod(shape) for shape in new.shapes) < outputs * inputs / 2
    found = [*accumulator.factors(map(str, range(experts))).values()]
    assert [bool(each and each.norm > 0) for each in found] == [True, False, True]


def test_adding_blocks_does_not_wait_for_the_device_and_a_flush_waits_once() -> None:
    # These tensors have no values. Code that reads one, and so would wait for the device, raises an error.
    with FakeTensorMode():
        accumulator = Streaming(dict.fromkeys(map(str, range(STACKED + 1)), Size(kept=12, used=4)), 0, 0)
        for _ in range(2):
            for name in [*accumulator.sizes, "0"]:  # enough to truncate some before the flush; "0" runs twice
                accumulator.add(name, torch.randn(50, 40), torch.randn(50, 30), 2.0)
            with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
                accumulator.flush()
            assert not accumulator._waiting  # so all of the work was done before the value was read


def test_values_of_layers_on_two_gpus_are_read_together() -> None:
    # Reading one of these tensors, which have no values, comes after all that has to bring them to one device.
    with FakeTensorMode():
        sums = {f"layer {n}": torch.randn(5, 4, device=f"cuda:{n}") for n in range(2)}
        accumulator = Streaming({}, 0, 0)
        for name, each in sums.items():
            stream: Any = SimpleNamespace(before=(each, each, each), held=None, sketch=each)
            accumulator.streams[name] = stream
        moved = mock.patch("lora_ga.linalg.streaming.direction_change", lambda before, held: before[0].sum())
        for function in (
            accumulator.changes,
            lambda: refuse_infinite(sums),
            lambda: all_finite([each.sum() for each in sums.values()]),
        ):
            with moved, pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
                function()


class Kernels(TorchDispatchMode):
    """Counts the operations that compute or copy. Views of other tensors cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        made = {each.untyped_storage().data_ptr() for each in tree_leaves(result) if isinstance(each, Tensor)}
        self.count += not (made and made <= given) or func._schema.is_mutable
        return result


def beyond_the_frozen_pass(model: nn.Module, mode: type[Kernels] | type[Reads]) -> float:
    """How many operations of a kind the estimate adds to a batch of frozen passes."""

    def frozen(batches: Batches) -> None:
        hook = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())  # type: ignore[operator]
        with isolated(model, "default"):
            for batch in batches:
                model(**batch).loss.backward()
        hook.remove()

    def counted(work: Callable[[Batches], Any], batches: int) -> int:
        # The number of labels is given, so that it is not counted.
        made: Batches = [{**batch, "num_items_in_batch": 18} for batch in causal(batches, rows=3, length=7)]
        with mode() as found:
            work(made)
        return found.count

    ways = (functools.partial(lora_ga.estimate_gradients, model), frozen)
    # From two batches on every layer has K directions; the others cost more at the end.
    estimate, passes = (counted(way, 5) - counted(way, 2) for way in ways)
    return (estimate - passes) / 3


def test_a_layer_and_batch_cost_at_most_twelve_operations_beyond_the_frozen_pass() -> None:
    model = adapted(llama(num_hidden_layers=6, **SIZES))
    assert 4 < beyond_the_frozen_pass(model, Kernels) / len(find_targets(model)) <= 12


@pytest.mark.parametrize(("large", "more"), [(tensor_cores.LARGE, 2), (0, 7)], ids=["small blocks", "large blocks"])
def test_half_precision_on_cuda_costs_two_operations_more_and_large_blocks_seven(
    large: int, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two change the dtype of x and g, and five are for products in TF32."""
    monkeypatch.setattr(streaming, "exact_in_tf32", lambda g: g.dtype == torch.bfloat16)
    monkeypatch.setattr(tensor_cores, "LARGE", large)
    models = [adapted(llama(num_hidden_layers=6, **SIZES).to(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    whole, half = (beyond_the_frozen_pass(model, Kernels) / len(find_targets(model)) for model in models)
    assert half - whole == pytest.approx(more, abs=0.1)
    assert half <= 12 or large == 0


def test_the_host_waits_for_one_value_a_batch() -> None:
    assert beyond_the_frozen_pass(adapted(llama(**SIZES)), Reads) == 1


def relative_error(one: Any, other: Any) -> float:
    """The largest relative difference of a layer's matrix between two estimates."""
    errors = []
    for name in one:
        a, b = ((e[name].U[:, :8] * e[name].S[:8]) @ e[name].V[:, :8].mT for e in (one, other))
        errors.append(((a - b).norm() / a.norm()).item())
    return max(errors)


def test_eager_attention_gives_the_factors_of_sdpa() -> None:
    found = [
        lora_ga.estimate_gradients(adapted(llama(attn_implementation=kind)), causal(4)) for kind in ("sdpa", "eager")
    ]
    assert relative_error(*found) < 1e-3
    assert found[0]["model.layers.0.self_attn.q_proj"].norm > 0


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_autocast_gives_the_factors_of_float32_within_its_rounding(dtype: torch.dtype, error: float) -> None:
    model, batches = adapted(llama()), causal(4)
    with torch.autocast("cpu", dtype=dtype):
        rounded = lora_ga.estimate_gradients(model, batches)
    assert {part.U.dtype for part in rounded.values()} == {torch.float32}
    assert 0 < relative_error(lora_ga.estimate_gradients(model, batches), rounded) < error


def test_float16_models_give_the_factors_of_float32_even_for_tiny_gradients() -> None:
    def small(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        # A mean over very many terms: unless the loss is scaled, its gradients vanish in float16.
        return model(**batch).loss.float() * 2.0**-14, 2.0**14

    exact = lora_ga.estimate_gradients(adapted(llama()), causal(4), loss_fn=small)
    half = lora_ga.estimate_gradients(adapted(llama().half()), causal(4), loss_fn=small)
    assert 0 < relative_error(exact, half) < 0.05


# --- the streaming estimator in both dtypes of sums ------------------------------------------------------------------

INPUTS, OUTPUTS = 64, 48


def rotation(size: int, columns: int, seed: int) -> Tensor:
    drawn = torch.randn(size, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q


def blocks(s: Tensor, count: int, dtype: torch.dtype = torch.float64, tokens: int = 256) -> list[tuple[Tensor, Tensor]]:
    """Blocks of tokens, each of which has the gradient `U diag(s) Vᵀ`."""
    u, v = rotation(OUTPUTS, len(s), 1), rotation(INPUTS, len(s), 2)
    mixed = [rotation(tokens, len(s), 3 + index) for index in range(count)]
    return [((c @ (v * s.sqrt()).mT).to(dtype), (c @ (u * s.sqrt()).mT).to(dtype)) for c in mixed]


def found(accumulator: Dense | Streaming, parts: list[tuple[Tensor, Tensor]], name: str = "layer") -> LowRank:
    for x, g in parts:
        accumulator.add(name, x, g, 1.0)
        accumulator.flush()
    factors = accumulator.factors([name])[name]
    assert factors is not None
    return factors


# Dtypes


def test_layers_of_one_width_may_have_sums_in_float32_and_in_float64() -> None:
    s = 0.7 ** torch.arange(OUTPUTS, dtype=torch.float64)
    sizes = {"half": Size(20, 8), "whole": Size(20, 8)}
    for order in (("half", "whole"), ("whole", "half")):
        dtypes = {"half": torch.bfloat16, "whole": torch.float64}
        both = Streaming(sizes, 0, 0)
        for name in order:
            mixed = found(both, blocks(s, 3, dtypes[name]), name)
            alone = found(Streaming(sizes, 0, 0), blocks(s, 3, dtypes[name]), name)
            assert mixed.S.dtype == (torch.float32 if name == "half" else torch.float64)
            assert torch.equal(mixed.S, alone.S)
            assert torch.equal(mixed.V, alone.V)


class TwoDtypes(nn.Module):
    """A classifier with one layer in float32 and one of the same width in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first, self.second = nn.Embedding(VOCABULARY, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.double()

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.first(self.embed(input_ids)).relu().mean(1)
        return {"loss": nn.functional.cross_entropy(self.second(x.double()), labels)}


def test_a_model_of_two_dtypes_is_estimated_as_by_the_dense_sums() -> None:
    model = adapted(TwoDtypes(), ["first", "second"], r=1)
    streaming, dense = (
        lora_ga.estimate_gradients(model, classified(), LoraGAConfig(estimator=kind)) for kind in ("streaming", "dense")
    )
    for name, dtype in (("first", torch.float32), ("second", torch.float64)):
        assert streaming[name].S.dtype == dtype
        torch.testing.assert_close(streaming[name].S[:2], dense[name].S[:2], rtol=1e-2, atol=0)


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("decay", [0.3, 0.2, 0.12])  # σ₁₆/σ₁ of 1.4e-8, 3e-11 and 1.5e-14
def test_in_float64_weak_directions_are_those_of_the_dense_estimator(decay: float, count: int) -> None:
    s = decay ** torch.arange(OUTPUTS, dtype=torch.float64)
    streaming, dense = (found(kind({"layer": Size(32, 16)}, 0, 0), blocks(s, count)) for kind in (Streaming, Dense))
    held = s[:16] > 1e-12  # beyond it rounding noise of float64 is in both
    for mine, true in ((streaming.U, dense.U), (streaming.V, dense.V)):
        cosines = (mine[:, :16] * true[:, :16]).sum(dim=0)
        assert cosines[held].min() > 0.999
    torch.testing.assert_close(streaming.S[:16][held], dense.S[:16][held], rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 3])
def test_directions_that_no_block_had_are_zeros_in_the_state(rank: int, dtype: torch.dtype) -> None:
    """Rounding noise would stay in the sum as directions of the gradient, and be iterated on in later blocks."""
    s = 2.0 ** -torch.arange(rank, dtype=torch.float64)
    accumulator = Streaming({"layer": Size(20, 8)}, 0, 0)
    found(accumulator, blocks(s, 5, dtype))
    state = accumulator.state()
    torch.testing.assert_close(state["layer.S"][:rank], (5 * s).to(dtype), rtol=1e-5, atol=0)
    assert state["layer.S"][rank:].eq(0).all()
    assert state["layer.U"][:, rank:].eq(0).all()
    assert state["layer.V"][:, rank:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_first_call_that_is_not_finite_is_named_when_the_layer_is_called_twice(dtype: torch.dtype) -> None:
    ((x, g),), accumulator = (
        blocks(torch.ones(4, dtype=torch.float64), 1, dtype),
        Streaming({"layer": Size(8, 4)}, 0, 0),
    )

    def batch() -> None:
        for each in (x * torch.nan, x):
            accumulator.add("layer", each, g, 1.0)
        accumulator.flush()

    with pytest.raises(FloatingPointError, match=r"^layer: the gradient is not finite$"):
        batch()


# Directions to start from


def slow(dtype: torch.dtype = torch.float64) -> Tensor:
    """A spectrum of eight strong directions above a floor of weak ones."""
    s = torch.full((OUTPUTS,), 0.2, dtype=dtype)
    s[:8] = torch.linspace(1.2, 0.8, 8, dtype=dtype)
    return s


def test_the_first_block_starts_from_directions_that_have_seen_its_tokens() -> None:
    """`Gᵀ` amplifies a direction by σ: random directions alone hold Q/I of each leading one."""
    ((x, g),), v = blocks(slow(), 1, tokens=256 * STRIDE), rotation(INPUTS, OUTPUTS, 2)[:, :8]
    left, omega = (gaussian(size, 20, 0, "test").double() for size in (OUTPUTS, INPUTS))
    start = first_directions(x, g, left, omega)
    dense = torch.linalg.qr((g[::STRIDE].mT @ x[::STRIDE]).mT @ left).Q
    torch.testing.assert_close(start @ start.mT, dense @ dense.mT, atol=1e-6, rtol=0)
    seen, unseen = ((torch.linalg.qr(each).Q.mT @ v).square().sum(dim=0) for each in (start, omega))
    assert unseen.max() < 0.4
    assert seen.min() > 0.8
    torch.testing.assert_close(start.mT @ start, torch.eye(20, dtype=start.dtype), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("tokens", "stride"), [(40, 1), (79, 1), (80, 2), (119, 2), (120, 3), (160, 4), (999, 4)])
def test_the_first_look_reads_at_most_every_fourth_token_and_four_for_each_direction(tokens: int, stride: int) -> None:
    left, right = (gaussian(size, 10, 0, "test").double() for size in (OUTPUTS, INPUTS))
    x, g = (gaussian(tokens, size, 0, "tokens").double() for size in (INPUTS, OUTPUTS))
    expected = orthonormal(x[::stride].mT @ (g[::stride] @ left))
    torch.testing.assert_close(first_directions(x, g, left, right), expected)


def test_one_block_alone_is_close_to_the_dense_estimate_without_power_steps() -> None:
    parts, sizes = blocks(slow(), 1, tokens=1024), {"layer": Size(8, 8)}
    streaming, dense = (found(kind(sizes, 0, 0), parts) for kind in (Streaming, Dense))
    g = parts[0][1].mT @ parts[0][0]
    captured = (streaming.U.mT @ g @ streaming.V).norm() / dense.S.norm()
    assert captured > 0.998


def test_a_late_direction_is_found_also_where_the_first_test_directions_are_blind_to_it() -> None:
    """Every block and every layer has other test directions, so nothing stays out of their sight."""
    kept = 8
    random = gaussian(INPUTS, kept + FRESH, 0, "test").double()
    blind = torch.linalg.qr(random).Q
    hidden = rotation(INPUTS, 1, 5)
    hidden = hidden - blind @ (blind.mT @ hidden)
    hidden = hidden / hidden.norm()
    assert (random.mT @ hidden).abs().max() < 1e-12
    early = rotation(INPUTS, kept, 2)
    early = torch.linalg.qr(early - hidden @ (hidden.mT @ early)).Q
    left = rotation(OUTPUTS, kept + 1, 1)
    accumulator = Streaming({"layer": Size(kept, kept), "other": Size(kept, kept)}, 0, 0)
    accumulator.add("layer", early.mT.contiguous(), left[:, :kept].mT.contiguous(), 1.0)
    accumulator.flush()
    factors = found(accumulator, [(hidden.mT, 10 * left[:, kept:].mT)] * 3)
    assert (factors.V[:, :1].mT @ hidden).abs() > 0.999
    assert factors.S[0] == pytest.approx(30.0, rel=1e-3)


def test_test_directions_differ_between_blocks_and_layers_and_not_between_runs() -> None:
    x, g = blocks(slow(), 1)[0]

    def starts(names: tuple[str, ...], seed: int = 0) -> list[Tensor]:
        accumulator, made = Streaming(dict.fromkeys(names, Size(4, 4)), 0, seed), []
        for _ in range(3):
            for name in names:
                accumulator.add(name, x, g, 1.0)
                accumulator.flush()
                made.append(accumulator.streams[name].start[:, 4:])
        return made

    drawn, again, other = starts(("a", "b")), starts(("a", "b")), starts(("a", "b"), seed=1)
    assert all(torch.equal(one, same) for one, same in zip(drawn, again, strict=True))
    for index, one in enumerate(drawn):
        assert not any(torch.equal(one, each) for each in (*drawn[:index], *other))
