"""What an estimate says about each layer, for experiment trackers and model cards."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path

from lora_ga.gradient import GradientEstimate
from lora_ga.store import write_atomically

CARD = "README.md"
# Our section of a model card lies between these, so that writing it again replaces it.
OPENING, CLOSING = "<!-- lora-ga -->", "<!-- /lora-ga -->"


def measures(estimate: GradientEstimate, ranks: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """The numbers of every layer.

    Args:
        estimate: The estimate.
        ranks: Layer name → r, of the layers that start from it.

    Returns:
        Layer name → "gradient_norm" ‖G‖ (Frobenius), "alignment_limit" (of the layer's rank) and "settled_after"
        (batches until the directions no longer changed); what is not known is absent.
    """
    found = {}
    for name, rank in ranks.items():
        layer = estimate[name]
        values = {"gradient_norm": float(layer.norm), "alignment_limit": float(layer.limit(rank))}
        if name in estimate.settled:
            values["settled_after"] = float(estimate.settled[name])
        found[name] = {key: value for key, value in values.items() if math.isfinite(value)}
    return found


def scalars(estimate: GradientEstimate, ranks: Mapping[str, int]) -> dict[str, float]:
    """The same as flat names, `lora_ga/<measure>/<layer>`, which every tracker groups in its own way."""
    flat = {"lora_ga/batches": float(estimate.batches), "lora_ga/label_tokens": float(estimate.weight)}
    for name, values in measures(estimate, ranks).items():
        flat |= {f"lora_ga/{measure}/{name}": value for measure, value in values.items()}
    return flat


def section(estimate: GradientEstimate, ranks: Mapping[str, int]) -> str:
    """The section of a model card that says how the adapter was started, in Markdown."""
    config, table = estimate.config, measures(estimate, ranks)
    limits = [values["alignment_limit"] for values in table.values() if "alignment_limit" in values]
    middle = f"; its rank can follow {statistics.median(limits):.3f} of the gradient (median)" if limits else ""
    rows = [
        f"| `{name}` | {ranks[name]} | {values['gradient_norm']:.3e} | "
        f"{_shown(values, 'alignment_limit', '.3f')} | {_shown(values, 'settled_after', '.0f')} |"
        for name, values in table.items()
    ]
    head = (
        f"The adapter was started from the loss gradient of {len(table)} layers over {estimate.batches} batches with "
        f"{estimate.weight:.0f} labels (estimator {config.estimator}, seed {config.seed}){middle}. It is a plain LoRA "
        "of twice the rank for the original base model."
    )
    columns = "| layer | rank | ‖G‖ | alignment limit | batches until settled |"
    return "\n".join(["## LoRA-GA start", "", head, "", columns, "|---|---|---|---|---|", *rows])


def _shown(values: Mapping[str, float], key: str, form: str) -> str:
    return format(values[key], form) if key in values else "–"


def write_section(folder: Path, text: str) -> None:
    """Put our section into the model card of a folder, in the place of an earlier one; does nothing without a card.

    Args:
        folder: The folder with the card.
        text: The section.
    """
    card = folder / CARD
    if not text or not card.is_file():
        return
    before, opening, rest = card.read_text(encoding="utf-8").partition(OPENING)
    after = rest.partition(CLOSING)[2] if opening else ""
    content = f"{before.rstrip()}\n\n{OPENING}\n{text}\n{CLOSING}\n{after.lstrip()}"
    write_atomically(card, content.encode())
