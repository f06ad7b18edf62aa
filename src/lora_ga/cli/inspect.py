"""`lora-ga inspect`: shows an estimate file layer by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from rich.text import Text

from lora_ga.cli.checkpoints import estimate_of
from lora_ga.cli.parsing import config_parser, parse_with_config
from lora_ga.cli.terminal import as_rich, check_output, terminal, write_output
from lora_ga.experiments.tables.table import BLANK, Table

if TYPE_CHECKING:  # slow to import
    from matplotlib.figure import Figure

    from lora_ga import GradientEstimate
    from lora_ga.adapter.ranks import RankAllocation

RANKS = (1, 2, 4, 8, 16, 32, 64)

EXAMPLE = """\
Show an estimate: the norm of the gradient of each layer, and the share of the gradient that LoRA can follow.

  lora-ga inspect runs/lora-ga
  lora-ga inspect estimate.safetensors --sort share --plot shares.png
  lora-ga inspect estimate.safetensors --budget 100000

The share at rank r, its alignment limit, is the largest possible cosine between the first step of a LoRA of rank r and
the gradient: the norm of the first 2r singular values over the norm of all. A share of 1 means that nothing is lost. A
layer with a low share gains most from a higher rank. The share is blank if the estimate holds fewer than 2r directions.
Columns that are blank in every row are left out.

held is the fraction of the squared norm that the estimate holds. settled is the number of batches after which the
layer's directions had converged within --tolerance; it is blank if they had not or no tolerance was given."""


@dataclass
class InspectOptions:
    """The options of `lora-ga inspect` other than the file."""

    plot: str | None = field(
        default=None, metadata={"help": "write a map of the shares, layers by ranks, to this .png"}
    )
    budget: int | None = field(
        default=None,
        metadata={"help": "divide this number of trained parameters among the layers, and show each layer's rank"},
    )
    max_rank: int | None = field(default=None, metadata={"help": "the largest rank that --budget gives to a layer"})
    sort: Literal["name", "norm", "share"] = field(
        default="name",
        metadata={
            "help": "name: as the model numbers its layers; norm: largest first; share: smallest first, at the largest "
            "rank that has a share in every layer"
        },
    )

    def __post_init__(self) -> None:
        if self.max_rank is not None and self.budget is None:
            raise ValueError("--max_rank needs --budget, as it bounds the ranks that a budget gives. Give both.")


Shares = dict[str, dict[int, float]]  # layer -> rank -> share, NaN if the estimate holds too few directions


def main(argv: list[str]) -> int:
    """Runs the command.

    Args:
        argv: The arguments after `inspect`.

    Returns:
        0.

    Raises:
        ValueError: No estimate or more than one is named, or `GradientEstimate.load` refuses it.
    """
    parser = config_parser([InspectOptions], prog="lora-ga inspect", description=EXAMPLE)
    parser.add_argument("estimates", nargs="*", metavar="ESTIMATE", help="the folder of a run, or an estimate file")
    parser.add_argument("--overwrite", action="store_true", help="replace the plot if it exists")
    parser.refuse_unknown(argv)
    namespace, _ = parser.parse_known_args(argv)
    (options,) = parse_with_config(parser, argv)
    if len(namespace.estimates) != 1:
        raise ValueError(
            f"{len(namespace.estimates)} estimates given, but it must be 1. Name one run or one .safetensors file."
        )
    plot = Path(options.plot) if options.plot else None
    if plot:
        check_output(plot, ".png", overwrite=namespace.overwrite)
    file = estimate_of(Path(namespace.estimates[0]))
    from lora_ga import GradientEstimate, allocate_ranks
    from lora_ga.experiments.pages.drawing import render

    estimate = GradientEstimate.load(file)
    shares: Shares = {name: {} for name in estimate}
    for rank in RANKS:
        for name, share in estimate.limit(rank).items():
            shares[name][rank] = share
    names = ordered(estimate, shares, options.sort)
    if plot:
        write_output(plot, render(share_figure([shares[name] for name in names], short_names(names)), "png"))
    console = terminal()
    allocation = None if options.budget is None else allocate_ranks(estimate, options.budget, max_rank=options.max_rank)
    console.print(as_rich(layer_table(estimate, shares, names, allocation)))
    for line in [*summary(estimate), *([] if allocation is None else ranks_lines(allocation))]:
        console.print(Text(line), soft_wrap=True)
    if plot:
        console.print(Text(f"Written: {plot.resolve()}"), soft_wrap=True)
    return 0


def ordered(estimate: Mapping[str, Any], shares: Shares, by: str) -> list[str]:
    """Returns the layers in the chosen order. Ties are in order of names, with 2 before 10."""

    def natural(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]

    everywhere = [rank for rank in RANKS if all(math.isfinite(share[rank]) for share in shares.values())]
    keys = {
        "name": lambda name: 0.0,
        "norm": lambda name: -estimate[name].norm,
        "share": lambda name: shares[name][everywhere[-1]] if everywhere else 0.0,
    }
    return sorted(sorted(shares, key=natural), key=keys[by])


def short_names(names: Sequence[str]) -> list[str]:
    """Returns the names without the leading parts that all of them share."""
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(part) > common + 1 for part in parts) and len({part[common] for part in parts}) == 1:
        common += 1
    return [".".join(part[common:]) for part in parts]


