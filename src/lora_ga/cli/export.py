"""`lora-ga export`: turns a trained adapter into a smaller one, a full model, or one that another program reads."""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

from lora_ga.cli.options import at_least, did_you_mean, option, refuse_adapter, require
from lora_ga.cli.parsing import OptionParser
from lora_ga.files import ADAPTER, adapters_in
from lora_ga.version import dtype_setting

USAGE = "lora-ga export ADAPTER (--output FOLDER (--rank K | --merge) | --for PROGRAM [--output FOLDER]) [options]"

DESCRIPTION = """\
Turn a trained adapter into another form. After LoRA-GA training with rank r the adapter file has rank 2r. It is plain
LoRA for the unchanged base model and can be used without an export. --rank K writes the nearest adapter of rank K and
shows the error of each layer. --merge writes a full model, with the tokenizer if there is one. --for vllm (or sglang,
llama.cpp, mlx-lm) lists what keeps the program from reading the adapter as PEFT does; with --output it writes one that
the program reads right. PEFT, Transformers, lm-eval and mergekit need no export.

example:
  lora-ga export runs/mrpc --output small --rank 8
  lora-ga export runs/mrpc/adapter --output merged --merge
  lora-ga export runs/mrpc/adapter --for vllm
"""

# The relative error of a layer's change from which a compressed adapter gets a word of warning.
NOTABLE_ERROR = 0.05
# A shape in torch's errors.
SHAPE = re.compile(r"torch\.Size\(\[([^]]*)\]\)")


@dataclass
class ExportOptions:
    """The form to write."""

    output: str = option("", "new or empty folder for the result (required, unless --for is only to check)")
    rank: int | None = option(None, "compress the adapter to this rank, by the SVD of each layer's change")
    merge: bool = option(False, "write the full model with the adapter merged into its weights")
    model: str | None = option(
        None, "with --merge: the base model, a hub name or local folder (default: the one the adapter names)"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "with --merge: precision of the merged weights; auto is the base model's"
    )

    def __post_init__(self) -> None:
        at_least(self, rank=1)

    def check(self) -> None:
        """Refuses options that exclude each other.

        Raises:
            ValueError: Some do.
        """
        require(self, "output", config=False)
        if (self.rank is None) == (not self.merge):
            found = "neither was" if self.rank is None else "both were"
            raise ValueError(
                f"Choose what to make: --rank K (a smaller adapter) or --merge (a full model); {found} given. "
                "--for PROGRAM makes one that another program reads."
            )
        if not self.merge and (self.model is not None or self.dtype != "auto"):
            raise ValueError("--model and --dtype belong to --merge, but --rank was given. Leave them out.")


