"""Ways of running a model: checkpointed, compiled, offloaded, on the meta device, padded, packed; injected adapters."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lora_ga
from lora_ga import LoraGAConfig
from lora_ga.adapter.save import FILE
from lora_ga.config import CHOICES
from lora_ga.gradients.hooks import record_layers
from lora_ga.gradients.isolation import isolated
from lora_ga.layers.factors import Factor
from lora_ga.layers.targets import find_targets
from toys import adapted, causal, injected, llama, logits, lora_settings, tokens, train

DENSE = LoraGAConfig(estimator="dense", oversample=10**4)
FEW = r".*\.(q_proj|down_proj)"  # the compiler needs a second for each layer


def plain(folder: Path) -> PeftModel:
    return adapted(llama())


def checkpointed(reentrant: bool) -> Callable[[Path], PeftModel]:
    def make(folder: Path) -> PeftModel:
        model = adapted(llama())
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model.train()

    return make


def compiled(folder: Path) -> PeftModel:
    model = adapted(llama(num_hidden_layers=1), FEW)
    model.compile(backend="eager")
    logits(model, causal(1)[0])  # compiles before the hooks are added
    return model


def offloaded(folder: Path) -> PeftModel:
    """Load a Llama by `device_map`, with its embeddings and the second of its two layers on disk."""
    llama().save_pretrained(folder / "base")
    places = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    base = AutoModelForCausalLM.from_pretrained(
        folder / "base",
        device_map=places | {"lm_head": "cpu", "model.rotary_emb": "cpu"},
        offload_folder=folder / "offload",
    )
    assert any(parameter.is_meta for parameter in base.parameters())
    return adapted(base.eval())


def on_meta(folder: Path) -> PeftModel:
    torch.manual_seed(7)
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear")
    model = get_peft_model(llama(), config, low_cpu_mem_usage=True)
    assert any(parameter.is_meta for parameter in model.parameters())
    return model


@dataclasses.dataclass(frozen=True)
class Way:
    """How to make the model, the context of its passes, and the least cosine to the gradient of the plain run."""

    make: Callable[[Path], PeftModel]
    context: Callable[[], Any] = contextlib.nullcontext
    cosine: float = 1 - 1e-6
    layers: int = 2
    targets: str = "all-linear"


WAYS = {
    "gradient checkpointing, reentrant": Way(checkpointed(True)),
    "gradient checkpointing, not reentrant": Way(checkpointed(False)),
    "autocast bfloat16": Way(plain, functools.partial(torch.autocast, "cpu", torch.bfloat16), 0.99),
    "autocast float16": Way(plain, functools.partial(torch.autocast, "cpu", torch.float16), 0.999),
    "torch.compile": Way(compiled, layers=1, targets=FEW),
    "device_map with a layer on disk": Way(offloaded),
    "adapter on the meta device (low_cpu_mem_usage)": Way(on_meta),
}


def rows(column: str) -> Any:
    return pytest.mark.parametrize(
        "way",
        [
            pytest.param(way, id=row, marks=pytest.mark.support("ways of running", row, column))
            for row, way in WAYS.items()
        ],
    )


@pytest.fixture(autouse=True)
def reset_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@rows("gradient")
def test_the_gradient_equals_that_of_the_plain_run(way: Way, tmp_path: Path) -> None:
    truth = lora_ga.estimate_gradients(adapted(llama(num_hidden_layers=way.layers), way.targets), causal(), DENSE)
    model = way.make(tmp_path)
    with way.context():
        found = lora_ga.estimate_gradients(model, causal(), DENSE)
    assert set(found) == set(truth)
    for name, part in found.items():
        one, other = ((e.U * e.S) @ e.V.mT for e in (part, truth[name]))
        assert (one * other).sum() >= way.cosine * one.norm() * other.norm(), name


class Run(NamedTuple):
    """The outputs of the base model, at the start and after training, the losses, and the folder of the adapter."""

    base: Tensor
    start: Tensor
    losses: list[float]
    trained: Tensor
    folder: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Way], Run]:
    """A function that initialises, trains and saves a model once."""

    @functools.cache
    def finished(way: Way) -> Run:
        folder = tmp_path_factory.mktemp("run")
        model, batch = way.make(folder), causal(1)[0]
        with way.context():
            with model.disable_adapter():
                base = logits(model, batch)
            lora_ga.initialize(model, causal())
            start = logits(model, batch)
            losses = train(model, [batch], steps=4, lr=1e-3)
        model.save_pretrained(folder / "adapter")
        return Run(base, start, losses, logits(model.eval(), batch), folder / "adapter")

    return finished


@rows("start")
def test_outputs_at_the_start_equal_those_of_the_base_model(way: Way, run: Callable[[Way], Run]) -> None:
    assert torch.equal(run(way).start, run(way).base)


@rows("step")
def test_training_lowers_the_loss(way: Way, run: Callable[[Way], Run]) -> None:
    losses = run(way).losses
    assert losses[-1] < losses[0]


@rows("reload")
def test_stock_peft_loads_the_saved_adapter(way: Way, run: Callable[[Way], Run]) -> None:
    batch, plain = causal(1)[0], llama(num_hidden_layers=way.layers)
    before = logits(plain, batch)
    stock = PeftModel.from_pretrained(plain, run(way).folder).eval()
    torch.testing.assert_close(logits(stock, batch), run(way).trained, rtol=0, atol=1e-5)
    assert not torch.allclose(run(way).trained, before, rtol=0, atol=1e-4)


def padded(side: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a batch, and the same batch with padding."""
    ids = tokens(3, 8)
    blank, width = torch.zeros(3, 4, dtype=torch.long), 4
    join = (lambda a, b: torch.cat([a, b], 1)) if side == "right" else (lambda a, b: torch.cat([b, a], 1))
    wide = {
        "input_ids": join(ids, blank),
        "attention_mask": join(torch.ones_like(ids), blank),
        "labels": join(ids, blank - 100),
    }
    assert wide["input_ids"].shape == (3, 8 + width)
    return {"input_ids": ids, "labels": ids}, wide


