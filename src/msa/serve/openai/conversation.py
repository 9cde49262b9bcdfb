"""The last question of a conversation, made whole: it can be asked without what came before.

The model answers one question at a time and was not taught to rewrite. So this is done by rules,
for English: the same conversation always gives the same question, and a question that stands on its
own is not touched. Who or what the conversation is about is followed from turn to turn; then

- a pronoun gives way to its antecedent: "When was he born?" - "When was Walter Scott born?";
- a fragment is completed from the question before: "And in 1995?", "What about Anna?", "Why?";
- "the band", "this album", or a question that names nothing at all gets the subject added.

Names are known by their capital letters. A language other than English, and a question for which
nothing is found, stay as they are.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from msa.serve.openai.english import (
    AUXILIARIES,
    FUNCTION_WORDS,
    PREPOSITIONS,
    QUESTION_WORDS,
    WORD,
    names,
    set_of,
    words_of,
)

Kind = Literal["he", "she", "person", "place", "group", "thing"]

MAX_TURNS = 40
"""Earlier turns that are looked at, the latest ones."""
MAX_CHARACTERS = 2000
"""What is read of each earlier turn; a longer question stays as it is."""
_TITLE = 8  # words of a turn that only names what is to be spoken of
_FRAGMENT = 5  # words of a question that may be the rest of a question
_PRONOUNS: dict[str, Kind] = {
    **dict.fromkeys(set_of("he him his himself"), "he"),
    **dict.fromkeys(set_of("she her hers herself"), "she"),
    **dict.fromkeys(set_of("they them their theirs themselves"), "group"),
    **dict.fromkeys(set_of("it its itself"), "thing"),
    "there": "place",
}
_POSSESSIVES = {"his", "her", "hers", "their", "theirs", "its"}
_SUITS: dict[Kind, set[Kind | None]] = {
    "he": {"he", "person", None},
    "she": {"she", "person", None},
    "group": {"group", None},
    "thing": {"thing", "group", "place", None},
    "place": {"place"},
}
_SUITS_AT_NEED: dict[Kind, set[Kind | None]] = {
    "he": {"thing", "group"},
    "she": {"thing", "group"},
    "group": {"he", "she", "person", "place", "thing"},
}
_ANSWER_KINDS: dict[str, Kind] = {
    "who": "person",
    "whom": "person",
    "where": "place",
    "what": "thing",
    "which": "thing",
}
_REFERRING = {"this", "these", "those", "else", "other", "another", "happened"}
_CLASS_NOUNS = set_of(
    "band group team company club film movie album song single book novel series show game party "
    "country city town village school university river island ship artist author singer"
)
"""The N may be called by name: "the band INXS"."""
_OPENING = re.compile(
    r"^\W*(?:(?:and|but|so|or|also|then|ok|okay)\b\W*)*(?:(?:what|how) about\b)?\W*", re.IGNORECASE
)
_WHO_DID = re.compile(rf"\W*who (?!(?:else|{'|'.join(AUXILIARIES)})\b)")
_YEAR = re.compile(r"\b[12]\d{3}\b")
_NUMBER = re.compile(r"\b\d+\b")


@dataclass(frozen=True, slots=True)
class Turn:
    """What was said before.

    Attributes:
        role: who said it.
        text: as it was said.
    """

    role: Literal["user", "assistant"]
    text: str


@dataclass(slots=True)
class _Mention:
    """A person or thing that was named.

    Attributes:
        name: the longest by which it was called.
        kind: None until the conversation shows it.
        asked: named in a question, or as the answer to one: what the conversation is about.
        count: how often it was spoken of.
        turn: in which it was so the last time.
    """

    name: str
    kind: Kind | None
    asked: bool
    count: int = 0
    turn: int = 0


def complete_question(question: str, earlier: Sequence[Turn]) -> str:
    """The question as it can be asked on its own.

    Args:
        question: the last thing the user said.
        earlier: the turns before it, oldest first.
    """
    conversation = _Conversation()
    for turn in earlier[-MAX_TURNS:]:
        text = turn.text[:MAX_CHARACTERS]
        if turn.role == "user":
            conversation.ask(text)
        else:
            conversation.answer(text)
    return conversation.complete(question)


class _Conversation:
    """What was named so far, the latest first, and the last question, whole."""

    def __init__(self) -> None:
        self._mentions: list[_Mention] = []
        self._question = ""
        self._said: set[str] = set()  # words of all turns
        self._turn = 0

    def ask(self, question: str) -> None:
        """Take in a question of the user's."""
        self._turn += 1
        whole = self.complete(question)
        self._said.update(words_of(question))
        title = _title(question)
        if set(words_of(whole)) & (AUXILIARIES | QUESTION_WORDS):
            self._question = whole
        for name in reversed([title] if title else list(names(whole))):
            place = re.search(rf"\b(?:in|at) (?:the )?{re.escape(name)}", whole)
            self._put_first(name, "place" if place else None)

    def answer(self, text: str) -> None:
        """Take in an answer; one that is only a name is what is spoken of from now on."""
        self._turn += 1
        self._said.update(words_of(text))
        question = self._question.casefold()
        asked = next((word for word in words_of(question) if word in QUESTION_WORDS), "")
        only = next(names(text, first=True), None) == text.strip(" .,")
        new = [n for n in names(text, first=only) if n.casefold() not in question]
        if new and _WHO_DID.match(question):
            self._mark_things(question)
        for i, name in enumerate(new):
            person = i == 0 and asked in ("who", "whom")
            if only and asked in _ANSWER_KINDS:
                self._put_first(name, _ANSWER_KINDS[asked])
            elif self._known(name) is None:
                self._mentions.append(_Mention(name, "person" if person else None, asked=person))

    def _mark_things(self, question: str) -> None:
        """The object of an action is, unless known better, no person."""
        for mention in self._mentions:
            if mention.kind is None and mention.name.casefold() in question:
                mention.kind = "thing"

    def complete(self, question: str) -> str:
        """The question, whole."""
        known = self._question or self._mentions
        if not known or len(question) > MAX_CHARACTERS:
            return question
        whole = self._from_fragment(question) or question
        words = words_of(whole)
        if not set(words) & FUNCTION_WORDS:
            return question
        replaced = self._without_pronoun(whole)
        if replaced != whole:
            return replaced
        if list(names(whole)):
            return self._with_full_name(whole)
        return self._with_subject(whole, words)

    # ---- who and what is spoken of

    def _put_first(self, name: str, kind: Kind | None = None) -> None:
        known = self._known(name)
        if known is None:
            known = _Mention(name, kind, asked=True)
        else:
            self._mentions.remove(known)
        known.asked, known.kind = True, known.kind or kind
        known.count, known.turn = known.count + 1, self._turn
        self._mentions.insert(0, known)

    def _known(self, name: str) -> _Mention | None:
        """What has this name, or one that begins or ends with it."""
        folded = f" {name.casefold()} "
        for mention in self._mentions:
            known = f" {mention.name.casefold()} "
            if known.startswith(folded) or known.endswith(folded):
                return mention
        return None

    def _antecedent(self, kind: Kind) -> _Mention | None:
        """What a pronoun means; it is of that kind from now on."""
        asked = [mention for mention in self._mentions if mention.asked]
        others = [mention for mention in self._mentions if not mention.asked]
        found = [m for m in asked if m.kind in _SUITS[kind]]
        found.sort(key=lambda m: (-m.turn, m.kind != kind))
        found += [m for m in asked if m.kind in _SUITS_AT_NEED.get(kind, ())]
        found += [m for m in others if m.kind in _SUITS[kind]]
        if not found:
            return None
        if found[0].kind in (None, "person"):
            found[0].kind = kind
        return found[0]

    # ---- what makes a question whole

    def _without_pronoun(self, question: str) -> str:
        """The question with a name in place of its first pronoun that means nothing in it."""
        tried: set[Kind] = set()
        for found in WORD.finditer(question):
            word = found.group().casefold()
            end = found.end()
            if word.endswith(("'s", "’s")):  # of "he's"
                word, end = word[:-2], end - 2
            before, behind = question[: found.start()], question[end:]
            kind = _PRONOUNS.get(word)
            if kind is None or kind in tried or _means_nothing(word, before, behind):
                continue
            if next(names(before), None) is not None:
                break  # it may mean that
            tried.add(kind)
            mention = self._antecedent(kind)
            if mention is None:
                continue
            name = f"in {mention.name}" if kind == "place" else mention.name
            if word in _POSSESSIVES and (word != "her" or _owns(behind)):
                name += "'" if name.endswith("s") else "'s"
            return before + name + behind
        return question

    def _with_full_name(self, question: str) -> str:
        """The question with "Walter Scott" where it says "Scott"."""
        for name in names(question):
            known = None if " " in name else self._known(name)
            if known is not None and " " in known.name:
                pattern = rf"(?<!\w){re.escape(name)}(?!\w)"
                return re.sub(pattern, lambda _: known.name, question, count=1)  # noqa: B023
        return question

    def _with_subject(self, question: str, words: list[str]) -> str:
        """The question with what is mostly spoken of, where it says "the band", "that", "else"."""
        spoken_of = max(reversed(self._mentions), key=lambda m: m.count, default=None)
        if spoken_of is None or not self._refers_back(words):
            return question
        body = question.rstrip(" ?!.")
        if words[-1] in _CLASS_NOUNS and words[-2:-1] == ["the"]:
            link = ""
        else:
            link = "to " if "happened" in words else "of "
        return f"{body} {link}{spoken_of.name}{question[len(body) :]}"

    def _refers_back(self, words: list[str]) -> bool:
        """Whether a question without names is about what was said."""
        if set(words) & _REFERRING or words[-1] == "that":
            return True
        following = {b for a, b in itertools.pairwise(words) if a in ("the", "that")}
        return bool(following & (self._said | _CLASS_NOUNS))

    def _from_fragment(self, question: str) -> str:
        """A whole question from "Why?", "And in 1995?" and the question before.

        Returns:
            Empty if it is no such rest of a question.
        """
        rest = _OPENING.sub("", question).strip(" ?!.")
        words = words_of(rest)
        if not self._question or not words or len(words) > _FRAGMENT:
            return ""
        before = self._question.rstrip(" ?!.")
        if words[0] in QUESTION_WORDS and len(words) == 1:
            return _asked_again(before, rest) + "?"
        if set(words) & (AUXILIARIES | QUESTION_WORDS):
            return ""
        for pattern in (_YEAR, _NUMBER):
            if pattern.search(before) and (new := pattern.search(rest)):
                return pattern.sub(new.group(), before, count=1) + "?"
        new_name = next(names(rest, first=True), None)
        if words[0] in PREPOSITIONS:
            same = re.search(rf"\b{words[0]} (?:the )?(?=[A-Z])", before)
            old = next(names(before[same.end() :], first=True), None) if same else None
            if same and old:
                return before[: same.start()] + rest + before[same.end() + len(old) :] + "?"
            return f"{before} {rest}?"
        old = next(names(before), None)
        if new_name and old and rest != question.strip(" ?!."):
            return before.replace(old, rest, 1) + "?"
        return ""


