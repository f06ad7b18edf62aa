"""The options of `lora-ga train` and `lora-ga estimate`: dataclasses that check their values.

The parser shows the help text of each field and its default. This module imports nothing slow.
"""

import contextlib
import re
import shlex
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_ga.cli.settings import START, estimate_settings, library_config, settings_as_options
from lora_ga.files import ADAPTER, MODEL_FILES, parse_json

# Where to begin a sweep, by method. With the default size of the start the best rates of LoRA-GA are near those of LoRA
# (docs/evidence.md). With stable_gamma = 16 its authors advise the rates of full fine-tuning (Outsider565/LoRA-GA,
# issue 12).
LEARNING_RATES = {"lora-ga": 2e-4, "lora": 2e-4, "full": 2e-5}


def option(default: Any, text: str) -> Any:
    """Makes a field with a default and a help text. A required option has the default ""; `require` checks it."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def at_least(options: object, **bounds: float) -> None:
    """Refuses a number below its bound. None means that the option was not given.

    Raises:
        ValueError: An option is below its bound.
    """
    for name, bound in bounds.items():
        value = getattr(options, name)
        if value is not None and not value >= bound:
            raise ValueError(f"--{name}: found {value}, but it must be at least {bound}.")


def fraction(options: object, *names: str) -> None:
    """Refuses a fraction outside [0, 1).

    Raises:
        ValueError: An option is outside.
    """
    for name in names:
        value = getattr(options, name)
        if not 0 <= value < 1:
            raise ValueError(f"--{name}: found {value}, but it must be at least 0 and less than 1.")


def require(options: Any, *names: str, config: bool = True) -> None:
    """Refuses required options that have their default, "" or None. `config`: whether there is the option --config.

    Raises:
        ValueError: An option is missing.
    """
    where = " on the command line or in the --config file" if config else ""
    helps = {item.name: str(item.metadata["help"]) for item in fields(options)}
    for name in names:
        if getattr(options, name) in ("", None):
            what = re.sub(r" \(required[^)]*\)", "", helps[name])
            raise ValueError(f"--{name} is missing. Give it{where}: {what}.")


# The kinds of data files.
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


def check_data_file(path: Path) -> None:
    """Refuses a data file that cannot be read, without reading it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The kind of file is not supported, or the file is empty.
    """
    if path.suffix not in DATA_SUFFIXES:
        raise ValueError(
            f"{path}: a data file ends in {', '.join(DATA_SUFFIXES)}; this one ends in {path.suffix!r}. "
            "Plain text is a .txt file, or the column 'text' of one of the others."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such data file.{did_you_mean(path)} Check the path, or give a hub data set by "
            "--dataset."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: holds no rows. Give a file with at least one example.")


def did_you_mean(path: str | Path) -> str:
    """A question after a path that does not exist: the path that is most like it. Empty if there is none."""
    found = Path()
    if Path(path).exists():
        return ""
    for part in Path(path).parts:
        there = [part] if (found / part).exists() else [each.name for each in found.iterdir()] if found.is_dir() else []
        if not (like := get_close_matches(part, there, n=1, cutoff=0.75)):
            return ""
        found /= like[0]
    return f" Did you mean {found}?"


def not_reached(model: str, why: str) -> str:
    """The message for a name that is neither a local folder nor a model that was fetched from the hub before."""
    return (
        f"--model {model}: there is no folder {model}.{did_you_mean(model)} As a name on the hub it is not among the "
        f"models fetched before, and the hub was not reached ({why})."
    )


def refuse_adapter(model: str) -> None:
    """Refuses the folder of an adapter, or of a run with one, in the place of a model's, and says what to do with it.

    Raises:
        ValueError: It is one.
    """
    folder = next((path for path in (Path(model), Path(model) / ADAPTER) if (path / MODEL_FILES[1]).is_file()), None)
    if folder is None or (Path(model) / MODEL_FILES[0]).is_file():
        return
    of = ""
    with contextlib.suppress(ValueError, AttributeError):  # damaged: what to do is the same
        base = parse_json((folder / MODEL_FILES[1]).read_text(encoding="utf-8")).get("base_model_name_or_path")
        of = f" of the base model {base}" if base else ""
    merge = shlex.join(["lora-ga", "export", str(folder), "--merge", "--output"])
    raise ValueError(
        f"--model {model}: this is an adapter{of}, not a model. Give its base model to start a new adapter, or merge "
        f"this one into it first: {merge} FOLDER. To train this one further with `lora-ga train`, give its base model "
        f"and --from_adapter {shlex.quote(str(folder))}."
    )


def check_model_folder(model: str) -> None:
    """Refuses a name that can only be a local folder, if there is no such folder, and a folder without a model.

    Names on the hub are NAME and OWNER/NAME. With the hub switched off, only those that were fetched before are.

    Raises:
        FileNotFoundError: There is no such folder, or no model in it.
        ValueError: It holds an adapter.
    """
    refuse_adapter(model)
    folder = Path(model)
    if not folder.exists():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", model):
            raise FileNotFoundError(
                f"--model {model}: there is no folder {model}.{did_you_mean(model)} Check the path, or give the name "
                "of a model on the hub."
            )
        from huggingface_hub import constants, try_to_load_from_cache

        fetched = any(isinstance(try_to_load_from_cache(model, name), str) for name in MODEL_FILES)
        if constants.HF_HUB_OFFLINE and not fetched:
            raise FileNotFoundError(not_reached(model, "HF_HUB_OFFLINE is set"))
    if folder.is_dir() and not (folder / MODEL_FILES[0]).is_file():
        raise FileNotFoundError(
            f"--model {model}: this folder holds no model (no config.json). Give the folder that save_pretrained wrote."
        )


@dataclass
class ModelOptions:
    """The model and the task."""

    _argument_group_name: ClassVar[str] = "model and task"

    model: str = option("", "model to start from: a name on the Hugging Face hub or a local folder (required)")
    task: Literal["seq-cls", "causal-lm", "seq2seq"] = option(
        "",
        "what to learn (required): seq-cls classifies texts, with a new head that is trained in full; "
        "causal-lm continues text; seq2seq maps a text to a text with an encoder and a decoder",
    )
    dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "bfloat16 computes in mixed precision: frozen weights are in bfloat16, trained weights in float32",
    )
    load_in_4bit: bool = option(
        False,
        "QLoRA: frozen weights in 4 bits (nf4 with double quantisation; needs bitsandbytes), arithmetic in --dtype",
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass instead of keeping them")
    seed: int = option(0, "seed of a new head, the adapter, the choice of estimation batches and the order of the data")

    def __post_init__(self) -> None:
        require(self, "model", "task")
        at_least(self, seed=0)


@dataclass
class DataOptions:
    """The examples and their columns."""

    _argument_group_name: ClassVar[str] = "data"

    train_file: str | None = option(
        None, "local training file: .jsonl, .json, .csv, .tsv, .parquet, or .txt: one text, in the column text"
    )
    dataset: str | None = option(None, "data set on the Hugging Face hub, instead of a training file")
    dataset_config: str | None = option(None, "configuration of that data set, for instance mrpc of nyu-mll/glue")
    train_split: str = option("train", "split of that data set to train on")
    text_column: str = option("text", "column with the text (seq-cls, and causal-lm without prompts)")
    text_pair_column: str | None = option(None, "column with the second text of a pair (seq-cls)")
    label_column: str = option("label", "column with the class: integers or strings (seq-cls)")
    messages_column: str | None = option(
        None,
        "column with conversations, lists of messages with role and content (causal-lm; needs TRL). Data without the "
        "text column may have the columns messages, or prompt and completion: they are found by themselves",
    )
    chat_template: str | None = option(
        None, "Jinja file with the chat template, in the place of the model's own (conversations)"
    )
    assistant_only_loss: bool = option(
        False, "in conversations learn the assistant's turns only; the chat template must mark them"
    )
    prompt_column: str | None = option(
        None,
        "column with the given text (seq2seq), or text or messages whose tokens carry no loss (causal-lm; needs TRL); "
        "needs --target_column",
    )
    target_column: str | None = option(
        None, "column with the text to learn. It follows the prompt directly; put the space between them into either"
    )
    max_length: int | None = option(
        None,
        "largest number of tokens of an example (default: 512, or the model's limit if that is less). Longer pairs and "
        "prompts are cut at the end; a longer plain text in causal-lm is split into several examples",
    )
    on_bad_row: Literal["error", "drop"] = option(
        "error",
        "a row with an empty text, target or label, or with a message without content: error stops and names the line; "
        "drop leaves it out and counts",
    )
    batch_size: int = option(8, "examples in a batch")

    def __post_init__(self) -> None:
        at_least(self, max_length=2, batch_size=1)
        if (self.train_file is None) == (self.dataset is None):
            found = "neither was" if self.train_file is None else "both were"
            raise ValueError(f"Give either --train_file or --dataset; {found} given.")
        if self.dataset_config is not None and self.dataset is None:
            raise ValueError("--dataset_config belongs to --dataset, but a --train_file was given. Leave it out.")
        if (self.prompt_column is None) != (self.target_column is None):
            given, missing = ("prompt", "target") if self.target_column is None else ("target", "prompt")
            raise ValueError(f"--{given}_column was given without --{missing}_column. Give both, or neither.")
        if self.messages_column is not None and self.prompt_column is not None:
            raise ValueError("Give either --messages_column or --prompt_column and --target_column, not both.")


@dataclass
class TargetOptions:
    """The layers with an adapter, and its rank."""

    _argument_group_name: ClassVar[str] = "adapter"

    rank: int = option(8, "rank r of the adapter; LoRA-GA needs 2r directions of each layer's gradient")
    target_modules: list[str] = option(  # noqa: RUF009 (it makes a default_factory)
        ["all-linear"], "names of the layers to adapt (last parts of their names), or all-linear"
    )
    target_parameters: list[str] | None = option(  # noqa: RUF009 (a default of None)
        None, "names of parameters to adapt that are no layers (last parts of their names): experts.down_proj"
    )

    def __post_init__(self) -> None:
        at_least(self, rank=1)

    @property
    def targets(self) -> str | list[str]:
        """The value of PEFT's `target_modules`: the word "all-linear", or a list of names."""
        return "all-linear" if self.target_modules == ["all-linear"] else self.target_modules


