"""A QLoRA-style run: MiniLM with an nf4 base on CoLA, LoRA and LoRA-GA, each with its best learning rate.

    LORA_GA_DATA=... python benchmarks/bench_qlora.py

r = 8, s = α/√r, α = 16, γ = 16, AdamW without weight decay, linear warm-up (10%) and decay, batches of 16. The rate
is chosen by the loss on training rows that are held out; the chosen rate's adapters are then scored once on the
validation set (Matthews correlation). The classification head trains in both. About 15 minutes on one core.
"""

from __future__ import annotations

import json
import logging
import math
import random
import statistics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from sklearn.metrics import matthews_corrcoef
from torch import nn
from transformers import AutoModelForSequenceClassification

import bench_alignment as bench
import lora_ga
import record
from bench_quantised import in_training_layout, quantised

STEPS, SIZE, SEEDS, HELD_OUT = 240, 16, (0,), 512
RATES = {"lora-ga": (3e-4, 1e-3, 3e-3), "lora": (1e-3, 3e-3, 1e-2)}


def rows(part: str) -> list[dict[str, Any]]:
    """Sentences and labels of a part of CoLA."""
    return [json.loads(line) for line in record.data("data", "glue", "cola", f"{part}.jsonl").read_text().splitlines()]


def evaluate(model: nn.Module, batches: list[bench.Batch]) -> dict[str, float]:
    """Mean loss and Matthews correlation."""
    model.eval()
    in_training_layout(model)
    losses, guesses, labels = [], [], []
    with torch.no_grad():
        for batch in batches:
            output = model(**batch)
            losses += [output.loss.item()] * len(batch["labels"])
            guesses += output.logits.argmax(-1).tolist()
            labels += batch["labels"].tolist()
    return {"loss": statistics.fmean(losses), "matthews": float(matthews_corrcoef(labels, guesses))}


def train(method: str, rate: float, seed: int, batches: list[bench.Batch]) -> nn.Module:
    """One run."""
    base = quantised(AutoModelForSequenceClassification, bench.minilm_folder(), ["classifier"], num_labels=2)
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 16, "use_rslora": True, "modules_to_save": ["classifier"]}
    model = get_peft_model(base, LoraConfig(**settings, target_modules=["query", "key", "value", "dense"]))
    if method == "lora-ga":
        lora_ga.initialize(model, batches[:8])
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    warm = STEPS // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (STEPS - step) / (STEPS - warm))
    )
    for batch in batches[:STEPS]:
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def main() -> None:
    """Sweep, choose, score, and keep the record."""
    logging.disable(logging.WARNING)
    everything = rows("train")
    random.Random(0).shuffle(everything)
    held_out = bench.minilm_batches(everything[:HELD_OUT], size=64, length=32)
    validation = bench.minilm_batches(rows("validation"), size=64, length=32)
    cells, models = [], {}
    for seed in SEEDS:
        order = everything[HELD_OUT:]
        random.Random(1 + seed).shuffle(order)
        batches = bench.minilm_batches(order[: STEPS * SIZE], size=SIZE, length=32)
        for method, rates in RATES.items():
            for rate in rates:
                models[method, rate, seed] = train(method, rate, seed, batches)
                cells.append(
                    {"method": method, "rate": rate, "seed": seed}
                    | {"held out": evaluate(models[method, rate, seed], held_out)}
                )
                print(cells[-1], flush=True)
    best = {}
    for method, rates in RATES.items():
        means = {
            rate: statistics.fmean(c["held out"]["loss"] for c in cells if c["method"] == method and c["rate"] == rate)
            for rate in rates
        }
        rate = min(means, key=lambda rate: means[rate] if math.isfinite(means[rate]) else math.inf)
        scores = [evaluate(models[method, rate, seed], validation) for seed in SEEDS]
        best[method] = {"rate": rate, "at the edge of the grid": rate in (min(rates), max(rates)), "validation": scores}
        print(method, best[method])
    record.finish(
        "qlora",
        {"model": "MiniLM-L6, nf4 with double quantisation", "data": "CoLA", "steps": STEPS, "cells": cells}
        | {"best": best},
        also=["bitsandbytes"],
    )


if __name__ == "__main__":
    main()
