"""What does the estimate cost? Time, memory, state and alignment, beside a frozen pass, plain LoRA steps and PEFT.

    python benchmarks/bench_estimation.py                # about 30 minutes on two cores
    LORA_GA_DATA=... python benchmarks/bench_estimation.py   # also the early stop on a pretrained model

The model is a Llama of 158M parameters with random weights (width 1024, 12 layers, float32). The batches are 16
sequences of 512 bytes of English text, four at a time; r = 8, all linear layers, default settings. The timed runs
alternate within one process; their ratios are taken run by run, and the record has the median of five. Peaks of memory
are measured in fresh processes. The floor is computed from counts of multiplications: those of the frozen pass and of
the products of the streaming update, divided by those of the frozen pass.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import LoraGAConfig as PeftLoraGAConfig
from peft import get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import bench_alignment
import lora_ga
import record
from lora_ga.linalg.low_rank import PROBES
from lora_ga.linalg.streaming import FRESH
from record import RANK, Batches, adapter, frozen_pass, lora_steps, ours

REPEATS, LENGTH = 5, 512


def llama(width: int = 1024, layers: int = 12, inner: int = 2816, vocabulary: int = 4096) -> LlamaForCausalLM:
    """A Llama with random weights; the same weights in every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def sequences(count: int = 16, at_once: int = 4, *, random: bool = False) -> Batches:
    """Micro-batches of bytes: from the Python manual, which is part of every installation, or random."""
    if random:
        ids = torch.randint(0, 256, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    else:
        manual = "\n".join(topics[key] for key in sorted(topics)).encode()
        ids = torch.tensor(list(manual[: count * LENGTH])).reshape(count, LENGTH)
    return [{"input_ids": part, "labels": part} for part in ids.split(at_once)]


def peft(base: nn.Module, batches: Batches) -> None:
    """PEFT's own LoRA-GA."""
    config = adapter(init_lora_weights="lora_ga", lora_ga_config=PeftLoraGAConfig())
    preprocess_loraga(base, config, lambda: bench_alignment.weigh_backward(base, batches))
    get_peft_model(base, config)


WAYS: dict[str, Callable[[nn.Module, Batches], None]] = {
    "frozen pass": frozen_pass,
    "ours": ours,
    "peft lora_ga": peft,
    "lora steps": lora_steps,
}


def seconds(way: str, base: nn.Module, batches: Batches) -> float:
    """Time one workload on a copy of the model."""
    model = copy.deepcopy(base)
    start = time.perf_counter()
    WAYS[way](model, batches)
    return time.perf_counter() - start


def times(base: nn.Module, batches: Batches, ways: list[str]) -> dict[str, Any]:
    """Time the workloads in alternating runs, and take the ratios of ours to each other one, run by run."""
    seconds(ways[0], base, batches[:1])
    runs: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(REPEATS):
        for way in ways:
            runs[way].append(seconds(way, base, batches))
        print({way: round(found[-1], 1) for way, found in runs.items()}, flush=True)
    ratios = {
        way: [mine / other for mine, other in zip(runs["ours"], found, strict=True)]
        for way, found in runs.items()
        if way != "ours"
    }
    return {
        "seconds": runs,
        "ratios": ratios,
        "median ratios": {way: statistics.median(found) for way, found in ratios.items()},
    }


def peak(way: str) -> dict[str, float]:
    """The peak memory of this process while one workload runs, in MB. Called in a fresh process, with --peak."""
    status = Path("/proc/self/status")

    def read(key: str) -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) / 1024

    base, batches = llama(), sequences()[:2]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present value
    before = read("VmRSS")
    WAYS[way](base, batches)
    return {"before": before, "peak": read("VmHWM")}


