"""A second way to listen, for layers that are never called: fused kernels read an adapter's factors and call no hook.

A zero-product probe `A = [Ω; 0]`, `B = [0, Ψ]` in the adapter's place leaves the model's function as it is, and one
backward pass gives `∂L/∂B = s·G [Ωᵀ, 0]` and `∂L/∂A = s·[0; Ψᵀ G]`, wherever a LoRA trains. The first pass over the
batches has random Ω and Ψ and finds ranges: P of Gᵀ, Q of G. The second has Ω = Pᵀ and Ψ = Q, and what it says agrees
with `G P Pᵀ + Q Qᵀ G (1 − P Pᵀ)`, which differs from G by no more than `(1 − Q Qᵀ) G (1 − P Pᵀ)`: nothing where the
probe's rank is that of G.

Shapes: I inputs, O outputs, K directions of the probe, P probes of the norm.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_ga.distributed.processes import DeferredError, Processes
from lora_ga.gradients.batch import Pass, numbered
from lora_ga.gradients.isolation import place_of
from lora_ga.layers.kinds import entries, weight_of
from lora_ga.layers.targets import Target
from lora_ga.linalg.accumulator import refuse_infinite, sum_dtype
from lora_ga.linalg.low_rank import LowRank, estimated_norm, generator, merge_factors, packed, probes, unpacked

SIDES = ("left", "right")


class ProbeFactor(nn.Linear):
    """A factor of the probe. Its weight is no Parameter: nobody who freezes, clears or trains those finds it."""

    def __init__(self, weight: Tensor, take: Callable[[Tensor], None]) -> None:
        """Put `weight` in, and hand each gradient it gets to `take`."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight.detach().requires_grad_()
        self.register_parameter("bias", None)

        def taken(leaf: Tensor) -> None:
            assert leaf.grad is not None
            gradient, leaf.grad = leaf.grad, None
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                take(gradient)

        self.weight.register_post_accumulate_grad_hook(taken)


@dataclasses.dataclass
class _Heard:
    """What the probe of one layer has heard in a pass, each the sum over the batches.

    Attributes:
        omega: Ω, (K, I), and below it the probes of the norm, where they are heard.
        psi: Ψ, (O, K).
        right: G Ωᵀ and the sketch of the norm, (O, K + P); None before the first gradient.
        left: Ψᵀ G, (K, I); likewise.
    """

    omega: Tensor
    psi: Tensor
    right: Tensor | None = None
    left: Tensor | None = None


def _added(total: Tensor | None, gradient: Tensor, factor: float) -> Tensor:
    """`total + factor·gradient`, in the dtype of sums."""
    term = gradient.to(sum_dtype(gradient.dtype)) * factor
    return term if total is None else total.add_(term)


def _factors(target: Target, adapter_name: str, heard: _Heard, run: Pass) -> tuple[ProbeFactor, ProbeFactor]:
    """A and B of the probe of a layer, which add what they hear to `heard`."""
    scaling = target.layer.scaling[adapter_name] or 1.0  # with a scaling of 0 the gradient of the factors is zero too
    above, beside = len(heard.omega), heard.psi.shape[1]
    dtypes = [weight_of(entry).dtype for entry in entries(target.layer, adapter_name)]

    def take_a(gradient: Tensor) -> None:
        heard.left = _added(heard.left, gradient[above:], run.scale / scaling)

    def take_b(gradient: Tensor) -> None:
        heard.right = _added(heard.right, gradient[:, :above], run.scale / scaling)

    a = torch.cat([heard.omega, heard.omega.new_zeros(beside, target.inputs)])
    b = torch.cat([heard.psi.new_zeros(target.outputs, above), heard.psi], dim=1)
    return ProbeFactor(a.to(dtypes[0]), take_a), ProbeFactor(b.to(dtypes[1]), take_b)


@contextlib.contextmanager
def _placed(targets: Mapping[str, Target], adapter_name: str, heard: Mapping[str, _Heard], run: Pass) -> Iterator[None]:
    """Probes in the place of the adapter's factors.

    Yields:
        Nothing.
    """
    with contextlib.ExitStack() as stack:
        for name, target in targets.items():
            layer: Any = target.layer
            stack.callback(setattr, layer, "_disable_adapters", layer.disable_adapters)
            for table, factor in zip(
                (layer.lora_A, layer.lora_B), _factors(target, adapter_name, heard[name], run), strict=True
            ):
                # Below `__setitem__`, which would give an adapter with LoRA-GA's structure that structure.
                stack.callback(table.add_module, adapter_name, table[adapter_name])
                table.add_module(adapter_name, factor.train(layer.training))
        yield


def _activate(targets: Iterable[Target], adapter_name: str) -> None:
    """Put the adapter back into the pass: losses may switch adapters, and `frozen` has taken it out."""
    for target in targets:
        layer: Any = target.layer
        others = [] if layer.disable_adapters else [name for name in layer.active_adapters if name != adapter_name]
        layer._disable_adapters, layer._active_adapter = False, [*others, adapter_name]


def _listen(
    run: Pass, targets: Mapping[str, Target], adapter_name: str, heard: Mapping[str, _Heard], batches: Sequence[Any]
) -> float:
    """One pass over the batches.

    Returns:
        The sum of the batches' weights.
    """
    total = 0.0
    with _placed(targets, adapter_name, heard, run):
        for index, batch in enumerate(batches, start=1):
            _activate(targets.values(), adapter_name)
            with numbered(index):
                # A copy: a loss may take the labels out of a batch, which is needed once more.
                loss, weight = run.forward(copy.copy(batch))
                run.backward(loss, weight)
                for side in SIDES:
                    refuse_infinite(
                        {name: sums for name, one in heard.items() if (sums := getattr(one, side)) is not None}
                    )
            total += weight
    return total


