"""Edge cases that once gave a wrong result without an error."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    OPTConfig,
    OPTForCausalLM,
    PerceiverConfig,
    PerceiverForMaskedLM,
    Trainer,
    TrainingArguments,
)

import lora_ga
from cases import described, llava, seeded, square
from lora_ga import LoraGAConfig
from lora_ga.adapter.save import FILE, FILE_KIND
from lora_ga.export.merge import merge_adapter
from lora_ga.files import read_tensors, write_tensors
from lora_ga.gradients import probe
from lora_ga.layers.factors import Factor
from lora_ga.linalg.streaming import Streaming
from lora_ga.linalg.tensor_cores import float32_products
from tf32 import Tf32
from toys import (
    FAMILIES,
    adapted,
    bert,
    causal,
    checkpoint_activations,
    classified,
    gpt2,
    injected,
    llama,
    logits,
    reactive_llama,
    t5,
    tokens,
    train,
    translated,
)

BASE = LoraGAConfig(offset="base")
BATCH = causal(1)[0]


def cosine(a: lora_ga.LowRank, b: lora_ga.LowRank) -> float:
    left, right = ((part.U * part.S) @ part.V.mT for part in (a, b))
    return ((left * right).sum() / (left.norm() * right.norm())).item()


# --- a base changed by offset="base" --------------------------------------------------------------------------------


def test_the_change_of_the_base_is_not_rounded_where_tf32_is_allowed() -> None:
    models = [adapted(llama()), adapted(llama())]
    estimate = lora_ga.estimate_gradients(models[0], causal(), BASE)
    lora_ga.apply_estimate(models[0], estimate, BASE)
    with float32_products("tf32"), Tf32() as mode:
        lora_ga.apply_estimate(models[1], estimate, BASE)
    assert mode.rounded == 0
    expected, found = (model.state_dict() for model in models)
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_the_probe_is_not_decomposed_in_tf32_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded, plain = [], probe._low_rank

    def watched(*args: Any) -> lora_ga.LowRank:
        with Tf32() as mode:
            found = plain(*args)
        rounded.append(mode.rounded)
        return found

    monkeypatch.setattr(probe, "_low_rank", watched)
    with float32_products("tf32"):
        lora_ga.estimate_gradients(adapted(llama()), causal(), LoraGAConfig(estimator="probe"))
    assert rounded
    assert set(rounded) == {0}


def test_a_changed_base_is_refused_for_a_new_start_even_after_its_adapter_is_deleted() -> None:
    model = adapted(llama())
    lora_ga.initialize(model, causal(), BASE)
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(
        ValueError, match='offset="base" has changed its base weight for another adapter; load the base model again'
    ):
        lora_ga.initialize(model, causal())
    base = model.unload()
    with pytest.raises(ValueError, match='offset="base" has changed'):
        lora_ga.initialize(adapted(base), causal())


def test_the_base_offset_is_refused_if_a_layer_has_another_adapter() -> None:
    model = adapted(llama())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"would change the weight under the other adapters of the layer \(default\)"):
        lora_ga.initialize(model, causal(), BASE, adapter_name="second")
    assert torch.equal(logits(model, BATCH), logits(llama(), BATCH))


def test_other_adapters_on_a_changed_base_are_not_saved(tmp_path: Path) -> None:
    model = adapted(llama())
    lora_ga.initialize(model, causal(), BASE)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"adapters of the layer \(second\) would be saved or loaded for a base model"):
        model.save_pretrained(tmp_path, selected_adapters=["second"])
    model.delete_adapter("second")
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(stock, BATCH), logits(model, BATCH), rtol=0, atol=1e-5)


def test_a_checkpoint_of_another_start_is_refused_on_a_changed_base(tmp_path: Path) -> None:
    first = adapted(llama())
    lora_ga.initialize(first, causal(3)[2:], BASE)
    train(first, causal())
    first.save_pretrained(tmp_path)
    other = adapted(llama())
    lora_ga.initialize(other, causal(1), BASE)
    before = logits(other, BATCH)
    with pytest.raises(RuntimeError, match="the adapter in the file has another start than this one"):
        other.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(other, BATCH), before)


def test_a_checkpoint_of_another_start_loads_with_the_adapter_offset(tmp_path: Path) -> None:
    first, other = adapted(llama()), adapted(llama())
    lora_ga.initialize(first, causal(3)[2:])
    train(first, causal())
    first.save_pretrained(tmp_path)
    lora_ga.initialize(other, causal(1))
    other.load_adapter(tmp_path, "default", is_trainable=True)
    torch.testing.assert_close(logits(other.eval(), BATCH), logits(first.eval(), BATCH), rtol=0, atol=1e-5)


# --- rank and alpha patterns in saved files --------------------------------------------------------------------------


@pytest.mark.parametrize("offset", ["adapter", "base"])
@pytest.mark.parametrize("lora", [{"alpha_pattern": {"k": 32}}, {"rank_pattern": {"k": 2}}, {"use_rslora": False}])
def test_plain_layers_keep_their_rank_and_scaling_with_any_patterns(
    tmp_path: Path, lora: dict[str, Any], offset: str
) -> None:
    def encoder_only(model: nn.Module, batch: Any) -> Tensor:
        return model.get_encoder()(batch["input_ids"]).last_hidden_state.square().mean()  # type: ignore[operator]

    model = adapted(t5(), **lora)
    config = LoraGAConfig(on_missing="lora", offset=offset)
    with pytest.warns(UserWarning, match="start as plain LoRA"):
        lora_ga.initialize(model, translated(), config, loss_fn=encoder_only)
    train(model, translated())
    model.save_pretrained(tmp_path)
    for trainable in (False, True):
        again = lora_ga.load(t5(), tmp_path, is_trainable=trainable).eval()
        torch.testing.assert_close(
            logits(again, translated(1)[0]), logits(model.eval(), translated(1)[0]), rtol=0, atol=1e-5
        )


class Nested(nn.Module):
    """A model in which the name of one layer is the last part of the name of another."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.block = nn.Linear(12, 12), nn.Sequential()
        self.block.add_module("lin", nn.Linear(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + 0 * self.lin(x).detach()


def test_the_pattern_of_a_plain_layer_does_not_match_a_longer_name_that_ends_alike(tmp_path: Path) -> None:
    base = Nested()
    model = adapted(copy.deepcopy(base), ["lin"])
    x = torch.randn(30, 12)
    with pytest.warns(UserWarning, match="1 of 2 layers cannot be aligned"):
        lora_ga.initialize(
            model, [x], LoraGAConfig(on_missing="lora"), loss_fn=lambda m, batch: m(batch).square().mean()
        )
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), model(x))


