"""Any start with any rule: those of `starts.py`, with AdamW, SGD or a rule of `lora_ga.optim` for pairs of factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lora_ga.experiments.methods.base import BuildInputs, Method, adamw, one_rate
from lora_ga.experiments.methods.starts import STARTS
from lora_ga.optim import LoRAMuon, LoRATSD, PoLoRA, ScaledAdamW, ScaledSGD, param_groups

Groups = list[dict[str, Any]]
# The rules of pairs; the options are those of the classes' defaults, except for the number of msigns of LoRATSD.
PAIRS: Mapping[str, Callable[[Groups, BuildInputs], Any]] = {
    "tsd": lambda groups, inputs: LoRATSD(groups, inputs.rate, iterations=inputs.options["iterations"]),
    "muon": lambda groups, inputs: LoRAMuon(groups, inputs.rate),
    "polora": lambda groups, inputs: PoLoRA(groups, inputs.rate),
    "scaled_sgd": lambda groups, inputs: ScaledSGD(groups, inputs.rate),
    "scaled_adamw": lambda groups, inputs: ScaledAdamW(groups, inputs.rate),
}
RULES: Mapping[str, Callable[[Groups, BuildInputs], Any]] = {
    "adamw": adamw,
    "sgd": lambda groups, inputs: torch.optim.SGD(groups, momentum=0.9),
    **PAIRS,
}


def _entry(table: Mapping[str, Any], option: str, inputs: BuildInputs) -> Any:
    name = inputs.options[option]
    if name not in table:
        raise ValueError(f"steps: {option} is {name!r}; it must be one of {', '.join(table)}.")
    return table[name]


def groups(model: Any, inputs: BuildInputs) -> Groups:
    """The parameter groups: pairs of factors for a rule of pairs, all trained parameters otherwise."""
    if inputs.options["rule"] not in PAIRS:
        return one_rate(model, inputs)
    return [group | ({"lr": inputs.rate} if group["layout"] else {}) for group in param_groups(model)]


METHODS = {
    "steps": Method(
        lambda inputs: _entry(STARTS, "start", inputs)(inputs),
        options={"start": "lora_ga", "rule": "polora", "size": 0.0, "iterations": 1},
        groups=groups,
        optimizer=lambda groups, inputs: _entry(RULES, "rule", inputs)(groups, inputs),
    )
}
