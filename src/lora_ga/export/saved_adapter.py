"""Reading a saved adapter without a model: its configuration and its tensors."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from lora_ga.adapter.file import check_names
from lora_ga.base import without_compiled
from lora_ga.files import adapters_in, damaged


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read a saved adapter.

    Args:
        folder: Its folder.

    Returns:
        Its configuration, and its tensors by the names of the original base (see `check_names`).

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, of another type of adapter, or holds dA and dB without A₀ and B₀.
    """
    for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / file).is_file():
            found = f"holds no {file}" if folder.is_dir() else "there is no such folder"
            wanted = " or ".join(map(str, adapters_in(folder))) or "the folder that save_pretrained wrote"
            raise FileNotFoundError(f"{folder}: {found}; give {wanted}.")
    check_names(folder)
    with damaged(folder / CONFIG_NAME):
        config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder}: an adapter of type {config.peft_type}, not LoRA. Give the folder of one.")
    with damaged(folder / SAFETENSORS_WEIGHTS_NAME):
        tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    return config, {without_compiled(key): value for key, value in tensors.items()}
