"""TRL's trainers: packing, completion-only loss, the dtype of the adapter, reference adapters, groups of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel

import lora_ga
from cases import LAYERS, nf4
from lora_ga import LoraGACallback, LoraGAConfig
from lora_ga.adapter.save import FILE
from toys import adapted, causal, llama, logits, tokens, train
from trainers import (
    TARGETS,
    callback,
    factors,
    peft_config,
    rows,
    settings,
    sft,
    text,
    tokenizer,
    trl_classes,
)


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "packing_strategy": "wrapped"},
        {"packing": True, "packing_strategy": "bfd"},
        {"padding_free": True, "max_length": None},
    ],
)
def test_packed_and_padding_free_batches_are_weighted_by_their_labels(changes: dict[str, Any], tmp_path: Path) -> None:
    lora_ga_callback = LoraGACallback(LoraGAConfig(max_batches=None))
    trainer = sft([lora_ga_callback], tmp_path, **({"max_length": 24} | changes))
    trainer.train()
    assert lora_ga_callback.estimate is not None
    batches = list(trainer.get_train_dataloader())
    labels = sum(int((batch["labels"][..., 1:] != -100).sum()) for batch in batches)
    assert lora_ga_callback.estimate.batches == len(batches)
    if changes.get("packing_strategy") == "wrapped":  # the first token of each row of a batch is not a label
        assert lora_ga_callback.estimate.weight == labels
    else:
        assert lora_ga_callback.estimate.weight == 24 * 6  # the letters and the end of each answer


def test_completion_only_loss_counts_the_completions(tmp_path: Path) -> None:
    found = {}
    for only in (True, False):
        lora_ga_callback = LoraGACallback(LoraGAConfig(max_batches=None))
        sft([lora_ga_callback], tmp_path, completion_only_loss=only, max_steps=1).train()
        assert lora_ga_callback.estimate is not None
        found[only] = lora_ga_callback.estimate
    assert found[True].weight == 24 * (5 + 1)  # five letters and the end
    assert found[False].weight == 24 * (5 + 5 + 1 - 1)
    name = f"model.layers.0.self_attn.{TARGETS[1]}"
    assert found[True][name].norm != found[False][name].norm


def test_an_adapter_that_trl_casts_to_bfloat16_is_aligned_and_loads_in_stock_peft(tmp_path: Path) -> None:
    """TRL recognises a quantised model by an attribute that bitsandbytes sets."""
    base = llama()
    base.is_loaded_in_4bit = True
    trainer = sft([callback()], tmp_path, model=base)
    del base.is_loaded_in_4bit
    assert {factor.trainable.dtype for factor in factors(trainer.model)} == {torch.bfloat16}
    batch = causal(1)[0]
    trainer.train()
    assert {factor.start.dtype for factor in factors(trainer.model)} == {torch.bfloat16}
    stock = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-8")
    change = (logits(stock, batch) - logits(llama(), batch)).abs().max()
    difference = (logits(stock, batch) - logits(trainer.model.eval(), batch)).abs().max()
    assert difference < 0.02 * change


def test_an_adapter_on_a_4_bit_base_is_trained_saved_and_loaded_by_stock_peft(tmp_path: Path) -> None:
    LAYERS["bitsandbytes nf4"].check_installed()
    batch, lora_ga_callback = causal(1)[0], callback()
    untrained = logits(nf4(), batch)
    trainer = sft([lora_ga_callback], tmp_path, model=nf4())
    trainer.train()
    assert lora_ga_callback.estimate is not None
    assert len(factors(trainer.model)) == 2 * len(lora_ga_callback.estimate) == 2 * 2 * len(TARGETS)
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(found[-2:]) < sum(found[:2])
    stock = PeftModel.from_pretrained(nf4(), tmp_path / "checkpoint-8").eval()
    assert stock.peft_config["default"].r == 8
    change = (logits(stock, batch) - untrained).abs().max()
    difference = (logits(stock, batch) - logits(trainer.model.eval(), batch)).abs().max()
    assert difference < 0.02 * change  # TRL makes the adapter of a 4-bit base compute in bfloat16


def test_a_reference_copied_from_a_trained_adapter_equals_it(tmp_path: Path) -> None:
    """Without the callback, TRL copies the initialized adapter to "ref", parameter by parameter."""
    base = llama().to(torch.bfloat16)  # PEFT casts the new adapter to the base's dtype and back to float32
    model = adapted(base, TARGETS, task_type="CAUSAL_LM")
    lora_ga.initialize(model, causal())
    train(model, causal())
    trainer, arguments = trl_classes("DPO")
    made = trainer(
        model=model,
        args=arguments(**settings(tmp_path, bf16=False, learning_rate=1e-3)),
        train_dataset=rows("prompt", "chosen", "rejected"),
        processing_class=tokenizer(),
    )
    up = model.base_model.model.model.layers[0].mlp.up_proj
    for modules in (up.lora_A, up.lora_B):
        assert torch.equal(modules["ref"].weight, modules["default"].weight)
        assert not modules["ref"].trainable.requires_grad
    made.train()
    first = next(entry for entry in made.state.log_history if "loss" in entry)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert not torch.equal(up.lora_B["ref"].weight, up.lora_B["default"].weight)
    for name in ("default", "ref"):
        folder = tmp_path / "checkpoint-8" / ("" if name == "default" else name)
        assert (folder / FILE).is_file()
        again = lora_ga.load(llama().to(torch.bfloat16), folder, is_trainable=True)
        joined = again.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight
        assert torch.equal(joined, up.lora_B[name].weight)


def test_grpo_estimates_on_whole_groups_of_answers(tmp_path: Path) -> None:
    groups = []

    def letters(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        groups.append([prompts.count(prompt) for prompt in prompts])
        return [float(len(set(completion))) for completion in completions]

    trainer, arguments = trl_classes("GRPO")
    lora_ga_callback = callback()
    made = trainer(
        llama(),
        letters,
        args=arguments(**settings(tmp_path, max_steps=2), bf16=False, num_generations=4, max_completion_length=6),
        train_dataset=rows("prompt"),
        processing_class=tokenizer(),
        peft_config=peft_config(),
        callbacks=[lora_ga_callback],
    )
    made.train()
    assert lora_ga_callback.estimate is not None
    assert groups == [[4] * 4] * (lora_ga_callback.estimate.batches + 2)
    stock = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-2")
    torch.testing.assert_close(logits(stock, causal(1)[0]), logits(made.model.eval(), causal(1)[0]), rtol=0, atol=1e-5)


# --- the other trainers -----------------------------------------------------------------------------------------------

BATCH = {"input_ids": tokens(4, 8, seed=9) % 29}
CHAT = "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"


def letters(completions: list[Any], **_: Any) -> list[float]:
    """A reward: the number of different letters."""
    return [float(len(set(str(completion)))) for completion in completions]


def chats(*columns: str) -> Dataset:
    """A data set of conversations of a question and an answer, or of questions alone."""
    roles = ("user", "assistant") if "messages" in columns else ("user",)
    turns = [[{"role": role, "content": text((role, row), 5)} for role in roles] for row in range(24)]
    return Dataset.from_list([{columns[0]: turn} | dict.fromkeys(columns[1:], "a b") for turn in turns])


def chatting() -> Any:
    """The tokenizer of letters, with a template of conversations."""
    made = tokenizer()
    made.chat_template = CHAT
    return made


SHORT = {"max_completion_length": 6}
PROMPTS, JUDGED, TAUGHT = rows("prompt"), {"reward_funcs": letters}, {"teacher_model": llama(1)}
# Trainer → its data, arguments and settings, and its tokenizer.
OTHERS: dict[str, tuple[Dataset, dict[str, Any], dict[str, Any], Any]] = {
    "RLOO": (PROMPTS, SHORT | {"num_generations": 4}, JUDGED, tokenizer),
    "CPO": (rows("prompt", "chosen", "rejected"), {}, {}, tokenizer),
    "TPO": (rows("prompt", "chosen", "rejected", "reference"), {}, {}, tokenizer),
    "Distillation": (PROMPTS, SHORT, TAUGHT, tokenizer),
    "GKD": (chats("messages"), {"max_new_tokens": 6, "max_length": 48}, TAUGHT, chatting),
    "SDPO": (
        chats("prompt"),
        SHORT | {"num_generations": 4, "max_prompt_length": 24, "distillation_topk": 8},
        JUDGED,
        chatting,
    ),
    "OnlineDPO": (PROMPTS, {"max_new_tokens": 6, "missing_eos_penalty": None}, JUDGED, tokenizer),
    "SDFT": (
        chats("prompt", "privileged_context"),
        SHORT | {"num_generations": 2, "max_prompt_length": 24, "distillation_topk": 8},
        {},
        chatting,
    ),
}


def other(name: str, folder: Path, callbacks: list[Any], **changes: Any) -> Any:
    """One of TRL's trainers for one step, with a `peft_config`."""
    trainer, arguments = trl_classes(name)
    data, given, named, words = OTHERS[name]
    return trainer(
        model=llama(),
        args=arguments(**settings(folder, bf16=False, **({"max_steps": 1} | given | changes))),
        train_dataset=data,
        processing_class=words(),
        callbacks=callbacks,
        peft_config=peft_config(),
        **named,
    )


