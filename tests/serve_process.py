"""`msa serve` as people start it: a process with a port, and requests to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

COMMAND = "import sys; from msa.cli.main import main; main(sys.argv[1:])"
PATIENCE = {"MSA_QUEUE_SECONDS": "600", "MSA_ASK_SECONDS": "600"}  # on a busy machine
ADDRESS = re.compile(r"Serving at http://127\.0\.0\.1:(\d+)")


class ServeProcess:
    """A running `msa serve` of the small model, on a free port; what it says goes to `log`.

    Args:
        folder: where its log is written.
        options: of the command.
        seconds: to wait for anything.
        key: of requests that give none.
        environment: of the process, beside this one's.
    """

    def __init__(
        self,
        folder: Path,
        *options: object,
        seconds: float,
        key: str | None = None,
        **environment: str,
    ) -> None:
        self.log, self.seconds, self.key, self.port = folder / "log", seconds, key, 0
        command = [sys.executable, "-c", COMMAND, "serve", *map(str, options)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--port", "0", "--model", "worlds"],
                stderr=log,
                env={**os.environ, **PATIENCE, **environment},
            )

    def text(self) -> str:
        """What it has said so far."""
        return self.log.read_text()

    def until(self, found: Callable[[], Any]) -> Any:
        """What a function gives, as soon as that is something; the process must go on meanwhile."""
        deadline = time.monotonic() + self.seconds
        while not (result := found()):
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)
        return result

    def until_listening(self) -> None:
        """Wait until it says where it serves."""
        self.port = int(self.until(lambda: ADDRESS.search(self.text()))[1])

    def end(self) -> None:
        """Stop it, if it has not stopped."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()

    def send(
        self, method: str, path: str, body: Any = None, key: str | None = "", **headers: str
    ) -> http.client.HTTPConnection:
        """A connection on which a request was sent; `key` None sends none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.seconds)
        key = self.key if key == "" else key
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        return connection

    def ask(
        self, method: str, path: str, body: Any = None, key: str | None = "", **headers: str
    ) -> SimpleNamespace:
        """The response to a request: status, headers, text, and json where it is that."""
        connection = self.send(method, path, body, key, **headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return SimpleNamespace(
            status=response.status,
            headers=response.headers,
            text=text,
            json=json.loads(text) if is_json else None,
        )

    def metric(self, name: str) -> float:
        """A figure of /metrics."""
        found = re.search(
            rf"^{re.escape(name)} (\S+)$", self.ask("GET", "/metrics").text, re.MULTILINE
        )
        return float(found[1]) if found else 0.0
