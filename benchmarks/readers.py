"""What other programs compute from a saved adapter: each reads the same files in its own environment.

python benchmarks/readers.py make FOLDER                     # a base model, adapters, and what they compute
python benchmarks/readers.py read NAME FOLDER [SOURCE]       # adds a row to benchmarks/results/readers.json
python benchmarks/tables.py --write

NAME is peft, transformers, lm-eval, mergekit, mlx-lm, llama.cpp, vllm or sglang. SOURCE is a folder with the source
of the last three: of llama.cpp the one in the sdist of llama-cpp-python, of the others the unpacked wheel, in a folder
that has the version as its name. Of llama.cpp the converter is run, and the rule of its runtime applied. Of vLLM and
SGLang the classes that read the configuration are run.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

RECORD = Path(__file__).parent / "results" / "readers.json"
PREFIX, WEIGHTS = "base_model.model.", "adapter_model.safetensors"
IDS = torch.arange(1, 33).reshape(2, 16)
# The settings of the README, and settings with another rank and scaling in some layers.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 24}},
}
Changes = dict[str, Tensor]


def make(folder: Path) -> None:
    """Writes the base model, the adapters, their logits, and the adapters as `lora-ga export --for` writes them."""
    from peft import LoraConfig, get_peft_model

    import lora_ga
    from lora_ga.export.readers import READERS, write_for

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=64, **sizes))
    base.save_pretrained(folder / "base")
    wanted = {"base": base(IDS).logits}
    for name, changes in SETTINGS.items():
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        config = LoraConfig(
            r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM", **changes
        )
        model = get_peft_model(model, config)
        batches = [{"input_ids": torch.randint(1, 64, (8, 16)), "labels": torch.randint(1, 64, (8, 16))} for _ in "12"]
        lora_ga.initialize(model, batches)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
        model.save_pretrained(folder / name)
        wanted[name] = model.eval()(IDS).logits
        for reader in READERS:
            write_for(folder / name, folder / f"{name}-{reader}", reader)
    save_file({name: value.detach().contiguous() for name, value in wanted.items()}, folder / "wanted.safetensors")


# Programs that give a model


def by_peft(base: Path, adapter: Path) -> Any:
    """The model that PEFT gives."""
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def by_transformers(base: Path, adapter: Path) -> Any:
    """The model that Transformers gives."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(adapter))
    return model


def by_lm_eval(base: Path, adapter: Path) -> Any:
    """The model that lm-eval evaluates with `peft=`."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w0")
    found = HFLM(pretrained=str(base), peft=str(adapter), tokenizer=tokenizer, dtype="float32", device="cpu")
    return found.model


def by_mergekit(base: Path, adapter: Path) -> Any:
    """The model that mergekit makes of BASE+ADAPTER before it merges it with others."""
    from mergekit.common import ModelReference

    with tempfile.TemporaryDirectory() as cache:
        merged = ModelReference.parse(f"{base}+{adapter}").merged(cache_dir=cache)
        return AutoModelForCausalLM.from_pretrained(merged.model.path)


def by_mlx(base: Path, adapter: Path) -> Callable[[Tensor], Any]:
    """The model that mlx-lm gives."""
    import mlx.core as mx
    from mlx_lm.utils import load_adapters, load_model

    model = load_adapters(load_model(base)[0], str(adapter))
    return lambda ids: types.SimpleNamespace(logits=torch.tensor(model(mx.array(ids.tolist())).tolist()))


MODELS = {
    "peft": by_peft,
    "transformers": by_transformers,
    "lm-eval": by_lm_eval,
    "mergekit": by_mergekit,
    "mlx-lm": by_mlx,
}

# Programs whose factor is applied here


def factors_by_vllm(adapter: Path, source: Path) -> Iterator[tuple[str, float]]:
    """Layer → the factor that vLLM's PEFTHelper gives."""
    loader = "vllm.model_executor.model_loader"
    for name in ("vllm.config.lora", "vllm.logger", f"{loader}.tensorizer"):  # what the class imports of vLLM
        sys.modules |= dict.fromkeys(["vllm", "vllm.config", "vllm.model_executor", loader, name], MagicMock())
    sys.modules["regex"] = re
    helper = module(source / "vllm/lora/peft_helper.py").PEFTHelper.from_local_dir(str(adapter), None)
    helper.validate_legal(types.SimpleNamespace(max_lora_rank=512))
    for layer in layers_of(adapter):
        pattern = getattr(helper, "get_rank_and_scaling", None)
        yield layer, pattern(layer)[1] if pattern else helper.vllm_lora_scaling_factor


