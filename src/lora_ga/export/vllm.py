"""Which adapters a server accepts, and writing one that it accepts. vLLM is the one server known so far.

The rules for vLLM are those of its source, `vllm/lora/peft_helper.py`, `vllm/lora/lora_model.py` and
`vllm/config/lora.py` (read in November 2026): no DoRA, no modules trained in full, no biases; one scaling for all
layers, from r and lora_alpha; and for `--max-lora-rank` one of a list of values, with any adapter of at most that rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from peft import LoraConfig
from torch import Tensor

from lora_ga.export.compress import resize_adapter
from lora_ga.export.saved_adapter import read_adapter
from lora_ga.files import Companions, no_companions

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# The field of PEFT's configuration → why vLLM refuses an adapter that sets it, and what to do.
VLLM_REFUSES = {
    "use_dora": "DoRA is not supported; merge the adapter (lora-ga export --merge) or train without use_dora",
    "modules_to_save": "modules trained in full are not supported; merge the adapter, or train without modules_to_save",
    "lora_bias": "biases of B are not supported; merge the adapter, or train without lora_bias",
    "layer_replication": "replicated layers are not supported; merge the adapter",
    "target_parameters": "adapted parameters (of fused experts) are not supported; merge the adapter",
    "trainable_token_indices": "trained tokens need a new vLLM with --max-lora-trainable-tokens; merge the adapter",
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a server accepts an adapter.

    Attributes:
        refused: Reasons against it that writing the adapter in another form does not remove.
        fixable: Reasons against it that `write_served` removes.
        rank: The smallest allowed rank that holds the adapter; None if the adapter's rank is above all of them.
        advice: How to start the server.
    """

    refused: tuple[str, ...]
    fixable: tuple[str, ...]
    rank: int | None
    advice: str


def _judge_for_vllm(config: LoraConfig, tensors: Mapping[str, Tensor]) -> Verdict:
    """Whether vLLM accepts an adapter."""
    refused = [f"{field}: {reason}" for field, reason in VLLM_REFUSES.items() if getattr(config, field, None)]
    if config.bias != "none":
        refused.append(f'bias="{config.bias}": adapter biases are not supported; merge the adapter')
    ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith((".lora_A.weight", ".lora_embedding_A"))}
    largest = max(ranks, default=config.r)
    fixable = []
    if config.rank_pattern or config.alpha_pattern:
        fixable.append(
            "rank_pattern, alpha_pattern: vLLM scales every layer by r and lora_alpha alone, so layers with other "
            "numbers would be scaled wrongly, without an error"
        )
    if config.r > VLLM_RANKS[-1] or largest > VLLM_RANKS[-1]:
        fixable.append(f"rank {max(config.r, largest)}: the largest --max-lora-rank is {VLLM_RANKS[-1]}; give --rank")
    rank = next((allowed for allowed in VLLM_RANKS if allowed >= largest), None)
    return Verdict(tuple(refused), tuple(fixable), rank, f"vllm serve BASE --enable-lora --max-lora-rank {rank}")


SERVERS: Mapping[str, Callable[[LoraConfig, Mapping[str, Tensor]], Verdict]] = {"vllm": _judge_for_vllm}
RANKS: Mapping[str, tuple[int, ...]] = {"vllm": VLLM_RANKS}


def check_served(path: str | Path, server: str) -> Verdict:
    """Whether a server accepts an adapter.

    Args:
        path: The adapter's folder.
        server: One of `SERVERS`.

    Returns:
        The reasons against it, and how to start the server.

    Raises:
        FileNotFoundError: There is no adapter in `path`.
        ValueError: The server is not known, or a file is damaged.
    """
    if server not in SERVERS:
        raise ValueError(f"--for {server}: the rules of this server are not known; known are {', '.join(SERVERS)}.")
    return SERVERS[server](*read_adapter(Path(path)))


def write_served(
    path: str | Path, out: str | Path, server: str, rank: int | None = None, *, companions: Companions = no_companions
) -> dict[str, float]:
    """Write an adapter in a form that a server accepts: one rank for all layers, and the scaling multiplied into B.

    Args:
        path: The adapter's folder.
        out: A new or empty folder.
        server: One of `SERVERS`.
        rank: The rank to compress to; None for the smallest allowed one that loses nothing.
        companions: Called with the new folder before it appears, to write more files into it.

    Returns:
        Layer name → ‖ΔW − ΔW'‖ / ‖ΔW‖, zero where nothing is lost.

    Raises:
        FileNotFoundError: There is no adapter in `path`.
        ValueError: The server is not known, refuses the adapter in any form, or does not allow the rank.
    """
    verdict = check_served(path, server)
    if verdict.refused:
        raise ValueError(f"{path}: {server} does not accept it, whatever its rank. " + "; ".join(verdict.refused) + ".")
    allowed = ", ".join(map(str, RANKS[server]))
    if rank is not None and rank not in RANKS[server]:
        raise ValueError(f"--rank {rank}: {server} allows {allowed}. Choose one of these.")
    wanted = rank or verdict.rank
    if wanted is None:
        raise ValueError(f"{path}: its rank is above all that {server} allows ({allowed}). Give --rank to compress it.")
    return resize_adapter(path, out, wanted, companions=companions)
