"""LoRA layers that share their factors: a head that PEFT ties to the embedding, and what is refused.

With `LoraConfig(ensure_weight_tying=True)` the head and the embedding of a model with tied weights train one change of
their one weight: the head's A and B are the embedding's B and A, transposed. PEFT stores them a second time, as other
Parameters in the same memory, which a cast to another dtype or a move to another device separates. Here the head has no
parameters of its own: it computes with the embedding's factors. The gradient of their weight is that of both uses.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from lora_ga.base import base_model
from lora_ga.distributed.sharding import partitioned, sharded
from lora_ga.distributed.state_dicts import loads_state
from lora_ga.distributed.tensor_parallel import split_of
from lora_ga.layers.factors import Factor
from lora_ga.layers.kinds import entries, layout_of, weight_of
from lora_ga.layers.linear import LINEAR


class TiedFactor(nn.Linear):
    """A factor of a tied head: the transposed matrix of a factor of the embedding, without a parameter of its own."""

    def __init__(self, source: Factor) -> None:
        """Compute with the transposed `source`, A for the head's B and B for its A."""
        nn.Module.__init__(self)
        self._source = (source,)  # torch takes a module for a child, and a child's parameters would be listed twice
        self.in_features, self.out_features = source.weight.shape
        self.register_parameter("bias", None)

    @property
    def source(self) -> Factor:
        """The embedding's factor."""
        return self._source[0]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The embedding's matrix, transposed."""
        return self.source.weight.mT

    def forward(self, x: Tensor) -> Tensor:
        """What a linear layer with this weight computes.

        Args:
            x: The input.

        Returns:
            The output.

        Raises:
            ValueError: DeepSpeed ZeRO-3 has partitioned the embedding's factor, and does not gather it for the head.
        """
        if partitioned(self.source.trainable):
            raise ValueError(
                "The head is tied to the embedding (ensure_weight_tying), whose factors DeepSpeed ZeRO-3 gathers for "
                "the embedding alone. Make the adapter with ensure_weight_tying=False, or use ZeRO-2."
            )
        return functional.linear(x, self.weight)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """None; for `set_model_state_dict`, which loads what modules name, the transposed matrix.

        Args:
            prefix: What the names begin with.
            recurse: Without effect.
            remove_duplicate: Without effect.

        Yields:
            Name and tensor.
        """
        if loads_state():
            yield f"{prefix}.weight" if prefix else "weight", self.weight.detach()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not partitioned(self.source.trainable):  # PEFT finds the values in the embedding's factor
            joined = self.source.joined().mT.contiguous()
            destination[prefix + "weight"] = joined if keep_vars else joined.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key, shape = prefix + "weight", tuple(self.source.joined().mT.shape)  # the embedding's factor takes the values
        if key not in state_dict:
            missing_keys.append(key)
        elif tuple(state_dict[key].shape) != shape:
            error_msgs.append(f"{key} is {tuple(state_dict[key].shape)}, but the factor it is tied to loads {shape}.")


def tied_heads(model: PeftModel, adapter_name: str) -> dict[str, str]:
    """The layers to which PEFT gives the embedding's factors.

    Args:
        model: The model.
        adapter_name: The adapter.

    Returns:
        Module path in the model of the head → that of the embedding.
    """
    config: Any = model.peft_config[adapter_name]
    # With an adapter in place already, PEFT writes the path of the layer inside.
    names = {name.removesuffix(".base_layer") for name in getattr(config, "target_modules_to_tie", None) or ()}
    if not names:
        return {}
    embedding = base_model(model).get_input_embeddings()  # type: ignore[operator]
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    source = next((path for path, layer in layers.items() if layer is embedding), None)
    if source is None or adapter_name not in layers[source].lora_embedding_A:
        return {}
    # PEFT compares the last part of a module's path with the tied paths, and ties linear layers alone.
    return {
        path: source
        for path, layer in layers.items()
        if path.rpartition(".")[2] in names and adapter_name in layer.lora_A
    }


