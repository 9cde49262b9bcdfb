"""What a benchmark found: JSON for machines, a table and a plot for people."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from measuring.timing import exponent
from msa.errors import InputError

Row = dict[str, float | int | str | None]

KINDS = ("routing", "encoding", "asking", "scale")
_TITLES = {
    "routing": "Routing, one layer",
    "encoding": "Encoding",
    "asking": "A question, against the size of the memory",
    "scale": "The 4B configuration, random states and weights",
}
PLOT_NOTE = "matplotlib is not installed, so there is no plot; pip install -e '.[bench]'"


@dataclass(slots=True)
class Report:
    """The outcome of one benchmark.

    Attributes:
        kind: one of `KINDS`.
        machine: see `measuring.timing.machine`.
        command: the command line; filled in by who was called by one.
        settings: what was asked for.
        rows: one per size (and dtype). A name ends in its unit: `_seconds`, `_bytes`,
            `_per_second`, `_ratio`, `_share`.
        exponents: curve -> p of cost ~ tokens ** p; None where one size was measured.
        notes: how to read it; what was left out.
    """

    kind: str
    machine: dict[str, str | int]
    command: str = "python benchmarks/speed.py"
    settings: dict[str, str | int] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    exponents: dict[str, float | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def fit(self, by: str | None, names: Sequence[str]) -> None:
        """Fit the exponents of some costs, apart for every value of the column `by`."""
        for label, curve in self.curves(by, names).items():
            self.exponents[label] = exponent(*zip(*curve, strict=True))

    def curves(self, by: str | None, names: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
        """(tokens, cost) of some costs: `name` or `name, value of by` -> points."""
        found: dict[str, list[tuple[int, float]]] = {}
        for row in self.rows:
            for name in names:
                cost, tokens = row.get(name), row["tokens"]
                if isinstance(cost, int | float) and isinstance(tokens, int):
                    label = words(name) + (f", {row[by]}" if by else "")
                    found.setdefault(label, []).append((tokens, float(cost)))
        return found

    def table(self) -> list[list[str]]:
        """Header and lines: a column per row of the report, a line per figure."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        heads = [self._heading(row) for row in self.rows]
        lines = [["tokens", *heads]]
        for name in names:
            if name not in ("tokens", "dtype"):
                cells = [shown(name, row.get(name)) for row in self.rows]
                lines.append([words(name), *cells])
        return lines

    @staticmethod
    def _heading(row: Row) -> str:
        tokens = row["tokens"]
        assert isinstance(tokens, int)
        dtype = str(row.get("dtype") or "").replace("bfloat", "bf").replace("float", "f")
        return f"{short(tokens)} {dtype}".strip()

    def fits(self) -> str:
        """The exponents in one line; empty if there are none."""
        known = {name: p for name, p in self.exponents.items() if p is not None}
        return "; ".join(f"{name} {p:.2f}" for name, p in known.items())

    def write(self, folder: Path) -> list[Path]:
        """Write bench_KIND.json, bench_KIND.png (where there is something to plot) and bench.md.

        bench.md shows every benchmark whose JSON lies in the folder.

        Raises:
            InputError: the folder cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"bench_{self.kind}.json"
            written = [path]
            plotted = plot(self, path.with_suffix(".png"))
            if plotted:
                written.append(path.with_suffix(".png"))
            text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")
            written.append(write_page(folder))
        except OSError as error:
            raise InputError(
                f"{folder}: the results cannot be written ({error.strerror or error}); "
                "give another --output"
            ) from error
        return written


def words(name: str) -> str:
    """A figure's name for people: without its unit, `over` as a stroke."""
    name = name.replace("_seconds_per_token", "_per_token")
    for unit in ("_bytes_per_second", "_seconds", "_bytes", "_ratio", "_share"):
        name = name.removesuffix(unit)
    name = name.replace("_over_", " / ").replace("_", " ")
    return name.replace("msa", "MSA").replace("faiss", "FAISS")


def short(count: float) -> str:
    """1500000 as 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def shown(name: str, value: float | int | str | None) -> str:
    """A figure with its unit."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if name.endswith("_bytes_per_second"):
        return f"{value / 1e9:.1f} GB/s"
    if name.endswith(("_seconds", "_seconds_per_token")):
        return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
    if name.endswith("_bytes"):
        size, unit = next(
            (pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if value >= pair[0]),
            (1, "bytes"),
        )
        return f"{value / size:.3g} {unit}"
    if name.endswith("_ratio"):
        return f"{value:.2f}x" if value < 100 else f"{value:.0f}x"
    if name.endswith("_share"):
        return f"{100 * value:.1f}%"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot(report: Report, path: Path) -> bool:
    """Cost against the size of the memory, with fitted exponents; False if there is no plot."""
    by = "dtype" if any("dtype" in row for row in report.rows) else None
    names = [
        name
        for name in dict.fromkeys(name for row in report.rows for name in row)
        if name.endswith(("_seconds", "_seconds_per_token")) and "_layer_" not in name
    ]
    if report.kind == "encoding" or not names:
        return False
    try:
        import matplotlib as mpl
    except ImportError:
        report.notes.append(PLOT_NOTE)
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mpl.use("agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 5.2), layout="constrained")
        styles: dict[str, str] = {}
        for label, curve in report.curves(by, names).items():
            base, _, variant = label.partition(", ")
            colour, line = (
                styles.setdefault(base, f"C{len(styles)}"),
                ":" if variant == "float32" else "-",
            )
            p = exponent(*zip(*curve, strict=True))
            legend = label if p is None else f"{label}: tokens^{p:.2f}"
            x, y = zip(*curve, strict=True)
            axes.loglog(x, y, line, marker="o", markersize=4, color=colour, label=legend)
        axes.set_xlabel("tokens in the memory")
        axes.set_ylabel("seconds")
        axes.set_title(_TITLES[report.kind])
        axes.grid(alpha=0.3, which="both", linewidth=0.4)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
    return True


def write_page(folder: Path) -> Path:
    """Write bench.md from the JSON files of a folder."""
    parts = [
        "# Speed\n\nWritten by `python benchmarks/speed.py` from the JSON files beside it; in "
        "older commands it is called `msa bench`."
    ]
    for kind in KINDS:
        path = folder / f"bench_{kind}.json"
        if path.is_file():
            report = Report(**json.loads(path.read_text(encoding="utf-8")))
            parts.append(section(report, path.with_suffix(".png").is_file()))
    page = folder / "bench.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def section(report: Report, has_plot: bool) -> str:
    """One benchmark as Markdown."""
    head, *lines = report.table()
    facts = {**report.settings, **report.machine}
    parts = [
        f"## {_TITLES[report.kind]}",
        f"```sh\n{report.command}\n```",
        "; ".join(f"{name}: {value}" for name, value in facts.items() if value != ""),
        "\n".join(
            ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
            + ["| " + " | ".join(line) + " |" for line in lines]
        ),
    ]
    if fits := report.fits():
        parts.append(f"Cost ~ tokens^p, fitted: {fits}.")
    parts += report.notes
    if has_plot:
        parts.append(f"![{_TITLES[report.kind]}](bench_{report.kind}.png)")
    return "\n\n".join(parts)
