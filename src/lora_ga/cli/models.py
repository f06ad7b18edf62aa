"""Loads the tokenizer and the base model, and adds the adapter."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model

from lora_ga.cli.data import Labels
from lora_ga.cli.options import AdapterOptions, ModelOptions, TargetOptions, not_reached
from lora_ga.layers.kinds import keep_unpacked
from lora_ga.version import dtype_setting

DEFAULT_LENGTH = 512
PEFT_HEADS = {"classifier", "score"}  # PEFT trains and saves these for every classification task


def load_pretrained(loader: Any, model: str, **settings: Any) -> Any:
    """Calls `loader.from_pretrained`, without a bar where there is no terminal, and adds a remedy to its errors.

    Args:
        loader: A class of Transformers.
        model: A hub name or local folder.
        settings: Keyword arguments of `from_pretrained`.

    Returns:
        The loaded object.

    Raises:
        ValueError: The model cannot be found, reached or read.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        return loader.from_pretrained(model, **settings)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError) and not Path(model).exists():
            raise ValueError(not_reached(model, "no connection")) from error
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"--model {model}: {loader.__name__} could not load it ({reason}). "
            "Give the name of a model on the hub, or a local folder with a model and its tokenizer."
        ) from error


def load_tokenizer(model: str) -> Any:
    """Loads a tokenizer. Without a padding token it pads with the end-of-text token.

    Returns:
        The tokenizer.

    Raises:
        ValueError: It cannot be loaded, or has neither of the two tokens.
    """
    tokenizer = load_pretrained(transformers.AutoTokenizer, model)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"--model {model}: its tokenizer has neither a padding token nor an end-of-text token, so batches "
                "cannot be padded. Set pad_token in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def length_limit(model: str, tokenizer: Any, wanted: int | None) -> int:
    """Chooses the largest number of tokens of an example.

    Args:
        model: A hub name or local folder.
        tokenizer: The model's tokenizer.
        wanted: The value of --max_length, or None.

    Returns:
        `wanted`; without it 512, or the model's limit if that is less.

    Raises:
        ValueError: `wanted` is above the model's limit.
    """
    config = load_pretrained(transformers.AutoConfig, model)
    positions = getattr(config, "max_position_embeddings", None)
    if wanted is None:
        return min(DEFAULT_LENGTH, tokenizer.model_max_length, positions or DEFAULT_LENGTH)
    if positions is not None and wanted > positions:
        raise ValueError(f"--max_length {wanted}: {model} reads at most {positions} tokens. Ask for at most that many.")
    return wanted


def check_task(model: str, task: str) -> None:
    """Refuses a model whose kind does not fit the task, and names the task that it fits.

    Raises:
        ValueError: There is no class for the task and the kind of model.
    """
    config = load_pretrained(transformers.AutoConfig, model)
    mappings = {
        "causal-lm": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        "seq2seq": transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        "seq-cls": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    }
    if type(config) in mappings[task]:
        return
    kind = "an encoder-decoder" if config.is_encoder_decoder else f"a model of type {config.model_type}"
    fitting = [name for name in ("seq2seq", "causal-lm", "seq-cls") if type(config) in mappings[name]]
    advice = f"use --task {' or '.join(fitting)}" if fitting else "it fits none of the tasks; give another model"
    raise ValueError(f"--model {model} is {kind}, which --task {task} cannot train: {advice}.")


def check_targets(base: Any, names: list[str]) -> None:
    """Refuses names of layers that the model does not have, and lists those that it has.

    Raises:
        ValueError: There are such names.
    """
    if names == ["all-linear"]:
        return
    joined = next((name for name in names if "," in name), None)
    if joined is not None:
        apart = " ".join(part for name in names for part in name.split(",") if part)
        raise ValueError(
            f"--target_modules {' '.join(names)}: names are separated by spaces, not commas: --target_modules {apart}"
        )
    kinds: dict[tuple[str, str], int] = {}
    for path, module in base.named_modules():
        if hasattr(module, "weight") and module.weight.dim() > 1 and path:
            key = path.rpartition(".")[2], type(module).__name__
            kinds[key] = kinds.get(key, 0) + 1
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path, _ in base.named_modules()):
            listed = ", ".join(f"{last} ({count} {kind})" for (last, kind), count in kinds.items())
            raise ValueError(f"--target_modules {name}: the model has no layer of this name. It has {listed}.")


def check_parameters(base: Any, names: list[str]) -> None:
    """Refuses names of parameters that the model does not have, and lists those that are no weights of layers.

    Raises:
        ValueError: There are such names.
    """
    paths = [path for path, _ in base.named_parameters()]
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            ends = {".".join(path.split(".")[-2:]): None for path in paths if not path.endswith((".weight", ".bias"))}
            listed = (
                f"Those that are no weights of layers: {', '.join(ends)}." if ends else "All are weights of layers."
            )
            raise ValueError(f"--target_parameters {name}: the model has no parameter of this name. {listed}")


