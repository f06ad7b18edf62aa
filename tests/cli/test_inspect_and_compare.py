"""`lora-ga inspect` on estimates with a known spectrum, and `lora-ga compare`."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from lora_ga import GradientEstimate, LoraGAConfig, allocate_ranks
from lora_ga.cli.inspect import RANKS, layer_table, ordered, share_figure, short_names, summary
from lora_ga.cli.main import main
from lora_ga.experiments.pages.drawing import render
from lora_ga.linalg.low_rank import LowRank
from runs import falling_losses, write_run


def layer(singular_values: list[float], norm: float) -> LowRank:
    kept = len(singular_values)
    return LowRank(torch.eye(12, kept), torch.tensor(singular_values), torch.eye(10, kept), norm)


def known_estimate() -> GradientEstimate:
    """Three layers: shares (r = 1, 2) of (0.5, 0.7071), (0.8, blank) and (1, 1)."""
    layers = {
        "base_model.model.layers.10.q": layer([1.0, 1.0, 1.0, 1.0], norm=math.sqrt(8)),
        "base_model.model.layers.2.q": layer([8.0, 0.0, 0.0], norm=10.0),
        "base_model.model.layers.2.k": layer([1.0, 0.0, 0.0, 0.0], norm=1.0),
    }
    missing = {"lost.layer": "never ran in 5 batches"}
    settled = {"base_model.model.layers.2.q": 4}
    config = LoraGAConfig(seed=7, tolerance=0.01, max_batches=5)
    return GradientEstimate(layers, config, "0" * 16, 1234.0, 5, missing, settled)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    known_estimate().save("estimate.safetensors")
    return "estimate.safetensors"


def test_a_budget_shows_the_rank_of_every_layer(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", file, "--budget", "90", "--max_rank", "2"]) == 0
    *_, first, settings = capsys.readouterr().out.strip().split("\n")
    assert first == (
        "Ranks by the gradient's spectrum: 88 trained parameters. The scaling is s = 2, lora_alpha / rank in every "
        "layer. In Python, where you add target_modules:"
    )
    expected = allocate_ranks(known_estimate(), 90, max_rank=2).lora_settings()
    assert eval(settings, {"LoraConfig": LoraConfig}) == LoraConfig(**expected)
    assert list(expected["rank_pattern"].values()) == [2]
    estimate = known_estimate()
    shares = {name: {rank: estimate[name].limit(rank) for rank in RANKS} for name in estimate}
    table = layer_table(estimate, shares, list(estimate), allocate_ranks(estimate, 90))
    assert [row[-1] for row in table.rows] == ["2", "1", "1", "1"]


def test_a_largest_rank_without_a_budget_is_refused(file: str, error_of: Callable[[list[object]], str]) -> None:
    assert "--max_rank needs --budget" in error_of(["inspect", file, "--max_rank", "4"])


def test_shares_follow_from_the_spectrum_and_are_blank_if_too_few_directions_are_held() -> None:
    estimate = known_estimate()
    shares = {name: {rank: estimate[name].limit(rank) for rank in RANKS} for name in estimate}
    table = layer_table(estimate, shares, list(estimate))
    assert table.headers == [
        "layer",
        "out×in",
        "‖G‖",
        "held",
        "settled",
        "r=1",
        "r=2",
        "r=4",
        "r=8",
        "r=16",
        "r=32",
        "r=64",
    ]
    assert [row[:7] for row in table.rows] == [
        ["10.q", "12×10", "2.83", "0.500", "–", "0.500", "0.707"],
        ["2.q", "12×10", "10", "0.640", "4", "0.800", "–"],
        ["2.k", "12×10", "1", "1.000", "–", "1.000", "1.000"],
        ["median", "", "2.83", "0.640", "", "0.800", "0.854"],
    ]
    assert {cell for row in table.rows for cell in row[7:]} == {"–"}


@pytest.mark.parametrize(
    ("by", "expected"),
    [("name", ["2.k", "2.q", "10.q"]), ("norm", ["2.q", "10.q", "2.k"]), ("share", ["10.q", "2.q", "2.k"])],
)
def test_layers_are_sorted_by_name_norm_or_share(by: str, expected: list[str]) -> None:
    estimate = known_estimate()
    shares = {name: {rank: estimate[name].limit(rank) for rank in RANKS} for name in estimate}
    assert short_names(ordered(estimate, shares, by)) == expected


def test_names_lose_their_common_prefix_but_never_become_empty() -> None:
    assert short_names(["a.b.c", "a.b.d"]) == ["c", "d"]
    assert short_names(["a.b", "a.b.c"]) == ["b", "b.c"]
    assert short_names(["a.b.c"]) == ["c"]


def test_the_summary_states_how_the_estimate_was_made_and_what_is_missing() -> None:
    text = "\n".join(summary(known_estimate()))
    assert "3 layers; 5 batches, 1,234 label tokens; seed 7." in text
    assert "estimator=streaming" in text
    assert "The streaming estimator estimates ‖G‖ from eight random probes" in text
    assert "fewer than 2r directions are held" in text
    assert "No gradient for lost.layer: never ran in 5 batches." in text


def test_inspect_shows_the_table_and_writes_the_plot(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", file, "--sort", "share", "--plot", "shares.png"]) == 0
    shown = capsys.readouterr().out
    assert "0.707" in shown
    assert shown.index("10.q") < shown.index("2.k")
    assert f"Written: {tmp_path / 'shares.png'}" in shown
    assert Path("shares.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_takes_the_folder_of_a_run(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", file]) == 0
    shown = capsys.readouterr().out
    assert main(["inspect", "."]) == 0
    assert capsys.readouterr().out == shown


def test_the_plot_of_1000_layers_has_the_size_of_that_of_60() -> None:
    known_shares = dict.fromkeys(RANKS, math.nan) | {1: 0.5, 2: 0.7}
    figures = [share_figure([known_shares] * n, [str(i) for i in range(n)]) for n in (60, 1000)]
    assert figures[0].get_size_inches().tolist() == figures[1].get_size_inches().tolist()
    assert render(figures[1], "png").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "0 estimates given, but it must be 1"),
        (["estimate.safetensors", "other"], "2 estimates given, but it must be 1"),
        (["gone.safetensors"], "gone.safetensors: no such file"),
        (["/"], "/: this folder holds no estimate.safetensors. Give the folder of a LoRA-GA run, or an estimate"),
        (["damaged.safetensors"], "damaged.safetensors: damaged, or not a safetensors file"),
        (["adapter.safetensors"], "adapter.safetensors: holds tensors of another program"),
        (["estimate.safetensors", "--plot", "plot.svg"], "plot.svg: ends in .svg, but what is written is .png"),
        (["estimate.safetensors", "--plot", "old.png"], "old.png: exists already"),
        (["estimate.safetensors", "--sort", "size"], "invalid choice: 'size'"),
    ],
)
def test_inspect_refuses_bad_input_with_a_message_and_writes_nothing(
    arguments: list[str], message: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("damaged.safetensors").write_bytes(Path(file).read_bytes()[:-100])
    save_file({"weight": torch.ones(2)}, "adapter.safetensors")
    Path("old.png").write_text("old")
    before = sorted(tmp_path.iterdir())
    assert main(["inspect", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lora-ga inspect: error: ")
    assert message in error
    assert sorted(tmp_path.iterdir()) == before


def test_the_help_of_inspect_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", "--help"])
    assert "lora-ga inspect runs/lora-ga\n" in capsys.readouterr().out


# --- compare ---------------------------------------------------------------------------------------------------------


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
        (["lora", "unfinished"], "unfinished: unfinished run, or none: there is no run.json"),
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
def test_compare_refuses_bad_input_with_a_message_and_writes_nothing(
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


def test_a_missing_run_is_named_before_a_page_that_exists(
    folders: list[str], error_of: Callable[[list[object]], str]
) -> None:
    Path("compare.html").touch()
    assert "runs/nothing: this folder does not exist." in error_of(["compare", "runs/nothing"])
    assert "compare.html: exists already." in error_of(["compare", *folders])


def test_a_page_that_cannot_be_written_is_named(
    folders: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("lora_ga.cli.terminal.write_atomically", refuse)
    assert main(["compare", *folders]) == 2
    assert "compare.html: cannot be written (Permission denied). Choose another place." in capsys.readouterr().err


def test_the_help_of_compare_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "--help"])
    assert "lora-ga compare runs/lora-ga runs/lora" in capsys.readouterr().out
