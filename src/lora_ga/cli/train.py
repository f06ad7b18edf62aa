"""`lora-ga train`: reads and checks the options, then fine-tunes."""

import shlex
from pathlib import Path
from typing import Any

from lora_ga.cli import checkpoints
from lora_ga.cli.columns import check_files
from lora_ga.cli.options import Job, check_data_file, check_inputs
from lora_ga.cli.parsing import OptionParser, config_parser, parse_with_config
from lora_ga.cli.terminal import loading, warn

USAGE = "lora-ga train --model MODEL --task TASK (--train_file FILE | --dataset NAME) --output_dir FOLDER [options]"

DESCRIPTION = """\
Fine-tune a model and write a folder with the adapter, the gradient estimate, the record and the options of the run.
--method lora-ga estimates the loss gradient of every adapted layer on a few batches and starts the adapter in its
leading directions. The trained adapter is plain LoRA for the unchanged base model. --method lora and --method full are
for comparison.

example:
  lora-ga train --model google-bert/bert-base-uncased --task seq-cls --dataset nyu-mll/glue --dataset_config mrpc \\
      --text_column sentence1 --text_pair_column sentence2 --eval_split validation --output_dir runs/mrpc

The folder of a finished run:
  adapter/ (or model/)   the trained weights, the tokenizer and the names of the classes
  run.json               losses, metrics, times and versions, for `lora-ga compare`
  config.yaml            `lora-ga train --config config.yaml --output_dir OTHER` runs it again
  estimate.safetensors   the gradient estimate, for `lora-ga inspect` and --estimate_file
  checkpoints/           from which `lora-ga train --resume --output_dir FOLDER` resumes
"""

# The parts of a run's time that its record has -> their names.
PARTS = {"estimate": "estimate", "train": "training"}


def make_parser() -> OptionParser:
    """Makes the parser of all options of `lora-ga train`."""
    return config_parser(Job.GROUPS, prog="lora-ga train", usage=USAGE, description=DESCRIPTION)


def parse(argv: list[str]) -> tuple[Job, Path | None]:
    """Reads and checks the options, and that their files exist. Nothing slow is imported.

    Returns:
        The job, and the checkpoint from which a resumed run starts, else None.

    Raises:
        ValueError: An option is wrong, or a resumed run began with other options.
        FileExistsError: The output folder is not empty.
        PermissionError: Nothing can be written there.
        FileNotFoundError: There is nothing to resume, or a file or folder does not exist.
    """
    parser = make_parser()
    parser.refuse_unknown(argv)
    given = parser.parse_known_args(argv)[0]
    saved = None
    if given.resume and given.config is None and given.output_dir:
        saved = checkpoints.find_config(Path(given.output_dir))
    job = Job(*parse_with_config(parser, argv, config=str(saved) if saved else None))
    folder = Path(job.training.output_dir)
    check_inputs(job.model, job.data)
    if job.training.eval_file is not None:
        check_data_file(Path(job.training.eval_file))
    check_files(job.model.task, job.data, job.training.eval_file)
    if not job.training.resume:
        if job.training.estimate_file is not None:
            checkpoints.estimate_of(Path(job.training.estimate_file))
        checkpoints.check_output_dir(folder)
        if job.training.from_adapter is not None:
            checkpoints.adapter_of(Path(job.training.from_adapter), job.training.method)
        return job, None
    saved = checkpoints.find_config(folder)
    checkpoints.check_same_options(
        Job(*parse_with_config(parser, [], config=str(saved))).options(), job.options(), saved
    )
    return job, checkpoints.last_checkpoint(folder, job.training.method)


def main(argv: list[str]) -> int:
    """Trains and prints a summary.

    Returns:
        The exit code, 0.

    Raises:
        KeyboardInterrupt: The training was interrupted; the message says how it goes on.
    """
    job, checkpoint = parse(argv)
    if unused := job.unused():
        given = [name for name in ("from_adapter", "estimate_file") if getattr(job.training, name) is not None]
        why = f"with --{given[0]}" if given else f"for --method {job.training.method}"
        warn(f"{', '.join(f'--{name}' for name in unused)}: no effect {why}.")
    loading(f"{job.model.model} and the data")
    from lora_ga.cli.finetune import finetune
    from lora_ga.experiments.records.runs import RECORD

    folder = Path(job.training.output_dir)
    if checkpoint is not None and (folder / RECORD).exists():
        print(f"{folder} is finished; there is nothing to resume.")
        return 0
    try:
        outcome = finetune(job, checkpoint)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(checkpoints.how_to_resume(folder)) from error
    print(summary(outcome.record))
    print(f"{outcome.result}: the result. {folder / RECORD}: its record.")
    for what, how in next_steps(outcome.record, outcome.result):
        print(f"\n{what}:\n  {how}")
    return 0


def summary(record: dict[str, Any]) -> str:
    """Describes a run in one line, with the parts of its time."""
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in record["metrics"].items())
    seconds = record["seconds"]
    parts = [f"{seconds[part]:.0f} s {name}" for part, name in PARTS.items() if seconds.get(part)]
    rest = seconds["total"] - sum(seconds.get(part, 0.0) for part in PARTS)
    parts.append(f"{max(rest, 0.0):.0f} s loading, evaluation and saving")
    return (
        f"{record['name']}: {record['steps']} steps in {seconds['total']:.0f} s ({', '.join(parts)}), "
        f"{record['trainable_parameters']:,} trained parameters; {metrics}"
    )


def next_steps(record: dict[str, Any], result: Path) -> list[tuple[str, str]]:
    """What to do with the result of a run: what for, and a command that can be pasted into a shell.

    Args:
        record: The record of the run.
        result: The folder with the adapter or the model.

    Returns:
        Pairs of a title and a command.
    """
    from lora_ga.cli.record import usage

    adapted, folder = record["method"] != "full", str(result)
    steps = [("Use it from Python", f"python -c {shlex.quote(usage(record, folder))}")]
    merged = str(result.parent / "merged")
    if adapted:
        steps.append(
            ("Merge it into the model", shlex.join(["lora-ga", "export", folder, "--output", merged, "--merge"]))
        )
    if record["task"] == "causal-lm" and not adapted:
        steps.append(("Serve it", shlex.join(["vllm", "serve", folder])))
    elif record["task"] == "causal-lm":
        from lora_ga.export.readers import check_reader

        verdict = check_reader(result, "vllm")
        if verdict.refused or verdict.fixable:
            how = shlex.join(["lora-ga", "export", folder, "--for", "vllm", "--output", str(result.parent / "served")])
        else:
            how = verdict.advice
        steps.append(("Serve it", how))
    else:
        run = result.parent
        page = str(run / "compare.html")  # the default may be there already, of another comparison
        steps.append(("Compare it (add other runs)", shlex.join(["lora-ga", "compare", str(run), "--output", page])))
    return steps
