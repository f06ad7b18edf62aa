"""LoRA-GA on 4-bit bases (bitsandbytes nf4): which gradient is estimated, and what does the start change?

    LORA_GA_DATA=... python benchmarks/bench_quantised.py

Three pretrained models in nf4. Measured for each: the alignment ratio (see bench_alignment.py) of one SGD step against
the gradient of the 4-bit model (by autograd, in a model with the same numbers in plain layers); by the formula, against
the gradient of the full-precision model; the largest change of the logits at the start; and the bytes that the estimate
keeps for its backward pass, beside those in full precision. r = 8, 16 batches of 8 rows, s = α/√r. About 5 minutes on
one core.
"""

from __future__ import annotations

import functools
import json
import logging
import statistics
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

import bench_alignment as bench
import lora_ga
import record
from lora_ga.layers.kinds import base_weights
from lora_ga.layers.targets import find_targets

BATCHES = 16
Make = Callable[[], nn.Module]


def quantised(kind: Any, folder: Any, skip: list[str], **settings: Any) -> nn.Module:
    """A pretrained model in nf4, except the modules in `skip`. A new head is the same in every call."""
    torch.manual_seed(0)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=skip
    )
    return kind.from_pretrained(folder, quantization_config=config, device_map="cpu", **settings).eval()


def pretrained(folder: Any) -> nn.Module:
    """A causal language model in full precision."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def adapted(base: nn.Module, targets: list[str]) -> Any:
    """Add a fresh adapter to the base."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": bench.RANK, "lora_alpha": 16, "use_rslora": True, "target_modules": targets}
    return get_peft_model(base, LoraConfig(**settings)).eval()


def in_training_layout(model: nn.Module) -> None:
    """Put 4-bit layers in training mode. In evaluation mode some CPUs pack them, and they pass no gradient on."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = True


def dequantised(base: nn.Module, model: Any) -> nn.Module:
    """Copy the weights of a 4-bit model into a full-precision base."""
    for name, target in find_targets(model).items():
        base.get_submodule(name).weight.data = base_weights(target.layer)[0].detach().float()
    return base


def saved_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """The bytes that the estimate keeps for its backward pass, each storage once, without the weights of the model."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_ga.estimate_gradients(model, [batch])
    return sum(kept.values())


def ratios(truth: dict[str, Tensor], estimate: lora_ga.GradientEstimate) -> dict[str, float]:
    """The alignment ratio of each layer, by the formula cos(G AᵀA + B BᵀG, G) over its limit."""
    return dict(zip(estimate, bench.by_formula(estimate, truth), strict=True))


def measure(name: str, make: Make, make_4bit: Make, batches: list[bench.Batch], targets: list[str]) -> dict[str, Any]:
    """Measure everything on one model."""
    model = adapted(make_4bit(), targets)
    in_training_layout(model)
    truth_4bit = bench.gradients(dequantised(make(), model), batches)
    truth_full = bench.gradients(make(), batches)
    with torch.no_grad():
        before = model(**batches[0]).logits
    saved = {"nf4": saved_bytes(model, batches[0]), "full": saved_bytes(adapted(make(), targets), batches[0])}
    estimate = lora_ga.initialize(model, batches)
    with torch.no_grad():
        change = (model(**batches[0]).logits - before).abs().max().item()
    found = bench.alignment_ratios(model, truth_4bit, batches, bench.RANK)
    full = ratios(truth_full, estimate)
    cosines = {
        layer: torch.nn.functional.cosine_similarity(truth_4bit[layer].flatten(), truth_full[layer].flatten(), 0).item()
        for layer in found
    }
    print(f"\n{name}: {len(found)} layers")
    print(
        f"alignment ratio, the 4-bit model's gradient: median {statistics.median(found.values()):.5f}, "
        f"lowest {min(found.values()):.5f}"
    )
    print(
        f"                 the full-precision model's: median {statistics.median(full.values()):.5f}, "
        f"lowest {min(full.values()):.5f}"
    )
    print(f"largest change of a logit at the start: {change:.1e}")
    print(f"kept for the backward pass: {saved['nf4']:,} bytes in nf4, {saved['full']:,} in full precision")
    print(f"{'layer':58} {'4-bit':>8} {'full':>8} {'cosine of the two gradients':>28}")
    for layer in found:
        print(f"{layer:58} {found[layer]:8.4f} {full[layer]:8.4f} {cosines[layer]:28.4f}")
    return {
        "against the 4-bit model": {
            "median": statistics.median(found.values()),
            "lowest": min(found.values()),
            "layers": found,
        },
        "against the full-precision model": {
            "median": statistics.median(full.values()),
            "lowest": min(full.values()),
            "layers": full,
            "cosine of the gradients": cosines,
        },
        "largest change of a logit": change,
        "bytes kept for the backward pass": saved,
    }


def main() -> None:
    """Measure the models and write the record."""
    logging.disable(logging.WARNING)
    rows = [json.loads(line) for line in record.data("data", "glue", "mrpc", "train.jsonl").read_text().splitlines()]
    text = record.data("data", "text", "tinyshakespeare.txt").read_text()
    results = {}
    make_4bit: Make = functools.partial(
        quantised, AutoModelForSequenceClassification, bench.minilm_folder(), ["classifier"], num_labels=2
    )
    batches = bench.minilm_batches(rows[: 8 * BATCHES])
    name = "MiniLM-L6 on MRPC"
    results[name] = measure(name, bench.minilm, make_4bit, batches, ["query", "key", "value", "dense"])
    for short in ("stories260k", "babyllama105"):
        folder = record.data("models", short)
        make = functools.partial(pretrained, folder)
        make_4bit = functools.partial(quantised, AutoModelForCausalLM, folder, ["lm_head"])
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        name = f"{short} on tinyshakespeare"
        results[name] = measure(name, make, make_4bit, bench.causal_batches(folder, text, BATCHES), targets)
    record.finish("quantised", {"rank": bench.RANK, "batches": BATCHES, "models": results}, also=["bitsandbytes"])


if __name__ == "__main__":
    main()
