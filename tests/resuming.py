"""Train four steps with `LoraGACallback`, with a checkpoint after two and after four; --resume begins at the first.

`test_launch.py` launches this script as its users launch theirs. At the end the trainer loads its best checkpoint,
which it takes to be the first. The script prints the losses of the steps, digests of the joined matrices at each
checkpoint and at the end, and whether an estimate was made; or the error that refuses the checkpoint.
"""

import argparse
import hashlib
import json
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from lora_ga import LoraGACallback, LoraGAConfig
from lora_ga.distributed.sharding import gathered, whole
from lora_ga.layers.factors import Factor
from toys import adapted, causal, reactive_llama


def digest(model: torch.nn.Module) -> str:
    """A digest of the joined matrices of all factors, bit for bit."""
    found = hashlib.sha256()
    for factor in (module for module in model.modules() if isinstance(module, Factor)):
        with gathered([factor.trainable]):
            found.update(whole(factor.joined()).detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


class Digests(TrainerCallback):
    """Keeps a digest for each checkpoint."""

    def __init__(self) -> None:
        self.found: dict[int, str] = {}

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.found[state.global_step] = digest(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    rows = [{key: value[0] for key, value in batch.items()} for batch in causal(16, rows=1)]
    digests = Digests()
    callback = LoraGACallback(LoraGAConfig(estimator="dense", max_batches=4))
    arguments = TrainingArguments(
        output_dir=options.output_dir,
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        greater_is_better=True,  # the loss falls
        report_to=[],
        disable_tqdm=True,
        use_cpu=options.cpu,
    )
    trainer = Trainer(
        adapted(reactive_llama()), arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=[callback, digests]
    )
    try:
        trainer.train(resume_from_checkpoint=f"{options.output_dir}/checkpoint-2" if options.resume else None)
    except ValueError as error:
        print(json.dumps({"refused": str(error)}))
        return
    found = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "digests": digests.found,
        "end": digest(trainer.model),
        "estimated": callback.estimate is not None,
    }
    if trainer.is_world_process_zero():
        print(json.dumps(found))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
