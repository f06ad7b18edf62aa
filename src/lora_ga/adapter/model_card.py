"""The section of a model card on how the adapter was started."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from pathlib import Path

from lora_ga.files import write_atomically
from lora_ga.gradients.result import GradientEstimate, measures

CARD = "README.md"
# The section lies between these two lines, so that writing it again replaces it.
OPENING, CLOSING = "<!-- lora-ga -->", "<!-- /lora-ga -->"
UNFILLED = "[More Information Needed]"  # in the form that PEFT writes


def start_section(estimate: GradientEstimate, ranks: Mapping[str, int]) -> str:
    """Describe the start of an adapter.

    Args:
        estimate: The estimate it was started from.
        ranks: Layer name (of experts and groups: part by part) → rank r.

    Returns:
        The section, in Markdown.
    """
    config, table = estimate.config, measures(estimate, ranks)
    limits = [values["alignment_limit"] for values in table.values() if "alignment_limit" in values]
    middle = f"; its rank can follow {statistics.median(limits):.3f} of the gradient (median)" if limits else ""
    rows = [
        f"| `{name}` | {ranks[name]} | {values['gradient_norm']:.3e} | "
        f"{_formatted(values, 'alignment_limit', '.3f')} | {_formatted(values, 'settled_after', '.0f')} |"
        for name, values in table.items()
    ]
    head = (
        f"The adapter was started from the loss gradient of {len(table)} layers over {estimate.batches} batches with "
        f"{estimate.weight:.0f} labels (estimator {config.estimator}, seed {config.seed}){middle}. It is a plain LoRA "
        "of twice the rank for the original base model: `PeftModel.from_pretrained(base, folder)` loads it to be used, "
        "`lora_ga.load(base, folder, is_trainable=True)` to train on as LoRA-GA."
    )
    columns = "| layer | rank | ‖G‖ | alignment limit | batches until settled |"
    return "\n".join(["## LoRA-GA start", "", head, "", columns, "|---|---|---|---|---|", *rows])


def _formatted(values: Mapping[str, float], key: str, form: str) -> str:
    return format(values[key], form) if key in values else "–"


def write_section(folder: Path, text: str) -> None:
    """Write the section into the model card of a folder, replacing an earlier one. Without a card it does nothing.

    Args:
        folder: The folder with the card.
        text: The section; an empty one is not written.
    """
    card = folder / CARD
    if not text or not card.is_file():
        return
    before, opening, rest = card.read_text(encoding="utf-8").partition(OPENING)
    after = rest.partition(CLOSING)[2] if opening else ""
    if not opening and UNFILLED in before:  # PEFT's form: what is known comes before it
        header, after = front_matter(before)
        before = header
    content = f"{before.rstrip()}\n\n{OPENING}\n{text}\n{CLOSING}\n\n{after.lstrip()}".rstrip() + "\n"
    write_atomically(card, content.encode())


def front_matter(card: str) -> tuple[str, str]:
    """The YAML header of a card with its two lines of dashes, and the rest; an empty header if there is none."""
    found = re.match(r"---\n.*?\n---\n", card, flags=re.DOTALL)
    return (found[0], card[found.end() :]) if found else ("", card)


def section_of(card: str) -> str:
    """The section that `write_section` wrote, with its two marks; empty without one."""
    _, opening, rest = card.partition(OPENING)
    return opening + "".join(rest.partition(CLOSING)[:2])
