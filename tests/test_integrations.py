"""The code of docs/integrations.md runs and adds as many lines as the text states.

The loop of examples/accelerate_loop.py trains and resumes. Embedding models train in sentence-transformers, denoising
models in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import accelerate_loop
import lora_ga
from lora_ga.adapter.save import FILE
from lora_ga.integrations.diffusers import _packed, _places, _sizes, denoising
from toys import causal, injected, llama, logits, lora_settings, minilm_folder, tokens
from trainers import factors, peft_config, rows, settings, tokenised, tokenizer, trl_classes

PAGE = Path(__file__).parent.parent / "docs" / "integrations.md"
SECTIONS = dict(re.findall(r"(?m)^## (.*)\n((?:(?!^## )[^\n]*\n?)*)", PAGE.read_text()))
NUMBERS = {"One": 1, "Two": 2, "Three": 3}


def block(title: str) -> str:
    """Return the code block of a section."""
    (code,) = re.findall(r"```(?:python|yaml|bash)\n(.*?)```", SECTIONS[title], flags=re.DOTALL)
    return code


@pytest.mark.parametrize("title", [title for title in SECTIONS if title != "Tested versions"])
def test_a_framework_takes_at_most_three_lines_and_the_page_states_how_many(title: str) -> None:
    added = [line for line in block(title).splitlines() if line.endswith("# LoRA-GA")]
    assert len(added) <= 3
    stated = re.match(r"\s*(\w+) lines?\b", SECTIONS[title])
    assert stated is not None
    assert NUMBERS[stated[1]] == len(added)


def names(folder: Path, trainer: str) -> dict[str, Any]:
    """Return the names that the page's code blocks use and do not define."""
    given = {"base": llama(), "lora": peft_config(), "tokenizer": tokenizer(), "get_peft_model": get_peft_model}
    if trainer == "Trainer":
        arguments = TrainingArguments(**settings(folder))
        return given | {"Trainer": Trainer, "arguments": arguments, "dataset": tokenised()}
    kind, options = trl_classes(trainer)
    data = rows("prompt", "completion") if trainer == "SFT" else rows("prompt", "chosen", "rejected")
    return given | {f"{trainer}Trainer": kind, "arguments": options(**settings(folder, bf16=False)), "dataset": data}


@pytest.mark.parametrize(
    ("title", "trainer"),
    [
        ("Transformers' Trainer", "Trainer"),
        ("TRL: supervised fine-tuning", "SFT"),
        ("TRL: preferences and rewards", "DPO"),
    ],
)
def test_the_documented_trainers_initialize_and_train_an_adapter(title: str, trainer: str, tmp_path: Path) -> None:
    given = names(tmp_path, trainer)
    exec(block(title), given)
    assert all(bool(factor.start.any()) for factor in factors(given["trainer"].model))
    assert (tmp_path / "checkpoint-8" / FILE).is_file()


def test_the_documented_accelerate_loop_initializes_an_adapter() -> None:
    rows = Dataset.from_dict({"input_ids": tokens(16), "labels": tokens(16)}).with_format("torch")
    loader: DataLoader[Any] = DataLoader(rows, batch_size=4)
    given: dict[str, Any] = {
        "base": llama(),
        "lora": peft_config(),
        "dataloader": loader,
        "get_peft_model": get_peft_model,
    }
    given |= {"accelerator": Accelerator(), "torch": torch}
    exec(block("Accelerate"), given)
    assert all(bool(factor.start.any()) for factor in factors(given["model"]))


# --- the loop of examples/accelerate_loop.py -------------------------------------------------------------------------


