"""Layers whose class derives from torch's and has another `forward`: those that compute the same, and others."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_outputs import CausalLMOutput, ImageClassifierOutput
from transformers.pytorch_utils import Conv1D

import lora_ga
from cases import pictures
from lora_ga import LoraGAConfig
from lora_ga.config import CHOICES
from lora_ga.export.merge import merge_adapter
from lora_ga.layers.plain import follows_weight
from lora_ga.layers.targets import exclusion
from toys import adapted, causal, llama, logits, train


class Standardized(nn.Conv2d):
    """As BiT's and timm's: the weight of each output is standardised first."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return functional.conv2d(x, (self.weight - mean) / (std + 1e-6), self.bias, self.stride, self.padding)


class Picture(nn.Module):
    """A plain convolution, a standardised one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), Standardized(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 8)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> ImageClassifierOutput:
        scores = self.head(self.second(self.first(pixel_values).relu()).relu().mean((2, 3)))
        return ImageClassifierOutput(loss=nn.functional.cross_entropy(scores, labels), logits=scores)


class Product(nn.Linear):
    """As Falcon's: the same map, written as a product."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT if self.bias is None else x @ self.weight.mT + self.bias


class Scaled(nn.Embedding):
    """As Gemma's."""

    embed_scale = torch.tensor(3.0)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


class Squared(nn.Linear):
    """Another map of the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * self.weight.abs(), self.bias)


class Router(nn.Linear):
    """As Llama 4's and Phi-MoE's: it returns a tuple."""

    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return scores, scores.argmax(-1)


class Blocks(nn.Linear):
    """As DeepSeek-V4's: each block of rows applies to its own part of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(
            "...bi,boi->...bo", x.unflatten(-1, (-1, self.in_features)), self.weight.unflatten(0, (2, -1))
        )


