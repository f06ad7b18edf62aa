"""Where does the time of an estimate go on a GPU? Its phases, and the parts of the update, with other ways to multiply.

    python benchmarks/bench_gpu_parts.py         # one GPU; about two minutes
    python benchmarks/bench_gpu_parts.py --toy   # the same script on any machine, with small sizes, no record

1. The phases of the estimate of the models of `bench_gpu.py`: seconds of each, with a wait for the device around it, so
   their sum is more than the whole takes. The first batch is apart from the others.
2. One layer's four products in each way of multiplying, and what is done for a stack of layers. Each figure is the
   median of ten runs. The error is that of a sum `gᵀ(x Ω)` against float64, divided by the norm of the sum. The last
   two ways multiply in bfloat16 and add up in float32; "split" takes a factor as the sum of two in bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
import time
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import bench_gpu
import record
from lora_ga.adapter import initialize
from lora_ga.gradients import estimate
from lora_ga.gradients.batch import BatchPass
from lora_ga.linalg import tensor_cores
from lora_ga.linalg.accumulator import Size
from lora_ga.linalg.low_rank import PROBES
from lora_ga.linalg.streaming import FRESH, STACKED, Streaming
from lora_ga.linalg.subspace import orthonormal, truncate
from lora_ga.linalg.tensor_cores import float32_products

KEPT = 32
# Inputs, outputs and tokens of a layer. Blocks of the first are multiplied in float32, the others in TF32. The last
# layer has the size of Llama-2-7B's largest.
SHAPES = [(768, 768, 512), (768, 768, 4096), (4096, 11008, 4096)]
PHASES: list[tuple[Any, str, str]] = [
    (estimate, "prepare", "prepare"),
    (BatchPass, "forward", "forward"),
    (BatchPass, "_backward", "backward, with the update"),
    (Streaming, "flush", "flush"),
    (estimate, "merged_estimate", "final decomposition"),
    (initialize, "write_starts", "write the start"),
]


def finish() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def timed_phases(found: dict[str, float]) -> Iterator[None]:
    """Add up the seconds of each phase in `found`."""
    with contextlib.ExitStack() as stack:
        for owner, name, label in PHASES:
            plain, calls = getattr(owner, name), iter(range(10**9))

            def timed(*args: Any, plain: Any = plain, label: str = label, calls: Any = calls, **kwargs: Any) -> Any:
                key = f"{label}, first batch" if next(calls) == 0 and label[:4] in {"forw", "back", "flus"} else label
                finish()
                start = time.perf_counter()
                result = plain(*args, **kwargs)
                finish()
                found[key] = found.get(key, 0.0) + time.perf_counter() - start
                return result

            setattr(owner, name, functools.wraps(plain)(timed))
            stack.callback(setattr, owner, name, plain)
        yield


def phases(toy: bool, device: torch.device) -> dict[str, dict[str, float]]:
    """The seconds of each phase for each model, after a run to warm up."""
    results: dict[str, dict[str, float]] = {}
    for name, model in bench_gpu.MODELS.items():
        batches = bench_gpu.batches_of(model, toy, device)
        bench_gpu.ours(model.make(toy, device), batches[:2])
        with timed_phases(results.setdefault(name, {})):
            bench_gpu.ours(model.make(toy, device), batches)
        print(f"\n{name}, {len(batches)} batches")
        for phase, seconds in results[name].items():
            print(f"  {phase:40} {1e3 * seconds:9.2f} ms", flush=True)
    return results


def median_ms(work: Callable[[], Any]) -> float:
    """The median milliseconds of ten runs, after one to warm up."""
    runs = []
    for _ in range(11):
        finish()
        start = time.perf_counter()
        work()
        finish()
        runs.append(1e3 * (time.perf_counter() - start))
    return statistics.median(runs[1:])


def float32(a: Tensor, b: Tensor) -> Tensor:
    """The product in float32, as the estimate computes it for models in float32."""
    return a.float() @ b.float()


def tf32(a: Tensor, b: Tensor) -> Tensor:
    """The product on tensor cores that round float32 factors to TF32, as for the Y of models in half precision."""
    with float32_products("tf32"):
        return a.float() @ b.float()


def bfloat16(a: Tensor, b: Tensor) -> Tensor:
    """The product of factors in bfloat16, added up in float32."""
    a, b = a.bfloat16(), b.bfloat16()
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def split(a: Tensor, b: Tensor) -> Tensor:
    """The same, with the second factor as the sum of two in bfloat16: it keeps 16 of its digits."""
    high = b.bfloat16()
    both = bfloat16(a, torch.cat([high, (b.float() - high).bfloat16()], dim=1))
    return both[:, : b.shape[1]] + both[:, b.shape[1] :]


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "float32": float32,
    "TF32": tf32,
    "bfloat16": bfloat16,
    "split": split,
}


# From how many multiplications on TF32 is used; `tensor_cores.LARGE` chooses between the last two.
WAYS_OF_UPDATE = {torch.float32: {"": 0}, torch.bfloat16: {" in TF32": 0, " in float32": sys.maxsize}}


def products(x: Tensor, g: Tensor) -> dict[str, float]:
    """The milliseconds of one layer's four products in each way of multiplying, and their errors."""
    omega = torch.randn(x.shape[1], KEPT + FRESH + PROBES, device=x.device)
    exact = g.double().mT @ (x.double() @ omega.double())
    found: dict[str, float] = {}
    for name, times in WAYS.items():

        def four(times: Callable[[Tensor, Tensor], Tensor] = times) -> Tensor:
            y = times(g.mT, times(x, omega))
            times(x.mT, times(g, y[:, :-PROBES]))
            return y

        found[name] = median_ms(four)
        found[f"{name}, error"] = ((four().double() - exact).norm() / exact.norm()).item()
    return found