def why_not_tied(head: LoraLayer, embedding: LoraLayer, adapter_name: str) -> str | None:
    """Why a tied head cannot start together with its embedding, as the end of a sentence about it; None if it can."""
    if layout_of(head) is not LINEAR or split_of(head.get_base_layer()) or split_of(embedding.get_base_layer()):
        return (
            "is tied to the embedding by ensure_weight_tying, which LoRA-GA supports for linear layers that no "
            "tensor-parallel plan splits. Make the adapter with ensure_weight_tying=False"
        )
    if any(sharded(weight) for layer in (head, embedding) for _, _, weight in _factor_weights(layer)):
        return (
            "is tied to the embedding by ensure_weight_tying, but the factors are sharded over processes. Start the "
            "adapter before the model is sharded, or make it with ensure_weight_tying=False"
        )
    own, other = ((layer.r[adapter_name], layer.scaling[adapter_name]) for layer in (head, embedding))
    if own != other:
        return (
            f"is tied to the embedding by ensure_weight_tying, but has rank {own[0]} and scaling {own[1]:g}, the "
            f"embedding {other[0]} and {other[1]:g}. Give both the same (rank_pattern, alpha_pattern)"
        )
    return None


def why_not_separate(layers: Mapping[str, LoraLayer], adapter_name: str, tied: Container[str]) -> str | None:
    """Why factors that several layers or adapters use cannot be aligned.

    Args:
        layers: Layer name → layer, of all adapters of the model.
        adapter_name: The adapter to align.
        tied: The heads that PEFT has tied, whose factors are shared by design.

    Returns:
        The reason; None if no factor of the adapter is shared.
    """
    users: dict[object, list[str]] = {}
    own: set[object] = set()
    for name, layer in layers.items():
        for letter, adapter, weight in _factor_weights(layer):
            if adapter == adapter_name and name in tied:
                continue
            place = _place(weight)
            users.setdefault(place, []).append(f"lora_{letter} of {name} ({adapter!r})")
            own |= {place} if adapter == adapter_name else set()
    for place in own:
        shared = users[place]
        if len(shared) > 1:
            return (
                f"{' and '.join(shared)} are one parameter, so they cannot each get a start. Make the adapter on the "
                "base model again, with peft.get_peft_model, which gives each layer factors of its own"
            )
    return None


def why_not_used_once(network: nn.Module, layers: Mapping[str, LoraLayer]) -> str | None:
    """Why the gradient of a layer's parameter is not that of the adapted use of it alone.

    PEFT wraps a module in the first of its places. Where a gradient is read from the parameter, it is that of all.

    Args:
        network: The model.
        layers: Layer name → layer.

    Returns:
        The reason; None if there is no such layer.
    """
    owners = {
        layer.get_base_layer(): name for name, layer in layers.items() if layout_of(layer).gradient_from_parameter
    }
    for path, module in network.named_modules(remove_duplicate=False) if owners else ():
        if module in owners and path.rpartition(".")[2] != "base_layer":
            return (
                f"the module under {owners[module]} is also called as {path}, where PEFT adapts nothing, and the two "
                "uses of its parameter cannot be told apart. Give the model two modules, or leave the parameter out of "
                "target_parameters"
            )
    return None


def _factor_weights(layer: LoraLayer) -> Iterator[tuple[str, str, Tensor]]:
    """The factors of all adapters of a layer: letter, adapter, and the parameter."""
    for adapter in layer.r:
        if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
            for letter, entry in zip("AB", entries(layer, adapter), strict=True):
                if not isinstance(entry, TiedFactor):
                    yield letter, adapter, entry.trainable if isinstance(entry, Factor) else weight_of(entry)


def _place(parameter: Tensor) -> object:
    """Where a parameter's values are: two parameters at one place are one. Without values, the parameter itself."""
    if parameter.is_meta or sharded(parameter) or parameter.numel() == 0:
        return id(parameter)
    return parameter.device, parameter.data_ptr()
