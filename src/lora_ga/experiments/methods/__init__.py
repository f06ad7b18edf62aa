"""The methods that suites compare. A method is an entry of `METHODS` in one of the small files here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_ga.experiments.suites.fields import as_number, is_number

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
        ValueError: The method has no such option, or a value is not of the kind of its default.
    """
    known = load_method(name).options
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"{name}: has no option {', '.join(unknown)}. Its options are {', '.join(known) or 'none at all'}."
        )
    return {**known, **{key: _option(f"{name}: option {key}", known[key], value) for key, value in options.items()}}


def _option(what: str, default: Any, value: Any) -> Any:
    """An option as its default is: true or false, a text, or a number from 0 (16 and 16.0 are the same setting).

    Args:
        what: The option, for the message.
        default: Its default.
        value: What a suite file gives.

    Returns:
        The value.

    Raises:
        ValueError: It is of another kind, or below 0.
    """
    words = {bool: "true or false", str: "a text", int: "a whole number of at least 0", float: "a number of at least 0"}
    kind, read = type(default), as_number(value) if type(default) is float else value
    if kind in (bool, str):
        right = isinstance(read, kind)
    else:
        right = is_number(read) and read >= 0 and (kind is float or read == int(read))
    if not right:
        raise ValueError(f"{what} is {value!r}; it must be {words[kind]}.")
    return kind(read)


def non_default_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that differ from the method's defaults; they are part of a cell's digest."""
    known = load_method(name).options
    return {key: value for key, value in complete(name, options).items() if value != known[key]}
