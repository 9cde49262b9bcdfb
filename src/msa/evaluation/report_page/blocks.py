"""What a report is made of, before it is HTML or Markdown; and how its numbers are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from msa.evaluation.metrics import Interval
from msa.evaluation.report_page.data import Comparison, Curve, Measured

Place = tuple[str, int, str]
"""Task, size and system: where a reader can go on to the questions."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what stands there.
        detail: an interval or the like.
        mark: "best", "ahead", "behind" or nothing.
        place: whose questions are behind it.
    """

    text: str
    detail: str = ""
    mark: str = ""
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under heads; the first column names its row.

    Attributes:
        caption: what it shows.
        heads: of the columns.
        rows: as long as the heads.
        made: how its figures were made, a line for each way.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    made: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class Points:
    """A list under a line; `tone` is "behind", "ahead" or nothing."""

    title: str
    items: Sequence[str]
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Tiles:
    """A few numbers that count most: (number, what it is, its interval or the like)."""

    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True, slots=True)
class Chart:
    """Scores over size.

    Attributes:
        title: what is shown.
        curves: of systems.
        made: how its figures were made.
    """

    title: str
    curves: Sequence[Curve]
    made: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Bars:
    """Shares of verdicts, a bar for each row."""

    caption: str
    rows: Sequence[tuple[str, Mapping[str, int]]]
    made: Sequence[str] = ()


Block = Table | Text | Points | Tiles | Chart | Bars


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report.

    Attributes:
        id: of its place in the page.
        title: its head.
        blocks: what it shows.
        parts: sections within it, each folded.
        folded: whether the reader has to open it.
        short: its name among others; by default the title.
    """

    id: str
    title: str
    blocks: Sequence[Block]
    parts: Sequence[Section] = field(default=())
    folded: bool = False
    short: str = ""


def size_name(size: int) -> str:
    """Tokens in short.

    >>> [size_name(n) for n in (0, 500, 16_000, 16_384, 1_500_000)]
    ['', '500', '16K', '16K', '1.5M']
    """
    for unit, word in ((10**6, "M"), (10**3, "K")):
        if size >= unit:
            number = size / unit
            return (
                f"{number:.0f}{word}" if number >= 10 else f"{number:.1f}".removesuffix(".0") + word
            )
    return str(size) if size else ""


def percent(value: Interval | float | None) -> str:
    """A share in percent; nothing where there is none."""
    if value is None:
        return ""
    return f"{100 * (value.mean if isinstance(value, Interval) else value):.1f}"


def bounds(value: Interval | None, scale: float = 100) -> str:
    """The interval's two ends."""
    if value is None:
        return ""
    low, high = scale * value.low, scale * value.high
    return f"{signed(low, '')} to {signed(high, '')}" if low < 0 else f"{low:.1f}–{high:.1f}"


def signed(value: float, plus: str = "+") -> str:
    """A number with its sign.

    >>> signed(-0.04), signed(-1.25), signed(3)
    ('0.0', '−1.2', '+3.0')
    """
    text = f"{abs(value):.1f}"
    return text if text == "0.0" else f"{'−' if value < 0 else plus}{text}"


def share(value: Interval | None, place: Place | None = None, mark: str = "") -> Cell:
    """A share with its interval."""
    return Cell(percent(value), bounds(value), mark, place)


def number(value: float | Interval | None, digits: int = 1) -> Cell:
    """A plain number."""
    if value is None:
        return Cell("")
    plain = value.mean if isinstance(value, Interval) else value
    return Cell(f"{plain:,.{digits}f}")


def seconds(value: float | Interval | None) -> Cell:
    """Seconds, with two digits that count."""
    plain = value.mean if isinstance(value, Interval) else value
    if plain is None:
        return Cell("")
    return Cell(f"{plain:.3f}" if plain < 0.1 else f"{plain:.2f}" if plain < 10 else f"{plain:.0f}")


def size_in_bytes(value: float | Interval | None) -> Cell:
    """Bytes in their unit."""
    plain = value.mean if isinstance(value, Interval) else value
    if plain is None:
        return Cell("")
    for unit, word in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if plain >= unit:
            return Cell(f"{plain / unit:.1f} {word}")
    return Cell(f"{plain:.0f} B")


def p_value(p: float) -> str:
    """A p value."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def where(run: Measured) -> str:
    """Task and size of a run, in words."""
    size = size_name(run.size)
    return f"{run.task} at {size}" if size else run.task


def model_name(run: Measured) -> str:
    """What a model is called, and its fingerprint."""
    called, model = run.about.get("model_name"), run.about.get("model")
    return f"{called} ({model})" if called else str(model)


def made(runs: Sequence[Measured]) -> tuple[str, ...]:
    """How runs were made: command, commit, model, machine and seed, each way once."""
    lines = []
    for run in runs:
        about = run.about
        names = {
            "commit": "commit",
            "model": "model",
            "machine": "machine",
            "threads": "threads",
            "torch": "torch",
            "seed": "seed",
            "data": "data",
        }
        more = [f"{n} {about[key]}" for key, n in names.items() if about.get(key) is not None]
        if len({r.about.get("data") for r in runs}) > 1:
            more = more[:-1] if about.get("data") is not None else more
        lines.append(f"{about.get('command', 'unknown')} ({', '.join(more)})")
    return tuple(dict.fromkeys(lines))


def gap(each: Comparison) -> str:
    """By how much the one is ahead of the other or behind it, in points."""
    by = each.difference.by
    return (
        f"{signed(100 * by.mean)} points, 95% interval {signed(100 * by.low)} to "
        f"{signed(100 * by.high)}, p {p_value(each.p)}"
    )
