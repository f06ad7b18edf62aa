"""Options from the command line and from a YAML or JSON file. The command line overrides the file."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser

from lora_ga.experiments.suites.spec import check_size


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default after each help text, keeps paragraphs, and shows one spelling of each option."""

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
    """Transformers' parser of dataclasses. It raises ValueError for wrong options; `lora_ga.cli.main` prints it."""

    def __init__(self, groups: Sequence[type], **settings: Any) -> None:
        super().__init__(groups, formatter_class=_Formatter, allow_abbrev=False, **settings)
        for action in self._actions:
            if action.option_strings and action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS

    def error(self, message: str) -> NoReturn:
        """Raises where argparse prints its usage and exits.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{message}. `{self.prog} --help` explains every option.")


def config_parser(groups: Sequence[type], **settings: Any) -> OptionParser:
    """Makes a parser with the option `--config FILE`."""
    parser = OptionParser(groups, **settings)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML or JSON file with any of these options; the command line overrides it"
    )
    return parser


def parse_with_config(parser: OptionParser, argv: list[str], *, config: str | None = None) -> tuple[Any, ...]:
    """Parses `argv` and a configuration file. Options in `argv` override the file.

    Args:
        parser: Made by `config_parser`.
        argv: The arguments. `--config` among them names the file.
        config: The file where `argv` names none; None for no file.

    Returns:
        One object for each option group of the parser.

    Raises:
        ValueError: An option or key does not exist (the message lists the known keys), or a value is not allowed.
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
    """Turns a configuration file into arguments, so that file and command line are checked by the same code."""
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
    if value is None:  # the option is not given
        return []
    if isinstance(value, dict):
        raise ValueError(f"{path}: {key} holds a mapping, but every option is a single value or a list of them.")
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={value}"]


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads a YAML or JSON file.

    Returns:
        The mapping in it; an empty mapping for an empty file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is of another kind, cannot be parsed, or holds no mapping.
    """
    readers: dict[str, Any] = {".yaml": yaml.safe_load, ".yml": yaml.safe_load, ".json": json.loads}
    if path.suffix not in readers:
        raise ValueError(f"{path}: a configuration file ends in {', '.join(readers)}; this one does not.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such configuration file.")
    try:
        values = check_size(readers[path.suffix](path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: could not be read as {path.suffix[1:].upper()}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, but it must map option names to values.")
    return values