def main(argv: list[str]) -> int:
    """Writes the adapter or model that the options name."""
    parser = OptionParser((ExportOptions,), prog="lora-ga export", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a run, or of any adapter")
    parser.add_argument(
        "--for",
        dest="reader",
        metavar="PROGRAM",
        help="a program to check the adapter for, or to write one for: vllm, sglang, llama.cpp, mlx-lm",
    )
    (options,), positional = parser.parse(argv)
    if positional.reader is None:
        options.check()
    elif options.merge:
        raise ValueError(
            "--for checks adapters, and --merge makes a full model, which any program reads. Leave one out."
        )
    adapter, out = adapter_of(Path(positional.adapter)), Path(options.output)
    if not (adapter / "adapter_config.json").is_file():
        inside = adapters_in(adapter)
        advice = (
            f"Give one of these: {', '.join(map(str, inside))}."
            if inside
            else ("Give the folder that save_pretrained wrote, or that of a run of `lora-ga train`.")
        )
        raise FileNotFoundError(
            f"{adapter}: there is no adapter (no adapter_config.json).{did_you_mean(adapter)} {advice}"
        )
    if options.model is not None:
        refuse_adapter(options.model)
    if positional.reader is not None:
        return prepare(adapter, options, positional.reader)
    if options.merge:
        merge(adapter, out, options)
    else:
        compress(adapter, out, options.rank)
    return 0


def adapter_of(folder: Path) -> Path:
    """The adapter of a run's folder, or the folder itself."""
    inner = folder / ADAPTER
    return inner if (inner / "adapter_config.json").is_file() else folder


def compress(adapter: Path, out: Path, rank: int) -> None:
    """Writes an adapter of lower rank and prints the error of each layer."""
    from lora_ga.export.compress import compress_adapter

    companions = partial(copy_companions, adapter)
    show_written(adapter, out, compress_adapter(adapter, out, rank, companions=companions))


def show_written(adapter: Path, out: Path, errors: dict[str, float]) -> None:
    """Prints the error of each layer of a written adapter."""
    from lora_ga.cli.terminal import as_rich, terminal
    from lora_ga.experiments.tables.table import Table

    written = json.loads((out / "adapter_config.json").read_text())
    rank = written["lora_parameters"]["rank"] if "lora_parameters" in written else written["r"]
    if not any(errors.values()):
        print(f"{out}: rank {rank}; nothing is lost")
        return
    rows = [[name, percent(error)] for name, error in errors.items()]
    terminal().print(as_rich(Table(["layer", "relative error of its change"], rows)))
    worst = max(errors, key=lambda name: errors[name])
    middle = median(errors.values())
    print(f"{out}: rank {rank}; median error {percent(middle)}, worst {percent(errors[worst])} ({worst})")
    if middle > NOTABLE_ERROR:
        full = json.loads((adapter / "adapter_config.json").read_text())["r"]
        print(
            f"That is the part of each layer's trained change that rank {rank} cannot hold, {percent(middle)} in the "
            f"median layer. Evaluate the result before you use it. The adapter as it is, of rank {full}, loses nothing."
        )


def percent(error: float) -> str:
    """A relative error as a percentage: rounding errors as powers of ten."""
    return f"{error:.1%}" if error >= 0.001 else f"{100 * error:.0e}%" if error else "0%"


def prepare(adapter: Path, options: ExportOptions, name: str) -> int:
    """Prints what keeps a program from reading the adapter right. With --output it writes one that it reads right.

    Returns:
        0 if the program reads the adapter, or the written one, right; 2 otherwise.

    Raises:
        ValueError: The program is not known, or reads the adapter in no form.
    """
    from lora_ga.export.readers import READERS, check_reader, write_for

    verdict = check_reader(adapter, name)
    if options.output:
        out = Path(options.output)
        companions = partial(copy_companions, adapter)
        show_written(adapter, out, write_for(adapter, out, name, options.rank, companions=companions))
        if READERS[name].factor is None:  # not a file of PEFT, so it cannot be checked as one
            base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
            print(f"{out}: written for {name}. Use it with: {READERS[name].usage(out, base)}")
            return 0
        return prepare(out, ExportOptions(), name)
    if options.rank is not None:
        raise ValueError("--rank was given with --for, but no --output to write to. Give both, or neither.")
    for reason in (*verdict.refused, *verdict.fixable):
        print(f"in the way: {reason}")
    if verdict.refused or verdict.fixable:
        command, cure = f"lora-ga export {shlex.quote(str(adapter))}", ""
        if not verdict.refused:
            cure = f" Write one that is: {command} --for {name} --output FOLDER"
        elif verdict.mergeable:
            cure = f" Merge it: {command} --merge --output FOLDER"
        print(f"{adapter}: not read right by {name} as it is.{cure}")
        return 2
    print(f"{adapter}: nothing is in the way. Use it with: {verdict.advice}")
    return 0


def copy_companions(adapter: Path, out: Path) -> None:
    """Copies the tokenizer and the names of the classes to another adapter folder, if there are any."""
    from lora_ga.files import LABELS

    tokenizer = find_tokenizer([str(adapter)])
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    if (adapter / LABELS).is_file():
        shutil.copyfile(adapter / LABELS, out / LABELS)  # without its permissions


def merge(adapter: Path, out: Path, options: ExportOptions) -> None:
    """Writes the base model with the adapter merged into its weights.

    Raises:
        ValueError: The output is not empty, the base model cannot be loaded, or the adapter does not fit it.
        RuntimeError: torch or PEFT fails in another way.
    """
    from lora_ga.cli.terminal import loading
    from lora_ga.files import check_empty

    check_empty(out)
    loading(f"{adapter} and its base model")
    name, base = load_base(adapter, options)
    from lora_ga.export.merge import fit_vocabulary, merge_adapter

    fit_vocabulary(base, adapter)
    tokenizer = find_tokenizer([str(adapter), name])
    if tokenizer is not None and base.config.pad_token_id is None:
        base.config.pad_token_id = tokenizer.pad_token_id  # a classifier cannot read a padded batch without it
    try:
        companions = (lambda _: None) if tokenizer is None else tokenizer.save_pretrained
        merge_adapter(adapter, out, base=base, companions=companions)
    except RuntimeError as error:
        mismatch = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), None)
        if mismatch is None:
            raise
        raise ValueError(
            f"{adapter}: does not fit {name} ({mismatch}). {advice_of(adapter, base, mismatch)}"
        ) from error
    print(f"{out}: {name} with the adapter merged in" + ("" if tokenizer else "; no tokenizer was found to go with it"))


