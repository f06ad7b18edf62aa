"""`lora-ga convert`: an old LoRA-GA run as an adapter for the original base."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from lora_ga.cli.options import option, require
from lora_ga.cli.parsing import OptionParser

USAGE = "lora-ga convert INIT FINAL --output FOLDER"

DESCRIPTION = """\
Turn an old run into an adapter for the original base model. The authors' fork of PEFT and PEFT's own
init_lora_weights="lora_ga" train on a changed base, W - s B0 A0, so their adapters are wrong on the original. INIT is
the adapter saved before training, FINAL the trained one or any checkpoint. What is written is plain LoRA of twice the
rank, in float32, with DoRA magnitudes, biases and modules trained in full. Nothing of the base model is needed.

example:
  lora-ga convert run/init_lora_checkpoint run/checkpoint-500 --output converted
"""


@dataclass
class ConvertOptions:
    """Where the converted adapter goes."""

    output: str = option("", "new or empty folder for the converted adapter (required)")

    def __post_init__(self) -> None:
        require(self, "output")


def main(argv: list[str]) -> int:
    """Writes the converted adapter and says how exactly it was read back."""
    parser = OptionParser((ConvertOptions,), prog="lora-ga convert", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("init", metavar="INIT", help="folder of the adapter as it was before training")
    parser.add_argument("final", metavar="FINAL", help="folder of the adapter after training")
    options, positional = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    from lora_ga.cli.export import copy_companions
    from lora_ga.export.convert import convert_run

    final, out = Path(positional.final), Path(options.output)
    errors = convert_run(positional.init, final, out)
    copy_companions(final, out)
    print(
        f"{out}: {len(errors)} layers for the original base, read back with a relative error of "
        f"{median(errors.values()):.1e} (median), {max(errors.values()):.1e} (worst)"
    )
    return 0
