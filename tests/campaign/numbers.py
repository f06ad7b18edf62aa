"""Numbers at the edge: the estimate equals the dense oracle, or names the layer and the batch that are not finite."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_ga
from campaign.faults import Result, forked, last_line, lost
from lora_ga import LoraGAConfig

LAYERS = ("first", "second", "third")


class Network(nn.Module):
    """Three linear layers, whose gradients are known: of `first` G = Σ gᵀx with the x and g of its rows."""

    first: nn.Linear
    second: nn.Linear
    third: nn.Linear

    def __init__(self, sizes: tuple[int, int, int, int], dtype: torch.dtype, draw: random.Random) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(draw.randrange(2**31))
        for name, inputs, outputs in zip(LAYERS, sizes, sizes[1:], strict=False):
            layer = nn.Linear(inputs, outputs, bias=False)
            layer.weight = nn.Parameter((torch.randn(outputs, inputs, generator=noise) / inputs**0.5).to(dtype))
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def loss_of(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """The mean loss over rows and their number, which is the weight of the batch."""
    x, y = batch
    return (model(x).float() - y).square().mean(1).mean(), len(x)


def batches(sizes: tuple[int, ...], rows: int, count: int, dtype: torch.dtype, draw: random.Random) -> list[Any]:
    """Random batches."""
    noise = torch.Generator().manual_seed(draw.randrange(2**31))
    return [
        (torch.randn(rows, sizes[0], generator=noise).to(dtype), torch.randn(rows, sizes[3], generator=noise))
        for _ in range(count)
    ]


def truth(network: Network, data: list[Any]) -> dict[str, Tensor]:
    """The gradient of every weight, of the mean over all rows, by autograd in the network's own dtype."""
    weights = {name: getattr(network, name).weight.requires_grad_() for name in LAYERS}
    rows = sum(len(x) for x, _ in data)
    total = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
    for batch in data:
        loss, count = loss_of(network, batch)
        for name, gradient in zip(LAYERS, torch.autograd.grad(loss, list(weights.values())), strict=True):
            total[name] += gradient.double() * count / rows
    return total


def case(number: int, draw: random.Random) -> Result:
    """One case in a process of its own."""
    name = [*CASES][number % len(CASES)]
    seed, log = draw.random(), Path("log")
    code = forked(lambda: CASES[name](random.Random(seed)), log)
    if code not in {0, 3}:
        return lost(f"{name}: {last_line(log)}")
    return Result(1, survived=int(code == 0), refused=int(code == 3))