def _listen_together(
    run: Pass,
    processes: Processes,
    targets: Mapping[str, Target],
    adapter_name: str,
    heard: Mapping[str, _Heard],
    batches: Sequence[Any],
) -> tuple[list[str], float]:
    """One pass of every process over its own batches; the sums of all are then in one process for each layer.

    Returns:
        The layers of which they are in this process, and the sum of this process's batches' weights.
    """
    held, weight = DeferredError(), 0.0
    with held:
        weight = _listen(run, targets, adapter_name, heard, batches)
    processes.exchange(held)

    def sums() -> dict[str, Tensor]:
        pairs = ((f"{name}.{side}", getattr(one, side)) for name, one in heard.items() for side in SIDES)
        return {key: total for key, total in pairs if total is not None}

    def absorb(others: dict[str, Tensor]) -> None:
        for key, total in others.items():
            name, side = key.rsplit(".", 1)
            setattr(heard[name], side, _added(getattr(heard[name], side), total.to(heard[name].psi.device), 1.0))

    return processes.merge(targets, sums, absorb), weight


def _random(name: str, target: Target, kept: int, seed: int, dtype: torch.dtype) -> _Heard:
    """A probe with random directions, drawn on the CPU."""
    draw = generator(seed, name, "probe")
    directions = min(kept, target.inputs, target.outputs)
    omega = torch.randn(directions, target.inputs, generator=draw) / math.sqrt(target.inputs)
    psi = torch.randn(target.outputs, directions, generator=draw) / math.sqrt(target.outputs)
    place = place_of(target.layer)
    return _Heard(omega.to(place, dtype), psi.to(place, dtype))


def _directed(before: _Heard, norm_PI: Tensor) -> _Heard:
    """The second pass's probe: the ranges that the first has found, and the probes of the norm."""
    assert before.right is not None
    assert before.left is not None
    q_OK, _ = torch.linalg.qr(before.right)
    p_IK, _ = torch.linalg.qr(before.left.mT)
    return _Heard(torch.cat([p_IK.mT, norm_PI.to(p_IK)]), q_OK)


def _low_rank(heard: _Heard, kept: int, seed: int) -> LowRank:
    """The leading directions of what the second pass has heard, and the norm from its sketch."""
    assert heard.right is not None
    assert heard.left is not None
    directions, inputs = heard.left.shape
    p_IK, y_OK, root = heard.omega[:directions].mT, heard.right[:, :directions], math.sqrt(inputs)
    rest_IK = heard.left.mT - p_IK @ (heard.left @ p_IK).mT
    ones = y_OK.new_ones(directions)
    held = merge_factors([(y_OK, ones, p_IK), (heard.psi, ones, rest_IK)], kept)
    sketch_OP = heard.right[:, directions:] * root
    return LowRank(*held, norm=estimated_norm(held, sketch_OP, probes(inputs, seed)), sketch=sketch_OP)


def _reached(heard: Mapping[str, _Heard], own: Iterable[str]) -> dict[str, _Heard]:
    """Those of the layers that got a gradient."""
    return {name: heard[name] for name in own if heard[name].left is not None and heard[name].right is not None}


def probe(
    run: Pass,
    processes: Processes,
    targets: Mapping[str, Target],
    adapter_name: str,
    kept: Mapping[str, int],
    seed: int,
    data: Sequence[Any],
) -> tuple[dict[str, LowRank], float]:
    """Hear the gradients of layers through a probe in the adapter's place, in two passes over the batches.

    Args:
        run: Passes batches through the model, whose parameters are frozen.
        processes: Those that do it together, each with its own batches; what they hear is added up.
        targets: The layers, the same in all processes.
        adapter_name: The adapter whose place the probe takes for the while.
        kept: Layer → directions to keep, which is also the rank of the probe's halves.
        seed: With the layer's name the address of the random directions.
        data: The batches of this process.

    Returns:
        The layers that got a gradient, as sums over the weights of all batches, the same numbers in all processes; and
        the sum of the weights of this process's batches. The second pass is left out where there is no such layer.
    """
    places = {name: place_of(target.layer) for name, target in targets.items()}
    dtypes = {name: weight_of(entries(target.layer, adapter_name)[0]).dtype for name, target in targets.items()}
    drawn = {name: _random(name, target, kept[name], seed, sum_dtype(dtypes[name])) for name, target in targets.items()}
    own, weight = _listen_together(run, processes, targets, adapter_name, drawn, data)
    found: dict[str, Tensor] = {}
    for name, one in _reached(drawn, own).items():
        inputs = targets[name].inputs
        second = _directed(one, probes(inputs, seed).mT / math.sqrt(inputs))
        found |= {f"{name}.omega": second.omega, f"{name}.psi": second.psi}
    shared = processes.share(found)
    reached = {name: target for name, target in targets.items() if f"{name}.omega" in shared}
    if not reached:
        return {}, weight
    directed = {
        name: _Heard(*(shared[f"{name}.{part}"].to(places[name]) for part in ("omega", "psi"))) for name in reached
    }
    own, weight = _listen_together(run, processes, reached, adapter_name, directed, data)
    with torch.no_grad(), torch.autocast(run.device.type, enabled=False):
        factors = {name: _low_rank(one, kept[name], seed) for name, one in _reached(directed, own).items()}
    return unpacked(processes.share(packed(factors)), places), weight
