"""Reads a file or a hub data set, checks and tokenises it, and chooses the batches of an estimate."""

import csv
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from torch.utils.data import DataLoader

from lora_ga.cli.columns import check_names
from lora_ga.cli.options import DataOptions, EstimateOptions, check_data_file
from lora_ga.cli.settings import library_config
from lora_ga.cli.terminal import warn

# Suffix -> reader of the datasets library, and its settings. By default pandas reads "NA" and "None" as missing values.
FILE_TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "delimiter": "\t"}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"sample_by": "document"}),  # one row, with the column text
}


@dataclass(frozen=True)
class Labels:
    """The classes of a task: their names in the order of their ids, and the id of each value in the data."""

    names: tuple[str, ...]
    ids: Mapping[Any, int]


def load_file(path: Path) -> Dataset:
    """Reads a local file.

    Returns:
        Its rows.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The kind of file is not supported, or the file cannot be read or holds no rows.
    """
    check_data_file(path)
    kind, settings = FILE_TYPES[path.suffix]
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it logs what it then raises
    try:
        rows = load_dataset(kind, data_files={"rows": str(path)}, split="rows", **settings)
    except (DatasetGenerationError, ValueError) as error:
        reason = error.__cause__ or error
        if "corresponds to no data" in str(reason):
            raise ValueError(f"{path}: holds no rows. Give a file with at least one example.") from error
        raise ValueError(f"{path}: could not be read as {path.suffix[1:]} ({why_damaged(path) or reason}).") from error
    finally:
        logger.setLevel(level)
    return rows


def why_damaged(path: Path) -> str | None:
    """Why a text file cannot be read, with the line of JSON lines; None if that is not known here."""
    if path.suffix == ".parquet":
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return f"it is not in UTF-8, as byte {error.start} shows; save it in that encoding"
    for number, line in enumerate(text.splitlines() if path.suffix == ".jsonl" else (), start=1):
        try:
            json.loads(line or "null")
        except ValueError as error:
            return f"line {number}: {error}; each line must be one JSON object"
    return None


def load_hub(name: str, config: str | None, split: str) -> Dataset:
    """Reads one split of a hub data set.

    Returns:
        Its rows.

    Raises:
        ValueError: There is no such data set, configuration or split, no connection to the hub, or no row.
    """
    try:
        rows = load_dataset(name, config, split=split)
    except (DatasetNotFoundError, ConnectionError, ValueError) as error:
        raise ValueError(
            f"--dataset {name}, configuration {config}, split {split}: could not be loaded ({error}). "
            "Check the three names, or give a local file by --train_file."
        ) from error
    if len(rows) == 0:
        raise ValueError(f"--dataset {name}, split {split}: holds no rows. Give a split with at least one example.")
    return rows


def check_columns(rows: Dataset, columns: Mapping[str, str], source: str) -> None:
    """Refuses columns that do not exist, or whose values the task cannot use.

    Args:
        rows: The data.
        columns: Option name → column name.
        source: Where the rows come from, for the message.

    Raises:
        ValueError: A column is missing or does not hold text (labels: integers or text).
    """
    check_names(columns, rows.column_names, source)
    for option, column in columns.items():
        kind = rows.features[column]
        dtype = "int64" if isinstance(kind, ClassLabel) else getattr(kind, "dtype", type(kind).__name__)
        is_text = dtype in {"string", "large_string", "string_view"}
        is_class = option == "label_column" and (dtype == "bool" or dtype.startswith(("int", "uint")))
        if not is_text and not is_class:
            wanted = "integers or text" if option == "label_column" else "text"
            raise ValueError(f"{source}: column {column!r} (--{option}) holds {dtype}, but it must hold {wanted}.")


