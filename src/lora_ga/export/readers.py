"""Which adapters other programs read as PEFT does, and writing one that they read so.

Each program has its rule for the factor of a layer's product B A. The rules are those of the sources:

- vLLM 0.33.0, `vllm/lora/peft_helper.py`, `vllm/config/lora.py`: PEFT's rule since 0.32. Up to 0.31 one factor for all
  layers, α/r or with rsLoRA α/√r. `--max-lora-rank` is one of a list of values, and an adapter may have a lower rank.
  Classifiers: https://github.com/vllm-project/vllm/pull/53555 and `docs/models/pooling_models/classify.md`;
  encoder-decoders: the table of `docs/features/README.md`.
- SGLang 0.5.23, `sglang/srt/lora/lora.py`, `lora_config.py`, `mem_pool.py`: α/r, whatever `use_rslora` and the patterns
  say, and r as the rank of every layer.
- llama.cpp as in llama-cpp-python 0.3.36, `convert_lora_to_gguf.py`, `src/llama-adapter.h`: the converter keeps α
  alone, and each layer's factor is α over the rank of its own matrices.
- mlx-lm 0.32.2, `mlx_lm/tuner/utils.py`, `tuner/lora.py`: its own file, with one rank and one factor.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from peft import LoraConfig
from peft.utils import CONFIG_NAME
from transformers.utils import CHAT_TEMPLATE_FILE

from lora_ga.adapter.alignment import scaling_of
from lora_ga.export.compress import resize_adapter, resized
from lora_ga.export.saved_adapter import read_adapter
from lora_ga.files import ADAPTER, Companions, check_empty, new_folder, no_companions, write_safetensors
from lora_ga.layers.targets import PREFIX

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MLX_WEIGHTS = "adapters.safetensors"
ENCODER_DECODER = "adapters of encoder-decoders are not supported; use it from Python, by lora_ga.load"
FACTOR_A = (".lora_A.weight", ".lora_embedding_A")
# The field of PEFT's configuration → what these readers do not support. PEFT's field `bias` is a word, not a switch.
REFUSED = {
    "use_dora": "DoRA is not supported; merge the adapter (lora-ga export --merge) or train without use_dora",
    "modules_to_save": "modules trained in full are not supported; merge the adapter, or train without modules_to_save",
    "lora_bias": "biases of B are not supported; train without lora_bias (only layers with a bias can be merged)",
    "layer_replication": "replicated layers are not supported, nor can they be merged; use lora_ga.load in Python",
    "target_parameters": "adapted parameters (of fused experts) are not supported; merge the adapter",
    "trainable_token_indices": "trained tokens are not supported; merge the adapter",
}
# Those that merging does not remove, or not on every base model.
NOT_MERGED = ("lora_bias", "layer_replication")


@dataclasses.dataclass(frozen=True)
class Reader:
    """How a program reads an adapter.

    Attributes:
        factor: The factor by which it multiplies a layer's B A, from the configuration and the rank of the layer's
            matrices; None if it does not read PEFT's files at all.
        rule: The rule in words, for messages.
        advice: The command that uses an adapter that it reads right: `{adapter}` is its folder, `{base}` its base
            model, `{name}` a name for it and `{rank}` the rank to start the program with.
        one_rank: Whether every layer has to have the rank r of the configuration.
        ranks: The ranks for which the program can be started; empty if any is.
        template: What `advice` ends with if there is a chat template beside the adapter: `{template}` is its file.
        tasks: PEFT's name of a task → why the program does not read adapters for it.
    """

    factor: Callable[[LoraConfig, int], float] | None
    rule: str
    advice: str
    one_rank: bool = False
    ranks: tuple[int, ...] = ()
    template: str = ""
    tasks: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def usage(self, adapter: str | Path, base: str | None, rank: int | None = None) -> str:
        """The command of `advice`, to be pasted into a shell. The adapter is named after its folder or its run.

        Args:
            adapter: The adapter's folder.
            base: The name of its base model; without one the command says BASE.
            rank: The rank to start the program with, if it needs one.

        Returns:
            The command.
        """
        folder = Path(adapter)
        run = folder.resolve().parent if folder.name == ADAPTER else folder
        template = folder / CHAT_TEMPLATE_FILE  # the base model's tokenizer may have another, or none
        words = {"adapter": str(adapter), "base": base or "BASE", "template": str(template)}
        words["name"] = re.sub(r"[^\w.-]+", "-", run.name)
        command = self.advice + (self.template if template.is_file() else "")
        return command.format(rank=rank, **{word: shlex.quote(text) for word, text in words.items()})


READERS: Mapping[str, Reader] = {
    "vllm": Reader(
        lambda config, rank: config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r),
        "vLLM before 0.32 scales every layer by r and lora_alpha alone; newer ones read patterns as PEFT does",
        "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={adapter}",
        ranks=VLLM_RANKS,
        template=" --chat-template {template}",
        tasks={
            "SEQ_CLS": "vLLM 0.33 reads a classifier's adapter on a base model with as many classes alone, and "
            "older versions refuse it; merge the adapter, and serve the merged model with `vllm serve FOLDER --runner "
            "pooling`",
            "SEQ_2_SEQ_LM": ENCODER_DECODER,
        },
    ),
    "sglang": Reader(
        lambda config, rank: config.lora_alpha / config.r,
        "SGLang scales every layer by lora_alpha / r, and reads neither use_rslora nor patterns",
        "python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} --lora-paths "
        "{name}={adapter}",
        one_rank=True,
        template=" --chat-template {template}",
        tasks={"SEQ_2_SEQ_LM": ENCODER_DECODER},
    ),
    "llama.cpp": Reader(
        lambda config, rank: config.lora_alpha / rank if config.lora_alpha else 1.0,
        "llama.cpp scales each layer by lora_alpha over its own rank, and reads neither use_rslora nor patterns",
        "python convert_lora_to_gguf.py {adapter} --base {base}",
    ),
    "mlx-lm": Reader(
        None,
        "mlx-lm does not read PEFT's files, it has its own",
        "mlx_lm.generate --model {base} --adapter-path {adapter}",
        tasks={"SEQ_2_SEQ_LM": ENCODER_DECODER},
    ),
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a program reads an adapter as PEFT does.

    Attributes:
        refused: Reasons against it that writing the adapter in another form does not remove.
        fixable: Reasons against it that `write_for` removes.
        mergeable: Whether merging the adapter removes the refusals, on every base model.
        rank: The smallest allowed rank that holds the adapter; None if the adapter's rank is above all of them.
        advice: How to start the program.
    """

    refused: tuple[str, ...]
    fixable: tuple[str, ...]
    mergeable: bool
    rank: int | None
    advice: str