@dataclass
@settings_as_options(START)
class AdapterOptions:
    """The scaling of the adapter, and where LoRA-GA starts it."""

    _argument_group_name: ClassVar[str] = "adapter scaling and start"

    alpha: float = option(16.0, "LoRA alpha")
    use_rslora: bool = option(True, "scale by alpha / sqrt(rank), the LoRA-GA paper's choice, and not by alpha / rank")
    lora_dropout: float = option(0.0, "dropout probability of the adapter's inputs")

    def __post_init__(self) -> None:
        fraction(self, "lora_dropout")
        if not self.alpha > 0:
            raise ValueError(f"--alpha: found {self.alpha}, but it must be greater than 0.")
        library_config(self)  # checks the settings


@dataclass
@settings_as_options(estimate_settings())
class EstimateOptions:
    """How the gradient is estimated."""

    _argument_group_name: ClassVar[str] = "gradient estimate (lora-ga)"

    if TYPE_CHECKING:  # the type checker does not see what the decorator adds
        estimate_batches: int | Literal["auto"] | None = "auto"

    estimate_batch_size: int | None = option(None, "examples in each batch of the estimate (default: the batch size)")

    def __post_init__(self) -> None:
        at_least(self, estimate_batch_size=1)
        library_config(self)  # checks the settings


