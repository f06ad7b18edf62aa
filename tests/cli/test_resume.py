"""`lora-ga train --resume` ends with the results of an uninterrupted run, or is refused."""

import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import processes
from lora_ga.cli import finetune
from lora_ga.cli.callbacks import OptimizerGuard
from lora_ga.cli.checkpoints import how_to_resume, last_checkpoint
from lora_ga.cli.main import main
from lora_ga.cli.train import parse

from .conftest import text, write_rows

RUN = {
    "task": "seq-cls",
    "rank": 2,
    "lora_dropout": 0.1,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 8,
    "eval_steps": 3,
    "logging_steps": 3,
    "save_steps": 4,
    "estimate_batches": 2,
    "learning_rate": 1e-3,
}


def command(model: Path, data: Path, out: Path, **options: object) -> list[str]:
    given = {**RUN, "model": model, "train_file": data, "eval_file": data, "output_dir": out, **options}
    return ["train", *(f"--{name}={value}" for name, value in given.items())]


def train_until_killed(argv: list[str]) -> None:
    """Trains, and sends SIGKILL to this process after step 6 of 8."""

    def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    OptimizerGuard.on_step_end = die
    main(argv)


def exit_code_of(argv: list[str]) -> int:
    """The exit code of a process that `train_until_killed` runs in."""
    return processes.exit_codes([processes.start(train_until_killed, argv)])[0]


def interrupted_copy(uninterrupted: Path, interrupted: Path) -> Path:
    """Copies a run's folder and removes what a process that dies between steps 4 and 8 has not written yet."""
    shutil.copytree(uninterrupted, interrupted)
    (interrupted / "run.json").unlink()
    shutil.rmtree(interrupted / "checkpoints" / "checkpoint-8")
    shutil.rmtree(interrupted / ("model" if (interrupted / "model").exists() else "adapter"))
    return interrupted


