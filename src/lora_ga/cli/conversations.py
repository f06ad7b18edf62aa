"""Conversations, and prompts with their answers: checks and tokenises them for TRL's SFTTrainer."""

import re
from collections.abc import Mapping
from importlib.metadata import version
from itertools import takewhile
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError

from lora_ga.cli.columns import check_names
from lora_ga.cli.options import DataOptions
from lora_ga.cli.terminal import warn

IGNORED = -100  # the label of a token that carries no loss
# Option → TRL's name of the column.
NAMES = {"prompt_column": "prompt", "target_column": "completion", "messages_column": "messages"}


def check_columns(rows: Dataset, columns: Mapping[str, str], source: str) -> None:
    """Refuses columns that do not exist, or hold neither text nor messages.

    Args:
        rows: The data.
        columns: Option name → column name.
        source: Where the rows come from, for the message.

    Raises:
        ValueError: A column cannot be used.
    """
    check_names(columns, rows.column_names, source)
    for option, column in columns.items():
        for number, value in enumerate(rows[column]):
            conversational = isinstance(value, list) and all(isinstance(one, dict) and "role" in one for one in value)
            if not conversational and (option == "messages_column" or not isinstance(value, str)):
                wanted = "a list of messages, each with a role and its content"
                wanted += "" if option == "messages_column" else ", or text"
                raise ValueError(
                    f"{source}: row {number} of column {column!r} (--{option}) is {value!r:.60}, but must be {wanted}."
                )


def encode(
    rows: Dataset, columns: Mapping[str, str], tokenizer: Any, options: DataOptions, length: int, source: str
) -> Dataset:
    """Tokenises all rows. Tokens and labels are those of TRL's SFTTrainer (version 1.16); a test compares them.

    Args:
        rows: The data, its columns checked.
        columns: Option name → column name.
        tokenizer: The model's tokenizer.
        options: The data options.
        length: Largest number of tokens of an example. Longer examples are cut at the end.
        source: Where the rows come from, for messages.

    Returns:
        Token ids and labels. Rows without a label within `length` tokens are left out.

    Raises:
        ValueError: The rows cannot be formatted, or none is left.
    """
    named = rows.select_columns(list(columns.values())).rename_columns(
        {column: NAMES[option] for option, column in columns.items() if column != NAMES[option]}
    )
    template = chat_template(named[0], tokenizer, options, source)

    def example(row: Mapping[str, Any], number: int) -> dict[str, list[int]]:
        try:
            return tokens_and_labels(row, tokenizer, template, assistant_only=options.assistant_only_loss)
        except (ValueError, TypeError, KeyError, TemplateError) as error:  # what templates and tokenizers raise
            raise ValueError(f"{source}: row {number} cannot be formatted ({error}).") from error

    examples = named.map(
        example,
        with_indices=True,
        remove_columns=named.column_names,
        load_from_cache_file=False,  # its key does not cover the code above
        desc=f"Tokenising {source}",
    )
    if any(starts_early for starts_early in examples["starts_early"]):
        warn(
            f"{source}: in {sum(examples['starts_early'])} of {len(examples)} rows the tokens of the prompt alone are "
            "not the first tokens of prompt and target together. The target is learned from where they differ. End "
            "prompts at a token boundary, or use a chat template that writes a prompt the same in both cases."
        )
    cut = examples.map(
        lambda row: {name: row[name][:length] for name in ("input_ids", "labels")},
        remove_columns="starts_early",
        load_from_cache_file=False,
    ).filter(lambda row: any(label != IGNORED for label in row["labels"]), load_from_cache_file=False)
    if len(cut) == 0:
        raise ValueError(f"{source}: no row has a token to learn within {length} tokens. Raise --max_length.")
    return cut


