"""The settings of `LoraGAConfig` as options: name, type, choices and default of each come from its dataclass field."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, get_type_hints

from lora_ga.config import CHOICES, LoraGAConfig

# The settings of how A and B start. All others, new ones too, are settings of the estimate.
START = ("stable_gamma", "reach", "direction", "scale", "offset")
# `ModelOptions` has the one --seed of a command.
ELSEWHERE = ("seed",)
# An option has the name of its setting, except for the batches: a command reads batches for training too.
OPTION_OF = {"max_batches": "estimate_batches"}

# Setting -> help text. A setting without one here shows the first sentence of its entry in the docstring.
HELP = {
    "stable_gamma": "lora-ga: --scale stable is d_out^(1/4) / sqrt(gamma) (default: chosen for each layer by --reach)",
    "reach": "lora-ga: size of the start times the LoRA scaling, where gamma is chosen; plain LoRA's is 1.15",
    "direction": "lora-ga: which singular directions of the gradient go to A and to B; ArB2r is the paper's choice",
    "scale": "lora-ga: length of these directions",
    "offset": "lora-ga: adapter leaves the base model unchanged; base subtracts the start from its weights (the paper)",
    "estimator": "streaming keeps the leading directions; dense keeps whole gradients; probe is for layers in fused "
    "kernels",
    "oversample": "streaming: directions kept beyond the 2r that are needed",
    "power_steps": "streaming: power iterations for each batch; 1 is more exact",
    "max_batches": "batches of training data in the estimate; auto is 32, and fewer in a short run",
    "tolerance": "streaming: stop at a layer when the share of its directions' energy that still changes is below this",
    "on_missing": "a layer without a usable gradient: error stops; lora starts the layer as plain LoRA and warns",
    "training_mode": "gradients of the model in training mode, with dropout off; false: in evaluation mode",
}

T = TypeVar("T")


def estimate_settings(config: type = LoraGAConfig) -> list[str]:
    """The names of the settings that concern the estimate."""
    names = [field.name for field in dataclasses.fields(config)]
    return [name for name in names if name not in START and name not in ELSEWHERE]


def settings_as_options(names: Sequence[str], config: type = LoraGAConfig) -> Callable[[type[T]], type[T]]:
    """Class decorator, below `@dataclass`: adds a field for each of these settings.

    Args:
        names: Names of settings.
        config: `LoraGAConfig`, or a dataclass like it.

    Returns:
        The decorator.
    """
    fields, types = {field.name: field for field in dataclasses.fields(config)}, get_type_hints(config)

    def add(cls: type[T]) -> type[T]:
        annotations = dict(inspect.get_annotations(cls))
        for name in names:
            option = OPTION_OF.get(name, name)
            annotations[option] = Literal[CHOICES[name]] if name in CHOICES else types[name]
            help_text = HELP.get(name) or first_sentence(config, name)
            setattr(cls, option, dataclasses.field(default=fields[name].default, metadata={"help": help_text}))
        cls.__annotations__ = annotations
        return cls

    return add


def first_sentence(config: type, name: str) -> str:
    """The first sentence about a setting in the `Attributes:` section of the docstring, or an empty text."""
    found = re.search(rf"^ *{name}: (.+?)(?:[.:]\s|\.?\Z)", config.__doc__ or "", re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()).replace("%", "%%") if found else ""


def library_config(*groups: Any, config: Any = LoraGAConfig) -> Any:
    """Makes a `LoraGAConfig` of the options that are settings; the other settings keep their defaults.

    Args:
        groups: Objects with options as attributes.
        config: `LoraGAConfig`, or a dataclass like it.

    Returns:
        The configuration.

    Raises:
        ValueError: A value is not allowed; the message begins with the option. Or two settings exclude each other.
    """
    given = {option: value for group in groups for option, value in vars(group).items()}
    options = {field.name: OPTION_OF.get(field.name, field.name) for field in dataclasses.fields(config)}
    values = {name: given[option] for name, option in options.items() if option in given}
    for name, value in values.items():
        try:
            config(**{name: value})  # with the defaults of all other settings, so that an error concerns this one
        except ValueError as error:
            raise ValueError(f"--{options[name]}: {error}") from error
    return config(**values)


def in_options(message: str) -> str:
    """A message of the library with options in the place of Python's settings: --on_missing lora for on_missing="lora".

    Where a lower rank is all that it takes, it comes first among the ways out.

    Args:
        message: The message.

    Returns:
        The message for the command line.
    """
    before, names = r"(?<![\w/.-])", [field.name for field in dataclasses.fields(LoraGAConfig)]
    for name in (name for name in names if name not in ELSEWHERE):
        setting = rf'{name}=(["\']?)(\w+)\1'
        for text in (rf"LoraGAConfig\({setting}\)", setting):
            message = re.sub(before + text, rf"--{OPTION_OF.get(name, name)} \2", message)
    message = re.sub(rf"{before}(target_modules|target_parameters)\b", r"--\1", message)
    message = re.sub(r"with LoraConfig\(exclude_modules=\[[^\]]*\]\)", "of --target_modules", message)
    fits = re.findall(r"^  .*The largest rank that fits all is (\d+)", message, re.MULTILINE)
    if fits and len(re.findall(r"^  ", message, re.MULTILINE)) == 1:
        message = message.replace("\nLeave them out of", f"\nGive --rank {fits[0]}, leave them out of")
    return message
