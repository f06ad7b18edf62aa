"""Options from the command line and from a YAML or JSON file. The command line overrides the file.

An option group is a dataclass whose fields are options, as in Transformers' `HfArgumentParser`. That parser is not used
here: importing it takes seconds, and a wrong option is refused before anything slow is imported.
"""

import argparse
import json
import re
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from lora_ga.experiments.suites.spec import check_size

# Names that other tools of the field give to an option -> its name here. If several options are named, the first one
# that the command has is meant.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("lr", "peak_lr", "max_lr"), ("learning_rate",)),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), ("rank",)),
    "lora_alpha": ("alpha",),
    "dropout": ("lora_dropout",),
    **dict.fromkeys(("lora_target", "lora_target_modules", "lora_modules", "targets"), ("target_modules",)),
    **dict.fromkeys(
        ("per_device_train_batch_size", "train_batch_size", "micro_batch_size", "per_device_eval_batch_size"),
        ("batch_size",),
    ),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "n_epochs"), ("epochs",)),
    **dict.fromkeys(("max_train_steps", "num_steps", "steps"), ("max_steps",)),
    **dict.fromkeys(("model_name_or_path", "model_name", "base_model", "model_id"), ("model",)),
    "task_type": ("task",),
    **dict.fromkeys(("data", "train_data", "data_path", "dataset_path", "data_file"), ("train_file",)),
    **dict.fromkeys(("dataset_name", "dataset_id"), ("dataset",)),
    "dataset_config_name": ("dataset_config",),
    "dataset_train_split": ("train_split",),
    **dict.fromkeys(("validation_file", "val_file", "test_file", "eval_data"), ("eval_file",)),
    **dict.fromkeys(("validation_split", "dataset_test_split"), ("eval_split",)),
    **dict.fromkeys(("dataset_text_field", "text_field"), ("text_column",)),
    **dict.fromkeys(("messages", "conversations_column"), ("messages_column",)),
    **dict.fromkeys(("completion_column", "response_column", "answer_column"), ("target_column",)),
    "instruction_column": ("prompt_column",),
    "completion_only_loss": ("prompt_column",),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "cutoff_len", "model_max_length", "block_size"), ("max_length",)),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype", "precision"), ("dtype",)),
    **dict.fromkeys(("lr_scheduler", "scheduler", "scheduler_type"), ("lr_scheduler_type",)),
    **dict.fromkeys(("warmup_steps", "warmup"), ("warmup_ratio",)),
    **dict.fromkeys(("grad_accum", "gradient_accumulation", "accumulation_steps"), ("gradient_accumulation_steps",)),
    **dict.fromkeys(("max_batches", "lora_ga_batches", "num_iters"), ("estimate_batches",)),
    **dict.fromkeys(("gamma", "lora_ga_gamma"), ("stable_gamma",)),
    "resume_from_checkpoint": ("resume",),
    **dict.fromkeys(("qlora", "use_4bit", "quantization", "bits", "quantization_bit"), ("load_in_4bit",)),
    **dict.fromkeys(("out", "out_dir", "save_dir", "output_folder", "output_file", "o"), ("output_dir", "output")),
    "output": ("output_dir",),
    "output_dir": ("output",),
    **dict.fromkeys(("force", "f"), ("overwrite",)),
    "records": ("store",),
}
TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default after each help text, keeps paragraphs, and shows one spelling of each option."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        required = (action.help or "").endswith("(required)")  # its default only says that it was not given
        if required or action.default in (None, "", []) or not action.option_strings:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(action.default)})"
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = list(dict.fromkeys(action.option_strings))
        shown = [name for name in names if "-" not in name[2:]] or names[:1]
        if action.nargs == 0:
            return ", ".join(shown)
        return f"{', '.join(shown)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


