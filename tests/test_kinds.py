"""Layer kinds: the table, grouped convolutions, experts without tokens, 4-bit layers, kinds that were never run."""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib.util
import re
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

import lora_ga
from bench_alignment import gradients
from bench_quantised import dequantised, saved_bytes
from cases import ADAPTERS, LAYERS, Case, Convolutions, Waves, mixtral, nf4, pictures, seeded, wide_llama
from lora_ga import LoraGAConfig
from lora_ga.layers import kinds
from lora_ga.layers.convolution import _padding_by_side
from lora_ga.layers.factors import Factor
from lora_ga.layers.kinds import KINDS, base_weights, kind_of
from lora_ga.layers.linear import WeightLayout
from lora_ga.layers.targets import find_targets
from toys import (
    FUSED_EXPERTS,
    VOCABULARY,
    adapted,
    autograd_gradients,
    causal,
    classified,
    gpt2,
    llama,
    logits,
    tokens,
    train,
)

pytestmark = pytest.mark.filterwarnings(r"ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
OPTIONAL = {"bitsandbytes", "torchao", "hqq", "optimum", "gptqmodel"}
DENSE = LoraGAConfig(estimator="dense", oversample=10**4)


def make_model(case: Case, **changes: Any) -> PeftModel:
    case.check_installed()
    return adapted(case.make(), **{"targets": case.settings["target_modules"], **changes})


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.ran], ids=lambda kind: f"{kind.layer} on {kind.base}")
def test_every_kind_marked_as_run_has_a_case_that_runs_it(kind: kinds.Kind) -> None:
    found = []
    for case in LAYERS.values():
        try:
            case.check_installed()
        except pytest.skip.Exception:
            continue
        base = case.make()
        if kind.layer == "layer.Linear" and "bitsandbytes" in kind.base:
            for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # as if only the layers were quantised
                setattr(base, flag, False)
        settings = {"r": 4} | dict(case.settings)
        model = get_peft_model(base, LoraConfig(**settings))
        found += [kind_of(target.layer) for target in find_targets(model).values()]
    packages = {name.partition(".")[0] for name in (kind.layer, kind.base)} & OPTIONAL
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        pytest.skip(f"{', '.join(missing)} is not installed")
    assert kind in found


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.support("layers", row, "gradient"))
        for row, kind in {"nn.Conv2d": Convolutions, "nn.Conv1d": Waves}.items()
    ],
)
def test_the_gradients_of_a_convolutions_groups_give_autograds_gradient_of_b(kind: type[nn.Module]) -> None:
    """A reads all channels in PEFT, so each group's product is a dense convolution. The gradient of B is s · G Aᵀ."""
    torch.manual_seed(7)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["grouped", "wide"], "init_lora_weights": False}
    model = get_peft_model(seeded(kind)().double(), LoraConfig(**settings)).double()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in pictures()[0].items()}
    layer = model.base_model.model.grouped
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
        model.base_model.model.wide.lora_B["default"].weight.zero_()
    estimate = lora_ga.estimate_gradients(model, [batch], DENSE)
    model(**batch).loss.backward()
    a_PrI = layer.lora_A["default"].weight.flatten(1).unflatten(0, (2, -1))
    b_POr = layer.lora_B["default"].weight.grad.flatten(1).unflatten(0, (2, -1))  # s · G Aᵀ of each group
    for part in range(2):
        found = estimate[f"grouped[{part}]"]
        expected = layer.scaling["default"] * ((found.U * found.S) @ (found.V.mT @ a_PrI[part].mT))
        torch.testing.assert_close(b_POr[part], expected, rtol=1e-9, atol=1e-12)


def route_to_first(model: nn.Module, experts: int) -> None:
    """Make every router choose among the first experts only."""

    def only_first(module: nn.Module, args: Any, output: Any) -> Any:
        logits = output[0] if isinstance(output, tuple) else output
        weights, index = torch.topk(logits[..., :experts].softmax(-1), 2, dim=-1)
        return (logits, weights, index) if isinstance(output, tuple) else output

    for module in model.modules():
        if "Router" in type(module).__name__:
            module.register_forward_hook(only_first)