def check_reader(path: str | Path, name: str) -> Verdict:
    """Whether a program reads an adapter as PEFT does.

    Args:
        path: The adapter's folder.
        name: One of `READERS`.

    Returns:
        The reasons against it, and how to start the program.

    Raises:
        FileNotFoundError: There is no adapter in `path`.
        ValueError: The program is not known, or a file is damaged.
    """
    reader = reader_named(name)
    config, tensors = read_adapter(Path(path))
    refused = [f"{field}: {reason}" for field, reason in REFUSED.items() if getattr(config, field, None)]
    if config.task_type in reader.tasks:
        refused = [f"{config.task_type}: {reader.tasks[config.task_type]}"]
    if config.bias != "none":
        refused.append(f'bias="{config.bias}": adapter biases are not supported; merge the adapter')
    ranks = {
        key.removesuffix(end).removeprefix(PREFIX): len(tensor)
        for key, tensor in tensors.items()
        for end in FACTOR_A
        if key.endswith(end)
    }
    largest = max(ranks.values(), default=config.r)
    unmergeable = any(getattr(config, field, None) for field in NOT_MERGED)
    rank = next((allowed for allowed in reader.ranks if allowed >= largest), None if reader.ranks else largest)
    return Verdict(
        tuple(refused),
        # The file does not name the parameters, without which their scalings are not known. It is refused anyway.
        () if config.target_parameters else tuple(_mendable(config, ranks, reader)),
        bool(refused) and not unmergeable and reader.tasks.get(config.task_type) != ENCODER_DECODER,
        rank,
        reader.usage(path, config.base_model_name_or_path, rank),
    )