def layer_table(
    estimate: GradientEstimate, shares: Shares, names: Sequence[str], allocation: RankAllocation | None = None
) -> Table:
    """Returns a table with a row for each layer and a row of medians; with an allocation also the layers' ranks."""

    def cells(values: Sequence[float]) -> list[str]:
        return [f"{value:.3f}" if math.isfinite(value) else BLANK for value in values]

    rows = []
    for name, short in zip(names, short_names(names), strict=True):
        layer = estimate[name]
        size = f"{layer.U.shape[0]}×{layer.V.shape[0]}"
        settled = str(estimate.settled.get(name, BLANK))
        rows.append([short, size, f"{layer.norm:.3g}", f"{layer.held:.3f}", settled, *cells([*shares[name].values()])])
    known = {rank: [s for layer in shares.values() if math.isfinite(s := layer[rank])] for rank in RANKS}
    middle = cells([median(values) if values else math.nan for values in known.values()])
    norms = f"{median(layer.norm for layer in estimate.values()):.3g}" if shares else BLANK
    held = f"{median(estimate.held().values()):.3f}" if shares else BLANK
    rows.append(["median", "", norms, held, "", *middle])
    columns = ["layer", "out×in", "‖G‖", "held", "settled", *(f"r={rank}" for rank in RANKS)]
    if allocation is not None:
        columns.append("rank")
        ranks = [allocation.ranks.get(name) for name in names]
        for row, rank in zip(rows, [*ranks, median(allocation.ranks.values())], strict=True):
            row.append(BLANK if rank is None else f"{rank:g}")
    return Table(columns, rows)


def ranks_lines(allocation: RankAllocation) -> list[str]:
    """Returns lines about the ranks that a budget gives, with the adapter's LoraConfig as Python."""
    rule = "lora_alpha / sqrt(rank) in every layer" if allocation.use_rslora else "lora_alpha / rank in every layer"
    arguments = ", ".join(f"{name}={value!r}" for name, value in allocation.lora_settings().items())
    return [
        f"Ranks by the gradient's spectrum: {allocation.parameters:,} trained parameters. The scaling is "
        f"s = {allocation.scaling:g}, {rule}. In Python, where you add target_modules:",
        f"LoraConfig({arguments})",
    ]


def summary(estimate: GradientEstimate) -> list[str]:
    """Returns lines about how the estimate was made and what it lacks."""
    config = estimate.config
    settings = ", ".join(f"{name}={value}" for name, value in config.to_dict().items() if name != "seed")
    lines = [
        f"{len(estimate)} layers; {estimate.batches} batches, {estimate.weight:,.0f} label tokens; seed {config.seed}.",
        f"Settings: {settings}.",
    ]
    if config.estimator == "streaming":
        lines.append(
            "The streaming estimator estimates ‖G‖ from eight random probes, and the shares are as exact as ‖G‖. The "
            "dense estimator computes both exactly."
        )
    if config.tolerance is not None:
        lines.append(settled_line(estimate))
    if {share for layer in estimate.values() if math.isnan(share := layer.limit(RANKS[-1]))}:
        lines.append(
            f"{BLANK}, and ranks that are not shown: fewer than 2r directions are held; a higher --rank or "
            "--oversample at `estimate` holds more."
        )
    lines += [f"No gradient for {name}: {reason}." for name, reason in estimate.missing.items()]
    return lines


def settled_line(estimate: GradientEstimate) -> str:
    """Returns a line with the number of layers that converged early and the batches that this saved."""
    read = [estimate.settled.get(name, estimate.batches) for name in estimate]
    most = estimate.config.max_batches
    saved = 1 - sum(read) / (len(read) * (most if isinstance(most, int) else estimate.batches)) if read else 0.0
    return (
        f"Converged within the tolerance: {len(estimate.settled)} of {len(estimate)} layers. A layer read "
        f"{median(read) if read else 0:g} batches (median), in all {max(saved, 0.0):.0%} less than --estimate_batches."
    )


def share_figure(shares: Sequence[Mapping[int, float]], labels: Sequence[str]) -> Figure:
    """Returns a heat map of the shares: a row for each layer, a column for each rank, white for blank shares."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from lora_ga.experiments.pages.drawing import FAINT, STYLE

    ranks = [rank for rank in RANKS if any(math.isfinite(layer[rank]) for layer in shares)] or [RANKS[0]]
    values = [[layer[rank] for rank in ranks] for layer in shares]
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        # A quarter of an inch a row is readable. Above 60 rows only some have labels, so that the figure fits a page.
        figure = Figure(figsize=(8.6, 1.6 + 0.25 * min(len(labels), 60)), layout="constrained", label="shares")
        axes = figure.add_subplot()
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        every = math.ceil(len(labels) / 60)
        axes.set_yticks(range(0, len(labels), every), labels[::every], fontsize=8)
        axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
        axes.set_xlabel("rank r of the adapter")
        axes.tick_params(length=0)
        if every == 1:
            for row, line in enumerate(values):
                for column, value in enumerate(line):
                    text = f"{value:.2f}" if math.isfinite(value) else BLANK
                    colour = "white" if value < 0.6 else "black" if math.isfinite(value) else FAINT
                    axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
        figure.colorbar(
            image, ax=axes, label="share of the gradient that the first step can follow", pad=0.02, aspect=40
        )
        return figure
