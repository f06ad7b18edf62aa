"""`lora-ga convert`: turns the adapter of an older LoRA-GA run into one for the original base model."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from lora_ga.cli.options import option, require
from lora_ga.cli.parsing import OptionParser

USAGE = "lora-ga convert INIT FINAL --output FOLDER"

DESCRIPTION = """\
Turn the adapter of an older run into one for the original base model. The authors' fork of PEFT and PEFT's
init_lora_weights="lora_ga" train on a changed base, W - s B0 A0, so their adapters are wrong on the original. INIT is
the adapter saved before training, FINAL the trained adapter or any checkpoint. The result is plain LoRA of twice the
rank, in float32, with DoRA magnitudes, biases and fully trained modules. The base model is not needed.

example:
  lora-ga convert run/init_lora_checkpoint run/checkpoint-500 --output converted
"""


@dataclass
class ConvertOptions:
    """The folder of the converted adapter."""

    output: str = option("", "new or empty folder for the converted adapter (required)")

    def __post_init__(self) -> None:
        require(self, "output", config=False)


def main(argv: list[str]) -> int:
    """Writes the converted adapter and prints the error with which it was read back."""
    parser = OptionParser((ConvertOptions,), prog="lora-ga convert", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("init", metavar="INIT", help="folder of the adapter as it was before training")
    parser.add_argument("final", metavar="FINAL", help="folder of the adapter after training")
    (options,), positional = parser.parse(argv)
    from lora_ga.cli.export import copy_companions
    from lora_ga.export.convert import convert_run

    final, out = Path(positional.final), Path(options.output)
    errors = convert_run(positional.init, final, out, companions=partial(copy_companions, final))
    print(
        f"{out}: {len(errors)} layers for the original base, read back with a relative error of "
        f"{median(errors.values()):.1e} (median), {max(errors.values()):.1e} (worst)"
    )
    return 0
