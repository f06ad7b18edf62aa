"""What each field of a suite file may hold. This module does not import torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
FARTHEST = 40  # exponents of √10 on both sides of 1: learning rates from 1e-20 to 1e20
SHOWN = 80  # characters of a wrong value in a message


def as_number(value: Any) -> Any:
    """A number for a text such as 1e-4 or 1.5e4, which YAML takes for a number only as 1.0e-4 or 1.5e+4."""
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; true, false and 3.0 are none."""
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Kind:
    """What a field may hold.

    Attributes:
        words: What it must be, for messages.
        holds: Whether a value is allowed.
        read: Makes the value of what YAML has read.
    """

    words: str
    holds: Callable[[Any], bool]
    read: Callable[[Any], Any] = lambda value: value


def whole(least: int) -> Kind:
    """A whole number with a bound."""
    return Kind(f"a whole number of at least {least}", lambda value: is_whole(value) and value >= least)


def one_of(known: Collection[str]) -> Kind:
    """One of some words."""
    return Kind(f"one of {', '.join(known)}", lambda value: isinstance(value, str) and value in known)


def list_of(words: str, holds: Callable[[Any], bool], read: Callable[[Any], Any] = lambda value: value) -> Kind:
    """A list whose entries are all allowed."""
    return Kind(
        f"a list of {words}",
        lambda value: isinstance(value, (list, tuple)) and all(map(holds, value)),
        lambda value: [read(each) for each in value] if isinstance(value, (list, tuple)) else value,
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_rate(value: Any) -> bool:
    return is_number(value) and value > 0


def _is_point(value: Any) -> bool:
    return is_whole(value) and abs(value) <= FARTHEST


TEXT = Kind("a text", _is_text)
TEXTS = list_of("texts", _is_text)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
POSITIVE = Kind("a number above 0", _is_rate, as_number)
RATES = list_of("learning rates above 0, as [0.0002]", _is_rate, as_number)
POINTS = list_of(f"whole exponents of √10 from -{FARTHEST} to {FARTHEST}, as [-7, -6, -5] (-6 is 1e-3)", _is_point)
MAPPING = Kind(
    "a mapping whose names are texts",
    lambda value: isinstance(value, Mapping) and all(isinstance(key, str) for key in value),
)
NAMES = Kind(
    "a mapping of texts to texts",
    lambda value: isinstance(value, Mapping) and all(isinstance(each, str) for pair in value.items() for each in pair),
)

SETTINGS = {
    **dict.fromkeys(("steps", "batch_size", "length", "rank", "samples", "eval_steps", "train_rows"), whole(1)),
    **dict.fromkeys(("tune_rows", "report_rows", "gradient_accumulation_steps"), whole(1)),
    **dict.fromkeys(("alpha", "head_rate"), POSITIVE),
    "warmup": Kind("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1, as_number),
    "dtype": one_of(("float32", "bfloat16")),
    "gradient_checkpointing": FLAG,
}
EVALUATION = {  # of all ways to evaluate; each refuses the keys of the others
    **dict.fromkeys(("by", "test", "rows", "model", "questions", "references", "prompts"), TEXT),
    **dict.fromkeys(("tokens", "batch"), whole(1)),
}


def check_values(values: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> dict[str, Any]:
    """Checks every value whose kind is known.

    Args:
        values: Name → what YAML has read.
        kinds: Name → what it may hold.
        where: The place in the file, for messages.

    Returns:
        Name → value.

    Raises:
        ValueError: A value is not allowed.
    """
    found = {}
    for name, given in values.items():
        value = found[name] = kinds[name].read(given) if name in kinds else given
        if name in kinds and not kinds[name].holds(value):
            shown = repr(given)
            shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"
            raise ValueError(f"{where}: {name} is {shown}; it must be {kinds[name].words}.")
    return found
