"""Does LoRA-GA converge faster? A real small Llama on a real text, every method at its own best learning rate.

    LORA_GA_DATA=... python benchmarks/bench_convergence.py

babyllama105 (0.94M parameters, trained on TinyStories) on tinyshakespeare, all linear layers, r = 8, 300 steps of
8 x 128 characters, AdamW without weight decay, cosine schedule with 3% warm-up. The text is cut into three parts:
training (90%), tuning (5%: picks each method's rate, on seed 0) and reporting (5%: all figures below). The rate grid is
in half decades and grows until its best lies inside. Data order and schedule are the same for all methods. About 40
minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from typing import Any

import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

import lora_ga
import record

RANK, ALPHA, LENGTH, ROWS, EVERY = 8, 16, 128, 8, 20
GRID = {  # exponents of 10^(1/2): -6 is 1e-3
    "full": [-7, -6, -5],
    "lora": [-6, -5, -4],
    "lora-ga γ=16": [-7, -6, -5],
    "lora-ga γ=1024": [-6, -5, -4],
    "peft lora_ga": [-6, -5, -4],
}


def rate(exponent: int) -> float:
    """The learning rate of a grid point, to three digits."""
    return float(f"{10 ** (exponent / 2):.3g}")


def rows(text: Tensor, order: torch.Generator) -> dict[str, Tensor]:
    """One random batch."""
    starts = torch.randint(0, len(text) - LENGTH, (ROWS,), generator=order)
    ids = torch.stack([text[start : start + LENGTH] for start in starts])
    return {"input_ids": ids, "labels": ids}


def held_out(text: Tensor) -> list[dict[str, Tensor]]:
    """64 rows at even distances."""
    starts = torch.linspace(0, len(text) - LENGTH, 64).long()
    ids = torch.stack([text[start : start + LENGTH] for start in starts])
    return [{"input_ids": part, "labels": part} for part in ids.split(16)]


def mean_loss(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """The loss over held-out rows."""
    model.eval()
    with torch.no_grad():
        loss = statistics.fmean(model(**batch).loss.item() for batch in batches)
    model.train()
    return loss


def build(method: str, base: nn.Module, batches: list[dict[str, Tensor]], seed: int) -> nn.Module:
    """The model that a method trains."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}
    if method == "full":
        return base.requires_grad_(True)
    if method == "lora":
        return get_peft_model(base, LoraConfig(**settings))
    if method == "peft lora_ga":
        names = [name.rpartition(".")[2] for name, m in base.named_modules() if isinstance(m, nn.Linear)]
        settings["target_modules"] = sorted(set(names) - {"lm_head"})  # "all-linear" is refused there
        config = LoraConfig(**settings, use_rslora=True, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

        def step() -> None:
            for batch in batches:
                base(**batch).loss.backward()

        preprocess_loraga(base, config, step)
        return get_peft_model(base, config)
    model = get_peft_model(base, LoraConfig(**settings, use_rslora=True))
    gamma = float(method.partition("=")[2])
    lora_ga.initialize(model, batches, lora_ga.LoraGAConfig(stable_gamma=gamma, seed=seed))
    return model


def run(method: str, learning_rate: float, seed: int, parts: dict[str, Tensor], steps: int) -> dict[str, Any]:
    """Train once."""
    base = AutoModelForCausalLM.from_pretrained(record.data("models", "babyllama105"))
    aside = torch.Generator().manual_seed(1000 + seed)
    model = build(method, base, [rows(parts["train"], aside) for _ in range(8)], seed).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.03 * steps), steps)
    report, order = held_out(parts["report"]), torch.Generator().manual_seed(seed)
    curve, training = [[0, mean_loss(model, report)]], []
    for step in range(1, steps + 1):
        loss = model(**rows(parts["train"], order)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        training.append(round(loss.item(), 5))
        if step % EVERY == 0:
            curve.append([step, mean_loss(model, report)])
    tune = mean_loss(model, held_out(parts["tune"]))
    result = {"method": method, "learning_rate": learning_rate, "seed": seed, "tune_loss": tune, "curve": curve}
    print(f"{method:16} lr {learning_rate:<8} seed {seed}  tune {tune:.4f}  report {curve[-1][1]:.4f}", flush=True)
    return result | {"training": training, "trained_parameters": sum(p.numel() for p in trained)}


def sweep(method: str, parts: dict[str, Tensor], steps: int) -> tuple[int, dict[int, dict[str, Any]]]:
    """Seed 0 over a grid that grows until its best is inside; returns the best exponent and the runs."""
    runs = {point: run(method, rate(point), 0, parts, steps) for point in GRID[method]}
    while True:
        finite = {point: r["tune_loss"] for point, r in runs.items() if r["tune_loss"] == r["tune_loss"]}
        best = min(finite, key=finite.__getitem__)
        edge = best - 1 if best == min(runs) else best + 1 if best == max(runs) else None
        if edge is None or len(runs) > 8:
            return best, runs
        runs[edge] = run(method, rate(edge), 0, parts, steps)


def steps_to(curve: list[list[float]], loss: float) -> float | None:
    """The step at which a curve, joined by straight lines, first falls to `loss`."""
    for (left, high), (right, low) in itertools.pairwise(curve):
        if low <= loss:
            return left + (right - left) * (high - loss) / (high - low) if high > loss else left
    return None


def summary(runs: list[dict[str, Any]], lora: list[dict[str, Any]]) -> dict[str, Any]:
    """Final losses and steps to LoRA's final loss, seed by seed."""
    finals = [r["curve"][-1][1] for r in runs]
    needed = [
        (steps_to(plain["curve"], plain["curve"][-1][1]), steps_to(r["curve"], plain["curve"][-1][1]))
        for r, plain in zip(runs, lora, strict=True)
    ]
    return {
        "learning_rate": runs[0]["learning_rate"],
        "start_loss": runs[0]["curve"][0][1],
        "final_loss": statistics.fmean(finals),
        "final_loss_stderr": statistics.stdev(finals) / len(finals) ** 0.5,
        "steps_to_lora_final": [mine for _, mine in needed],
        "lora_steps_over_own": [plain / mine if plain and mine else None for plain, mine in needed],
        "trained_parameters": runs[0]["trained_parameters"],
    }


def main() -> None:
    """Run all, print the table, keep the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(record.data("models", "babyllama105"))
    text = torch.tensor(tokenizer(record.data("data", "text", "tinyshakespeare.txt").read_text())["input_ids"])
    cut = [int(len(text) * share) for share in (0.9, 0.95)]
    parts = dict(zip(("train", "tune", "report"), text.tensor_split(cut), strict=True))
    sweeps, best = {}, {}
    for method in GRID:
        point, runs = sweep(method, parts, arguments.steps)
        sweeps[method] = sorted((r["learning_rate"], r["tune_loss"], r["curve"][-1][1]) for r in runs.values())
        more = [run(method, rate(point), seed, parts, arguments.steps) for seed in range(1, arguments.seeds)]
        best[method] = [runs[point], *more]
    table = {method: summary(runs, best["lora"]) for method, runs in best.items()}
    print(f"{'method':16} {'rate':>8} {'final loss':>17}  LoRA's steps to its final loss / own steps to it")
    for method, row in table.items():
        ratios = ", ".join("never" if x is None else f"{x:.2f}" for x in row["lora_steps_over_own"])
        final = f"{row['final_loss']:.4f} ± {row['final_loss_stderr']:.4f}"
        print(f"{method:16} {row['learning_rate']:>8} {final:>17}  {ratios}")
    record.finish("convergence", {"steps": arguments.steps, "table": table, "sweeps": sweeps, "runs": best})


if __name__ == "__main__":
    main()