def read_labels(rows: Dataset, column: str, source: str) -> Labels:
    """Finds the classes in the training data.

    Returns:
        The classes that a hub data set declares; otherwise the sorted values of the column.

    Raises:
        ValueError: There are fewer than two classes.
    """
    kind = rows.features[column]
    if isinstance(kind, ClassLabel):
        return Labels(tuple(kind.names), {number: number for number in range(kind.num_classes)})
    values = sorted(rows.unique(column))
    if len(values) < 2:
        raise ValueError(
            f"{source}: column {column!r} holds only one class, {values[0]!r}, so there is nothing to learn."
        )
    return Labels(tuple(map(str, values)), {value: number for number, value in enumerate(values)})


def usable_rows(rows: Dataset, columns: Mapping[str, str], source: str, on_bad_row: str) -> Dataset:
    """Refuses or drops rows with nothing to learn from: an empty text, target or label, a message without content.

    Args:
        rows: The data, its columns present.
        columns: Option name → column name.
        source: Where the rows come from: the file, or the name of a data set.
        on_bad_row: "error" or "drop".

    Returns:
        The rows that can be used.

    Raises:
        ValueError: There is such a row, and `on_bad_row` is "error"; or none can be used.
    """
    bad: dict[int, str] = {}
    for option, column in columns.items():
        for number, value in enumerate(rows[column]):
            if (reason := why_bad(value, option)) is not None:
                bad.setdefault(number, f"{reason} in column {column!r}")
    if not bad:
        return rows
    first = min(bad)
    found = f"{source}, {place_of_row(source, first)}: {bad[first]}"
    count = f"{len(bad)} of {len(rows)} rows cannot be used"
    if on_bad_row == "error" or len(bad) == len(rows):
        advice = "" if len(bad) == len(rows) else " Mend them, or leave them out with --on_bad_row drop."
        raise ValueError(f"{found}; {count}.{advice}")
    warn(f"{found}; {count} and are left out.")
    return rows.select([number for number in range(len(rows)) if number not in bad])


