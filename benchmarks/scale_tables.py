"""The tables of docs/scale.md: measurements, and the cost of larger models computed from them by formulas.

The shapes of the models are those of their published configurations. Bandwidth and speed are assumptions, which the
page states beside the table. Every other number is measured or counted from shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

# Name → hidden size, intermediate size, size of keys and values, layers, parameters.
MODELS: Mapping[str, tuple[int, int, int, int, float]] = {
    "7B (Llama-2)": (4096, 11008, 4096, 32, 6.7e9),
    "70B (Llama-3.1)": (8192, 28672, 1024, 80, 70.6e9),
    "405B (Llama-3.1)": (16384, 53248, 1024, 126, 405.9e9),
}
GPUS = (8, 64, 1024)
# Assumptions: bytes that a GPU sends per second, floating-point operations per second that it reaches, tokens per
# batch, number of batches.
BANDWIDTH, SPEED, TOKENS, BATCHES = 25e9, 4e14, 8192, 32
PROBES = 8


def shapes(width: int, wide: int, keys: int, layers: int) -> list[tuple[int, int]]:
    """(d_out, d_in) of all linear layers of a Llama except the head."""
    one = [(width, width), (keys, width), (keys, width), (width, width), (wide, width), (wide, width), (width, wide)]
    return one * layers


def estimate(model: str, gpus: int, record: Mapping[str, Any], added: float) -> dict[str, float]:
    """Seconds and bytes of one estimate, by the formulas of the page.

    Args:
        model: A name in `MODELS`.
        gpus: Number of GPUs.
        record: Measurements on small models.
        added: Time of a forward and backward pass with the estimate, divided by its time without.

    Returns:
        Name of a column → seconds or bytes.
    """
    width, wide, keys, layers, parameters = MODELS[model]
    sizes = shapes(width, wide, keys, layers)
    both, outputs = sum(o + i for o, i in sizes), sum(o for o, _ in sizes)
    up = 4 * (both * record["held by a part"] + outputs * PROBES)
    down = 4 * (both * (record["held"] + record["rank"]) + outputs * PROBES)
    share = 1 - 1 / gpus  # 1/2 + 1/4 + … of all layers
    merge = sum(row["seconds"] for row in record["merge of one layer"]) / sum(
        row["numbers"] for row in record["merge of one layer"]
    )
    passes = math.ceil(BATCHES / gpus)
    return {
        "up": up,
        "send": 2 * share * (up + down) / BANDWIDTH,
        "merge": share * merge * both * record["held by a part"],
        "pass": passes * 4 * parameters * TOKENS / SPEED * added,
        "gather": passes * 2 * 2 * parameters / BANDWIDTH,
        "weights": 2 * parameters / gpus,
        "state": up + down,
    }


def gigabytes(count: float) -> str:
    """Gigabytes as text, with two digits."""
    return f"{count / 1e9:.2g}" if count < 1e10 else f"{count / 1e9:.0f}"


def seconds(count: float) -> str:
    """Seconds as text, with two digits."""
    return f"{count:.2g}" if count < 10 else f"{count:.0f}"


def exchange_table(load: Callable[[str], dict[str, Any]]) -> str:
    """Time, and bytes sent, of several processes, in Markdown."""
    found = load("scale")["processes"]
    lines = ["| processes | estimate, s | merged, s | shared, s | most bytes of one process | bound |"]
    lines += ["|---|---|---|---|---|---|"]
    for size, row in found.items():
        cells = [size, f"{row['seconds']:.1f}", "–", "–", "0", "–"]
        if "bound" in row:
            times = [f"{row[name]:.2f}" for name in ("merge", "share")]
            sent = row["most bytes sent, factors"] + row["most bytes sent, small values"]
            cells = [size, f"{row['seconds']:.1f}", *times, f"{sent / 1e6:.1f} MB", f"{row['bound'] / 1e6:.1f} MB"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def accuracy_table(load: Callable[[str], dict[str, Any]]) -> str:
    """Alignment ratios and cosines of principal angles, in Markdown."""
    lines = ["| estimator, processes | alignment ratio, median | lowest | lowest cosine | median cosine |"]
    lines += ["|---|---|---|---|---|"]
    for name, row in load("scale")["accuracy"].items():
        if isinstance(row, dict):
            figures = [row[key] for key in ("median", "lowest", "lowest cosine", "median cosine")]
            lines.append(f"| {name} | " + " | ".join(f"{figure:.4f}" for figure in figures) + " |")
    return "\n".join(lines)


def larger_models_table(load: Callable[[str], dict[str, Any]]) -> str:
    """Published model sizes on many GPUs, by the formulas, in Markdown."""
    record, added = load("scale"), load("estimation")["times"]["median ratios"]["frozen pass"]
    heads = (
        "model | GPUs | pass, s | weights gathered, s | merges, s | sent, s | one message, GB | weights, GB | state, GB"
    )
    lines = [f"| {heads} |", "|---" * 9 + "|"]
    for model in MODELS:
        for gpus in GPUS:
            row = estimate(model, gpus, record, added)
            times = [seconds(row[name]) for name in ("pass", "gather", "merge", "send")]
            sizes = [gigabytes(row[name]) for name in ("up", "weights", "state")]
            lines.append("| " + " | ".join([model, str(gpus), *times, *sizes]) + " |")
    return "\n".join(lines)
