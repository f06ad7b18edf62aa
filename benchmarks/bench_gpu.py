"""A Llama-2-7B-shaped model in bfloat16 on a GPU: seconds and peak memory of the estimate and of other workloads.

    python benchmarks/bench_gpu.py         # one GPU of 40 GB or more; reports what does not fit
    python benchmarks/bench_gpu.py --repeats 1 --ways "frozen pass" ours   # some workloads, each once
    python benchmarks/bench_gpu.py --toy   # the same script on any machine, with a model of two small layers

Random weights, 64 sequences of 1024 tokens, four at a time, gradient checkpointing, r = 8, all linear layers. Goals:
the estimate needs less than 20 GB, and at most 1.2 times as long as the frozen pass. Before the timing, the estimate
runs once in CUDA's synchronisation debug mode: there, any synchronisation of the host with the device raises an error
while a block is added.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights
from peft import LoraGAConfig as PeftLoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import record
from lora_ga.linalg.streaming import Streaming
from ways import Batches, adapter, frozen_pass, lora_steps, ours

LARGE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
TOY = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}


def peft(base: nn.Module, batches: Batches) -> None:
    """PEFT's own LoRA-GA."""

    def train_step() -> None:
        base.train()
        for batch in batches:
            base(**batch).loss.backward()

    config = adapter(init_lora_weights="lora_ga", lora_ga_config=PeftLoraGAConfig())
    preprocess_loraga(base, config, train_step)
    get_peft_model(base, config)


def eva(base: nn.Module, batches: Batches) -> None:
    """PEFT's EVA, which uses the inputs of the layers only."""
    model = get_peft_model(base, adapter(init_lora_weights="eva", eva_config=EvaConfig()))
    initialize_lora_eva_weights(model, [{"input_ids": batch["input_ids"]} for batch in batches])


WAYS: dict[str, Callable[[nn.Module, Batches], None]] = {
    "frozen pass": frozen_pass,
    "ours": ours,
    "lora steps": lora_steps,
    "peft lora_ga": peft,
    "peft eva": eva,
}


def fresh(toy: bool, device: torch.device) -> LlamaForCausalLM:
    """The model; the same weights in every call."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256 if toy else 32000, **(TOY if toy else LARGE))
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.eval()


def measured(way: str, toy: bool, device: torch.device, batches: Batches) -> dict[str, float]:
    """The seconds and the peak memory in GB of one workload on a fresh model."""
    base = fresh(toy, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    WAYS[way](base, batches)
    if device.type == "cuda":
        torch.cuda.synchronize()
    found = {"seconds": time.perf_counter() - start}
    if device.type == "cuda":
        found["GB"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def runs(way: str, toy: bool, device: torch.device, batches: Batches, repeats: int) -> Iterator[dict[str, float]]:
    """Run one workload several times. Prints a message if it does not fit on the device."""
    for _ in range(repeats):
        try:
            yield measured(way, toy, device, batches)
        except torch.cuda.OutOfMemoryError:
            print(f"{way}: out of memory", flush=True)
            return
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def check_waits(toy: bool, device: torch.device, batches: Batches) -> None:
    """Run the estimate; raises if adding a block synchronises with the device (CUDA's debug mode)."""
    plain = Streaming.add

    def watched(self: Streaming, name: str, x_TI: Tensor, g_TO: Tensor, weight: float) -> None:
        # Not for the first block of a layer, which makes random matrices.
        torch.cuda.set_sync_debug_mode("error" if name in self.streams else "default")
        try:
            plain(self, name, x_TI, g_TO, weight)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    Streaming.add = watched  # type: ignore[method-assign]
    try:
        ours(fresh(toy, device), batches[:3])
    finally:
        Streaming.add = plain  # type: ignore[method-assign]


def main(toy: bool, repeats: int, ways: Sequence[str]) -> None:
    """Measure the workloads, print the table and write the record."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if device.type != "cuda" and not toy:
        raise SystemExit("This benchmark needs a CUDA device. With --toy it runs on any machine, without a record.")
    length, count = (32, 8) if toy else (1024, 64)
    ids = torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(1)).to(device)
    batches = [{"input_ids": part, "labels": part} for part in ids.split(4)]
    if device.type == "cuda":
        check_waits(toy, device, batches)
    results: dict[str, Any] = {}
    for way in dict.fromkeys(["frozen pass", *ways]):
        each = list(runs(way, toy, device, batches, repeats))
        print(way, each, flush=True)
        results[way] = {key: statistics.median(run[key] for run in each) for key in each[0]} if each else None
    floor = results["frozen pass"]["seconds"]
    for way, found in results.items():
        shown = "out of memory" if found is None else f"{found['seconds']:8.2f} s  {found['seconds'] / floor:5.2f}"
        print(f"{way:14} {shown}" + (f"  {found['GB']:6.1f} GB" if found and "GB" in found else ""))
    if not toy:
        record.finish("gpu", {"gpu": torch.cuda.get_device_name(), "repeats": repeats, "results": results})


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a model of two small layers, on any machine; no record")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each workload (default: 3)")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), help="workloads to run, beside the frozen pass"
    )
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; it must be at least 1.")
    main(options.toy, options.repeats, options.ways)