# --- the estimate ----------------------------------------------------------------------------------------------------


def test_functional_dropout_does_not_change_an_estimate_with_gradient_checkpointing() -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, dropout=0.3,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    base = OPTForCausalLM(config)
    targets = ["q_proj", "v_proj", "fc1", "fc2"]
    plain = lora_ga.estimate_gradients(adapted(copy.deepcopy(base), targets), causal())
    checkpoint_activations(base)
    model = adapted(base, targets).train()
    checkpointed = lora_ga.estimate_gradients(model, causal())
    assert "forward" not in base.model.decoder.layers[0].__dict__
    for name in plain:
        torch.testing.assert_close(checkpointed[name].S, plain[name].S)


def test_batches_whose_labels_have_other_names_are_weighted_by_their_rows() -> None:
    torch.manual_seed(0)
    base = BertForQuestionAnswering(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    ).eval()
    ids = tokens(18, 10)
    whole = {"input_ids": ids, "start_positions": ids[:, 0] % 10, "end_positions": ids[:, 1] % 10}
    parts = [{key: value[:16] for key, value in whole.items()}, {key: value[16:] for key, value in whole.items()}]
    config = LoraGAConfig(estimator="dense", oversample=64)
    model = adapted(base, ["query", "value", "dense"])
    at_once = lora_ga.estimate_gradients(model, [whole], config)
    in_parts = lora_ga.estimate_gradients(model, parts, config)
    assert min(cosine(at_once[name], in_parts[name]) for name in at_once) > 0.99999


@pytest.mark.parametrize("shrink", [1.0, 0.01])
def test_float16_gradients_do_not_vanish(shrink: float) -> None:
    config = LoraGAConfig(estimator="dense")
    batches = causal(2, rows=32, length=48)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return shrink * model(**batch).loss

    exact = lora_ga.estimate_gradients(adapted(llama()), batches, config, loss_fn=loss)
    half = lora_ga.estimate_gradients(adapted(llama().half()), batches, config, loss_fn=loss)
    assert min(cosine(exact[name], half[name]) for name in exact) > 0.999
    assert all(half[name].norm == pytest.approx(exact[name].norm, rel=0.01) for name in exact)