@pytest.fixture
def unused_expert() -> PeftModel:
    """A Mixtral in which the last of four experts gets no token. A layer of the attention is adapted too."""
    base = seeded(mixtral)()
    route_to_first(base, 3)
    return adapted(base, ["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])


@FUSED_EXPERTS
def test_experts_without_a_token_start_as_plain_lora_with_one_warning_that_counts_them(
    unused_expert: PeftModel,
) -> None:
    targets = {name: target for name, target in find_targets(unused_expert).items() if target.parts > 1}
    before = {name: target.layer.lora_A["default"].weight.detach().clone() for name, target in targets.items()}
    expected = logits(unused_expert, causal(1)[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimate = lora_ga.initialize(unused_expert, causal())
    texts = [str(warning.message) for warning in caught if "experts" in str(warning.message)]
    assert len(texts) == 1
    assert {warning.filename for warning in caught} == {__file__}
    assert texts[0].startswith("4 of 16 experts (or groups) got no gradient, for example model.layers.0.mlp.experts")
    assert torch.equal(logits(unused_expert, causal(1)[0]), expected)
    for name, target in targets.items():
        a, b = target.layer.lora_A["default"], target.layer.lora_B["default"]
        assert isinstance(a, Factor)
        assert isinstance(b, Factor)
        a_PrI, b_POr = (
            unstack(f.start, 4) for unstack, f in ((target.layout.unstack_a, a), (target.layout.unstack_b, b))
        )
        assert torch.equal(a_PrI[3], target.layout.unstack_a(before[name], 4)[3])
        assert not b_POr[3].any()
        assert all(b_POr[part].any() for part in range(3))
        assert set(target.keys) & set(estimate) == set(target.keys[:3])


@FUSED_EXPERTS
def test_an_expert_that_starts_as_plain_lora_trains_as_plain_lora(unused_expert: PeftModel) -> None:
    with pytest.warns(UserWarning, match="4 of 16 experts"):
        estimate = lora_ga.estimate_gradients(unused_expert, causal())
    with pytest.warns(UserWarning, match="4 of 16 experts"):  # the layer of the attention is none
        lora_ga.initialize(unused_expert, estimate)
    for module in unused_expert.modules():  # now the routers choose among all experts
        if "Router" in type(module).__name__:
            module._forward_hooks.clear()
    unused_expert(**causal(1)[0]).loss.backward()
    for target in expert_layers(unused_expert):
        a, b = target.lora_A["default"].trainable.grad, target.lora_B["default"].trainable.grad
        assert not a.unflatten(0, (4, -1))[3].any()  # B = 0, as in plain LoRA
        assert b.unflatten(1, (-1, 4))[:, :, 3].any()


def expert_layers(model: PeftModel) -> list[Any]:
    return [module for module in model.modules() if "ParamWrapper" in type(module).__name__]


@FUSED_EXPERTS
def test_a_router_that_is_too_small_is_refused_and_the_advice_of_the_error_works() -> None:
    base = seeded(mixtral)
    message = (
        r"that fits all is 2 \(model.layers.0.mlp.gate is 4 x 32\)\nSet on_missing=\"lora\" to start them as plain "
        r"LoRA, or name the other layers in target_modules and target_parameters\."
    )
    with pytest.raises(ValueError, match=message):
        lora_ga.initialize(adapted(base()), causal())
    lora_ga.initialize(adapted(base()), causal(), LoraGAConfig(on_missing="lora"))
    named = adapted(base(), ["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    lora_ga.initialize(named, causal())
    # PEFT doubles rank and alpha of gate_up_proj for "all-linear" alone, and so changes rsLoRA's scaling.
    assert len({layer.scaling["default"] for layer in named.modules() if isinstance(layer, LoraLayer)}) == 1
    one: dict[str, Any] = {"target_parameters": ["0.mlp.gate.weight"]}
    with pytest.raises(ValueError, match=r"at most 2 \(rank_pattern sets it for one layer, as .*\)") as caught:
        lora_ga.initialize(adapted(base(), ["q_proj"], **one), causal())
    (key,) = re.findall(r"for one layer, as (\S+)\)", str(caught.value))
    lora_ga.initialize(adapted(base(), ["q_proj"], **one, rank_pattern={key: 2}), causal())


@FUSED_EXPERTS
@pytest.mark.support("layers", "fused experts (Mixtral)", "alignment")
def test_every_experts_first_step_follows_its_best_rank_2r_gradient() -> None:
    torch.manual_seed(7)
    model = adapted(seeded(mixtral)(), [], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    batch = causal(1, rows=16)[0]
    rank = 4
    dense = lora_ga.estimate_gradients(model, [batch], DENSE)
    targets = find_targets(model)
    lora_ga.initialize(model, [batch])
    before = {name: target.layer.get_delta_weight("default").detach().clone() for name, target in targets.items()}
    model(**batch).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    ratios = []
    for name, target in targets.items():
        change = target.layout.matrices(target.layer, before[name] - target.layer.get_delta_weight("default"))
        for key, step in zip(target.keys, change, strict=True):
            if key in dense:
                g = (dense[key].U * dense[key].S) @ dense[key].V.mT
                limit = dense[key].S[: 2 * rank].norm() / dense[key].S.norm()
                ratios.append(((step * g).sum() / (step.norm() * g.norm()) / limit).item())
    assert len(ratios) > 8
    assert sorted(ratios)[len(ratios) // 2] >= 0.99


def test_the_backward_pass_keeps_no_dequantised_weight() -> None:
    batch = causal(1)[0]
    kept = [saved_bytes(model, batch) for model in (make_model(LAYERS["bitsandbytes nf4"]), adapted(wide_llama()))]
    assert kept[0] == kept[1] > 0


def test_a_4_bit_layer_that_evaluation_packed_still_gets_its_gradient() -> None:
    LAYERS["bitsandbytes nf4"].check_installed()
    base = nf4()
    layers = [module for module in base.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes packs weights on processors with AVX512-BF16 only")
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    before = logits(base, causal(1)[0])
    assert any(layer.weight.quant_state.packing_format_for_cpu for layer in layers)
    model = adapted(base)
    found = lora_ga.estimate_gradients(model, causal(), DENSE)
    # Packing rounded the blocks' scales, so the reference is the gradient of the packed model.
    truth = gradients(dequantised(wide_llama(), model), causal())
    for name, part in found.items():
        assert ((part.U * part.S) @ part.V.mT - truth[name]).norm() <= 1e-4 * truth[name].norm(), name
    assert torch.equal(logits(model.eval(), causal(1)[0]), before)


@pytest.mark.parametrize("double", [False, True])
def test_a_packed_4_bit_weight_is_unpacked_to_the_same_values(double: bool) -> None:
    LAYERS["bitsandbytes nf4"].check_installed()
    import bitsandbytes as bnb
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(256, 64, bias=False, compress_statistics=double, quant_type="nf4").to("cpu")
    before = kinds.READ(layer)
    layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    assert layer.weight.quant_state.packing_format_for_cpu
    kinds.unpack(layer)
    # Packing rounds the blocks' scales to bfloat16, and unpacking those of double quantisation to 8 bits.
    torch.testing.assert_close(kinds.READ(layer), before, rtol=2**-6 if double else 2**-8, atol=0)


@pytest.mark.parametrize("place", ["meta", "cpu"])
def test_a_4_bit_layer_that_is_not_quantised_yet_is_refused(place: str) -> None:
    LAYERS["bitsandbytes nf4"].check_installed()
    import bitsandbytes as bnb

    model = wide_llama()
    with torch.device(place):
        model.set_submodule("model.layers.0.mlp.up_proj", bnb.nn.Linear4bit(64, 128, bias=False))
    with pytest.raises(ValueError, match="up_proj is a Linear4bit whose weight has not been quantised yet"):
        lora_ga.initialize(adapted(model), causal())


def test_the_weight_scale_reads_quantised_weights() -> None:
    model = make_model(LAYERS["bitsandbytes nf4"])
    before = logits(model, causal(1)[0])
    lora_ga.initialize(model, causal(), LoraGAConfig(scale="weight"))
    assert torch.equal(logits(model, causal(1)[0]), before)
    full = dict(wide_llama().named_modules())
    for name, target in [(n, m) for n, m in model.named_modules() if n.endswith("up_proj")]:
        dense = full[name.removeprefix("base_model.model.")].weight
        read = base_weights(target)[0].float()
        assert (read - dense).norm() <= 0.15 * dense.norm()


def test_a_kind_that_was_never_run_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    untried = tuple(dataclasses.replace(kind, ran=False) for kind in KINDS)
    monkeypatch.setattr(kinds, "KINDS", untried)
    kinds.warn_never_run.cache_clear()
    with pytest.warns(UserWarning, match="^Linear is a kind of layer that LoRA-GA supports but has never been run on"):
        lora_ga.initialize(adapted(llama()), causal())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lora_ga.initialize(adapted(llama()), causal())


def test_a_class_whose_kind_was_looked_up_does_not_stay_in_memory() -> None:
    """Torch makes such a class for each layer whose weight it computes, and the class holds the layer."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    held = weakref.ref(layer), weakref.ref(type(layer))
    assert not kinds.packs(layer)
    del layer
    gc.collect()
    assert [each() for each in held] == [None, None]


def test_an_unknown_layer_among_known_ones_is_refused_by_name() -> None:
    model = adapted(nn.Sequential(nn.Linear(8, 8), nn.Conv3d(3, 8, 3)), ["0", "1"])
    with pytest.raises(ValueError, match=r"1: is a Conv3d \(PEFT: layer.Conv3d\); known are .*exclude_modules=\['1'\]"):
        lora_ga.initialize(model, causal())


class Attention(nn.Module):
    """A network with torch's attention, whose projections are no layers that PEFT's LoRA layer calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mlp, self.head = nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = self.embed(input_ids)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        logits = self.head(x + self.mlp(x).relu()).mean(1)
        return SequenceClassifierOutput(nn.functional.cross_entropy(logits, labels % 4), logits)


def test_multihead_attention_may_stay_plain_lora(tmp_path: Path) -> None:
    model, batches = adapted(Attention(), ["attn", "mlp"]), classified()
    with pytest.raises(ValueError, match=r"2 of 3 layers .*\n  attn: is a MultiheadAttention.*\n.*is a part of attn"):
        lora_ga.initialize(model, batches)
    before = logits(model, batches[0])
    with pytest.warns(UserWarning, match=r"2 of 3 layers .*\n  attn: is a MultiheadAttention"):
        estimate = lora_ga.initialize(model, batches, LoraGAConfig(on_missing="lora"))
    assert list(estimate) == ["mlp"]
    assert torch.equal(logits(model, batches[0]), before)
    train(model, batches)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(Attention(), tmp_path).eval()
    torch.testing.assert_close(logits(stock, batches[0]), logits(model.eval(), batches[0]), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model, batches[0]), before, atol=1e-3)
    alone = adapted(Attention(), ["attn"])
    with pytest.raises(ValueError, match="No layer is left"):
        lora_ga.initialize(alone, [], LoraGAConfig(on_missing="lora"))


def test_a_dilated_convolution_is_refused() -> None:
    model = adapted(nn.Sequential(nn.Conv2d(3, 16, 3, dilation=2)), ["0"])
    with pytest.raises(ValueError, match="0 is a dilated convolution, which PEFT adapts by one without dilation"):
        lora_ga.initialize(model, [])


def test_the_weight_of_a_linear_layer_may_be_named_as_a_parameter(tmp_path: Path) -> None:
    # PEFT adapts the shared experts of a mixture in this way alone: see docs/guide.md.
    model = adapted(llama(), ["q_proj"], target_parameters=["mlp.up_proj.weight"])
    estimate = lora_ga.initialize(model, causal(1), DENSE)
    truth = autograd_gradients(llama(), lambda base: base(**causal(1)[0]).loss)
    named = [name for name in truth if name.endswith(("up_proj", "q_proj"))]
    assert len(named) == len(estimate) == 4
    for name in named:
        found = (estimate[name].U * estimate[name].S) @ estimate[name].V.mT
        torch.testing.assert_close(found, truth[name], rtol=1e-4, atol=1e-6)
    assert torch.equal(logits(model.eval(), causal()[0]), logits(llama(), causal()[0]))
    train(model, causal())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, causal()[0]), logits(model.eval(), causal()[0]), rtol=0, atol=1e-5)


@FUSED_EXPERTS
def test_experts_with_another_active_adapter_are_refused() -> None:
    model = adapted(seeded(mixtral)(), [], target_parameters=["mlp.experts.down_proj"])
    model.add_adapter("other", LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.down_proj"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"experts.* is a parameter adapted by other active adapters too \(other\)"):
        find_targets(model)


def test_the_padding_same_has_one_more_on_the_right_of_an_even_kernel() -> None:
    base = nn.Conv2d(2, 1, (3, 4), padding="same", bias=False)
    image = torch.randn(1, 2, 5, 6)
    assert _padding_by_side(base) == [1, 2, 1, 1]
    padded = nn.functional.pad(image, _padding_by_side(base))
    torch.testing.assert_close(nn.functional.conv2d(padded, base.weight), base(image))


def test_the_base_offset_is_refused_for_grouped_convolutions() -> None:
    model = get_peft_model(seeded(Convolutions)(), LoraConfig(r=4, target_modules=["grouped"]))
    with pytest.raises(ValueError, match='grouped: offset="base" cannot change a grouped convolution, whose adapter'):
        lora_ga.initialize(model, pictures(), LoraGAConfig(offset="base"))


def test_the_base_offset_is_refused_where_the_adapter_pads_otherwise() -> None:
    base = seeded(Waves)()
    base.wide = nn.Conv1d(3, 16, 9, stride=2, padding=1, padding_mode="circular")
    model = adapted(base, ["wide"])
    before = logits(model, pictures()[0])
    with pytest.raises(ValueError, match='wide: offset="base" cannot change a convolution with circular padding, who'):
        lora_ga.initialize(model, pictures(), LoraGAConfig(offset="base"))
    lora_ga.initialize(model, pictures())
    assert torch.equal(logits(model, pictures()[0]), before)


class Refusing(WeightLayout):
    """A layout as the file of a new layer kind would define it."""

    def why_not_aligned(self, layer: Any, adapter_name: str) -> str | None:
        return None if layer.in_features == 64 else f"has {layer.in_features} inputs"

    def why_not_shifted(self, layer: Any) -> str | None:
        return "a weight of this kind"


def test_one_row_of_the_table_can_refuse_layers_of_a_new_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace(
        next(kind for kind in KINDS if kind.base == "torch.nn.modules.linear.Linear" and not kind.read),
        layout=Refusing(),
    )
    monkeypatch.setattr(kinds, "KINDS", (row, *KINDS))
    with pytest.raises(ValueError, match="mlp.down_proj has 128 inputs"):
        find_targets(adapted(wide_llama(), ["q_proj", "down_proj"]))
    model = adapted(wide_llama(), ["q_proj"])
    with pytest.raises(ValueError, match='q_proj: offset="base" cannot change a weight of this kind; use offset="adap'):
        lora_ga.initialize(model, causal(), LoraGAConfig(offset="base"))


def test_an_aligned_embedding_works_beside_another_adapter(tmp_path: Path) -> None:
    base = gpt2()
    model = adapted(base, ["wte", "c_attn"], fan_in_fan_out=True)
    lora_ga.initialize(model, causal())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["wte"], init_lora_weights=False))
    first = logits(model, causal(1)[0])
    model.set_adapter("other")
    assert not torch.equal(logits(model, causal(1)[0]), first)
    assert [n for n, p in model.named_parameters() if p.requires_grad and "other" not in n] == []
    model.set_adapter("default")
    assert torch.equal(logits(model, causal(1)[0]), first)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lora_embedding_A.default.delta_weight" in name for name in trained)
    model.delete_adapter("other")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), tmp_path), causal(1)[0]), first)


def test_doras_magnitudes_are_unchanged_and_still_train() -> None:
    model = adapted(ADAPTERS["DoRA"].make(), use_dora=True)
    before = [p.detach().clone() for name, p in model.named_parameters() if "magnitude" in name]
    lora_ga.initialize(model, causal())
    after = [p for name, p in model.named_parameters() if "magnitude" in name]
    assert len(before) == 14
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(p.requires_grad for p in after)


TARGETS = ["linear1", "linear2"]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, 3)
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, input_ids: Tensor, labels: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
        x = self.encoder(self.embed(input_ids), src_key_padding_mask=padding)
        logits = self.head(x[:, 0])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def batches(*, padded: bool) -> list[dict[str, Tensor]]:
    made = [{"input_ids": (ids := tokens(8, 10, seed)), "labels": ids[:, 0] % 3} for seed in range(2)]
    if padded:
        for batch in made:
            batch["padding"] = torch.arange(10) >= 5 + torch.arange(8)[:, None] % 4
    return made


