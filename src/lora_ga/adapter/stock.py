"""Letting PEFT load a saved adapter: what it would lose without an error is refused, and an old file mended."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_ga.adapter.alignment import scaling_of
from lora_ga.adapter.file import compiled_names
from lora_ga.adapter.save import FILE
from lora_ga.adapter.structure import set_rank
from lora_ga.files import damaged
from lora_ga.layers.kinds import layout_of
from lora_ga.layers.targets import PREFIX, exclusion, layer_name
from lora_ga.warn import warn


def load_stock(base: Any, path: str | Path, adapter_name: str = "default", **settings: Any) -> PeftModel:
    """Let PEFT load an adapter onto a base model.

    Args:
        base: The base model.
        path: The adapter's folder, or its name on the hub.
        adapter_name: The adapter.
        **settings: As PEFT's `from_pretrained`.

    Returns:
        PEFT's model.

    Raises:
        ValueError: PEFT did not find values for all layers of the adapter. The base then has LoRA layers.
        UserWarning: The program lets warnings be errors, and PEFT gave one.
    """
    config = PeftConfig.from_pretrained(str(path))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="(?s).*Found missing adapter keys")
            # PEFT 0.21 uses a name that Transformers 5.24 has renamed.
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
            if getattr(config, "target_parameters", None):  # PEFT's warning about patterns does not know parameters
                warnings.filterwarnings("ignore", message="The following .*_pattern keys did not match")
            model = PeftModel.from_pretrained(base, str(path), adapter_name, **settings)
    except UserWarning as warning:
        if "Found missing adapter keys" not in str(warning):  # the program lets all warnings be errors
            raise
        keys = re.findall(r"'([^']+)'", str(warning).rpartition("keys while loading")[2])
        lost = list(dict.fromkeys(layer_name(key).partition(".lora_")[0] for key in keys))
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        line = exclusion(lost, (name for name in _lora_layers(base) if name not in lost))
        raise ValueError(
            f"{path}: PEFT did not find {', '.join(lost[:3])}{more} in the file, so they would be untrained. Put a "
            "complete copy of the file back, and give the base model it was trained on. If both are right, PEFT "
            "renames these layers when it loads an adapter, and finds none of them, with plain LoRA neither: train "
            f"without them, by LoraConfig({line})."
        ) from warning
    if isinstance(config, LoraConfig):
        layers = _lora_layers(model)
        mended = mend_patterns(model.peft_config[adapter_name], layers, path)
        # The patterns name layers of the original base, which PEFT does not find in a compiled one.
        for name in layers if compiled_names(base) else mended:
            key = layout_of(layers[name]).pattern_name(layers[name], name)
            layers[name].scaling[adapter_name] = scaling_of(model.peft_config[adapter_name], key)
            set_rank(layers[name], adapter_name, layers[name].r[adapter_name])
    return model


def warn_not_found(model: Any, names: Collection[str], adapter_name: str) -> None:
    """Warn of layers that PEFT will not find in the adapter's own file, before they are trained.

    PEFT renames the keys of a file as Transformers renames those of a checkpoint. Of some models the patterns match
    new names as well.

    Args:
        model: The model.
        names: The layers of the adapter.
        adapter_name: The adapter.
    """
    keys = {f"{PREFIX}{name}.lora_A.weight": name for name in names}
    try:
        from peft.utils.transformers_weight_conversion import (
            convert_peft_adapter_state_dict_for_transformers as renamed,
        )

        file = {key: torch.empty(1, 1, device="meta") for key in keys}
        found = renamed(model, model.peft_config[adapter_name], file, adapter_name)
    except Exception:  # PEFT 0.18 renames nothing; and this serves a warning alone
        return
    lost = [name for key, name in keys.items() if key not in found]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        line = exclusion(lost, (name for name in names if name not in lost))
        warn(
            f"PEFT will not find {', '.join(lost[:3])}{more} in the file of this adapter: it renames their keys when "
            "it loads one, also of plain LoRA. They would load untrained, with a warning of missing keys. Leave them "
            f"out with LoraConfig({line})."
        )


def mend_patterns(config: LoraConfig, layers: Mapping[str, LoraLayer], path: str | Path) -> list[str]:
    """Give an adapter's alpha pattern the names that PEFT matches, with a warning.

    Earlier versions of this library wrote the path of the module that wraps a parameter, which PEFT never matches.

    Args:
        config: The adapter's configuration.
        layers: Layer name → LoRA layer.
        path: The adapter, for the warning.

    Returns:
        The layers whose names were mended.
    """
    alphas, mended = config.alpha_pattern or {}, []
    for name, layer in layers.items():
        old, new = (f"^{re.escape(each)}" for each in (name, layout_of(layer).pattern_name(layer, name)))
        if old != new and old in alphas:
            alphas[new] = alphas.pop(old)
            mended.append(name)
    if mended:
        warn(
            f"{path}: an earlier version of LoRA-GA wrote the alpha of {mended[0]}"
            + (f" and {len(mended) - 1} more" if len(mended) > 1 else "")
            + " under a name that PEFT does not match, so PEFT alone scales it wrongly. It is loaded with the scaling "
            "it was trained with. Save it again: the new file has the right names."
        )
    return mended


def check_scalings(model: nn.Module, adapter_name: str, record: Mapping[str, Any], path: str | Path) -> None:
    """Refuse an adapter that multiplies the B A of a layer by another factor than it was trained with.

    Args:
        model: The model, with the adapter as PEFT has loaded it.
        adapter_name: The adapter.
        record: The record of its sidecar.
        path: The adapter, for the message.

    Raises:
        ValueError: There is such a layer, and the message gives both factors; or the record is damaged.
    """
    layers, rslora = _lora_layers(model), record["original"].get("use_rslora", False)
    with damaged(path):
        plain = {name: alpha / (math.sqrt(rank) if rslora else rank) for name, (rank, alpha) in record["plain"].items()}
    for name, trained in (record["scaling"] | plain).items():
        found = layers[name].scaling.get(adapter_name) if name in layers else None
        if found is not None and not math.isclose(found, trained, rel_tol=1e-6):
            raise ValueError(
                f"{path}: {name} would be scaled by {found:g}, but was trained with {trained:g} ({FILE} says so). Put "
                "the adapter_config.json that was saved with it back. If another adapter was saved over it since, "
                f"remove {FILE}, which is that of the old one."
            )


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """The LoRA layers of a model: layer name → layer."""
    return {layer_name(path): layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}
