"""Which sentences of what was read are likely to hold the answer: those that hold the question.

A small model that reads a whole passage takes its numbers and names for each other. In which
sentence a candidate stands tells them apart better than the model's own probabilities do: an answer
mostly stands in a sentence that repeats much of the question. So while an answer is written, a
token that leads into a sentence with less of the question is made less likely (an extension; the
paper leaves it to the model).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msa.inference.answers import AnswerText
from msa.inference.decoding import Preference
from msa.inference.spans import has_borders
from msa.text.sentences import sentence_spans

UNKNOWN_SHARE = 0.5
"""Where a bank has no word index to tell rare words by, or the answer stands nowhere."""
OUTSIDE = 0.5
"""How far words that stand in no text are taken to be behind the best sentence."""
_BETWEEN_VALUES = " ,;:"


@dataclass(frozen=True, slots=True)
class _Sentence:
    """A sentence of a text.

    Attributes:
        text: which one, from 0.
        start, end: character offsets.
        words: as they are looked for.
        share: how much of the question it holds, with the title of its text; in [0, 1].
        behind: how much less that is than of the best sentence of the same text, from 0.
    """

    text: int
    start: int
    end: int
    words: str
    share: float
    behind: float


class Evidence:
    """What was read for one question, sentence by sentence.

    Attributes:
        share: how much of the question all texts together hold, in [0, 1].
    """

    def __init__(
        self,
        texts: Sequence[tuple[str, str]],
        shares: Callable[[Sequence[str]], Sequence[float] | None],
    ) -> None:
        """Cut texts into sentences and weigh these.

        Args:
            texts: (title, text) of each that was read.
            shares: how much of the question each of some texts holds, in [0, 1]
                (`QuerySnapshot.coverage`); None where that cannot be told.
        """
        self.share = UNKNOWN_SHARE
        self._sentences: list[_Sentence] = []
        places = [(i, at) for i, (_, text) in enumerate(texts) for at in sentence_spans(text)]
        if not places:
            return
        whole = "\n".join(part for read in texts for part in read)
        titled = [f"{texts[i][0]}\n{texts[i][1][slice(*at)]}" for i, at in places]
        found = shares([whole, *titled])
        if found is None:
            return
        self.share = found[0]
        best = [0.0] * len(texts)
        for (i, _), share in zip(places, found[1:], strict=True):
            best[i] = max(best[i], share)
        sentences = [
            _Sentence(i, *at, _plain(texts[i][1][slice(*at)]), share, best[i] - share)
            for (i, at), share in zip(places, found[1:], strict=True)
        ]
        self._sentences = sorted(sentences, key=lambda one: one.behind)

    def share_around(self, text: int, span: tuple[int, int]) -> float:
        """How much of the question a sentence holds that a span of a text stands in.

        Args:
            text: which one, from 0.
            span: character offsets; of the sentences that it touches the best one counts.
        """
        touched = [
            one.share
            for one in self._sentences
            if one.text == text and one.start < span[1] and one.end > span[0]
        ]
        return max(touched, default=UNKNOWN_SHARE)

    def behind(self, beginning: str) -> float:
        """How far an answer that begins so is behind the best one, in shares of the question.

        That of the best sentence in which it stands, at the beginning of a word and in any case.
        Where it stands in none, as of several values in a row, that of its first words that do
        stand in one; `OUTSIDE` without any. 0 where nothing is known or written.

        Args:
            beginning: of an answer; its last word may not be complete.
        """
        words = _plain(beginning.rstrip("\ufffd"))
        if not words or not self._sentences:
            return 0.0
        while words:
            for one in self._sentences:
                if _holds(one.words, words):
                    return min(one.behind, OUTSIDE)
            words = words.rpartition(" ")[0].rstrip(_BETWEEN_VALUES)
        return OUTSIDE

    def preference(self, weight: float, answers: AnswerText) -> Preference:
        """What is added to the score of an answer as it is written: `-weight * behind`."""
        return lambda tokens: -weight * self.behind(answers.text(tokens))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _holds(words: str, wanted: str) -> bool:
    """Whether it stands there, where a word begins."""
    at = words.find(wanted)
    while at > 0 and words[at - 1].isalnum() and has_borders(wanted[0]):
        at = words.find(wanted, at + 1)
    return at >= 0
