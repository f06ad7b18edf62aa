"""The estimate allocates no gradient, does not wait for the device, and hardly depends on kernels and dtypes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

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
from lora_ga.linalg.accumulator import Size
from lora_ga.linalg.dense import Dense
from lora_ga.linalg.streaming import STACKED, Streaming
from toys import adapted, causal, llama


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
    found = [accumulator.factors(str(part)) for part in range(experts)]
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
    estimate, passes = (counted(way, 4) - counted(way, 1) for way in ways)
    return (estimate - passes) / 3


def test_a_layer_and_batch_cost_at_most_twelve_operations_beyond_the_frozen_pass() -> None:
    model = adapted(llama(num_hidden_layers=6, **SIZES))
    assert 4 < beyond_the_frozen_pass(model, Kernels) / len(find_targets(model)) <= 12


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
