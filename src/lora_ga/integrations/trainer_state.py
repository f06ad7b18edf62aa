"""A trainer while an estimate runs: what the estimate may change, and afterwards everything as it was."""

from __future__ import annotations

import collections
import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer

from lora_ga.gradients.isolation import random_state_kept
from lora_ga.gradients.loader import generators_kept

DATA = ("train_dataset", "eval_dataset")  # attributes of a trainer that may hold millions of rows
LARGEST_TENSOR = 1_000_000  # numbers in a tensor that is copied: a sum of losses is small, a table of weights is not


@contextlib.contextmanager
def trainer_kept(trainer: Trainer, seed: int) -> Iterator[None]:
    """Let an estimate use a trainer without changing it, and without logging.

    Meanwhile the trainer has copies of its state, its arguments and the lists, dictionaries and small tensors among its
    attributes. `log` does nothing, and no callback is called. The global random generators start from a seed. On
    leaving, also after an error, the trainer has its own objects again, and all generators their former state.

    Args:
        trainer: The trainer.
        seed: The seed of the random draws that the trainer and its data make meanwhile.

    Yields:
        Nothing.
    """
    attributes = vars(trainer)
    saved = dict(attributes)
    with random_state_kept(), generators_kept(trainer):
        # Not torch.manual_seed: it would also change what CUDA starts from where CUDA has not started yet.
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            attributes.update({name: _copied(value) for name, value in saved.items() if name not in DATA})
            attributes.update(log=_log_nothing, state=_copied_object(trainer.state), control=copy.copy(trainer.control))
            attributes["callback_handler"] = copy.copy(trainer.callback_handler)
            attributes["callback_handler"].callbacks = []
            yield
        finally:
            attributes.clear()
            attributes.update(saved)


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of `Trainer.log`."""


def use_arguments_of_one_batch(trainer: Trainer) -> None:
    """Let a kept trainer read and compute as for an optimizer step of one batch in one process, and report to nothing.

    Otherwise the loss would be a part of a mean over several batches, processes or GPUs; and some of TRL's loaders
    would give the batches of an optimizer step together, once for each of them. `trainer_kept` puts the arguments back.

    Args:
        trainer: The trainer.
    """
    arguments: Any = copy.copy(trainer.args)
    arguments.average_tokens_across_devices = False
    arguments._n_gpu = 1
    arguments.gradient_accumulation_steps = 1
    arguments.report_to = []  # TRL's trainers write durations to the trackers without calling `log`
    vars(trainer).update(args=arguments, current_gradient_accumulation_steps=1)


def _copied_object(value: Any) -> Any:
    """A copy of an object, with copies of the containers among its attributes."""
    twin = copy.copy(value)
    vars(twin).update({name: _copied(held) for name, held in vars(value).items()})
    return twin


def _copied(value: Any) -> Any:
    """A copy of a builtin container, and of the containers and small tensors in it; anything else as it is."""
    if type(value) is list:
        return [_copied(item) for item in value]
    if type(value) is set:
        return set(value)
    if type(value) is collections.deque:
        return collections.deque(map(_copied, value), value.maxlen)
    if type(value) in (dict, collections.defaultdict, collections.Counter, collections.OrderedDict):
        twin = copy.copy(value)
        for key, item in value.items():
            twin[key] = _copied(item)
        return twin
    if type(value) is Tensor and not value.requires_grad and value.numel() <= LARGEST_TENSOR:
        return value.clone()
    return value