def check_run(trainer: Any, used: LoraGACallback, folder: Path) -> None:
    """Train; the start is that of the base, every layer has a gradient, and stock PEFT reads the checkpoint."""
    begin: list[torch.Tensor] = []
    used.on_step_begin = lambda *_, model, **named: begin.append(logits(model.eval(), BATCH))
    trainer.train()
    assert torch.equal(begin[0], logits(llama(), BATCH))
    assert used.estimate is not None
    assert len(used.estimate) == 2 * len(TARGETS)
    stock = PeftModel.from_pretrained(llama(), folder / "checkpoint-1")
    torch.testing.assert_close(logits(stock, BATCH), logits(trainer.model.eval(), BATCH), rtol=0, atol=1e-6)
    assert not torch.equal(logits(stock, BATCH), begin[0])


@pytest.mark.parametrize("name", [name for name in OTHERS if name not in ("SDPO", "OnlineDPO")])
def test_the_other_trainers_start_exactly_and_their_adapters_reload(name: str, tmp_path: Path) -> None:
    used = LoraGACallback(LoraGAConfig(max_batches=1))
    check_run(other(name, tmp_path, [used]), used, tmp_path)


def test_a_callback_that_sdpo_needs_first_is_named_and_attaching_the_callback_works(tmp_path: Path) -> None:
    """SDPO makes its teacher, a second adapter, in a callback of its own, which it adds after those of the user."""
    used = LoraGACallback(LoraGAConfig(max_batches=1))
    text = r"SDPOTrainer fails .*teacher not found.*\(PEFTAdapterEMACallback\). Add it last, .*attach\(trainer\)"
    with pytest.raises(ValueError, match=text):
        other("SDPO", tmp_path, [used]).train()
    trainer, used = other("SDPO", tmp_path, []), LoraGACallback(LoraGAConfig(max_batches=1))
    used.attach(trainer)
    check_run(trainer, used, tmp_path)
    layer = trainer.model.get_submodule(f"base_model.model.model.layers.0.self_attn.{TARGETS[0]}")
    rate = trainer.args.teacher_update_rate  # of one step, from a teacher that began as zero
    for modules in (layer.lora_A, layer.lora_B):
        torch.testing.assert_close(modules["teacher"].weight, rate * modules["default"].weight)


