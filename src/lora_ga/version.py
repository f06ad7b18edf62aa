"""The version of the package, and the oldest versions of the libraries that it works with."""

import importlib.metadata
import re
from typing import Any

__version__ = "0.1.0"

# Those of `dependencies` in pyproject.toml. Transformers' Trainer, in all of these versions, calls Accelerate with an
# argument that Accelerate 1.3 brought.
MINIMUM = {"torch": "2.6", "transformers": "4.55", "peft": "0.18", "accelerate": "1.3"}


def check_versions() -> None:
    """Refuse a library that is older than its minimum.

    Pre-releases and builds from source count as the release they lead to. A library without version metadata is
    accepted.

    Raises:
        ImportError: A library is too old. The message names each with its version and minimum, and the pip command.
    """
    old = {}
    for name, minimum in MINIMUM.items():
        if is_before(name, minimum):
            old[name] = f"{name} {installed(name)} is installed, but {name} {minimum} or newer is needed"
    if old:
        remedy = " ".join(f'"{name}>={MINIMUM[name]}"' for name in old)
        raise ImportError(f"lora-ga {__version__}: {'; '.join(old.values())}. Run: pip install --upgrade {remedy}")


def written_with() -> dict[str, str]:
    """The versions that every file names which this library writes: its own, and those of torch and Transformers."""
    return {"lora_ga": __version__} | {name: installed(name) for name in ("torch", "transformers")}


def dtype_setting(dtype: Any) -> dict[str, Any]:
    """The setting of Transformers' `from_pretrained` for the dtype of the weights.

    Its name is `dtype` since Transformers 4.56, which warns of the older name `torch_dtype`.

    Args:
        dtype: A dtype of torch, its name, or "auto".

    Returns:
        Name → `dtype`.
    """
    return {"torch_dtype" if is_before("transformers", "4.56") else "dtype": dtype}


def is_before(library: str, version: str) -> bool:
    """Whether the installed version of a library is older than another version.

    Args:
        library: Its name in the package index.
        version: The other version, for instance "5.0".

    Returns:
        Whether it is; no for a library without version metadata.
    """
    release = _release(installed(library))
    return bool(release) and release < _release(version)


def installed(name: str) -> str:
    """The version in a library's metadata.

    Args:
        name: Its name in the package index.

    Returns:
        The version; empty for a library without version metadata.
    """
    try:
        return importlib.metadata.version(name) or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (2, 6, 0) of "2.6.0a0+git1"; none if it begins with something else."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in found[0].split(".")) if found else ()
