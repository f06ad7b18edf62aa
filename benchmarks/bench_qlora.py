"""A run in the style of QLoRA: MiniLM with an nf4 base on CoLA, LoRA and LoRA-GA, each with its best learning rate.

    LORA_GA_DATA=... python benchmarks/bench_qlora.py

4000 training rows, two passes over them in batches of 16 (500 steps); r = 8, s = α/√r, α = 16; AdamW without weight
decay, linear warm-up (10%) and decay. The new classification head trains in all runs, with a separate learning rate
that is not swept. The first seed chooses each method's learning rate (and γ for LoRA-GA) by the loss on 512 held-out
training rows. The best setting then runs with the other seeds, and is scored once on the validation set (Matthews
correlation).
About half an hour on one core.
"""

from __future__ import annotations

import json
import logging
import random
import statistics
import time
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

ROWS, HELD_OUT, SIZE, LENGTH, PASSES, SEEDS, HEAD_RATE = 4000, 512, 16, 32, 2, (0, 1), 1e-3
Choice = tuple[float | None, float]  # γ (None for plain LoRA) and the learning rate
METHODS: dict[str, tuple[Choice, ...]] = {
    "LoRA": ((None, 1e-4), (None, 3e-4), (None, 5e-4), (None, 1e-3)),
    "LoRA-GA": ((16.0, 3e-5), (16.0, 1e-4), (1024.0, 1e-4), (1024.0, 3e-4), (1024.0, 1e-3)),
}


def rows(part: str) -> list[dict[str, Any]]:
    """The sentences and labels of a split of CoLA."""
    return [json.loads(line) for line in record.data("data", "glue", "cola", f"{part}.jsonl").read_text().splitlines()]


def evaluate(model: nn.Module, batches: list[bench.Batch]) -> dict[str, float]:
    """The mean loss and the Matthews correlation, which is 0 if the model always predicts one class."""
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


def train(gamma: float | None, rate: float, seed: int, batches: list[bench.Batch]) -> nn.Module:
    """Train on the batches, in their order."""
    base = quantised(AutoModelForSequenceClassification, bench.minilm_folder(), ["classifier"], num_labels=2)
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 16, "use_rslora": True, "modules_to_save": ["classifier"]}
    model = get_peft_model(base, LoraConfig(**settings, target_modules=["query", "key", "value", "dense"]))
    if gamma is not None:
        lora_ga.initialize(model, batches, lora_ga.LoraGAConfig(stable_gamma=gamma, max_batches=16))
    model.train()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in named if "classifier" not in name], "lr": rate},
        {"params": [parameter for name, parameter in named if "classifier" in name], "lr": HEAD_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps, warm = len(batches), len(batches) // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm))
    )
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


class Runs:
    """The data, and the cells that have run."""

    def __init__(self) -> None:
        everything = rows("train")
        random.Random(0).shuffle(everything)
        self.held_out = bench.minilm_batches(everything[:HELD_OUT], size=64, length=LENGTH)
        self.validation = bench.minilm_batches(rows("validation"), size=64, length=LENGTH)
        self.rows = everything[HELD_OUT : HELD_OUT + ROWS]
        self.cells: list[dict[str, Any]] = []

    def batches(self, seed: int) -> list[bench.Batch]:
        """The batches of both passes, each pass in a different order."""
        made = []
        for turn in range(PASSES):
            order = random.Random(f"{seed} {turn}").sample(self.rows, len(self.rows))
            made += bench.minilm_batches(order, size=SIZE, length=LENGTH)
        return made

    def cell(self, method: str, choice: Choice, seed: int) -> tuple[dict[str, Any], nn.Module]:
        """Train, and evaluate on the held-out rows."""
        (gamma, rate), began = choice, time.perf_counter()
        model = train(gamma, rate, seed, self.batches(seed))
        settings = {"method": method, "gamma": gamma, "rate": rate, "seed": seed}
        seconds = round(time.perf_counter() - began)
        self.cells.append(settings | {"held out": evaluate(model, self.held_out), "seconds": seconds})
        print(self.cells[-1], flush=True)
        return self.cells[-1], model


def best_of(runs: Runs, method: str) -> dict[str, Any]:
    """Sweep with the first seed, and score the best choice with every seed on the validation set."""
    cells, models = zip(*(runs.cell(method, choice, SEEDS[0]) for choice in METHODS[method]), strict=True)
    index = min(range(len(cells)), key=lambda index: cells[index]["held out"]["loss"])
    gamma, rate = choice = METHODS[method][index]
    scores = [evaluate(models[index], runs.validation)]
    scores += [evaluate(runs.cell(method, choice, seed)[1], runs.validation) for seed in SEEDS[1:]]
    rates = [other for same, other in METHODS[method] if same == gamma]
    edge = rate in (min(rates), max(rates))
    best = {"gamma": gamma, "rate": rate, "at the edge of the grid": edge, "validation": scores}
    print(method, best, flush=True)
    return best


def main() -> None:
    """Sweep, choose, score, and write the record."""
    logging.disable(logging.WARNING)
    runs = Runs()
    best = {method: best_of(runs, method) for method in METHODS}
    settings = {"rows": ROWS, "passes": PASSES, "batch": SIZE, "seeds": SEEDS, "rate of the head": HEAD_RATE}
    record.finish(
        "qlora",
        {"model": "MiniLM-L6, nf4 with double quantisation", "data": "CoLA", "settings": settings}
        | {"cells": runs.cells, "best": best},
        also=["bitsandbytes"],
    )


if __name__ == "__main__":
    main()
