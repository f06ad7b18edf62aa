"""Taking an adapter out of a base model again, where making or loading it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


@contextlib.contextmanager
def base_kept(base: Any) -> Iterator[None]:
    """Let a base model be as before if the block, which gives it an adapter, fails.

    PEFT leaves its layers in the base, and the base's parameters frozen, where it raises while it makes or loads an
    adapter. There is no `PeftModel` then whose `unload` could remove them.

    Layers of PEFT that the base has before stay.

    Args:
        base: The base model.

    Yields:
        Nothing.
    """
    required = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    before, had_adapters = set(base.modules()), hasattr(base, "peft_config")
    try:
        yield
    except BaseException:
        _remove_layers(base, before)
        if not had_adapters and hasattr(base, "peft_config"):
            del base.peft_config
        for parameter, needed in required:
            parameter.requires_grad_(needed)
        raise


def _remove_layers(base: nn.Module, before: set[nn.Module]) -> None:
    """Put the modules of the base in the place of PEFT's layers around them."""
    removed: list[str] = []
    for path, module in list(base.named_modules()):
        is_layer = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and module not in before
        if not is_layer or path.startswith(tuple(removed)):
            continue
        removed.append(f"{path}.")
        layer: Any = module
        if isinstance(layer, AuxiliaryTrainingWrapper):  # of a whole module PEFT's `unload` keeps the adapter's copy
            own = layer.original_module
        elif hasattr(layer, "unload_and_optionally_merge_module"):  # attention
            own = layer.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
        else:
            own = layer.get_base_layer()
        parent, _, name = path.rpartition(".")
        setattr(base.get_submodule(parent), name, own)