def reader_named(name: str) -> Reader:
    """How the program of a name reads an adapter.

    Args:
        name: One of `READERS`.

    Returns:
        The reader.

    Raises:
        ValueError: The program is not known.
    """
    if name not in READERS:
        raise ValueError(
            f"--for {name}: the rules of this program are not known; known are {', '.join(READERS)}. PEFT, "
            "Transformers, lm-eval and mergekit read an adapter as it is saved."
        )
    return READERS[name]


def _mendable(config: LoraConfig, ranks: Mapping[str, int], reader: Reader) -> list[str]:
    """The reasons against an adapter that another form of it removes."""
    if reader.factor is None:
        return [reader.rule]
    reasons = []
    factors = {name: (scaling_of(config, name), reader.factor(config, rank)) for name, rank in ranks.items()}
    wrong = [name for name, (ours, theirs) in factors.items() if not math.isclose(ours, theirs, rel_tol=1e-6)]
    if wrong:
        ours, theirs = factors[wrong[0]]
        reasons.append(
            f"{len(wrong)} of {len(ranks)} layers would be scaled wrongly, without an error, as {wrong[0]} by "
            f"{theirs:g} and not {ours:g}: {reader.rule}"
        )
    others = [name for name, rank in ranks.items() if rank != config.r]
    if reader.one_rank and others:
        reasons.append(
            f"{len(others)} of {len(ranks)} layers have another rank than r = {config.r}, as {others[0]} "
            f"({ranks[others[0]]}): one rank is allowed"
        )
    largest = max([config.r, *ranks.values()])
    if reader.ranks and largest > reader.ranks[-1]:
        reasons.append(f"rank {largest}: the largest --max-lora-rank is {reader.ranks[-1]}; give --rank")
    return reasons


def write_for(
    path: str | Path, out: str | Path, name: str, rank: int | None = None, *, companions: Companions = no_companions
) -> dict[str, float]:
    """Write an adapter in a form that a program reads right: one rank, and the scaling multiplied into B.

    Args:
        path: The adapter's folder.
        out: A new or empty folder.
        name: One of `READERS`.
        rank: The rank to compress to; None for the smallest allowed one that loses nothing.
        companions: Called with the new folder before it appears, to write more files into it.

    Returns:
        Layer name → ‖ΔW − ΔW'‖ / ‖ΔW‖, zero where nothing is lost but the rounding of s·B.

    Raises:
        FileNotFoundError: There is no adapter in `path`.
        ValueError: The program is not known, refuses the adapter in any form, or does not allow the rank.
    """
    verdict, ranks = check_reader(path, name), READERS[name].ranks
    if verdict.refused:
        raise ValueError(f"{path}: {name} does not accept it, whatever its rank. " + "; ".join(verdict.refused) + ".")
    allowed = ", ".join(map(str, ranks))
    if rank is not None and ranks and rank not in ranks:
        raise ValueError(f"--rank {rank}: {name} allows {allowed}. Choose one of these.")
    wanted = rank or verdict.rank
    if wanted is None:
        raise ValueError(f"{path}: its rank is above all that {name} allows ({allowed}). Give --rank to compress it.")
    return (_write_mlx if name == "mlx-lm" else resize_adapter)(path, out, wanted, companions=companions)


def _write_mlx(
    path: str | Path, out: str | Path, rank: int, *, companions: Companions = no_companions
) -> dict[str, float]:
    """Write an adapter as mlx-lm reads it: Aᵀ and Bᵀ, the names of the layers within a block, and the factor 1.

    mlx-lm gives these layers to all blocks. Where the file holds nothing for one, B is zero.

    Returns:
        As `resize_adapter`.
    """
    target = check_empty(out)
    tensors, errors = resized(Path(path), rank)
    keys = {re.sub(r"^.*?layers\.\d+\.", "", name) for name in errors}
    config = {
        "fine_tune_type": "lora",
        "num_layers": -1,  # all blocks
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    factors = {
        f"{name}.lora_{letter.lower()}": tensors[f"{PREFIX}{name}.lora_{letter}.weight"].T.contiguous()
        for name in errors
        for letter in "AB"
    }
    with new_folder(target) as folder:
        write_safetensors(folder / MLX_WEIGHTS, factors, {"format": "mlx"})
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2))
        companions(folder)
    return errors
