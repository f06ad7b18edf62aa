"""Pairs of factors: which parameters of a model belong together, and the optimizer that steps them as pairs.

Shapes: N pairs of one shape (of grouped layers and experts: parts of them), r rank, I inputs, O outputs.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_ga.distributed.sharding import sharded, unwrapped
from lora_ga.layers.experts import EXPERTS
from lora_ga.layers.factors import Factor
from lora_ga.layers.kinds import entries, weight_of
from lora_ga.layers.linear import LINEAR, WeightLayout
from lora_ga.layers.optimizers import starts_of
from lora_ga.layers.targets import Target, find_targets

logger = logging.getLogger(__name__)

# How the parameters of a group hold the factors. Every layout but that of experts takes the parts one below the other.
LAYOUTS: Mapping[str, WeightLayout] = {"rows": LINEAR, "experts": EXPERTS}
BETAS, EPS = (0.9, 0.999), 1e-8  # of the AdamW for parameters that belong to no pair
State = dict[str, tuple[Tensor, Tensor]]  # name → what belongs to A and what belongs to B


def param_groups(model: nn.Module, adapter_name: str = "default") -> list[dict[str, Any]]:
    """The trainable parameters of a model, as groups for the optimizers of this package.

    They may be made before or after the start of LoRA-GA: the parameters stay the same objects.

    Args:
        model: A model with a LoRA adapter, or a network that contains one.
        adapter_name: The adapter whose pairs are stepped together.

    Returns:
        Groups with `params` [A, B, A, B, …] and the layers' `names`; the last one holds the parameters that belong to
        no pair (heads, norms, biases, DoRA's magnitudes, other adapters), which get AdamW. A log message names these.

    Raises:
        ValueError: A layer cannot be treated; only one factor of a layer trains; no factor trains.
    """
    groups: dict[tuple[str, int], dict[str, Any]] = {}
    paired: set[int] = set()
    for target in find_targets(unwrapped(model), adapter_name, fresh=False).values():
        pair = [
            entry.trainable if isinstance(entry, Factor) else weight_of(entry)
            for entry in entries(target.layer, adapter_name)
        ]
        if not any(parameter.requires_grad for parameter in pair):
            continue
        if reason := _why_not_stepped(target, pair):
            raise ValueError(f"{target.name} {reason}")
        layout = "experts" if target.layout is EXPERTS else "rows"
        key = (layout, target.parts)
        group = groups.setdefault(key, {"params": [], "names": [], "layout": layout, "parts": target.parts})
        group["params"] += pair
        group["names"].append(target.name)
        paired |= {id(parameter) for parameter in pair}
    if not groups:
        raise ValueError(
            f"No factor of adapter {adapter_name!r} trains. Call model.set_adapter({adapter_name!r}), or make the "
            "adapter without inference_mode."
        )
    others = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in paired}
    if not others:
        return [*groups.values()]
    logger.warning("AdamW steps the parameters that belong to no pair of factors: %s.", _some(list(others)))
    return [*groups.values(), {"params": [*others.values()], "names": [*others], "layout": None}]


def _why_not_stepped(target: Target, pair: Sequence[Tensor]) -> str | None:
    """Why the factors of a layer cannot be stepped together, as the end of a sentence about it; None if they can."""
    if target.unknown:
        return target.unknown
    if not all(parameter.requires_grad for parameter in pair):
        frozen = "AB"[[parameter.requires_grad for parameter in pair].index(False)]
        return f"trains one factor only (lora_{frozen} is frozen), and these rules step both. Use torch's optimizers"
    if target.split is not None or any(map(sharded, pair)):
        return f"has {SHARDED}"
    return None


SHARDED = (
    "factors that are spread over processes (FSDP2, ZeRO-3, tensor parallelism), and these rules need whole ones. "
    "Train with DistributedDataParallel, or use torch.optim.AdamW."
)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


@dataclasses.dataclass
class Pairs:
    """The factors and gradients of pairs of one shape, in float32 (float64 for parameters in float64).

    Attributes:
        A: A₀ + dA, or A itself, (N, r, I).
        B: B₀ + dB, or B itself, (N, O, r).
        grad_a: The gradient of the loss by A.
        grad_b: The gradient of the loss by B.
    """

    A: Tensor
    B: Tensor
    grad_a: Tensor
    grad_b: Tensor


@dataclasses.dataclass
class Stack:
    """Parameters that are stepped together, since their shapes, their layout and their age are the same.

    Attributes:
        group: Their parameter group.
        names: The names of their layers, for messages.
        params: Their factors A and B.
    """

    group: dict[str, Any]
    names: list[str]
    params: list[tuple[nn.Parameter, nn.Parameter]]

    @property
    def _plain(self) -> bool:
        """Whether the parameters are the matrices themselves: then one operation stacks them all."""
        return self.group["parts"] == 1 and all(parameter.dim() == 2 for parameter in self.params[0])

    def read(self, values: Iterable[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
        """The A and the B of tensors like the parameters, as matrices (N, r, I) and (N, O, r).

        Args:
            values: For each pair of parameters a tensor of the shape of A and one of that of B; or vectors, with the
                entries of all parts.

        Returns:
            The matrices or vectors.
        """
        layout, parts = LAYOUTS[self.group["layout"]], self.group["parts"]
        wide = torch.promote_types(self.params[0][0].dtype, torch.float32)
        if self._plain:
            of_a, of_b = zip(*values, strict=True)
            return torch.stack(of_a).to(wide), torch.stack(of_b).to(wide)
        sides: list[list[Tensor]] = [[], []]
        unstack = layout.unstack_a, layout.unstack_b
        for held in values:
            for side, value in enumerate(held):
                stacked = value.unflatten(0, (parts, -1)) if value.dim() == 1 else unstack[side](value, parts)
                sides[side].append(stacked.to(wide))
        a, b = (torch.cat(side) if len(side) > 1 else side[0] for side in sides)
        return a, b

    def values(self, starts: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """The values of A and B: the parameters, and their starts where they hold changes."""
        a, b = self.read(self.params)
        found = [[starts.get(id(parameter)) for parameter in pair] for pair in self.params]
        if all(start is None for pair in found for start in pair):
            return a, b
        own = [
            [torch.zeros_like(p) if start is None else start.to(p.device) for p, start in zip(pair, held, strict=True)]
            for pair, held in zip(self.params, found, strict=True)
        ]
        start_a, start_b = self.read(own)
        return start_a + a, start_b + b

    def gradients(self) -> list[list[Tensor]]:
        """The gradients of the parameters."""
        return [[parameter.grad for parameter in pair if parameter.grad is not None] for pair in self.params]

    def write(self, a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The inverse of `read`.

        Args:
            a: (N, r, I), or vectors (N, ·).
            b: (N, O, r), or vectors (N, ·).

        Yields:
            For each pair of parameters the tensors of their shapes, or vectors.
        """
        if self._plain:
            yield from zip(a.unbind(), b.unbind(), strict=True)
            return
        layout, parts = LAYOUTS[self.group["layout"]], self.group["parts"]
        rows = (side.unflatten(0, (-1, parts)) for side in (a, b))
        for (A, B), of_a, of_b in zip(self.params, *rows, strict=True):
            yield (
                of_a.flatten(0, 1).reshape(A.shape) if a.dim() == 3 else of_a.flatten(),
                layout.stack_b(of_b).reshape(B.shape) if b.dim() == 3 else of_b.flatten(),
            )


class PairOptimizer(Optimizer, abc.ABC):
    """Steps the factors A and B of each layer together, from their values and both gradients.

    The values are A₀ + dA and B₀ + dB where LoRA-GA trains changes; the parameters change by the step alone. State is
    of the factors' shapes, and in float32 for parameters of any narrower dtype. Gradients are those that the process
    holds, so DistributedDataParallel and gradient accumulation need nothing else. Weight decay is decoupled and acts
    on the parameters: it pulls changes to zero.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        *,
        weight_decay: float = 0.0,
        other_lr: float = 1e-3,
        **options: Any,
    ) -> None:
        """Make the optimizer.

        Args:
            params: What `param_groups(model)` returns; further groups get AdamW.
            lr: The learning rate of the pairs. Rates of different rules cannot be compared.
            weight_decay: The share of a parameter that is taken away in a step, over the learning rate.
            other_lr: The learning rate of AdamW for parameters that belong to no pair, unless their group states one.
            **options: The options of the rule.

        Raises:
            ValueError: There are no pairs, or a value is out of its range.
        """
        for name, value in {"lr": lr, "weight_decay": weight_decay, "other_lr": other_lr}.items():
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{type(self).__name__}: {name} is {value!r}; it must be a finite number, at least 0.")
        _check_options(type(self).__name__, options)
        groups = [group if isinstance(group, dict) else {"params": [group]} for group in params]
        if not any(group.get("layout") for group in groups):
            name = type(self).__name__
            raise ValueError(
                f"{name} steps A and B in pairs, and was given no pairs. Use "
                f"{name}(lora_ga.experiments.optim.param_groups(model), lr=...)."
            )
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "other_lr": other_lr, **options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Without a `layout`, as `param_groups` gives it, its parameters get AdamW."""
        group = {"layout": None, "parts": 1, **param_group, "rule": type(self).__name__}
        if group["layout"] is None:
            group.setdefault("lr", self.defaults["other_lr"])
        super().add_param_group(group)

    @abc.abstractmethod
    def rule(self, pairs: Pairs, state: State, group: Mapping[str, Any], step: int) -> tuple[Tensor, Tensor]:
        """The changes of A and B in a step.

        Args:
            pairs: The factors and their gradients.
            state: The state of the rule after its last step, empty before the first; the rule changes it.
            group: The options.
            step: The number of this step, from 1.

        Returns:
            ΔA (N, r, I) and ΔB (N, O, r).
        """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step.

        Args:
            closure: Computes the loss and the gradients once more.

        Returns:
            What the closure returns.

        Raises:
            FloatingPointError: A gradient is not finite; nothing has been changed.
            ValueError: A pair has one gradient only, or its factors are not whole any longer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stacks = [stack for group in self.param_groups if group["layout"] for stack in self._stacks(group)]
        gradients = [stack.read(stack.gradients()) for stack in stacks]
        self._check_finite(stacks, gradients)
        starts = starts_of(parameter for stack in stacks for pair in stack.params for parameter in pair)
        for stack, (grad_a, grad_b) in zip(stacks, gradients, strict=True):
            self._step_pairs(stack, Pairs(*stack.values(starts), grad_a, grad_b))
        for group in self.param_groups:
            if not group["layout"]:
                self._step_others(group)
        return loss

    def _stacks(self, group: dict[str, Any]) -> list[Stack]:
        """The pairs of a group that have gradients, those of one shape and age together."""
        found: dict[Any, Stack] = {}
        params = group["params"]
        if len(params) % 2 or any(map(sharded, params)):
            raise ValueError(f"{type(self).__name__} was made for pairs of factors, but now holds {SHARDED}")
        for name, (A, B) in _named(group, 2):
            if (A.grad is None) != (B.grad is None):
                raise ValueError(
                    f"{name}: one of its factors has a gradient, the other has none. {type(self).__name__} steps both; "
                    "clear both gradients, or freeze both factors."
                )
            if A.grad is not None:
                key = (A.shape, B.shape, A.dtype, B.dtype, A.device, self.state.get(A, {}).get("step", 0))
                stack = found.setdefault(key, Stack(group, [], []))
                stack.names.append(name)
                stack.params.append((A, B))
        return [*found.values()]

    def _check_finite(self, stacks: Sequence[Stack], gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Refuse gradients that are not finite, before anything is changed.

        Raises:
            FloatingPointError: There is one.
        """
        named = [
            (name, parameter)
            for stack in stacks
            for name, pair in zip(stack.names, stack.params, strict=True)
            for parameter in pair
        ]
        others = [pair for group in self.param_groups if not group["layout"] for pair in _named(group, 1)]
        tensors = [side for both in gradients for side in both]
        tensors += [parameter.grad for _, (parameter,) in others if parameter.grad is not None]
        # The largest entry is not finite if any is not; without copies, and with one transfer for all.
        largest = [torch.linalg.vector_norm(tensor, math.inf) for tensor in tensors if tensor.numel()]
        if not largest or bool(torch.stack([each.to(largest[0]) for each in largest]).isfinite().all()):
            return
        named += [(name, parameter) for name, (parameter,) in others]
        wrong = [name for name, each in named if each.grad is not None and not bool(each.grad.isfinite().all())]
        names = list(dict.fromkeys(wrong))
        raise FloatingPointError(
            f"{type(self).__name__}: the gradient of {_some(names)} is not finite. No parameter was changed. Lower the "
            "learning rate, use a gradient scaler with float16, or catch this error and go on with the next batch."
        )

    def _step_pairs(self, stack: Stack, pairs: Pairs) -> None:
        """Step the pairs of a stack, and keep their new state."""
        held = [(self.state[A], self.state[B]) for A, B in stack.params]
        step = held[0][0].get("step", 0) + 1
        names = [name for name in held[0][0] if name != "step"]
        state: State = {name: stack.read([(a[name], b[name]) for a, b in held]) for name in names}
        change = self.rule(pairs, state, stack.group, step)
        keep = 1 - stack.group["lr"] * stack.group["weight_decay"]
        for pair, deltas in zip(stack.params, stack.write(*change), strict=True):
            for parameter, delta in zip(pair, deltas, strict=True):
                if keep != 1:
                    parameter.mul_(keep)
                parameter.add_(delta)
        for name, sides in state.items():
            for (of_a, of_b), values in zip(held, stack.write(*sides), strict=True):
                of_a[name], of_b[name] = values
        for each in itertools.chain.from_iterable(held):
            each["step"] = step

    def _step_others(self, group: Mapping[str, Any]) -> None:
        """AdamW for the parameters that belong to no pair, with its state in float32 or better."""
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            gradient = parameter.grad.to(torch.promote_types(parameter.dtype, torch.float32))
            if not state:
                state |= {"step": 0, "exp_avg": torch.zeros_like(gradient), "exp_avg_sq": torch.zeros_like(gradient)}
            state["step"] += 1
            change = adam(state["exp_avg"], state["exp_avg_sq"], gradient, state["step"], BETAS, EPS)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_((-group["lr"] * change).to(parameter.dtype))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of an optimizer of the same rule, bit for bit.

        Args:
            state_dict: What its `state_dict()` returned.

        Raises:
            ValueError: It belongs to another rule, or to other parameters.
        """
        rules = {group.get("rule") for group in state_dict["param_groups"]}
        if rules != {type(self).__name__}:
            found = ", ".join(sorted(rule or "another optimizer" for rule in rules))
            raise ValueError(
                f"The state is that of {found}, and this is {type(self).__name__}. Resume with the optimizer that the "
                "run began with, or begin anew without the optimizer's state."
            )
        super().load_state_dict(state_dict)
        # torch casts the state to the dtype of the parameters: here it is float32, whatever that is.
        held = (parameter for group in self.param_groups for parameter in group["params"])
        saved = (index for group in state_dict["param_groups"] for index in group["params"])
        for parameter, index in zip(held, saved, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.detach().to(parameter.device, copy=True)


def _check_options(rule: str, options: Mapping[str, Any]) -> None:
    """Refuse options of a rule that are out of their range.

    Raises:
        ValueError: One is.
    """
    for name, value in options.items():
        for each in value if name == "betas" else (value,):
            if name in {"momentum", "betas"} and not 0 <= each < 1:
                raise ValueError(f"{rule}: {name} is {value!r}; averages need numbers of at least 0 and below 1.")
            if name in {"eps", "damping", "iterations"} and not 0 <= each < math.inf:
                raise ValueError(f"{rule}: {name} is {value!r}; it must be a finite number, at least 0.")


def _named(group: Mapping[str, Any], size: int) -> Iterator[tuple[str, tuple[nn.Parameter, ...]]]:
    """The parameters of a group in twos or ones, each with its name; a number, if the group was changed since."""
    found = list(zip(*(group["params"][start::size] for start in range(size)), strict=True))
    names = group.get("names", ())
    return zip(names if len(names) == len(found) else map(str, range(len(found))), found, strict=True)


def adam(
    exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, step: int, betas: tuple[float, float], eps: float
) -> Tensor:
    """The direction of Adam (Kingma, Ba, 2015), `m̂/(√v̂ + ε)`; updates both averages in place."""
    exp_avg.lerp_(gradient, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    size = (exp_avg_sq / (1 - betas[1] ** step)).sqrt().add_(eps)
    return exp_avg / (1 - betas[0] ** step) / size