def factors_by_sglang(adapter: Path, source: Path) -> Iterator[tuple[str, float]]:
    """Layer → the factor that SGLang's LoRAConfig gives; it copies each layer into a buffer of rank r."""
    config = module(source / "sglang/srt/lora/lora_config.py").LoRAConfig(str(adapter))
    rule = "self.scaling: float = self.config.lora_alpha / self.config.r\n"
    assert rule in (source / "sglang/srt/lora/lora.py").read_text()
    tensors = load_file(adapter / WEIGHTS)
    for layer in layers_of(adapter):
        rank = len(tensors[f"{PREFIX}{layer}.lora_A.weight"])
        if rank != config.r:
            raise ValueError(f"a layer has rank {rank}, its buffer {config.r}")
        yield layer, config.lora_alpha / config.r


def factors_by_llama_cpp(adapter: Path, source: Path) -> Iterator[tuple[str, float]]:
    """Layer → the factor of the converted file, by norms: the converter permutes rows of some layers."""
    rule = "const float scale = alpha ? adapter_scale * alpha / rank : adapter_scale;"
    assert rule in (source / "src/llama-adapter.h").read_text()
    sys.path.insert(0, str(source / "gguf-py"))
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        out, base = Path(folder) / "lora.gguf", adapter.parent / "base"
        command = [sys.executable, source / "convert_lora_to_gguf.py", adapter, "--base", base, "--outfile", out]
        done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(done.stderr.strip().splitlines()[-1])
        file = gguf.GGUFReader(out)
        alpha = float(file.fields["adapter.lora.alpha"].contents())
        found = {each.name: torch.tensor(each.data.tolist()) for each in file.tensors}
    tensors = load_file(adapter / WEIGHTS)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for layer in layers_of(adapter):
        a, b = (found[f"{names.get_name(layer)}.weight.lora_{letter}"] for letter in "ab")
        change = tensors[f"{PREFIX}{layer}.lora_B.weight"] @ tensors[f"{PREFIX}{layer}.lora_A.weight"]
        yield layer, alpha / b.shape[1] * float((b @ a).norm() / change.norm())


FACTORS = {"vllm": factors_by_vllm, "sglang": factors_by_sglang, "llama.cpp": factors_by_llama_cpp}


def module(path: Path) -> Any:
    """A Python file as a module, without its package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = made
    spec.loader.exec_module(made)
    return made


def layers_of(adapter: Path) -> list[str]:
    """The names of an adapter's layers."""
    end = ".lora_A.weight"
    return [key.removeprefix(PREFIX).removesuffix(end) for key in load_file(adapter / WEIGHTS) if key.endswith(end)]


def with_factors(base: Path, adapter: Path, factors: Iterator[tuple[str, float]]) -> Any:
    """The base with every layer's B A added, times its factor."""
    model, tensors = AutoModelForCausalLM.from_pretrained(base), load_file(adapter / WEIGHTS)
    for layer, factor in factors:
        a, b = (tensors[f"{PREFIX}{layer}.lora_{letter}.weight"] for letter in "AB")
        model.get_submodule(layer).weight.data += factor * b @ a
    return model


def outcome(name: str, folder: Path, adapter: str, source: Path | None) -> str:
    """What a program makes of an adapter: "right", "wrong" with the relative error of its effect, or "refused"."""
    wanted, base = load_file(folder / "wanted.safetensors"), folder / "base"
    try:
        if name in MODELS:
            model = MODELS[name](base, folder / adapter)
        else:
            assert source is not None
            model = with_factors(base, folder / adapter, FACTORS[name](folder / adapter, source))
        with torch.no_grad():
            found = model(IDS).logits
    except Exception as error:  # whatever a program raises is its answer
        return f"refused: {type(error).__name__}: {error}"
    true = wanted[adapter.partition("-")[0]]
    error = float((found - true).norm() / (true - wanted["base"]).norm())
    return "right" if error < 1e-3 else f"wrong: {error:.2f}"


def version_of(name: str, source: Path | None) -> str:
    """The version of a program."""
    if source is None:
        return metadata.version(name)
    return f"({source.parent.parent.name.replace('_', '-')})" if name == "llama.cpp" else source.name


def read(name: str, folder: Path, source: Path | None = None) -> None:
    """Adds what a program makes of the adapters to the record."""
    found = {adapter: outcome(name, folder, adapter, source) for adapter in SETTINGS}
    exported = f"patterns-{name}"
    if (folder / exported).is_dir():
        found["exported"] = outcome(name, folder, exported, source)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record[f"{name} {version_of(name, source)}"] = found
    RECORD.write_text(json.dumps(dict(sorted(record.items())), indent=1) + "\n")
    print(name, found)


if __name__ == "__main__":
    task, *rest = sys.argv[1:]
    if task == "make":
        make(Path(rest[0]))
    else:
        read(rest[0], Path(rest[1]), Path(rest[2]) if len(rest) > 2 else None)
