"""`lora-ga rate`: computes LoRA-GA's learning rate from one that is known for LoRA or for full fine-tuning."""

import math
from dataclasses import dataclass
from typing import Literal

from lora_ga.cli.options import at_least, option, require
from lora_ga.cli.parsing import OptionParser
from lora_ga.config import LoraGAConfig

DESCRIPTION = """\
Compute where to begin with LoRA-GA's learning rate, from one that is known to be good for LoRA, for rsLoRA or for full
fine-tuning of the same model on the same data.

  lora-ga rate --learning_rate 2e-4
  lora-ga rate --learning_rate 2e-5 --known_for full --stable_gamma 16 --width 4096

Under Adam a step of rate lr moves a layer's product s·B A by about s·f·lr, where s is the scaling and f the size of A
and B. The command gives the rate with the same s·f·lr. Where LoRA-GA's start is smaller than LoRA's, it gives LoRA's
rate: there the factors soon outgrow their start. --learning_rate auto of `lora-ga train` measures instead."""

NAMES = {"lora": "LoRA", "rslora": "rsLoRA", "full": "full fine-tuning"}  # in the output
# The rows of LoRA's A, drawn as PEFT draws them (uniform, bound 1/√d_in), have the norm 1/√3; B is zero.
SIZE_OF_LORA = 1 / math.sqrt(3)
# LoRA's best rate ÷ full fine-tuning's: 3, 10, 10, 32 and 32 on the five tasks of docs/evidence.md; and the usual
# advice (J. Schulman and others, "LoRA Without Regret", 2025).
LORA_OVER_FULL = 10.0


@dataclass
class RateOptions:
    """What is known, and the adapter to train."""

    learning_rate: float | None = option(None, "the rate that is known (required)")
    known_for: Literal["lora", "rslora", "full"] = option(
        "lora", "what it is known for: lora (s = alpha / r), rslora (s = alpha / sqrt(r)), or full fine-tuning"
    )
    rank: int = option(8, "rank r")
    alpha: float = option(16.0, "LoRA alpha")
    use_rslora: bool = option(
        True, "LoRA-GA's scaling: alpha / sqrt(rank), as `lora-ga train` has it, not alpha / rank"
    )
    stable_gamma: float | None = option(None, "gamma of the start (default: the start's size follows --reach)")
    reach: float | None = option(None, f"s·f of the start, where gamma is not given (default: {LoraGAConfig.reach})")
    width: int | None = option(None, "outputs of the adapted layers, usually the hidden size; only with gamma")

    def __post_init__(self) -> None:
        at_least(self, rank=1, width=1)
        require(self, "learning_rate", config=False)
        for name in ("learning_rate", "alpha", "stable_gamma", "reach"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name}: found {value:g}, but it must be a number greater than 0.")
        if self.stable_gamma is not None and self.width is None:
            raise ValueError(
                "--stable_gamma needs --width, as this start is larger in wider layers. Give the hidden size."
            )
        if self.stable_gamma is not None and self.reach is not None:
            raise ValueError(
                "--reach and --stable_gamma are two ways to choose the size of the start. Leave one of them out."
            )
        if self.stable_gamma is None and self.width is not None:
            raise ValueError(
                "--width needs --stable_gamma, as the size of the start depends on the width only with gamma. Give "
                "both, or neither."
            )


def scaling(alpha: float, rank: int, *, rslora: bool) -> float:
    """The scaling s of an adapter."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def size_of_lora(alpha: float, rank: int, *, rslora: bool) -> float:
    """s·f of plain LoRA."""
    return scaling(alpha, rank, rslora=rslora) * SIZE_OF_LORA


def size_of_lora_ga(options: RateOptions) -> float:
    """s·f of LoRA-GA's start; Theorem 3.2 of the paper, or `reach`."""
    if options.stable_gamma is None or options.width is None:
        return LoraGAConfig.reach if options.reach is None else options.reach
    s = scaling(options.alpha, options.rank, rslora=options.use_rslora)
    return float(s * options.width**0.25 / math.sqrt(options.stable_gamma))


def rate_of_lora_ga(options: RateOptions) -> float:
    """The learning rate where LoRA-GA begins."""
    assert options.learning_rate is not None, "required"
    known, target = options.learning_rate, size_of_lora_ga(options)
    plain = size_of_lora(options.alpha, options.rank, rslora=False)
    if options.known_for == "full":
        known *= LORA_OVER_FULL
    elif options.known_for == "rslora":
        known *= size_of_lora(options.alpha, options.rank, rslora=True) / plain
    return known * min(1.0, plain / target)


def main(argv: list[str]) -> int:
    """Computes and prints the rate.

    Args:
        argv: The arguments after `rate`.

    Returns:
        0.
    """
    (options,), _ = OptionParser((RateOptions,), prog="lora-ga rate", description=DESCRIPTION).parse(argv)
    chosen = "" if options.stable_gamma is None else f"gamma {options.stable_gamma:g}, width {options.width}; "
    print(
        f"Begin LoRA-GA at {rate_of_lora_ga(options):.2g}. Computed from {options.learning_rate:g} for "
        f"{NAMES[options.known_for]}; size of the start s·f: {size_of_lora_ga(options):.2g} ({chosen}LoRA's: "
        f"{size_of_lora(options.alpha, options.rank, rslora=False):.3g}). Sweep around it, or let "
        "`lora-ga train --learning_rate auto` measure."
    )
    return 0
