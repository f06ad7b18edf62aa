"""Reading a saved adapter without a model: its configuration and its tensors."""

from __future__ import annotations

import json
from pathlib import Path

from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lora_ga.adapter.save import check_has_starts


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read a saved adapter.

    Args:
        folder: Its folder.

    Returns:
        Its configuration and its tensors.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or holds dA and dB without A₀ and B₀.
    """
    for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder}: holds no {file}; give the folder that save_pretrained wrote.")
    try:
        check_has_starts(folder)
        return PeftConfig.from_pretrained(str(folder)), load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except (SafetensorError, json.JSONDecodeError) as error:
        files = f"{CONFIG_NAME} or {SAFETENSORS_WEIGHTS_NAME}"
        raise ValueError(f"{folder}: damaged, {files} cannot be read ({error}). Save the adapter again.") from error
