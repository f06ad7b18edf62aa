"""A small model for every row of the support matrix (docs/support.md)."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CLIPConfig,
    CLIPModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import ImageClassifierOutput

from toys import FAMILIES, VOCABULARY, causal, classified, gpt2, llama, tokens

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
Batches = Callable[[], list[dict[str, Tensor]]]


def clip_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """CLIP's contrastive loss, computed outside the model."""
    scores = model(**batch).logits_per_text
    matching = torch.arange(len(scores))
    return (nn.functional.cross_entropy(scores, matching) + nn.functional.cross_entropy(scores.mT, matching)) / 2


def model_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**batch).logits


@dataclasses.dataclass(frozen=True)
class Case:
    """How to make a base model and its batches, and the settings of the adapter."""

    make: Callable[[], Any]
    batches: Batches = causal
    settings: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"target_modules": "all-linear"})
    loss_fn: Callable[..., Any] | None = None
    outputs: Callable[..., Tensor] = model_logits
    needs: str | None = None
    # The least cosine between estimated gradients and those of autograd in the model with dequantised weights. It is
    # lower if activations are rounded too (8 bit), because autograd then differentiates another function.
    cosine: float = 1 - 1e-6
    base_offset: bool = True
    reload_error: float = 1e-5

    @property
    def quantised(self) -> bool:
        """Whether the base is quantised: all optional packages are for this."""
        return self.needs is not None

    def check_installed(self) -> None:
        """Skip the test if an optional package is missing."""
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            pytest.skip(f"{self.needs} is not installed")


def wide_llama() -> Any:
    """A Llama whose weights have sides that are multiples of 64, the usual block size of quantisation."""
    return llama(hidden_size=64, intermediate_size=128)


