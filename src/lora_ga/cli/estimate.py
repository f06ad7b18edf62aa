"""`lora-ga estimate`: writes the gradient of every adapted layer to a file."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lora_ga.cli.columns import check_files
from lora_ga.cli.options import (
    DataOptions,
    EstimateOptions,
    ModelOptions,
    TargetOptions,
    at_least,
    check_inputs,
    option,
    require,
)
from lora_ga.cli.parsing import config_parser, parse_with_config
from lora_ga.cli.terminal import loading
from lora_ga.files import check_writable


@dataclass
class OutputOptions:
    """The file of the estimate, its checkpoint and its shard."""

    _argument_group_name: ClassVar[str] = "output"

    output: str = option("", "file to write, ending in .safetensors; it must not exist (required)")
    checkpoint: str | None = option(
        None, "file for the state of an unfinished estimate: if it exists, the estimate resumes from it"
    )
    checkpoint_every: int = option(8, "batches between two writes of the checkpoint")
    shard: str | None = option(
        None,
        "i/n with i from 0 to n-1: only every n-th batch, from batch i on. n machines with the same options make n "
        "files, which `lora-ga merge` adds up; give them --oversample 32, since each reads only a part",
    )

    def __post_init__(self) -> None:
        require(self, "output")
        at_least(self, checkpoint_every=1)
        self.part  # noqa: B018 (checks the shard)

    @property
    def part(self) -> tuple[int, int]:
        """(i, n) of the shard; (0, 1) without --shard."""
        found = re.fullmatch(r"(\d+)/(\d+)", self.shard or "0/1")
        index, count = map(int, found.groups()) if found else (1, 0)
        if index >= count:
            raise ValueError(f"--shard {self.shard}: it must be i/n with i from 0 to n-1, as 0/4, 1/4, 2/4 and 3/4.")
        return index, count


GROUPS = (ModelOptions, DataOptions, TargetOptions, EstimateOptions, OutputOptions)

USAGE = "lora-ga estimate --model MODEL --task TASK (--train_file FILE | --dataset NAME) --output FILE [options]"

DESCRIPTION = """\
Estimate the loss gradient of every layer that an adapter would adapt, on a few batches of training data, and write its
leading directions to a file. The model is not changed. `lora-ga inspect` shows what the file holds, and
`lora-ga train --estimate_file` starts from it. One file is enough for a sweep of learning rates.

example:
  lora-ga estimate --model meta-llama/Llama-3.2-1B --task causal-lm --train_file notes.jsonl --rank 16 \\
      --output notes.safetensors

To divide the work among three jobs, give each a file and --shard 0/3, 1/3 or 2/3, and then call `lora-ga merge`.
"""


def check_new_file(path: str) -> Path:
    """Checks the name of a new estimate file.

    Returns:
        Its path.

    Raises:
        ValueError: It does not end in .safetensors, or its folder does not exist.
        FileExistsError: The file exists.
        PermissionError: Its folder cannot be written to.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        raise ValueError(f"--output {path}: an estimate is a .safetensors file. Give a name with that ending.")
    if file.exists():
        raise FileExistsError(f"--output {path}: this file exists. Give another name, or remove it.")
    if not file.parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {file.parent}. Make it first.")
    check_writable(file)
    return file


def main(argv: list[str]) -> int:
    """Estimates the gradient, writes the file and prints a summary."""
    parser = config_parser(GROUPS, prog="lora-ga estimate", usage=USAGE, description=DESCRIPTION)
    model, data, target, options, output = parse_with_config(parser, argv)
    file = check_new_file(output.output)
    check_inputs(model, data)
    check_files(model.task, data)
    loading(f"{model.model} and the data")
    estimate = run_estimate(model, data, target, options, output)
    estimate.save(file)
    limits = sorted(limit for limit in estimate.limit(target.rank).values() if not math.isnan(limit))
    middle = f"; a rank of {target.rank} can follow {limits[len(limits) // 2]:.3f} of it (median)" if limits else ""
    print(
        f"{file}: the gradient of {len(estimate)} layers from {estimate.batches} batches with "
        f"{estimate.weight:.0f} labels{middle}. `lora-ga inspect {file}` shows each layer."
    )
    return 0


def run_estimate(
    model: ModelOptions, data: DataOptions, target: TargetOptions, options: EstimateOptions, output: OutputOptions
) -> Any:
    """Loads model and data and estimates the gradient, as `lora-ga train` does before it trains.

    Returns:
        The `GradientEstimate`.

    Raises:
        ValueError: The options do not fit the data or the model.
    """
    import lora_ga
    from lora_ga.cli import tasks
    from lora_ga.cli.data import EstimateBatches
    from lora_ga.cli.models import add_adapter, device
    from lora_ga.cli.options import AdapterOptions
    from lora_ga.cli.settings import library_config

    data = tasks.named_columns(model, data)
    base, prepared, collate = tasks.prepare_model(model, tasks.prepare_data(model, data))
    adapted = add_adapter(base, target, AdapterOptions(), tasks.TASK_CLASSES[model.task].peft_type).to(device())
    batches = EstimateBatches(prepared.train, collate, options, data.batch_size, model.seed, output.part)
    return lora_ga.estimate_gradients(
        adapted,
        batches,
        library_config(model, options),
        checkpoint=output.checkpoint,
        every=output.checkpoint_every,
    )
