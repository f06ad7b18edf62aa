"""Writes a golden set: files of every format as one version of the code writes them, and the numbers they must give.

    python tests/golden_set.py tests/golden/0.2.tar.gz

makes the set of the installed version. Make one in every commit that changes a format, and add its row to `SETS` in
tests/test_golden.py. Sets are never made again. The sets of old code were written by this script too:

    git worktree add /tmp/old COMMIT
    PYTHONPATH=/tmp/old/src python tests/golden_set.py tests/golden/NAME.tar.gz --without store

Models have width 16, so that a set takes less than 300 KB. Every path in a set is relative to its folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lora_ga
from lora_ga import LoraGAConfig
from lora_ga.cli.main import main as command

WORDS = ["[PAD]", "[UNK]", "</s>", *"abcdefghijklmnopqrst"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Adapter → its LoraConfig and its LoraGAConfig.
ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "delta": ({"target_modules": ALL, "use_rslora": True}, {}),
    "base": ({"target_modules": ["q_proj", "v_proj"]}, {"offset": "base", "stable_gamma": 16.0}),
    "dora": ({"target_modules": ["q_proj", "down_proj"], "use_dora": True}, {}),
    "head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {}),
}
TRAIN = {
    "model": "base",
    "task": "causal-lm",
    "train_file": "data.jsonl",
    "rank": 2,
    "batch_size": 4,
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "estimate_batches": 2,
    "learning_rate": 1e-3,
    "lora_dropout": 0.1,
}
SUITE: dict[str, Any] = {
    "title": "golden",
    "seeds": 2,
    "settings": {"steps": 2, "batch_size": 4, "length": 12, "rank": 2, "samples": 8, "eval_steps": 2, "tune_rows": 8},
    "tasks": {"text": {"kind": "text", "model": "base", "files": {"text": "text.txt"}}},
    "methods": {"lora": {"rates": [-5]}, "lora_ga": {"rates": [-6]}},
}
OLD_SETTINGS = {"batch_size": "rows", "eval_steps": "every"}  # before 0.1 renamed them


def batches(count: int, first: int = 0) -> list[dict[str, torch.Tensor]]:
    """Batches of two texts of ten tokens, the same in every version of torch."""
    found = []
    for number in range(first, first + count):
        starts = [(7 * number, number % 5 + 1), (7 * number + 3, number % 5 + 2)]
        rows = [[3 + (start + place * step) % 20 for place in range(10)] for start, step in starts]
        ids = torch.tensor(rows)
        found.append({"input_ids": ids, "labels": ids.clone()})
    return found


def base() -> Any:
    """The base model of the set in this folder."""
    return AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32).eval()


def adapted(lora: dict[str, Any]) -> Any:
    """The base model with an adapter of rank 2."""
    torch.manual_seed(0)
    return get_peft_model(base(), LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **lora))


def logits(model: Any) -> torch.Tensor:
    """The logits of a fixed batch, (2, 10, 23)."""
    with torch.no_grad():
        return model.eval()(input_ids=batches(1)[0]["input_ids"]).logits.clone()


def train(model: Any, steps: int, first: int) -> Any:
    """Takes steps of SGD on a fixed batch each."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for batch in batches(steps, first):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model


def broken_off(parts: list[Any], after: int) -> Iterator[Any]:
    """Batches that end with an error."""
    yield from parts[:after]
    raise InterruptedError