def bitsandbytes(**settings: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        wide_llama().save_pretrained(folder)
        config = BitsAndBytesConfig(**settings)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()
    for module in model.modules():  # in evaluation mode some CPUs pack the layer, which then cannot be trained
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def quanto() -> Any:
    from optimum.quanto import freeze, qint8, quantize

    model = wide_llama()
    quantize(model, weights=qint8, exclude="lm_head")
    freeze(model)
    return model


def torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    with tempfile.TemporaryDirectory() as folder:
        wide_llama().save_pretrained(folder)
        config = TorchAoConfig(Int8WeightOnlyConfig())
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()


def hqq() -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model, config = wide_llama(), BaseQuantizeConfig(nbits=4, group_size=64)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            made = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            model.model.set_submodule(name, made)
    return model.requires_grad_(False)


def packed(module: str, name: str) -> Any:
    """A Llama whose linear layers are packed by gptqmodel: 4 bit, rounded to nearest, without calibration."""
    kind = getattr(importlib.import_module(f"gptqmodel.nn_modules.qlinear.{module}"), name)
    model = wide_llama()
    for path, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            outputs, inputs = linear.weight.shape
            made = kind(4, 32, True, False, inputs, outputs, False, register_buffers=True)
            scales = linear.weight.detach().unflatten(1, (-1, 32)).abs().amax(-1) / 7
            made.pack(linear, scales, torch.full_like(scales, 8), torch.arange(inputs) // 32)
            made.post_init()
            model.model.set_submodule(path, made.eval())
    return model.requires_grad_(False)


class Convolutions(nn.Module):
    """Convolutions with stride, of size 1 x 1, with groups, and with uneven padding; and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.point = nn.Conv2d(16, 16, 1)
        self.grouped = nn.Conv2d(16, 24, 3, groups=2, padding=1, bias=False)
        self.even = nn.Conv2d(24, 16, 2, padding="same")
        self.head = nn.Linear(16, 8)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> ImageClassifierOutput:
        x = self.wide(pixel_values).relu()
        x = self.grouped(self.point(x).relu()).relu()
        logits = self.head(self.even(x).relu().mean((2, 3)))
        return ImageClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


class Waves(nn.Module):
    """1-D convolutions with stride, of size 1, with groups, and with uneven padding; and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv1d(3, 16, 9, stride=2, padding=1)
        self.point = nn.Conv1d(16, 16, 1)
        self.grouped = nn.Conv1d(16, 24, 3, groups=2, padding=1, bias=False)
        self.even = nn.Conv1d(24, 16, 2, padding="same")
        self.head = nn.Linear(16, 8)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> ImageClassifierOutput:
        x = self.wide(pixel_values.flatten(2)).relu()
        x = self.grouped(self.point(x).relu()).relu()
        logits = self.head(self.even(x).relu().mean(2))
        return ImageClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


class Twisted(nn.Module):
    """A model that calls a layer twice in a pass and changes outputs in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.first, self.shared, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> ImageClassifierOutput:
        x = self.first(self.embed(input_ids))
        x.mul_(2.0).relu_()
        x = self.shared(x) + self.shared(x.cos())
        x += 1
        logits = self.head(x)
        return ImageClassifierOutput(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)


def seeded(make: Callable[[], nn.Module]) -> Callable[[], Any]:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return made


def pictures() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(12, 3, 16, 16, generator=draw), "labels": torch.arange(12) % 3} for _ in range(3)
    ]


def captions() -> list[dict[str, Tensor]]:
    return [
        {"pixel_values": batch["pixel_values"], "input_ids": tokens(12, 8, seed)}
        for seed, batch in enumerate(pictures())
    ]


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
PICTURE = {"image_size": 16, "patch_size": 4}
DECODER = SMALL | {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "max_position_embeddings": 64}


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**SMALL, **PICTURE, num_labels=8))


def clip() -> nn.Module:
    words = SMALL | {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": VOCABULARY - 1}
    return CLIPModel(CLIPConfig(text_config=words, vision_config=SMALL | PICTURE, projection_dim=16))


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2))


def qwen_moe() -> nn.Module:
    settings = DECODER | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, decoder_sparse_step=1, tie_word_embeddings=False))


IMAGE = 63  # the token that stands for a part of a picture


def whisper() -> nn.Module:
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=VOCABULARY,
            num_mel_bins=8,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=10,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )


def speech() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        {"input_features": torch.randn(4, 8, 20, generator=draw), "labels": tokens(4, 7, seed)} for seed in range(3)
    ]


def wav2vec2() -> nn.Module:
    """With the masks, the layer dropout and the dropout that its configuration has by default."""
    convolutions = {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(**SMALL, **convolutions, **positions, classifier_proj_size=16, num_labels=12)
    )


def waves() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [{"input_values": torch.randn(12, 200, generator=draw), "labels": torch.arange(12)} for _ in range(3)]


def qwen_vl() -> nn.Module:
    positions = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision: dict[str, Any] = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
    vision |= {"out_hidden_size": 32, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
    special = {"image_token_id": IMAGE, "video_token_id": 62, "vision_start_token_id": 61, "vision_end_token_id": 60}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=DECODER | {"rope_parameters": positions}, vision_config=vision, **special)
    )


def gemma() -> nn.Module:
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=DECODER | {"head_dim": 8, "sliding_window": 8},
            vision_config=SMALL | PICTURE | {"vision_use_head": False},
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            boi_token_index=62,
            eoi_token_index=61,
        )
    )
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # Transformers makes zeros
    return model


def llava() -> nn.Module:
    """A LLaVA of two vision blocks, of which it uses the first."""
    vision = SMALL | {"image_size": 16, "patch_size": 8, "projection_dim": 16, "model_type": "clip_vision_model"}
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=DECODER | {"model_type": "llama"}, image_token_index=IMAGE)
    )


def described(pictures_of: Callable[[torch.Generator], dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Batches of a picture, which four tokens stand for, and its description."""
    found = []
    for seed in range(3):
        ids = tokens(4, 12, seed).clamp(max=59)
        marks = torch.full((4, 4), IMAGE)
        labels = torch.cat([torch.full_like(marks, -100), ids], 1)
        pictures = pictures_of(torch.Generator().manual_seed(seed))
        found.append({"input_ids": torch.cat([marks, ids], 1), "labels": labels} | pictures)
    return found


def square(draw: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, 3, 16, 16, generator=draw)}


def patches(draw: torch.Generator) -> dict[str, Tensor]:
    """Pictures as Qwen2.5-VL takes them."""
    kinds = (torch.arange(16) < 4).long().expand(4, -1)
    grids = torch.tensor([[1, 4, 4]] * 4)
    return {"pixel_values": torch.randn(64, 96, generator=draw), "image_grid_thw": grids, "mm_token_type_ids": kinds}


def typed(draw: torch.Generator) -> dict[str, Tensor]:
    """Pictures as Gemma 3 takes them."""
    return square(draw) | {"token_type_ids": (torch.arange(16) < 4).long().expand(4, -1)}


EXPERTS = {
    "target_modules": ATTENTION,
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
nf4 = functools.partial(bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="nf4")
FOUR: dict[str, Any] = {"needs": "bitsandbytes", "base_offset": False}

# Row of the matrix → case. First the layer kinds.
LAYERS: Mapping[str, Case] = {
    "nn.Linear": Case(llama),
    "Conv1D (GPT-2)": Case(gpt2, settings={"target_modules": FAMILIES["gpt2"][2], "fan_in_fan_out": True}),
    "bitsandbytes nf4": Case(nf4, **FOUR),
    "bitsandbytes nf4, double quantisation": Case(
        functools.partial(nf4, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32), **FOUR
    ),
    "bitsandbytes fp4": Case(functools.partial(bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="fp4"), **FOUR),
    "bitsandbytes int8": Case(
        functools.partial(bitsandbytes, load_in_8bit=True), cosine=0.98, reload_error=1e-3, **FOUR
    ),
    "torchao int8, weights only": Case(torchao, needs="torchao", base_offset=False),
    "quanto int8": Case(
        quanto, needs="optimum.quanto" if importlib.util.find_spec("optimum") else "optimum", base_offset=False
    ),
    "HQQ 4 bit": Case(hqq, settings={"target_modules": ATTENTION}, needs="hqq", base_offset=False),
    "GPTQ 4 bit": Case(
        functools.partial(packed, "torch", "TorchLinear"),
        settings={"target_modules": ATTENTION},
        needs="gptqmodel",
        base_offset=False,
    ),
    "AWQ 4 bit": Case(
        functools.partial(packed, "torch_awq", "AwqTorchLinear"),
        settings={"target_modules": ATTENTION},
        needs="gptqmodel",
        base_offset=False,
    ),
    "nn.Embedding": Case(seeded(Twisted), settings={"target_modules": ["embed", "first"]}),
    "nn.Conv1d": Case(
        seeded(Waves), pictures, {"target_modules": ["wide", "point", "grouped", "even", "head"]}, base_offset=False
    ),
    "nn.Conv2d": Case(
        seeded(Convolutions),
        pictures,
        {"target_modules": ["wide", "point", "grouped", "even", "head"]},
        base_offset=False,
    ),
    "nn.Conv1d, one group": Case(seeded(Waves), pictures, {"target_modules": ["wide", "point", "even", "head"]}),
    "nn.Conv2d, one group": Case(seeded(Convolutions), pictures, {"target_modules": ["wide", "point", "even", "head"]}),
    "fused experts (Mixtral)": Case(seeded(mixtral), settings=EXPERTS),
    "fused experts (Qwen3-MoE)": Case(seeded(qwen_moe), settings=EXPERTS),
}
# The kinds of models.
MODELS: Mapping[str, Case] = {
    "Llama (decoder)": Case(llama),
    "T5 (encoder-decoder)": Case(FAMILIES["t5"][0], FAMILIES["t5"][1]),
    "BERT (encoder)": Case(FAMILIES["bert"][0], classified, {"target_modules": FAMILIES["bert"][2]}),
    "ViT (vision)": Case(seeded(vit), pictures),
    "CLIP (two towers, own loss)": Case(
        seeded(clip),
        captions,
        {"target_modules": ATTENTION[:3]},
        clip_loss,
        lambda model, batch: model(**batch).logits_per_text,
    ),
    "Whisper (speech to text)": Case(seeded(whisper), speech),
    "Wav2Vec2 (speech)": Case(seeded(wav2vec2), waves),
    "Qwen2.5-VL (vision and language)": Case(seeded(qwen_vl), functools.partial(described, patches)),
    "Gemma 3 (vision and language)": Case(seeded(gemma), functools.partial(described, typed)),
    "LLaVA (vision and language)": Case(
        seeded(llava),
        functools.partial(described, square),
        {"target_modules": r".*vision_tower.*\.0\..*_proj|.*up_proj"},
    ),
    "tied embeddings": Case(
        functools.partial(llama, tie_word_embeddings=True),
        settings={"target_modules": ["q_proj", "lm_head"]},
        base_offset=False,
    ),
    "a layer called twice, outputs changed in place": Case(
        seeded(Twisted), settings={"target_modules": ["first", "shared", "head"]}
    ),
}
# The settings of the adapter.
ADAPTERS: Mapping[str, Case] = {
    "rsLoRA off": Case(llama, settings={"target_modules": "all-linear", "use_rslora": False}),
    "DoRA": Case(llama, settings={"target_modules": "all-linear", "use_dora": True}),
    "DoRA on nf4": Case(nf4, settings={"target_modules": "all-linear", "use_dora": True}, **FOUR),
    "lora_bias": Case(FAMILIES["bert"][0], classified, {"target_modules": ["query", "dense"], "lora_bias": True}),
    "rank_pattern, alpha_pattern": Case(
        llama,
        settings={"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    ),
    "modules_to_save": Case(
        FAMILIES["bert"][0], classified, {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    ),
    "lora_dropout": Case(llama, settings={"target_modules": "all-linear", "lora_dropout": 0.1}),
}
CASES: Mapping[str, Mapping[str, Case]] = {"layers": LAYERS, "models": MODELS, "adapter settings": ADAPTERS}
