"""The gradient of an estimate is that of the model in training mode, with its random noise switched off."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BeitConfig,
    BeitForImageClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.integrations.neftune import neftune_post_forward_hook

import lora_ga
from lora_ga import LoraGAConfig
from lora_ga.distributed.sharding import in_step
from lora_ga.gradients import batch
from lora_ga.gradients.noise import NoiseOff
from lora_ga.linalg.streaming import Streaming
from toys import (
    adapted,
    autograd_gradients,
    bert,
    causal,
    checkpoint_activations,
    classified,
    llama,
    t5,
    translated,
)
from trainers import TARGETS, callback, transformers_trainer

EXACT = LoraGAConfig(estimator="dense", oversample=256)
BATCH = {
    "x": torch.randn(12, 8, generator=(draw := torch.Generator().manual_seed(0))),
    "labels": torch.randint(0, 16, (12,), generator=draw),
}


class Net(nn.Module):
    """A linear layer, what is tested, and another linear layer."""

    def __init__(self, middle: nn.Module, shape: tuple[int, ...] = (32,)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.shape = nn.Linear(8, 32), nn.Linear(32, 16), shape
        torch.manual_seed(1)
        self.middle = middle

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss, under the key "loss"."""
        y = self.middle(self.first(x).view(len(x), *self.shape))
        y = y[0] if isinstance(y, tuple) else y
        return {"loss": functional.cross_entropy(self.last(y.reshape(len(x), -1)), labels)}


