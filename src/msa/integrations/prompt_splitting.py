"""A prompt that holds its documents and its question, taken apart."""

from __future__ import annotations

import re
from dataclasses import dataclass

from msa.errors import InputError

_LABEL = re.compile(
    r"^[ \t]*(?:\*\*)?(?:question|query|q)(?:\*\*)?[ \t]*:(?:\*\*)?[ \t]*", re.I | re.M
)
_LEAD_IN = re.compile(
    r"^[ \t]*(?:\*\*)?(?:the )?(?:final )?(?:answer|a|response)\b[^\n]{0,40}:", re.I
)


@dataclass(frozen=True, slots=True)
class SplitPrompt:
    """What a prompt is made of.

    Attributes:
        context: what is to be remembered; empty if the prompt is a question only.
        question: what is asked of it.
    """

    context: str
    question: str


def split_prompt(prompt: str, pattern: str | None = None) -> SplitPrompt:
    r"""Context and question of a prompt, as benchmarks of long context write them.

    The question follows the last line that begins with "Question:" (or "Query:", "Q:"), if
    that line is in the last part of the prompt: nothing follows it but its own paragraph and the
    lead-in of an answer. Otherwise it is the last line that is no lead-in ("Answer:"), up to its
    last question mark where it has one. All before it is the context, instructions and examples
    too.

    Args:
        prompt: as a harness passes it to a model.
        pattern: a regular expression with groups `context` and `question`, for prompts that are
            written otherwise; it must match from the beginning, and "." matches line breaks.

    Raises:
        InputError: the pattern does not match, or lacks a group; or the prompt has no text.

    Example:
        >>> split_prompt("Ada was born in Oslo.\n\nQuestion: Where was Ada born?\nAnswer:")
        SplitPrompt(context='Ada was born in Oslo.', question='Where was Ada born?')
    """
    if pattern is not None:
        return _by_pattern(prompt, pattern)
    labels = list(_LABEL.finditer(prompt))
    if labels:
        question, _, after = prompt[labels[-1].end() :].strip().partition("\n")
        rest = [line for line in after.splitlines() if line.strip()]
        if question and len(rest) <= 1 and all(_LEAD_IN.match(line) for line in rest):
            return SplitPrompt(prompt[: labels[-1].start()].strip(), question.strip())
    lines = prompt.rstrip().splitlines()
    while len(lines) > 1 and (not lines[-1].strip() or _LEAD_IN.match(lines[-1])):
        lines.pop()
    question = lines.pop().strip() if lines else ""
    if not question:
        raise InputError("the prompt is empty; a question is needed")
    if "?" in question:
        question = question[: question.rindex("?") + 1]
    return SplitPrompt("\n".join(lines).strip(), question)


def _by_pattern(prompt: str, pattern: str) -> SplitPrompt:
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise InputError(f"split={pattern!r} is no regular expression ({error})") from error
    missing = {"context", "question"} - set(compiled.groupindex)
    if missing:
        raise InputError(f"split={pattern!r} has no group (?P<{min(missing)}>...)")
    found = compiled.match(prompt)
    if found is None:
        raise InputError(f"split={pattern!r} does not match the prompt {prompt[:80]!r}...")
    return SplitPrompt(found["context"].strip(), found["question"].strip())
