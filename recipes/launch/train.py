"""Fine-tune with LoRA-GA in several processes: DDP, FSDP2 or ZeRO-3, as Accelerate's configuration file says.

accelerate launch --config_file recipes/launch/ddp.yaml recipes/launch/train.py --output_dir runs/ddp
accelerate launch --config_file recipes/launch/fsdp2.yaml recipes/launch/train.py --output_dir runs/fsdp2
accelerate launch --config_file recipes/launch/zero3.yaml recipes/launch/train.py --output_dir runs/zero3

Without --model the script makes a Llama of two layers with random weights. Without --text it trains on this file.
"""

import argparse
import json
import os
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from lora_ga import LoraGACallback, LoraGAConfig

TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def pieces(text: str, model: str | None, length: int) -> Dataset:
    """Cut the text into pieces of one length; every token is a label. Without a model the tokens are bytes."""
    ids = list(text.encode()) if model is None else AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])


def main() -> None:
    """Train, and save the adapter as a plain LoRA for the original base model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model, as a folder or a name on the hub")
    parser.add_argument("--text", default=__file__, help="a text file to train on")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--estimator", default="streaming", choices=["streaming", "dense"], help="see LoraGAConfig")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU (with ddp.yaml only)")
    options = parser.parse_args()

    arguments = TrainingArguments(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=4,
        learning_rate=options.learning_rate,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=options.cpu,
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != arguments.world_size:
        raise SystemExit(
            f"{launched} processes were launched, but Accelerate found no accelerator and would run each alone. "
            "Without an accelerator only recipes/launch/ddp.yaml works: use it, with --cpu after the script."
        )
    set_seed(0)
    if options.model is None:
        base = LlamaForCausalLM(LlamaConfig(**TINY))
        base.save_pretrained(Path(options.output_dir) / "base")
    else:
        base = AutoModelForCausalLM.from_pretrained(options.model)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear"))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=pieces(Path(options.text).read_text(), options.model, options.length),
        data_collator=default_data_collator,
        callbacks=[LoraGACallback(LoraGAConfig(max_batches=8, estimator=options.estimator))],
    )
    trainer.train()
    trainer.save_model(str(Path(options.output_dir) / "adapter"))
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(json.dumps({"engine": trainer.accelerator.distributed_type, "losses": losses}))
    trainer.accelerator.end_training()  # destroys the process group, as PyTorch asks scripts to do


if __name__ == "__main__":
    main()
