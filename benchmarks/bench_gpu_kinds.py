"""Checks our claims about 4-bit, 8-bit and compiled models on a GPU: a Llama of 1B parameters with random weights.

    python benchmarks/bench_gpu_kinds.py         # one GPU of 24 GB or more, and bitsandbytes
    python benchmarks/bench_gpu_kinds.py --toy   # the same script on any machine, with two small layers, no record

The models are in bfloat16, compiled bfloat16, bitsandbytes nf4 and int8, all with sdpa. On a GPU they run with the
FlashAttention kernel alone. The compiled one may also use the memory-efficient kernel, because Transformers gives it a
mask. A kind that fails is recorded with its error, and the others go on.

Measured for each: the alignment ratio of the start against the gradient that independent hooks compute in the same
model; the largest change of a logit at the start; the loss of one batch before and after five steps on it; and the
largest difference of a logit after the adapter is saved and loaded by stock PEFT on the base. r = 8, 8 batches of
4 x 256 tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import bench_alignment
import lora_ga
import record
from lora_ga.layers.targets import find_targets
from record import Batches, adapter

LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
TOY = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "bfloat16, compiled": {},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


def load(folder: str, kind: str, device: torch.device) -> nn.Module:
    """Load the saved model as one of the kinds."""
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": "sdpa", "device_map": device}
    if KINDS[kind]:
        settings["quantization_config"] = BitsAndBytesConfig(**KINDS[kind])
    model = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    if kind.endswith("compiled"):
        model.compile()
    return model


@contextlib.contextmanager
def hooked_gradients(model: PeftModel) -> Iterator[dict[str, Tensor]]:
    """Compute G = Σ gᵀx of every adapted layer in float32, with torch's hooks on the base layers.

    Yields:
        Layer → G, filled by the passes inside the context.
    """
    found: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    handles = []
    for name, target in find_targets(model).items():
        base = target.layer.get_base_layer()

        def keep(_: Any, args: tuple[Tensor], output: Tensor, name: str = name) -> None:
            inputs[name] = args[0].detach().flatten(0, -2).float()

            def add(g: Tensor) -> None:
                found[name] = found.get(name, 0) + g.flatten(0, -2).float().mT @ inputs[name]

            if output.requires_grad:
                output.register_hook(add)

        handles.append(base.register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def truth(model: PeftModel, batches: Batches) -> dict[str, Tensor]:
    """The gradient of every layer. The adapter's B is zero, so it does not change the result."""
    hook = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    with torch.compiler.set_stance("force_eager"), hooked_gradients(model) as found:
        for batch in batches:
            model(**batch).loss.backward()
    hook.remove()
    model.zero_grad()
    return found


def evaluating(model: nn.Module) -> nn.Module:
    """Put the model in evaluation mode, except 4-bit layers: after evaluation on some CPUs they pass no gradient on."""
    for module in model.modules():
        module.training = type(module).__name__ == "Linear4bit"
    return model


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits of one batch."""
    with torch.no_grad():
        return evaluating(model)(**batch).logits.float()


def steps(model: nn.Module, batch: dict[str, Tensor], count: int = 5) -> tuple[float, float]:
    """The loss of a batch before and after a few steps on it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for _ in range(count + 1):
        loss = model.train()(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses[0], losses[-1]


def measured(folder: str, kind: str, device: torch.device, batches: Batches) -> dict[str, Any]:
    """Measure everything for one kind."""
    model = get_peft_model(load(folder, kind, device), adapter())
    evaluating(model)
    gradients = truth(model, batches)
    before = logits(model, batches[0])
    estimate = lora_ga.initialize(model, batches)
    change = (logits(model, batches[0]) - before).abs().max().item()
    ratios = bench_alignment.by_formula(estimate, gradients)
    first, last = steps(model, batches[0])
    after = logits(model, batches[0])
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        again = PeftModel.from_pretrained(load(folder, kind, device), saved)
        reloaded = (logits(again, batches[0]) - after).abs().max().item()
    return {
        "alignment ratio, median": statistics.median(ratios),
        "alignment ratio, lowest": min(ratios),
        "largest change of a logit at the start": change,
        "loss before": first,
        "loss after five steps": last,
        "largest difference of a logit, reloaded": reloaded,
        "largest logit moved by training": (after - before).abs().max().item(),
    }


def kernels(kind: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The kernels of attention that a kind may use."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    masked = [SDPBackend.EFFICIENT_ATTENTION] if kind.endswith("compiled") else []
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, *masked])


def main(toy: bool) -> None:
    """Measure every kind, print the table and write the record."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if device.type != "cuda" and not toy:
        raise SystemExit("This benchmark needs a CUDA device. With --toy it runs on any machine, without a record.")
    torch.manual_seed(0)
    length, rows = (32, 2) if toy else (256, 4)
    ids = torch.randint(0, 256, (8 * rows, length), generator=torch.Generator().manual_seed(1)).to(device)
    batches = [{"input_ids": part, "labels": part} for part in ids.split(rows)]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(vocab_size=256 if toy else 32000, **(TOY if toy else LARGE))
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        for kind in KINDS:
            try:
                with kernels(kind, device):
                    results[kind] = measured(folder, kind, device, batches)
            except Exception as error:  # what the other kinds show is not lost
                results[kind] = {"failed": f"{type(error).__name__}: {error}"}
            print(kind, flush=True)
            for what, figure in results[kind].items():
                print(f"  {what:42} {figure if what == 'failed' else format(figure, '.6g')}", flush=True)
            if not toy:
                gpu = torch.cuda.get_device_name()
                record.finish("gpu_kinds", {"gpu": gpu, "results": results}, also=["bitsandbytes"])
    if any("failed" in result for result in results.values()):
        raise SystemExit("Some kinds failed; see above.")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a model of two small layers, on any machine; no record")
    main(parser.parse_args().toy)
