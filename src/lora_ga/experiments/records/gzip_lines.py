"""Append-only files of compressed JSON lines: each append adds one gzip member.

A gzip file may hold several members one after another, and `zcat` prints them all. A process that is killed while it
appends leaves a last member that is cut off. Readers ignore that member; `repair` removes it.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_ga.files import parse_json

GZIP = 16 + zlib.MAX_WBITS  # zlib's code for "a gzip header and its checksum"
MOST = 2**28  # bytes of text that a file may hold: a small damaged file can decompress to very many


def line(item: Mapping[str, Any]) -> bytes:
    """The text of one object."""
    return (json.dumps(item, ensure_ascii=False, allow_nan=False) + "\n").encode()


def encode(objects: Iterable[Mapping[str, Any]]) -> bytes:
    """One gzip member that holds one JSON object a line; equal objects give equal bytes."""
    return gzip.compress(b"".join(map(line, objects)), mtime=0)


def append(path: Path, item: Mapping[str, Any]) -> None:
    """Appends one object. When this returns, the object is on the disk.

    If the write fails, for example because the disk is full, the file keeps its old content.

    Args:
        path: The file; it is created if it does not exist. Its last member must be complete, and its text with this
            object must have at most `MOST` bytes.
        item: The object.

    Raises:
        OSError: The object could not be written.
    """
    content = encode([item])
    with path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            if file.write(content) != len(content):
                raise OSError(f"{path}: only a part could be written. Is the disk full?")
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


def read(path: Path) -> list[dict[str, Any]]:
    """Reads all objects; a last member that is cut off is ignored.

    Args:
        path: The file.

    Returns:
        The objects, in the order in which they were appended.

    Raises:
        ValueError: The file is damaged, or a line is not a JSON object.
    """
    objects = []
    for number, text in enumerate(_complete(path)[0].splitlines(), 1):
        try:
            found = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is damaged, it is not JSON ({error}).") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path}: line {number} is not a JSON object.")
        objects.append(found)
    return objects


def repair(path: Path) -> int:
    """Cuts off an incomplete last member; a file without one stays untouched. Call this before the first `append`.

    Returns:
        The bytes of text that the file holds.
    """
    text, length = _complete(path)
    if length < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(length)
            os.fsync(file.fileno())
    return len(text)


def _complete(path: Path) -> tuple[bytes, int]:
    """Decompresses the complete members.

    Returns:
        Their text, and the number of bytes that they take in the file.

    Raises:
        ValueError: A member is damaged; that is something else than cut off.
    """
    rest = path.read_bytes()
    size, text = len(rest), b""
    while rest.strip(b"\0"):  # after a power failure a file may end in zeros
        member = zlib.decompressobj(GZIP)
        try:
            found = member.decompress(rest, MOST - len(text) + 1)
        except zlib.error as error:
            raise ValueError(
                f"{path}: damaged after byte {size - len(rest)} ({error}). Restore the file from a copy; or cut it off "
                "there, to run the cells of the lost records again."
            ) from error
        if len(text) + len(found) > MOST:
            raise ValueError(
                f"{path}: holds more than {MOST:,} bytes of text, the most that is read of one file. If the files of "
                "two stores were appended to each other, put them into one folder under two names that end in "
                ".jsonl.gz instead: all files of a store are read. Otherwise it is damaged; restore it from a copy."
            )
        if not member.eof:
            break
        text, rest = text + found, member.unused_data
    return text, size - len(rest)
