"""What a server accepts of an adapter directory, and how to write one that it accepts.

The rules for vLLM are those of its source, `vllm/lora/peft_helper.py`, `vllm/lora/lora_model.py` and
`vllm/config/lora.py` (read in November 2026): no DoRA, no modules trained in full, no biases; one scaling for all
layers, from r and lora_alpha; and `--max-lora-rank` one of a list, any adapter of at most that rank being taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from peft import LoraConfig
from torch import Tensor

from lora_ga.export.compress import resize_adapter
from lora_ga.export.saved_adapter import read_adapter

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# The field of PEFT's configuration → why vLLM does not take an adapter that sets it, and what to do.
VLLM_REFUSES = {
    "use_dora": "DoRA is not supported; merge the adapter (lora-ga export --merge) or train without use_dora",
    "modules_to_save": "modules trained in full are not taken; merge the adapter, or train without modules_to_save",
    "lora_bias": "biases of B are not supported; merge the adapter, or train without lora_bias",
    "layer_replication": "replicated layers are not supported; merge the adapter",
    "target_parameters": "adapted parameters without a layer of their own are not known; merge the adapter",
    "trainable_token_indices": "single trained tokens are only known to new versions, with --max-lora-trainable-tokens",
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a server makes of an adapter.

    Attributes:
        refused: Reasons that no other adapter file can take away.
        mendable: Reasons that writing the adapter anew takes away.
        rank: The least allowed rank that holds the adapter; None if it is larger than all.
        advice: What to tell the server, where it takes the adapter.
    """

    refused: tuple[str, ...]
    mendable: tuple[str, ...]
    rank: int | None
    advice: str


def _vllm(config: LoraConfig, tensors: Mapping[str, Tensor]) -> Verdict:
    """What vLLM makes of an adapter."""
    refused = [f"{field}: {reason}" for field, reason in VLLM_REFUSES.items() if getattr(config, field, None)]
    if config.bias != "none":
        refused.append(f'bias="{config.bias}": adapter biases are not supported; merge the adapter')
    ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith((".lora_A.weight", ".lora_embedding_A"))}
    largest = max(ranks, default=config.r)
    mendable = []
    if config.rank_pattern or config.alpha_pattern:
        mendable.append(
            "rank_pattern, alpha_pattern: vLLM scales every layer by r and lora_alpha alone, so layers with numbers of "
            "their own would be scaled wrongly without a word"
        )
    if config.r > VLLM_RANKS[-1] or largest > VLLM_RANKS[-1]:
        mendable.append(f"rank {max(config.r, largest)}: the largest --max-lora-rank is {VLLM_RANKS[-1]}; give --rank")
    rank = next((allowed for allowed in VLLM_RANKS if allowed >= largest), None)
    return Verdict(tuple(refused), tuple(mendable), rank, f"vllm serve BASE --enable-lora --max-lora-rank {rank}")


SERVERS: Mapping[str, Callable[[LoraConfig, Mapping[str, Tensor]], Verdict]] = {"vllm": _vllm}
RANKS: Mapping[str, tuple[int, ...]] = {"vllm": VLLM_RANKS}


def check_served(path: str | Path, server: str) -> Verdict:
    """What a server makes of an adapter directory.

    Args:
        path: The adapter's folder.
        server: One of `SERVERS`.

    Returns:
        What is in the way, and what can be done.

    Raises:
        FileNotFoundError: There is no adapter in `path`.
        ValueError: The server is not known, or a file is damaged.
    """
    if server not in SERVERS:
        raise ValueError(f"--for {server}: not a server whose rules are known; known are {', '.join(SERVERS)}.")
    return SERVERS[server](*read_adapter(Path(path)))


def write_served(path: str | Path, out: str | Path, server: str, rank: int | None = None) -> dict[str, float]:
    """Write an adapter that a server takes: one rank for all layers, and the scaling in B.

    Args:
        path: The adapter's folder.
        out: A new or empty folder.
        server: One of `SERVERS`.
        rank: The rank to compress to; None for the least allowed one that loses nothing.

    Returns:
        Layer name → ‖ΔW − ΔW'‖ / ‖ΔW‖, zero where nothing is lost.

    Raises:
        FileNotFoundError: There is no adapter in `path`.
        ValueError: The server is not known, refuses what no other file can take away, or does not allow the rank.
    """
    verdict = check_served(path, server)
    if verdict.refused:
        raise ValueError(f"{path}: {server} does not take it, whatever its rank. " + "; ".join(verdict.refused) + ".")
    allowed = ", ".join(map(str, RANKS[server]))
    if rank is not None and rank not in RANKS[server]:
        raise ValueError(f"--rank {rank}: {server} allows {allowed}. Choose one of these.")
    wanted = rank or verdict.rank
    if wanted is None:
        raise ValueError(f"{path}: of a rank above all that {server} allows ({allowed}). Give --rank to compress it.")
    return resize_adapter(path, out, wanted)
