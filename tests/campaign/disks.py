"""Commands on disks that fail: full, read-only, without rename, vanishing; and the permissions of what they write."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

from campaign.commands import COMMANDS, Command, go_on, whole
from campaign.faults import Result, forked, last_line, lost, new_folder, watch
from campaign.kills import reference

NOBODY = 65534


def full(folder: Path, draw: random.Random, changes: int) -> None:
    """No file may become larger than a few bytes to some kilobytes; the system then refuses to write on."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = draw.choice([0, 1, 100, 1000, 3000, 8000])
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def read_only(folder: Path, draw: random.Random, changes: int) -> None:
    """The folder is read-only. Root may write everywhere, so the process becomes another user first."""
    folder.chmod(0o555)
    if os.geteuid() == 0:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)


def no_rename(folder: Path, draw: random.Random, changes: int) -> None:
    """One of the first renames fails, as on some network file systems."""
    original, left = os.rename, draw.randint(0, 2)

    def failing(source: object, target: object, **settings: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(5, "Input/output error", str(source), None, str(target))
        original(source, target, **settings)  # type: ignore[arg-type]

    os.rename = os.replace = failing  # type: ignore[assignment]


def vanishes(folder: Path, draw: random.Random, changes: int) -> None:
    """The folder is removed at some moment, as when a network disk is unmounted."""
    at = draw.randint(1, max(1, changes))

    def remove(number: int, _: str) -> None:
        if number == at:
            shutil.rmtree(folder, ignore_errors=True)

    watch(folder, remove)


def errors(folder: Path, draw: random.Random, changes: int) -> None:
    """The n-th change of a file fails: the disk is broken."""
    at = draw.randint(1, max(1, changes))

    def fail(number: int, path: str) -> None:
        if number == at:
            raise OSError(5, "Input/output error", path)

    watch(folder, fail)


FAULTS: dict[str, Callable[[Path, random.Random, int], None]] = {
    "full": full,
    "read-only": read_only,
    "no rename": no_rename,
    "vanishes": vanishes,
    "broken": errors,
}
KINDS = [*FAULTS, "small disk", "umask"]


def case(number: int, draw: random.Random) -> Result:
    """Hurt one command once; it may end well, or with an error; then it goes on with a sound disk."""
    name, kind = [*COMMANDS][(number + number // len(KINDS)) % len(COMMANDS)], KINDS[number % len(KINDS)]
    command = COMMANDS[name]
    changes = reference(name)[1]
    with new_folder(Path()) as folder:
        if kind == "umask":
            return permissions(name, command, folder, draw)
        if kind == "small disk":
            return small_disk(name, command, folder, draw)

        def run() -> int:
            FAULTS[kind](folder, draw, changes["before"])
            return command.run(folder)

        code = forked(run, Path("log"))
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
        return judged(name, kind, command, folder, code)


def judged(name: str, kind: str, command: Command, folder: Path, code: int) -> Result:
    """What became of a command that was hurt: it said so, left whole files, and goes on."""
    end, _, _ = reference(name)
    said = Path("log").read_text(errors="replace")
    if code < 0:
        return lost(f"{name}, {kind}: ended with signal {-code}: {last_line(Path('log'))}")
    if code and not any(word in said for word in ("rror", "refused")):
        return lost(f"{name}, {kind}: ended with {code} and no error: {last_line(Path('log'))}")
    if wrong := whole(command, folder, end):
        return lost(f"{name}, {kind}: {wrong}")
    if wrong := go_on(command, folder, end, Path("log")):
        return lost(f"{name}, {kind}: {wrong}")
    return Result(1, survived=int(code == 0), refused=int(code != 0))


def small_disk(name: str, command: Command, folder: Path, draw: random.Random) -> Result:
    """A file system of some kilobytes, where this process may mount one; otherwise nothing is tried."""
    size = draw.choice([4, 16, 40, 80])
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        return Result(0)
    try:
        code = forked(lambda: command.run(folder), Path("log"))
        if wrong := whole(command, folder, reference(name)[0]):
            return lost(f"{name}, a disk of {size} KiB: {wrong}")
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True, capture_output=True)
        return judged(name, f"a disk of {size} KiB", command, folder, code) if code else Result(1, survived=1)
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def permissions(name: str, command: Command, folder: Path, draw: random.Random) -> Result:
    """Every file and folder that a command leaves has the permissions that the umask gives."""
    mask = draw.choice([0o077, 0o022, 0o002, 0o027])

    def run() -> int:
        os.umask(mask)
        return command.run(folder)

    if code := forked(run, Path("log")):
        return lost(f"{name}, umask {mask:o}: ended with {code}: {last_line(Path('log'))}")
    for path in folder.rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        if (found := stat.S_IMODE(path.stat().st_mode)) != wanted and not path.name.startswith(".lock"):
            return lost(f"{name}, umask {mask:o}: {path.relative_to(folder)} has the permissions {found:o}")
    return Result(1, survived=1)