@pytest.mark.support("ways of running", "padded batches", "gradient")
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_tokens_have_no_output_gradient_and_do_not_count(side: str) -> None:
    short, wide = padded(side)
    if side == "left":  # positions count from the first token that is not padding
        wide["labels"][:, 4] = -100  # otherwise the last padding token would predict the first real one
        wide["position_ids"] = (wide["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model = adapted(llama())
    recorded: dict[str, Tensor] = {}
    layers = {name: target.layer for name, target in find_targets(model).items()}
    with isolated(model, "default"), record_layers(layers, lambda name, x, g: recorded.__setitem__(name, g)):
        model(**wide).loss.backward()
    blank = wide["attention_mask"].flatten() == 0
    assert set(recorded) == set(layers)
    for name, g_TO in recorded.items():
        assert not g_TO[blank].any(), name
        assert g_TO[~blank].any(), name
    one, other = (lora_ga.estimate_gradients(model, [batch], DENSE) for batch in (short, wide))
    assert one.weight == other.weight
    for name, part in one.items():
        found, true = ((e.U * e.S) @ e.V.mT for e in (other[name], part))
        assert (found - true).norm() <= 1e-5 * true.norm(), name


@pytest.mark.support("ways of running", "packed sequences", "gradient")
def test_packed_sequences_give_the_gradient_of_the_separate_ones() -> None:
    ids = tokens(2, 8)
    labels = ids.clone()
    labels[:, 0] = -100  # the last token of the first sequence must not predict the second one
    packed = {"input_ids": ids.reshape(1, 16), "labels": labels.reshape(1, 16)}
    packed["position_ids"] = torch.arange(8).repeat(2)[None]
    model = adapted(llama())
    one, other = (
        lora_ga.estimate_gradients(model, [batch], DENSE) for batch in ({"input_ids": ids, "labels": labels}, packed)
    )
    assert one.weight == other.weight
    for name, part in one.items():
        found, true = ((e.U * e.S) @ e.V.mT for e in (other[name], part))
        assert (found - true).norm() <= 1e-4 * true.norm(), name


def test_of_a_model_wrapped_by_torch_compile_the_one_inside_is_started() -> None:
    plain, inside = adapted(llama()), adapted(llama())
    lora_ga.initialize(plain, causal())
    compiled: Any = torch.compile(inside, backend="eager")
    lora_ga.initialize(compiled, causal())
    started = inside.state_dict()
    assert all(torch.equal(value, started[name]) for name, value in plain.state_dict().items())


def test_a_layer_on_the_meta_device_that_has_to_start_as_plain_lora_is_refused(tmp_path: Path) -> None:
    model = on_meta(tmp_path)
    estimate = lora_ga.estimate_gradients(adapted(llama()), causal())
    part = next(iter(estimate))
    known = {name: value for name, value in estimate.items() if name != part}
    incomplete = lora_ga.GradientEstimate(known, estimate.config, estimate.fingerprint, 1.0, 1, {part: "left out"})
    with pytest.raises(ValueError, match=f"{part} is on the meta device and has to start as plain LoRA"):
        lora_ga.initialize(model, incomplete, LoraGAConfig(on_missing="lora"))
    assert not any(isinstance(module, Factor) for module in model.modules())


# --- adapters that were injected ------------------------------------------------------------------------------------

BATCH = causal(1)[0]


class Wrapper(nn.Module):
    """A network around a model, with a part of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.unused = model, nn.Linear(2, 2)

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)


def added(base: Any, **changes: Any) -> Any:
    """Add an adapter by Transformers' own method."""
    torch.manual_seed(7)
    base.add_adapter(lora_settings(**changes))
    return base.eval()


def mixed(base: nn.Module) -> Any:
    torch.manual_seed(7)
    return get_peft_model(base, lora_settings(), mixed=True)


@pytest.fixture
def transformers_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Transformers 5.24 use the newest PEFT: it asks for 0.22, which is not published."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0")


@pytest.mark.parametrize(
    "make",
    [
        injected,
        added,
        lambda base: Wrapper(injected(base)),
        lambda base: torch.compile(injected(base), backend="eager"),
        mixed,
    ],
    ids=["inject_adapter_in_model", "model.add_adapter", "in a network", "compiled", "PeftMixedModel"],
)
def test_an_injected_adapter_starts_as_that_of_a_peft_model(
    make: Callable[[Any], Any], transformers_adapters: None
) -> None:
    usual = adapted(llama(num_hidden_layers=1))
    truth = lora_ga.initialize(usual, causal())
    base = llama(num_hidden_layers=1)
    model = make(base)
    before = logits(model, BATCH)
    estimate = lora_ga.estimate_gradients(model, causal())
    assert estimate.fingerprint == truth.fingerprint
    assert not any(isinstance(module, Factor) for module in model.modules())
    lora_ga.apply_estimate(model, estimate)
    assert torch.equal(logits(model, BATCH), before)
    found, wanted = get_peft_model_state_dict(base), get_peft_model_state_dict(usual)
    assert len(found) == len(wanted)
    for name, value in wanted.items():  # a network may count labels otherwise, which rounds otherwise
        torch.testing.assert_close(found[name.removeprefix("base_model.model.")], value, rtol=0, atol=1e-5)
    assert len([p for p in base.parameters() if p.requires_grad]) == len(found)


@pytest.mark.parametrize("offset", CHOICES["offset"])
def test_all_readers_of_a_saved_injected_adapter_compute_the_same(
    offset: Any, tmp_path: Path, transformers_adapters: None
) -> None:
    model = added(llama(), rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32})
    lora_ga.initialize(model, causal(), LoraGAConfig(offset=offset))
    for _ in range(2):  # into one folder, as a trainer saves
        train(model, causal(), steps=2)
        model.save_pretrained(tmp_path)
    wanted = logits(model, BATCH)
    readers = [
        PeftModel.from_pretrained(llama(), tmp_path),
        lora_ga.load(llama(), tmp_path),
        lora_ga.load(llama(), tmp_path, is_trainable=True),
    ]
    other = llama()
    other.load_adapter(tmp_path)
    for reader in (*readers, other):
        torch.testing.assert_close(logits(reader.eval(), BATCH), wanted, rtol=0, atol=1e-6)