class Function(nn.Module):
    """Calls a function of the input and of whether it trains."""

    def __init__(self, function: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """The function."""
        return self.function(x, self.training)


def calling(function: Callable[[Tensor, float, bool], Tensor], *shape: int) -> Callable[[float], nn.Module]:
    """A network in which a module calls a function with a rate that nobody can find among its attributes."""
    return lambda rate: Net(Function(lambda x, training: function(x, rate, training)), shape or (32,))


def with_layer(kind: Callable[[float], nn.Module], *shape: int) -> Callable[[float], nn.Module]:
    """A network with a layer that takes its rate."""

    def make(rate: float) -> nn.Module:
        torch.manual_seed(1)
        return Net(kind(rate), shape or (32,))

    return make


class DropPath(nn.Module):
    """As that of timm."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Drops whole rows."""
        keep = 1 - self.drop_prob
        return x * x.new_empty(len(x), 1).bernoulli_(keep).div_(keep) if self.drop_prob and self.training else x


class OddlyNamedStochasticDepth(nn.Module):
    """Its rate has a name that means nothing."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Drops whole rows."""
        return x * (torch.rand(len(x), 1) >= self.share) / (1 - self.share) if self.training else x


class LayerDrop(nn.Module):
    """Leaves out layers, as fairseq does."""

    def __init__(self, layerdrop: float) -> None:
        super().__init__()
        self.layers, self.layerdrop = nn.ModuleList(nn.Linear(32, 32) for _ in range(3)), layerdrop

    def forward(self, x: Tensor) -> Tensor:
        """Every layer unless it is left out."""
        for layer in self.layers:
            if not self.training or torch.rand(()) >= self.layerdrop:
                x = x + layer(x).tanh()
        return x


class Attention(nn.Module):
    """Gives its rate to a function of torch."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Attention of the input to itself."""
        return functional.scaled_dot_product_attention(x, x, x, dropout_p=self.rate if self.training else 0.0)


class Recomputed(nn.Module):
    """Checkpoints its activations in training mode only, with functional dropout inside."""

    def __init__(self, rate: float, *, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.rate, self.reentrant = nn.Linear(32, 32), rate, reentrant

    def run(self, x: Tensor) -> Tensor:
        """The part that is recomputed."""
        return self.inner(functional.dropout(self.inner(x), self.rate, self.training).tanh())

    def forward(self, x: Tensor) -> Tensor:
        """Recomputed in the backward pass when it trains."""
        return checkpoint(self.run, x, use_reentrant=self.reentrant) if self.training else self.run(x)


class Experts(nn.Module):
    """Experts, which run under `torch.no_grad` when it does not train, as in some remote code."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """The input plus the experts' outputs."""
        with torch.set_grad_enabled(self.training):
            y = sum(expert(x).tanh() for expert in self.experts)
        return x + y


class FixedDropout(nn.Module):
    """Dropout whose rate is no attribute."""

    def forward(self, x: Tensor) -> Tensor:
        """The input, half of it 0."""
        return x * (torch.rand_like(x) > 0.5) if self.training else x


class Chosen(nn.Module):
    """The layer that an optional package has under a name."""

    def __new__(cls, path: str, *args: Any, **named: Any) -> Any:
        module, _, name = path.rpartition(".")
        return getattr(pytest.importorskip(module), name)(*args, **named)


def rrelu(rate: float) -> nn.Module:
    lower, upper = (0.1, 0.5) if rate else (0.3, 0.3)
    return nn.RReLU(lower, upper)


def neftune(rate: float) -> nn.Module:
    base: Any = llama()
    base.model.embed_tokens.neftune_noise_alpha = 10 * rate
    base.model.embed_tokens.register_forward_hook(neftune_post_forward_hook)
    return base


def own_neftune(rate: float) -> nn.Module:
    base: Any = llama()
    noisy = lambda m, _, y: y + torch.empty_like(y).uniform_(-rate, rate) if m.training else y  # noqa: E731
    base.model.embed_tokens.register_forward_hook(noisy)
    return base


def mixtral(rate: float) -> nn.Module:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(
        vocab_size=64, num_key_value_heads=2, num_local_experts=2, router_jitter_noise=rate, attention_dropout=rate,
        **sizes,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def switch(rate: float) -> nn.Module:
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=64,
        router_jitter_noise=rate, dropout_rate=rate, decoder_start_token_id=0,
    )  # fmt: skip
    return SwitchTransformersForConditionalGeneration(config)


def wav2vec2(rate: float) -> nn.Module:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        conv_dim=(8, 8), conv_kernel=(3, 3), conv_stride=(2, 2), num_feat_extract_layers=2, layerdrop=rate,
        mask_time_prob=rate, mask_time_length=2, mask_feature_prob=rate, mask_feature_length=2, hidden_dropout=rate,
        attention_dropout=rate, activation_dropout=rate, feat_proj_dropout=rate, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, classifier_proj_size=16, num_labels=3,
    )  # fmt: skip
    return Wav2Vec2ForSequenceClassification(config)


def whisper(rate: float) -> nn.Module:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=20,
        encoder_layerdrop=rate, decoder_layerdrop=rate, dropout=rate, attention_dropout=rate, activation_dropout=rate,
        apply_spec_augment=True, mask_time_prob=rate, mask_feature_prob=rate, mask_time_length=2,
        mask_feature_length=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def bart(rate: float) -> nn.Module:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
        encoder_layerdrop=rate, decoder_layerdrop=rate, dropout=rate, attention_dropout=rate, activation_dropout=rate,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def beit(rate: float) -> nn.Module:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BeitForImageClassification(
        BeitConfig(image_size=8, patch_size=4, drop_path_rate=rate, hidden_dropout_prob=rate, num_labels=3, **sizes)
    )


def deberta(rate: float) -> nn.Module:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return DebertaV2ForSequenceClassification(
        DebertaV2Config(
            vocab_size=64, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate, num_labels=3, **sizes
        )
    )


LABELS = torch.arange(4) % 3
WAVES = {"input_values": torch.randn(4, 200, generator=draw), "labels": LABELS}
SOUNDS = {"input_features": torch.randn(4, 8, 40, generator=draw), "labels": translated(1)[0]["labels"]}
IMAGES = {"pixel_values": torch.randn(4, 3, 8, 8, generator=draw), "labels": LABELS}
ATTENTION = ["q_proj", "v_proj", "o_proj"]

# Name → makes the model with a rate of noise, a batch, target modules.
ZOO: Mapping[str, tuple[Callable[[float], nn.Module], Any, Any]] = {
    **{
        name: (make, BATCH, ["first", "last"])
        for name, make in {
            "nn.Dropout": with_layer(nn.Dropout),
            "nn.Dropout1d": with_layer(nn.Dropout1d, 8, 4),
            "nn.Dropout2d": with_layer(nn.Dropout2d, 8, 2, 2),
            "nn.Dropout3d": with_layer(nn.Dropout3d, 4, 2, 2, 2),
            "nn.AlphaDropout": with_layer(nn.AlphaDropout),
            "nn.FeatureAlphaDropout": with_layer(nn.FeatureAlphaDropout, 8, 4),
            "DropPath": with_layer(DropPath),
            "DropPath of timm": with_layer(lambda rate: Chosen("timm.layers.DropPath", rate)),
            "DropBlock of timm": with_layer(lambda rate: Chosen("timm.layers.DropBlock2d", rate, 2), 2, 4, 4),
            "StochasticDepth of torchvision": with_layer(
                lambda rate: Chosen("torchvision.ops.StochasticDepth", rate, "row")
            ),
            "stochastic depth by the name of its class": with_layer(OddlyNamedStochasticDepth),
            "layerdrop": with_layer(LayerDrop),
            "F.dropout": calling(functional.dropout),
            "F.dropout2d": calling(functional.dropout2d, 8, 2, 2),
            "F.alpha_dropout": calling(functional.alpha_dropout),
            "F.feature_alpha_dropout": calling(functional.feature_alpha_dropout, 8, 4),
            "torch.dropout": calling(torch.dropout),
            "torch.dropout_": calling(lambda x, rate, training: torch.dropout_(x * 1, rate, training)),
            "F.scaled_dot_product_attention": with_layer(Attention, 1, 4, 8),
            "F.rrelu": calling(lambda x, rate, on: functional.rrelu(x, *((0.1, 0.5) if rate else (0.3, 0.3)), on)),
            "nn.RReLU": with_layer(rrelu),
            "nn.LSTM": with_layer(lambda rate: nn.LSTM(8, 8, 3, dropout=rate, batch_first=True), 4, 8),
            "nn.GRU": with_layer(lambda rate: nn.GRU(8, 8, 2, dropout=rate, batch_first=True), 4, 8),
            "nn.TransformerEncoderLayer": with_layer(
                lambda rate: nn.TransformerEncoderLayer(8, 2, 16, rate, batch_first=True), 4, 8
            ),
            "nn.BatchNorm1d": with_layer(lambda _: nn.BatchNorm1d(32)),
            "nn.BatchNorm2d": with_layer(lambda _: nn.BatchNorm2d(8, momentum=None), 8, 2, 2),
            "nn.SyncBatchNorm": with_layer(lambda _: nn.SyncBatchNorm(8), 8, 4),
            "nn.InstanceNorm1d": with_layer(lambda _: nn.InstanceNorm1d(4, track_running_stats=True), 4, 8),
            "checkpointed in training": with_layer(lambda rate: Recomputed(rate, reentrant=False)),
            # `torch.autograd.grad`, the reference, refuses a reentrant checkpoint.
            "checkpointed in training, reentrant": with_layer(lambda rate: Recomputed(rate, reentrant=rate > 0)),
            "no_grad in evaluation": with_layer(lambda _: Experts()),
        }.items()
    },
    "Llama, eager": (lambda p: llama(attention_dropout=p, attn_implementation="eager"), causal(1)[0], ATTENTION),
    "Llama, sdpa": (lambda p: llama(attention_dropout=p, attn_implementation="sdpa"), causal(1)[0], ATTENTION),
    "BERT": (
        lambda p: bert(hidden_dropout_prob=p, attention_probs_dropout_prob=p),
        classified(1)[0],
        ["query", "value", "dense"],
    ),
    "NEFTune": (neftune, causal(1)[0], ATTENTION),
    "NEFTune of another library": (own_neftune, causal(1)[0], ATTENTION),
    "Mixtral": (mixtral, causal(1)[0], ATTENTION),
    "SwitchTransformers": (switch, translated(1)[0], ["q", "v", "o"]),
    "Wav2Vec2": (wav2vec2, WAVES, ATTENTION[:2]),
    "Whisper": (whisper, SOUNDS, ATTENTION[:2]),
    "BART": (bart, translated(1)[0], ["q_proj", "v_proj", "fc1"]),
    "BEiT": (beit, IMAGES, ATTENTION[:2]),
    "DeBERTa": (deberta, classified(1)[0], ["query_proj", "value_proj"]),
}


@pytest.mark.parametrize("name", ZOO)
def test_the_gradient_is_that_of_training_without_noise(name: str) -> None:
    make, batch, targets = ZOO[name]
    quiet, noisy = make(0.0).train(), make(0.4)
    if not isinstance(noisy, Net):  # so that the branches are as large as the residual stream
        for weight in (p for p in noisy.parameters() if p.dim() > 1):
            weight.data.mul_(8)
    quiet.load_state_dict(noisy.state_dict(), strict=False)  # Wav2Vec2 with SpecAugment has one parameter more
    true = autograd_gradients(quiet, lambda model: model(**batch)["loss"])
    model = adapted(noisy, targets, lora_dropout=0.4)
    before = everything(model)
    found = lora_ga.estimate_gradients(model, [batch], EXACT)
    assert everything(model) == before
    assert found
    for layer, part in found.items():
        g, product = true[layer], (part.U * part.S) @ part.V.mT
        assert (product * g).sum() / (product.norm() * g.norm()) > 0.9999, layer
        assert part.norm == pytest.approx(g.norm().item(), rel=1e-3)


def everything(model: nn.Module) -> list[Any]:
    """What an estimate must leave as it was: modes, rates, hooks, buffers, random states."""
    found: list[Any] = [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]
    for module in model.modules():
        for holder in (module, getattr(module, "config", module)):
            found.append({name: value for name, value in vars(holder).items() if isinstance(value, float)})
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]  # Transformers leaves some
        found += [module.training, [hook for hook in hooks if "lora_ga" in str(getattr(hook, "__module__", ""))]]
    return [*found, {name: value.tolist() for name, value in model.named_buffers()}]