def chat_template(row: Mapping[str, Any], tokenizer: Any, options: DataOptions, source: str) -> str | None:
    """Chooses the chat template. If the assistant's turns must be marked, it may be TRL's variant of the model's.

    Args:
        row: The first row.
        tokenizer: The model's tokenizer.
        options: The data options.
        source: Where the rows come from, for messages.

    Returns:
        The template; None for the tokenizer's template.

    Raises:
        ValueError: The rows hold messages but there is no template, or none that marks the assistant's turns; or
            `assistant_only_loss` is set for text or with a TRL that is too old for it.
    """
    if not any(isinstance(value, list) for value in row.values()):
        if options.assistant_only_loss:
            raise ValueError(
                f"{source}: --assistant_only_loss needs messages, but the columns hold text. Leave it out."
            )
        return None
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{source}: holds messages, but the model's tokenizer has no chat template to write them with. Give one by "
            "--chat_template FILE, a model made for conversations, or prompts and their targets as text."
        )
    if not options.assistant_only_loss:
        return None
    try:
        from trl import get_training_chat_template
        from trl.chat_template_utils import is_chat_template_stop_token_trained
    except ImportError as error:
        raise ValueError(
            f"--assistant_only_loss needs TRL 1.9 or newer, but TRL {version('trl')} is installed. Run: "
            'pip install --upgrade "trl>=1.9"'
        ) from error

    template = None
    if not re.search(r"{%-?\s*generation\s*-?%}", tokenizer.get_chat_template()):
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError as error:
            raise ValueError(
                f"{source}: --assistant_only_loss needs a chat template that marks the assistant's turns with "
                f"{{% generation %}}. The model's does not, and TRL knows no variant of it that does ({error})."
            ) from error
    if not is_chat_template_stop_token_trained(tokenizer, template):
        warn(
            "the chat template leaves the token that ends the assistant's turn out of the loss, so the model may not "
            "learn to stop. Leave --assistant_only_loss out, or put that token before {% endgeneration %}."
        )
    return template


def tokens_and_labels(
    row: Mapping[str, Any], tokenizer: Any, template: str | None, *, assistant_only: bool
) -> dict[str, Any]:
    """Makes an example of a conversation, or of a prompt and its completion.

    Args:
        row: `messages`, or `prompt` and `completion`, in TRL's names. Each is text or a list of messages.
        tokenizer: The model's tokenizer.
        template: The chat template; None for the tokenizer's template.
        assistant_only: Only the assistant's turns have labels.

    Returns:
        Token ids; labels, which are the ids or -100; and whether the target starts before the prompt's tokens end.

    Raises:
        ValueError: One of prompt and completion is text and the other is not, or the template marks no token as the
            assistant's.
    """

    def tokenise(content: Any, **settings: Any) -> Any:
        if isinstance(content, str):
            return tokenizer(text=content)
        return tokenizer.apply_chat_template(
            content, chat_template=template, tokenize=True, return_dict=True, **settings
        )

    prompt, whole = None, row.get("messages")
    if whole is None:
        prompt, whole = row["prompt"], joined(row["prompt"], row["completion"], tokenizer.eos_token)
    encoded = tokenise(whole, **({"return_assistant_tokens_mask": True} if assistant_only else {}))
    ids = encoded["input_ids"]
    learned = encoded["assistant_masks"] if assistant_only else [1] * len(ids)
    if assistant_only and 1 not in learned:
        raise ValueError("the chat template marks no token as the assistant's")
    start, starts_early = 0, False
    if prompt is not None:
        # They differ before the end of the prompt if a token spans it or the template writes the prompt differently.
        before = tokenise(prompt, add_generation_prompt=True)["input_ids"]
        start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False)))
        starts_early = start < len(before)
    labels = [token if place >= start and learned[place] else IGNORED for place, token in enumerate(ids)]
    return {"input_ids": ids, "labels": labels, "starts_early": starts_early}


def joined(prompt: Any, completion: Any, end: str | None) -> Any:
    """Joins a prompt and its completion. A text ends with one end-of-text token.

    Returns:
        A text or a list of messages.

    Raises:
        ValueError: One is text and the other is not.
    """
    if isinstance(prompt, str) != isinstance(completion, str):
        raise ValueError("prompt and target must both be text, or both be messages")
    if not isinstance(prompt, str) or end is None or completion.endswith(end):
        return prompt + completion
    return prompt + completion + end
