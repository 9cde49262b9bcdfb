"""Questions made from sentences by simple English rules: good enough to teach finding.

A name, date, place or number is taken out of a sentence, and the word that asks for it is put in
front. The grammar is often rough; what counts is that the words of a question and the gap in it
lead to the sentence's passage.
"""

from __future__ import annotations

import random
import re

from msa.text.sentences import sentence_spans

_AUXILIARY = r"is|are|was|were|has|have|had|can|could|will|would|may|might|must|should"
_CLAUSE = re.compile(
    rf"^(?P<subject>[^,;:()\"“”]{{2,80}}?) (?P<verb>{_AUXILIARY}) (?P<rest>.{{8,}})$"
)
_OPENING = re.compile(
    r"^(?:However|Moreover|Furthermore|Therefore|Thus|Also|Then|Still|In addition|For example|"
    r"In fact|Finally|Meanwhile|Nevertheless|As a result),? "
)
_PRONOUN = re.compile(
    r"^(?:he|she|it|they|we|i|you|this|that|these|those|there|who|which|what|one|some|others?)\b",
    re.IGNORECASE,
)
_SUBORDINATE = re.compile(
    r"^(?:while|although|though|when|if|because|since|even|as|after|before|whether|just|where|"
    r"unless|until|once|and|but|or|nor|so|for|to|in|on|at|by|with|from|under|during)\b",
    re.IGNORECASE,
)
_NAME = r"[A-Z][\w'’-]+(?: (?:of |the |de |von |van )?[A-Z][\w'’-]+)*"
_MONTH = r"January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = re.compile(
    rf",? ?\b(?:in|on|since|by|until|from|around|about) "
    rf"((?:early |late |mid-)?(?:(?:{_MONTH}) )?(?:\d{{1,2}},? )?(?:1\d{{3}}|20\d{{2}})s?)\b,?"
)
_PLACE = re.compile(rf",? ?\b(?:in|at|near) ((?:the )?(?!(?:{_MONTH})\b){_NAME})")
_COUNT_WORD = r"two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|hundred"
_NUMBER = re.compile(
    r"\b((?:about |over |nearly |some )?"
    rf"(?:\d[\d,]*(?:\.\d+)?(?: (?:million|billion|thousand))?|{_COUNT_WORD})) "
    r"([a-z]{3,}s|people|men|women|children|percent)\b"
)
_PERSON = re.compile(
    r"^(?!(?:An?|The)\b)[A-Z][a-z'’-]+(?: [A-Z]\.)?(?: (?:de|von|van|of))?(?: [A-Z][\w'’-]+){1,2}$"
)
_NO_PERSON = re.compile(
    r"\b(?:The|University|College|School|Company|City|County|River|Lake|Mount|War|Party|Church|"
    r"Council|Act|Street|Island|Islands|North|South|East|West|New|United|National|Team|Club)\b"
)
_LOWERED = re.compile(
    r"^(?:The|A|An|In|On|At|By|For|From|His|Her|Its|Their|Our|My|This|These|Most|Many|Some|All|"
    r"Both|After|Before|During|Since|When|While|As|If|Each|Every|Several)\b"
)
QUESTION_WORDS = (6, 30)
MAX_ANSWER_WORDS = 12
MAX_SUBJECT_WORDS = 8


def sentences(text: str) -> list[str]:
    """Sentences of a text in order, as they stand."""
    return [text[start:end] for start, end in sentence_spans(text)]


def question_from(sentence: str, rng: random.Random) -> tuple[str, str] | None:
    """A question that the sentence answers, and the answer; None where no rule fits.

    Args:
        sentence: one English statement.
        rng: chooses among the rules that fit.
    """
    text = _OPENING.sub("", " ".join(sentence.split()))
    if not text or text.endswith(("?", "!")) or "__" in text:
        return None
    text = text.rstrip(".;:,\"'”’ ")
    clause = _CLAUSE.match(text)
    if clause and not _is_subject(clause["subject"]):
        clause = None
    made = [*_asking_for_subject(clause), *_asking_for_part(text, clause)]
    good = [
        (question, answer)
        for question, answer in made
        if QUESTION_WORDS[0] <= len(question.split()) <= QUESTION_WORDS[1]
        and question.count("(") == question.count(")")
        and 0 < len(answer.split()) <= MAX_ANSWER_WORDS
    ]
    return rng.choice(good) if good else None


def _is_subject(text: str) -> bool:
    """True for a short noun phrase that means something by itself, as far as rules can tell."""
    words = len(text.split())
    return words <= MAX_SUBJECT_WORDS and not _PRONOUN.match(text) and not _SUBORDINATE.match(text)


def _asking_for_subject(clause: re.Match[str] | None) -> list[tuple[str, str]]:
    """`<subject> <verb> <rest>`: who or what does it, and what the subject is."""
    if clause is None:
        return []
    subject, verb, rest = clause["subject"], clause["verb"], clause["rest"]
    person = bool(_PERSON.match(subject)) and not _NO_PERSON.search(subject)
    word = "Who" if person else "What"
    made = [(f"{word} {verb} {rest}?", subject)]
    if verb in ("is", "are", "was", "were") and re.match(r"(?:a|an|the) ", rest):
        what = re.split(r"[,;:]| (?:that|which|who|where) ", rest)[0]
        made.append((f"{word} {verb} {_lowered(subject)}?", what))
    return made


def _asking_for_part(text: str, clause: re.Match[str] | None) -> list[tuple[str, str]]:
    """When, where and how many."""
    made = []
    for word, pattern in (("When", _DATE), ("Where", _PLACE), ("How many", _NUMBER)):
        match = pattern.search(text)
        if match is None:
            continue
        word = f"{word} {match[2]}" if pattern is _NUMBER else word
        question = _asked(word, text, match.span(), clause)
        if question is not None:
            made.append((question, match[1]))
    return made


def _asked(word: str, text: str, gap: tuple[int, int], clause: re.Match[str] | None) -> str | None:
    """The question word, then the sentence without the gap, its verb in front where it is known."""
    left, right = text[: gap[0]], text[gap[1] :]
    if clause is not None and gap[0] >= clause.start("rest"):
        subject, verb = _lowered(clause["subject"]), clause["verb"]
        question = f"{word} {verb} {subject} {left[clause.start('rest') :]} {right}"
    else:  # the part of the sentence in which the gap is
        left, right = re.split(r"[,;:] ", left)[-1].strip(), re.split(r"[,;:]", right)[0]
        if _SUBORDINATE.match(left) or _PRONOUN.match(left):
            return None
        question = f"{word} did {_lowered(left)} {right}" if left else f"{word} {right}"
    question = re.sub(r"\s+([,.;:)])", r"\1", " ".join(question.split()))
    return question.strip(" ,;:") + "?"


def _lowered(text: str) -> str:
    """A beginning that is no name, as it stands within a sentence."""
    return text[0].lower() + text[1:] if _LOWERED.match(text) else text
