"""Files: what a model's files are recognised by, atomic writing, and safetensors files with a record.

A file or folder is written complete or not at all. Tensors are read and written as safetensors only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:  # torch is imported where tensors are written, so that commands need not wait for it
    from torch import Tensor

# The version of the format that `write_tensors` writes, and those that `read_tensors` reads. docs/formats.md describes
# them. Format 1 has no checksums; a file without a version is of format 1.
SCHEMA, READABLE = 2, ("1", "2")

# The folder of the adapter in the folder of a run of `lora-ga train`.
ADAPTER = "adapter"
# A folder holds a model if it has the first, an adapter if it has the second.
MODEL_FILES = ("config.json", "adapter_config.json")
# Beside the adapter of a classifier: the id of each class → its name.
LABELS = "labels.json"

Companions = Callable[[Path], None]


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Describe where two nested records of plain values differ.

    Args:
        found: One record.
        expected: The other.

    Returns:
        The first three differences and the number of the others, for an error message; "" if there are none.
    """
    listed = []

    def compare(one: Any, other: Any, path: str) -> None:
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            for key in dict.fromkeys((*one, *other)):
                compare(one.get(key, "nothing"), other.get(key, "nothing"), f"{path}.{key}" if path else str(key))
        elif one != other:
            listed.append(f"{path} is {one!r} in one, {other!r} in the other")

    compare(found, expected, "")
    more = f"; and {len(listed) - 3} more" if len(listed) > 3 else ""
    return "; ".join(listed[:3]) + more


@contextlib.contextmanager
def _replacing(target: Path, *, folder: bool) -> Iterator[Path]:
    """A temporary file or folder beside `target`, which replaces it at the end of the block.

    Everything is on the disk before the name appears. After an error the temporary one is removed and `target` is as it
    was. Permissions follow the umask of this process, or stay those of `target` if it exists (its owner can always
    write).

    Args:
        target: The path to replace: a file, or a folder that is empty or does not exist.
        folder: Whether it is a folder.

    Yields:
        The temporary path.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    if folder:
        temporary.mkdir()
    else:
        temporary.touch(exist_ok=False)
    if target.exists():
        temporary.chmod(stat.S_IMODE(target.stat().st_mode) | (stat.S_IRWXU if folder else stat.S_IRUSR | stat.S_IWUSR))
    try:
        yield temporary
        mode = _mode_of_new_files(temporary) if folder else None
        for written in temporary.rglob("*") if folder else [temporary]:
            if written.is_file():
                if mode is not None:  # safetensors makes files that their owner alone can read, whatever the umask
                    written.chmod(mode)
                with written.open("rb+") as file:
                    os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        if folder:
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
        raise


def _mode_of_new_files(folder: Path) -> int:
    """The permissions that this process gives a new file in a folder."""
    new = folder / f".{secrets.token_hex(4)}"
    new.touch(exist_ok=False)
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    return mode


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that at every moment either the old or the new content is there, complete.

    Args:
        path: The file; its folder is made if it does not exist.
        content: The new content.
    """
    with _replacing(Path(path), folder=False) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Write a folder that appears complete at the end of the block, or not at all.

    An empty folder that must stay (see `_must_stay`) is filled instead, with the configuration last: without it no
    program takes the folder for a model or an adapter.

    Args:
        path: The folder; empty, or it does not exist (see `check_empty`). Links are followed.

    Yields:
        A temporary folder to write into.
    """
    target = Path(path).resolve()
    stays = _must_stay(target)
    whole = target / f".{secrets.token_hex(4)}" if stays else target
    with _replacing(whole, folder=True) as temporary:
        yield temporary
    if stays:
        for written in sorted(whole.iterdir(), key=lambda each: each.name in MODEL_FILES):
            written.replace(target / written.name)
        whole.rmdir()


def _must_stay(folder: Path) -> bool:
    """Whether a folder cannot or must not be replaced by another one.

    Args:
        folder: The folder.

    Returns:
        Whether it exists and is a mount point, its parent is read-only, or this process is in it, and so perhaps the
        shell that started it.
    """
    if not folder.is_dir():
        return False
    return folder.samefile(os.curdir) or os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK)


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to one plain safetensors file, atomically, without a second copy of them in memory.

    Args:
        path: The file.
        tensors: Name → contiguous tensor.
        metadata: The file's metadata.
    """
    from safetensors.torch import save_file

    with _replacing(Path(path), folder=False) as temporary:
        mode = stat.S_IMODE(temporary.stat().st_mode)
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        temporary.chmod(mode)  # safetensors makes files that their owner alone can read, whatever the umask