class Mixed(nn.Module):
    """A language model of two block-diagonal layers between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(32, 64)
        self.mix, self.more = Blocks(8, 32, bias=False), Blocks(8, 32, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        x = self.embed(input_ids)
        scores = self.head(self.mix(x).flatten(-2) + self.more(x).flatten(-2))
        return CausalLMOutput(loss=functional.cross_entropy(scores.flatten(0, 1), labels.flatten()), logits=scores)


def with_class(kind: type, *places: str) -> Any:
    """A Llama in which layers have another class."""
    model = llama()
    for place in places:
        model.get_submodule(place).__class__ = kind
    return model


UP = "model.layers.0.mlp.up_proj"


def excluded_in(error: Exception) -> list[str]:
    """The names in the first setting of a message that leaves layers out."""
    found: list[str] = ast.literal_eval(re.findall(r"LoraConfig\(exclude_modules=(\[.*?\])\)", str(error))[0])
    return found


def test_a_convolution_with_a_computation_of_its_own_is_refused_by_name() -> None:
    model = adapted(Picture(), ["first", "second", "head"])
    message = r"second: is a Standardized, which computes something else than torch's convolution.*\['second'\]"
    with pytest.raises(ValueError, match=message):
        lora_ga.initialize(model, pictures())


def test_such_a_convolution_may_stay_plain_lora_and_stock_peft_loads_what_was_trained(tmp_path: Path) -> None:
    model = adapted(Picture(), ["first", "second", "head"])
    with pytest.warns(UserWarning, match="(?s)second: is a Standardized.*They start as plain LoRA"):
        lora_ga.initialize(model, pictures(), LoraGAConfig(on_missing="lora"))
    assert type(model.get_submodule("base_model.model.second").lora_A["default"]) is Standardized
    train(model, pictures())
    model.save_pretrained(tmp_path)
    expected = logits(model.eval(), pictures()[0])
    for loaded in (
        PeftModel.from_pretrained(Picture(), tmp_path),
        lora_ga.load(Picture(), tmp_path, is_trainable=True),
    ):
        torch.testing.assert_close(logits(loaded.eval(), pictures()[0]), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(Picture().eval(), pictures()[0]), expected, atol=1e-3)


@pytest.mark.parametrize("offset", CHOICES["offset"])
def test_subclasses_that_compute_the_same_start_as_their_class(offset: Any) -> None:
    models = [adapted(llama(), "all-linear"), adapted(with_class(Product, UP), "all-linear")]
    for model in models:
        lora_ga.initialize(model, causal(), LoraGAConfig(offset=offset))
    torch.testing.assert_close(*(train(model, causal()) for model in models), rtol=0, atol=1e-5)


def layer_of(base: Any) -> Any:
    """PEFT's layer round a base layer."""
    targets: dict[str, Any] = {"target_modules": ["0"], "fan_in_fan_out": isinstance(base, Conv1D)}
    return get_peft_model(nn.Sequential(base), LoraConfig(r=2, **targets)).base_model.model[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("base", "follows"),
    [
        (Product(8, 6), True),
        (Scaled(10, 6), True),
        (type("Same", (Conv1D,), {"forward": lambda self, x: x @ self.weight + self.bias})(6, 8), True),
        (
            type("Same", (nn.Conv2d,), {"forward": lambda self, x: self._conv_forward(x, self.weight, None)})(3, 8, 3),
            True,
        ),
        (
            type("Twice", (nn.Conv2d,), {"_conv_forward": lambda self, *x: 2 * nn.Conv2d._conv_forward(self, *x)})(
                3, 8, 3
            ),
            False,
        ),
        (Squared(8, 6), False),
        (Router(8, 6), False),
        (Blocks(8, 6), False),
        (Standardized(3, 8, 3), False),
        (type("Thrice", (nn.Linear,), {"forward": lambda self, x: 3 * nn.Linear.forward(self, x)})(8, 6), False),
    ],
)
def test_whether_a_layer_follows_its_weight_is_found_by_running_it(
    base: nn.Module, follows: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    base = copy.deepcopy(base).to(dtype)
    for seed in range(20):  # the rounding of a layer depends on its weights
        torch.manual_seed(seed)
        for parameter in base.parameters():
            parameter.data.uniform_(-0.5, 0.5)
        assert follows_weight(layer_of(base)) is follows
    state = torch.get_rng_state()
    layer = layer_of(base)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    torch.set_rng_state(state)
    assert follows_weight(layer) is follows
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_the_base_offset_and_merging_refuse_a_layer_that_does_not_follow_its_weight(tmp_path: Path) -> None:
    model = adapted(with_class(Squared, UP), "all-linear")
    with pytest.raises(ValueError, match=rf'{UP}: offset="base" cannot change a Squared, whose output .*"adapter"'):
        lora_ga.initialize(model, causal(), LoraGAConfig(offset="base"))
    lora_ga.initialize(model, causal())
    train(model, causal())
    model.save_pretrained(tmp_path / "adapter")
    loaded = lora_ga.load(with_class(Squared, UP), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, causal()[0]), logits(model.eval(), causal()[0]), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=f"{UP}: a Squared computes something else than its weight says"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=with_class(Squared, UP))
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=with_class(Product, UP))  # which computes the product


class Dropping(nn.Linear):
    """The same map, with dropout in training."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.dropout(x, 0.5, self.training), self.weight, self.bias)


def test_a_layer_is_tried_without_its_dropout_and_its_mode_stays() -> None:
    layer = layer_of(Dropping(8, 6)).train()
    state = torch.get_rng_state()
    assert follows_weight(layer)
    assert layer.get_base_layer().training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-3, 16.0])
@pytest.mark.parametrize("kind", [Scaled, Product])
def test_a_layer_is_tried_with_a_change_of_the_size_of_its_weight(kind: Any, size: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = kind(64, 16)
    base.weight.data = (base.weight.detach() * size).to(dtype)
    assert follows_weight(layer_of(base.to(dtype)))


class Largest(TorchDispatchMode):
    """Keeps the bytes of the largest new tensor."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(each.nbytes for each in tree_leaves(found) if isinstance(each, Tensor))])
        return found


@pytest.mark.parametrize("base", [Scaled(4096, 16), Product(256, 512)])
def test_trying_a_layer_makes_nothing_larger_than_its_weight(base: nn.Module) -> None:
    layer = layer_of(base.bfloat16())
    with Largest() as largest:
        assert follows_weight(layer)
    assert 0 < largest.bytes <= layer.weight.nbytes