@pytest.mark.parametrize("failing", [False, True])
def test_everything_is_as_it_was_whatever_the_loss_does(failing: bool) -> None:
    model = adapted(mixtral(0.4).eval(), ATTENTION, lora_dropout=0.4)
    outside = nn.Sequential(nn.Dropout(0.3), nn.BatchNorm1d(64), DropPath(0.2).eval(), DropPath(0.5), FixedDropout())
    before, used = everything(model) + everything(outside), []

    def loss(model: Any, batch: Any) -> Tensor:
        model.train()  # as some losses do
        outside[-1].train()
        logits = model(**batch).logits[:, -1]
        used.append(outside(logits))
        if failing:
            raise KeyError("broken")
        return used[-1].square().mean()

    def run() -> None:
        lora_ga.estimate_gradients(model, causal(1) * 2, EXACT, loss_fn=loss)

    if failing:
        with pytest.raises(KeyError, match="broken"):
            run()
    else:
        run()
        assert torch.equal(used[0], used[1])
    assert everything(model) + everything(outside) == before


# --- random numbers that stay -----------------------------------------------------------------------------------------

DRAWING: Mapping[str, tuple[Callable[[Tensor, bool], Tensor], str]] = {
    "stochastic depth by hand": (
        lambda x, on: x * (torch.rand(len(x), 1) > 0.2) / 0.8 if on else x,
        r"Function \(rand\)",
    ),
    "a skipped layer": (lambda x, on: x * (random.random() > -1) if on else x, r"Net \(numpy or random\)"),
    "numpy": (lambda x, on: x * (np.random.rand() > -1) if on else x, r"Net \(numpy or random\)"),
    "bernoulli": (lambda x, on: x * torch.bernoulli(torch.full_like(x, 0.8)) if on else x, r"Function \(bernoulli\)"),
    "gumbel_softmax": (
        lambda x, on: functional.gumbel_softmax(x) if on else x.softmax(-1),
        r"Function \(gumbel_softmax\)",
    ),
}