def parse_json(text: str | bytes) -> Any:
    """Parse JSON from a file that may hold anything.

    Args:
        text: The content of the file.

    Returns:
        The value.

    Raises:
        ValueError: It is not JSON, or is nested more deeply than Python's parser can follow.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


# Errors that are not about the content of a file. Those of torch about a device go by name: torch is slow to import.
OTHER_CAUSES = (OSError, MemoryError, ImportError, Warning)
DEVICE_ERRORS = ("OutOfMemoryError", "AcceleratorError")


@contextlib.contextmanager
def damaged(*paths: str | Path, advice: str = "Put a complete copy back, or save it again.") -> Iterator[None]:
    """Name a file or folder in every error that its content causes in other code.

    Args:
        *paths: What is read in the block.
        advice: What to do, for the message.

    Yields:
        Nothing.

    Raises:
        Exception: A warning, or an error that is not about the content (a file that is gone, no memory, a fault of the
            device, a package that is not installed): as it is.
        ValueError: The content caused any other error. The message names the paths.
    """
    try:
        yield
    except Exception as error:
        named = isinstance(error, ValueError) and any(str(path) in str(error) for path in paths)
        if named or isinstance(error, OTHER_CAUSES) or type(error).__name__ in DEVICE_ERRORS:
            raise
        reason = (str(error).strip() or "no reason was given").splitlines()[0][:300]
        where = " or ".join(map(str, paths))
        raise ValueError(
            f"{where}: damaged, or not what it should be ({type(error).__name__}: {reason}). {advice}"
        ) from error


def read_labels(adapter: Path) -> dict[int, str]:
    """Read the names of the classes beside the adapter of a classifier.

    Args:
        adapter: The adapter's folder.

    Returns:
        Class → name; empty if the adapter has none.

    Raises:
        ValueError: The file is damaged.
    """
    if not (file := adapter / LABELS).is_file():
        return {}
    try:
        return {int(number): str(name) for number, name in parse_json(file.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{file}: damaged, it must map the numbers of classes to their names ({error}). Write it again."
        ) from error


def adapters_in(folder: Path) -> list[Path]:
    """The adapters below a folder: those with names of their own, or the checkpoints of a run.

    Args:
        folder: The folder.

    Returns:
        The folders that hold one, at most two steps below.
    """
    return sorted(file.parent for steps in ("*", "*/*") for file in folder.glob(f"{steps}/{MODEL_FILES[1]}"))


def no_companions(folder: Path) -> None:
    """Writes nothing beside what a function writes into its new folder."""


def check_empty(folder: str | Path) -> Path:
    """Refuse an output folder that has files in it.

    Args:
        folder: The folder; it need not exist.

    Returns:
        The folder as a path.

    Raises:
        ValueError: It is a file, or not empty.
        PermissionError: Nothing can be written there.
    """
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path}: not empty. Choose another output folder, or remove this one; nothing was written.")
    check_writable(path)
    return path


def check_writable(path: Path) -> None:
    """Refuse a place in which no file can be made, before long work is done for it. Nothing is left there.

    Args:
        path: A file or folder to be written; it and the folders above it need not exist.

    Raises:
        PermissionError: No file can be made in it, or in the nearest folder above it that exists.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise PermissionError(
            f"{path}: nothing can be written in {there} ({error.strerror}). Choose another."
        ) from error


def write_tensors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write tensors and a record to one safetensors file, atomically.

    Args:
        path: The file.
        kind: What the file is, for instance "a LoRA-GA gradient estimate"; checked on reading.
        tensors: Name → tensor, on any device.
        record: Plain values, stored as JSON in the file's header.
    """
    from safetensors.torch import save

    saved = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(record)
    header = {
        "format": "pt",
        "kind": kind,
        "schema": str(SCHEMA),
        "record": text,
        "record_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "sha256": _digest(saved),
    }
    write_atomically(path, save(saved, metadata=header))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of all values, which does not depend on the order of the tensors in the file."""
    import torch

    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        total.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote. Nothing in the file is executed.

    Args:
        path: The file.
        kind: What the file has to be.

    Returns:
        The tensors, on the CPU, and the record.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, of another kind, or in another version of the format.
    """
    if Path(path).is_dir():
        raise FileNotFoundError(f"{path}: a folder; give the file itself (expected {kind}).")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file (expected {kind}).")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file ({error}). Write it again.") from error
    if header.get("kind") != kind:
        raise ValueError(f"{path}: holds {header.get('kind', 'tensors of another program')}, expected {kind}.")
    schema, text = header.get("schema", "1"), header.get("record", "")
    if schema not in READABLE:
        raise ValueError(
            f"{path}: written in format {schema}, this version of LoRA-GA reads the formats {' and '.join(READABLE)}. "
            "Read it with the version that wrote it or a later one, or write it again with this one."
        )
    if (schema != "1" or "sha256" in header) and header.get("sha256") != _digest(tensors):
        raise ValueError(f"{path}: damaged, its values do not fit their checksum. Write it again.")
    # The first files of format 2 have no checksum of the record.
    if "record_sha256" in header and header["record_sha256"] != hashlib.sha256(text.encode()).hexdigest():
        raise ValueError(f"{path}: damaged, its record does not fit its checksum. Write it again.")
    try:
        record = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: damaged, its record cannot be read ({error}). Write it again.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: damaged, its record is a {type(record).__name__}, not a mapping. Write it again.")
    return tensors, record