class OptionParser(argparse.ArgumentParser):
    """A parser of option groups. It raises ValueError for wrong options; `lora_ga.cli.main` prints it."""

    def __init__(self, groups: Sequence[type], **settings: Any) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **settings)
        self.groups = tuple(groups)
        for group in self.groups:
            title = getattr(group, "_argument_group_name", None)
            container, hints = self if title is None else self.add_argument_group(title), get_type_hints(group)
            for item in fields(group):
                _add_option(container, item, hints[item.name])

    def error(self, message: str) -> NoReturn:
        """Raises where argparse prints its usage and exits.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{message}. `{self.prog} --help` explains every option.")

    def parse(self, argv: Sequence[str]) -> tuple[list[Any], argparse.Namespace]:
        """Parses arguments. An unknown option is refused before a missing or wrong one.

        Returns:
            One object for each option group, and the values that belong to no group.

        Raises:
            ValueError: An option does not exist, or a value is not allowed.
        """
        self.refuse_unknown(argv)
        namespace = self.parse_args(list(argv))
        values = vars(namespace)
        objects = [group(**{item.name: values[item.name] for item in fields(group)}) for group in self.groups]
        grouped = {item.name for group in self.groups for item in fields(group)}
        return objects, argparse.Namespace(**{name: value for name, value in values.items() if name not in grouped})

    def refuse_unknown(self, argv: Iterable[str]) -> None:
        """Refuses options that do not exist, and names the ones that are meant.

        Raises:
            ValueError: There are such options.
        """
        options = [word.partition("=")[0] for word in argv if re.match(r"--?[A-Za-z]", word)]
        unknown = [name for name in options if name not in self._names()]
        if not unknown:
            return
        plural = "there are no such options" if len(unknown) > 1 else "there is no such option"
        hints = "".join(f" {hint}" for name in unknown if (hint := self.hint(name, many=len(unknown) > 1)))
        raise ValueError(f"{', '.join(unknown)}: {plural}.{hints} `{self.prog} --help` explains every option.")

    def _names(self) -> list[str]:
        """All spellings of all options."""
        return [name for action in self._actions for name in action.option_strings]

    def hint(self, name: str, *, many: bool = False) -> str:
        """The sentence that names the option that is meant; empty if no option is near."""
        plain = name.lstrip("-").replace("-", "_")
        known = [option[2:] for option in self._names() if re.match(r"--(?!no_)\w+$", option)]
        meant = [option for option in OTHER_NAMES.get(plain, ()) if option in known]
        if meant:
            value = {"bf16": " bfloat16", "fp16": " bfloat16 (there is no float16)"}.get(plain, "")
            return f"Here {name} is --{meant[0]}{value}."
        near = get_close_matches(plain, known, n=1, cutoff=0.75)
        if not near:
            return ""
        return f"Did you mean --{near[0]} for {name}?" if many else f"Did you mean --{near[0]}?"


def _add_option(container: Any, item: Any, hint: Any) -> None:
    """Adds the option of a dataclass field.

    Args:
        container: The parser, or a group of it.
        item: The field.
        hint: Its type: str, int, float, bool or a Literal, also with None, or a list of str.
    """
    default = item.default if item.default_factory is MISSING else item.default_factory()
    names = list(dict.fromkeys((f"--{item.name}", f"--{item.name.replace('_', '-')}")))
    settings: dict[str, Any] = {"default": default, "help": item.metadata.get("help")}
    words: tuple[str, ...] = ()  # of a number that may also be a word
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        hint = kinds[0]
        words = tuple(word for kind in kinds[1:] for word in get_args(kind))
    if words:
        settings["type"] = _number_or_word(hint, words)
    elif get_origin(hint) is Literal:
        settings["choices"] = get_args(hint)
    elif get_origin(hint) is list:
        settings |= {"nargs": "+", "type": get_args(hint)[0]}
    elif hint is bool:
        settings |= {"nargs": "?", "const": True, "type": _boolean}
    else:
        settings["type"] = hint
    container.add_argument(*names, **settings)
    if hint is bool and default:
        opposite = [f"--no_{item.name}", f"--no-{item.name.replace('_', '-')}"]
        container.add_argument(*opposite, dest=item.name, action="store_false", default=True, help=argparse.SUPPRESS)


def _number_or_word(number: type, words: tuple[str, ...]) -> Callable[[str], Any]:
    """The type of an option that is a number or one of some words."""

    def read(text: str) -> Any:
        return text if text in words else number(text)

    read.__name__ = f"{number.__name__} or {' or '.join(words)}"  # in argparse's message
    return read


def _boolean(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"invalid value {text!r}: it must be true or false")
    return text.lower() in TRUE


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
    parser.refuse_unknown(argv)
    file = parser.parse_known_args(argv)[0].config or config
    if file is not None:
        argv = _file_arguments(parser, Path(file)) + argv
    return tuple(parser.parse(argv)[0])


def _file_arguments(parser: OptionParser, path: Path) -> list[str]:
    """Turns a configuration file into arguments, so that file and command line are checked by the same code."""
    values = read_mapping(path)
    known = [item.name for group in parser.groups for item in fields(group)]
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(set(values) - set(known))
    if unknown:
        hints = "".join(f" {hint.replace('--', '')}" for name in unknown if (hint := parser.hint(name, many=True)))
        raise ValueError(
            f"{path}: unknown keys {', '.join(unknown)}.{hints} The known keys are {', '.join(sorted(known))}."
        )
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
