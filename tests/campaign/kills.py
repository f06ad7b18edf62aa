"""Commands that are killed again and again, and then go on."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from campaign.commands import COMMANDS, Command, go_on, relative, reproduce, state_of_store, whole
from campaign.faults import Result, die, forked, last_line, lost, new_folder, watch, watch_opened
from lora_ga.experiments.records.store import Store

TWO = "two processes on one store"
NAMES = [*COMMANDS, TWO]
MOST = 8  # kills of one command before it may end


@functools.cache
def reference(name: str) -> tuple[dict[str, Any], dict[str, int], float]:
    """The end of an unbroken run, its numbers of changes of files and of files opened, and its seconds."""
    command = COMMANDS[name]
    with new_folder(Path()) as folder:
        count = folder.parent / f"{folder.name}.count"
        numbers = {"before": 0, "opened": 0}

        def run() -> int:
            watch(folder, lambda number, _: numbers.update(before=number))
            watch_opened(folder, lambda number, _: numbers.update(opened=number))
            code = command.run(folder)
            count.write_text(json.dumps([numbers, list(sys.modules)]))
            return code

        began = time.monotonic()
        code = forked(run, Path("log"))
        if code:
            raise RuntimeError(f"{name} fails without any fault: {last_line(Path('log'))}")
        seconds = time.monotonic() - began
        found = relative(command.state(folder), folder)
        numbers, modules = json.loads(count.read_text())
        count.unlink()
    for module in modules:  # the next processes need not import them again
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    if not found:
        raise RuntimeError(f"{name} leaves nothing behind")
    return found, numbers, seconds


def run_until(command: Command, folder: Path, how: str, number: int) -> int:
    """Run a command that dies at the n-th change of a file, or right after the n-th file was opened."""

    def at(count: int, _: str) -> None:
        if count == number:
            die()

    if how in {"before", "opened"}:
        (watch if how == "before" else watch_opened)(folder, at)
    return command.run(folder)


def case(number: int, draw: random.Random) -> Result:
    """Kill one command up to `MOST` times, check the state after each kill, and let it end."""
    name = NAMES[number % len(NAMES)]
    if name == TWO:
        return two_processes(draw)
    command, log = COMMANDS[name], Path("log")
    end, numbers, seconds = reference(name)
    kills = 0
    with new_folder(Path()) as folder:
        for _ in range(MOST):
            how = draw.choice(["before", "before", "opened", "time"])
            at = draw.randint(1, numbers.get(how, 1))
            after = draw.uniform(0, seconds) if how == "time" else None
            code = forked(functools.partial(run_until, command, folder, how, at), log, kill_after=after)
            if code == -signal.SIGKILL:
                kills += 1
                if wrong := whole(command, folder, end):
                    return lost(f"{name}, killed ({how} {after or at}): {wrong}", kills)
            elif code:
                return lost(f"{name}, going on after kill {kills}: {code}, {last_line(log)}", kills)
            else:
                break
        wrong = go_on(command, folder, end, log)
        return lost(f"{name} after {kills} kills: {wrong}", kills) if wrong else Result(kills, survived=kills)


def two_processes(draw: random.Random) -> Result:
    """One process is killed while another wants its store; then the other runs all that is missing."""
    end, numbers, _ = reference("reproduce")
    command, at = COMMANDS["reproduce"], draw.randint(2, numbers["before"])
    with new_folder(Path()) as folder:
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(os.open("log-first", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
                os.dup2(1, 2)
                run_until(command, folder, "before", at)
            finally:
                os._exit(0)
        refusals = 0
        while not os.waitpid(pid, os.WNOHANG)[0]:
            if (folder / "store" / ".lock.pid").exists():
                code = forked(lambda: reproduce(folder), Path("log"))
                text = Path("log").read_text()
                if code == 0 or "another run" in text:
                    refusals += code != 0
                else:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    return lost(f"the second process ended with {code}: {last_line(Path('log'))}")
            time.sleep(0.02)
        if wrong := whole(command, folder, end) or go_on(command, folder, end, Path("log")):
            return lost(f"{TWO}: {wrong}")
        attempts = Store(folder / "store").attempts()
        if len({each["digest"] for each in attempts}) != len(attempts) or state_of_store(folder).keys() != end.keys():
            return lost(f"{TWO}: a cell has run twice, or not at all")
    return Result(1, survived=1)
