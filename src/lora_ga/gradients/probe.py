"""Gradients of layers that are never called: fused kernels read an adapter's factors and call no hook.

A probe takes the place of the adapter's factors: `A = [Ω; 0]`, `B = [0, Ψ]`. Its product is zero, so the model computes
as before. One backward pass gives `∂L/∂B = s·G [Ωᵀ, 0]` and `∂L/∂A = s·[0; Ψᵀ G]` wherever a LoRA can train. The first
pass over the batches has random Ω and Ψ and finds ranges: P of Gᵀ and Q of G. The second has Ω = Pᵀ and Ψ = Q, and
gives `G P Pᵀ + Q Qᵀ G (1 − P Pᵀ)`. This differs from G by `(1 − Q Qᵀ) G (1 − P Pᵀ)`, which is zero where the probe's
rank is at least that of G.

Shapes: I inputs, O outputs, K directions of the probe, P probes of the norm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_ga.distributed.processes import DeferredError, Processes
from lora_ga.gradients.coverage import warn_probed
from lora_ga.gradients.isolation import (
    activate_adapter,
    compute_device,
    deactivate_adapter,
    factors_replaced,
    without_autocast,
)
from lora_ga.gradients.recorder import Recorder
from lora_ga.gradients.setup import Setup
from lora_ga.layers.kinds import entries, weight_of
from lora_ga.layers.targets import Target
from lora_ga.linalg.accumulator import refuse_infinite, sum_dtype
from lora_ga.linalg.low_rank import LowRank, estimated_norm, generator, merge_factors, packed, probes, unpacked
from lora_ga.linalg.tensor_cores import float32_products

SIDES = ("left", "right")


@dataclasses.dataclass
class ProbeSums:
    """The probe of one layer, and the sums over the batches of what its gradients show.

    Attributes:
        omega: Ω, (K, I); in the second pass the P probes of the norm follow, (K + P, I).
        psi: Ψ, (O, K).
        right: G Ωᵀ, (O, K) or (O, K + P); None before the first gradient.
        left: Ψᵀ G, (K, I); None before the first gradient.
    """

    omega: Tensor
    psi: Tensor
    right: Tensor | None = None
    left: Tensor | None = None


class Probes:
    """The probes of some layers during one pass over the batches.

    Attributes:
        scale: The factor of the gradients of the backward pass under way.
    """

    def __init__(self, targets: Mapping[str, Target], adapter_name: str, sums: Mapping[str, ProbeSums]) -> None:
        self.targets, self.adapter_name, self.sums = targets, adapter_name, sums
        self.scale = 1.0

    @contextlib.contextmanager
    def placed(self) -> Iterator[None]:
        """Put the probes in the place of the adapter's factors."""
        with contextlib.ExitStack() as stack:
            for name, target in self.targets.items():
                a, b = self._factors(target, self.sums[name])
                stack.enter_context(factors_replaced(target.layer, self.adapter_name, a, b))
            yield

    def activate(self) -> None:
        """Activate the adapter in the layers, before every batch: a loss may switch adapters."""
        for target in self.targets.values():
            activate_adapter(target.layer, self.adapter_name)

    @property
    def starts(self) -> list[Tensor]:
        """The leaves to which a backward pass has to go: the weights of the probes in place."""
        pairs = (entries(target.layer, self.adapter_name) for target in self.targets.values())
        return [weight_of(factor) for pair in pairs for factor in pair]

    def check_finite(self) -> None:
        """Check the sums, after every batch.

        Raises:
            FloatingPointError: A gradient is not finite.
        """
        for side in SIDES:
            refuse_infinite({name: sum for name, one in self.sums.items() if (sum := getattr(one, side)) is not None})

    def _factors(self, target: Target, sums: ProbeSums) -> tuple[ProbeFactor, ProbeFactor]:
        """A and B of the probe of a layer, whose gradients are added to `sums`."""
        # With a scaling of 0 the gradient of the factors is zero too.
        scaling = target.layer.scaling[self.adapter_name] or 1.0
        above, beside = len(sums.omega), sums.psi.shape[1]
        dtypes = [weight_of(entry).dtype for entry in entries(target.layer, self.adapter_name)]

        def add_left(gradient: Tensor) -> None:
            sums.left = _added(sums.left, gradient[above:], self.scale / scaling)

        def add_right(gradient: Tensor) -> None:
            sums.right = _added(sums.right, gradient[:, :above], self.scale / scaling)

        a = torch.cat([sums.omega, sums.omega.new_zeros(beside, target.inputs)])
        b = torch.cat([sums.psi.new_zeros(target.outputs, above), sums.psi], dim=1)
        return ProbeFactor(a.to(dtypes[0]), add_left), ProbeFactor(b.to(dtypes[1]), add_right)


