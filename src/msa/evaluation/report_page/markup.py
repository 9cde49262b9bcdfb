"""HTML as text, escaped wherever it is not markup already."""

from __future__ import annotations

import re
from html import escape

CAMEL = ("viewBox", "preserveAspectRatio")


class Html(str):
    """Markup; every other text is escaped when it is put into an element."""

    __slots__ = ()


def el(tag: str, /, *children: str | None, **attributes: str | float | bool | None) -> Html:
    """An element.

    Args:
        tag: its name.
        *children: markup, or text, which is escaped; None is left out.
        **attributes: `class_` is class, `aria_label` is aria-label; True is an attribute without a
            value, False and None are left out.
    """
    written = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        word = key.rstrip("_").replace("_", "-") if key not in CAMEL else key
        written += f" {word}" if value is True else f' {word}="{escape(str(value))}"'
    if tag in ("meta", "input", "br"):
        return Html(f"<{tag}{written}>")
    return Html(f"<{tag}{written}>{joined(*children)}</{tag}>")


def joined(*children: str | None) -> Html:
    """Markup one after another; text is escaped."""
    return Html("".join(c if isinstance(c, Html) else escape(c) for c in children if c is not None))


def breakable(name: str) -> Html:
    """A name that a narrow column may break after its signs."""
    parts = [escape(part) for part in re.split(r"(?<=[:,=_/])", name)]
    return Html("<wbr>".join(parts))