def write_base(numbers: dict[str, torch.Tensor]) -> None:
    """The base model, its tokenizer, and the data."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=None, eos_token_id=2, pad_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.dim() == 2 else 1.0)  # so that the logits are about 1
    model.save_pretrained("base")
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", eos_token="</s>", pad_token="[PAD]", model_max_length=64
    ).save_pretrained("base")
    texts = [" ".join(WORDS[3 + (7 * row + place * (row % 5 + 1)) % 20] for place in range(12)) for row in range(40)]
    Path("data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Path("text.txt").write_text(" ".join(WORDS[3 + (3 * place + place // 7) % 10] for place in range(2000)))
    numbers["base"] = logits(base())


def write_adapters(numbers: dict[str, torch.Tensor]) -> None:
    """Trained adapters with their sidecars, and the logits before and after one more step."""
    for name, (lora, start) in ADAPTERS.items():
        model = adapted(lora)
        lora_ga.initialize(model, batches(4), LoraGAConfig(**start))
        folder = f"adapters/{name}"
        train(model, 2, 10).save_pretrained(folder)
        numbers[folder] = logits(model)
        numbers[f"{folder}, next"] = logits(train(lora_ga.load(base(), folder, is_trainable=True).train(), 1, 20))
    lora_ga.compress_adapter("adapters/delta", "adapters/small", rank=1)
    numbers["adapters/small"] = logits(lora_ga.load(base(), "adapters/small"))


def write_estimates(numbers: dict[str, torch.Tensor]) -> None:
    """Estimates and their sum, and a model after one step from the first."""
    lora, _ = ADAPTERS["delta"]
    parts = [lora_ga.estimate_gradients(adapted(lora), batches(4, first)) for first in (0, 4)]
    for number, part in enumerate(parts):
        part.save(f"estimate-{number}.safetensors")
    parts[0].merge(parts[1]).save("sum.safetensors")
    model = adapted(lora)
    lora_ga.initialize(model, lora_ga.GradientEstimate.load("estimate-0.safetensors"))
    numbers["estimate-0.safetensors, next"] = logits(train(model, 1, 20))


def write_state(numbers: dict[str, torch.Tensor]) -> None:
    """The state of an estimate that broke off, and the estimate that was not broken off."""
    lora, _ = ADAPTERS["delta"]
    lora_ga.estimate_gradients(adapted(lora), batches(8)).save("whole.safetensors")
    try:
        lora_ga.estimate_gradients(adapted(lora), broken_off(batches(8), 5), checkpoint="state.safetensors", every=2)
    except InterruptedError:
        return


def write_run(numbers: dict[str, torch.Tensor]) -> None:
    """A finished run of `lora-ga train`, and the folder that one leaves which breaks off after step 2 of 4."""
    options = [f"--{name}={value}" for name, value in {**TRAIN, "method": "lora-ga"}.items()]
    if command(["train", *options, "--output_dir=runs/whole"]):
        raise RuntimeError("lora-ga train has failed")
    numbers["runs/whole/adapter"] = logits(lora_ga.load(base(), "runs/whole/adapter"))
    shutil.copytree("runs/whole", "runs/broken")
    for written_later in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(f"runs/broken/{written_later}")
    shutil.rmtree("runs/whole/checkpoints")
    # The last two are not read: another copy of the estimate, and the options of the trainer as a pickle.
    unused = ("run.json", "estimate.safetensors", "checkpoints/checkpoint-2/training_args.bin")
    for name in unused:
        Path("runs/broken", name).unlink()


def write_store(numbers: dict[str, torch.Tensor]) -> None:
    """A suite and the store with the records of all its cells."""
    from lora_ga.experiments.suites.spec import Settings

    known = {field.name for field in dataclasses.fields(Settings)}
    settings = {name if name in known else OLD_SETTINGS[name]: value for name, value in SUITE["settings"].items()}
    Path("golden.yaml").write_text(yaml.safe_dump({**SUITE, "settings": settings}, sort_keys=False))
    if command(["reproduce", "golden.yaml", "--store", "store"]):
        raise RuntimeError("lora-ga reproduce has failed")
    for lock in Path("store").glob(".lock*"):
        lock.unlink()
    Path("golden.yaml").unlink()


PARTS: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "base": write_base,
    "adapters": write_adapters,
    "estimates": write_estimates,
    "state": write_state,
    "run": write_run,
    "store": write_store,
}


def main() -> None:
    """Makes the set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="the file to write, .tar.gz")
    parser.add_argument("--without", nargs="*", default=[], help="parts or adapters that this version does not know")
    options = parser.parse_args()
    out, torch_threads = options.out.resolve(), torch.set_num_threads
    torch_threads(1)
    code = Path(lora_ga.__file__).parent
    commit = subprocess.run(["git", "-C", code, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    for name in options.without:
        PARTS.pop(name, None)
        ADAPTERS.pop(name, None)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        numbers: dict[str, torch.Tensor] = {}
        for part in PARTS.values():
            part(numbers)
        save_file({name: tensor.contiguous() for name, tensor in numbers.items()}, "logits.safetensors")
        versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
        about = {"commit": commit.stdout.strip(), "versions": versions, "without": options.without}
        Path("set.json").write_text(json.dumps(about, indent=1) + "\n")
        with tarfile.open(out, "w:gz") as file:
            for path in sorted(Path().iterdir()):
                file.add(path)
        os.chdir(out.parent)
    print(f"{out}: {out.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
