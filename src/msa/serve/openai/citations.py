"""Citations of an answer, in the form that each client shows.

- `annotations`: the text as it is; OpenAI's annotations beside it.
- `markers`: "[1]" after the text, with an annotation where each stands.
- `markdown`: the same, and a list of sources as links, for clients that show only Markdown.
- `open_webui`: markers, and in a stream an event per source, which Open WebUI opens as a passage.
- `none`: nothing beside the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msa.serve.links import permalink
from msa.serve.openai.file_ids import CitedFile, cited_file
from msa.types import Answer, Citation

_SOURCES = "Sources:"
_MARKS = re.compile(r"(?:\s*\[\d{1,3}\])+(?=\s*$)")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+!|~&])")


@dataclass(frozen=True, slots=True)
class Source:
    """A document that the answer rests on.

    Attributes:
        citation: of the engine.
        bank: name of the bank.
        url: where it is shown, with the answer highlighted.
        score: from 0 to 1, its share among those that could be read in its round.
    """

    citation: Citation
    bank: str
    url: str
    score: float

    @property
    def name(self) -> str:
        """What people see."""
        return self.citation.title or self.citation.id

    @property
    def file(self) -> CitedFile:
        """The file that OpenAI's clients know it by."""
        cited = self.citation
        return cited_file(self.bank, cited.id, cited.number, cited.title)

    def as_json(self) -> dict[str, Any]:
        """For the field `msa.citations`."""
        cited = self.citation
        return {
            "id": cited.id,
            "number": cited.number,
            "title": cited.title,
            "url": self.url,
            "round": cited.round,
            "score": self.score,
            "span": cited.span,
        }


@dataclass(frozen=True, slots=True)
class Mark:
    """Where in the text a source is cited: characters from `start` to before `end`."""

    source: Source
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class CitedText:
    """An answer with its citations.

    Attributes:
        text: the answer, and after it what the form adds.
        marks: one per source; over the whole answer where the text has no markers.
    """

    text: str
    marks: tuple[Mark, ...]


def sources(answer: Answer, bank: str, base: str) -> list[Source]:
    """The documents that an answer rests on, each once, in the order in which they were read.

    Args:
        answer: whole.
        bank: name of the bank.
        base: how addresses of this service begin.
    """
    priors = {(r.index, d.number): d.prior for r in answer.rounds for d in r.ranked}
    found: dict[int, Source] = {}
    for cited in answer.citations:
        url = permalink(base, bank, cited.number)
        if cited.span is not None:
            url += f"?span={cited.span[0]}-{cited.span[1]}"
        score = min(1.0, max(0.0, priors.get((cited.round, cited.number), 0.0)))
        found.setdefault(cited.number, Source(cited, bank, url, score))
    return list(found.values())


def cite(text: str, cited: Sequence[Source], form: str) -> CitedText:
    """An answer's text with its citations in some form."""
    if form == "none":
        return CitedText(text, ())
    if form == "annotations" or not cited:
        return CitedText(text, tuple(Mark(source, 0, len(text)) for source in cited))
    marks = []
    gap = " " if text else ""
    for i, source in enumerate(cited, 1):
        start = len(text) + len(gap)
        text += f"{gap}[{i}]"
        marks.append(Mark(source, start, len(text)))
        gap = ""
    if form == "markdown":
        listed = [f"[{i}] [{_escaped(s.name)}]({s.url})" for i, s in enumerate(cited, 1)]
        text += f"\n\n{_SOURCES}\n" + "\n".join(f"- {line}" for line in listed)
    return CitedText(text, tuple(marks))


def without_marks(text: str) -> str:
    """An answer that a client sends back, without what `cite` added."""
    head, found, _ = text.rpartition(f"\n\n{_SOURCES}\n")
    return _MARKS.sub("", head if found else text)


def url_annotation(mark: Mark) -> dict[str, Any]:
    """For chat completions, which know no other kind."""
    place = {"start_index": mark.start, "end_index": mark.end}
    return {
        "type": "url_citation",
        "url_citation": {**place, "title": mark.source.name, "url": mark.source.url},
    }


def file_annotation(mark: Mark) -> dict[str, Any]:
    """For responses; the index is the character at which the marker stands, or belongs."""
    file = mark.source.file
    index = mark.start or mark.end
    return {
        "type": "file_citation",
        "file_id": file.file_id,
        "filename": file.filename,
        "index": index,
    }


def open_webui_event(source: Source) -> dict[str, Any]:
    """A source as Open WebUI takes it from a stream.

    The id in its metadata is no URL, since one would be shown in place of the name.
    """
    cited = source.citation
    ident = f"{source.bank}#{cited.number}"
    metadata = {"source": ident, "name": source.name, "source_url": source.url}
    return {
        "type": "source",
        "data": {
            "source": {"id": ident, "name": source.name, "url": source.url},
            "document": [cited.text],
            "metadata": [metadata],
            "distances": [source.score],
        },
    }


def _escaped(text: str) -> str:
    """One line that Markdown shows as it is."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))
