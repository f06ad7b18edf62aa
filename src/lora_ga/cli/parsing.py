"""Options from the command line and from a YAML or JSON file; the command line wins."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults at the end of each help text, paragraphs as written, one spelling of each option."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "") or not action.option_strings:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(action.default)})"
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        shown = [name for name in action.option_strings if "-" not in name[2:]] or action.option_strings[:1]
        if action.nargs == 0:
            return ", ".join(shown)
        return f"{', '.join(shown)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


class OptionParser(HfArgumentParser):
    """Transformers' parser of dataclasses; what is wrong is a ValueError, so that one place prints it."""

    def __init__(self, groups: Sequence[type], **settings: Any) -> None:
        super().__init__(groups, formatter_class=_Formatter, allow_abbrev=False, **settings)
        for action in self._actions:
            if action.option_strings and action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS

    def error(self, message: str) -> NoReturn:
        """Replaces argparse's usage text and exit.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message}. `{self.prog} --help` explains every option.")


def config_parser(groups: Sequence[type], **settings: Any) -> OptionParser:
    """A parser that also knows `--config FILE`."""
    parser = OptionParser(groups, **settings)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML or JSON file with any of these options; the command line wins over it"
    )
    return parser


def parse_with_config(parser: OptionParser, argv: list[str], *, config: str | None = None) -> tuple[Any, ...]:
    """The option groups, from `argv` and, below it, from the file named by `--config` or else by `config`.

    Returns:
        One object for each group of the parser.

    Raises:
        ValueError: an option or key that does not exist (the message lists the known keys), or a value that does not
            fit.
    """
    file = parser.parse_known_args(argv)[0].config or config
    if file is not None:
        argv = _file_arguments(parser, Path(file)) + argv
    groups = [group for group in parser.dataclass_types if hasattr(group, "__dataclass_fields__")]
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, look_for_args_file=False, return_remaining_strings=True)
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        near = get_close_matches(unknown[0].partition("=")[0], known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"{unknown[0]}: there is no such option.{hint} `{parser.prog} --help` explains every option.")
    return tuple(parsed[: len(groups)])


def _file_arguments(parser: OptionParser, path: Path) -> list[str]:
    """A configuration file as command-line arguments, so that both are read and refused in the same way."""
    values = read_mapping(path)
    known = [item.name for group in parser.dataclass_types for item in fields(group)]
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{path}: unknown keys {', '.join(unknown)}. The known keys are {', '.join(sorted(known))}.")
    arguments = [argument for key, value in values.items() for argument in _arguments(path, key, value)]
    try:
        parser.parse_args(arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return arguments


def _arguments(path: Path, key: str, value: Any) -> list[str]:
    if value is None:  # as if it were not there
        return []
    if isinstance(value, dict):
        raise ValueError(f"{path}: {key} holds a mapping, but every option is a single value or a list of them.")
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={value}"]


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads a YAML or JSON file.

    Returns:
        The mapping in it; an empty file is an empty one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, one that cannot be read as what its name says, or no mapping in it.
    """
    readers: dict[str, Any] = {".yaml": yaml.safe_load, ".yml": yaml.safe_load, ".json": json.loads}
    if path.suffix not in readers:
        raise ValueError(f"{path}: a configuration file ends in {', '.join(readers)}; this one does not.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such configuration file.")
    try:
        values = readers[path.suffix](path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: could not be read as {path.suffix[1:].upper()}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, but it must map option names to values.")
    return values
