"""`msa convert`: a plain language model of transformers becomes an MSA model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msa.cli import output
from msa.cli.options import JsonOption, quiet_transformers
from msa.errors import InputError

if TYPE_CHECKING:
    from msa.model.convert import ConversionReport

PASSAGES = 2000  # more change the routers little
DEPTHS = (1, 16)


def convert(
    backbone: Annotated[
        str, typer.Argument(help="Hub id, folder or GGUF file of a Llama, Mistral, Qwen2 or Qwen3.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the MSA model; a new one.")],
    texts: Annotated[
        list[Path],
        typer.Option(
            "--texts",
            metavar="FILE",
            help="Files or folders of texts like those to be asked; more may follow, or repeat it.",
        ),
    ],
    more: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="More of --texts.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Routing layers.",
            show_default="those that find most together",
        ),
    ] = None,
    chunk_size: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of a chunk.")] = 32,
    top_k: Annotated[
        int, typer.Option("--top-k", min=1, metavar="N", help="Documents that a layer selects.")
    ] = 16,
    query_reduction: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="How a question's tokens are compared: pooled, mean, last or max."
        ),
    ] = "pooled",
    export: Annotated[
        str,
        typer.Option(metavar="FORMAT", help="msa, or released for the format of the paper's code."),
    ] = "msa",
    seed: Annotated[int, typer.Option(metavar="N", help="Of the pairs drawn from the texts.")] = 0,
    json: JsonOption = False,
) -> None:
    """Make an MSA model of a plain one; nothing is trained.

    Routers are whitened on the texts, and the routing layers chosen by what they find: sentences
    are taken out of their passages and asked. The recall printed is that of questions that were not
    used for it, beside BM25. Without a memory, the result writes what the backbone writes.
    """
    passages, questions = _pairs([*texts, *(more or [])], seed)
    quiet_transformers()
    with output.progress("Converting"):
        from msa.model.convert import convert_checkpoint
        from msa.text.bm25 import bm25_recall

        report = convert_checkpoint(
            backbone,
            out,
            texts=passages,
            questions=questions,
            layers=_numbers(layers),
            chunk_size=chunk_size,
            top_k_documents=top_k,
            query_reduction=query_reduction,
            export=export,
        )
        lexical = bm25_recall(passages, questions[1::2], DEPTHS)
    if json:
        found = dict(zip(("recall_at_1", "recall_at_16"), lexical, strict=True))
        output.print_json({"folder": out, **output.to_json(report), "bm25": found})
        return
    _print(out, report, len(passages), lexical)


def _pairs(paths: list[Path], seed: int) -> tuple[list[str], list[tuple[str, int]]]:
    """Passages of the texts, and (question, row of its passage)."""
    from msa.training.pairs import make_pairs, read_documents, split_passages

    with output.progress("Reading the texts"):
        documents, failures = read_documents(paths)
    for failure in failures:
        output.print_note(f"left out: {failure}")
    found = make_pairs(split_passages(documents), seed=seed, limit=PASSAGES)
    rows = {name: row for row, name in enumerate(found.documents)}
    questions = [(q.question, rows[q.gold[0]]) for q in found.questions]
    return [document.content for document in found.documents.values()], questions


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise InputError(f"--layers {text}: expected whole numbers, such as 2,6,10") from None


def _print(out: Path, report: ConversionReport, passages: int, lexical: list[float]) -> None:
    console = output.stdout()
    found, marks = report.calibration, report.marks

    def say(text: str, **style: Any) -> None:
        console.print(text, soft_wrap=True, **style)

    say(
        f"{out}: {report.backbone}, {output.number(report.parameters)} parameters in "
        f"{report.dtype}, routing in layers {', '.join(map(str, found.layers))}"
    )
    say(
        f"Recall to expect, by {output.plural(found.pairs, 'held-out question')} to "
        f"{output.plural(passages, 'passage')}: "
        f"{_percent(found.recall_at_1)} first, {_percent(found.recall_at_16)} among 16 "
        f"(BM25: {_percent(lexical[0])}, {_percent(lexical[1])})"
    )
    added = f"; added to the tokenizer: {' '.join(marks.added)}" if marks.added else ""
    say(
        f"Numbers and marks survive the tokenizer; {marks.template.end_of_read} ends a reading, "
        f"{marks.template.end_of_retrieve} the retrieval{added}"
    )
    say(f"Without a memory its logits differ from the backbone's by {report.logit_difference:.1g}")
    say(f"Try it: msa index FILES... --bank bank/ --model {out}", style="dim")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