@dataclass
class TrainingOptions:
    """How to train, and what to write."""

    _argument_group_name: ClassVar[str] = "training"

    output_dir: str = option("", "folder of the run; it must be new or empty (required)")
    method: Literal["lora-ga", "lora", "full"] = option(
        "lora-ga",
        "lora-ga starts the adapter from the gradient, lora starts it as PEFT does, full trains every weight. lora has "
        "the scaling of lora-ga, for a fair comparison: with --use_rslora false both have plain LoRA's, alpha / rank",
    )
    estimate_file: str | None = option(
        None, "lora-ga: an estimate file, or the folder of another run, instead of a new estimate"
    )
    from_adapter: str | None = option(
        None,
        "folder of a trained adapter of --model, or of a run: train it further, instead of a new adapter. It keeps its "
        "layers, rank and scaling; the optimizer and the schedule begin anew",
    )
    learning_rate: float | Literal["auto"] | None = option(
        None,
        "peak learning rate (default: "
        + ", ".join(f"{rate:g} for {method}" for method, rate in LEARNING_RATES.items())
        + "). The best rate depends on model and method: sweep it for each of them. auto looks for one before "
        "training, in 20 to 40 steps for each 200 of the run, five times at most (not for full)",
    )
    epochs: float = option(1.0, "passes over the training data")
    max_steps: int | None = option(None, "optimizer steps, instead of --epochs")
    gradient_accumulation_steps: int = option(1, "batches in one optimizer step")
    warmup_ratio: float = option(0.03, "share of the steps over which the learning rate rises from 0")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt"] = option(
        "cosine", "schedule of the learning rate after the warm-up (constant has no warm-up)"
    )
    weight_decay: float = option(0.0, "weight decay of AdamW")
    eval_file: str | None = option(None, "local file to evaluate on, with the same columns")
    eval_split: str | None = option(None, "split of --dataset to evaluate on")
    eval_steps: int | None = option(None, "steps between evaluations (default: only at the end)")
    logging_steps: int = option(10, "steps between log entries of the training loss")
    save_steps: int = option(
        500, "steps between checkpoints; one more is written at the end, and the last two are kept"
    )
    report_to: list[str] = option(  # noqa: RUF009 (it makes a default_factory)
        ["none"], "where else to log, for instance tensorboard or wandb"
    )
    run_name: str | None = option(None, "name of the run in reports and comparisons (default: the method)")
    resume: bool = option(
        False,
        "resume the unfinished run in --output_dir from its last checkpoint, with the options of its config.yaml",
    )

    def __post_init__(self) -> None:
        require(self, "output_dir")
        at_least(self, max_steps=1, gradient_accumulation_steps=1, weight_decay=0.0)
        at_least(self, eval_steps=1, logging_steps=1, save_steps=1)
        fraction(self, "warmup_ratio")
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[self.method]
        if self.learning_rate == "auto" and self.method == "full":
            raise ValueError("--learning_rate auto is for adapters, but the method is full. Give a number.")
        for name in ("learning_rate", "epochs"):
            value = getattr(self, name)
            if value not in (None, "auto") and not value > 0:
                raise ValueError(f"--{name}: found {value}, but it must be greater than 0.")
        if self.estimate_file is not None and self.method != "lora-ga":
            raise ValueError(f"--estimate_file belongs to --method lora-ga, but the method is {self.method}.")
        if self.from_adapter is not None and self.method == "full":
            raise ValueError("--from_adapter trains an adapter further, but the method is full. Leave one of them out.")
        if self.from_adapter is not None and self.estimate_file is not None:
            raise ValueError(
                "--estimate_file starts a new adapter, --from_adapter has its start. Leave one of them out."
            )
        if self.eval_steps is not None and self.eval_file is None and self.eval_split is None:
            raise ValueError("--eval_steps was given, but nothing to evaluate on. Give --eval_file or --eval_split.")