class Two(nn.Module):
    """A standardised convolution and two linear layers, whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Sequential(Standardized(3, 8, 3)), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> ImageClassifierOutput:
        scores = self.head(self.stem(pixel_values).mean((2, 3)))
        return ImageClassifierOutput(loss=nn.functional.cross_entropy(scores, labels), logits=scores)


def test_the_setting_that_leaves_a_layer_out_leaves_out_no_other() -> None:
    with pytest.raises(ValueError, match="is a Standardized") as caught:
        lora_ga.initialize(adapted(Two(), ["stem.0", "head.0", "head.1"]), pictures())
    assert set(re.findall(r"exclude_modules=(\[.*?\])", str(caught.value))) == {"['stem.0']"}
    with pytest.raises(ValueError, match=rf"{UP} is a Router.*exclude_modules=\['0.mlp.up_proj'\]"):
        lora_ga.initialize(adapted(with_class(Router, UP), "all-linear"), causal())


def test_many_layers_of_a_class_that_is_not_supported_have_one_line_which_leaves_all_of_them_out() -> None:
    def network() -> nn.Module:
        base = Two()
        base.stem.extend([Standardized(8, 8, 3, padding=1) for _ in range(9)])
        return base

    places = [f"stem.{number}" for number in range(10)]
    with pytest.raises(ValueError, match="10 of 12 layers cannot be aligned") as caught:
        lora_ga.initialize(adapted(network(), [*places, "head.0", "head.1"]), pictures())
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("  stem.0, stem.1, stem.2 and 7 more: is a Standardized, which")
    again = adapted(network(), [*places, "head.0", "head.1"], exclude_modules=excluded_in(caught.value))
    assert set(lora_ga.initialize(again, pictures())) == {"head.0", "head.1"}


@pytest.mark.parametrize("config", [{}, {"on_missing": "lora"}])
def test_a_layer_that_returns_a_tuple_is_refused_by_name_with_the_setting_that_leaves_it_out(
    config: dict[str, Any],
) -> None:
    model = adapted(with_class(Router, UP), "all-linear")
    message = rf"{UP} is a Router that returns a tuple and not a tensor.*exclude_modules=\['0.mlp.up_proj'\]"
    with pytest.raises(ValueError, match=message):
        lora_ga.initialize(model, causal(), LoraGAConfig(**config))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_that_does_not_apply_its_weight_as_one_matrix_is_refused_at_the_first_batch() -> None:
    model = adapted(Mixed(), ["mix", "more", "head"])
    read = []

    def batches() -> Any:
        for batch in causal():
            read.append(batch)
            yield batch

    message = "(mix|more) is a Blocks that gives 16 outputs for 16 inputs, but its weight is 32 x 8"
    with pytest.raises(ValueError, match=message) as caught:
        lora_ga.initialize(model, batches())
    assert len(read) <= 2  # the second is read ahead
    assert not any(module._forward_hooks for module in model.modules())
    again = adapted(Mixed(), ["mix", "more", "head"], exclude_modules=excluded_in(caught.value))
    lora_ga.initialize(again, causal())  # as the message says: both layers of the class are left out


@pytest.mark.parametrize(
    ("names", "others", "line"),
    [
        (["a.gate", "b.gate"], ["a.up", "b.up"], "exclude_modules=['gate']"),
        (["a.0.gate"], ["a.1.gate"], "exclude_modules=['0.gate']"),
        (["a.gate", "c.b.gate"], ["c.d.gate"], "exclude_modules=['a.gate', 'b.gate']"),
        (["gate"], ["a.gate"], "exclude_modules=['gate']"),  # its whole name; PEFT would leave out a.gate too
    ],
)
def test_layers_are_left_out_by_the_shortest_ends_of_their_names(
    names: list[str], others: list[str], line: str
) -> None:
    assert exclusion(names, others) == line


def test_the_error_about_layers_without_a_gradient_has_the_line_that_leaves_them_out() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch, output_hidden_states=True).hidden_states[1].square().mean()

    with pytest.raises(ValueError, match="8 of 15 layers cannot be aligned") as caught:
        lora_ga.initialize(adapted(llama(), [*NAMES, "lm_head"]), causal(), loss_fn=loss)
    (line,) = re.findall(r"with LoraConfig\(exclude_modules=(\[.*?\])\), or", str(caught.value))
    again = adapted(llama(), [*NAMES, "lm_head"], exclude_modules=ast.literal_eval(line))
    lora_ga.initialize(again, causal(), loss_fn=loss)
    assert len(again.peft_config["default"].alignment.scaling) == 7


NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