def warm(x: Tensor, g: Tensor) -> Streaming:
    """The streaming estimator after a block of one layer."""
    stream = Streaming({"layer": Size(KEPT, 2 * record.RANK)}, 0, 0)
    update(stream, x, g)
    return stream


def update(stream: Streaming, x: Tensor, g: Tensor) -> None:
    """What the estimate does with a block: products as its dtype needs them, the truncation, and the check."""
    stream.add("layer", x, g, 1.0)
    stream.flush()


def frozen(x: Tensor, g: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What a frozen layer multiplies in its forward and backward pass."""
    return x @ weight.mT, g @ weight


def parts(inputs: int, outputs: int, tokens: int, device: torch.device) -> dict[str, float]:
    """The milliseconds of the parts of the update of a layer, and of a stack of layers."""
    found: dict[str, float] = {}
    weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(tokens, inputs, device=device, dtype=dtype)
        g = (torch.randn(tokens, outputs, device=device) * 1e-3).to(dtype)
        found[f"frozen layer, {dtype}"] = median_ms(functools.partial(frozen, x, g, weight.to(dtype)))
        found |= {f"products of {dtype}: {name}": figure for name, figure in products(x, g).items()}
        for way, large in WAYS_OF_UPDATE[dtype].items():
            with unittest.mock.patch.object(tensor_cores, "LARGE", large):
                milliseconds = median_ms(functools.partial(update, warm(x, g), x, g))
            found[f"update of a block of {dtype}{way}, one layer"] = milliseconds
    y, z = (torch.randn(STACKED, size, KEPT + FRESH, device=device) for size in (outputs, inputs))
    found["orthonormal, one layer"] = median_ms(lambda: orthonormal(y[0]))
    found["truncation, a stack"] = median_ms(lambda: truncate(y, z, KEPT, exactly=False))
    found["truncation with eigenvalue solvers, a stack"] = median_ms(lambda: truncate(y, z, KEPT))
    return found


def main(toy: bool) -> None:
    """Measure, print and write the record."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if device.type != "cuda" and not toy:
        raise SystemExit("This benchmark needs a CUDA device. With --toy it runs on any machine, without a record.")
    results = {}
    for inputs, outputs, tokens in [(48, 64, 256)] if toy else SHAPES:
        results[f"{inputs} x {outputs}, {tokens}"] = found = parts(inputs, outputs, tokens, device)
        print(f"\na layer of {inputs} inputs and {outputs} outputs, a block of {tokens} tokens; milliseconds")
        for what, figure in found.items():
            print(f"  {what:52} {figure:.3g}", flush=True)
    whole = phases(toy, device)
    if not toy:
        record.finish("gpu_parts", {"gpu": torch.cuda.get_device_name(), "parts": results, "phases": whole})


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="small sizes, on any machine; no record")
    main(parser.parse_args().toy)
