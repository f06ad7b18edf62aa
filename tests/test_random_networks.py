"""Two laws on random small networks: a start changes nothing else, and the saved adapter is the trained model.

`LORA_GA_EXAMPLES=5000 pytest tests/test_random_networks.py` tries other networks, and more of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

import lora_ga
from lora_ga import LoraGAConfig

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

WIDTH, WORDS, ROWS, LENGTH, OUTPUTS = 6, 7, 4, 3, 7
EXAMPLES = int(os.environ.get("LORA_GA_EXAMPLES", "0"))


@dataclasses.dataclass(frozen=True)
class Spec:
    """A network with an adapter, what its user has done to it, and the settings of the start.

    The sequences of booleans are repeated over all modules or parameters.
    """

    seed: int
    reads: str
    tree: Sequence[Any]
    targets: Sequence[bool]
    head: str
    outside: str
    dtype: torch.dtype
    rank: int
    alpha: int
    dropout: float
    rslora: bool
    other_adapter: str
    modes: Sequence[bool]
    gradients: Sequence[bool]
    trainable: Sequence[bool]
    hooks: Sequence[bool]
    without_gradients: bool
    config: LoraGAConfig


LEAVES = ["linear", "linear without bias", "layer norm", "batch norm", "dropout", "tanh", "changed in place"]
NODES = st.recursive(
    st.one_of(st.sampled_from(LEAVES), st.tuples(st.sampled_from(["again", "same weight"]), st.integers(0, 3))),
    lambda inner: st.tuples(
        st.sampled_from(["residual", "checkpointed", "checkpointed reentrantly"]),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=5,
)
BOOLEANS = st.lists(st.booleans(), min_size=1, max_size=5)
SPECS = st.builds(
    Spec,
    seed=st.integers(0, 10**6),
    reads=st.sampled_from(["vectors", "words", "images"]),
    tree=st.lists(NODES, max_size=4),
    targets=BOOLEANS,
    head=st.sampled_from(["target", "modules_to_save", "frozen", "trainable", "tied"]),
    outside=st.sampled_from(["nothing", "given as a whole", "in the loss"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    rank=st.integers(1, 3),
    alpha=st.integers(1, 16),
    dropout=st.sampled_from([0.0, 0.5]),
    rslora=st.booleans(),
    other_adapter=st.sampled_from(["none", "none", "inactive", "active"]),
    modes=BOOLEANS,
    gradients=BOOLEANS,
    trainable=BOOLEANS,
    hooks=BOOLEANS,
    without_gradients=st.booleans(),
    config=st.builds(
        LoraGAConfig,
        estimator=st.sampled_from(["streaming", "dense"]),
        offset=st.sampled_from(["adapter", "adapter", "base"]),
        on_missing=st.just("lora"),
        seed=st.integers(0, 100),
    ),
)


class RowNorm(nn.BatchNorm1d):
    """Batch normalisation of the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view_as(x)


class Block(nn.Module):
    """Calls its children one after the other, and adds the input or checkpoints, as its kind says."""

    def __init__(self, kind: str, tree: Sequence[Any], linears: list[nn.Linear]) -> None:
        super().__init__()
        self.kind = kind
        for number, node in enumerate(tree):
            name, child = self._child(node, linears)
            self.add_module(f"{name}{len(linears)}" if name == "linear" else f"{name}{number}", child)

    @staticmethod
    def _child(node: Any, linears: list[nn.Linear]) -> tuple[str, nn.Module]:
        kind: str = node if isinstance(node, str) else node[0]
        rest: Any = None if isinstance(node, str) else node[1]
        if isinstance(rest, list):
            return "block", Block(kind, rest, linears)
        if kind == "changed in place":
            return "block", Block("chain", ["linear", "relu in place"], linears)
        if kind == "again" and linears:
            return "again", linears[rest % len(linears)]
        if kind.startswith("linear") or rest is not None:
            layer = nn.Linear(WIDTH, WIDTH, bias=kind != "linear without bias")
            if kind == "same weight" and linears:
                layer.weight = linears[rest % len(linears)].weight
            linears.append(layer)
            return "linear", layer
        made: dict[str, Any] = {
            "layer norm": lambda: nn.LayerNorm(WIDTH),
            "batch norm": lambda: RowNorm(WIDTH),
            "dropout": lambda: nn.Dropout(0.3),
            "tanh": nn.Tanh,
            "relu in place": lambda: nn.LeakyReLU(0.1, inplace=True),
        }
        return "other", made[kind]()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind.startswith("checkpointed"):
            return checkpoint(self._chain, x, use_reentrant=self.kind.endswith("reentrantly"))
        return x + self._chain(x) if self.kind == "residual" else self._chain(x)

    def _chain(self, x: Tensor) -> Tensor:
        x = x.clone()  # a child may change it in place
        for child in self._modules.values():
            assert child is not None
            x = child(x)
        return x


