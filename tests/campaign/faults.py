"""What the parts of the campaign share: the result of a case, and processes that are forked, watched and killed."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Audit events of a process that changes files, by the place of the path in their arguments.
CHANGES = {"open": 0, "os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.truncate": 0}
WRITING = os.O_WRONLY | os.O_RDWR
LIMIT = 1800  # seconds that one process may take, on a busy machine


@dataclass(frozen=True)
class Result:
    """What became of a case.

    Attributes:
        tried: Faults that happened.
        survived: Those after which everything ended as without them.
        refused: Those that were refused with an error that names the file, the layer or the process.
        lost: What went wrong; "" if nothing did.
    """

    tried: int = 1
    survived: int = 0
    refused: int = 0
    lost: str = ""


def lost(text: str, tried: int = 1) -> Result:
    """The result of a case that went wrong."""
    return Result(tried=tried, lost=text)


def forked(function: Callable[[], Any], log: Path, *, kill_after: float | None = None) -> int:
    """Run a function in a copy of this process, which has imported the libraries and has done nothing else.

    Args:
        function: Returns an exit code.
        log: A file for what the process prints.
        kill_after: Seconds after which the process gets SIGKILL.

    Returns:
        The exit code; negative for a signal. -14 (SIGALRM) is a process that took longer than `LIMIT`.
    """
    reader, writer = os.pipe()  # not the log itself: the process may be one that cannot write files
    pid = os.fork()
    if pid == 0:
        _child(function, writer)
    os.close(writer)
    os.set_blocking(reader, False)
    with log.open("wb") as file, os.fdopen(reader, "rb") as said:
        return _wait(pid, kill_after, lambda: file.write(said.read() or b""))


def _child(function: Callable[[], Any], writer: int) -> None:
    """Run the function, and end this process whatever happens: nothing of its parent may go on here."""
    code = 70
    try:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        code = int(function() or 0)
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, kill_after: float | None, read: Callable[[], Any]) -> int:
    """Wait for a process, and read what it prints."""
    began = time.monotonic()
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        read()
        if found:
            return os.waitstatus_to_exitcode(status)
        if kill_after is not None and time.monotonic() - began >= kill_after:
            os.kill(pid, signal.SIGKILL)
        elif time.monotonic() - began > LIMIT:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -signal.SIGALRM
        time.sleep(0.002)


def watch(folder: Path, at: Callable[[int, str], None]) -> None:
    """Call `at(number, path)` before every change of a file below `folder`, counted from 1. It cannot be taken back."""
    place, count = f"{folder.resolve()}{os.sep}", 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in CHANGES:
            return
        path = arguments[CHANGES[event]]
        if isinstance(path, int) or (event == "open" and not _writes(arguments)):
            return
        whole = str(Path(os.fsdecode(path)).absolute())
        if whole.startswith(place):
            count += 1
            at(count, whole)

    sys.addaudithook(hook)


def _writes(arguments: tuple[Any, ...]) -> bool:
    """Whether the arguments of the event "open" are of a file that is opened for writing."""
    _, mode, flags = arguments
    return bool(set(mode or "") & set("wax+")) or bool((flags or 0) & WRITING)


def watch_opened(folder: Path, at: Callable[[int, str], None]) -> None:
    """Call `at(number, path)` right after a file below `folder` was opened for writing: it exists, and is empty."""
    place, count, original = f"{folder.resolve()}{os.sep}", 0, builtins.open

    def wrapped(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        opened = original(file, mode, *args, **kwargs)
        if not isinstance(file, int) and set(mode) & set("wax+"):
            whole = str(Path(os.fsdecode(file)).absolute())
            if whole.startswith(place):
                count += 1
                at(count, whole)
        return opened

    builtins.open = io.open = wrapped


def die(*_: Any) -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def new_folder(parent: Path) -> Iterator[Path]:
    """A folder that is removed afterwards."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield folder
    finally:
        with contextlib.suppress(FileNotFoundError):
            folder.chmod(0o700)
        shutil.rmtree(folder, ignore_errors=True)


def limit_memory(extra_mib: int) -> None:
    """Let this process take that much more address space than it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + extra_mib * 2**20,) * 2)


def last_line(log: Path) -> str:
    """The last line that a process has printed."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "(nothing was printed)"
