"""The methods that suites compare. A method is an entry of `METHODS` in one of the small files here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_ga.experiments.methods.base import Method

METHODS = (
    "full",
    "lora",
    "rslora",
    "lora_plus",
    "pissa",
    "dora",
    "adalora",
    "olora",
    "eva",
    "peft_lora_ga",
    "lora_ga",
    "gradient_lora",
    "steps",
)
# Method -> its file, where that has another name.
FILES = {"rslora": "lora", "pissa": "lora", "dora": "lora", "olora": "lora"}


def load_method(name: str) -> Method:
    """Finds a method.

    Args:
        name: One of `METHODS`.

    Returns:
        The method.

    Raises:
        ValueError: There is no such method.
    """
    if name not in METHODS:
        raise ValueError(f"{name}: there is no such method. The methods are {', '.join(METHODS)}.")
    return importlib.import_module(f"{__name__}.{FILES.get(name, name)}").METHODS[name]


def complete(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method, with its defaults for those that are not given.

    Args:
        name: The name of the method.
        options: The options in a suite file.

    Returns:
        All options.

    Raises:
        ValueError: The method has no such option.
    """
    known = load_method(name).options
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"{name}: has no option {', '.join(unknown)}. Its options are {', '.join(known) or 'none at all'}."
        )
    # 16 and 16.0 in a suite file are the same setting.
    return {**known, **{key: type(known[key])(value) for key, value in options.items()}}


def non_default_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that differ from the method's defaults; they are part of a cell's digest."""
    known = load_method(name).options
    return {key: value for key, value in complete(name, options).items() if value != known[key]}