def check_inputs(model: ModelOptions, data: DataOptions) -> None:
    """Refuses local inputs that do not exist.

    Raises:
        FileNotFoundError: The model's folder, the data file or the chat template does not exist.
        ValueError: The model is an adapter, or the data file is of another kind or empty.
    """
    check_model_folder(model.model)
    if data.chat_template is not None and not Path(data.chat_template).is_file():
        raise FileNotFoundError(f"--chat_template {data.chat_template}: there is no such file.")
    if data.train_file is not None:
        check_data_file(Path(data.train_file))


@dataclass(frozen=True)
class Job:
    """All options of `lora-ga train`."""

    model: ModelOptions
    data: DataOptions
    target: TargetOptions
    adapter: AdapterOptions
    estimate: EstimateOptions
    training: TrainingOptions

    GROUPS: ClassVar[tuple[type, ...]] = tuple(
        [ModelOptions, DataOptions, TargetOptions, AdapterOptions, EstimateOptions, TrainingOptions]
    )

    def __post_init__(self) -> None:
        """Checks options of different groups against each other.

        Raises:
            ValueError: The evaluation data does not fit the training data, or has two sources; or every weight is to be
                trained in 4 bits, or to change.
        """
        training = self.training
        if self.model.load_in_4bit and training.method == "full":
            raise ValueError(
                "--load_in_4bit freezes the weights, but --method full trains them. Leave it out, or train an adapter."
            )
        if self.model.load_in_4bit and training.method == "lora-ga" and vars(self.adapter)["offset"] == "base":
            raise ValueError(
                "--offset base changes the base model's weights, which --load_in_4bit quantises. Leave one of them out."
            )
        if training.eval_split is not None and self.data.dataset is None:
            raise ValueError("--eval_split belongs to --dataset, but a --train_file was given. Use --eval_file.")
        if training.eval_split is not None and training.eval_file is not None:
            raise ValueError("Give either --eval_file or --eval_split; both were given.")

    def options(self) -> dict[str, Any]:
        """Every option by name, except `resume`, which does not change the result."""
        groups = (self.model, self.data, self.target, self.adapter, self.estimate, self.training)
        values = {name: value for group in groups for name, value in asdict(group).items()}
        del values["resume"]
        return values

    def unused(self) -> list[str]:
        """The options with another value than the default that the method does not read, or a given file replaces."""
        method, of_estimate = self.training.method, [item.name for item in fields(self.estimate)]
        names: list[str] = []
        if method == "full" or self.training.from_adapter is not None:
            names = [item.name for group in (self.target, self.adapter) for item in fields(group)] + of_estimate
        elif method == "lora":
            names = [*START, *of_estimate]
        elif self.training.estimate_file is not None:
            names = [name for name in of_estimate if name != "on_missing"]
        defaults = {item.name: _default(item) for group in self.GROUPS for item in fields(group)}
        given = self.options()
        return [name for name in names if given[name] != defaults[name]]


def _default(item: Field[Any]) -> Any:
    """The default of an option."""
    return item.default if item.default_factory is MISSING else item.default_factory()