def test_no_sidecar_is_written_where_another_injected_adapter_is_saved(
    tmp_path: Path, transformers_adapters: None
) -> None:
    model = added(llama())
    lora_ga.initialize(model, causal())
    model.add_adapter(model.peft_config["default"], "twin")  # which is active now
    with pytest.warns(UserWarning, match=f"no {FILE} was written"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()
    model.set_adapter("default")
    model.save_pretrained(tmp_path)
    assert (tmp_path / FILE).exists()


def test_an_adapter_injected_into_a_peft_model_is_found_there() -> None:
    model = adapted(llama(), ["q_proj"])
    inject_adapter_in_model(lora_settings(["v_proj"]), model.get_base_model(), "second")
    assert set(lora_ga.initialize(model, causal(), adapter_name="second")) == {
        f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)
    }


def test_networks_and_pipelines_without_one_adapted_model_are_refused() -> None:
    pair = nn.ModuleDict({"injected": injected(llama()), "wrapped": adapted(llama())})
    with pytest.raises(ValueError, match=r"ModuleDict contains 2 models with adapters \(injected, wrapped\)"):
        lora_ga.initialize(pair, causal())
    pipeline: Any = object()
    with pytest.raises(
        TypeError, match="The object has no LoRA layers. Give the module that has the adapter: of a pip"
    ):
        lora_ga.initialize(pipeline, causal())


def test_a_trained_injected_adapter_is_refused() -> None:
    model = injected(llama())
    train(model, causal(), steps=1)
    with pytest.raises(ValueError, match="not fresh: .*Start from a fresh one: load the base model again, and add"):
        lora_ga.initialize(model, causal())
