"""Scores over size as an inline picture (SVG); its colors are the page's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msa.evaluation.report_page.blocks import percent, size_name
from msa.evaluation.report_page.data import Curve
from msa.evaluation.report_page.markup import Html, el

WIDTH, HEIGHT = 480, 290
LEFT, RIGHT, TOP, BOTTOM = 36, 18, 12, 44
SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "M-3.6 -3.6h7.2v7.2h-7.2z",
    "M0 -4.6L4.6 3.6H-4.6z",
    "M0 -5L5 0L0 5L-5 0z",
    "M0 4.6L4.6 -3.6H-4.6z",
    "M-1.5 -4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "M-4.5 -1.6h9v3.2h-9z",
    "M-1.6 -4.5h3.2v9h-3.2z",
)
"""Systems differ in shape as well as in color, and from the ninth on in their lines."""
BANDS = 6
"""Curves up to which every interval is drawn; of more, only the first's."""


def curves_svg(curves: Sequence[Curve], order: Sequence[str], title: str) -> Html:
    """A picture of scores in percent (0 to 100) over tokens (logarithmic).

    Args:
        curves: with two points or more each.
        order: all systems of the report, so that each looks the same in every picture.
        title: read out to who cannot see it.
    """
    sizes = sorted({point.size for curve in curves for point in curve.points})
    low, high = math.log(sizes[0]), math.log(sizes[-1])

    def x(size: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log(size) - low) / (high - low)

    def y(score: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - score)

    parts = [el("title", title)]
    for step in range(0, 101, 20):
        at = round(y(step / 100), 1)
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(el("text", str(step), x=LEFT - 7, y=at + 4, text_anchor="end"))
    for size in sizes:
        at = round(x(size), 1)
        parts.append(
            el("text", size_name(size), x=at, y=HEIGHT - BOTTOM + 18, text_anchor="middle")
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(el("text", "tokens in memory", x=middle, y=HEIGHT - 6, text_anchor="middle"))
    for curve in reversed(curves):  # the first lies on top
        shape, look = _look(curve.system, order)
        upper = [f"{x(p.size):.1f},{y(min(1, p.score.high)):.1f}" for p in curve.points]
        lower = [f"{x(p.size):.1f},{y(max(0, p.score.low)):.1f}" for p in reversed(curve.points)]
        line = " ".join(f"{x(p.size):.1f},{y(p.score.mean):.1f}" for p in curve.points)
        marks = [
            el(
                "path",
                el("title", f"{curve.system}, {size_name(p.size)}: {percent(p.score)}"),
                d=shape,
                transform=f"translate({x(p.size):.1f} {y(p.score.mean):.1f})",
                class_="dot",
            )
            for p in curve.points
        ]
        band = el("polygon", points=" ".join(upper + lower), class_="band")
        drawn = el("polyline", points=line, class_="line")
        banded = len(curves) <= BANDS or curve is curves[0]
        parts.append(el("g", band if banded else None, drawn, *marks, class_=look))
    return el("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", class_="plot")


def swatch(system: str, order: Sequence[str]) -> Html:
    """A system's line and shape, for a legend."""
    shape, look = _look(system, order)
    line = el("line", x1=0, x2=26, y1=7, y2=7, class_="line")
    dot = el("path", d=shape, transform="translate(13 7)", class_="dot")
    group = el("g", line, dot, class_=look)
    return el("svg", group, viewBox="0 0 26 14", class_="swatch", aria_hidden="true")


def bar_svg(shares: Sequence[tuple[str, float]]) -> Html:
    """Shares of a whole beside each other.

    Args:
        shares: name of the color, and part of 1.
    """
    parts, start = [], 0.0
    for name, part in shares:
        if part:
            rect = {"x": round(start, 2), "width": round(max(0.2, 100 * part - 0.3), 2)}
            parts.append(el("rect", y=0, height=8, class_=name, **rect))
            start += 100 * part
    options = {"viewBox": "0 0 100 8", "preserveAspectRatio": "none", "aria_hidden": "true"}
    return el("svg", *parts, class_="bar", **options)


def _look(system: str, order: Sequence[str]) -> tuple[str, str]:
    """A system's shape, and the classes of its color and line."""
    row, index = divmod(order.index(system), len(SHAPES))
    return SHAPES[index], f"c{index} line{row}"