@pytest.mark.parametrize("name", DRAWING)
def test_random_numbers_of_another_kind_are_named(name: str) -> None:
    function, named = DRAWING[name]
    model = adapted(Net(Function(function)), ["first"])
    before = everything(model)
    with pytest.warns(UserWarning, match=rf"Random numbers were drawn .*, by {named}\. .*training_mode=False"):
        lora_ga.estimate_gradients(model, [BATCH])
    lora_ga.estimate_gradients(model, [BATCH], LoraGAConfig(training_mode=False))  # pytest makes a warning an error
    assert everything(model) == before


def test_random_numbers_of_the_loss_and_of_a_teacher_are_not_reported() -> None:
    model = adapted(Net(nn.Identity()), ["first"])
    teacher = nn.Sequential(Function(lambda x, _: x * torch.rand(()))).eval()

    def loss(model: Any, batch: Any) -> Tensor:
        return model(**batch)["loss"] + torch.randn(()) + teacher(batch["x"]).sum() * np.random.rand()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lora_ga.estimate_gradients(model, [BATCH], loss_fn=loss)
    assert not [each for each in caught if "Random numbers were drawn" in str(each.message)]


# --- the mode that switches noise off, where there is none ------------------------------------------------------------


class FromTheSecondBatch(nn.Module):
    """Calls a function of its input from its second call on."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.calls = function, 0

    def forward(self, x: Tensor) -> Tensor:
        """The function, or x itself."""
        self.calls += 1
        return self.function(x) if self.calls > 1 else x


def attention(x: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(x, x, x)


QUIET: Mapping[str, Callable[[], tuple[nn.Module, list[Any], list[str]]]] = {
    "Llama": lambda: (llama(), causal(3), ATTENTION),
    "Llama, activations checkpointed": lambda: (checkpointed(reentrant=False), causal(3), ATTENTION),
    "Llama, activations checkpointed reentrantly": lambda: (checkpointed(reentrant=True), causal(3), ATTENTION),
    "BERT with dropout modules": lambda: (bert(), classified(3), ["query", "value"]),
    "T5 with dropout modules": lambda: (t5(), translated(3), ["q", "v"]),
    "attention without a rate": lambda: (Net(Function(lambda x, _: attention(x)), (2, 16)), [BATCH] * 3, ["first"]),
}


def checkpointed(*, reentrant: bool) -> nn.Module:
    base = llama()
    checkpoint_activations(base, use_reentrant=reentrant)
    return base


@pytest.fixture
def needed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the mode was needed when it was entered: for the forward and the backward pass of each batch."""
    found, enter = [], NoiseOff.__enter__

    def entered(self: NoiseOff) -> NoiseOff:
        found.append(self.needed)
        return enter(self)

    monkeypatch.setattr(NoiseOff, "__enter__", entered)
    return found