def test_sums_stay_in_float32_under_autocast() -> None:
    model = adapted(llama())
    with torch.autocast("cpu", torch.bfloat16):
        estimate = lora_ga.estimate_gradients(model, causal())
    for part in estimate.values():
        assert part.V.dtype == torch.float32
        torch.testing.assert_close(part.V.mT @ part.V, torch.eye(part.V.shape[1]), rtol=0, atol=1e-5)


def test_sums_are_not_computed_under_autocast_on_either_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under FSDP with parameters on the CPU a layer computes on CUDA, where it is the accelerator."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    seen: list[tuple[str, bool]] = []
    for name in ("add", "flush", "changes", "factors"):
        method = getattr(Streaming, name)

        def watched(*args: Any, name: str = name, method: Any = method) -> Any:
            kinds = ("cpu",) if name == "add" else ("cpu", "cuda")  # a hook knows where its gradient is
            seen.append((name, any(torch.is_autocast_enabled(kind) for kind in kinds)))
            return method(*args)

        monkeypatch.setattr(Streaming, name, watched)
    with torch.autocast("cpu", torch.bfloat16), as_if_autocast_to_cuda():
        lora_ga.estimate_gradients(adapted(llama()), causal(), LoraGAConfig(tolerance=0.01))
        assert torch.is_autocast_enabled("cuda")
    assert {name for name, _ in seen} == {"add", "flush", "changes", "factors"}
    assert not any(autocast for _, autocast in seen)


@contextlib.contextmanager
def as_if_autocast_to_cuda() -> Iterator[None]:
    """Autocast on CUDA, also where there is none: `torch.autocast` would warn and leave it off."""
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def steep(model: nn.Module, batch: Any) -> Tensor:
    """A loss that high learning rates raise even on a toy."""
    return model(**batch).loss ** 8


@pytest.mark.parametrize(
    "config",
    [
        LoraGAConfig(),
        LoraGAConfig(estimator="dense", direction="random"),
        LoraGAConfig(estimator="probe", direction="ArBr"),
        LoraGAConfig(scale="weight", direction="A2rBr", tolerance=0.01),
    ],
    ids=["default", "dense", "probe", "weight"],
)
def test_a_default_device_is_not_used_for_what_belongs_elsewhere(config: LoraGAConfig, tmp_path: Path) -> None:
    """Random numbers come from a generator on the CPU; indices and sums belong to the device of a layer."""
    models, batches, rates = [adapted(reactive_llama()) for _ in range(2)], causal(8), []
    for model, device in zip(models, ("cpu", "meta"), strict=True):
        checkpoint = tmp_path / f"{device}.checkpoint" if config.estimator == "streaming" else None
        torch.manual_seed(0)
        with torch.device(device):
            estimate = lora_ga.estimate_gradients(model, batches, config, checkpoint=checkpoint)
            estimate.save(tmp_path / device)
            lora_ga.apply_estimate(model, lora_ga.GradientEstimate.load(tmp_path / device), config)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the rate of a toy is a guess
                rates.append(lora_ga.find_rate(model, batches, steps=200, loss_fn=steep))
    assert rates[0] == rates[1]
    expected, found = (model.state_dict() for model in models)
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_a_gradient_with_too_few_directions_gives_a_warning() -> None:
    with pytest.warns(
        UserWarning, match=r"(?s)Fewer gradient directions than the start uses, in .*pooler\.dense: [12] directions?, r"
    ):
        lora_ga.estimate_gradients(adapted(bert(), FAMILIES["bert"][2]), classified(1, rows=2))


def test_below_a_head_of_two_classes_more_batches_may_have_no_more_directions_and_the_warning_says_so() -> None:
    base = bert(num_labels=2)
    base.bert.pooler.dense.weight.data.mul_(1e-4)  # tanh is linear: each row of g is a multiple of one vector
    model = adapted(base, ["pooler.dense"])
    # Rounding may count as a second direction; that depends on the CPU.
    found = r"in 1 of 1 layers:\n  .*pooler\.dense: (1 direction|2 directions), rank 4 uses 8\n"
    message = found + ".*Just below a head with few classes"
    for count in (1, 8):
        batches = [{**batch, "labels": batch["labels"] % 2} for batch in classified(count)]
        with pytest.warns(UserWarning, match=message):
            lora_ga.estimate_gradients(model, batches)