class RecordingCollator(list[torch.Tensor]):
    """A collator that keeps the token ids of every batch."""

    def __call__(self, examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = torch.stack([example["input_ids"] for example in examples])
        self.append(ids)
        return {"input_ids": ids, "labels": ids}


def loader(seen: RecordingCollator) -> Any:
    torch.manual_seed(3)
    data = Dataset.from_dict({"input_ids": tokens(48)}).with_format("torch")
    return DataLoader(data, batch_size=4, shuffle=True, collate_fn=seen)


def test_the_loop_starts_at_the_loss_of_the_base_model_and_lowers_it(tmp_path: Path) -> None:
    seen = RecordingCollator()
    losses = accelerate_loop.finetune(llama(), loader(seen), tmp_path)
    assert len(losses) == 12
    first = seen[-12]
    assert losses[0] == llama()(input_ids=first, labels=first).loss.item()
    assert sum(losses[-3:]) < sum(losses[:3])


def test_the_loop_reads_its_batches_in_the_same_order_without_lora_ga(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {name: RecordingCollator() for name in ("with", "without")}
    accelerate_loop.finetune(llama(), loader(seen["with"]), tmp_path / "with")
    monkeypatch.setattr(lora_ga, "initialize", lambda *_: None, raising=False)
    accelerate_loop.finetune(llama(), loader(seen["without"]), tmp_path / "without")
    assert len(seen["without"]) == 12
    assert len(seen["with"]) == 24
    assert all(torch.equal(one, other) for one, other in zip(seen["with"][12:], seen["without"], strict=True))


def test_the_loop_resumes_bit_for_bit_and_stock_peft_loads_its_adapter(tmp_path: Path) -> None:
    whole = accelerate_loop.finetune(llama(), loader(RecordingCollator()), tmp_path / "whole", epochs=2)
    parts = accelerate_loop.finetune(llama(), loader(RecordingCollator()), tmp_path / "parts")
    parts += accelerate_loop.finetune(llama(), loader(RecordingCollator()), tmp_path / "parts")
    assert parts == whole
    for file in ("adapter_model.safetensors", FILE):
        one, other = (load_file(tmp_path / name / "adapter" / file) for name in ("whole", "parts"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    batch = causal(1)[0]
    stock = PeftModel.from_pretrained(llama(), tmp_path / "whole" / "adapter")
    trained = lora_ga.load(llama(), tmp_path / "whole" / "adapter", is_trainable=True).eval()
    torch.testing.assert_close(logits(stock, batch), logits(trained, batch), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(stock, batch), logits(llama(), batch), rtol=0, atol=1e-3)


# --- sentence-transformers ------------------------------------------------------------------------------------------

PAIRS = [{"anchor": f"question {number} of {number * 7 % 11}", "positive": f"answer {number}"} for number in range(24)]


@pytest.mark.parametrize("inside", [False, True], ids=["add_adapter", "a PeftModel inside"])
def test_an_embedding_model_trains_with_in_batch_negatives_and_loads_again(
    inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    folder = str(minilm_folder())
    # Transformers 5.24 asks for PEFT 0.22, which is not published.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0")

    def make() -> Any:
        torch.manual_seed(0)
        model = library.SentenceTransformer(folder, device="cpu")
        if inside:
            model[0].model = get_peft_model(model[0].model, lora_settings(["query", "value"]))
        else:
            model.add_adapter(lora_settings(["query", "value"]))
        return model

    model = make()
    start = model.encode(["a river"])
    arguments = library.SentenceTransformerTrainingArguments(
        **settings(tmp_path, bf16=False) | {"max_steps": 3, "save_steps": 2, "learning_rate": 1e-3}
    )
    given = {
        "model": model,
        "arguments": arguments,
        "dataset": Dataset.from_list(PAIRS),
        "SentenceTransformerTrainer": library.SentenceTransformerTrainer,
        "MultipleNegativesRankingLoss": losses.MultipleNegativesRankingLoss,
    }
    exec(block("sentence-transformers"), given)
    trained = model.eval().encode(["a river"])
    assert abs(trained - start).max() > 1e-4
    model.save_pretrained(str(tmp_path / "saved"))
    read = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert abs(read.encode(["a river"]) - trained).max() <= 1e-6
    again = lora_ga.load(make(), tmp_path / "saved", is_trainable=True)
    assert abs(again.encode(["a river"]) - trained).max() <= 1e-6
    assert (tmp_path / "checkpoint-2" / FILE).is_file()
    if not inside:  # sentence-transformers itself does not resume a PeftModel inside
        resumed = given | {"model": make()}
        exec(block("sentence-transformers").replace(".train()", ".train(resume_from_checkpoint=True)"), resumed)
        assert abs(resumed["model"].eval().encode(["a river"]) - trained).max() <= 1e-6


def test_an_embedding_model_without_a_transformer_is_refused() -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    words = library.SentenceTransformer(modules=[modules.BoW(["a", "b"])], device="cpu")
    with pytest.raises(TypeError, match="The SentenceTransformer has no LoRA layers. Add an adapter first"):
        lora_ga.initialize(words, [])


# --- diffusers --------------------------------------------------------------------------------------------------------


class Noising:
    """A scheduler as those of diffusers: x + t·noise, with ten steps."""

    def __init__(self, kind: str) -> None:
        self.config = SimpleNamespace(num_train_timesteps=10, prediction_type=kind)

    def add_noise(self, x: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        return x + noise * steps[:, None]

    def get_velocity(self, x: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        return noise - 2 * x


class Denoiser(nn.Module):
    """A model that is called as those of diffusers are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        hidden = self.up(sample + encoder_hidden_states).tanh()
        return (self.down(hidden * (1 + timestep[:, None] / 10)),)


DRAW = torch.Generator().manual_seed(0)
CLEAN = [{"x": torch.randn(8, 16, generator=DRAW), "c": torch.randn(8, 16, generator=DRAW)} for _ in range(3)]


def clean(batch: dict[str, Tensor]) -> Tensor:
    return batch["x"]


def condition(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"encoder_hidden_states": batch["c"]}


FLOW: Any = SimpleNamespace(
    config=SimpleNamespace(num_train_timesteps=10),
    sigmas=torch.arange(10, 0, -1) / 10,
    timesteps=torch.arange(10, 0, -1.0),
)


@pytest.mark.parametrize(
    ("scheduler", "noised", "target"),
    [
        (Noising("epsilon"), lambda x, n, t: x + n * t, lambda x, n: n),
        (Noising("v_prediction"), lambda x, n, t: x + n * t, lambda x, n: n - 2 * x),
        (Noising("sample"), lambda x, n, t: x + n * t, lambda x, n: x),
        (FLOW, lambda x, n, t: (1 - t / 10) * x + t / 10 * n, lambda x, n: n - x),
    ],
    ids=["epsilon", "v_prediction", "sample", "flow matching"],
)
def test_the_denoising_loss_is_that_of_the_training_scripts(
    scheduler: Any, noised: Callable[..., Tensor], target: Callable[..., Tensor]
) -> None:
    batches, loss = denoising(scheduler, CLEAN, clean, condition)
    model = injected(Denoiser(), ["up", "down"])
    for batch in batches:
        x, noise = batch["latents"], batch["noise"]
        steps = batch["steps"] if scheduler is not FLOW else FLOW.timesteps[batch["steps"]]
        prediction = model(noised(x, noise, steps[:, None]), steps, batch["batch"]["c"])[0]
        value, rows = loss(model, batch)
        torch.testing.assert_close(value, ((prediction - target(x, noise)) ** 2).mean())
        assert rows == 8
    before = [p.clone() for p in (loss(model, batch)[0] for batch in batches)]
    assert set(lora_ga.initialize(model, batches, loss_fn=loss)) == {"up", "down"}
    assert before == [loss(model, batch)[0] for batch in batches]


def test_noise_depends_on_the_seed_and_the_number_of_the_batch_alone() -> None:
    state = torch.get_rng_state()
    one, again, other = (denoising(FLOW, CLEAN, clean, condition, seed=seed)[0] for seed in (0, 0, 1))
    first, second = zip(one, one, strict=True), zip(one, again, strict=True)
    for pair in (*first, *second):
        assert all(torch.equal(pair[0][key], pair[1][key]) for key in ("noise", "steps"))
    noises = [batch["noise"] for batch in (*one, *other)]
    assert not any(torch.equal(noises[i], noises[j]) for i in range(6) for j in range(i))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_denoising_loss_that_cannot_be_computed_is_refused() -> None:
    batches, loss = denoising(Noising("score"), CLEAN, clean, condition)
    with pytest.raises(ValueError, match="prediction type is 'score'; known are epsilon, v_prediction, sample. Pass"):
        loss(Denoiser(), next(iter(batches)))
    batches, loss = denoising(FLOW, CLEAN, lambda batch: batch["x"][:, None], condition)
    with pytest.raises(ValueError, match=r"predicts \(8, 8, 16\) for latents of \(8, 1, 16\). Pass `latents` as"):
        loss(Denoiser(), next(iter(batches)))


class TrainedEncoder(nn.Module):
    """A text encoder with a layer to adapt, called as those of Transformers are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words, self.dense = nn.Embedding(64, 16), nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        return (self.dense(self.words(ids).mean(dim=1)).tanh(),)


def test_a_text_encoder_that_trains_too_starts_from_the_gradient_of_the_denoising_loss() -> None:
    encoder, model = injected(TrainedEncoder(), ["dense"]), injected(Denoiser(), ["up", "down"])
    data = [batch | {"input_ids": tokens(8, 6, seed)} for seed, batch in enumerate(CLEAN)]
    batches, loss = denoising(Noising("epsilon"), data, clean, encoder)
    before = [loss(model, batch)[0] for batch in batches]
    lora_ga.initialize(model, batches, loss_fn=loss)
    (line,) = re.findall(r"`(lora_ga\.initialize\(text_encoder, .*)`", SECTIONS["diffusers"])
    given = {"lora_ga": lora_ga, "text_encoder": encoder, "unet": model, "batches": batches, "loss": loss}
    estimate = eval(line, given)
    assert before == [loss(model, batch)[0] for batch in batches]
    weight: Any = encoder.get_submodule("dense.base_layer").weight.requires_grad_()
    (wanted,) = torch.autograd.grad(torch.stack([loss(model, batch)[0] for batch in batches]).mean(), weight)
    torch.testing.assert_close(torch.tensor(estimate["dense"].norm), wanted.norm())


def unet(library: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    return library.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=8,
        **settings,
    ).eval()


def sdxl(library: Any) -> Any:
    return unet(
        library,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )


def flux(library: Any) -> Any:
    torch.manual_seed(0)
    return library.FluxTransformer2DModel(
        in_channels=16,
        guidance_embeds=True,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
    ).eval()


def sd3(library: Any) -> Any:
    torch.manual_seed(0)
    return library.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()


class Autoencoder(nn.Module):
    """Called as those of diffusers are; it encodes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.config = nn.Linear(1, 1), SimpleNamespace(scaling_factor=0.5)

    def encode(self, pixels: Tensor) -> Any:
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda generator: pixels))


TEXT = nn.Sequential(nn.Embedding(64, 16), nn.LayerNorm(16))


class TextEncoder(nn.Module):
    """Called as those of Transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TEXT

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        return (self.text(ids),)


def pixels(batch: dict[str, Tensor]) -> Tensor:
    return batch["pixel_values"]


def condition_of_sd3(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    states = TEXT(batch["input_ids"])
    return {"encoder_hidden_states": states, "pooled_projections": states.mean(1)}


def compute_text_embeddings(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """As a script with two text encoders computes them."""
    states = TEXT(batch["input_ids"])
    return states, states.mean(1)


def stable_diffusion(library: Any, scheduler: Any, model: Any) -> Any:
    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    return library.StableDiffusionPipeline(**parts, unet=model, scheduler=scheduler, requires_safety_checker=False)


def sdxl_pipeline(library: Any, scheduler: Any, model: Any) -> Any:
    parts = [f"{part}{number}" for number in ("", "_2") for part in ("text_encoder", "tokenizer")]
    return library.StableDiffusionXLPipeline(**dict.fromkeys(["vae", *parts]), unet=model, scheduler=scheduler)


def sd3_pipeline(library: Any, scheduler: Any, model: Any) -> Any:
    parts = [f"{part}{number}" for number in ("", "_2", "_3") for part in ("text_encoder", "tokenizer")]
    return library.StableDiffusion3Pipeline(**dict.fromkeys(["vae", *parts]), transformer=model, scheduler=scheduler)


def flux_pipeline(library: Any, scheduler: Any, model: Any) -> Any:
    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    return library.FluxPipeline(**parts, transformer=model, scheduler=scheduler)


def test_flux_and_sdxl_get_what_their_scripts_give_them() -> None:
    library = pytest.importorskip("diffusers", reason="diffusers is not installed (the extra dev has it)")
    pipeline, x = library.FluxPipeline, torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_packed(x), pipeline._pack_latents(x, 2, 4, 6, 8))
    places = _places(x, {"encoder_hidden_states": torch.zeros(2, 5, 16)}, SimpleNamespace(guidance_embeds=True))
    assert torch.equal(places["img_ids"], pipeline._prepare_latent_image_ids(2, 3, 4, x.device, x.dtype))
    assert torch.equal(places["txt_ids"], torch.zeros(5, 3))
    assert places["guidance"].tolist() == [3.5, 3.5]
    batch: dict[str, Any] = {"pixel_values": torch.zeros(2, 3, 16, 24)}
    assert _sizes(batch).tolist() == [[16, 24, 0, 0, 16, 24]] * 2
    batch |= {"original_sizes": [(30, 40), (50, 60)], "crop_top_lefts": [(1, 2), (3, 4)]}
    assert _sizes(batch).tolist() == [[30, 40, 1, 2, 16, 24], [50, 60, 3, 4, 16, 24]]


@pytest.mark.parametrize(
    ("make", "pipeline", "part", "scheduler", "shape", "latents", "condition"),
    [
        (unet, stable_diffusion, "unet", "DDPMScheduler", (4, 4, 8, 8), Autoencoder(), TextEncoder()),
        (sdxl, sdxl_pipeline, "unet", "DDPMScheduler", (4, 4, 8, 8), Autoencoder(), compute_text_embeddings),
        (
            flux,
            flux_pipeline,
            "transformer",
            "FlowMatchEulerDiscreteScheduler",
            (4, 4, 8, 8),
            Autoencoder(),
            compute_text_embeddings,
        ),
        (sd3, sd3_pipeline, "transformer", "FlowMatchEulerDiscreteScheduler", (4, 4, 8, 8), pixels, condition_of_sd3),
    ],
    ids=["UNet", "SDXL", "Flux", "SD3"],
)
def test_a_denoising_model_loads_in_its_pipeline_and_resumes(
    make: Any, pipeline: Any, part: str, scheduler: str, shape: Any, latents: Any, condition: Any, tmp_path: Path
) -> None:
    library = pytest.importorskip("diffusers", reason="diffusers is not installed (the extra dev has it)")
    collate = pytest.importorskip("diffusers.training_utils")._collate_lora_metadata
    draw = torch.Generator().manual_seed(0)
    lora = LoraConfig(r=2, lora_alpha=4, use_rslora=True, target_modules=["to_k", "to_q", "to_v"])
    data = [{"pixel_values": torch.randn(shape, generator=draw), "input_ids": tokens(4, 8, seed)} for seed in range(2)]
    model, noise_scheduler = make(library), getattr(library, scheduler)()
    given: dict[str, Any] = {"unet": model, "lora": lora, "noise_scheduler": noise_scheduler, "train_dataloader": data}
    given |= {"vae": latents, "text_encoder": condition}
    exec(block("diffusers"), given)
    batches, loss = list(given["batches"]), given["loss"]

    def error(model: Any) -> Tensor:
        with torch.no_grad():
            return loss(model, batches[0])[0]

    assert torch.equal(error(model), error(make(library)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches:
        loss(model, batch)[0].backward()
        optimizer.step()
    layers = get_peft_model_state_dict(model)
    reader = pipeline(library, noise_scheduler, make(library))
    reader.save_lora_weights(str(tmp_path), **{f"{part}_lora_layers": layers}, **collate({part: model}))
    reader.load_lora_weights(str(tmp_path))
    assert torch.equal(error(getattr(reader, part)), error(model))
    assert not torch.equal(error(model), error(make(library)))
    loaded, script = make(library), make(library)
    for resumed in (loaded, script):
        resumed.add_adapter(lora)
    lora_ga.load(loaded, tmp_path, is_trainable=True)
    lora_ga.initialize(script, batches, loss_fn=loss)
    set_peft_model_state_dict(script, layers)
    for resumed in (loaded, script):
        torch.testing.assert_close(error(resumed), error(model), rtol=0, atol=1e-6)
