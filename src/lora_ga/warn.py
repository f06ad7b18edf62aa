"""`warn`: a warning that shows the line of the user's code, not one of this library."""

import inspect
import warnings

# Packages whose lines are skipped: this one, and those that call it (a trainer) or stand between its functions.
SKIPPED = {"lora_ga", "contextlib", "torch", "transformers", "accelerate", "peft", "trl"}


def warn(message: str) -> None:
    """Give a `UserWarning` for the innermost line of a package that is not among `SKIPPED`.

    Args:
        message: The text.
    """
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in SKIPPED:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
