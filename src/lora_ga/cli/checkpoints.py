"""The folder of a run: the files in it, and the checkpoint from which an unfinished run resumes."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lora_ga.cli.options import did_you_mean
from lora_ga.files import ADAPTER, MODEL_FILES, check_writable, parse_json, write_atomically

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
MODEL = "model"
ESTIMATE = "estimate.safetensors"
STATE = "trainer_state.json"  # the last file that Trainer writes into a checkpoint

# Options that a resumed run may change: they do not affect the result.
MAY_DIFFER = {"output_dir", "report_to", "run_name"}
RECORD = "run.json"  # written last, by a module that is slow to import


def check_output_dir(folder: Path) -> None:
    """Refuses the folder of a new run if it is not empty.

    Raises:
        FileExistsError: It is a file, is not empty, or cannot be made because of a file.
        PermissionError: Nothing can be written there.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--output_dir {folder}: this is a file. Give a new folder.")
    above = next((parent for parent in folder.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise FileExistsError(
            f"--output_dir {folder}: {above} is a file, so no folder can be made in it. Give another."
        )
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"--output_dir {folder}: {_what_is_in(folder)}")
    check_writable(folder)


def _what_is_in(folder: Path) -> str:
    """What a folder holds that is not empty, and what to do."""
    if (folder / RECORD).is_file():
        finished = "holds a finished run. Give a new folder."
        if not (folder / ADAPTER).is_dir():  # a full fine-tuning
            return finished
        return f"{finished} --from_adapter {shlex.quote(str(folder))} trains its adapter further."
    if (folder / CONFIG).is_file():
        return f"holds a run that has not finished. {how_to_resume(folder)}"
    return "the folder is not empty. Give a new one."


def how_to_resume(folder: Path) -> str:
    """What to do after an interruption of the run in `folder`."""
    if made := complete_checkpoints(folder):
        return f"`lora-ga train --resume --output_dir {shlex.quote(str(folder))}` resumes it at step {max(made)}."
    none = "It has no checkpoint yet (--save_steps), so it cannot be resumed. Start again"
    if not (folder / CONFIG).is_file():
        return f"{none}."
    estimate = folder / ESTIMATE
    spared = f"; --estimate_file {shlex.quote(str(estimate))} spares the estimate" if estimate.is_file() else ""
    return f"{none} in another folder{spared}."


def find_config(folder: Path) -> Path:
    """Finds the options of the run in a folder.

    Returns:
        The file with its options.

    Raises:
        FileNotFoundError: There is no run.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"--resume: there is no run in {folder} (no {CONFIG}). Give its --output_dir, or leave --resume out."
        )
    return file


def check_same_options(saved: Mapping[str, Any], now: Mapping[str, Any], file: Path) -> None:
    """Refuses to resume a run with other options.

    Args:
        saved: The options with which the run began.
        now: The options given now.
        file: The file of the saved options, for the message.

    Raises:
        ValueError: Options differ that affect the result.
    """
    differing = [name for name in saved if name not in MAY_DIFFER and saved[name] != now[name]]
    if differing:
        changes = "; ".join(f"{name} was {saved[name]} and is now {now[name]}" for name in differing)
        raise ValueError(
            f"--resume: the run in {file.parent} began with other options: {changes}. Leave them out to resume "
            "the run as it was, or start a new run in another folder."
        )


def estimate_of(path: Path) -> Path:
    """The estimate file of a path: the path itself, or the estimate of a run's folder.

    Returns:
        The file.

    Raises:
        FileNotFoundError: There is no such file, or the folder holds no estimate.
    """
    if path.is_dir():
        if not (path / ESTIMATE).is_file():
            raise FileNotFoundError(
                f"{path}: this folder holds no {ESTIMATE}. Give the folder of a LoRA-GA run, or an estimate file."
            )
        return path / ESTIMATE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file.{did_you_mean(path)} Give the folder of a run, or an estimate that `lora-ga "
            "estimate` wrote."
        )
    return path


def adapter_of(path: Path, method: str) -> Path:
    """The adapter to train further: the folder itself, or the adapter in the folder of a run.

    Args:
        path: The folder.
        method: The method of the run, which must be that of the adapter.

    Returns:
        The folder of the adapter.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: It was trained by the other method.
    """
    folder = next((each for each in (path, path / ADAPTER) if (each / MODEL_FILES[1]).is_file()), None)
    if folder is None:
        raise FileNotFoundError(
            f"--from_adapter {path}: there is no adapter (no {MODEL_FILES[1]}).{did_you_mean(path)} Give the folder of "
            "a run, or the one that save_pretrained wrote."
        )
    from lora_ga.adapter import save as sidecar  # slow to import, so after the check above

    started = (folder / sidecar.FILE).is_file()
    if started and method == "lora":
        raise ValueError(f"--from_adapter {folder}: it trains as LoRA-GA ({sidecar.FILE}). Leave --method lora out.")
    if not started and method == "lora-ga":
        raise ValueError(
            f"--from_adapter {folder}: it has no {sidecar.FILE}, the file with the start of LoRA-GA. Put it back, or "
            "give --method lora: all rows of the adapter then train, as plain LoRA."
        )
    return folder


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """The complete checkpoints of a run: step → folder."""
    return {
        int(match[1]): path
        for path in (folder / CHECKPOINTS).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / STATE).is_file()
    }


def last_checkpoint(folder: Path, method: str) -> Path:
    """Finds the newest complete checkpoint.

    Args:
        folder: The folder of the run.
        method: The method of the run. A LoRA-GA run also needs the sidecar file.

    Returns:
        The folder of the checkpoint.

    Raises:
        FileNotFoundError: There is no checkpoint, or the sidecar file is missing.
    """
    steps = complete_checkpoints(folder)
    if not steps:
        raise FileNotFoundError(
            f"--resume: the run in {folder} ended before its first checkpoint. {how_to_resume(folder)}"
        )
    from lora_ga.adapter import save as sidecar  # slow to import, so after the checks above

    newest = steps[max(steps)]
    if method == "lora-ga" and not (newest / sidecar.FILE).is_file():
        raise FileNotFoundError(
            f"--resume: {newest} has no {sidecar.FILE}, the file with the start of its adapter. Without it "
            "the adapter would train on as plain LoRA. Put the file back, or start again in another folder."
        )
    return newest


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Reads the state that the trainer wrote.

    Returns:
        The steps, the log and more.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        state = parse_json((checkpoint / STATE).read_text(encoding="utf-8"))
        whole = isinstance(state["log_history"], list) and all(isinstance(each, dict) for each in state["log_history"])
        if not whole or not all(isinstance(state[key], int) for key in ("global_step", "max_steps")):
            raise ValueError("log_history, global_step or max_steps has another type")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--resume: {checkpoint / STATE} is damaged ({error}). Remove {checkpoint} to resume from the checkpoint "
            "before it."
        ) from error
    return state


def is_last_checkpoint(checkpoint: Path) -> bool:
    """Whether this checkpoint was written at the last step."""
    state = read_trainer_state(checkpoint)
    return state["global_step"] >= state["max_steps"]


def write_config(folder: Path, options: Mapping[str, Any]) -> None:
    """Makes the folder and writes the options, from which the run can be repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    head = f"# `lora-ga train --config {CONFIG} --output_dir NEW_FOLDER` runs this again.\n"
    write_atomically(folder / CONFIG, (head + yaml.safe_dump(dict(options), sort_keys=False)).encode())