class ProbeFactor(nn.Linear):
    """A or B of a probe. Its weight is not a Parameter, so code that freezes or trains parameters does not find it."""

    def __init__(self, weight: Tensor, receive: Callable[[Tensor], None]) -> None:
        """Hold `weight`, and call `receive` with each of its gradients."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight.detach().requires_grad_()
        self.register_parameter("bias", None)

        def hook(leaf: Tensor) -> None:
            assert leaf.grad is not None
            gradient, leaf.grad = leaf.grad, None
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                receive(gradient)

        self.weight.register_post_accumulate_grad_hook(hook)


def _added(total: Tensor | None, gradient: Tensor, factor: float) -> Tensor:
    """`total + factor·gradient`, in the dtype of sums."""
    term = gradient.to(sum_dtype(gradient.dtype)) * factor
    return term if total is None else total.add_(term)


# Passes the batches of this process through the isolated model: `activate` before each, `scale` before its backward
# pass, `check_finite` after it. Returns the sum of their weights.
ReadBatches = Callable[[Probes], float]


def uncalled(setup: Setup, ran: Container[str]) -> dict[str, Target]:
    """The layers that did not run as far as hooks can see, and that can be probed."""
    if setup.in_step:  # a pass of one process would need a pass of all
        return {}
    return {name: target for name, target in setup.fitting.items() if name not in ran and target.layout.probed}


def read_uncalled(setup: Setup, ran: Container[str], read: ReadBatches) -> bool:
    """Whether the loss depends on layers that were not called, as under fused kernels that read their weights.

    Other layers that were not called are not used, as the decoder in a loss of the encoder. No probe is worth its
    passes there.

    Args:
        setup: What the estimate works on; the model is isolated.
        ran: The layers that were called.
        read: Passes one batch through the model, with probes of rank 1 in those layers.

    Returns:
        Whether one of the layers got a gradient.
    """
    layers = uncalled(setup, ran)
    if not layers:
        return False
    seed = setup.config.seed
    sums = {name: random_probe(name, target, 1, seed, torch.float32) for name, target in layers.items()}
    placed = Probes(layers, setup.adapter_name, sums)
    try:
        with placed.placed():
            read(placed)
    finally:
        deactivate_adapter(setup.network, setup.adapter_name)
    return bool(_with_gradient(sums, sums))


def probe_uncalled(setup: Setup, recorder: Recorder, read: ReadBatches, *, batches: int) -> dict[str, LowRank]:
    """Estimate the gradients of the layers that no process has seen called, through probes.

    Args:
        setup: What the estimate works on; the model is isolated.
        recorder: What hooks have recorded; its progress is updated.
        read: Passes the batches through the model.
        batches: How many batches `read` reads in this process.

    Returns:
        The layers that got a gradient.
    """
    ran, counts = zip(*setup.processes.gather((recorder.progress.ran, batches)), strict=True)
    layers = uncalled(setup, set().union(*ran))
    if not layers or not any(counts):
        return {}
    kept = {name: setup.config.directions(target.rank) for name, target in layers.items()}
    found, weight = probe_layers(read, setup.processes, layers, setup.adapter_name, kept, setup.config.seed)
    recorder.progress.ran.update(found)
    recorder.progress.got_gradient.update(found)
    if setup.config.estimator == "probe":
        recorder.progress.batches, recorder.progress.weight = batches, weight
    elif found:
        warn_probed(list(found), len(setup.fitting))
    return found


def probe_layers(
    read: ReadBatches,
    processes: Processes,
    targets: Mapping[str, Target],
    adapter_name: str,
    kept: Mapping[str, int],
    seed: int,
) -> tuple[dict[str, LowRank], float]:
    """Estimate the gradients of layers through probes in the adapter's place, in two passes over the batches.

    Args:
        read: Passes the batches of this process through the isolated model; called twice.
        processes: The processes that do this together; the sums of all are added up.
        targets: The layers, the same in all processes.
        adapter_name: The adapter whose place the probes take meanwhile.
        kept: Layer → directions to keep; also the rank K of each half of its probe.
        seed: Seed of the random directions, together with the layer's name.

    Returns:
        The layers that got a gradient, as sums over the weights of all batches, the same numbers in all processes; and
        the sum of the weights of this process's batches. Where no layer got a gradient there is no second pass.
    """
    devices = {name: compute_device(target.layer) for name, target in targets.items()}
    dtypes = {name: weight_of(entries(target.layer, adapter_name)[0]).dtype for name, target in targets.items()}
    drawn = {
        name: random_probe(name, target, kept[name], seed, sum_dtype(dtypes[name])) for name, target in targets.items()
    }
    mine, weight = _read_together(read, processes, Probes(targets, adapter_name, drawn))
    found: dict[str, Tensor] = {}
    for name, one in _with_gradient(drawn, mine).items():
        inputs = targets[name].inputs
        second = _directed(one, probes(inputs, seed).mT / math.sqrt(inputs))
        found |= {f"{name}.omega": second.omega, f"{name}.psi": second.psi}
    shared = processes.share(found)
    reached = {name: target for name, target in targets.items() if f"{name}.omega" in shared}
    if not reached:
        return {}, weight
    directed = {
        name: ProbeSums(*(shared[f"{name}.{part}"].to(devices[name]) for part in ("omega", "psi"))) for name in reached
    }
    mine, weight = _read_together(read, processes, Probes(reached, adapter_name, directed))
    with torch.no_grad(), without_autocast(), float32_products("ieee"):
        factors = {name: _low_rank(one, kept[name], seed) for name, one in _with_gradient(directed, mine).items()}
    return unpacked(processes.share(packed(factors)), devices), weight


def _read_together(read: ReadBatches, processes: Processes, placed: Probes) -> tuple[list[str], float]:
    """One pass of every process over its batches; each layer's sums are then added up in one of the processes.

    Returns:
        The layers whose sums are complete in this process, and the sum of the weights of this process's batches.
    """
    held, weight, sums = DeferredError(), 0.0, placed.sums
    with held, placed.placed():
        weight = read(placed)
    processes.exchange(held)

    def state() -> dict[str, Tensor]:
        pairs = ((f"{name}.{side}", getattr(one, side)) for name, one in sums.items() for side in SIDES)
        return {key: total for key, total in pairs if total is not None}

    def absorb(others: dict[str, Tensor]) -> None:
        for key, total in others.items():
            name, side = key.rsplit(".", 1)
            setattr(sums[name], side, _added(getattr(sums[name], side), total.to(sums[name].psi.device), 1.0))

    return processes.merge(placed.targets, state, absorb), weight


def random_probe(name: str, target: Target, kept: int, seed: int, dtype: torch.dtype) -> ProbeSums:
    """A probe with random directions, drawn on the CPU."""
    draw = generator(seed, name, "probe")
    directions = min(kept, target.inputs, target.outputs)
    omega = torch.randn(directions, target.inputs, generator=draw, device="cpu") / math.sqrt(target.inputs)
    psi = torch.randn(target.outputs, directions, generator=draw, device="cpu") / math.sqrt(target.outputs)
    device = compute_device(target.layer)
    return ProbeSums(omega.to(device, dtype), psi.to(device, dtype))


def _directed(first: ProbeSums, norm_PI: Tensor) -> ProbeSums:
    """The probe of the second pass: the ranges that the first pass found, and the probes of the norm."""
    assert first.right is not None
    assert first.left is not None
    q_OK, _ = torch.linalg.qr(first.right)
    p_IK, _ = torch.linalg.qr(first.left.mT)
    return ProbeSums(torch.cat([p_IK.mT, norm_PI.to(p_IK)]), q_OK)


def _low_rank(second: ProbeSums, kept: int, seed: int) -> LowRank:
    """The leading directions of the sums of the second pass, and the norm from its sketch."""
    assert second.right is not None
    assert second.left is not None
    directions, inputs = second.left.shape
    p_IK, y_OK, root = second.omega[:directions].mT, second.right[:, :directions], math.sqrt(inputs)
    rest_IK = second.left.mT - p_IK @ (second.left @ p_IK).mT
    ones = y_OK.new_ones(directions)
    held = merge_factors([(y_OK, ones, p_IK), (second.psi, ones, rest_IK)], kept)
    sketch_OP = second.right[:, directions:] * root
    return LowRank(*held, norm=estimated_norm(held, sketch_OP, probes(inputs, seed)), sketch=sketch_OP)


def _with_gradient(sums: Mapping[str, ProbeSums], names: Iterable[str]) -> dict[str, ProbeSums]:
    """Those of the named layers that got a gradient."""
    return {name: sums[name] for name in names if sums[name].left is not None and sums[name].right is not None}