def test_many_gradients_with_too_few_directions_are_counted_and_not_listed() -> None:
    with pytest.warns(UserWarning, match=r"in 14 of 14 layers:\n  .*\n  .*\n  .*\n  and 11 more\nThe other"):
        lora_ga.estimate_gradients(adapted(llama()), causal(1, rows=1, length=3), LoraGAConfig(estimator="dense"))


def test_a_model_made_under_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = adapted(llama())
    with pytest.raises(
        ValueError, match=r"embed_tokens\.weight was made under torch\.inference_mode.* load the model out"
    ):
        lora_ga.estimate_gradients(model, causal())


def test_an_adapter_made_for_inference_is_initialised_with_a_warning_that_nothing_trains() -> None:
    model = adapted(llama(), inference_mode=True)
    with pytest.warns(
        UserWarning, match=r"Adapter 'default' was made for inference .* Call model\.set_adapter\('default'"
    ):
        lora_ga.initialize(model, causal())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_adapter("default")
    assert all(factor.trainable.requires_grad for factor in model.modules() if isinstance(factor, Factor))


def switch_off(model: Any) -> None:
    model.disable_adapter_layers()


def freeze(model: PeftModel) -> None:
    model.requires_grad_(False)


def replace(model: PeftModel) -> None:
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=4))


def add_another(model: PeftModel) -> None:
    model.add_adapter("other", LoraConfig(r=2))
    model.set_adapter("other")


SWITCH_ON = r"Call model\.enable_adapter_layers\(\), then model\.set_adapter\('default'\) before"
SET = r"Call model\.set_adapter\('default'\) before the optimizer"


@pytest.mark.parametrize(
    ("stop", "found", "advice"),
    [
        (switch_off, "switched off", SWITCH_ON),
        (freeze, r"is frozen \(no A or B has requires_grad\)", SET),
        (replace, r"not active \(active: none\)", SET),
        (add_another, r"not active \(active: other\)", SET),
    ],
)
def test_an_adapter_that_does_not_train_is_initialised_with_a_warning_whose_advice_works(
    stop: Callable[[Any], None], found: str, advice: str
) -> None:
    model = adapted(llama())
    stop(model)
    with pytest.warns(UserWarning, match=f"Adapter 'default' .*{found}.* none of its A and B trains. {advice}"):
        lora_ga.initialize(model, causal())
    if stop is switch_off:
        model.enable_adapter_layers()
    model.set_adapter("default")
    before = logits(model, BATCH)
    train(model, causal(), steps=1)
    assert not torch.equal(logits(model.eval(), BATCH), before)


@pytest.mark.parametrize("stop", ["switch off", "freeze"])
def test_an_injected_adapter_that_does_not_train_gets_the_same_warning(stop: str) -> None:
    model = injected(llama())
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if stop == "freeze":
        model.requires_grad_(False)
    else:
        for layer in layers:
            layer.enable_adapters(False)
    advice = "" if stop == "freeze" else r"enable_adapters\(True\), then "
    with pytest.warns(UserWarning, match=rf"Call {advice}set_adapter\('default'\) of each of its LoRA layers before"):
        lora_ga.initialize(model, causal())
    for layer in layers:
        layer.enable_adapters(True)
        layer.set_adapter("default")
    before = logits(model, BATCH)
    train(model, causal(), steps=1)
    assert not torch.equal(logits(model.eval(), BATCH), before)


def test_an_adapter_that_is_switched_off_is_estimated_like_one_that_is_on() -> None:
    on, off = adapted(llama()), adapted(llama())
    off.disable_adapter_layers()
    first, second = (lora_ga.estimate_gradients(model, causal()) for model in (on, off))
    assert all(torch.equal(first[name].S, second[name].S) for name in first)


def test_an_adapter_that_trains_gets_no_warning() -> None:
    model = adapted(llama(), inference_mode=True)
    model.set_adapter("default")
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        lora_ga.initialize(model, causal())
    assert not [each for each in given if "trains" in str(each.message)]


def test_an_estimate_works_under_no_grad_and_is_refused_under_inference_mode() -> None:
    model = adapted(llama())
    with torch.no_grad():
        assert len(lora_ga.estimate_gradients(model, causal())) == 14
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode.. is on, in which there are no grad"):
        lora_ga.estimate_gradients(model, causal())


