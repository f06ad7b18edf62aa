"""Whether a saved adapter fits a base model: its structure, its shapes, its vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_ga.adapter.file import ENDS
from lora_ga.adapter.save import FILE
from lora_ga.base import another_base, embeddings
from lora_ga.files import adapters_in
from lora_ga.layers.targets import layer_name
from lora_ga.version import installed


def check_base(model: nn.Module, record: Mapping[str, Any], path: str | Path) -> None:
    """Refuse another base model than the one the adapter was trained on.

    Args:
        model: A base model, or a model with adapters.
        record: The sidecar's record.
        path: The adapter, for the message.

    Raises:
        ValueError: It is another.
    """
    if difference := another_base(model, record["fingerprint"]):
        raise ValueError(
            f"{path}: trained on another base model: {difference}. Give the base model it was trained on."
            f"{_other_transformers(record)} If another adapter was saved over it since, {FILE} is that of the old one: "
            "remove the file."
        )


def _other_transformers(record: Mapping[str, Any]) -> str:
    """That another version of Transformers may have made the model, for a message; empty if it was the same."""
    versions, here = record.get("versions"), installed("transformers")
    saved = versions.get("transformers") if isinstance(versions, Mapping) else None
    if saved == here:
        return ""
    made, pip = (f"Transformers {saved}", f" (transformers=={saved})") if saved else ("another Transformers", "")
    return (
        f" If it is the same model, but from {made}: Transformers {here}, which is installed, names the layers of some "
        f"models otherwise and joins the experts of others. Use the version it was trained with{pip}."
    )


def check_layers(base: nn.Module, folder: Path) -> None:
    """Refuse a base model in which a layer of a saved adapter has another shape, before PEFT loads the adapter.

    Embeddings are left out: `check_base` and `check_vocabulary` name the two sizes of the vocabulary.

    Args:
        base: The base model.
        folder: The adapter's folder. One without `adapter_model.safetensors` is not looked at.

    Raises:
        ValueError: There is such a layer; the message gives its two shapes.
    """
    saved, ends = shapes_in(folder), embeddings(base)
    others = ((path, module) for path, module in base.named_modules() if not any(module is end for end in ends))
    modules = {layer_name(path): module for path, module in others}
    for key, shape in saved.items():
        layer, _, parameter = key.rpartition(".")
        module = modules.get(layer)
        weight = getattr(module, parameter, None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and tuple(weight.shape) != shape:
            classes = len(weight) == getattr(getattr(base, "config", None), "num_labels", None)
            advice = f"Load the base model with num_labels={shape[0]}" if classes else "Give its own base model"
            raise ValueError(
                f"{folder}: {layer} is {shape[0]} x {shape[1]} in this adapter, and {weight.shape[0]} x "
                f"{weight.shape[1]} in the model. {advice}."
            )
    for key in saved:
        layer = key.removesuffix(ENDS["A"][0])
        b = saved.get(layer + ENDS["B"][0])
        sides = tuple(getattr(modules.get(layer), side, None) for side in ("out_features", "in_features"))
        if b is not None and key != layer and len(b) == 2 and None not in sides and sides != (b[0], saved[key][1]):
            raise ValueError(
                f"{folder}: trained on another base model: {layer} is {b[0]} x {saved[key][1]} there, and {sides[0]} x "
                f"{sides[1]} in this model. Give the base model it was trained on."
            )


def adapters_below(folder: Path) -> str:
    """Name the adapters in the subfolders of a folder, for the message that it holds none itself.

    Args:
        folder: The folder.

    Returns:
        A sentence, after a space; empty if there are none.
    """
    found = adapters_in(folder)
    if not found:
        return ""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    names = ", ".join(str(each.relative_to(folder)) for each in found[:3])
    return f" Its subfolders hold adapters: {names}{more}. Give one of them, as {found[0]}."


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a folder's `adapter_model.safetensors`, by their names in the base model.

    Args:
        folder: The adapter's folder.

    Returns:
        Name → shape; empty if there is no such file, or one that PEFT refuses.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        return {}
    try:
        with safe_open(str(file), framework="pt") as opened:
            return {layer_name(key): tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError:
        return {}


def check_vocabulary(base: nn.Module, shapes: Mapping[str, Sequence[int]], path: str | Path) -> None:
    """Refuse a base model with another vocabulary than that of the embeddings that an adapter holds.

    Args:
        base: The base model, also with adapters.
        shapes: Name of a saved tensor in the base model → its shape.
        path: The adapter, for the message.

    Raises:
        ValueError: It has another.
    """
    ends = embeddings(base)
    for name, module in base.named_modules():
        inner = getattr(module, "base_layer", module)
        tokens = getattr(inner, "num_embeddings", None) or getattr(inner, "out_features", None)
        if tokens is None or not any(module is end for end in ends):
            continue
        layer = layer_name(name)
        a_or_weight = {f"{layer}.weight": 0, f"{layer}.base_layer.weight": 0, f"{layer}.lora_embedding_A": 1}
        for key, dim in (a_or_weight | {f"{layer}.lora_B.weight": 0}).items():
            if key in shapes and shapes[key][dim] != tokens:
                raise ValueError(
                    f"{path}: {layer} has {shapes[key][dim]} tokens in this adapter, and {tokens} in the model. Call "
                    f"resize_token_embeddings({shapes[key][dim]}) on the base model, before it has an adapter."
                )
