"""Whether a function of `torch.distributed.checkpoint.state_dict` is calling.

These functions expect a tensor with the name and the shape of each parameter in the state dict. An aligned layer's
factor trains A or dA and saves the joined matrix. Torch does not tell a module who asks for its names, so the frames of
the callers are read.
"""

from __future__ import annotations

import inspect
from types import FrameType

import torch

TORCH = "torch.distributed.checkpoint.state_dict"


def loads_state() -> bool:
    """Whether `set_model_state_dict` asks a module of ours for the tensors that it loads."""
    if torch.compiler.is_compiling():  # it cannot read frames
        return False
    frame = inspect.currentframe()
    while frame is not None and _module(frame).partition(".")[0] == "lora_ga":
        frame = frame.f_back
    while frame is not None and _module(frame) == TORCH:
        if frame.f_code.co_name == "_load_model_state_dict":
            return True
        frame = frame.f_back
    return False


def leaves_out_frozen() -> bool:
    """Whether `get_model_state_dict` makes a state dict from which it will take all names of frozen parameters.

    It does so with `StateDictOptions(ignore_frozen_params=True)`, as Accelerate saves an adapter under FSDP2.

    Returns:
        Whether it does.
    """
    frame = inspect.currentframe()
    while frame is not None and (_module(frame), frame.f_code.co_name) != (TORCH, "_get_model_state_dict"):
        frame = frame.f_back
    return frame is not None and getattr(frame.f_locals.get("info"), "ignore_frozen_params", False) is True


def _module(frame: FrameType) -> str:
    """The name of the module whose code a frame runs."""
    return str(frame.f_globals.get("__name__", ""))