def _title(text: str) -> str:
    """The text without brackets if it is only a name: "The Birth of a Nation"; else empty."""
    text = re.sub(r"\s*\([^()]*\)", "", text).strip(" .")
    words = WORD.findall(text)
    folded = set(words_of(text))
    if not words or len(words) > _TITLE or folded & (AUXILIARIES | QUESTION_WORDS):
        return ""
    named = [word for word in words if word.casefold() not in FUNCTION_WORDS]
    return text if named and words[0][0].isupper() and all(w[0].isupper() for w in named) else ""


def _means_nothing(word: str, before: str, behind: str) -> bool:
    """True for the "it" of "Is it true that", "What time is it?", and the "there" of "is there"."""
    if word == "there":
        return re.search(r"\b(?:is|are|was|were|been|be) $", before[-8:], re.IGNORECASE) is not None
    if word != "it":
        return False
    return bool(
        re.match(r"\s+(?:true|possible|correct|raining|take|cost)\b.*\b(?:that|to)\b", behind[:80])
        or re.search(r"\b(?:time|day|date|year) (?:is|was) $", before[-12:])
    )


def _owns(behind: str) -> bool:
    """Whether what follows "her" is hers."""
    following = re.match(r"\s+([^\W\d_]+)", behind)
    return following is not None and following.group(1).casefold() not in FUNCTION_WORDS


def _asked_again(before: str, word: str) -> str:
    """A question with another question word: "When did they part", "Why" - "Why did they part"."""
    begin, _, rest = before.partition(" ")
    word = word.capitalize()
    if begin.casefold() in ("when", "where", "why", "how") and words_of(rest)[:1] != []:
        return f"{word} {rest}"
    if begin.casefold() in AUXILIARIES:
        return f"{word} {begin.lower()} {rest}"
    return f"{before}, and {word.lower()}"
