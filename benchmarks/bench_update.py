"""What does the streaming update of one layer cost, part by part, and how does it grow with tokens, width and rank?

    python benchmarks/bench_update.py           # a minute, in one thread; draws results/growth.png
    python benchmarks/bench_update.py --draw    # draws the picture again, from the record

Square layers in float32, blocks of random numbers, process time. Each number is the median of eight runs after a first
one. `bench_estimation.py` measures the whole estimate.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

import record
from lora_ga.config import LoraGAConfig
from lora_ga.linalg.accumulator import Size
from lora_ga.linalg.low_rank import PROBES
from lora_ga.linalg.streaming import FRESH, STACKED, Streaming
from lora_ga.linalg.subspace import truncate

RANK, OVERSAMPLE = 8, LoraGAConfig().oversample


def accumulated(tokens: int, width: int, rank: int) -> tuple[float, int]:
    """The process seconds of one warm block in one square layer, and the bytes of the state."""
    draw = torch.Generator().manual_seed(0)
    x, g = (torch.randn(tokens, width, generator=draw) for _ in range(2))
    accumulator = Streaming({"layer": Size(2 * rank + OVERSAMPLE, 2 * rank)}, 0, 0)
    found = []
    for _ in range(9):
        start = time.process_time()
        accumulator.add("layer", x, g, 1.0)
        accumulator.flush()
        found.append(time.process_time() - start)
    return statistics.median(found[1:]), sum(t.numel() * t.element_size() for t in accumulator.state().values())


def growth() -> dict[str, Any]:
    """Measure a warm block's time and the state over tokens, width and rank, and fit exponents."""
    centre = {"tokens": 2048, "width": 1024, "rank": 16}
    axes_of = {"tokens": [1024, 2048, 4096, 8192], "width": [512, 1024, 2048, 4096], "rank": [8, 16, 32, 64]}
    result: dict[str, Any] = {}
    for name, values in axes_of.items():
        points = [accumulated(**(centre | {name: value})) for value in values]
        milliseconds, megabytes = [1e3 * time for time, _ in points], [size / 2**20 for _, size in points]
        slopes = [float(np.polyfit(np.log(values), np.log(y), 1)[0]) for y in (milliseconds, megabytes)]
        result[name] = {"values": values, "ms": milliseconds, "MB": megabytes, "exponents": slopes}
        print(f"growth with {name:6}: time ^{slopes[0]:.2f}, state ^{slopes[1]:.2f}", flush=True)
    return result


def draw(found: dict[str, Any]) -> None:
    """Draw growth.png from what `growth` returns."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained", sharey=True)
    for axis, (name, each) in zip(axes, found.items(), strict=True):
        time_slope, state_slope = each["exponents"]
        axis.loglog(each["values"], each["ms"], "o-", label=f"time in ms, exponent {time_slope:.2f}")
        axis.loglog(each["values"], each["MB"], "s-", label=f"state in MB, exponent {abs(state_slope):.2f}")
        axis.set_xticks(each["values"], [str(value) for value in each["values"]])
        axis.minorticks_off()
        axis.set_xlabel(name)
        axis.legend(fontsize=9, loc="center")
    figure.savefig(record.RESULTS / "growth.png", dpi=110)


def parts(*, tokens: int, width: int = 1024) -> dict[str, float]:
    """The process milliseconds of each part of one layer's update, and of the two products of the frozen pass."""
    draw = torch.Generator().manual_seed(0)
    x, g, weight = (torch.randn(rows, width, generator=draw) for rows in (tokens, tokens, width))
    names = [str(index) for index in range(STACKED)]
    sizes = {name: Size(2 * RANK + OVERSAMPLE, 2 * RANK) for name in names}

    def block(accumulator: Streaming) -> None:
        for name in names[:-1]:  # one fewer than are truncated at once
            accumulator.add(name, x, g, 1.0)

    warm = Streaming(sizes, 0, 0)
    for _ in range(2):
        block(warm)
        warm.flush()
    kept = 2 * RANK + OVERSAMPLE
    start = torch.randn(width, kept + FRESH, generator=draw)
    first = torch.cat([start, start[:, :PROBES]], dim=1)
    start_T, first_T = (each.mT.contiguous().mT for each in (start, first))
    stack = torch.linalg.qr(torch.randn(STACKED, width, kept + FRESH, generator=draw)).Q

    def warm_batch() -> None:
        block(warm)
        warm.flush()

    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "pass: forward and backward product": (lambda: (x @ weight, g @ weight), 1),
        "update: products": (lambda: ((x @ first_T).mT @ g, (g @ start_T).mT @ x), 1),
        "the same with factors in the usual order in memory": (lambda: (g.mT @ (x @ first), x.mT @ (g @ start)), 1),
        "update: truncation": (lambda: truncate(stack, stack, kept, exactly=False), STACKED),
        "the same with eigenvalue solvers": (lambda: truncate(stack, stack, kept), STACKED),
        "update: all, warm": (warm_batch, STACKED - 1),
        "update: all, first block": (lambda: block(Streaming(sizes, 0, 0)), STACKED - 1),
        "final factors, once": (lambda: warm.factors(map(str, range(STACKED - 1))), STACKED - 1),
    }
    found = {}
    for what, (way, layers) in ways.items():
        runs = []
        for _ in range(9):
            begun = time.process_time()
            way()
            runs.append(1e3 * (time.process_time() - begun) / layers)
        found[what] = statistics.median(runs[1:])
        print(f"{what:52} {found[what]:8.2f} ms")
    return found


if __name__ == "__main__":
    if "--draw" in sys.argv:
        draw(json.loads((record.RESULTS / "update.json").read_text())["growth"])
        sys.exit()
    torch.set_num_threads(1)
    costs = {str(tokens): parts(tokens=tokens) for tokens in (2048, 512)}
    grown = growth()
    draw(grown)
    record.finish("update", {"width": 1024, "rank": RANK, "ms": costs, "growth": grown})
