"""The tokenizer, the base model and the adapter on it."""

from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from lora_ga.cli.data import Labels
from lora_ga.cli.options import AdapterOptions, ModelOptions, TargetOptions

DEFAULT_LENGTH = 512
PEFT_HEADS = {"classifier", "score"}  # trained and saved by PEFT for every classification task


def load_pretrained(loader: Any, model: str, **settings: Any) -> Any:
    """`loader.from_pretrained`, with Transformers' own reasons where it fails.

    Returns:
        What it loads.

    Raises:
        ValueError: the model cannot be found, reached or read.
    """
    try:
        return loader.from_pretrained(model, **settings)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"--model {model}: {loader.__name__} could not load it ({error}). "
            "Give the name of a model on the hub, or a local folder with a model and its tokenizer."
        ) from error


def load_tokenizer(model: str) -> Any:
    """Loads a tokenizer; one without a padding token pads with the token that ends a text.

    Returns:
        The tokenizer.

    Raises:
        ValueError: it cannot be loaded, or has neither of the two tokens.
    """
    tokenizer = load_pretrained(transformers.AutoTokenizer, model)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"--model {model}: its tokenizer has neither a padding token nor one that ends a text, so no batch can "
                "be made. Set pad_token in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def length_limit(model: str, tokenizer: Any, wanted: int | None) -> int:
    """Settles the most tokens of an example.

    Returns:
        What was asked for; else 512, or what the model can read if that is less.

    Raises:
        ValueError: the model cannot read as many as asked for.
    """
    config = load_pretrained(transformers.AutoConfig, model)
    positions = getattr(config, "max_position_embeddings", None)
    if wanted is None:
        return min(DEFAULT_LENGTH, tokenizer.model_max_length, positions or DEFAULT_LENGTH)
    if positions is not None and wanted > positions:
        raise ValueError(f"--max_length {wanted}: {model} reads at most {positions} tokens. Ask for at most that many.")
    return wanted


def load_base(
    options: ModelOptions, model_class: str, tokenizer: Any, labels: Labels | None, *, trains_all: bool = False
) -> Any:
    """The base model, in training precision, a new head drawn from the seed.

    Args:
        options: Which model, its precision and the seed.
        model_class: Transformers' class.
        tokenizer: Its padding token is told to the model.
        labels: The classes, for a classification head.
        trains_all: Every weight will be trained, so float32 even where the arithmetic is bfloat16.

    Returns:
        The model, on the CPU.

    Raises:
        ValueError: it cannot be loaded.
    """
    transformers.set_seed(options.seed)
    settings: dict[str, Any] = {
        "dtype": torch.bfloat16 if options.dtype == "bfloat16" and not trains_all else torch.float32
    }
    if labels is not None:
        settings |= {
            "num_labels": len(labels.names),
            "id2label": dict(enumerate(labels.names)),
            "label2id": {name: number for number, name in enumerate(labels.names)},
            "ignore_mismatched_sizes": True,  # a head for other classes is replaced
        }
    model = load_pretrained(getattr(transformers, model_class), options.model, **settings)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if model_class == "AutoModelForCausalLM":
        check_causal(model, options.model)
    if options.gradient_checkpointing:
        # The name before Transformers 5.23, and since.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def check_causal(model: Any, name: str) -> None:
    """Refuses a model that sees the tokens it is to predict, as an encoder under a language head does.

    Raises:
        ValueError: the logits at a position depend on a later one.
    """
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]])  # alike but for the last
    with torch.no_grad():
        before, after = model.eval()(input_ids=ids).logits[:, :-1].float()
    if not torch.allclose(before, after, rtol=1e-2, atol=1e-3 * float(before.abs().max())):
        raise ValueError(
            f"--model {name}: a {type(model).__name__} that sees later tokens, so it cannot learn to continue text. "
            "Give a decoder for --task causal-lm, or another task."
        )


def new_heads(base: Any) -> list[str]:
    """The top-level modules with weights beside the encoder: a classification head under whatever name."""
    return [
        name
        for name, child in base.named_children()
        if name != base.base_model_prefix and any(True for _ in child.parameters())
    ]


def add_adapter(base: Any, target: TargetOptions, adapter: AdapterOptions, peft_type: str) -> PeftModel:
    """Adds a plain LoRA adapter; a classification head is trained in full, by `modules_to_save`.

    Returns:
        The PEFT model.

    Raises:
        ValueError: no layer has one of the target names.
    """
    heads = [name for name in new_heads(base) if name not in PEFT_HEADS] if peft_type == "SEQ_CLS" else []
    config = LoraConfig(
        task_type=peft_type,
        r=target.rank,
        lora_alpha=adapter.alpha,
        use_rslora=adapter.use_rslora,
        lora_dropout=adapter.lora_dropout,
        target_modules=target.targets,
        modules_to_save=heads or None,
    )
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise ValueError(f"--target_modules {' '.join(target.target_modules)}: {error}") from error


def train_in_float32(model: torch.nn.Module) -> None:
    """Lifts trained weights that were loaded in bfloat16: an optimiser step would be lost in its rounding."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
