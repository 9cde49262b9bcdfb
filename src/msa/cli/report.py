"""`msa eval report` and `msa eval judge`: what the runs of an evaluation show."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msa.cli import output
from msa.cli.options import JsonOption

if TYPE_CHECKING:
    from msa.evaluation.judge import Judgement

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of msa eval run.")]


def report(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR|PAGE...",
            help="Folders of msa eval run and HTML files of earlier reports; a run that stands in "
            "several is taken from the first.",
        ),
    ],
    page: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The HTML file; its Markdown lies beside it.",
            show_default="DIR/report.html",
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="DIR|PAGE", help="Earlier runs to compare with.", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write what the runs show: one HTML page that needs nothing else, and Markdown.

    First where the model loses; then tables, curves over size, cost, why answers are wrong, and
    every question with the way to its answer. What a judge has said stands beside the scores.
    """
    from msa.evaluation.report_page import write_report

    made = write_report(sources, page, compare)
    if json:
        output.print_json({"html": str(made[0]), "markdown": str(made[1])})
        return
    for path in made:
        output.stdout().print(f"Written: {path}", soft_wrap=True, markup=False, highlight=False)


def judge(
    folder: FolderArgument,
    url: Annotated[
        str,
        typer.Option(
            "--judge-url",
            metavar="URL",
            help="Of an OpenAI-compatible API, as in http://127.0.0.1:8000/v1.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str,
        typer.Option(
            "--judge-model", metavar="NAME", help="The judging model there.", show_default=False
        ),
    ],
    concurrency: Annotated[
        int, typer.Option(min=1, metavar="N", help="Answers judged at once.")
    ] = 8,
    timeout: Annotated[
        float, typer.Option(min=0.1, metavar="S", help="Seconds that one request may take.")
    ] = 120.0,
    attempts: Annotated[
        int, typer.Option(min=1, metavar="N", help="Requests for one answer, at most.")
    ] = 5,
    prices: Annotated[
        tuple[float, float] | None,
        typer.Option(
            "--prices",
            metavar="READ WRITTEN",
            help="Of a million tokens read and of a million written.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Have a language model give every answer 0 to 5 points, kept in DIR/judged.

    The key is read from MSA_JUDGE_KEY, or else from OPENAI_API_KEY. The same command goes on where
    it was stopped; an answer that has changed is judged again. msa eval report shows the means.
    """
    from msa.evaluation.judge import KEY_VARIABLES, Judge, judge_runs

    key = next((value for n in KEY_VARIABLES if (value := os.environ.get(n))), None)
    asked = Judge(
        url=url,
        model=name,
        key=key,
        concurrency=concurrency,
        timeout=timeout,
        attempts=attempts,
        prices=prices,
    )
    with output.progress("Judging") as bar:
        try:
            found = judge_runs(
                folder,
                asked,
                lambda done, whole: bar.set("", done, f"{done:,} of {whole:,} answers"),
            )
        except KeyboardInterrupt:
            raise output.Interrupted(
                "Interrupted. The same command goes on where it was stopped."
            ) from None
    _print_judgement(found, json)
    if found.unreadable:
        output.print_error(
            f"{output.plural(len(found.unreadable), 'answer')} got no readable score: "
            f"{', '.join(found.unreadable[:5])}; the same command asks again"
        )
        raise typer.Exit(1)


def _print_judgement(found: Judgement, json: bool) -> None:
    if json:
        output.print_json(asdict(found))
        return
    for run_name, (score, count) in found.scores.items():
        output.stdout().print(
            f"{run_name}: {score:.2f} of 5 ({output.plural(count, 'answer')})",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )
    cost = "" if found.cost is None else f", cost {found.cost:.4f}"
    output.print_note(
        f"Judged {found.judged:,}, kept {found.kept:,}; the judge read "
        f"{found.prompt_tokens:,} tokens and wrote {found.completion_tokens:,}{cost}."
    )