@pytest.mark.parametrize("name", QUIET)
def test_the_mode_is_left_out_after_a_batch_in_which_it_had_nothing_to_do(name: str, needed: list[bool]) -> None:
    base, batches, targets = QUIET[name]()
    lora_ga.estimate_gradients(adapted(base, targets), batches)
    assert needed == [True, True, False, False, False, False]


OWN = torch.Generator()


def noisy_in_the_backward_pass(x: Tensor, noise: Callable[[Tensor], Tensor]) -> Tensor:
    y = x.clone()
    if y.requires_grad:
        y.register_hook(noise)
    return y


BUSY: Mapping[str, Callable[[Tensor, bool], Tensor]] = {
    "noise that is switched off": lambda x, on: functional.dropout(x, 0.5, on),
    "noise at its default rate": lambda x, on: functional.dropout(x, training=on),
    "noise in the backward pass": lambda x, on: noisy_in_the_backward_pass(x, lambda g: functional.dropout(g, 0.5)),
    "random numbers": lambda x, on: x * torch.rand(()).clamp(1, 1),
    "random numbers of a generator of its own": lambda x, on: x * torch.rand((), generator=OWN).clamp(1, 1),
    "a function that the mode does not know": lambda x, on: x * torch.ones(()).bernoulli(),
    "the same in the backward pass": lambda x, on: noisy_in_the_backward_pass(
        x, lambda g: g * torch.ones(()).bernoulli()
    ),
}