@pytest.fixture(params=[True, False], ids=["fast path on", "fast path off"])
def fast_path(request: pytest.FixtureRequest) -> Any:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(request.param)
    yield request.param
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole rows"])
@pytest.mark.parametrize("estimator", ["dense", "streaming", "probe"])
def test_the_estimate_is_that_of_the_layers_as_they_train(
    estimator: str, padded: bool, training: bool, fast_path: bool
) -> None:
    base, data = Classifier(), batches(padded=padded)
    true = autograd_gradients(
        copy.deepcopy(base).train(), lambda model: torch.stack([model(**batch)["loss"] for batch in data]).mean()
    )
    model = adapted(base.train(training), TARGETS)
    found = lora_ga.estimate_gradients(model, data, LoraGAConfig(estimator=estimator, oversample=24))
    assert len(found) == 4
    for name, layer in found.items():
        product, g = (layer.U * layer.S) @ layer.V.mT, true[name]
        assert (product * g).sum() / (product.norm() * g.norm()) > 0.9999, name
    assert torch.backends.mha.get_fastpath_enabled() == fast_path


def test_the_fast_path_is_as_it_was_also_after_an_error(fast_path: bool) -> None:
    def broken(model: nn.Module, batch: Any) -> Tensor:
        assert not torch.backends.mha.get_fastpath_enabled()
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        lora_ga.estimate_gradients(adapted(Classifier(), TARGETS), batches(padded=False), loss_fn=broken)
    assert torch.backends.mha.get_fastpath_enabled() == fast_path


class WithoutGradient(nn.Linear):
    """A linear layer whose backward pass ends in it, as torchao's with dynamic int8 activations."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def dynamic_int8(model: Any) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model.model.layers, Int8DynamicActivationInt8WeightConfig(), lambda _, name: "gate_proj" in name)


def stand_in(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.gate_proj.__class__ = WithoutGradient


@pytest.mark.parametrize("change", [stand_in, dynamic_int8])
def test_layers_that_pass_no_gradient_to_their_input_are_named_though_they_are_no_targets(change: Any) -> None:
    base = llama()
    change(base)
    model = adapted(base, ["down_proj"])
    text = r"^1 layers pass no gradient to their input: .*layers.1.mlp.gate_proj \(.*Int8WeightOnlyConfig"
    with pytest.warns(UserWarning, match=text):
        lora_ga.initialize(model, causal(1))
    assert not any(module._forward_hooks for module in base.modules())