def peaks(count: int = 1) -> dict[str, Any]:
    """The median peak memory of each workload, over fresh processes."""
    found: dict[str, Any] = {}
    for way in WAYS:
        runs = []
        for _ in range(count):
            done = subprocess.run([sys.executable, __file__, "--peak", way], check=True, capture_output=True, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
        found[way] = {"MB": statistics.median(run["peak"] for run in runs), "runs": runs}
        print(f"{way:14} peak {found[way]['MB']:.0f} MB", flush=True)
    return {
        "ways": found,
        "over lora steps": {way: each["MB"] / found["lora steps"]["MB"] for way, each in found.items()},
    }


def floor(base: nn.Module) -> float:
    """Multiplications a token of the frozen pass and the warm update, over those of the frozen pass alone."""
    layers = [m for name, m in base.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    kept = 2 * RANK + lora_ga.LoraGAConfig().oversample
    passed = sum(2 * m.in_features * m.out_features for m in layers)
    passed += 2 * base.config.hidden_size * base.config.vocab_size  # the head; attention's are 2 % and left out
    added = sum((m.in_features + m.out_features) * (2 * (kept + FRESH) + PROBES) for m in layers)
    return 1 + added / passed


def alignment(base: nn.Module, batches: Batches) -> dict[str, Any]:
    """The alignment ratio of the timed estimate against autograd's gradient, and the size of its state."""
    model = get_peft_model(copy.deepcopy(base), adapter())
    estimate = lora_ga.estimate_gradients(model, batches)
    truth = bench_alignment.gradients(copy.deepcopy(base), batches)
    ratios = bench_alignment.by_formula(estimate, truth)
    kept = sum(
        t.numel() for layer in estimate.values() for t in (layer.U, layer.S, layer.V, layer.sketch) if t is not None
    )
    whole = sum(truth[name].numel() for name in estimate)
    errors = [abs(layer.norm / truth[name].norm().item() - 1) for name, layer in estimate.items()]
    return {
        "median": statistics.median(ratios),
        "lowest": min(ratios),
        "state over gradient": kept / whole,
        "largest error of the norm": max(errors),
    }


def early_stop() -> dict[str, Any]:
    """The alignment lost and the batches saved by the tolerance, on a pretrained model and a text."""
    folder = record.data("models", "babyllama105")
    text = record.data("data", "text", "tinyshakespeare.txt").read_text()
    batches = bench_alignment.causal_batches(folder, text, count=64, length=64)
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    truth = bench_alignment.gradients(copy.deepcopy(base).double(), batches)
    model = get_peft_model(base, adapter())
    result = {}
    for tolerance in (None, 0.003, 0.01, 0.03):
        config = lora_ga.LoraGAConfig(max_batches=None, tolerance=tolerance)
        estimate = lora_ga.estimate_gradients(model, batches, config)
        ratios = bench_alignment.by_formula(estimate, truth)
        read = [estimate.settled.get(name, estimate.batches) for name in estimate]
        row = {
            "median": statistics.median(ratios),
            "lowest": min(ratios),
            "batches": statistics.mean(read),
            "saved": 1 - statistics.mean(read) / len(batches),
        }
        result[str(tolerance)] = row
        print(f"tolerance {tolerance}: ratio {row['median']:.4f}, lowest {row['lowest']:.4f}, saved {row['saved']:.0%}")
    return result


def main() -> None:
    """Measure, print the table and write the record."""
    base, batches = llama(), sequences()
    parameters = sum(p.numel() for p in base.parameters())
    timed = times(base, batches, ["frozen pass", "ours", "peft lora_ga"])
    held, flat = alignment(base, batches), alignment(llama(layers=2), sequences(random=True))
    wide = times(llama(2048, 4, 5632), batches[:2], ["frozen pass", "ours"])
    memory = peaks(3)
    stopped = early_stop() if os.environ.get("LORA_GA_DATA") else None
    rows = [
        ("time over the frozen pass (floor from counts)", timed["median ratios"]["frozen pass"], floor(base)),
        ("time over PEFT's lora_ga", timed["median ratios"]["peft lora_ga"], None),
        ("time over the frozen pass, width 2048", wide["median ratios"]["frozen pass"], None),
        (
            "peak memory over plain LoRA steps (PEFT's)",
            *(memory["over lora steps"][w] for w in ("ours", "peft lora_ga")),
        ),
        ("state over one float32 gradient", held["state over gradient"], None),
        ("alignment ratio, median (lowest)", held["median"], held["lowest"]),
        ("the same of 2 layers on random bytes", flat["median"], flat["lowest"]),
    ]
    for what, figure, beside in rows:
        print(f"{what:46} {figure:7.4f}" + (f"  ({beside:.4f})" if beside is not None else ""))
    record.finish(
        "estimation",
        {
            "parameters": parameters,
            "threads": torch.get_num_threads(),
            "times": timed,
            "floor": floor(base),
            "width 2048": wide,
            "memory": memory,
            "estimate": held,
            "estimate, random bytes": flat,
            "early stop": stopped,
        },
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", choices=WAYS, help="only measure the peak memory of one workload in this process")
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(peak(options.peak)))
    else:
        main()
