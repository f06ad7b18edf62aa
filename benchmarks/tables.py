"""The tables of the README and of the pages in docs/, drawn from the records in benchmarks/results and recipes/results.

python benchmarks/tables.py          prints them
python benchmarks/tables.py --write  writes each between its markers in its page
"""

from __future__ import annotations

import functools
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from against_lora import IN_ERRORS, against_lora_table, better_by, classifier_steps_table, complete_table, steps_table
from lora_ga.experiments.comparison.suites import Result, plain_lora
from lora_ga.experiments.suites.cells import score
from lora_ga.experiments.suites.spec import load_suite
from lora_ga.experiments.tables.suites import method_table, overview_table
from lora_ga.experiments.tables.table import BLANK, markdown_lines
from published import ROOT, better, load, published_results, rate_text, short_mean
from rate_tables import (
    found_rates_table,
    leaders_table,
    smollm2_found_table,
    smollm2_summary,
    smollm2_table,
    unswept_table,
)

MARKERS = re.compile(r"(<!-- drawn from records -->\n).*?(\n<!-- end -->)", flags=re.DOTALL)


def difference_table() -> str:
    """How the library differs from PEFT's own `lora_ga` and from plain LoRA, in Markdown. Two rows are measured."""
    aligned = load("alignment")["models"]["babyllama105 on tinyshakespeare"]
    memory = load("estimation")["memory"]["over lora steps"]
    rows = [
        (
            "alignment of the first training step ↑",
            *better([f"{aligned[start]['median']:.3f}" for start in ("ours, streaming", "peft lora_ga", "lora")], max),
        ),
        (
            "peak memory of the start ÷ that of training ↓",
            *better([f"{memory[way]:.2f}" for way in ("ours", "peft lora_ga")], min),
            BLANK,
        ),
        ("the base model", "unchanged", "changed", "unchanged"),
        ("the saved adapter fits", "the original base", "the changed base, or needs a conversion", "the original base"),
        ("a 4-bit base", "yes", "refused", "yes"),
        ("a layer without a gradient", "an error names it", "starts as plain LoRA, without a warning", BLANK),
    ]
    lines = ["| | LoRA-GA, this library | PEFT's `lora_ga` | plain LoRA |", "|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


# (Suite, task) → title of its column in the README.
COLUMNS = {
    ("stories-shakespeare", "babyllama105"): "babyllama105, loss ↓",
    ("stories-shakespeare", "stories260k"): "stories260k, loss ↓",
    ("glue-minilm", "sst2"): "SST-2, accuracy ↑",
    ("glue-minilm", "mrpc"): "MRPC, accuracy ↑",
    ("glue-minilm", "cola"): "CoLA, correlation ↑",
}
# Title of a row in the README → label of the variant. The last row is no adapter, and is not compared with them.
ROWS = {
    "LoRA-GA": "lora-ga reach=0.35",
    "LoRA-GA, γ = 16": "lora-ga γ=16",
    "PEFT's `lora_ga`": "peft lora_ga",
    "plain LoRA": "lora",
    "rsLoRA": "rslora",
    "full fine-tuning": "full",
}


def readme_columns() -> Iterator[tuple[str, str, list[Result]]]:
    """The columns of the README: title, metric, and the results in the order of the rows."""
    for (name, task), title in COLUMNS.items():
        found = {each.label: each for each in published_results(name) if each.task == task}
        yield title, load_suite(name).tasks[task].metric, [found[label] for label in ROWS.values()]


def readme_table(columns: Mapping[str, Sequence[str]]) -> str:
    """A table of the README from its columns, in Markdown."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for label, cells in zip(ROWS, zip(*columns.values(), strict=True), strict=True):
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def results_table() -> str:
    """The metric after training, every method at its best learning rate, the best adapter in bold, in Markdown."""
    columns, leads, rows = {}, [], list(ROWS)
    for title, metric, found in readme_columns():
        *adapters, full = [short_mean(each.values(metric)) for each in found]
        columns[title] = [*better(adapters, min if metric == "loss" else max), full]
        leads.append(better_by(found[rows.index("LoRA-GA")], found[rows.index("plain LoRA")], metric))
    return f"{readme_table(columns)}\n| LoRA-GA better than plain LoRA by, {IN_ERRORS} | {' | '.join(leads)} |"


def rates_table() -> str:
    """The learning rates of the results, in Markdown."""
    return readme_table(
        {title.split(",")[0]: [short_rate(each) for each in found] for title, _, found in readme_columns()}
    )


def short_rate(result: Result) -> str:
    """The best learning rate of a method, with two digits, or a blank."""
    return BLANK if result.rate is None else rate_text(result.rate)


def cost_table() -> str:
    """The cost of an estimate for a Llama of 150M parameters, compared with its goals, in Markdown."""
    found = load("estimation")
    ratios, wide = found["times"]["median ratios"], found["width 2048"]["median ratios"]
    memory, held, flat = found["memory"]["over lora steps"], found["estimate"], found["estimate, random bytes"]
    rows = [
        ("time ÷ frozen forward and backward pass", f"{ratios['frozen pass']:.3f}", "≤ 1.10"),
        ("the same, least possible by counts of multiplications", f"{found['floor']:.2f}", "–"),
        ("the same at width 2048, 4 layers", f"{wide['frozen pass']:.2f}", "–"),
        ("time ÷ PEFT's `preprocess_loraga` and `get_peft_model`", f"{ratios['peft lora_ga']:.2f}", "≤ 0.80"),
        ("peak memory ÷ that of plain LoRA steps", f"{memory['ours']:.2f}", "≤ 0.80"),
        ("the same of PEFT's `lora_ga`", f"{memory['peft lora_ga']:.2f}", "–"),
        ("state ÷ one float32 gradient of all targets", f"{held['state over gradient']:.3f}", "≤ 0.06"),
        ("alignment ratio, median (lowest)", f"{held['median']:.4f} ({held['lowest']:.4f})", "≥ 0.995"),
        ("the same, 2 layers on random bytes", f"{flat['median']:.4f} ({flat['lowest']:.4f})", "–"),
    ]
    lines = ["| | measured | goal |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {figure} | {goal} |" for what, figure, goal in rows)])


def update_table() -> str:
    """The time of each part of one layer's update, and how time and state grow, in Markdown."""
    found = load("update")
    costs = found["ms"]
    lines = [f"| one layer, width {found['width']}, ms | " + " | ".join(f"{tokens} tokens" for tokens in costs) + " |"]
    lines += ["|---|" + "---|" * len(costs)]
    for what in next(iter(costs.values())):
        lines.append(f"| {what} | " + " | ".join(f"{each[what]:.2f}" for each in costs.values()) + " |")
    lines += ["", "| growth with | time | state |", "|---|---|---|"]
    exponents = {name: each["exponents"] for name, each in found["growth"].items()}
    lines += [
        f"| {name} | exponent {time:.2f} | exponent {round(state, 2) + 0.0:.2f} |"  # no -0.00
        for name, (time, state) in exponents.items()
    ]
    return "\n".join(lines)


def early_stop_table() -> str:
    """The accuracy that the early stop loses and the batches that it saves, in Markdown."""
    lines = [
        "| tolerance | alignment ratio, median | lowest | batches a layer, mean | saved |",
        "|---|---|---|---|---|",
    ]
    for tolerance, row in load("estimation")["early stop"].items():
        cells = [
            tolerance,
            f"{row['median']:.4f}",
            f"{row['lowest']:.4f}",
            f"{row['batches']:.0f}",
            f"{row['saved']:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def quantised_table() -> str:
    """The initialisation of adapters on 4-bit models, in Markdown."""
    lines = [
        "| nf4 | alignment ratio, the 4-bit model's gradient | the full-precision model's | largest change of logits |",
        "|---|---|---|---|",
    ]
    for name, model in load("quantised")["models"].items():
        whose = (model["against the 4-bit model"], model["against the full-precision model"])
        ratios = [f"{each['median']:.3f} ({each['lowest']:.3f})" for each in whose]
        lines.append(f"| {name} | {' | '.join(ratios)} | {model['largest change of a logit']:g} |")
    return "\n".join(lines)


def qlora_table() -> str:
    """LoRA and LoRA-GA trained on a 4-bit model, in Markdown."""
    found = load("qlora")
    lines = ["| | settings tried | γ | best rate | Matthews correlation, by seed | loss |", "|---|---|---|---|---|---|"]
    for method, best in found["best"].items():
        tried = sum(cell["method"] == method and cell["seed"] == 0 for cell in found["cells"])
        gamma = "–" if best["gamma"] is None else f"{best['gamma']:g}"
        scores = ", ".join(f"{each['matthews']:.3f}" for each in best["validation"])
        losses = ", ".join(f"{each['loss']:.3f}" for each in best["validation"])
        lines.append(f"| {method} | {tried} | {gamma} | {best['rate']:g} | {scores} | {losses} |")
    return "\n".join(lines)


def why_table() -> str:
    """How far and in which direction each method moves the weights in its first steps, in Markdown."""
    found = load("why")["methods"]
    steps = list(found["full"])
    figures = {
        "cosine with full": "cosine of ΔW with full fine-tuning's",
        "cosine with -G": "cosine of ΔW with −G",
        "size": "‖ΔW‖ ÷ ‖W‖",
        "A where it began": "share of ‖A‖² in the rows' span at the start",
        "A moved": "‖A − A₀‖ ÷ ‖A₀‖",
    }
    lines = ["| after steps | " + " | ".join(steps) + " |", "|---" * (len(steps) + 1) + "|"]
    for figure, title in figures.items():
        for method, rows in found.items():
            if figure in rows[steps[0]] and (figure, method) != ("cosine with full", "full"):
                lines.append(
                    f"| {title}: {method} | " + " | ".join(f"{rows[step][figure]:.2g}" for step in steps) + " |"
                )
    return "\n".join(lines)


def optim_table() -> str:
    """The time of a training step with the optimizers of the product, over that with AdamW, in Markdown."""
    costs = load("optim")["tokens"]
    heads = [f"{length} tokens: ÷ AdamW's | the optimizer's share" for length in costs]
    lines = ["| a training step of MiniLM with | " + " | ".join(heads) + " |", "|---|" + "---|---|" * len(costs)]
    for name in next(iter(costs.values())):
        found = [each[name] for each in costs.values()]
        cells = [f"{each['over AdamW']:.2f} | {each['share of the optimizer']:.1%}" for each in found]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def suite_overview(name: str) -> str:
    """The methods of a suite on its tasks, each at its best learning rate, in Markdown."""
    suite, found = load_suite(name), published_results(name)
    tasks = [task for task in suite.tasks if any(each.runs for each in found if each.task == task)]
    return "\n".join(markdown_lines(overview_table(suite, tasks, found)))


def reach_table(tasks: Sequence[str]) -> str:
    """The sizes of LoRA-GA's start, each at its best learning rate, on the tasks that are complete, in Markdown."""
    found = [each for each in published_results("reach") if each.task in tasks]
    if lacking := [f"{each.task}/{each.label}" for each in found if each.missing]:
        raise ValueError(f"not complete: {', '.join(lacking)}")
    return "\n".join(markdown_lines(overview_table(load_suite("reach"), tasks, found)))


def suite_methods(name: str, task: str) -> str:
    """The variants of a suite that have run on one task, compared with plain LoRA, in Markdown."""
    suite = load_suite(name)
    found = [each for each in published_results(name) if each.task == task and not each.missing]
    plain = next(each for each in found if each.label == plain_lora(suite))
    return "\n".join(markdown_lines(method_table(suite, found, plain)))


def rate_choice_table(name: str) -> str:
    """The reported metric of seed 0 at the rate chosen by the tuning split's loss, and by its metric, in Markdown."""
    suite, found = load_suite(name), published_results(name)
    tasks = [task for task in suite.tasks if any(each.runs for each in found if each.task == task)]
    columns = [(task, chooser) for task in tasks for chooser in ("loss", suite.tasks[task].metric)]
    by_task = {(each.task, each.label): each for each in found if not each.missing}
    lines = ["| | " + " | ".join(f"{task}, rate by {chooser}" for task, chooser in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for label in suite.methods:
        cells = [
            rate_choice_cell(by_task.get((task, label)), suite.tasks[task].metric, chooser) for task, chooser in columns
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rate_choice_cell(result: Result | None, metric: str, chooser: str) -> str:
    """The reported metric of seed 0 at the rate that is best by `chooser` on the tuning split, and the rate."""
    runs = {} if result is None else result.search
    scores = {rate: found for rate, run in runs.items() if (found := score(run, chooser)) is not None}
    if not scores:
        return BLANK
    best = max(scores, key=scores.__getitem__)
    return f"{runs[best]['metrics']['report'][metric]:.3f} ({best:g})"


def readers_table() -> str:
    """What other programs compute from a saved adapter, in Markdown."""
    lines = [
        "| program | the README's settings | other ranks and scalings in some layers | the same, exported for it |",
        "|---|---|---|---|",
    ]
    for name, found in load("readers").items():
        cells = [found.get(column, "not needed") for column in ("plain", "patterns", "exported")]
        lines.append(f"| {name} | " + " | ".join(map(reader_cell, cells)) + " |")
    return "\n".join(lines)


def reader_cell(outcome: str) -> str:
    """What a program makes of an adapter, in words."""
    word, _, rest = outcome.partition(": ")
    words = {"right": "reads right", "refused": "refuses", "wrong": f"**computes something else** (error {rest})"}
    return words.get(word, outcome)


# docs/scale.md: measurements, and the cost of larger models computed from them by formulas. The shapes are those of the
# published configurations: name → hidden size, intermediate size, size of keys and values, layers, parameters.
MODELS: Mapping[str, tuple[int, int, int, int, float]] = {
    "7B (Llama-2)": (4096, 11008, 4096, 32, 6.7e9),
    "70B (Llama-3.1)": (8192, 28672, 1024, 80, 70.6e9),
    "405B (Llama-3.1)": (16384, 53248, 1024, 126, 405.9e9),
}
GPUS = (8, 64, 1024)
# Assumptions: bytes that a GPU sends per second, floating-point operations per second that it reaches, tokens per
# batch, number of batches.
BANDWIDTH, SPEED, TOKENS, BATCHES = 25e9, 4e14, 8192, 32
PROBES = 8


def layer_shapes(width: int, wide: int, keys: int, layers: int) -> list[tuple[int, int]]:
    """(d_out, d_in) of all linear layers of a Llama except the head."""
    one = [(width, width), (keys, width), (keys, width), (width, width), (wide, width), (wide, width), (width, wide)]
    return one * layers


def scale_estimate(model: str, gpus: int, record: Mapping[str, Any], added: float) -> dict[str, float]:
    """Seconds and bytes of one estimate, by the formulas of the page.

    Args:
        model: A name in `MODELS`.
        gpus: Number of GPUs.
        record: Measurements on small models.
        added: Time of a forward and backward pass with the estimate, divided by its time without.

    Returns:
        Name of a column → seconds or bytes.
    """
    width, wide, keys, layers, parameters = MODELS[model]
    sizes = layer_shapes(width, wide, keys, layers)
    both, outputs = sum(o + i for o, i in sizes), sum(o for o, _ in sizes)
    up = 4 * (both * record["held by a part"] + outputs * PROBES)
    down = 4 * (both * (record["held"] + record["rank"]) + outputs * PROBES)
    share = 1 - 1 / gpus  # 1/2 + 1/4 + … of all layers
    merge = sum(row["seconds"] for row in record["merge of one layer"]) / sum(
        row["numbers"] for row in record["merge of one layer"]
    )
    passes = math.ceil(BATCHES / gpus)
    return {
        "up": up,
        "send": 2 * share * (up + down) / BANDWIDTH,
        "merge": share * merge * both * record["held by a part"],
        "pass": passes * 4 * parameters * TOKENS / SPEED * added,
        "gather": passes * 2 * 2 * parameters / BANDWIDTH,
        "weights": 2 * parameters / gpus,
        "state": up + down,
    }


def gigabytes(count: float) -> str:
    """Gigabytes as text, with two digits."""
    return f"{count / 1e9:.2g}" if count < 1e10 else f"{count / 1e9:.0f}"


def seconds(count: float) -> str:
    """Seconds as text, with two digits."""
    return f"{count:.2g}" if count < 10 else f"{count:.0f}"


def exchange_table() -> str:
    """Time, and bytes sent, of several processes, in Markdown."""
    found = load("scale")["processes"]
    lines = ["| processes | estimate, s | merged, s | shared, s | most bytes of one process | bound |"]
    lines += ["|---|---|---|---|---|---|"]
    for size, row in found.items():
        cells = [size, f"{row['seconds']:.1f}", "–", "–", "0", "–"]
        if "bound" in row:
            times = [f"{row[name]:.2f}" for name in ("merge", "share")]
            sent = row["most bytes sent, factors"] + row["most bytes sent, small values"]
            cells = [size, f"{row['seconds']:.1f}", *times, f"{sent / 1e6:.1f} MB", f"{row['bound'] / 1e6:.1f} MB"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def accuracy_table() -> str:
    """Alignment ratios and cosines of principal angles, in Markdown."""
    lines = ["| estimator, processes | alignment ratio, median | lowest | lowest cosine | median cosine |"]
    lines += ["|---|---|---|---|---|"]
    for name, row in load("scale")["accuracy"].items():
        if isinstance(row, dict):
            figures = [row[key] for key in ("median", "lowest", "lowest cosine", "median cosine")]
            lines.append(f"| {name} | " + " | ".join(f"{figure:.4f}" for figure in figures) + " |")
    return "\n".join(lines)


def larger_models_table() -> str:
    """Published model sizes on many GPUs, by the formulas, in Markdown."""
    record, added = load("scale"), load("estimation")["times"]["median ratios"]["frozen pass"]
    heads = (
        "model | GPUs | pass, s | weights gathered, s | merges, s | sent, s | one message, GB | weights, GB | state, GB"
    )
    lines = [f"| {heads} |", "|---" * 9 + "|"]
    for model in MODELS:
        for gpus in GPUS:
            row = scale_estimate(model, gpus, record, added)
            times = [seconds(row[name]) for name in ("pass", "gather", "merge", "send")]
            sizes = [gigabytes(row[name]) for name in ("up", "weights", "state")]
            lines.append("| " + " | ".join([model, str(gpus), *times, *sizes]) + " |")
    return "\n".join(lines)


FAULTS = {
    "kills": "SIGKILL in a command",
    "disks": "a disk that fails",
    "bytes": "a damaged or hand-made file",
    "deaths": "a process that dies",
    "ranks": "a process with another seed, setting, model or version, or broken data",
    "numbers": "extreme numbers",
}


def campaign_table() -> str:
    """What the campaign tried, and what became of it, over all its runs."""
    runs = load("campaign")["runs"]
    lines = ["| fault | tried | ended as without it | refused with an error | lost |", "|---|---|---|---|---|"]
    for part, title in FAULTS.items():
        found = [run["parts"][part] for run in runs if part in run["parts"]]
        tried, survived, refused = (sum(each[key] for each in found) for key in ("tried", "survived", "refused"))
        lines.append(
            f"| {title} | {tried:,} | {survived:,} | {refused:,} | {sum(len(each['lost']) for each in found)} |"
        )
    return "\n".join(lines)


def mutants_table() -> str:
    """What became of the sample of mutants, for each package."""
    packages: dict[str, Counter[str]] = {}
    for each in load("mutants")["mutants"]:
        packages.setdefault(each["file"].split("/")[1], Counter())[each["outcome"]] += 1
    packages["all"] = sum(packages.values(), Counter())
    lines = ["| package | mutants | killed by a test | by the time limit | survived | killed |", "|---" * 6 + "|"]
    for name, found in packages.items():
        survived, late = found["survived"], found["killed by the time limit"]
        share = 1 - survived / found.total()
        lines.append(f"| {name} | {found.total()} | {found['killed']} | {late} | {survived} | {share:.0%} |")
    return "\n".join(lines)


def survivors_table() -> str:
    """The mutants that no test notices and for which there is a reason. The record has the open ones, too."""
    lines = ["| place | change | why no test notices it |", "|---|---|---|"]
    survived = [each for each in load("mutants")["mutants"] if each["outcome"] == "survived"]
    for each in survived:
        if not each["reason"].startswith("Open"):
            old, new = (" ".join(each[key].split()).replace("|", "\\|") for key in ("old", "new"))
            place = f"{each['file'].removeprefix('lora_ga/')}:{each['line']}"
            lines.append(f"| `{place}` | `{old}` → `{new}` | {each['reason']} |")
    if more := len(survived) - len(lines) + 2:
        lines.append(f"| {more} more | | Open: no test notices them, and no reason is known. |")
    return "\n".join(lines)


# Page → its tables, in their order on the page.
PAGES: Mapping[str, tuple[Callable[[], str], ...]] = {
    "README.md": (difference_table, smollm2_summary, results_table, rates_table),
    "docs/guide.md": (quantised_table, qlora_table),
    "docs/cost.md": (cost_table, update_table, early_stop_table),
    "docs/evidence.md": (
        against_lora_table,
        smollm2_table,
        smollm2_found_table,
        functools.partial(suite_overview, "stories-shakespeare"),
        functools.partial(suite_methods, "stories-shakespeare", "babyllama105"),
        functools.partial(suite_overview, "glue-minilm"),
        functools.partial(rate_choice_table, "glue-minilm"),
        functools.partial(suite_methods, "glue-minilm", "mrpc"),
        functools.partial(suite_methods, "ablation", "babyllama105"),
        functools.partial(reach_table, ("stories260k", "babyllama105", "sst2", "cola", "qnli", "mnli")),
        why_table,
        found_rates_table,
        leaders_table,
        unswept_table,
        functools.partial(steps_table, ("stories260k", "babyllama105")),
        functools.partial(classifier_steps_table, ("sst2", "cola", "qnli")),
        functools.partial(complete_table, "steps"),
        optim_table,
    ),
    "docs/serving.md": (readers_table,),
    "docs/scale.md": (exchange_table, accuracy_table, larger_models_table),
    "docs/reliability.md": (campaign_table, mutants_table, survivors_table),
}


def written(page: str, text: str) -> str:
    """The text of a page, with its tables drawn again between their markers."""
    drawn = iter([each() for each in PAGES[page]])
    return MARKERS.sub(lambda match: match[1] + next(drawn) + match[2], text)


if __name__ == "__main__":
    for page, tables in PAGES.items():
        print(page, *(each() for each in tables), sep="\n\n")
        if "--write" in sys.argv:
            file = ROOT / page
            file.write_text(written(page, file.read_text()))
