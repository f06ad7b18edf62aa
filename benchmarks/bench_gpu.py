"""Models on a GPU, large and small: seconds and peak memory of the estimate and of other workloads.

    python benchmarks/bench_gpu.py         # one GPU of 40 GB or more; reports what does not fit
    python benchmarks/bench_gpu.py --repeats 1 --ways "frozen pass" ours   # some workloads, each once
    python benchmarks/bench_gpu.py --models "width 768" MiniLM             # some models; the record keeps the others
    python benchmarks/bench_gpu.py --toy   # the same script on any machine, with small models and no record

r = 8, all linear layers, batches of four sequences. The models have random weights: a Llama-2-7B shape (bfloat16, 64
sequences of 1024 tokens, gradient checkpointing), a Llama of width 768 with 12 layers (float32, 64 sequences of 512
tokens), and a MiniLM shape with two classes (BERT of width 384 with 6 layers, float32, 64 sequences of 128 tokens).
Before the timing, each estimate runs once in CUDA's synchronisation debug mode: there, any synchronisation of the host
with the device raises an error while a block is added.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights
from peft import LoraGAConfig as PeftLoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import record
from lora_ga.linalg.streaming import Streaming
from record import Batches, adapter, frozen_pass, lora_steps, ours

TOY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
SEVEN_B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
WIDTH_768 = SEVEN_B | {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}


class Model(NamedTuple):
    """A model to measure: how it is made, and how long its sequences are."""

    make: Callable[[bool, torch.device], nn.Module]
    length: int
    classes: int | None = None


def llama(settings: Mapping[str, int], dtype: torch.dtype, toy: bool, device: torch.device) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**(TOY if toy else settings))).to(dtype).eval()


def seven_b(toy: bool, device: torch.device) -> LlamaForCausalLM:
    """A Llama-2-7B shape in bfloat16, with gradient checkpointing."""
    model = llama(SEVEN_B, torch.bfloat16, toy, device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def minilm(toy: bool, device: torch.device) -> BertForSequenceClassification:
    """A MiniLM shape with two classes."""
    torch.manual_seed(0)
    with torch.device(device):
        return BertForSequenceClassification(BertConfig(**(TOY if toy else MINILM))).eval()


MODELS = {
    "Llama-2-7B shape": Model(seven_b, 1024),
    "width 768": Model(functools.partial(llama, WIDTH_768, torch.float32), 512),
    "MiniLM": Model(minilm, 128, classes=2),
}


def batches_of(model: Model, toy: bool, device: torch.device) -> Batches:
    """Sixteen batches of four random sequences; two short ones for the toy."""
    count, length = (8, 32) if toy else (64, model.length)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (count, length), generator=draw)
    labels = ids if model.classes is None else torch.randint(0, model.classes, (count,), generator=draw)
    parts = zip(ids.to(device).split(4), labels.to(device).split(4), strict=True)
    return [{"input_ids": x, "labels": y} for x, y in parts]


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


def measured(way: str, model: Model, toy: bool, device: torch.device, batches: Batches) -> dict[str, float]:
    """The seconds and the peak memory in GB of one workload on a fresh model."""
    base = model.make(toy, device)
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


def runs(
    way: str, model: Model, toy: bool, device: torch.device, batches: Batches, repeats: int
) -> Iterator[dict[str, float]]:
    """Run one workload several times. Prints a message if it does not fit on the device."""
    for _ in range(repeats):
        try:
            yield measured(way, model, toy, device, batches)
        except torch.cuda.OutOfMemoryError:
            print(f"{way}: out of memory", flush=True)
            return
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def check_waits(model: Model, toy: bool, device: torch.device, batches: Batches) -> None:
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
        ours(model.make(toy, device), batches[:3])
    finally:
        Streaming.add = plain  # type: ignore[method-assign]


def table(model: Model, toy: bool, device: torch.device, repeats: int, ways: Sequence[str]) -> dict[str, Any]:
    """Measure the workloads of one model, and print their table."""
    batches = batches_of(model, toy, device)
    if device.type == "cuda":
        try:
            check_waits(model, toy, device, batches)
        except torch.cuda.OutOfMemoryError:
            print("ours: out of memory, so whether it waits for the device was not checked", flush=True)
    results: dict[str, Any] = {}
    for way in dict.fromkeys(["frozen pass", *ways]):
        if way == "peft eva" and model.classes is not None:
            continue  # EVA takes sequences, and MiniLM's pooler sees one vector a row
        each = list(runs(way, model, toy, device, batches, repeats))
        results[way] = {key: statistics.median(run[key] for run in each) for key in each[0]} if each else None
    floor = results["frozen pass"]["seconds"]
    for way, found in results.items():
        shown = "out of memory" if found is None else f"{found['seconds']:8.2f} s  {found['seconds'] / floor:5.2f}"
        print(f"{way:14} {shown}" + (f"  {found['GB']:6.1f} GB" if found and "GB" in found else ""), flush=True)
    return results


def main(toy: bool, repeats: int, ways: Sequence[str], models: Sequence[str]) -> None:
    """Measure the models, print their tables and write the record."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if device.type != "cuda" and not toy:
        raise SystemExit("This benchmark needs a CUDA device. With --toy it runs on any machine, without a record.")
    path = record.RESULTS / "gpu.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    for name in models:
        print(f"\n{name}", flush=True)
        gpu = torch.cuda.get_device_name() if device.type == "cuda" else "none"
        results[name] = {"gpu": gpu, "repeats": repeats, "ways": table(MODELS[name], toy, device, repeats, ways)}
    if not toy:
        record.finish("gpu", {"results": results})


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="small models, on any machine; no record")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each workload (default: 3)")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), help="workloads to run, beside the frozen pass"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="models to measure")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; it must be at least 1.")
    main(options.toy, options.repeats, options.ways, options.models)