def test_a_loss_in_the_training_step_is_named_and_a_loss_function_works(tmp_path: Path) -> None:
    used = LoraGACallback(LoraGAConfig(max_batches=1))
    with pytest.raises(ValueError, match="OnlineDPOTrainer fails .* in its training_step, .* Pass LoraGACallback"):
        other("OnlineDPO", tmp_path, [used]).train()
    batches = [{key: value % 29 for key, value in batch.items()} for batch in causal(1)]
    used = LoraGACallback(batches=batches, loss_fn=lambda model, batch: model(**batch).loss)
    check_run(other("OnlineDPO", tmp_path, [used]), used, tmp_path)


def test_batches_that_share_an_optimizer_step_have_other_prompts_in_the_estimate(tmp_path: Path) -> None:
    """DistillationTrainer's loader gives the prompts of an optimizer step together, once for each of its batches."""
    prompts: list[list[int]] = []
    used = LoraGACallback(LoraGAConfig(max_batches=3))
    trainer = other("Distillation", tmp_path, [used], gradient_accumulation_steps=2, per_device_train_batch_size=2)
    compute = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, **named: Any) -> Any:
        prompts.extend(inputs["prompt_ids"].tolist())
        return compute(model, inputs, **named)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert len(prompts) == 3 * 2 + 4
    assert len({*map(tuple, prompts[:6])}) == 6
    assert trainer.args.gradient_accumulation_steps == 2
