"""PDF, HTML and DOCX files of clients, read by a process of their own that has only so much time.

Their parsers are made for files that mean well; one that does not can keep them busy for hours.
The process ends itself then, also when its parent is gone, and the next file gets a new one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from msa.text.loaders import (
    CONVERTED_SUFFIXES,
    LoadedDocument,
    LoadFailure,
    load_documents,
    type_suffix,
)
from msa.types import Document

NICENESS = 5
"""Of the process: who asks goes first."""
CHECK_SECONDS = 0.1


class FileReader:
    """Reads files that were uploaded. Not for several threads; close it when done.

    Args:
        seconds: that a PDF, HTML or DOCX file may take.
        max_unpacked_bytes: see `load_documents`.
        check: called again and again while a file is converted; what it raises ends that.
    """

    def __init__(self, seconds: float, max_unpacked_bytes: int, check: Callable[[], None]) -> None:
        self._seconds, self._max_unpacked_bytes, self._check = seconds, max_unpacked_bytes, check
        self._process: subprocess.Popen[str] | None = None
        self._waiting = ThreadPoolExecutor(1, "msa-read")

    def load(self, path: Path) -> Iterator[LoadedDocument | LoadFailure]:
        """What is in a file; see `load_documents`. Of one that took too long, a failure."""
        if type_suffix(path) not in CONVERTED_SUFFIXES:
            yield from load_documents(
                [path], root=path.parent, max_unpacked_bytes=self._max_unpacked_bytes
            )
            return
        reason = "the process that converts it ended, twice; save it again, or send its text"
        for _ in range(2):
            begun = time.monotonic()
            answer = self._converted(path)
            if answer:
                yield from map(_item, json.loads(answer))
                return
            if time.monotonic() - begun >= self._seconds:
                reason = (
                    f"converting it took longer than {self._seconds:g} s; save it again in a "
                    "simpler form, or send its text"
                )
                break
        yield LoadFailure(str(path), reason, origin=path.name)

    def close(self) -> None:
        """End the process."""
        self._end()
        self._waiting.shutdown()

    def _converted(self, path: Path) -> str:
        """What the process says to a file; empty if it has ended."""
        process = self._started()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            process.stdin.write(json.dumps(str(path)) + "\n")
            process.stdin.flush()
        answer = self._answer(process)
        if not answer:
            self._end()
        return answer

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(self._seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # parsers quote what they read
                encoding="utf-8",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        return self._process

    def _answer(self, process: subprocess.Popen[str]) -> str:
        """The next line of the process."""
        assert process.stdout is not None
        line = self._waiting.submit(process.stdout.readline)
        while True:
            try:
                return line.result(CHECK_SECONDS)
            except TimeoutError:
                self._check()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with contextlib.suppress(BrokenPipeError), process:  # closes the pipes and waits
            pass


def _item(found: dict[str, Any]) -> LoadedDocument | LoadFailure:
    if "document" not in found:
        return LoadFailure(**found)
    return LoadedDocument(**{**found, "document": Document(**found["document"])})


def _main(seconds: float) -> None:
    """Convert the file of every line of stdin; ends the process if one takes longer."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    for number in (signal.SIGINT, signal.SIGTERM):  # those are for the service, which ends this one
        signal.signal(number, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what parsers print is no answer
        for line in sys.stdin:
            path = Path(json.loads(line))
            # works while a parser keeps Python's lock, as a regular expression does
            faulthandler.dump_traceback_later(seconds, exit=True)
            found = [asdict(item) for item in load_documents([path], root=path.parent)]
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    _main(float(sys.argv[1]))
