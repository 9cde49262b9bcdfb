"""Hooks of mkdocs: pages of the reference, and what GitHub's Markdown writes in another way.

The pages in this folder are written for GitHub. On the site, formulas are set by MathJax, and links
to the source lead to the reference.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1] / "src" / "msa"
# Programs, not something to call: they have pages of their own.
LEFT_OUT = {"cli", "demo", "serve"}

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE_MATH = re.compile(r"\$`([^`]+)`\$")
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\((\.\./[^()\s]+)\)")


def modules() -> dict[str, list[str]]:
    """Rooms of the package with the dotted names of their modules, in order."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and parts[0] not in LEFT_OUT and path.stat().st_size:
            found.setdefault(parts[0], []).append(".".join(("msa", *parts)))
    return found


def on_files(files: Any, config: Any) -> Any:
    """Add a page of the reference for each room."""
    from mkdocs.structure.files import File

    for room, names in modules().items():
        text = f"# `msa.{room}`\n\n" + "\n\n".join(f"::: {name}" for name in names)
        files.append(File.generated(config, f"api/{room}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Formulas and links of a page, outside of its code."""
    folder = posixpath.dirname(page.file.src_uri)
    done, start = [], 0
    for fence in _FENCE.finditer(markdown):
        done.append(_prose(markdown[start : fence.start()], folder))
        done.append(f"\\[\n{fence[2]}\\]" if fence[1] == "math" else fence[0])
        start = fence.end()
    return "".join([*done, _prose(markdown[start:], folder)])


def _prose(text: str, folder: str) -> str:
    text = _INLINE_MATH.sub(lambda match: rf"\({match[1]}\)", text)
    return _LINK.sub(lambda match: _link(match, folder), text)


def _link(match: re.Match[str], folder: str) -> str:
    """A link out of this folder: to the reference, or its text alone."""
    path, _, name = match[2].partition("#")
    target = posixpath.normpath(posixpath.join(folder, path))
    if not target.startswith("../"):
        return match[0]
    parts = Path(target.removeprefix("../src/msa/")).with_suffix("").parts
    dotted = ".".join(("msa", *(part for part in parts if part != "__init__")))
    room = parts[0]
    if not target.startswith("../src/msa/") or dotted not in modules().get(room, []):
        return match[1]
    page = posixpath.relpath(f"api/{room}.md", folder or ".")
    return f"[{match[1]}]({page}#{dotted}{'.' if name else ''}{name})"
