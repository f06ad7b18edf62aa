"""The record of a finished run."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from lora_ga.adapter.model_card import front_matter, section_of
from lora_ga.cli.options import Job
from lora_ga.experiments.records.runs import NOT_A_RESULT, SCHEMA

PACKAGES = {"lora_ga": "lora-ga", "torch": "torch", "transformers": "transformers", "peft": "peft"}


def curve(history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The logged training losses. Each value is the mean over the steps since the entry before."""
    keys = ("step", "loss", "learning_rate")
    return [{key: entry[key] for key in keys} for entry in history if "loss" in entry]


def evaluations(history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The evaluations in order of steps, without timings. The last evaluation of a step counts."""
    by_step = {
        entry["step"]: {
            "step": entry["step"],
            **{key: value for key, value in entry.items() if key.startswith("eval_") and not NOT_A_RESULT.search(key)},
        }
        for entry in history
        if "eval_loss" in entry
    }
    return [by_step[step] for step in sorted(by_step)]


def mean_loss(points: Sequence[Mapping[str, float]]) -> float:
    """The mean training loss over all steps."""
    total, before = 0.0, 0.0
    for point in points:
        total += point["loss"] * (point["step"] - before)
        before = point["step"]
    return total / before


def device_name(device: torch.device) -> str:
    """The name of the device in records."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def run_record(
    job: Job,
    *,
    dataset: str,
    history: Sequence[Mapping[str, Any]],
    steps: int,
    trainable_parameters: int,
    device: torch.device,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Makes the record of a run, with everything that `lora-ga compare` needs.

    Args:
        job: The options.
        dataset: Where the training data came from.
        history: The trainer's log, with the part before an interruption.
        steps: Number of optimizer steps.
        trainable_parameters: Number of trained values.
        device: The device of the run.
        seconds: Durations of "estimate", "train" and "total".

    Returns:
        The record, as JSON values.
    """
    adapted = job.training.method != "full"
    points, evals = curve(history), evaluations(history)
    last = {key: value for key, value in evals[-1].items() if key != "step"} if evals else {}
    return {
        "schema": SCHEMA,
        "name": job.training.run_name or job.training.method,
        "method": job.training.method,
        "task": job.model.task,
        "model": job.model.model,
        "dataset": dataset,
        "seed": job.model.seed,
        "learning_rate": job.training.learning_rate,
        "rank": job.target.rank if adapted else None,
        "alpha": job.adapter.alpha if adapted else None,
        "steps": steps,
        "trainable_parameters": trainable_parameters,
        "config": job.options(),
        "versions": {name: version(package) for name, package in PACKAGES.items()},
        "device": device_name(device),
        "commit": None,
        "curve": points,
        "eval": evals,
        "metrics": {**last, "train_loss": mean_loss(points)},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


# Method -> what it is, in a model card.
METHOD_TEXTS = {
    "lora-ga": "LoRA, started by [LoRA-GA](https://arxiv.org/abs/2407.05000) from the loss gradient",
    "lora": "LoRA",
    "full": "full fine-tuning",
}


def model_card(record: Mapping[str, Any], old: str, code: str) -> str:
    """The model card of a result, in place of PEFT's empty form.

    Args:
        record: The record of the run.
        old: The card that PEFT wrote, or an empty text. Its header and the section of LoRA-GA are kept.
        code: Python code that uses the result.

    Returns:
        The card, in Markdown.
    """
    config, adapted = record["config"], record["method"] != "full"
    header, _ = front_matter(old)
    size = config["batch_size"] * config["gradient_accumulation_steps"]
    facts = {
        "base model": f"`{record['model']}`" + (" in 4 bits" if config["load_in_4bit"] else ""),
        "task": record["task"],
        "training data": f"`{record['dataset']}`",
        "method": METHOD_TEXTS[record["method"]],
        "rank, alpha": f"{record['rank']}, {record['alpha']:g}" if adapted else "",
        "learning rate": f"{record['learning_rate']:g}, {config['lr_scheduler_type']}",
        "steps": f"{record['steps']}, of {size} examples each",
        "precision": config["dtype"],
        "seed": str(record["seed"]),
        "trained parameters": f"{record['trainable_parameters']:,}",
        "versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in facts.items() if text)]
    results = [f"| {name} | {value:.4g} |" for name, value in record["metrics"].items()]
    parts = [
        f"# {record['name']}: {'an adapter for' if adapted else 'fine-tuned from'} {record['model']}",
        "\n".join(lines),
        "## Results\n\n| metric | value |\n|---|---|\n" + "\n".join(results),
        "## Use\n\n```python\n" + code.replace("; ", "\n") + "\n```",
        section_of(old),
    ]
    return header + "\n" * bool(header) + "\n\n".join(part for part in parts if part) + "\n"


def usage(record: dict[str, Any], folder: str) -> str:
    """Python code that uses the result of a run on one text. Its texts are in double quotes, for shells."""
    full, place, text = record["method"] == "full", json.dumps(folder), '"Hello"'
    if record["config"].get("messages_column"):
        text = '[{"role": "user", "content": "Hello"}]'
    load = "import transformers" if full else "import lora_ga; import transformers"
    model = place if full else f"lora_ga.load({place}).merge_and_unload()"
    if record["task"] == "seq2seq":
        model = f"transformers.AutoModelForSeq2SeqLM.from_pretrained({place})" if full else model
        tokenizer = f"transformers.AutoTokenizer.from_pretrained({place})"
        answer = f'tokenizer.decode(model.generate(**tokenizer({text}, return_tensors="pt"))[0])'
        return f"{load}; model = {model}; tokenizer = {tokenizer}; print({answer})"
    classifies = record["task"] == "seq-cls"
    kind, length = ("text-classification", "") if classifies else ("text-generation", ", max_new_tokens=30")
    return f'{load}; print(transformers.pipeline("{kind}", {model}, tokenizer={place})({text}{length}))'