@pytest.mark.parametrize("name", BUSY)
@pytest.mark.filterwarnings("ignore:Random numbers were drawn")
def test_the_mode_stays_where_random_numbers_were_met(name: str, needed: list[bool]) -> None:
    lora_ga.estimate_gradients(adapted(Net(Function(BUSY[name])), ["first"]), [BATCH] * 3)
    assert needed == [True] * 6


def test_the_mode_stays_with_a_loss_of_the_caller_which_may_have_a_state(needed: list[bool]) -> None:
    lora_ga.estimate_gradients(adapted(llama(), ATTENTION), causal(2), loss_fn=lambda model, batch: model(**batch).loss)
    assert needed == [True] * 4


def test_the_mode_stays_where_other_processes_may_wait_for_a_pass(
    needed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "in_group", lambda: True)
    lora_ga.estimate_gradients(adapted(llama(), ATTENTION), causal(2))
    assert needed == [True] * 4


LATE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "noise": lambda x: functional.dropout(x, 0.5),
    "noise, and numbers of random": lambda x: functional.dropout(x, 0.5) * random.random(),
    "noise, and numbers of numpy": lambda x: functional.dropout(x, 0.5) * np.random.rand(),
    "random numbers that stay": lambda x: x * torch.rand(len(x), 1),
    "a function that the mode does not know": lambda x: x * torch.full((len(x), 1), 0.5).bernoulli(),
}


