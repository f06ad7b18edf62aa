"""The package that ms-swift imports for `--init_weights lora-ga`: `get_lora_ga_model` and `LoraGAContext`.

ms-swift's `prepare_adapter` makes a LoraConfig of the user's flags and then calls `get_lora_ga_model` without it. It is
taken from the calling function, so that rank, alpha, targets, dropout and the rest are the user's.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader

from lora_ga.adapter.initialize import initialize
from lora_ga.config import LoraGAConfig

# ms-swift's names of the scales that this library calls otherwise.
SCALES = {"weightS": "weight", "weights": "weight"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def get_lora_ga_model(
    model: nn.Module,
    data_collator: Callable[[list[Any]], Any],
    dataset: Any,
    batch_size: int = 2,
    num_iters: int = 2,
    max_length: int | None = 1024,
    direction: str = "ArB2r",
    dtype: str | None = None,
    scale: str = "stable",
    stable_gamma: float = 16,
    *,
    peft_config: LoraConfig | None = None,
) -> PeftModel:
    """An adapted model that starts where full fine-tuning would go, from the first examples of a data set.

    Args:
        model: The base model.
        data_collator: Makes a batch of examples, as the trainer does.
        dataset: Encoded training examples; the first `batch_size · num_iters` are read.
        batch_size: Examples in a batch of the estimate.
        num_iters: Batches in the estimate.
        max_length: Examples are cut to so many tokens; None leaves them whole.
        direction: As in `LoraGAConfig`.
        dtype: The adapter's dtype by name; None leaves PEFT's choice.
        scale: As in `LoraGAConfig`; ms-swift's "weightS" is its "weight".
        stable_gamma: As in `LoraGAConfig`.
        peft_config: The adapter; None takes `lora_config` of the calling function, which is ms-swift's own.

    Returns:
        The adapted model. If the start is refused, the base model is given back without LoRA layers.

    Raises:
        ValueError: There is no configuration to be found, no example, or what `lora_ga.initialize` refuses.
    """
    caller = inspect.currentframe()
    found = peft_config if peft_config is not None else _callers_config(caller.f_back if caller else None)
    config = LoraGAConfig(
        direction=direction, scale=SCALES.get(scale, scale), stable_gamma=stable_gamma, max_batches=num_iters
    )
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}, or None.")
    examples = _first(dataset, batch_size * num_iters, max_length)
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapted = _adapted(model, dataclasses.replace(found, init_lora_weights=True))
    try:
        if dtype is not None:
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(DTYPES[dtype])
        initialize(adapted, DataLoader(examples, batch_size, collate_fn=data_collator), config)  # type: ignore[arg-type]
    except BaseException:
        adapted.unload()
        for parameter, needed in required:
            parameter.requires_grad_(needed)
        raise
    return adapted


def _callers_config(frame: Any) -> LoraConfig:
    """The LoraConfig that ms-swift made of the user's flags.

    Returns:
        It.

    Raises:
        ValueError: The calling function has none.
    """
    found = frame.f_locals.get("lora_config") if frame is not None else None
    if not isinstance(found, LoraConfig):
        raise ValueError(
            "get_lora_ga_model found no LoraConfig named lora_config in the calling function, where ms-swift 3 and 4 "
            "have it; so the user's rank, alpha and targets are not known. Pass peft_config=LoraConfig(...)."
        )
    return found


def _adapted(model: nn.Module, config: LoraConfig) -> PeftModel:
    """The model with a plain adapter: by ms-swift's own function where the configuration is its own."""
    if type(config).__module__.startswith("swift."):
        from swift.tuners import Swift

        return Swift.prepare_model(model, config)
    return peft.get_peft_model(model, config)


def _first(dataset: Any, count: int, max_length: int | None) -> list[Any]:
    """The first examples of a data set, cut to a length.

    Returns:
        The examples.

    Raises:
        ValueError: There is none.
    """
    examples = [_cut(example, max_length) for example, _ in zip(_rows(dataset), range(count), strict=False)]
    if not examples:
        raise ValueError("The data set holds no example; the gradient needs at least one.")
    return examples


def _rows(dataset: Any) -> Iterator[Any]:
    """The rows of a data set with a length, or of an iterable one."""
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return (dataset[index] for index in range(len(dataset)))
    return iter(dataset)


def _cut(example: Any, max_length: int | None) -> Any:
    """An example without what lies behind `max_length` tokens, in all fields that have an entry for each token."""
    if max_length is None or not isinstance(example, dict) or "input_ids" not in example:
        return example
    tokens = len(example["input_ids"])

    def cut(value: Any) -> Any:
        sized = isinstance(value, Sequence) or (isinstance(value, torch.Tensor) and value.dim() > 0)
        return value[:max_length] if sized and not isinstance(value, str) and len(value) == tokens else value

    return {key: cut(value) for key, value in example.items()}


class LoraGAContext:
    """While it is open, `model.save_pretrained` converts nothing: the adapter is for the original base as it is.

    ms-swift opens it to save an adapter "converted" with the initial one.
    """

    def __init__(self, model: Any, named_grad: Any = None) -> None:
        self.model, self.named_grad = model, named_grad

    def __enter__(self) -> None:
        save = self.model.save_pretrained

        def unconverted(*args: Any, path_initial_model_for_weight_conversion: Any = None, **kwargs: Any) -> Any:
            return save(*args, **kwargs)

        self.model.__dict__["save_pretrained"] = unconverted

    def __exit__(self, *_: object) -> None:
        del self.model.__dict__["save_pretrained"]
