"""Results of a script, as figures and as a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_results(
    folder: str | Path | None,
    name: str,
    results: dict[str, Any],
    page: Callable[[dict[str, Any]], str] | None = None,
) -> None:
    """Write `NAME.json` and, with a page, `NAME.md`; nothing without a folder.

    Args:
        folder: made if it is not there.
        name: of both files.
        results: JSON values.
        page: the results, as they are read from the file again, in Markdown.
    """
    if folder is None:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, ensure_ascii=False)
    Path(folder, f"{name}.json").write_text(text + "\n", encoding="utf-8")
    if page is not None:
        Path(folder, f"{name}.md").write_text(page(json.loads(text)), encoding="utf-8")