def advice_of(adapter: Path, base: Any, mismatch: str) -> str:
    """What to do about an adapter that does not fit a base model.

    Args:
        adapter: The adapter's folder.
        base: The base model.
        mismatch: torch's line about a tensor, with the saved shape and that of the model.

    Returns:
        The end of an error message.
    """
    from lora_ga.base import embeddings
    from lora_ga.files import LABELS

    saved, own = ([int(size) for size in shape.split(",") if size.strip()] for shape in SHAPE.findall(mismatch))
    differing = [(one, other) for one, other in zip(saved, own, strict=False) if one != other]
    if differing in [[(size, len(end.weight))] for end in embeddings(base) for size in saved if hasattr(end, "weight")]:
        return (
            f"It was trained with a vocabulary of {differing[0][0]} tokens, and does not hold all of the embedding and "
            "the head. Save the base model as it was before training, with these tokens and their weights "
            f"(resize_token_embeddings({differing[0][0]})), and give that folder by --model."
        )
    if differing[:1] == [(saved[0], base.config.num_labels)] and not (adapter / LABELS).is_file():
        return (
            f"It has {saved[0]} classes, and there is no {LABELS} that names them. Copy that of the finished run's "
            f'adapter into {adapter}, or write one: {{"0": "name of the first class", "1": ...}}.'
        )
    return "Give its base model by --model."


def load_base(adapter: Path, options: ExportOptions) -> tuple[str, Any]:
    """Loads the base model, with the classes named in the adapter folder.

    Returns:
        The name of the model, and the model.

    Raises:
        ValueError: The adapter names no base model or an unknown task, or the model cannot be loaded.
    """
    import transformers

    from lora_ga.adapter import load
    from lora_ga.cli.models import load_pretrained
    from lora_ga.cli.tasks import TASK_CLASSES
    from lora_ga.export.saved_adapter import read_adapter

    config, _ = read_adapter(adapter)
    name = options.model or config.base_model_name_or_path
    if not name:
        raise ValueError(f"{adapter}: the adapter does not name its base model. Give it by --model.")
    classes = {task.peft_type: task.model_class for task in TASK_CLASSES.values()}
    if config.task_type not in classes:
        raise ValueError(
            f"{adapter}: its task type is {config.task_type}, but --merge knows {', '.join(classes)}. "
            "Load its base model in Python and call lora_ga.export.merge.merge_adapter."
        )
    loader = getattr(transformers, classes[config.task_type])
    return name, load.load_base(partial(load_pretrained, loader, name, **dtype_setting(options.dtype)), adapter)


def find_tokenizer(sources: list[str]) -> Any:
    """Loads the first tokenizer that there is.

    A folder without a tokenizer is passed over. A tokenizer that cannot be loaded is passed over with a warning: what
    is exported is complete without it.

    Args:
        sources: Local folders or hub names, in this order.

    Returns:
        The tokenizer, or None.
    """
    import transformers

    from lora_ga.cli.terminal import warn

    for source in sources:
        if Path(source).is_dir() and not (Path(source) / "tokenizer_config.json").is_file():
            continue
        try:
            return transformers.AutoTokenizer.from_pretrained(source)
        # No such tokenizer on the hub, no connection, an unknown class, a package that is not installed, a damaged
        # file. For the last the package tokenizers raises Exception itself.
        except Exception as error:
            warn(f"{source}: the tokenizer could not be loaded and is left out ({error}).")
    return None
