"""LoRA-GA in ms-swift: `get_lora_ga_model` and `LoraGAContext`, which ms-swift imports from `lora_ga.entrypoint`.

`swift sft --init_weights lora-ga` calls `get_lora_ga_model` in `swift.pipelines.train.tuner.prepare_adapter`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lora_ga.adapter.initialize import initialize
from lora_ga.adapter.undo import base_kept
from lora_ga.config import LoraGAConfig
from lora_ga.gradients.isolation import replaced
from lora_ga.gradients.reader import known_length

# Names of scales in ms-swift that differ from those of `LoraGAConfig`.
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
    """Add a LoRA adapter to a model and initialize it with LoRA-GA on the first examples of a data set.

    Args:
        model: The base model.
        data_collator: Makes a batch of examples, as the trainer does.
        dataset: Encoded training examples; the first `batch_size · num_iters` are read.
        batch_size: Examples in a batch of the estimate.
        num_iters: Batches of the estimate.
        max_length: Examples are cut to this many tokens; None leaves them whole.
        direction: As in `LoraGAConfig`.
        dtype: The adapter's dtype by name; None leaves PEFT's choice.
        scale: As in `LoraGAConfig`, or ms-swift's "weightS", which is "weight" there.
        stable_gamma: As in `LoraGAConfig`.
        peft_config: The adapter's configuration. By default the variable `lora_config` of the calling function, as in
            ms-swift, which does not pass its configuration on.

    Returns:
        The adapted model. On an error the base model has no LoRA layers, as before the call.

    Raises:
        ValueError: There is no configuration or no example, the dtype is unknown, or `lora_ga.initialize` refuses.
    """
    if peft_config is None:
        frame = inspect.currentframe()
        peft_config = _lora_config_from_call_stack(frame.f_back if frame is not None else None)
    config = LoraGAConfig(
        direction=direction, scale=SCALES.get(scale, scale), stable_gamma=stable_gamma, max_batches=num_iters
    )
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}, or None.")
    examples = _first_examples(dataset, batch_size * num_iters, max_length)
    with base_kept(model):
        # ms-swift would save an initial and a converted adapter for any initialization whose name is a string.
        adapted = _add_adapter(model, dataclasses.replace(peft_config, init_lora_weights=True))
        if dtype is not None:
            _cast_adapter(adapted, DTYPES[dtype])
        initialize(adapted, DataLoader(examples, batch_size, collate_fn=data_collator), config)  # type: ignore[arg-type]
    return adapted


def _lora_config_from_call_stack(caller: FrameType | None) -> LoraConfig:
    """Read the variable `lora_config` of the function that calls `get_lora_ga_model`.

    This is the fallback for ms-swift: its `prepare_adapter` makes a LoraConfig of the user's rank, alpha, targets and
    dropout, but does not pass it on.

    Args:
        caller: The frame of the calling function.

    Returns:
        The configuration.

    Raises:
        ValueError: The calling function has no LoraConfig of that name.
    """
    config = caller.f_locals.get("lora_config") if caller is not None else None
    if not isinstance(config, LoraConfig):
        raise ValueError(
            "get_lora_ga_model found no LoraConfig named lora_config in the calling function, where ms-swift 3 and 4 "
            "have it; so the user's rank, alpha and targets are not known. Pass peft_config=LoraConfig(...)."
        )
    return config


def _add_adapter(model: nn.Module, config: LoraConfig) -> PeftModel:
    """Add a plain adapter: with ms-swift's function if the configuration is of ms-swift's class, else with PEFT's."""
    if type(config).__module__.startswith("swift."):
        from swift.tuners import Swift

        return Swift.prepare_model(model, config)
    return peft.get_peft_model(model, config)


def _cast_adapter(model: PeftModel, dtype: torch.dtype) -> None:
    """Cast the LoRA parameters of a model."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2].startswith("lora_"):  # lora_A, lora_B, lora_embedding_A, lora_magnitude_vector, …
            module.to(dtype)


def _first_examples(dataset: Any, count: int, max_length: int | None) -> list[Any]:
    """Read the first examples of a data set, cut to a length.

    Returns:
        The examples.

    Raises:
        ValueError: The data set is empty.
    """
    examples = [_cut(example, max_length) for example, _ in zip(_rows(dataset), range(count), strict=False)]
    if not examples:
        raise ValueError("The data set holds no example; the gradient needs at least one.")
    return examples


def _rows(dataset: Any) -> Iterator[Any]:
    """The rows of a data set, which can be indexed or iterated over."""
    count = None if isinstance(dataset, IterableDataset) else known_length(dataset)
    if count is not None and hasattr(dataset, "__getitem__"):
        return (dataset[index] for index in range(count))
    return iter(dataset)


def _cut(example: Any, max_length: int | None) -> Any:
    """Cut all fields of an example that have one entry a token to the first `max_length` tokens."""
    if max_length is None or not isinstance(example, dict) or "input_ids" not in example:
        return example
    tokens = len(example["input_ids"])

    def cut(value: Any) -> Any:
        sized = isinstance(value, Sequence) or (isinstance(value, torch.Tensor) and value.dim() > 0)
        return value[:max_length] if sized and not isinstance(value, str) and len(value) == tokens else value

    return {key: cut(value) for key, value in example.items()}


class LoraGAContext(contextlib.ExitStack):
    """While it is open, `model.save_pretrained` ignores `path_initial_model_for_weight_conversion`.

    ms-swift opens it to save an adapter from which the initial one is subtracted. An adapter of this library is for
    the original base model as it is, so there is nothing to subtract.
    """

    def __init__(self, model: nn.Module, named_grad: Any = None) -> None:
        """Prepare the context.

        Args:
            model: The adapted model.
            named_grad: Not used; part of the interface that ms-swift expects.
        """
        super().__init__()
        self.model = model

    def __enter__(self) -> LoraGAContext:
        """Replace `save_pretrained`.

        Returns:
            The context.
        """
        save: Any = self.model.save_pretrained

        def save_unconverted(*args: Any, path_initial_model_for_weight_conversion: Any = None, **kwargs: Any) -> Any:
            return save(*args, **kwargs)

        self.enter_context(replaced(self.model, "save_pretrained", save_unconverted))
        return self
