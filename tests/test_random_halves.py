"""`direction="random"`: which directions become A and which B."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ga import LoraGAConfig
from lora_ga.adapter.directions import LayerSpec, split
from lora_ga.linalg.low_rank import LowRank


def random_halves(name: str, seed: int = 0, rank: int = 8) -> tuple[Tensor, Tensor]:
    """Which singular directions A and B of a layer get with direction="random"."""
    eye = torch.eye(2 * rank, 2 * rank, dtype=torch.float64)
    low_rank = LowRank(eye, torch.ones(2 * rank, dtype=torch.float64), eye, norm=1.0)
    config = LoraGAConfig(direction="random", scale="unit", seed=seed)
    a, b = split(low_rank, LayerSpec(name, 2 * rank, rank, 1.0, config, lambda: eye))
    return a.argmax(dim=1), b.argmax(dim=0)


def test_random_halves_are_drawn_anew_for_every_layer_and_seed_and_alike_in_every_run() -> None:
    names = [f"model.layers.{index}.{kind}" for index in range(4) for kind in ("q_proj", "v_proj")]
    halves = {(name, seed): random_halves(name, seed) for name in names for seed in (0, 1)}
    for (name, seed), (a, b) in halves.items():
        assert sorted([*a.tolist(), *b.tolist()]) == list(range(16))
        again = random_halves(name, seed)
        assert torch.equal(a, again[0])
        assert torch.equal(b, again[1])
    assert len({tuple(a.tolist()) for a, _ in halves.values()}) == len(halves)
