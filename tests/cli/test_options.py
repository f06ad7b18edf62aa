"""The options of the command line, their checks, and the configuration file."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from lora_ga.cli import train
from lora_ga.cli.estimate import GROUPS
from lora_ga.cli.export import ExportOptions
from lora_ga.cli.options import (
    LEARNING_RATES,
    AdapterOptions,
    DataOptions,
    EstimateOptions,
    Job,
    ModelOptions,
    TargetOptions,
    TrainingOptions,
)
from lora_ga.cli.parsing import OTHER_NAMES, config_parser, parse_with_config, read_mapping
from lora_ga.cli.report import ReportOptions
from lora_ga.cli.reproduce import ReproduceOptions
from lora_ga.cli.settings import (
    ELSEWHERE,
    HELP,
    OPTION_OF,
    START,
    estimate_settings,
    in_options,
    library_config,
    settings_as_options,
)
from lora_ga.config import CHOICES, LoraGAConfig
from lora_ga.gradients.coverage import NAME_OTHERS

NEEDED = ["--model", "m", "--task", "causal-lm", "--train_file", "t.jsonl", "--output_dir", "o"]


def job(*argv: str, config: Path | None = None) -> Job:
    given = [] if config is None else ["--config", str(config)]
    return Job(*parse_with_config(train.make_parser(), [*argv, *given]))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_the_command_line_overrides_the_file_and_the_file_overrides_the_defaults(suffix: str, tmp_path: Path) -> None:
    text = {
        ".json": '{"rank": 4, "alpha": 32, "learning-rate": 1e-4, "target_modules": ["q", "v"], "use_rslora": false}'
    }.get(suffix, "rank: 4\nalpha: 32\nlearning-rate: 1e-4\ntarget_modules: [q, v]\nuse_rslora: false\nmax_steps: null")
    found = job(*NEEDED, "--alpha", "2", config=write(tmp_path / f"file{suffix}", text))
    assert (found.target.rank, found.adapter.alpha, found.training.learning_rate) == (4, 2.0, 1e-4)
    assert found.target.targets == ["q", "v"]
    assert found.adapter.use_rslora is False
    assert found.data.batch_size == 8
    assert found.training.max_steps is None


def test_required_options_may_come_from_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "file.yaml", "model: m\ntask: seq-cls\ntrain_file: t.csv\n")
    assert job("--output_dir", "o", config=file).model.model == "m"


def test_options_written_to_a_file_are_read_back_unchanged(tmp_path: Path) -> None:
    from lora_ga.cli import checkpoints

    before = job(*NEEDED, "--learning_rate", "3e-5", "--target_modules", "q_proj", "v_proj", "--no_use_rslora")
    checkpoints.write_config(tmp_path / "run", before.options())
    after = job(config=tmp_path / "run" / "config.yaml")
    assert after == before
    assert "resume" not in before.options()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lora_r: 4",
            r"file.yaml: unknown keys lora_r. Here lora_r is rank. The known keys are .*rank, .*warmup_ratio",
        ),
        ("rank: many", r"file.yaml: argument --rank: invalid int value: 'many'"),
        ("task: sorting", r"file.yaml: argument --task: invalid choice: 'sorting' \(choose from .*seq-cls"),
        ("rank: {a: 1}", r"file.yaml: rank holds a mapping, but every option is a single value or a list"),
        ("- rank", r"file.yaml: holds a list, but it must map option names to values"),
        ("rank: [", r"file.yaml: could not be read as YAML"),
    ],
)
def test_files_with_wrong_content_are_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        job(*NEEDED, config=write(tmp_path / "file.yaml", text))


def test_missing_files_and_other_formats_are_refused_and_an_empty_file_holds_no_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"file.toml: a configuration file ends in .yaml, .yml, .json"):
        job(*NEEDED, config=write(tmp_path / "file.toml", "rank = 1"))
    with pytest.raises(FileNotFoundError, match=r"none.yaml: there is no such configuration file"):
        job(*NEEDED, config=tmp_path / "none.yaml")
    assert read_mapping(write(tmp_path / "empty.yaml", "")) == {}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--learning_rate", "auto", "--method", "full"],
            "--learning_rate auto is for adapters, but the method is full",
        ),
        (["--learning_rate", "best"], "--learning_rate.*: invalid float or auto value: 'best'"),
        (["--rank", "0"], "--rank: found 0, but it must be at least 1"),
        (["--batch_size", "0"], "--batch_size: found 0, but it must be at least 1"),
        (["--seed", "-1"], "--seed: found -1, but it must be at least 0"),
        (["--alpha", "0"], r"--alpha: found 0.0, but it must be greater than 0"),
        (["--stable_gamma", "-1"], r"--stable_gamma: .* is -1.0; it must be a finite number above 0"),
        (["--reach", "0"], r"--reach: .* is 0.0; it must be a finite number above 0"),
        (["--oversample", "-1"], r"--oversample: .* is -1; it must be an integer of at least 0"),
        (["--power_steps", "-1"], r"--power_steps: .* is -1; it must be an integer of at least 0"),
        (["--tolerance", "2"], r"--tolerance: .* is 2.0; it must be None or between 0 and 1"),
        (["--stable_gamma", "16", "--reach", "1"], "They are two ways to choose the size of the start. Leave one"),
        (["--tolerance", "0.1", "--estimator", "dense"], 'tolerance is 0.1 with estimator="dense"'),
        (["--lora_dropout", "1"], r"--lora_dropout: found 1.0, but it must be at least 0 and less than 1"),
        (["--warmup_ratio", "2"], r"--warmup_ratio: found 2.0, but it must be at least 0 and less than 1"),
        (["--learning_rate", "nan"], r"--learning_rate: found nan, but it must be greater than 0"),
        (["--epochs", "0"], r"--epochs: found 0.0, but it must be greater than 0"),
        (["--max_steps", "0"], "--max_steps: found 0, but it must be at least 1"),
        (["--estimate_batches", "0"], "--estimate_batches: .* is 0; it must be an integer of at least 1"),
        (["--method", "dora"], "argument --method: invalid choice: 'dora'"),
        (["--rnk", "4"], r"--rnk: there is no such option. Did you mean --rank."),
        (["--dataset", "d"], "Give either --train_file or --dataset; both were given"),
        (["--dataset_config", "c"], "--dataset_config belongs to --dataset"),
        (["--eval_split", "test"], "--eval_split belongs to --dataset"),
        (["--eval_steps", "5"], "--eval_steps was given, but nothing to evaluate on"),
        (["--prompt_column", "p"], "--prompt_column was given without --target_column"),
        (["--target_column", "p"], "--target_column was given without --prompt_column"),
        (["--method", "lora", "--estimate_file", "f"], "--estimate_file belongs to --method lora-ga"),
    ],
)
def test_wrong_options_are_refused_by_name(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(*NEEDED, *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--lr 1e-3", "--lr: there is no such option. Here --lr is --learning_rate."),
        ("--lora_r 4", "--lora_r: there is no such option. Here --lora_r is --rank."),
        ("--per-device-train-batch-size 4", "Here --per-device-train-batch-size is --batch_size."),
        ("--bf16", "Here --bf16 is --dtype bfloat16."),
        ("--fp16", "Here --fp16 is --dtype bfloat16 (there is no float16)."),
        ("--output out", "Here --output is --output_dir."),
        ("--model_name_or_path m", "Here --model_name_or_path is --model."),
        (
            "--lr=1 --model_name m --rnk 4",
            "--lr, --model_name, --rnk: there are no such options. Here --lr is --learning_rate. Here --model_name is "
            "--model. Did you mean --rank for --rnk?",
        ),
        ("--colour red", "--colour: there is no such option. `lora-ga train --help`"),
    ],
)
def test_names_of_other_tools_are_pointed_to_the_option_here_before_missing_ones_are_named(
    argv: str, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        job(*argv.split())


def test_every_other_name_points_to_an_option_of_some_command_and_is_none_itself() -> None:
    groups = [*Job.GROUPS, *GROUPS, ExportOptions, ReportOptions, ReproduceOptions]
    options = {item.name for group in groups for item in fields(group)} | {"overwrite", "load_in_4bit"}
    assert {option for meant in OTHER_NAMES.values() for option in meant} <= options
    assert set(OTHER_NAMES) & {item.name for group in Job.GROUPS for item in fields(group)} == {"output_dir"}


def test_two_sources_of_evaluation_data_are_refused() -> None:
    argv = ["--model", "m", "--task", "seq-cls", "--dataset", "d", "--output_dir", "o"]
    with pytest.raises(ValueError, match="Give either --eval_file or --eval_split; both were given"):
        job(*argv, "--eval_split", "test", "--eval_file", "f.csv")
    with pytest.raises(ValueError, match="Give either --train_file or --dataset; neither was given"):
        job("--model", "m", "--task", "seq-cls", "--output_dir", "o")


@pytest.mark.parametrize("method", LEARNING_RATES)
def test_each_method_has_a_default_learning_rate(method: str) -> None:
    assert job(*NEEDED, "--method", method).training.learning_rate == LEARNING_RATES[method]
    assert job(*NEEDED, "--method", method, "--learning_rate", "1").training.learning_rate == 1


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        (["--stable_gamma", "16", "--estimate_batches", "4", "--rank", "4"], []),
        (["--method", "lora", "--stable_gamma", "16", "--estimate_batches", "4"], ["stable_gamma", "estimate_batches"]),
        (["--method", "lora", "--reach", "0.35", "--rank", "4", "--alpha", "8"], []),
        (["--method", "full", "--rank", "4", "--alpha", "8", "--tolerance", "0.1"], ["rank", "alpha", "tolerance"]),
        (["--estimate_file", "e", "--power_steps", "1", "--on_missing", "lora", "--reach", "0.5"], ["power_steps"]),
        (
            ["--from_adapter", "a", "--rank", "4", "--reach", "0.5", "--tolerance", "0.1"],
            ["rank", "reach", "tolerance"],
        ),
    ],
)
def test_options_that_the_method_does_not_read_are_found(given: list[str], unused: list[str]) -> None:
    assert job(*NEEDED, *given).unused() == unused


def test_choices_and_defaults_equal_those_of_the_library() -> None:
    hints: dict[str, Any] = get_type_hints(AdapterOptions) | get_type_hints(EstimateOptions)
    assert {name: get_args(hints[name]) for name in CHOICES} == dict(CHOICES)
    defaults = {item.name: item.default for group in (AdapterOptions, EstimateOptions) for item in fields(group)}
    library = LoraGAConfig()
    for name in ("direction", "scale", "stable_gamma", "reach", "offset"):
        assert defaults[name] == getattr(library, name)
    for name in ("estimator", "oversample", "power_steps", "tolerance", "on_missing"):
        assert defaults[name] == getattr(library, name)
    assert defaults["estimate_batches"] == library.max_batches


# A value for each setting that differs from its default.
OTHER: dict[str, Any] = {
    "direction": "random",
    "scale": "gd",
    "stable_gamma": 4.0,
    "reach": 0.5,
    "offset": "base",
    # The only estimator that takes a tolerance.
    "estimator": "streaming",
    "oversample": 3,
    "power_steps": 1,
    "max_batches": 5,
    "tolerance": 0.1,
    "on_missing": "lora",
    "training_mode": False,
    "seed": 7,
}


def test_every_setting_of_the_library_is_an_option_of_train_and_estimate() -> None:
    assert set(OTHER) == {item.name for item in fields(LoraGAConfig)}
    options = {OPTION_OF.get(name, name): value for name, value in OTHER.items()}
    for size in ("stable_gamma", "reach"):  # one excludes the other
        chosen = {name: value for name, value in OTHER.items() if name not in {"stable_gamma", "reach"} or name == size}
        given = job(*NEEDED, *(f"--{OPTION_OF.get(name, name)}={value}" for name, value in chosen.items()))
        assert library_config(given.model, given.adapter, given.estimate) == LoraGAConfig(**chosen)
    # `lora-ga estimate` has no options for the start of the adapter.
    options = {name: value for name, value in options.items() if name not in START}
    argv = [*NEEDED[:-2], "--output", "e.safetensors", *(f"--{name}={value}" for name, value in options.items())]
    model, _, _, estimate, _ = parse_with_config(config_parser(GROUPS, prog="lora-ga estimate"), argv)
    expected = {name: value for name, value in OTHER.items() if name not in START}
    assert library_config(model, estimate) == LoraGAConfig(**expected)


@dataclass(frozen=True)
class Grown(LoraGAConfig):
    """The settings with one more.

    Attributes:
        warmth: How warm the start is, of
            the 100% that are there. Larger is warmer.
    """

    warmth: float | None = 0.5


def test_a_new_setting_of_the_library_becomes_an_option() -> None:
    @dataclass
    @settings_as_options(estimate_settings(Grown), Grown)
    class Options:
        pass

    parser = config_parser([Options], prog="lora-ga")
    assert "How warm the start is, of the 100% that are there (default: 0.5)" in " ".join(parser.format_help().split())
    (options,) = parse_with_config(parser, ["--warmth", "0.25", "--oversample", "1"])
    assert library_config(options, config=Grown) == Grown(warmth=0.25, oversample=1)


def test_every_setting_has_a_help_text_for_the_command_line() -> None:
    assert set(HELP) == {item.name for item in fields(LoraGAConfig)} - set(ELSEWHERE)


RANK = "  a, b: rank 12 is too large. The largest rank that fits all is 8 (a)\n"
LEAVE = 'Leave them out of target_modules, or set on_missing="lora" to start them as plain LoRA.'
NAMED = LEAVE.replace("of target_modules", "with LoraConfig(exclude_modules=['a', 'b'])")
OPTIONS = "eave them out of --target_modules, or set --on_missing lora to start them as plain LoRA."


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ('LoraGAConfig(estimator="probe") saves', "--estimator probe saves"),
        ("use LoraGAConfig(training_mode=False).", "use --training_mode False."),
        ("set max_batches=8", "set --estimate_batches 8"),
        (
            f'Set on_missing="lora" to start them as plain LoRA, or {NAME_OTHERS}.',
            f"S{OPTIONS[39:-1]}, or name the other layers in --target_modules and --target_parameters.",
        ),
        ("a/scale=stable: --target_modules x", "a/scale=stable: --target_modules x"),
        (f"2 of 4:\n{RANK}{LEAVE}", f"2 of 4:\n{RANK}Give --rank 8, l{OPTIONS}"),
        (f"2 of 4:\n{RANK}{NAMED}", f"2 of 4:\n{RANK}Give --rank 8, l{OPTIONS}"),
        (f"3 of 4:\n{RANK}  c: no gradient\n{LEAVE}", f"3 of 4:\n{RANK}  c: no gradient\nL{OPTIONS}"),
    ],
)
def test_messages_of_the_library_name_options(message: str, shown: str) -> None:
    assert in_options(message) == shown


def test_help_explains_every_option_once(capsys: pytest.CaptureFixture[str]) -> None:
    shown = train.make_parser().format_help()
    groups = (ModelOptions, DataOptions, TargetOptions, AdapterOptions, EstimateOptions, TrainingOptions)
    for group in groups:
        for item in fields(group):
            assert item.metadata["help"]
            assert shown.count(f"\n  --{item.name} ") + shown.count(f"\n  --{item.name}\n") == 1, item.name
    assert "(default: all-linear)" in shown
    assert "(default: 16.0)" in shown
    assert "swept" in shown or "sweep" in shown
    assert "--no" not in shown
    assert all(f"\n{group._argument_group_name}:\n" in shown for group in groups)
