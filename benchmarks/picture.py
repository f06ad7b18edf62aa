"""The picture in docs/how-it-works.md: how A and B come from the gradient, and what the first step reaches.

python benchmarks/picture.py          prints it as SVG
python benchmarks/picture.py --write  writes docs/start.svg
"""

from __future__ import annotations

import sys

from published import ROOT, load

PATH = ROOT / "docs" / "start.svg"
BLUE, ORANGE, GREY, PALE, INK = "#3f6fd1", "#e0862d", "#9aa0a6", "#e4e7eb", "#1f2933"
FONT = 'font-family="DejaVu Sans, Verdana, sans-serif"'
WIDTH, HEIGHT = 900, 590
# Label → key of the record of the alignment.
STARTS = {"plain LoRA": "lora", "PEFT's lora_ga": "peft lora_ga", "LoRA-GA, this library": "ours, streaming"}


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    """A filled rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="white"/>'


def text(x: float, y: float, words: str, size: int = 14, *, middle: bool = True, bold: bool = False) -> str:
    """A line of text, centred at x or beginning there."""
    anchor, weight = ("middle" if middle else "start"), (' font-weight="bold"' if bold else "")
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{weight} fill="{INK}">{words}</text>'


def arrow(*points: tuple[float, float]) -> str:
    """A line through the points, with a head at the last one."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{GREY}" stroke-width="2" marker-end="url(#head)"/>'


def gradient(top: float) -> list[str]:
    """G = U S Vᵀ: the first r rows of Vᵀ are blue, the next r columns of U are orange."""
    title = "1. The gradient of a layer's weight, and its leading 2r directions"
    parts = [text(30, top - 24, title, middle=False, bold=True)]
    parts += [box(50, top, 150, 120, PALE), text(125, top + 66, "G", 22), text(225, top + 68, "≈", 24)]
    parts += [box(260 + 18 * n, top, 18, 120, PALE if n < 3 else ORANGE) for n in range(6)]
    parts += [box(400 + 18 * n, top + 18 * n, 18, 18, GREY) for n in range(6)]
    parts += [box(540, top + 18 * n, 150, 18, BLUE if n < 3 else PALE) for n in range(6)]
    parts += [text(314, top + 138, "U"), text(454, top + 138, "S"), text(615, top + 138, "Vᵀ")]
    return parts


def layer(top: float) -> list[str]:
    """The frozen weight W beside B and A."""
    parts = [text(30, top - 24, "2. The start of the adapter", middle=False, bold=True)]
    parts += [box(50, top, 150, 120, GREY), text(125, top + 58, "W", 22), text(125, top + 84, "unchanged", 13)]
    parts += [text(232, top + 68, "+  s ·", 18)]
    parts += [box(287 + 18 * n, top, 18, 120, ORANGE) for n in range(3)]
    parts += [box(400, top + 33 + 18 * n, 150, 18, BLUE) for n in range(3)]
    parts += [text(314, top + 138, "B₀"), text(475, top + 138, "A₀"), text(370, top + 68, "·", 24)]
    return [*parts, text(575, top + 65, "− s · B₀A₀: the model's outputs do not change", 13, middle=False)]


def bars(left: float, top: float) -> list[str]:
    """The alignment of the first step with full fine-tuning's, from the record."""
    found = load("alignment")["models"]["babyllama105 on tinyshakespeare"]
    parts = [text(left, top, "3. How well the first step follows full fine-tuning's", middle=False, bold=True)]
    for number, (label, start) in enumerate(STARTS.items()):
        y, share = top + 18 + 30 * number, found[start]["median"]
        parts += [text(left, y + 15, label, 13, middle=False), box(left + 170, y, 400, 20, PALE)]
        parts += [box(left + 170, y, 400 * share, 20, BLUE), text(left + 600, y + 15, f"{share:.3f}", 13)]
    return [*parts, text(left + 600, top + 120, "1 is the best at this rank", 12)]


def picture() -> str:
    """The whole picture, as SVG."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" {FONT}>'
        "<title>How LoRA-GA starts an adapter</title>"
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="5" refY="3" orient="auto">'
        f'<path d="M0,0 L6,3 L0,6 z" fill="{GREY}"/></marker></defs>'
    )
    arrows = [
        arrow((341, 182), (341, 252)),
        arrow((696, 82), (740, 82), (740, 222), (475, 222), (475, 286)),
    ]
    parts = [box(0, 0, WIDTH, HEIGHT, "white"), *gradient(55), *layer(262), *arrows, *bars(30, 446)]
    return "\n".join([head, *parts, "</svg>", ""])


if __name__ == "__main__":
    if "--write" in sys.argv:
        PATH.write_text(picture())
    else:
        print(picture())