def tied(spec: Spec) -> bool:
    """Whether the head has the weight of the embedding, and one change with it."""
    return spec.reads == "words" and spec.head == "tied"


class Body(nn.Module):
    """What gets the adapter: reads vectors, words or images, and ends in a linear layer."""

    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012 (as Transformers has it)

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        if spec.reads == "words":
            self.embed_tokens: nn.Module = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        else:
            self.embed_tokens = nn.Conv2d(2, WIDTH, 3, padding=1) if spec.reads == "images" else nn.Identity()
        self.linears: list[nn.Linear] = []
        self.tree = Block("chain", spec.tree, self.linears)
        self.lm_head = nn.Linear(WIDTH, OUTPUTS)
        self.config = PretrainedConfig(tie_word_embeddings=tied(spec))
        if tied(spec):
            self.lm_head.weight = self.embed_tokens.weight  # type: ignore[assignment]

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        x = self.embed_tokens(x)
        x = x.flatten(2).mT if x.dim() == 4 else x
        out = self.lm_head(self.tree(x))
        return {"loss": (out.mean(1) - y).square().mean(), "out": out}


class Network(nn.Module):
    """A model with an adapter, and a head outside of it."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.before, self.model = nn.Parameter(torch.zeros(())), model
        self.after = nn.Sequential(nn.Linear(OUTPUTS, OUTPUTS), RowNorm(OUTPUTS), nn.Dropout(0.2))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        out = self.after(self.model(x=x, y=y)["out"] * self.before.exp())
        return {"loss": (out.mean(1) - y).square().mean(), "out": out}


def chosen(things: Sequence[Any], mask: Sequence[bool]) -> list[Any]:
    return [thing for thing, wanted in zip(things, itertools.cycle(mask), strict=False) if wanted]


def make_body(spec: Spec) -> Body:
    torch.manual_seed(spec.seed)
    return Body(spec).to(spec.dtype)


def make_batches(spec: Spec) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(spec.seed + 1)
    shape = {"vectors": (ROWS, LENGTH, WIDTH), "images": (ROWS, 2, 2, LENGTH)}.get(spec.reads)
    return [
        {
            "x": torch.randint(0, WORDS, (ROWS, LENGTH), generator=draw)
            if shape is None
            else torch.randn(shape, generator=draw).to(spec.dtype),
            "y": torch.randn(ROWS, OUTPUTS, generator=draw).to(spec.dtype),
        }
        for _ in range(2)
    ]


def make_model(spec: Spec) -> PeftModel:
    body = make_body(spec)
    linears = [name for name, module in body.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    names = chosen(([] if spec.reads == "vectors" else ["embed_tokens"]) + linears, spec.targets)
    if spec.head == "target" or not names:
        names.append("lm_head")
    if tied(spec) and "embed_tokens" not in names:
        names.append("embed_tokens")
    lora = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.rslora,
        lora_dropout=spec.dropout,
        target_modules=names,
        ensure_weight_tying=tied(spec),
        modules_to_save=["lm_head"] if spec.head == "modules_to_save" and "lm_head" not in names else None,
    )
    model = get_peft_model(body, lora)
    if spec.other_adapter != "none":
        model.add_adapter("other", LoraConfig(r=2, target_modules=names, init_lora_weights=False))
        if spec.other_adapter == "active":
            model.base_model.set_adapter(["default", "other"])
    return model


def as_the_user_has_it(spec: Spec) -> tuple[nn.Module, PeftModel]:
    """The network and the model in it, with modes, gradients, hooks and trainable parts of the user."""
    model = make_model(spec)
    network = model if spec.outside == "nothing" else Network(model).to(spec.dtype)
    if spec.head == "trainable":
        model.base_model.model.lm_head.requires_grad_(True)
    own = [parameter for name, parameter in network.named_parameters() if "lora_" not in name]
    for parameter in chosen(own, spec.trainable):
        parameter.requires_grad_(True)
    for parameter in chosen(list(network.parameters()), spec.gradients):
        parameter.grad = torch.full_like(parameter, 0.5)
    for module, mode in zip(network.modules(), itertools.cycle(spec.modes), strict=False):
        module.training = mode
    for module in chosen(list(network.modules()), spec.hooks):
        module.register_forward_hook(lambda *_: None)
        module.register_forward_pre_hook(lambda *_: None)
    return network, model


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs")


def parameter_state(parameter: Any) -> tuple[Any, ...]:
    gradient = parameter.grad
    hooks = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
    return parameter.requires_grad, hooks, id(gradient), None if gradient is None else gradient.tolist()


def module_state(module: nn.Module) -> tuple[Any, ...]:
    buffers = [(name, id(buffer), buffer.tolist()) for name, buffer in module.named_buffers(recurse=False)]
    hooks = [list(getattr(module, kind).items()) for kind in HOOKS]
    active = getattr(module, "active_adapters", None), getattr(module, "disable_adapters", None)
    attributes = sorted(vars(module).keys() - {"add_adapter"})  # that of the PeftModel is replaced by a start
    return module.training, buffers, hooks, attributes, active


def process_state() -> tuple[Any, ...]:
    hooks = [len(value) for name, value in sorted(vars(nn.modules.module).items()) if name.endswith("_hooks")]
    generators = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())
    return generators, hooks, torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()


def state(network: nn.Module) -> dict[object, Any]:
    """Everything that a start must not change, by object."""
    found: dict[object, Any] = {parameter: parameter_state(parameter) for parameter in network.parameters()}
    return found | {module: module_state(module) for module in network.modules()} | {"process": process_state()}


def values(network: nn.Module, *, adapter: bool) -> list[Any]:
    return [value.tolist() for name, value in network.named_parameters() if ("lora_" in name) == adapter]


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    with torch.no_grad():
        yield
    for module, mode in modes:
        module.training = mode


def outputs(network: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    with evaluating(network):
        return torch.stack([network(**batch)["out"] for batch in batches])


def difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp_min(1.0)).item()


# What a start may refuse in these networks.
REFUSED = re.compile(
    r'No layer is left|its weight is shared .*offset="base"|offset="base" would change the weight under|'
    r'PEFT saves the weights of adapted embeddings and heads beside the adapter, so offset="base"'
)


def start(spec: Spec, network: nn.Module, model: PeftModel, batches: Sequence[dict[str, Tensor]]) -> bool:
    """Estimate and apply, and check after each that nothing else has changed.

    Returns:
        Whether the adapter was started; if not, it was refused.
    """
    in_loss = spec.outside == "in the loss"
    given_to = model if in_loss else network
    loss = (lambda _, batch: network(**batch)["loss"]) if in_loss else None
    computed, weights, adapter = (
        outputs(network, batches),
        values(network, adapter=False),
        values(network, adapter=True),
    )
    named = dict(network.named_parameters())
    started = False
    with torch.set_grad_enabled(not spec.without_gradients):
        before = state(network)
        try:
            estimate = lora_ga.estimate_gradients(given_to, batches, spec.config, loss_fn=loss)
            assert state(network) == before
            assert values(network, adapter=True) == adapter
            lora_ga.apply_estimate(given_to, estimate, spec.config)
            started = True
        except ValueError as error:
            if not REFUSED.search(str(error)):
                raise
        after = state(network)
    gone = {name for name, parameter in named.items() if parameter not in set(network.parameters())}
    assert gone == {name for name in named if started and tied(spec) and "lm_head.lora_" in name and ".default" in name}
    kept = before.keys() & after.keys()
    assert {each: after[each] for each in kept} == {each: before[each] for each in kept}
    if not started:
        assert (kept, values(network, adapter=True)) == (before.keys(), adapter)
    if not (started and spec.config.offset == "base"):
        assert values(network, adapter=False) == weights
        assert torch.equal(outputs(network, batches), computed)
    assert difference(outputs(network, batches), computed) <= 1e-5
    return started


def train(network: nn.Module, batches: Sequence[dict[str, Tensor]]) -> None:
    """Train the adapter, the modules that are saved with it, and the head outside, for three steps."""
    trained = [
        parameter
        for name, parameter in network.named_parameters()
        if ".default" in name or not name.startswith(("model.", "base_model."))
    ]
    for parameter in network.parameters():
        parameter.grad = None
    optimizer = torch.optim.Adam([parameter for parameter in trained if parameter.requires_grad], lr=1e-2)
    for step in range(3):
        network(**batches[step % len(batches)])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def loaded(spec: Spec, folder: str, trained: PeftModel, how: str) -> PeftModel:
    """The saved adapter on a new base, which gets the running statistics of the trained one."""
    base = make_body(spec)
    statistics = {name.replace("base_model.model.", ""): value for name, value in trained.named_buffers()}
    for name, buffer in base.named_buffers():
        buffer.copy_(statistics[name])
    if how == "by PEFT":
        return PeftModel.from_pretrained(base, folder)
    return lora_ga.load(base, folder, is_trainable=how == "to train")


@given(spec=SPECS)
@settings(
    max_examples=EXAMPLES or 100,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@pytest.mark.filterwarnings("ignore")
def test_a_start_changes_nothing_else_and_the_saved_adapter_is_what_was_trained(spec: Spec) -> None:
    network, model = as_the_user_has_it(spec)
    batches = make_batches(spec)
    if not start(spec, network, model, batches):
        return
    train(network, batches)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["default"])
        model.base_model.set_adapter("default")
        wanted = outputs(network, batches)
        for how in ("by PEFT", "to use", "to train"):
            again = loaded(spec, folder, model, how)
            if network is model:
                found = outputs(again, batches)
            else:
                network.model = again
                found = outputs(network, batches)
            assert difference(found, wanted) <= 1e-5, how
