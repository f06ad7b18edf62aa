"""A base model by itself: its modules without those that PEFT and torch.compile add, and a digest of its structure."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# The step that torch.compile(module) puts into the paths of everything inside the module.
COMPILED = "_orig_mod"
# An error about another base tries vocabularies that differ by up to this many tokens. It takes about a second.
MOST_TOKENS_ADDED = 4096

Shapes = set[tuple[str, tuple[int, ...]]]


def base_model(model: Any) -> nn.Module:
    """The base model of a `PeftModel`, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def without_compiled(path: str) -> str:
    """A path of a module or tensor without the steps that torch.compile adds: the path in the model itself."""
    return ".".join(part for part in path.split(".") if part != COMPILED)


def named_modules(model: nn.Module, enter: Callable[[nn.Module, str], bool]) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model with their paths, as `model.named_modules()` has them, but without the inside of some.

    The modules that PEFT puts into every layer are most of an adapted model. Not to visit them saves time.

    Args:
        model: The model.
        enter: Module and name of a child → whether to go on into the child.

    Yields:
        Path and module.
    """
    waiting, seen = [("", model)], set()
    while waiting:
        path, module = waiting.pop()
        if module not in seen:
            seen.add(module)
            yield path, module
            children = [(name, child) for name, child in module.named_children() if enter(module, name)]
            waiting += [(f"{path}.{name}" if path else name, child) for name, child in reversed(children)]


def embeddings(model: Any) -> list[Any]:
    """The input and the output embeddings of a model that knows them."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):  # not a model of Transformers
            found.append(getattr(base_model(model), getter)())
    return found


def fingerprint(model: nn.Module) -> str:
    """A digest of a base model's structure: the paths of its modules and the shapes of their weights, not the values.

    Adapters and PEFT's wrappers are left out, and linear layers count by their numbers of inputs and outputs. So a
    model has the same fingerprint with and without an adapter, and plain or quantised.

    Args:
        model: A base model, or a `PeftModel` around it.

    Returns:
        16 hexadecimal digits.
    """
    return _digest_of_shapes(_shapes(model, wrappers=False))


def another_base(
    model: nn.Module, recorded: str, found: str | None = None, layers: Mapping[str, tuple[int, int]] | None = None
) -> str | None:
    """How a model differs from the base model whose fingerprint a file has recorded.

    Args:
        model: A base model, or a `PeftModel` around it.
        recorded: The fingerprint in the file.
        found: The model's fingerprint, if it is known.
        layers: Outputs and inputs of the layers in the file, if it has them: layer name → (O, I).

    Returns:
        The difference, for an error message; None if the file is for this model.
    """
    found = found or fingerprint(model)
    # Earlier versions took the shape that PEFT's wrapper of a tied head reports for the head's, but transposed, and the
    # paths of a compiled base as they are.
    earlier = (_shapes(model, wrappers=wrappers, compiled=True) for wrappers in (True, False))
    if recorded == found or recorded in map(_digest_of_shapes, earlier):
        return None
    difference = f"its fingerprint is {recorded}, this model's {found} (module names and weight shapes)"
    sizes = _vocabulary_sizes(model, recorded)
    if sizes is None:
        return _differing_layer(model, layers or {}) or difference
    return (
        f"{difference}. Only the vocabulary differs: {sizes[1]} tokens there, {sizes[0]} in this model "
        f"(resize_token_embeddings({sizes[1]}) changes that)"
    )


def _differing_layer(model: nn.Module, layers: Mapping[str, tuple[int, int]]) -> str | None:
    """The first of a file's layers that a model lacks, or has in another shape. Linear layers alone are compared.

    Returns:
        The difference; None if there is none.
    """
    shapes = dict(_shapes(model, wrappers=False))
    paths = {without_compiled(_path_in_base(name)) for name, _ in base_model(model).named_modules()}
    for name, (outputs, inputs) in layers.items():
        if name not in paths and "[" not in name:
            return f"this model has no {name}"
        if shapes.get(name, (outputs, inputs)) != (outputs, inputs):
            there, here = f"{outputs} x {inputs}", " x ".join(map(str, shapes[name]))
            return f"{name} is {there} there, and {here} in this model"
    return None


def _digest_of_shapes(shapes: Shapes) -> str:
    return hashlib.sha256(json.dumps(sorted(shapes)).encode()).hexdigest()[:16]


def _shapes(model: nn.Module, *, wrappers: bool, compiled: bool = False) -> Shapes:
    """The paths of a base model's linear layers and other parameters, and their shapes.

    Args:
        model: A base model, or a `PeftModel` around it.
        wrappers: Whether PEFT's wrappers of whole modules count as well, as in earlier versions.
        compiled: Whether the steps that torch.compile adds to paths count as well, as in earlier versions.

    Returns:
        Paths and shapes.
    """
    shapes: Shapes = set()
    for name, module in named_modules(base_model(model), lambda _, name: not _of_adapter(name)):
        wrapper = {"original_module", "modules_to_save"} <= {child for child, _ in module.named_children()}
        if (wrapper and not wrappers) or hasattr(module, "base_layer"):
            continue
        path = _path_in_base(name) if compiled else without_compiled(_path_in_base(name))
        outputs, inputs = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if isinstance(outputs, int) and isinstance(inputs, int):
            shapes.add((path, (outputs, inputs)))
            continue
        for key, parameter in module.named_parameters(recurse=False):
            # A parameter that ZeRO-3 has partitioned is empty; DeepSpeed keeps its shape in `ds_shape`.
            shapes.add((f"{path}.{key}", tuple(getattr(parameter, "ds_shape", parameter.shape))))
    return shapes


def _of_adapter(name: str) -> bool:
    """Whether PEFT added a child with this name."""
    return name.startswith(("lora_", "trainable_tokens_")) or name == "modules_to_save"


def _path_in_base(name: str) -> str:
    """A module's path without the steps that PEFT's wrappers add."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module", "token_adapter"))


def _vocabulary_sizes(model: nn.Module, recorded: str) -> tuple[int, int] | None:
    """Whether a fingerprint is that of the model with another size of its vocabulary.

    A fingerprint shows no sizes, so sizes near the model's are tried.

    Returns:
        The size of the model's vocabulary, and that of the fingerprint; None if more differs.
    """
    base: Any = base_model(model)
    try:
        ends = [base.get_input_embeddings(), base.get_output_embeddings()]
        size = int(ends[0].weight.shape[0])
    except (AttributeError, NotImplementedError):  # not a model of Transformers, or one without a vocabulary
        return None
    paths = {
        without_compiled(_path_in_base(name))
        for name, module in base.named_modules()
        if any(module is end for end in ends)
    }
    shapes = sorted(_shapes(model, wrappers=False))
    resized = [
        index
        for index, (path, shape) in enumerate(shapes)
        if shape[:1] == (size,) and (path in paths or path.rpartition(".")[0] in paths or shape == (size,))
    ]
    text = [json.dumps(entry) for entry in shapes]
    for other in range(max(1, size - MOST_TOKENS_ADDED), size + MOST_TOKENS_ADDED + 1):
        for index in resized:
            path, shape = shapes[index]
            text[index] = json.dumps((path, (other, *shape[1:])))
        if hashlib.sha256(f"[{', '.join(text)}]".encode()).hexdigest()[:16] == recorded:
            return size, other
    return None
