"""Embeddings: how ids and output gradients become rows, and how factors take the place of PEFT's parameters.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from typing import Any

from torch import Tensor, nn

from lora_ga.distributed.state_dicts import loads_state
from lora_ga.layers.factors import Factor
from lora_ga.layers.linear import Rows, TransposedLayout
from lora_ga.linalg.accumulator import UnitRows


class EmbeddingLayout(TransposedLayout):
    """The weight of an embedding, (entries, width). Its input is an id, which stands for a unit vector."""

    probed = False
    zero_factor = "A"
    factor_tables = ("lora_embedding_A", "lora_embedding_B")

    def part_shape(self, layer: Any) -> tuple[int, int]:
        """(width, entries)."""
        base = layer.get_base_layer()
        return base.embedding_dim, base.num_embeddings

    def rows(self, layer: Any, x: Tensor, g: Tensor) -> Rows:
        """One row for each id. The rows of padding have no gradient.

        Args:
            layer: PEFT's layer.
            x: The ids, of any shape.
            g: The gradient at the output, (..., width).

        Yields:
            The number of the only part, unit vectors (T, I) and gradients (T, O).
        """
        base = layer.get_base_layer()
        ids, g_TO = x.reshape(-1), g.reshape(-1, g.shape[-1])
        if base.padding_idx is not None:
            g_TO = g_TO.masked_fill((ids == base.padding_idx)[:, None], 0.0)
        scale = getattr(base, "embed_scale", None)  # Gemma multiplies its embeddings, and PEFT their adapter, by it
        if scale is not None:
            g_TO = g_TO * scale
        yield 0, UnitRows(ids, base.num_embeddings), g_TO


EMBEDDING = EmbeddingLayout()


class FactorTable(nn.ParameterDict):
    """PEFT's `lora_embedding_A` or `lora_embedding_B`, in which entries may be factors.

    `table[name]` returns the matrix that PEFT computes with: the joined matrix of a factor, or the parameter. `items()`
    and `values()` return the parameters that train, which PEFT freezes, unfreezes and asks for their device. State
    dicts keep PEFT's names.
    """

    def entry(self, name: str) -> Any:
        """The factor or parameter itself."""
        return super().__getitem__(name)

    def __getitem__(self, name: str) -> Any:
        value = self.entry(name)
        return value.weight if isinstance(value, Factor) else value

    def __setitem__(self, name: str, value: Any) -> None:
        held = self.entry(name) if name in self else None
        if isinstance(value, Factor):  # a module takes the place of the parameter of that name
            self._parameters.pop(name, None)
        elif isinstance(held, Factor) and value.shape == held.joined().shape:
            held.to(value.device, value.dtype)  # PEFT puts back what it has read and moved
            held.set_joined(value.detach().to(held.trainable))
            return
        super().__setitem__(name, value)

    def items(self) -> ItemsView[str, Any]:
        """Names and the parameters that train."""
        held = ((name, self.entry(name)) for name in self.keys())
        return {name: value.trainable if isinstance(value, Factor) else value for name, value in held}.items()

    def values(self) -> ValuesView[Any]:
        """The parameters that train."""
        return dict(self.items()).values()

    def _factors(self) -> list[str]:
        return [name for name in self.keys() if isinstance(self.entry(name), Factor)]

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """The joined matrices under PEFT's names, without the `.weight` a module's would have."""
        made = super().state_dict(*args, prefix=prefix, **kwargs)
        for name in self._factors():
            made[f"{prefix}{name}"] = made.pop(f"{prefix}{name}.weight")
        return made

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The factors; none for `set_model_state_dict`, which would look for their own names in the state dict.

        Yields:
            Name and factor.
        """
        if not loads_state():
            yield from super().named_children()

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The buffers; for `set_model_state_dict`, which loads what modules name, also the joined matrices.

        Args:
            prefix: What the names begin with.
            recurse: Whether the buffers of the module's children are named too.
            remove_duplicate: Whether a buffer is named once.

        Yields:
            Name and tensor.
        """
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if loads_state():
            yield from ((name, self[name].detach()) for name in self._factors())

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        assert isinstance(state_dict, dict)  # a copy that load_state_dict made for this module
        for name in self._factors():
            if f"{prefix}{name}" in state_dict:
                state_dict[f"{prefix}{name}.weight"] = state_dict.pop(f"{prefix}{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)