def test_an_error_in_loss_fn_is_raised_unchanged() -> None:
    def broken(model: nn.Module, batch: Any) -> Tensor:
        raise ValueError("too many values to unpack")

    with pytest.raises(ValueError, match="too many values to unpack") as caught:
        lora_ga.estimate_gradients(adapted(llama()), causal(), loss_fn=broken)
    assert str(caught.value) == "too many values to unpack"  # the note with the batch is apart


def test_an_estimate_with_a_wrong_shape_is_refused_and_changes_nothing() -> None:
    model = adapted(llama())
    estimate = lora_ga.estimate_gradients(model, causal())
    layers = dict(estimate)
    name = "model.layers.1.mlp.down_proj"
    part = layers[name]
    layers[name] = lora_ga.LowRank(part.U[:5], part.S, part.V, part.norm)
    wrong = lora_ga.GradientEstimate(layers, estimate.config, estimate.fingerprint, 1.0, 1)
    with pytest.raises(ValueError, match="down_proj: the estimate is of a 5 x 48 weight, the layer's is 32 x 48"):
        lora_ga.initialize(model, wrong)
    assert not any(isinstance(module, Factor) for module in model.modules())


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a trained adapter with its sidecar."""
    model = adapted(llama())
    lora_ga.initialize(model, causal())
    train(model, causal())
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_sidecar_older_than_plain_training_is_refused(saved: Path) -> None:
    stock = PeftModel.from_pretrained(llama(), saved, is_trainable=True)
    train(stock, causal(), steps=3, lr=1e-4)
    stock.save_pretrained(saved)
    with pytest.raises(ValueError, match="has another start. It may be from before the adapter was trained as plain"):
        lora_ga.load(llama(), saved, is_trainable=True)
    torch.testing.assert_close(logits(lora_ga.load(llama(), saved), BATCH), logits(stock.eval(), BATCH))


def test_a_sidecar_that_lacks_a_tensor_is_refused(saved: Path) -> None:
    tensors, record = read_tensors(saved / FILE, FILE_KIND)
    tensors.pop("model.layers.0.mlp.up_proj.B0")
    write_tensors(saved / FILE, FILE_KIND, tensors, record)
    with pytest.raises(ValueError, match="damaged, it holds no model.layers.0.mlp.up_proj.B0"):
        lora_ga.load(llama(), saved)


def test_no_sidecar_is_written_for_an_adapter_of_another_model(saved: Path, tmp_path: Path) -> None:
    """PEFT accepts the configuration of an aligned adapter for a new adapter of another model."""
    model = lora_ga.load(llama(), saved, is_trainable=True)
    other = get_peft_model(llama(), model.peft_config["default"])
    with pytest.warns(UserWarning, match=r"no lora_ga\.safetensors was written, because the adapter"):
        other.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()


def test_an_adapter_whose_values_are_not_finite_is_saved_as_it_is(tmp_path: Path) -> None:
    model = adapted(llama())
    lora_ga.initialize(model, causal())
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        parameter.data.fill_(math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
    assert (tmp_path / FILE).exists()


def test_an_adapter_added_with_an_aligned_configuration_is_aligned_and_has_its_own_sidecar(
    saved: Path, tmp_path: Path
) -> None:
    model = lora_ga.load(llama(), saved, is_trainable=True)
    trained = logits(model, BATCH)
    model.add_adapter("twin", model.peft_config["default"])
    model.set_adapter("twin")
    assert torch.equal(logits(model, BATCH), logits(llama(), BATCH))
    train(model, causal())
    twin = logits(model.eval(), BATCH)
    model.set_adapter("default")
    assert torch.equal(logits(model, BATCH), trained)
    model.save_pretrained(tmp_path)
    for folder, expected in ((tmp_path, trained), (tmp_path / "twin", twin)):
        assert (folder / FILE).exists()
        again = lora_ga.load(llama(), folder, is_trainable=True).eval()
        torch.testing.assert_close(logits(again, BATCH), expected, rtol=0, atol=1e-6)


def test_trained_tokens_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    model = adapted(llama(), trainable_token_indices=[1, 2])
    lora_ga.initialize(model, causal())
    train(model, causal())
    model.save_pretrained(tmp_path)
    again = lora_ga.load(llama(), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(logits(again, BATCH), logits(model.eval(), BATCH), rtol=0, atol=1e-5)


def test_lora_layers_without_a_configuration_are_refused(saved: Path) -> None:
    model = adapted(llama()).get_base_model()
    del model.peft_config
    with pytest.raises(TypeError, match="The base has LoRA layers, but no peft_config. Give the original base model"):
        lora_ga.load(model, saved)


def test_the_optimizer_state_of_an_aligned_adapter_is_refused_for_plain_lora(saved: Path, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=4, save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True
    )
    data = [{key: value[0] for key, value in batch.items()} for batch in causal(8)]
    Trainer(lora_ga.load(llama(), saved, is_trainable=True), arguments, train_dataset=data).train()
    (saved / FILE).unlink()
    with pytest.warns(UserWarning, match="trains on as plain LoRA"):
        plain = lora_ga.load(llama(), saved, is_trainable=True)
    with pytest.raises(ValueError, match=r"its parameter .*the state of a LoRA-GA run \(rank r\) does not fit"):
        Trainer(plain, arguments, train_dataset=data).train(str(tmp_path / "run" / "checkpoint-2"))


def test_merging_into_a_tied_head_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model = adapted(llama(tie_word_embeddings=True), ["lm_head", "q_proj"])
    lora_ga.initialize(model, causal())
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"lm_head: its weight is shared .*so merging would change all of them\. Untie them"
    ):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=llama(tie_word_embeddings=True))
    with pytest.raises(TypeError, match="The base is a Nested without save_pretrained"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=Nested())
    assert not (tmp_path / "merged").exists()


def test_a_failed_get_lora_ga_model_leaves_the_parameters_of_the_base_trainable() -> None:
    base = gpt2()
    with pytest.raises(ValueError, match="holds no batch"):
        lora_ga.get_lora_ga_model(base, LoraConfig(r=4, target_modules=["c_attn"]), [])
    assert all(parameter.requires_grad for parameter in base.parameters())


# --- layers that the model does not use -----------------------------------------------------------------------------


def test_the_vision_block_that_llava_does_not_use_stays_plain_with_one_warning(tmp_path: Path) -> None:
    make, batches = seeded(llava), described(square)[:2]
    model = adapted(make(), ["q_proj", "v_proj"])
    before = logits(model, batches[0])
    with pytest.warns(UserWarning, match=r"the last blocks of model\.vision_tower\..*layers; their 2 layers") as caught:
        estimate = lora_ga.initialize(model, batches)
    assert sum("start as plain LoRA" in str(warning.message) for warning in caught) == 1
    assert torch.equal(logits(model, batches[0]), before)
    assert len(estimate) == 6  # two layers of one vision block and of two language blocks
    assert {name.partition(".layers.")[2] for name in estimate.missing} == {"1.self_attn.q_proj", "1.self_attn.v_proj"}
    train(model, batches)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(logits(stock, batches[0]), logits(model.eval(), batches[0]), rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match="their 2 layers start as plain LoRA"):
        lora_ga.apply_estimate(adapted(make(), ["q_proj", "v_proj"]), estimate)


def perceiver() -> PerceiverForMaskedLM:
    """A small Perceiver, whose input embeddings are a parameter."""
    torch.manual_seed(0)
    config = PerceiverConfig(
        vocab_size=64,
        d_model=32,
        d_latents=32,
        num_latents=8,
        num_self_attends_per_block=1,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
        qk_channels=32,
        v_channels=32,
        max_position_embeddings=12,
        attention_probs_dropout_prob=0.0,
    )
    return PerceiverForMaskedLM(config).eval()


def test_a_model_whose_input_embeddings_are_a_parameter_starts_trains_and_loads(tmp_path: Path) -> None:
    assert isinstance(perceiver().get_input_embeddings(), nn.Parameter)
    model = adapted(perceiver())
    expected = logits(perceiver(), causal()[0])
    lora_ga.initialize(model, causal())
    assert torch.equal(logits(model, causal()[0]), expected)
    losses = train(model, causal(1))
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    for loaded in (PeftModel.from_pretrained(perceiver(), tmp_path), lora_ga.load(perceiver(), tmp_path)):
        torch.testing.assert_close(logits(loaded.eval(), causal()[0]), logits(model, causal()[0]), rtol=0, atol=1e-5)


def test_a_vision_tower_that_runs_not_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"4 of 8 layers cannot be aligned:\n  model.vision_tower.*never ran in 2"):
        lora_ga.initialize(adapted(seeded(llava)(), ["q_proj", "v_proj"]), causal(2))
