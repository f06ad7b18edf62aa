"""`lora-ga merge`: adds up estimates made on different data or machines."""

from pathlib import Path

from lora_ga.cli.checkpoints import estimate_of
from lora_ga.cli.estimate import check_new_file
from lora_ga.cli.parsing import OptionParser

EXAMPLE = """\
Add up estimates of one model made on different batches, on this machine or others. Each estimate is weighted by its
number of label tokens. The result is that of one estimate over all batches, except for what each estimate truncated.

  lora-ga merge first.safetensors second.safetensors third.safetensors -o all.safetensors

All must come from one model, with one --rank, one --seed and the same settings of the estimate."""


def main(argv: list[str]) -> int:
    """Reads the files, adds them up and writes the sum.

    Args:
        argv: The arguments after `merge`.

    Returns:
        0.

    Raises:
        ValueError: There are fewer than two files, a file is damaged, or the estimates do not add up.
    """
    parser = OptionParser((), prog="lora-ga merge", description=EXAMPLE)
    parser.add_argument(
        "estimates", nargs="*", metavar="ESTIMATE", help="two or more estimates: files, or folders of runs"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="file to write; it must not exist (required)")
    _, namespace = parser.parse(argv)
    if len(namespace.estimates) < 2:
        raise ValueError(f"{len(namespace.estimates)} estimate files given, but it must be two or more.")
    if not namespace.output:
        raise ValueError("--output is required. Give the file to write, ending in .safetensors.")
    target = check_new_file(namespace.output)
    files = [estimate_of(Path(name)) for name in namespace.estimates]
    from lora_ga import GradientEstimate  # slow to import, so after the checks above

    estimates = [GradientEstimate.load(file) for file in files]
    try:
        merged = estimates[0].merge(*estimates[1:])
    except ValueError as error:
        named = "; ".join(f"{number} is {file}" for number, file in enumerate(files, start=1))
        raise ValueError(f"{error} ({named})") from error
    merged.save(target)
    print(
        f"{target}: the gradient of {len(merged)} layers from {merged.batches} batches with {merged.weight:.0f} labels "
        f"in {len(files)} files. `lora-ga inspect {target}` shows each layer."
    )
    return 0
