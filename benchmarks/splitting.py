"""Seconds that cutting a long text takes, for texts without any natural place for a cut.

    python benchmarks/splitting.py [--characters 300000] [--max-tokens 480]

Prints a line per kind of text: seconds, parts, and how often the tokenizer was given each
character.
"""

from __future__ import annotations

import argparse
import time

from msa.model.loading import load
from msa.text.prompts import PromptEncoder
from msa.text.splitting import split_text

KINDS = {
    "letters": "abcdefghij",
    "digits": "3141592653",
    "CJK": "北京上海天气很好",
    "combining marks": "e\u0301\u0323",
    "lines": "a\n",
    "prose": "Ada was born in London in 1815. ",
}


def main() -> None:
    """Cut every kind of text once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--characters", type=int, default=300_000)
    parser.add_argument("--max-tokens", type=int, default=480)
    parser.add_argument("--model", help="whose tokenizer; the default one if not given")
    arguments = parser.parse_args()
    prompts = PromptEncoder(load(arguments.model, device="cpu").tokenizer)
    for kind, unit in KINDS.items():
        text = (unit * arguments.characters)[: arguments.characters]
        characters = 0

        def count(piece: str) -> int:
            nonlocal characters
            characters += len(piece)
            return len(prompts.plain(piece))

        started = time.perf_counter()
        parts = split_text(text, arguments.max_tokens, count)
        seconds = time.perf_counter() - started
        times = characters / len(text)
        print(f"{kind:16} {seconds:6.2f} s, {len(parts):5} parts, counted {times:.1f} times")


if __name__ == "__main__":
    main()
