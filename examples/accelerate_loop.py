"""A plain Accelerate loop that initialises its adapter with LoRA-GA and resumes from its last checkpoint.

`python examples/accelerate_loop.py FOLDER` trains a random two-layer Llama on random tokens. A second call with the
same folder continues from the end of the first. The lines for LoRA-GA are marked.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lora_ga  # LoRA-GA

LORA = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj", "up_proj"])


def finetune(base: nn.Module, loader: Iterable[Any], folder: Path, epochs: int = 1, rate: float = 1e-2) -> list[float]:
    """Train on the data, and save the adapter and the state of the loop in a folder.

    Args:
        base: A model that returns a loss for each batch.
        loader: The batches.
        folder: The output folder. If it holds a checkpoint, training resumes from it.
        epochs: Passes over the data, in addition to those of the checkpoint.
        rate: Learning rate of AdamW.

    Returns:
        The loss of every step.
    """
    accelerator, losses, resumes = Accelerator(), [], (folder / "state").is_dir()
    if resumes:
        model = lora_ga.load(base, folder / "adapter", is_trainable=True)  # LoRA-GA
    else:
        model = get_peft_model(base, LORA)
        lora_ga.initialize(model, loader)  # LoRA-GA
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if resumes:
        accelerator.load_state(folder / "state")
    for _ in range(epochs):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    accelerator.save_state(folder / "state")
    accelerator.unwrap_model(model).save_pretrained(folder / "adapter")
    return losses


def main(folder: Path) -> None:
    """Train, and print the first and the last loss."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))
    ids = torch.randint(64, (32, 12), generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")
    loader: DataLoader[Any] = DataLoader(rows, batch_size=4, shuffle=True)
    losses = finetune(base, loader, folder)
    print(f"{len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}; adapter saved in {folder / 'adapter'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
