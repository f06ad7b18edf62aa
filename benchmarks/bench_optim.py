"""What does a training step cost with the optimizers of `lora_ga.experiments.optim`, beside one with AdamW?

    python benchmarks/bench_optim.py                    # four minutes, in one thread
    python benchmarks/bench_optim.py --device cuda      # on a GPU; writes results/optim_cuda.json

A MiniLM shape with random weights and LoRA-GA of rank 8 on all linear layers. A step is a forward and a backward pass
over 16 sequences, and the optimizer's step. Every optimizer steps the same model in turn, with a rate of zero, so that
all do the same work. The ratio of each to AdamW is taken round by round, and so is the share of the step that the
optimizer itself takes; the record has the medians. On a CPU the times are process times.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch.optim import Optimizer

import bench_gpu
import lora_ga
import record
from lora_ga.experiments import optim

ROWS, LENGTHS, ROUNDS = 16, (64, 128), 15
OPTIMIZERS = (optim.ScaledSGD, optim.ScaledAdamW, optim.LoRATSD, optim.LoRAMuon, optim.PoLoRA)


def batch_of(length: int, device: str) -> dict[str, torch.Tensor]:
    """Random tokens and labels."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (ROWS, length), generator=draw)
    labels = torch.randint(0, 2, (ROWS,), generator=draw)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def seconds(model: nn.Module, optimizer: Optimizer, batch: dict[str, torch.Tensor], device: str) -> tuple[float, float]:
    """Time one training step, and the optimizer's part of it: process time on a CPU, time on the clock with a GPU."""

    def now() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    begun = now()
    model(**batch).loss.backward()
    passed = now()
    optimizer.step()
    stepped = now()
    optimizer.zero_grad()
    return now() - begun, stepped - passed


def ratios(length: int, device: str) -> dict[str, Any]:
    """The time of a step with each optimizer over that with AdamW."""
    model = get_peft_model(bench_gpu.minilm(False, torch.device(device)), record.adapter())
    batch = batch_of(length, device)
    lora_ga.initialize(model, [batch])
    model.train()
    adamw = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.0)
    made: dict[str, Optimizer] = {"AdamW": adamw}
    made |= {rule.__name__: rule(optim.param_groups(model), lr=0.0) for rule in OPTIMIZERS}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for turn in range(ROUNDS + 2):
        for name, optimizer in made.items():
            spent = seconds(model, optimizer, batch, device)
            if turn >= 2:  # the first rounds make the state
                runs[name].append(spent)
    result = {}
    for name, found in runs.items():
        over = statistics.median(own / other for (own, _), (other, _) in zip(found, runs["AdamW"], strict=True))
        share = statistics.median(part / whole for whole, part in found)
        result[name] = {"over AdamW": over, "share of the optimizer": share, "seconds": found}
        print(f"{length:3} tokens, {name:12} {over:6.3f} of a step with AdamW; itself {share:.1%} of it", flush=True)
    return result


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to compute")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    costs = {str(length): ratios(length, device) for length in LENGTHS}
    where = {"device": torch.cuda.get_device_name()} if device == "cuda" else {}
    record.finish(
        "optim" if device == "cpu" else "optim_cuda", {"rows": ROWS, "rank": record.RANK, "tokens": costs, **where}
    )
