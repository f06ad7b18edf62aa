"""`lora-ga compare`: what it shows, what it writes, and what it refuses."""

import json
from pathlib import Path

import pytest

from lora_ga.cli.main import main
from runs import falling_losses, write_run


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    for name, speed in (("lora", 1), ("lora-ga", 2)):
        write_run(Path(name), name=name, method=name, curve=falling_losses(speed))
    return ["lora", "lora-ga"]


def other_names(tmp_path: Path) -> set[str]:
    """The names in the folder that are not those of the runs."""
    return {path.name for path in tmp_path.iterdir()} - {"lora", "lora-ga"}


def test_compare_shows_the_table_and_writes_the_page_and_the_picture(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *folders, "--output", "out/page.html", "--png", "curve.png", "--smooth", "1"]) == 0
    shown = capsys.readouterr().out
    assert "2.00×" in shown
    assert f"Written: {tmp_path / 'out' / 'page.html'}" in shown
    assert Path("out/page.html").read_text().startswith("<!DOCTYPE html>")
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")


def test_options_may_precede_the_folders_or_come_from_a_file(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("compare.json").write_text(
        json.dumps({"runs": folders, "target_loss": 3.0, "output": "page.html", "smooth": 1})
    )
    assert main(["compare", "--config", "compare.json"]) == 0
    assert main(["compare", "--overwrite", "--output", "page.html", "--target_loss", "3", *folders]) == 0
    assert "steps to loss 3" in capsys.readouterr().out


def test_the_names_of_many_runs_are_shown_literally(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for rate in (1, 2, 3):
        folders.append(f"rate-{rate}")
        write_run(Path(folders[-1]), name=f"[b]{rate}[/b]", learning_rate=rate)
    assert main(["compare", *folders]) == 0
    # A name with brackets is not read as markup.
    assert "[b]3[/b]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "0 runs given, at least 1 is needed"),
        (["lora", "lora-ga/../lora"], "lora-ga/../lora: given twice (first as lora)"),
        (["lora", "gone"], "gone: this folder does not exist"),
        (["lora", "unfinished"], "unfinished: unfinished run, there is no run.json"),
        (["lora", "damaged"], "damaged/run.json: damaged, it is not JSON"),
        (["lora", "--output", "page.txt"], "page.txt: ends in .txt, but what is written is .html"),
        (["lora", "--png", "picture"], "picture: ends in nothing, but what is written is .png"),
        (["lora", "--output", "folder.html"], "folder.html: this is a folder. Name a file in it."),
        (["lora", "--output", "old.html/page.html"], "old.html/page.html: cannot be made, old.html is a file"),
        (["lora", "--output", "old.html"], "old.html: exists already. Choose another name, or add --overwrite."),
        (["lora", "--png", "old.png"], "old.png: exists already."),
        (["lora", "--target_loss", "nan"], "target_loss: nan is not a finite number"),
        (["lora", "--smooth", "0"], "smooth: 0 steps, but"),
        (["lora", "--overwrite", "lora-ga"], "lora-ga: not understood. Give all the run folders together"),
    ],
)
def test_bad_input_gets_an_error_message_and_nothing_is_written(
    arguments: list[str], message: str, folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert folders
    Path("unfinished").mkdir()
    Path("folder.html").mkdir()
    Path("damaged").mkdir()
    Path("damaged/run.json").write_text("{")
    for name in ("old.html", "old.png"):
        Path(name).write_text("old")
    before = other_names(tmp_path)
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lora-ga compare: error: ")
    assert message in error
    assert other_names(tmp_path) == before
    assert Path("old.html").read_text() == "old"


def test_a_page_that_cannot_be_written_is_named(
    folders: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("lora_ga.cli.terminal.write_atomically", refuse)
    assert main(["compare", *folders]) == 2
    assert "compare.html: cannot be written (Permission denied). Choose another place." in capsys.readouterr().err


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "--help"])
    assert "lora-ga compare runs/lora-ga runs/lora" in capsys.readouterr().out
