"""What the benchmarks share: paths of the research data, records with versions and device, the workloads compared."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_ga
from lora_ga.experiments.suites.grid import commit
from lora_ga.gradients.isolation import isolated

RESULTS = Path(__file__).parent / "results"


def about(also: Sequence[str] = ()) -> dict[str, Any]:
    """The command, commit, versions and device of a run. `also` names further packages whose versions are recorded."""
    names = ("torch", "transformers", "peft", *also)
    return {
        "command": "python " + " ".join(["benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "versions": {name: version_of(name) for name in names} | {"lora-ga": lora_ga.__version__},
        "python": platform.python_version(),
        "device": f"CPU, {os.cpu_count()} cores",
    }


def version_of(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def finish(name: str, record: dict[str, Any], also: Sequence[str] = ()) -> None:
    """Write the record to results/NAME.json, with what `about(also)` returns, and print it as the last line."""
    RESULTS.mkdir(exist_ok=True)
    whole = about(also) | record
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole))


def data(*parts: str) -> Path:
    """A path in the research data. Exits with a message if it does not exist."""
    root = os.environ.get("LORA_GA_DATA")
    if not root:
        sys.exit("Set LORA_GA_DATA to the folder of the research data (data/, models/) to run this benchmark.")
    path = Path(root).joinpath(*parts)
    if not path.exists():
        sys.exit(f"{path} does not exist. Set LORA_GA_DATA to a folder that contains it.")
    return path


# --- the workloads that the cost benchmarks compare: the frozen pass, the estimate, plain LoRA steps -----------------

RANK = 8
# PEFT's LoRA-GA does not support "all-linear". The names of Llama's layers, and of BERT's.
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "query", "key", "value", "dense"]
Batches = list[dict[str, Tensor]]


def adapter(**settings: Any) -> LoraConfig:
    """The configuration of the adapter, the same for every workload."""
    return LoraConfig(r=RANK, lora_alpha=16, use_rslora=True, target_modules=LINEAR, **settings)


def frozen_pass(base: nn.Module, batches: Batches) -> None:
    """Forward and backward passes with every weight frozen, back to the output of the embeddings: the lower bound."""
    model = get_peft_model(base, adapter())
    hook = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    with isolated(model, "default"):
        for batch in batches:
            model(**batch).loss.backward()
    hook.remove()


def ours(base: nn.Module, batches: Batches) -> None:
    """LoRA-GA: add the adapter, estimate, initialise."""
    lora_ga.initialize(get_peft_model(base, adapter()), batches)


def lora_steps(base: nn.Module, batches: Batches) -> None:
    """Training steps of plain LoRA with AdamW."""
    model = get_peft_model(base, adapter()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
