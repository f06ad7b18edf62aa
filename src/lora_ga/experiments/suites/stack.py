"""Trains several cells of one task at once: their adapters stand side by side over one base model.

On a GPU a small model spends its time on starting kernels. A stack of N cells starts those of the base model once for
all of them, and those of the adapters as one batched product. Every cell keeps its own data order, head, start,
optimizer and schedule. Its result is that of a run alone up to rounding, and up to dropout: a stack draws one mask for
all its rows.

Shapes: N cells, B rows of a cell's batch, T tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional

from lora_ga.experiments.methods.base import Batch, Method, no_action
from lora_ga.experiments.tasks.prepared import HEADS
from lora_ga.layers.factors import Delta

ADAPTER = "default"
SAVED_HEAD = f".modules_to_save.{ADAPTER}"


class AloneError(Exception):
    """A cell cannot be part of a stack; the text says why."""


def factor_parameter(factor: nn.Module) -> nn.Parameter:
    """The trained parameter of a factor: its weight, or the change from its start."""
    return factor.trainable if isinstance(factor, Delta) else factor.weight  # type: ignore[return-value]


def check_member(model: Any, method: Method, rank: int) -> None:
    """Checks that a stack can train a model.

    Args:
        model: What the method built.
        method: The method.
        rank: The rank that every layer must have.

    Raises:
        AloneError: It trains anything but factors of linear layers and linear heads, or acts between the steps.
    """
    if method.after_step is not no_action:
        raise AloneError("the method acts after each step")
    if not isinstance(model, PeftModel):
        raise AloneError("it is no adapter")
    trained = {name: p for name, p in model.get_base_model().named_parameters() if p.requires_grad}
    found: list[int] = []  # ids
    for name, layer in lora_layers(model).items():
        if (
            type(layer) is not LoraLinear
            or type(layer.base_layer) is not nn.Linear
            or getattr(layer, "lora_variant", None)
        ):
            raise AloneError(f"{name} is not LoRA of a linear layer")
        factors = (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])
        if not isinstance(layer.lora_dropout[ADAPTER], nn.Identity) or any(f.bias is not None for f in factors):
            raise AloneError(f"{name} has dropout or a bias of its own")
        if any(not isinstance(factor, Delta) and type(factor) is not nn.Linear for factor in factors):
            raise AloneError(f"{name} has factors of another kind")
        if {factor_parameter(factors[0]).shape[0], factor_parameter(factors[1]).shape[1]} != {rank}:
            raise AloneError(f"{name} has another rank")
        found += [id(factor_parameter(factor)) for factor in factors]
    if strange := [name for name, p in trained.items() if id(p) not in found and not HEADS & set(name.split("."))]:
        raise AloneError(f"it trains {strange[0]}")
    if len(set(found) & {id(p) for p in trained.values()}) < len(found):
        raise AloneError("some factors are frozen or shared")


def lora_layers(model: Any) -> dict[str, Any]:
    """The name of a layer in the base model → the layer of the adapter that stands in its place."""
    return {name: each for name, each in model.get_base_model().named_modules() if hasattr(each, "lora_A")}


class Factors:
    """The factors of one layer of all cells, and what they do.

    Each cell computes s·(B A − B₀ A₀) x = s·[B₀, dB]·[dA; A] x, as `lora_ga.layers.joined` does. A cell trains P, which
    is A or dA, and Q, which is B or dB. So it has [dA; A] = [P; P] + K and [B₀, dB] = [B₀, Q + L] with constants K, B₀
    and L. Where no cell has a start to subtract, the products have rank r: P and Q alone.

    Attributes:
        P: The trained parameters of A (N, r, I).
        Q: The trained parameters of B (N, O, r).
        scaling: s of every cell (N, 1, 1).
        constants: K (N, 2r, I), B₀ (N, O, r) and L (N, O, r); or None.
    """

    def __init__(self, layers: Sequence[Any], weight: Tensor) -> None:
        """Stacks the factors of a layer of every cell; the layers train the rows of the stacks from now on.

        Args:
            layers: The layer in each cell's model.
            weight: The weight of the base model (O, I).

        Raises:
            AloneError: A method has changed the base weight by something else than its start.
        """
        parts = [_constants(layer, weight) for layer in layers]
        starts = any(start.any() for _, start, _ in parts)
        self.constants = [torch.stack(each) for each in zip(*parts, strict=True)] if starts else None
        self.scaling = torch.tensor([layer.scaling[ADAPTER] for layer in layers], device=weight.device)[:, None, None]
        self.P, self.Q = (
            stack_parameters([factor_parameter(pair[ADAPTER]) for pair in pairs])
            for pairs in ([layer.lora_A for layer in layers], [layer.lora_B for layer in layers])
        )

    def change(self, x: Tensor) -> Tensor:
        """What the adapters add to the layer's output: (N·B, …, I) → (N·B, …, O)."""
        A, B = self.P, self.Q
        if self.constants is not None:
            K, start, L = self.constants
            A, B = torch.cat([A, A], dim=1) + K, torch.cat([start, B + L], dim=2)
        rows = x.to(A.dtype).reshape(len(A), -1, x.shape[-1])
        return (self.scaling * (rows @ A.mT @ B.mT)).reshape(*x.shape[:-1], -1)