def estimate(network: Network, data: list[Any], config: LoraGAConfig, rank: int = 1) -> Any:
    """The estimate."""
    torch.manual_seed(0)
    model = get_peft_model(network, LoraConfig(r=rank, target_modules=list(LAYERS)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lora_ga.estimate_gradients(model, data, config, loss_fn=loss_of)


def compared(draw: random.Random, sizes: Any, rows: int, dtype: torch.dtype, scale: float = 1.0, rank: int = 1) -> int:
    """Compare both estimators with the oracle: the norm, and the energy that the leading directions hold."""
    network = Network(sizes, dtype, draw)
    data = [(x, y * scale) for x, y in batches(sizes, rows, draw.randint(2, 6), dtype, draw)]
    if scale != 1.0:
        with torch.no_grad():
            network.third.weight.mul_(scale)
    wanted = truth(network, data)
    limit = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.03}[dtype]
    for estimator in ("dense", "streaming"):
        found = estimate(network, data, LoraGAConfig(estimator=estimator, seed=draw.randrange(100)), rank)
        for name in LAYERS:
            exact, layer = wanted[name], found[name]
            if not all(part.isfinite().all() for part in (layer.U, layer.S, layer.V)):
                raise AssertionError(f"{estimator}, {name}: not finite")
            count = 2 * rank
            best = torch.linalg.svdvals(exact)[:count].square().sum().sqrt()
            kept = (layer.U[:, :count].double().mT @ exact @ layer.V[:, :count].double()).norm()
            if not kept >= (1 - max(limit, 0.02 if estimator == "streaming" else 0)) * best:
                raise AssertionError(f"{estimator}, {name}: keeps {kept:.4g} of {best:.4g}")
            if estimator == "dense" and not abs(layer.norm - exact.norm()) <= limit * exact.norm():
                raise AssertionError(f"{name}: norm {layer.norm:.6g}, not {exact.norm():.6g}")
    return 0


def refused(draw: random.Random, spoil: Callable[[list[Any], Network, random.Random], None], *words: str) -> int:
    """The estimate ends with an error that has these words."""
    sizes = (8, 12, 10, 6)
    network, data = Network(sizes, torch.float32, draw), batches(sizes, 4, 4, torch.float32, draw)
    spoil(data, network, draw)
    before = [parameter.clone() for parameter in network.parameters()]
    try:
        estimate(network, data, LoraGAConfig(estimator=draw.choice(["dense", "streaming"])))
    except (FloatingPointError, ValueError) as error:
        if not all(word in str(error) for word in words):
            raise AssertionError(f"the error does not say {words}: {error}") from error
        same = zip(before, (p for n, p in network.named_parameters() if "lora" not in n), strict=True)
        if not all(torch.equal(one.nan_to_num(7), other.nan_to_num(7)) for one, other in same):
            raise AssertionError("the weights have changed") from error
        return 3
    raise AssertionError("there was no error")


BAD = (float("nan"), float("inf"), -float("inf"))


def bad_input(data: list[Any], network: Network, draw: random.Random) -> None:
    """One number of one batch is not finite."""
    data[draw.randrange(4)][0][draw.randrange(4), draw.randrange(8)] = draw.choice(BAD)


def bad_label(data: list[Any], network: Network, draw: random.Random) -> None:
    """One label of one batch is not finite."""
    data[draw.randrange(4)][1][draw.randrange(4), draw.randrange(6)] = draw.choice(BAD)


def bad_weight(data: list[Any], network: Network, draw: random.Random) -> None:
    """One weight is not finite. An infinity in the first layers can leave finite gradients: tanh makes it 1."""
    name = draw.choice(LAYERS)
    with torch.no_grad():
        getattr(network, name).weight[0, 0] = draw.choice(BAD) if name == "third" else float("nan")


def half_overflow(draw: random.Random) -> int:
    """Gradients beyond the range of float16."""
    sizes = (8, 12, 10, 6)
    network, data = Network(sizes, torch.float16, draw), batches(sizes, 4, 3, torch.float16, draw)
    with torch.no_grad():
        network.third.weight.mul_(2e4)
    data = [(x, y + 1e9) for x, y in data]
    try:
        estimate(network, data, LoraGAConfig(estimator=draw.choice(["dense", "streaming"])))
    except (FloatingPointError, ValueError) as error:
        if "float16 overflows" not in str(error):
            raise AssertionError(f"the error does not name float16: {error}") from error
        return 3
    raise AssertionError("there was no error")


def zero_rows(draw: random.Random) -> int:
    """A batch without rows adds nothing."""
    sizes = (8, 12, 10, 6)
    network, data = Network(sizes, torch.float32, draw), batches(sizes, 4, 3, torch.float32, draw)
    empty = (torch.zeros(0, 8), torch.zeros(0, 6))
    try:
        estimate(network, [*data[:2], empty, data[2]], LoraGAConfig())
    except (ValueError, FloatingPointError) as error:
        if "batch" not in str(error):
            raise AssertionError(f"the error names no batch: {error}") from error
        return 3
    return 0


def widths(draw: random.Random) -> Any:
    """Sizes of three layers."""
    return tuple(draw.randint(4, 24) for _ in range(4))


CASES: dict[str, Callable[[random.Random], int]] = {
    "float32": lambda draw: compared(draw, widths(draw), draw.randint(2, 9), torch.float32),
    "float64": lambda draw: compared(draw, widths(draw), draw.randint(2, 9), torch.float64),
    "bfloat16": lambda draw: compared(draw, widths(draw), draw.randint(4, 9), torch.bfloat16),
    "float16": lambda draw: compared(draw, widths(draw), draw.randint(4, 9), torch.float16),
    "rank 1": lambda draw: compared(draw, (*widths(draw)[:3], 4), 1, torch.float32),
    "one row a batch": lambda draw: compared(draw, widths(draw), 1, torch.float64),
    "wide": lambda draw: compared(draw, (1000 + draw.randint(4, 9), 4, draw.randint(4, 9), 5), 6, torch.float32),
    "tall": lambda draw: compared(draw, (5, draw.randint(4, 9), 6, 1004 + draw.randint(0, 9)), 6, torch.float32),
    "tiny gradients": lambda draw: compared(draw, widths(draw), 6, torch.float32, 10.0 ** -draw.randint(8, 16)),
    "large gradients": lambda draw: compared(draw, widths(draw), 6, torch.float32, 10.0 ** draw.randint(3, 8)),
    "bad input": lambda draw: refused(draw, bad_input, "batch"),
    "bad label": lambda draw: refused(draw, bad_label, "batch"),
    "bad weight": lambda draw: refused(draw, bad_weight, "batch"),
    "float16 overflow": half_overflow,
    "no rows": zero_rows,
}
