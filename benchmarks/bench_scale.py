"""What do several processes add to the cost of an estimate? Bytes and merges, measured.

python benchmarks/bench_scale.py

Measured: a Llama of width 512 on random tokens in 1, 2 and 4 processes (gloo, one thread each, one machine); the
directions that as many processes find on babyllama105 with tinyshakespeare, each with its share of the batches or,
under a tensor-parallel plan, with its part of every layer (needs LORA_GA_DATA); and the merge of one layer of the sizes
of published models. The tables of docs/scale.md are drawn from the record, those of larger models by formulas from it.
"""

from __future__ import annotations

import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import bench_alignment
import lora_ga
from lora_ga import LoraGAConfig
from lora_ga.distributed.processes import Processes
from lora_ga.linalg.low_rank import merge_factors
from record import data, finish

RANK, BATCHES, ROWS, LENGTH = 8, 16, 4, 128
CONFIG = LoraGAConfig()
HELD = 2 * RANK + CONFIG.oversample
PART = 2 * RANK + 2 * CONFIG.oversample  # directions that each of several processes keeps until all are merged
# (d_out, d_in) of linear layers of Llama-2-7B, Llama-3.1-70B and Llama-3.1-405B.
LAYERS = ((4096, 4096), (11008, 4096), (8192, 8192), (28672, 8192), (16384, 16384), (53248, 16384))