def _constants(layer: Any, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K, B₀ and L of one cell (see `Factors`)."""
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    A, B = (factor_parameter(factor).detach().clone() for factor in (a, b))
    zero_A, zero_B = torch.zeros_like(A), torch.zeros_like(B)
    if isinstance(a, Delta):  # trains dA and dB
        return torch.cat([zero_A, a.start.to(A)]), b.start.to(B), zero_B
    if torch.equal(layer.base_layer.weight, weight):  # starts with B A = 0, or trains from a product that counts
        return torch.cat([zero_A, zero_A]), zero_B, zero_B
    # The method has taken s·B₀ A₀ out of the base weight. What is left is rounding.
    full = layer.base_layer.weight.float() + layer.scaling[ADAPTER] * B @ A
    if not torch.allclose(full, weight.float(), rtol=1e-2, atol=1e-2 * weight.float().std().item()):
        raise AloneError("the method changes the base weight by something else than its start")
    return torch.cat([-A, zero_A]), B, -B


def stack_parameters(parameters: Sequence[nn.Parameter]) -> Tensor:
    """One leaf of all cells' parameters (N, …); each parameter and its gradient become a row of it."""
    stacked = torch.stack([parameter.detach() for parameter in parameters]).requires_grad_()
    stacked.grad = torch.zeros_like(stacked)
    for number, parameter in enumerate(parameters):
        parameter.data = stacked.data[number]
        parameter.grad = stacked.grad[number]
    return stacked


def share_memory(base: Any, model: Any) -> None:
    """Makes a cell's model share the memory of the frozen weights that are equal to those of the base model."""
    own = dict(base.named_parameters())
    for name, parameter in model.get_base_model().named_parameters():
        same = own.get(name.replace(".base_layer.", "."))
        if same is not None and not parameter.requires_grad and torch.equal(parameter, same):
            parameter.data = same.data


class Stack:
    """The models of several cells as one model.

    Training it trains the parameters of the cells' own models, which are views of its stacked ones. So the optimizers
    of the cells, and evaluations of their models, work as usual; only `zero_grad` is the stack's.
    """

    def __init__(self, base: Any, models: Sequence[Any]) -> None:
        """Builds the stack.

        Args:
            base: The base model, as it was loaded. It is frozen and gets hooks.
            models: The cells' models.

        Raises:
            AloneError: A method has changed the base model in a way that a stack cannot follow.
        """
        self.base, self.size = base.requires_grad_(False), len(models)
        self.leaves: list[Tensor] = []
        modules = dict(base.named_modules())
        for name in lora_layers(models[0]):
            factors = Factors([lora_layers(model)[name] for model in models], modules[name].weight)
            self.leaves += [factors.P, factors.Q]
            modules[name].register_forward_hook(_adds(factors))
        for name, members in self._heads(models).items():
            head = {part: stack_parameters(parameters) for part, parameters in members.items()}
            self.leaves += head.values()
            modules[name].register_forward_hook(_replaces(head))

    @staticmethod
    def _heads(models: Sequence[Any]) -> dict[str, dict[str, list[nn.Parameter]]]:
        """The name of a head's layer → "weight" and "bias" → the parameters of all cells."""
        heads: dict[str, dict[str, list[nn.Parameter]]] = {}
        for model in models:
            for name, parameter in model.get_base_model().named_parameters():
                if parameter.requires_grad and SAVED_HEAD in name:
                    layer, _, part = name.replace(SAVED_HEAD, "").rpartition(".")
                    heads.setdefault(layer, {}).setdefault(part, []).append(parameter)
        return heads

    def logits(self, batches: Sequence[Batch]) -> list[Tensor]:
        """The logits of every cell's batch, in one forward pass.

        Args:
            batches: A batch of every cell, of equal numbers of rows; shorter ones are padded on the right.

        Returns:
            (B, T, vocabulary) or (B, classes) for each cell.
        """
        longest = max(batch["input_ids"].shape[1] for batch in batches)
        fill = {"input_ids": self.base.config.pad_token_id or 0}
        joined = {
            name: torch.cat(
                [functional.pad(b[name], (0, longest - b[name].shape[1]), value=fill.get(name, 0)) for b in batches]
            )
            for name in batches[0]
            if name != "labels"
        }
        logits = self.base(**joined).logits.chunk(self.size)
        if logits[0].dim() == 2:
            return list(logits)
        return [each[:, : batch["input_ids"].shape[1]] for each, batch in zip(logits, batches, strict=True)]

    def zero_grad(self) -> None:
        """Sets all gradients to zero, in place: each cell's are views of them."""
        for leaf in self.leaves:
            assert leaf.grad is not None
            leaf.grad.zero_()


def _adds(factors: Factors) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + factors.change(inputs[0]).to(output.dtype)

    return hook


def _replaces(head: Mapping[str, Tensor]) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, weight = inputs[0], head["weight"]
        found = x.to(weight.dtype).reshape(len(weight), -1, x.shape[-1]) @ weight.mT
        if "bias" in head:
            found = found + head["bias"][:, None]
        return found.reshape(*x.shape[:-1], -1)

    return hook