def load_base(
    options: ModelOptions, model_class: str, tokenizer: Any, labels: Labels | None, *, trains_all: bool = False
) -> Any:
    """Loads the base model in training precision. The seed initialises a new head.

    Args:
        options: The model, its precision and the seed.
        model_class: The name of Transformers' class.
        tokenizer: The tokenizer; the model gets its padding token.
        labels: The classes, for a classification head.
        trains_all: Every weight will be trained. The weights are then in float32, also for bfloat16 arithmetic.

    Returns:
        The model, on the CPU; in 4 bits on the device to train on.

    Raises:
        ValueError: It cannot be loaded.
    """
    transformers.set_seed(options.seed)
    half = options.dtype == "bfloat16" and not trains_all
    settings = dtype_setting(torch.bfloat16 if half else torch.float32)
    if labels is not None:
        settings |= {
            "num_labels": len(labels.names),
            "id2label": dict(enumerate(labels.names)),
            "label2id": {name: number for number, name in enumerate(labels.names)},
            "ignore_mismatched_sizes": True,  # a head for other classes is replaced
        }
    loader = getattr(transformers, model_class)
    if options.load_in_4bit:
        settings |= four_bits(options, loader, has_new_head=labels is not None)
    model = load_pretrained(loader, options.model, **settings)
    keep_unpacked(model)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if model_class == "AutoModelForCausalLM":
        check_causal(model, options.model)
    if options.gradient_checkpointing:
        # Transformers 5.23 renamed the method.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def four_bits(options: ModelOptions, loader: Any, *, has_new_head: bool) -> dict[str, Any]:
    """The settings of `from_pretrained` that load a model in 4 bits, as QLoRA does.

    A classification head is new and trains in full, so it is not quantised.

    Args:
        options: The model and its precision.
        loader: Transformers' class.
        has_new_head: Whether the model gets a classification head.

    Returns:
        The quantisation, and the device, since the move to it quantises.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--load_in_4bit needs bitsandbytes, which is not installed: pip install bitsandbytes.")
    heads = None
    if has_new_head:
        with torch.device("meta"):
            heads = new_heads(loader.from_config(load_pretrained(transformers.AutoConfig, options.model)))
    quantisation = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if options.dtype == "bfloat16" else torch.float32,
        llm_int8_skip_modules=heads,
    )
    return {"quantization_config": quantisation, "device_map": {"": device()}}


def device() -> torch.device:
    """The accelerator, if there is one; otherwise the CPU."""
    # Without an accelerator torch 2.6 raises an error, and newer builds for CUDA name it all the same.
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def check_causal(model: Any, name: str) -> None:
    """Refuses a model that sees the tokens it must predict, such as an encoder with a language-model head.

    Raises:
        ValueError: The logits at a position depend on a later token.
    """
    # Two rows, equal except for the last token.
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=model.device)
    with torch.no_grad():
        before, after = model.eval()(input_ids=ids).logits[:, :-1].float()
    if not torch.allclose(before, after, rtol=1e-2, atol=1e-3 * float(before.abs().max())):
        raise ValueError(
            f"--model {name}: a {type(model).__name__} sees later tokens, so it cannot learn to continue text. "
            "Give a decoder for --task causal-lm, or another task."
        )


def new_heads(base: Any) -> list[str]:
    """The top-level modules with weights other than the encoder: a classification head of any name."""
    return [
        name
        for name, child in base.named_children()
        if name != base.base_model_prefix and any(True for _ in child.parameters())
    ]


def add_adapter(base: Any, target: TargetOptions, adapter: AdapterOptions, peft_type: str) -> PeftModel:
    """Adds a plain LoRA adapter. A classification head is trained in full, through `modules_to_save`.

    Args:
        base: The base model.
        target: The layers and the rank.
        adapter: The scaling and the dropout.
        peft_type: PEFT's name of the task.

    Returns:
        The PEFT model.

    Raises:
        ValueError: No layer has one of the target names.
    """
    check_targets(base, target.target_modules)
    check_parameters(base, target.target_parameters or [])
    heads = [name for name in new_heads(base) if name not in PEFT_HEADS] if peft_type == "SEQ_CLS" else []
    config = LoraConfig(
        task_type=peft_type,
        r=target.rank,
        lora_alpha=adapter.alpha,
        use_rslora=adapter.use_rslora,
        lora_dropout=adapter.lora_dropout,
        target_modules=target.targets,
        target_parameters=target.target_parameters,
        modules_to_save=heads or None,
    )
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise ValueError(f"--target_modules {' '.join(target.target_modules)}: {error}") from error


def train_in_float32(model: torch.nn.Module) -> None:
    """Converts trained weights to float32: the rounding of bfloat16 would lose small optimizer steps."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