def weights(folder: Path) -> bytes:
    """The file of a run's trained weights."""
    (file,) = [*folder.glob("adapter/adapter_model.safetensors"), *folder.glob("model/model.safetensors")]
    return file.read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished LoRA-GA run; its data file is in the folder above."""
    folder = tmp_path_factory.mktemp("unbroken")
    rows = [{"text": text(number, 5 + number % 4), "label": ("good", "bad")[number % 2]} for number in range(40)]
    assert main(command(bert, write_rows(folder / "data.jsonl", rows), folder / "run")) == 0
    return folder / "run"


def assert_same_result(interrupted: Path, uninterrupted: Path) -> None:
    assert weights(interrupted) == weights(uninterrupted)
    records = [json.loads((folder / "run.json").read_text()) for folder in (interrupted, uninterrupted)]
    for key in ("curve", "eval", "metrics", "steps", "trainable_parameters"):
        assert records[0][key] == records[1][key], key


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"method": "lora-ga", "offset": "base"}, id="lora-ga with the offset in the base"),
        pytest.param({"method": "lora-ga", "dtype": "bfloat16"}, id="lora-ga in bfloat16"),
        pytest.param({"method": "lora"}, id="lora"),
        pytest.param({"method": "full"}, id="full"),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    options: dict[str, str], bert: Path, labelled_texts: Path, tmp_path: Path
) -> None:
    assert main(command(bert, labelled_texts, tmp_path / "whole", **options)) == 0
    interrupted = interrupted_copy(tmp_path / "whole", tmp_path / "broken")
    assert main(["train", "--resume", "--output_dir", str(interrupted)]) == 0
    assert_same_result(interrupted, tmp_path / "whole")


def test_a_resumed_lora_ga_run_needs_neither_the_estimate_nor_the_original_folder(
    uninterrupted: Path, tmp_path: Path
) -> None:
    interrupted = interrupted_copy(uninterrupted, tmp_path / "broken")
    (interrupted / "estimate.safetensors").unlink()
    assert main(["train", "--resume", "--output_dir", str(interrupted)]) == 0
    assert_same_result(interrupted, uninterrupted)
    first, second = (
        json.loads((folder / "run.json").read_text())["seconds"] for folder in (uninterrupted, interrupted)
    )
    assert second["estimate"] == first["estimate"]
    assert second["total"] > second["estimate"] + second["train"]


def test_a_killed_run_resumes_to_the_same_result(bert: Path, uninterrupted: Path, tmp_path: Path) -> None:
    argv = command(bert, uninterrupted.parent / "data.jsonl", tmp_path / "broken")
    assert exit_code_of(argv) == -signal.SIGKILL
    assert not (tmp_path / "broken" / "run.json").exists()
    assert main([*argv, "--resume"]) == 0
    assert_same_result(tmp_path / "broken", uninterrupted)


def test_a_resumed_run_may_remove_the_checkpoint_it_started_from(
    bert: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    # Only the last two checkpoints are kept. With one at each step, that of step 6 is removed before the end.
    argv = command(bert, uninterrupted.parent / "data.jsonl", tmp_path / "broken", save_steps=1)
    assert exit_code_of(argv) == -signal.SIGKILL
    assert main(["train", "--resume", "--output_dir", str(tmp_path / "broken")]) == 0
    assert {path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()} == {"checkpoint-7", "checkpoint-8"}
    assert weights(tmp_path / "broken") == weights(uninterrupted)
    assert (tmp_path / "broken" / "run.json").exists()


@pytest.mark.parametrize("method", ["lora-ga", "lora", "full"])
def test_resuming_after_the_last_step_writes_the_same_results(
    method: str, bert: Path, labelled_texts: Path, tmp_path: Path
) -> None:
    argv = command(bert, labelled_texts, tmp_path / "run", method=method, max_steps=4)
    assert main(argv) == 0
    copy = Path(shutil.copytree(tmp_path / "run", tmp_path / "copy"))
    (copy / "run.json").unlink()
    shutil.rmtree(copy / ("model" if method == "full" else "adapter"))
    assert main(["train", "--resume", "--output_dir", str(copy)]) == 0
    assert_same_result(copy, tmp_path / "run")


def test_an_interrupted_run_says_how_it_goes_on(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "finetune", interrupt)
    interrupted = interrupted_copy(uninterrupted, tmp_path / "my run")
    assert main(["train", "--resume", "--output_dir", str(interrupted)]) == 130
    said = re.search(
        r"\.\.\.\n\nlora-ga train: interrupted\. `lora-ga (.*)` resumes it at step 4\.\n$", capsys.readouterr().err
    )
    assert said is not None
    assert parse(shlex.split(said[1])[1:])[1] == interrupted / "checkpoints" / "checkpoint-4"
    shutil.rmtree(interrupted / "checkpoints")
    estimate = interrupted / "estimate.safetensors"
    assert how_to_resume(interrupted).endswith(f" --estimate_file {shlex.quote(str(estimate))} spares the estimate.")
    estimate.unlink()
    assert how_to_resume(interrupted).endswith("so it cannot be resumed. Start again in another folder.")
    (interrupted / "config.yaml").unlink()
    assert how_to_resume(interrupted).endswith("so it cannot be resumed. Start again.")


def test_the_folder_of_another_run_is_refused_with_what_helps_there(
    uninterrupted: Path, bert: Path, labelled_texts: Path, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    def refused(folder: Path) -> str:
        return error_of([*command(bert, labelled_texts, folder)])

    finished = f"holds a finished run. Give a new folder. --from_adapter {uninterrupted} trains its adapter further."
    assert finished in refused(uninterrupted)
    interrupted = interrupted_copy(uninterrupted, tmp_path / "my run")
    message = refused(interrupted)
    assert "holds a run that has not finished." in message
    said = re.search(r"`lora-ga train (.*)` resumes it at step 4\.", message)
    assert said is not None
    assert parse(shlex.split(said[1]))[1] == interrupted / "checkpoints" / "checkpoint-4"
    shutil.rmtree(interrupted / "checkpoints")
    assert how_to_resume(interrupted) in refused(interrupted)


def test_an_incomplete_checkpoint_is_skipped(uninterrupted: Path, tmp_path: Path) -> None:
    interrupted = interrupted_copy(uninterrupted, tmp_path / "broken")
    torn = Path(
        shutil.copytree(interrupted / "checkpoints" / "checkpoint-4", interrupted / "checkpoints" / "checkpoint-6")
    )
    (torn / "trainer_state.json").unlink()
    assert last_checkpoint(interrupted, "lora-ga").name == "checkpoint-4"


def test_resuming_a_finished_run_changes_nothing(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = weights(uninterrupted)
    assert main(["train", "--resume", "--output_dir", str(uninterrupted)]) == 0
    assert "is finished; there is nothing to resume" in capsys.readouterr().out
    assert weights(uninterrupted) == before


def test_options_that_change_the_result_are_refused(
    uninterrupted: Path, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    interrupted = interrupted_copy(uninterrupted, tmp_path / "broken")
    message = error_of(["train", "--resume", "--output_dir", interrupted, "--rank", 4, "--learning_rate", 1])
    assert "began with other options: rank was 2 and is now 4; learning_rate was 0.001 and is now 1.0." in message
    assert "or start a new run in another folder" in message


def test_options_that_do_not_affect_the_result_may_change(uninterrupted: Path, tmp_path: Path) -> None:
    interrupted = interrupted_copy(uninterrupted, tmp_path / "broken")
    job, checkpoint = parse(["--resume", "--output_dir", str(interrupted), "--run_name", "other"])
    assert job.training.run_name == "other"
    assert checkpoint == interrupted / "checkpoints" / "checkpoint-4"


def test_a_folder_without_a_run_or_a_complete_checkpoint_is_refused(
    uninterrupted: Path, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    assert f"there is no run in {tmp_path}" in error_of(["train", "--resume", "--output_dir", tmp_path])
    interrupted = interrupted_copy(uninterrupted, tmp_path / "broken")
    shutil.rmtree(interrupted / "checkpoints")
    message = error_of(["train", "--resume", "--output_dir", interrupted])
    assert f"the run in {interrupted} ended before its first checkpoint. {how_to_resume(interrupted)}" in message


def test_a_lora_ga_checkpoint_without_its_sidecar_is_refused(
    uninterrupted: Path, tmp_path: Path, error_of: Callable[[list[object]], str]
) -> None:
    interrupted = interrupted_copy(uninterrupted, tmp_path / "broken")
    (interrupted / "checkpoints" / "checkpoint-4" / "lora_ga.safetensors").unlink()
    message = error_of(["train", "--resume", "--output_dir", interrupted])
    assert "checkpoint-4 has no lora_ga.safetensors" in message
    assert "Without it the adapter would train on as plain LoRA" in message


def test_an_optimizer_state_of_other_shapes_is_refused() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 3))
    optimizer = torch.optim.AdamW([weight])
    optimizer.state[weight] = {"exp_avg": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"exp_avg is \(2, 3\), its parameter \(4, 3\)"):
        OptimizerGuard().on_train_begin(None, None, None, optimizer=optimizer)
