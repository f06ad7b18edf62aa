"""`lora-ga export`: a smaller adapter, a full model, or one that a server takes, of a trained adapter."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from lora_ga.cli.options import at_least, option, require
from lora_ga.cli.parsing import OptionParser

USAGE = "lora-ga export ADAPTER (--output FOLDER (--rank K | --merge) | --for SERVER [--output FOLDER]) [options]"

DESCRIPTION = """\
Make something else of a trained adapter. After LoRA-GA training with rank r the adapter file has rank 2r: it is plain
LoRA for the untouched base model, and needs no export to be used. --rank K writes the nearest adapter of rank K and
shows what each layer loses; --merge writes a full model, with the tokenizer if there is one. --for vllm says what keeps
vLLM from serving the adapter; with --output it writes one that is served, of an allowed rank.

example:
  lora-ga export runs/mrpc/adapter --output small --rank 8
  lora-ga export runs/mrpc/adapter --output merged --merge
  lora-ga export runs/mrpc/adapter --for vllm
"""


@dataclass
class ExportOptions:
    """What to make of an adapter."""

    output: str = option("", "new or empty folder for the result (required)")
    rank: int | None = option(None, "compress the adapter to this rank, by the SVD of each layer's change")
    merge: bool = option(False, "write the full model with the adapter merged into its weights")
    model: str | None = option(
        None, "with --merge: the base model, a hub name or local folder (default: the one the adapter names)"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "with --merge: precision of the merged weights; auto is the base model's own"
    )

    def __post_init__(self) -> None:
        at_least(self, rank=1)

    def check(self) -> None:
        """Refuses options that do not go together.

        Raises:
            ValueError: there are some.
        """
        require(self, "output")
        if (self.rank is None) == (not self.merge):
            found = "neither was" if self.rank is None else "both were"
            raise ValueError(
                f"Choose what to make: --rank K (a smaller adapter) or --merge (a full model); {found} given."
            )
        if not self.merge and (self.model is not None or self.dtype != "auto"):
            raise ValueError("--model and --dtype belong to --merge, but --rank was given. Leave them out.")


def main(argv: list[str]) -> int:
    """Writes the smaller adapter or the merged model."""
    parser = OptionParser((ExportOptions,), prog="lora-ga export", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter: DIR/adapter of a run, or any other")
    parser.add_argument(
        "--for", dest="server", metavar="SERVER", help="a server to check the adapter for, or to write one for: vllm"
    )
    options, positional = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    if positional.server is None:
        options.check()
    elif options.merge:
        raise ValueError(
            "--for checks adapters, and --merge makes a full model, which any server takes. Leave one out."
        )
    adapter, out = Path(positional.adapter), Path(options.output)
    if not (adapter / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{adapter}: there is no adapter (no adapter_config.json). Give the folder that save_pretrained wrote, "
            "for a run of `lora-ga train` its adapter folder."
        )
    if positional.server is not None:
        return serve(adapter, options, positional.server)
    if options.merge:
        merge(adapter, out, options)
    else:
        compress(adapter, out, options.rank)
    return 0


def compress(adapter: Path, out: Path, rank: int) -> None:
    """Writes the adapter of a lower rank and shows the loss of each layer."""
    from lora_ga.export.compress import compress_adapter

    show_written(adapter, out, compress_adapter(adapter, out, rank))


def show_written(adapter: Path, out: Path, errors: dict[str, float]) -> None:
    """Shows the loss of each layer of an adapter that was written anew."""
    from lora_ga.cli.terminal import as_rich, terminal
    from lora_ga.experiments.tables.table import Table

    copy_companions(adapter, out)
    rank = json.loads((out / "adapter_config.json").read_text())["r"]
    rows = [[name, f"{error:.2e}"] for name, error in errors.items()]
    terminal().print(as_rich(Table(["layer", "what is lost of its change (relative)"], rows)))
    worst = max(errors, key=lambda name: errors[name])
    print(f"{out}: rank {rank}; median error {median(errors.values()):.2e}, worst {errors[worst]:.2e} ({worst})")


def serve(adapter: Path, options: ExportOptions, server: str) -> int:
    """Says what keeps a server from taking the adapter, and writes one that it takes where told to.

    Returns:
        0 if the server takes the adapter, or the one written; 2 otherwise.

    Raises:
        ValueError: the server is not known, or takes the adapter in no form.
    """
    from lora_ga.export.vllm import check_served, write_served

    verdict = check_served(adapter, server)
    if options.output:
        show_written(adapter, Path(options.output), write_served(adapter, options.output, server, options.rank))
        return serve(Path(options.output), ExportOptions(), server)
    if options.rank is not None:
        raise ValueError("--rank was given with --for, but no --output to write to. Give both, or neither.")
    for reason in (*verdict.refused, *verdict.fixable):
        print(f"in the way: {reason}")
    if verdict.refused or verdict.fixable:
        cure = "" if verdict.refused else f" Write one that is: lora-ga export {adapter} --for {server} --output FOLDER"
        print(f"{adapter}: not served by {server} as it is.{cure}")
        return 2
    print(f"{adapter}: nothing is in the way. Serve it with: {verdict.advice}")
    return 0


def copy_companions(adapter: Path, out: Path) -> None:
    """Copies the tokenizer and the names of the classes beside an adapter, where there are any."""
    from lora_ga.cli.checkpoints import LABELS

    tokenizer = find_tokenizer([str(adapter)])
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    if (adapter / LABELS).is_file():
        shutil.copy(adapter / LABELS, out)


def merge(adapter: Path, out: Path, options: ExportOptions) -> None:
    """Writes the base model with the adapter in its weights.

    Raises:
        ValueError: the output is not empty, the base model cannot be loaded, or the adapter does not fit it.
    """
    from lora_ga.export.merge import merge_adapter
    from lora_ga.files import check_empty

    check_empty(out)
    name, base = load_base(adapter, options)
    tokenizer = find_tokenizer([str(adapter), name])
    if tokenizer is not None and base.config.pad_token_id is None:
        base.config.pad_token_id = tokenizer.pad_token_id  # a classifier cannot read a padded batch without it
    try:
        merge_adapter(adapter, out, base=base)
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines() if "mismatch" in line), str(error))
        raise ValueError(f"{adapter}: does not fit {name} ({first}). Give its base model by --model.") from error
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    print(f"{out}: {name} with the adapter merged in" + ("" if tokenizer else "; no tokenizer was found to go with it"))


def load_base(adapter: Path, options: ExportOptions) -> tuple[str, Any]:
    """Loads the base model, with the classes that the adapter's folder names.

    Returns:
        Its name, and the model.

    Raises:
        ValueError: the adapter names no base model, is for an unknown task, or the model cannot be loaded.
    """
    import transformers

    from lora_ga.cli.checkpoints import LABELS
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
            "Merge it with lora_ga.export.merge_adapter and a base model of your own."
        )
    settings: dict[str, Any] = {"dtype": options.dtype}
    if (adapter / LABELS).is_file():
        names = {int(number): label for number, label in json.loads((adapter / LABELS).read_text()).items()}
        settings |= {"id2label": names, "label2id": {label: number for number, label in names.items()}}
    return name, load_pretrained(getattr(transformers, classes[config.task_type]), name, **settings)


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
        # OSError: no such tokenizer on the hub, or no connection. ValueError: a damaged file, or an unknown class.
        # ImportError: it needs a package that is not installed.
        except (OSError, ValueError, ImportError) as error:
            warn(f"{source}: the tokenizer could not be loaded and is left out ({error}).")
    return None