def model() -> Any:
    """A Llama of width 512 with an adapter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return get_peft_model(LlamaForCausalLM(config).eval(), LoraConfig(r=RANK, target_modules="all-linear"))


def batches() -> list[dict[str, Tensor]]:
    """Batches of random tokens, the same in every process."""
    ids = torch.randint(512, (BATCHES, ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": each, "labels": each} for each in ids]


def loopback() -> int:
    """The bytes that this machine has sent to itself; 0 if the system does not count them."""
    file = Path("/proc/net/dev")
    lines = [line for line in file.read_text().splitlines() if line.strip().startswith("lo:")] if file.exists() else []
    return int(lines[0].split(":")[1].split()[8]) if lines else 0


def work(rank: int, size: int, folder: str) -> None:
    """Run one process on its share, and measure the time and the bytes of every exchange."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    spent, sent = {"merge": 0.0, "share": 0.0, "gather": 0.0}, {"factors": 0, "values": 0}

    def timed(name: str) -> None:
        original = getattr(Processes, name)

        def wrapped(self: Processes, *args: Any) -> Any:
            began = time.perf_counter()
            result = original(self, *args)
            spent[name] += time.perf_counter() - began
            return result

        setattr(Processes, name, wrapped)

    for name in spent:
        timed(name)
    send, gather = dist.send, dist.all_gather_object

    def counted_send(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent["factors"] += tensor.nbytes
        return send(tensor, *args, **kwargs)

    def counted_gather(values: list[Any], value: Any, *args: Any, **kwargs: Any) -> Any:
        sent["values"] += len(pickle.dumps(value)) * (size - 1)
        return gather(values, value, *args, **kwargs)

    dist.send, dist.all_gather_object = counted_send, counted_gather
    adapted, mine = model(), batches()[rank::size]
    dist.barrier()
    before, began = loopback(), time.perf_counter()
    lora_ga.estimate_gradients(adapted, mine)
    seconds = time.perf_counter() - began
    dist.barrier()
    torch.save(
        {"seconds": seconds, "spent": spent, "sent": sent, "loopback": loopback() - before}, f"{folder}/{rank}.pt"
    )
    dist.destroy_process_group()


def together(size: int) -> dict[str, Any]:
    """The time that `size` processes need and the bytes that they send."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (size, folder), size)
        found = [torch.load(f"{folder}/{rank}.pt") for rank in range(size)]
    shapes = [(module.out_features, module.in_features) for module in layers(model())]
    bound = 2 * (size - 1).bit_length() * sum((o + i) * HELD * 4 for o, i in shapes)
    return {
        "seconds": max(each["seconds"] for each in found),
        "merge": max(each["spent"]["merge"] for each in found),
        "share": max(each["spent"]["share"] for each in found),
        "small values": max(each["spent"]["gather"] for each in found),
        "most bytes sent, factors": max(each["sent"]["factors"] for each in found),
        "most bytes sent, small values": max(each["sent"]["values"] for each in found),
        "bound": bound,
        "all bytes counted": sum(sum(each["sent"].values()) for each in found),
        "all bytes through the loopback device": max(each["loopback"] for each in found),
    }


def directions(rank: int, size: int, folder: str, plan: bool) -> None:
    """Run one process of an estimate on a pretrained model, with both estimators. One process alone has no group."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    found, (adapted, all_batches) = {}, pretrained(size if plan else 1)
    for estimator in ("streaming", "dense"):
        config = LoraGAConfig(estimator=estimator, oversample=CONFIG.oversample)
        estimate = lora_ga.estimate_gradients(adapted, all_batches if plan else all_batches[rank::size], config)
        found[estimator] = {name: (part.U, part.S, part.V) for name, part in estimate.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    if size > 1:
        dist.destroy_process_group()


def pretrained(split: int = 1) -> tuple[Any, list[dict[str, Tensor]]]:
    """babyllama105 with an adapter, split over `split` processes, and 16 batches of tinyshakespeare."""
    folder = data("models", "babyllama105")
    text = data("data", "text", "tinyshakespeare.txt").read_text()
    settings = {"distributed_config": DistributedConfig(tp_size=split)} if split > 1 else {}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()
    adapted = get_peft_model(base, LoraConfig(r=RANK, target_modules="all-linear"))
    return adapted, bench_alignment.causal_batches(folder, text, count=BATCHES, length=64)


def accuracy() -> dict[str, Any]:
    """How the directions of several processes align, and how they differ from those of one."""
    adapted, all_batches = pretrained()
    truth = bench_alignment.gradients(adapted.unload(), all_batches)
    ways, found = {"1": (1, False), "2": (2, False), "4": (4, False), "2, tensor parallel": (2, True)}, {}
    for way, (size, plan) in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(directions, (size, folder, plan), size)
            found[way] = torch.load(f"{folder}/0.pt")
    rows: dict[str, Any] = {}
    for estimator in ("streaming", "dense"):
        one = found["1"][estimator]
        for way in found:
            many = found[way][estimator]
            ratios = {name: ratio(many[name], truth[name]) for name in one}
            alone = {name: ratio(one[name], truth[name]) for name in one}
            cosines = [cosine(one[name][side], many[name][side]) for name in one for side in (0, 2)]
            rows[f"{estimator}, {way}"] = {
                "median": statistics.median(ratios.values()),
                "lowest": min(ratios.values()),
                "largest loss of a layer": max(alone[name] - ratios[name] for name in one),
                "lowest cosine": min(cosines),
                "median cosine": statistics.median(cosines),
            }
    rows["smallest gap"] = min(float(s[2 * RANK - 1] / s[2 * RANK]) for _, s, _ in found["1"]["dense"].values())
    return rows


def cosine(one: Tensor, other: Tensor) -> float:
    """The lowest cosine of the principal angles between the spans of the first 2r columns."""
    return torch.linalg.svdvals(one[:, : 2 * RANK].mT @ other[:, : 2 * RANK]).min().item()


def ratio(part: tuple[Tensor, ...], gradient: Tensor) -> float:
    """The alignment ratio of a start."""
    a, b = part[2][:, :RANK].mT, part[0][:, RANK : 2 * RANK]
    step = gradient @ a.mT @ a + b @ b.mT @ gradient
    values = torch.linalg.svdvals(gradient)
    limit = (values[: 2 * RANK].square().sum() / values.square().sum()).sqrt()
    return float((step * gradient).sum() / step.norm() / gradient.norm() / limit)


def layers(adapted: Any) -> list[Any]:
    """The LoRA layers of a model."""
    return [module for module in adapted.modules() if hasattr(module, "lora_A")]


def merge_seconds(outputs: int, inputs: int) -> float:
    """The seconds that merging two estimates of a layer takes on one thread, median of 3."""
    draw = torch.Generator().manual_seed(0)

    def part() -> tuple[Tensor, Tensor, Tensor]:
        u, v = (torch.linalg.qr(torch.randn(rows, PART, generator=draw)).Q for rows in (outputs, inputs))
        return u, torch.linspace(2, 1, PART), v

    parts, taken = [part(), part()], []
    for _ in range(3):
        began = time.perf_counter()
        merge_factors(parts, PART)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def alone() -> Mapping[str, float]:
    """Time the same estimate without a process group."""
    adapted, mine = model(), batches()
    began = time.perf_counter()
    lora_ga.estimate_gradients(adapted, mine)
    return {"seconds": time.perf_counter() - began}


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    record: dict[str, Any] = {
        "rank": RANK,
        "held": HELD,
        "held by a part": PART,
        "batches": BATCHES,
        "tokens in a batch": ROWS * LENGTH,
        "processes": {"1": alone()} | {str(size): together(size) for size in (2, 4)},
        "accuracy": accuracy(),
        "merge of one layer": [
            {"shape": [o, i], "seconds": merge_seconds(o, i), "numbers": (o + i) * PART} for o, i in LAYERS
        ],
    }
    for size, row in record["processes"].items():
        print(size, {name: round(value, 4) for name, value in row.items()})
    for name, row in record["accuracy"].items():
        print(name, row)
    for row in record["merge of one layer"]:
        print(row)
    finish("scale", record)