@pytest.mark.parametrize("name", LATE)
@pytest.mark.filterwarnings("ignore:Random numbers were drawn")
def test_a_batch_that_needs_the_mode_after_all_runs_again(
    name: str, needed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is that of an estimate in which the mode is always on."""

    def found() -> tuple[Tensor, int]:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        needed.clear()
        model = adapted(Net(middle := FromTheSecondBatch(LATE[name])), ["first"])
        part = lora_ga.estimate_gradients(model, [BATCH] * 4, EXACT)["first"]
        return (part.U * part.S) @ part.V.mT, middle.calls

    again, calls = found()
    assert (needed, calls) == ([True, True, False, True, True, True, True, True, True], 5)
    monkeypatch.setattr(batch, "in_group", lambda: True)
    once, calls = found()
    assert (needed, calls) == ([True] * 8, 4)
    assert torch.equal(again, once)


# --- modes ------------------------------------------------------------------------------------------------------------


class Frozen(Net):
    """Its `train` leaves the normalisation in evaluation mode."""

    def train(self, mode: bool = True) -> Frozen:
        """All but the normalisation."""
        super().train(mode)
        self.middle.eval()
        return self


def estimated(base: nn.Module, targets: Any = ("first",), **settings: Any) -> Tensor:
    config = LoraGAConfig(estimator="dense", oversample=256, **settings)
    part = lora_ga.estimate_gradients(adapted(base, list(targets)), [BATCH], config)["first"]
    return (part.U * part.S) @ part.V.mT


def gradient(base: nn.Module) -> Tensor:
    return autograd_gradients(base, lambda model: model(**BATCH)["loss"])["first"]


def norm() -> nn.Module:
    return nn.BatchNorm1d(32)


def test_a_base_in_evaluation_mode_is_put_in_training_mode_by_its_own_method() -> None:
    torch.testing.assert_close(estimated(Net(norm()).eval()), gradient(Net(norm()).train()))
    torch.testing.assert_close(estimated(Frozen(norm()).eval()), gradient(Net(norm()).eval()))


def test_in_a_base_in_training_mode_each_module_keeps_its_mode() -> None:
    partly = Net(norm()).train()
    partly.middle.eval()
    torch.testing.assert_close(estimated(partly), gradient(Net(norm()).eval()))


def test_evaluation_mode_is_used_where_it_is_asked_for() -> None:
    found = estimated(Net(nn.Sequential(norm(), nn.Dropout(0.5))).train(), training_mode=False)
    torch.testing.assert_close(found, gradient(Net(nn.Sequential(norm(), nn.Dropout(0.5))).eval()))


def test_a_part_without_gradient_in_evaluation_mode_is_named() -> None:
    message = r"No gradient passes through base_model\.model\.middle\.experts\.0, .*experts\.1: .*training_mode=True"
    with pytest.warns(UserWarning, match=message):
        found = estimated(Net(Experts()), training_mode=False)
    true = gradient(Net(Experts()))
    assert (found * true).sum() / (found.norm() * true.norm()) < 0.99  # what the warning is about


def test_of_many_parts_without_gradient_three_are_named() -> None:
    with pytest.warns(UserWarning, match=r"middle\.experts\.2 and 2 more: in evaluation mode"):
        estimated(Net(Experts(5)), training_mode=False)


def test_a_layer_without_gradient_in_evaluation_mode_is_refused() -> None:
    message = r"middle\.experts\.0: ran, but got no gradient \(does the loss use its output\? .*torch\.no_grad"
    with pytest.warns(UserWarning, match="No gradient passes"), pytest.raises(ValueError, match=message):
        estimated(Net(Experts()), ["first", "middle.experts.0"], training_mode=False)


class Detector(Net):
    """Computes its loss in training mode only."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss when it trains, otherwise predictions."""
        return super().forward(x, labels) if self.training else {"boxes": self.first(x)}


def test_a_loss_that_is_computed_in_training_mode_only_is_found() -> None:
    torch.testing.assert_close(estimated(Detector(norm()).eval()), gradient(Net(norm())))


def test_layers_checkpoint_their_activations_in_evaluation_mode_too() -> None:
    base: Any = llama()
    checkpoint_activations(base, use_reentrant=False)
    calls: list[int] = []
    base.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: calls.append(1))
    lora_ga.estimate_gradients(adapted(base, ATTENTION), causal(2), LoraGAConfig(training_mode=False))
    assert len(calls) == 2 * 2  # per batch: once in the forward pass, once in the backward pass


def test_the_accumulator_runs_outside_of_the_mode_that_switches_noise_off(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, add = [], Streaming.add

    def watched(*args: Any) -> None:
        seen.append(torch._C._is_torch_function_all_disabled())
        add(*args)

    monkeypatch.setattr(Streaming, "add", watched)
    lora_ga.estimate_gradients(adapted(llama(), ATTENTION), causal(1))
    assert seen
    assert all(seen)


def test_several_processes_pass_synchronised_norms_together(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Net(nn.SyncBatchNorm(32))
    assert not in_step(network)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert in_step(network)
    assert not in_step(Net(norm()))


def test_a_network_that_fsdp2_has_gathered_is_passed_together_too() -> None:
    network = Net(norm())
    network.first.__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})  # as `fully_shard` does it
    assert in_step(network)


def test_the_callback_estimates_without_the_noise_that_the_trainer_adds(tmp_path: Path) -> None:
    found = []
    for alpha in (None, 10.0):
        late, base = callback(), llama(attention_dropout=0.2 if alpha else 0.0)
        trainer = transformers_trainer(
            [late], tmp_path, model=adapted(base, TARGETS), neftune_noise_alpha=alpha, max_steps=1, save_strategy="no"
        )
        trainer.train()
        assert late.estimate is not None
        assert trainer.model.get_base_model().training
        found.append(late.estimate)
    for name, part in found[0].items():
        torch.testing.assert_close(found[1][name].U, part.U)