def why_bad(value: Any, option: str) -> str | None:
    """Why the value of a column cannot be used; None if it can. A prompt may be an empty text."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return "an empty text" if not value.strip() and option != "prompt_column" else None
    if not isinstance(value, list):
        return None
    if not value:
        return "an empty conversation"
    for message in value:
        if isinstance(message, dict) and not message.get("tool_calls"):
            content, role = message.get("content", ""), message.get("role")
            if content is None or (role == "assistant" and content == ""):
                return f"a message of role {role!r} without content"
    return None


def place_of_row(source: str, number: int) -> str:
    """Where the row with this number, from 0, is in the source: the line of a text file, from 1, or the row."""
    path = Path(source)
    if path.suffix not in {".jsonl", ".csv", ".tsv"} or not path.is_file():
        return f"row {number}"
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            lines = (line for line, text in enumerate(file, start=1) if text.strip())
            return f"line {next(itertools.islice(lines, number, None))}"
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        next(reader)  # the header
        for _ in range(number):
            next(reader)
        return f"line {reader.line_num + 1}"


@dataclass(frozen=True)
class RowEncoder:
    """Turns rows into token ids and labels, for one tokenizer and one choice of columns.

    Attributes:
        tokenizer: The model's tokenizer.
        options: The data options, which name the columns.
        max_length: Largest number of tokens of an example.
        labels: The classes, for seq-cls only.
    """

    tokenizer: Any
    options: DataOptions
    max_length: int
    labels: Labels | None = None

    def classes(self, batch: Mapping[str, list[Any]], rows: list[int], source: str) -> dict[str, Any]:
        """Makes examples of texts or pairs, with the ids of their classes.

        Returns:
            Token ids and labels.

        Raises:
            ValueError: A label does not occur in the training data.
        """
        assert self.labels is not None, "seq-cls has labels"
        columns = (self.options.text_column, self.options.text_pair_column)
        texts = [batch[column] for column in columns if column is not None]
        column = self.options.label_column
        for row, value in zip(rows, batch[column], strict=True):
            if value not in self.labels.ids:
                known = ", ".join(f"{known!r}" for known in self.labels.ids)
                raise ValueError(
                    f"{source}: row {row} has the label {value!r}, but the classes of the training data are {known}."
                )
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        return {**encoded, "labels": [self.labels.ids[value] for value in batch[column]]}

    def plain_text(self, batch: Mapping[str, list[Any]], rows: list[int], source: str) -> dict[str, Any]:
        """Makes examples of plain texts. A text longer than `max_length` gives several examples."""
        pieces = []
        for ids in self.tokenizer(batch[self.options.text_column], verbose=False)["input_ids"]:
            whole = self._with_end_token(ids)
            starts = range(0, len(whole), self.max_length)
            # The first token of an example is never predicted, so an example needs two tokens.
            pieces += [whole[start : start + self.max_length] for start in starts if len(whole) - start > 1]
        return {
            "input_ids": pieces,
            "attention_mask": [[1] * len(piece) for piece in pieces],
            "labels": [list(piece) for piece in pieces],
        }

    def pairs(self, batch: Mapping[str, list[Any]], rows: list[int], source: str) -> dict[str, Any]:
        """Makes examples of a source text for the encoder and a target text for the decoder."""
        prompts, targets = (batch[str(name)] for name in (self.options.prompt_column, self.options.target_column))
        return dict(self.tokenizer(prompts, text_target=targets, truncation=True, max_length=self.max_length))

    def _with_end_token(self, ids: list[int]) -> list[int]:
        """Appends the end-of-text token, if the tokenizer has one and the ids do not end with it."""
        end = self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


# A method of `RowEncoder`: the columns of a batch of rows, the numbers of the rows, where they come from -> examples.
Encoding = Callable[[RowEncoder, Mapping[str, list[Any]], list[int], str], dict[str, Any]]


def encode_rows(rows: Dataset, encoding: Encoding, encoder: RowEncoder, source: str) -> Dataset:
    """Tokenises all rows.

    Args:
        rows: The data, its columns checked.
        encoding: A method of `RowEncoder`.
        encoder: The tokenizer and the columns.
        source: Where the rows come from, for messages.

    Returns:
        The examples: one for each row, except for plain text.

    Raises:
        ValueError: A row cannot be used, or no example is left.
    """
    examples = rows.map(
        lambda batch, numbers: encoding(encoder, batch, numbers, source),
        with_indices=True,
        batched=True,
        remove_columns=rows.column_names,
        load_from_cache_file=False,  # its key does not cover the code above
        desc=f"Tokenising {source}",
    )
    if len(examples) == 0:
        raise ValueError(
            f"{source}: no row has a token to learn within {encoder.max_length} tokens. Raise --max_length."
        )
    return examples


class EstimateBatches:
    """A seeded choice of training examples in batches.

    A separate generator draws the choice, so that an estimate does not change the random numbers of training.
    """

    def __init__(
        self,
        examples: Dataset,
        collate: Callable[[list[Any]], Any],
        options: EstimateOptions,
        batch_size: int,
        seed: int,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        """Chooses the examples.

        Args:
            examples: The training data.
            collate: Makes a batch of examples.
            options: The number of batches and their size.
            batch_size: The size of a batch where the options do not give one.
            seed: Seed of the choice.
            shard: (i, n): only every n-th batch, from batch i on.

        Raises:
            ValueError: The shard has no batch.
        """
        size, (index, count) = options.estimate_batch_size or batch_size, shard
        shuffled = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
        count_limit = library_config(options).resolved().max_batches
        most = None if count_limit is None else size * count_limit
        batches = shuffled[:most].split(size)
        if index >= len(batches):
            raise ValueError(
                f"--shard {index}/{count}: the data gives {len(batches)} batches, so this shard has none. Use fewer "
                "shards, more --estimate_batches or a smaller --estimate_batch_size."
            )
        chosen = examples.select(torch.cat(batches[index::count]).tolist())
        # Without a generator a loader draws a number from the global generator.
        self._loader: DataLoader[Any] = DataLoader(
            chosen,
            batch_size=size,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(seed),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        yield from self._loader
